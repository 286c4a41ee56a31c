"""Proved, not sampled: what holds of a loss for all predictions of a range.

Verification looks at a loss along sweeps, at points. Interval arithmetic looks at whole boxes of
predictions at once: a box of the range either is shown to be free of trouble, or it is cut in two
and looked at again. What is proved so holds at every point, of the loss as it is trained (stable
logarithms, bounded IoU), in exact and in float32 arithmetic alike. What cannot be decided stays
"sampled", as verification leaves it.

* finite-values, finite-gradients: neither is infinite or no number, for any quality (IoU).
* monotonicity: no slope rises towards the label or target by more than the space's tolerance of the
  steepest; for classification by any logit, at IoU 1; for boxes along translations of a box of any
  size, growing, shrinking and stretching.

It covers formulas that ``kernels`` cuts down to single elements; others use the class axis in a way
that intervals do not follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cse_autoloss.elementwise import Program
from cse_autoloss.expression import Expression
from cse_autoloss.inputs import AREA_EPSILON, IOU_EPSILON, MIN_IOU
from cse_autoloss.kernels import BoxKernel, OneStageKernel, TwoStageKernel
from cse_autoloss.primitives import NUMPY, Primitive
from cse_autoloss.screening.interval_arithmetic import INTERVALS, Interval, interval
from cse_autoloss.screening.properties import FINITE_GRADIENTS, FINITE_VALUES, MONOTONICITY
from cse_autoloss.space import SearchSpace
from cse_autoloss.stable import is_released, stabilized

PROVED, REFUTED, SAMPLED = "proved", "refuted", "sampled"
LOGIT = 80.0  # logits are taken from [-LOGIT, LOGIT]
CLASSES = 100_000  # as many at most
BOXES = 40_000  # of a claim that are looked at before it is given up
ROUNDS = 60  # times that a box is cut in two at most


@dataclass(frozen=True)
class Finding:
    """What is known of a property.

    Attributes:
        status: ``"proved"`` over the whole range; ``"refuted"``, with where; ``"sampled"``: none.
        over: the range, in words.
        counterexample: names to values, for a refuted property.
    """

    status: str
    over: str
    counterexample: dict[str, float] | None = None


@dataclass(frozen=True)
class _Bounds:
    """What a loss is between on boxes of predictions.

    Attributes:
        value: of the loss.
        gradients: of its derivatives by the prediction.
        slopes: of what must not be positive; none where only finiteness counts.
    """

    value: Interval
    gradients: list[Interval]
    slopes: list[Interval] = field(default_factory=list)

    def hold(self, property: str, limit: float) -> np.ndarray:
        """On which boxes the property surely holds."""
        if property == MONOTONICITY:
            return np.logical_and.reduce(
                [np.ones_like(self.value.finite), *(part.hi <= limit for part in self.slopes)]
            )
        parts = self.gradients if property == FINITE_GRADIENTS else [self.value]
        return np.logical_and.reduce([part.finite for part in parts])


@dataclass(frozen=True)
class _Claim:
    """What has to hold over a box of parameters, each in a (lowest, highest) of its own.

    ``exact``: every point of the box is a prediction that there is, and none may miss it.
    """

    ranges: dict[str, tuple[float, float]]
    bounds: Callable[[dict[str, Interval]], _Bounds]
    exact: bool = True


def prove(expression: Expression, space: SearchSpace) -> dict[str, Finding]:
    """Finiteness and monotonicity to what is known of them. Takes up to a second or two."""
    stable = not is_released(expression, space)
    computed = stabilized(expression) if stable else expression
    claims, over = _CLAIMS[space.inputs](computed, space, stable)
    tolerance = space.probes["tolerances"]["monotonicity"]

    def finding(property: str) -> Finding:
        for claim in claims or ():
            status, where = _decide(claim, property, tolerance)
            if status != PROVED:
                return Finding(status, over, where)
        return Finding(SAMPLED if claims is None else PROVED, over)

    return {name: finding(name) for name in (FINITE_VALUES, FINITE_GRADIENTS, MONOTONICITY)}


def _decide(claim: _Claim, property: str, tolerance: float) -> tuple[str, dict[str, float] | None]:
    """Cut the claim's box until each part is decided, one is refuted, or there are too many."""
    names = list(claim.ranges)
    low, high = (np.array([claim.ranges[name][end] for name in names])[None] for end in (0, 1))
    span = np.maximum(high - low, 1e-300)
    for axis in np.flatnonzero((high > low)[0]):
        for _ in range(6 if len(names) == 1 else 3):
            low, high = _cut(low, high, np.full(len(low), axis))
    limit, looked_at = None, 0
    for _ in range(ROUNDS):
        looked_at += len(low)
        if looked_at > BOXES:
            break
        middle = (low + high) / 2
        points = _look(claim, names, middle, middle)
        if limit is None:
            steepest = max((np.max(_size(slope)) for slope in points.slopes), default=0.0)
            limit = tolerance * steepest
        # (That a bound is infinite at a point is no proof that the loss is.)
        if property == MONOTONICITY and claim.exact:
            for slope in points.slopes:
                if (broken := slope.lo > limit).any():
                    return REFUTED, dict(zip(names, middle[np.argmax(broken)].tolist()))
        left = ~_look(claim, names, low, high).hold(property, limit)
        if not left.any():
            return PROVED, None
        widest = np.argmax((high[left] - low[left]) / span, axis=1)
        low, high = _cut(low[left], high[left], widest)
    return SAMPLED, None


def _look(claim: _Claim, names: list[str], low: np.ndarray, high: np.ndarray) -> _Bounds:
    with np.errstate(all="ignore"):
        bounds = claim.bounds(
            {name: Interval(low[:, i], high[:, i]) for i, name in enumerate(names)}
        )

    def full(part: Interval) -> Interval:
        return Interval(np.broadcast_to(part.lo, len(low)), np.broadcast_to(part.hi, len(low)))

    return _Bounds(full(bounds.value), [*map(full, bounds.gradients)], [*map(full, bounds.slopes)])


def _size(slope: Interval) -> np.ndarray:
    return np.where(slope.finite, np.minimum(np.abs(slope.lo), np.abs(slope.hi)), 0)


def _cut(low: np.ndarray, high: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(low))
    middle = (low[rows, axis] + high[rows, axis]) / 2
    below, above = high.copy(), low.copy()
    below[rows, axis] = above[rows, axis] = middle
    return np.concatenate([low, above]), np.concatenate([below, high])


def _run(program: Program, leaves: dict[str, Interval]) -> tuple[Interval, dict[str, Interval]]:
    """A program's value, and its derivatives by its leaves."""
    values = program.forward(leaves, INTERVALS)
    parts = program.backward(values, 1.0, INTERVALS)
    return (
        interval(values[-1]) * program.sign,
        {name: interval(part) * program.sign for name, part in parts.items()},
    )


# --- classification ---

_Claims = tuple[list[_Claim] | None, str]


def _one_stage(expression: Expression, space: SearchSpace, stable: bool) -> _Claims:
    over = f"logits from {-LOGIT:g} to {LOGIT:g}"
    kernel = OneStageKernel.build(expression)
    if kernel is None:
        return None, over

    def claim(program: Program, towards: float, quality: tuple[float, float], held: bool) -> _Claim:
        def bounds(at: dict[str, Interval]) -> _Bounds:
            value, parts = _run(program, at)
            slope = parts.get("X", interval(0.0))
            return _Bounds(value, [slope], [slope * towards] if held else [])

        ranges = {"X": (-LOGIT, LOGIT)}
        return _Claim({**ranges, "Q": quality} if "Q" in program.leaves else ranges, bounds)

    return [
        claim(kernel.negatives, -1.0, (0.0, 0.0), True),
        claim(kernel.positives, 1.0, (1.0, 1.0), True),
        claim(kernel.positives, 1.0, (MIN_IOU, 1.0), False),
    ], over


def _two_stage(expression: Expression, space: SearchSpace, stable: bool) -> _Claims:
    over = f"logits from {-LOGIT:g} to {LOGIT:g}, up to {CLASSES:,} classes"
    kernel = TwoStageKernel.build(expression)
    if kernel is None:
        return None, over
    program = kernel.program

    def claim(quality: tuple[float, float], held: bool) -> _Claim:
        def bounds(at: dict[str, Interval]) -> _Bounds:
            logarithm = at["log softmax"]
            share = INTERVALS.exp(logarithm)
            leaves = {**at, "LogSoftmax": logarithm, "Softmax": share}
            value, parts = _run(program, leaves)
            # By log softmax(x) at the label, of which the label's logit takes 1 - p, others -p_k.
            rising = parts.get("LogSoftmax", interval(0.0))
            if "Softmax" in parts:
                rising = rising + parts["Softmax"] * share
            others = rising * (1.0 - share)
            label = others + parts["X"] if "X" in parts else others
            return _Bounds(value, [rising, label], [label, others] if held else [])

        ranges = {"log softmax": (-2 * LOGIT - math.log(CLASSES + 1), 0.0)}
        if "X" in program.leaves:
            ranges["X"] = (-LOGIT, LOGIT)
        if "Z" in program.leaves:
            ranges["Z"] = quality
        # (Not every logit goes with every probability.)
        return _Claim(ranges, bounds, exact="X" not in ranges)

    return [claim((1.0, 1.0), True), claim((MIN_IOU, 1.0), False)], over


# --- boxes ---
#
# A loss of areas does not rise on a path that brings a box nearer to its target, if
#   sliding       by no translation: f_I - f_U <= 0 and f_E >= 0 (what I gains U loses, E shrinks);
#                 these hold a box down, too, that is stretched to the target's shape
#   growing       within the target: f_I <= 0, where U = E
#   shrinking     around the target: f_U + f_E >= 0, where U = E
#   grazing       while the IoU is held at its least value: U f_U + I f_I + E f_E >= 0, since there
#                 U shrinks at most as fast as E, as shares; of a scale-free loss that sum is 0
# Areas are parameters: the union, and in units of it the intersection (IoU) and the enclosing box.


def _boxes(expression: Expression, space: SearchSpace, stable: bool) -> _Claims:
    probes = space.probes
    scales = (*probes["scales"], *probes["stretches"])
    least, most = min(scales), max(scales)
    areas = min(probes["areas"]), max(probes["areas"])
    over = (
        f"boxes with sides of {least:g} to {most:g} times the target's, targets of "
        f"{areas[0]:g} to {areas[1]:g} square pixels"
    )
    kernel = BoxKernel.build(expression)
    if kernel is None:
        return None, over
    reach = (probes["distance"] + 1) * (1 + most) / 2  # of the enclosing box, in target's sides
    ranges = {
        "IoU": (IOU_EPSILON if stable else 0.0, 1.0),
        "enclosing": (1.0, reach**2),
        "log union": (math.log(areas[0]), math.log(2 * most**2 * areas[1])),
    }
    scale_free = _degree(expression) == 0

    def claim(
        ranges: dict[str, tuple[float, float]],
        slopes: Callable[[Interval, Interval, Interval, Any], list[Interval]],
    ) -> _Claim:
        def bounds(at: dict[str, Interval]) -> _Bounds:
            union = INTERVALS.exp(at["log union"])
            overlap = at["IoU"] * union
            enclosing = at["enclosing"] * union if "enclosing" in at else union
            if not stable:
                union, enclosing = union + AREA_EPSILON, enclosing + AREA_EPSILON
            value, parts = _run(kernel.program, {"U": union, "I": overlap, "E": enclosing})
            by = [parts.get(name, interval(0.0)) for name in "UIE"]
            around = at.get("enclosing", 1.0)
            length = INTERVALS.sqrt(union) * (2 * reach)  # a box's side is moved by areas times it
            gradient = (by[0] * length, by[1] * length, by[2] * length)
            return _Bounds(
                value,
                [*gradient, gradient[0] + gradient[1] + gradient[2]],
                [slope * union for slope in slopes(*by, around)],
            )

        return _Claim(ranges, bounds, exact=False)

    # Each part of a scale-free loss is a power of the unit times something, so what is finite in
    # float32 for the smallest and the largest boxes is so for all between.
    ends = [(end, end) for end in ranges["log union"]] if scale_free else [ranges["log union"]]
    claims = []
    for union in ends:
        every = {**ranges, "log union": union}
        nested = {name: every[name] for name in ("IoU", "log union")}
        claims.append(claim(every, lambda u, i, e, enclosing: [i - u, -e]))
        claims.append(claim(nested, lambda u, i, e, enclosing: [i, -(u + e)]))
    if stable and not scale_free:
        grazing = {**ranges, "IoU": (IOU_EPSILON, IOU_EPSILON)}
        claims.append(
            claim(grazing, lambda u, i, e, enclosing: [-(u + i * IOU_EPSILON + e * enclosing)])
        )
    return claims, over


def _degree(expression: Expression) -> float | None:
    """By what power of the areas' unit the value grows, or None. Each operator's is tried out."""
    random = np.random.default_rng(0)
    samples = [random.uniform(0.1, 3, 32) for _ in range(2)]

    def node(primitive: Primitive, degrees: list[float | None]) -> float | None:
        if None in degrees:
            return None
        if not any(degrees):
            return 0.0
        with np.errstate(all="ignore"):
            one = primitive.array(NUMPY, *samples[: primitive.arity])
            two = primitive.array(NUMPY, *(2.0**d * x for d, x in zip(degrees, samples)))
            ratio = np.log2(two / one)
        return float(ratio[0]) if np.ptp(ratio) < 1e-9 else None

    return expression.fold(lambda name: float(name in ("U", "I", "E")), node)


_CLAIMS = {"one_stage": _one_stage, "two_stage": _two_stage, "boxes": _boxes}
