"""The points that losses are judged on: logit sweeps and box paths, each running towards its label
or target.

A sweep is a line (or path) in the space of predictions. At each of its points a candidate's value
and its derivative along the sweep are looked at, so a loss that is good for anything never rises
along one. What is swept is declared in the space's YAML under ``probes``; see
``docs/screening.md``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cse_autoloss.kernels import AREA_EPSILON, MIN_IOU
from cse_autoloss.space import SearchSpace, SpaceError

ALPHA = 0.25  # weight of a label in one-stage losses; 1 - ALPHA elsewhere


@dataclass(frozen=True)
class Tolerances:
    """How far a property may be missed. All are shares, so a loss may be multiplied by any positive
    number.

    Attributes:
        monotonicity: how steeply a loss may rise, as a share of its steepest slope in the same
            group of sweeps.
        convergence: how far above the group's least value the loss may be at the label or target,
            as a share of its
        range. fading: slope at the label that is allowed, as a share of the steepest
        (classification only).
    """

    monotonicity: float
    convergence: float
    fading: float | None


@dataclass(frozen=True)
class Block:
    """Sweeps that are evaluated together: the same classes and number of steps.

    Points are numbered group by group (one label, or one target box), sweep by sweep, step by step.

    Attributes:
        name: what is swept.
        shape: (groups, sweeps of each, steps of each).
        values: (points, columns) of each variable, float32; boxes have one column.
        tangents: likewise for those that depend on the prediction: derivative by the sweep's
            position.
        weights: (points, columns) weight of each element of the loss, or None for 1.
        held: whether the properties are demanded; if not, only that everything is finite.
        settled: (points,) where the prediction is at its label or target.
        wrong: (points,) where it is plainly wrong, and a gradient must be there.
        flatness: how much of one, as a share of the steepest slope at such points of the group.
        sweeps: (groups * sweeps,) description of each.
        axis: what the position along a sweep is.
        positions: (points,)
    """

    name: str
    shape: tuple[int, int, int]
    values: Mapping[str, np.ndarray]
    tangents: Mapping[str, np.ndarray]
    weights: np.ndarray | None
    held: bool
    settled: np.ndarray
    wrong: np.ndarray
    flatness: float
    sweeps: tuple[str, ...]
    axis: str
    positions: np.ndarray

    @property
    def columns(self) -> int:
        return next(iter(self.tangents.values())).shape[-1]


@dataclass(frozen=True)
class Probes:
    """All that a space's candidates are judged on.

    Attributes:
        blocks: in the order in which they are judged, the cheapest first.
        tolerances: see there.
    """

    blocks: tuple[Block, ...]
    tolerances: Tolerances

    @classmethod
    def of(cls, space: SearchSpace) -> Probes:
        """Read the ``probes`` section of a space.

        Raises:
            SpaceError: one line that names the file, the key, and what would be right.
        """
        section = _Section(space)
        if space.inputs == "boxes":
            blocks, fading = tuple(_box_blocks(section)), None
        else:
            blocks, fading = (
                tuple(_logit_blocks(section, space.inputs == "one_stage")),
                section.share("fading"),
            )
        tolerances = Tolerances(section.share("monotonicity"), section.share("convergence"), fading)
        section.finish()
        return cls(blocks, tolerances)


class _Section:
    """The raw mapping; each key is asked for once, with the values that it may have."""

    def __init__(self, space: SearchSpace) -> None:
        self._origin, self._data, self._asked = space.origin or space.name, space.probes, set()

    def _fail(self, key: str, message: str) -> SpaceError:
        return SpaceError(f"{self._origin}: probes.{key}: {message}")

    def _get(self, key: str, right: str) -> Any:
        self._asked.add(key)
        data: Any = self._data
        for part in key.split("."):
            if not isinstance(data, Mapping) or part not in data:
                raise self._fail(key, f"missing; expected {right}")
            data = data[part]
        return data

    def number(self, key: str, low: float, high: float, whole: bool = False) -> Any:
        right = f"{'an integer' if whole else 'a number'} from {low:g} to {high:g}"
        value = self._get(key, right)
        if not _is_number(value, low, high, whole):
            raise self._fail(key, f"expected {right}, found {str(value)[:60]!r}")
        return value

    def share(self, tolerance: str) -> float:
        return self.number(f"tolerances.{tolerance}", 0, 1)

    def numbers(self, key: str, low: float, high: float, whole: bool = False) -> list[Any]:
        right = (
            f"a list of one or more {'integers' if whole else 'numbers'} from {low:g} to {high:g}"
        )
        values = self._get(key, right)
        if not (
            isinstance(values, list)
            and values
            and all(_is_number(v, low, high, whole) for v in values)
        ):
            raise self._fail(key, f"expected {right}, found {str(values)[:60]!r}")
        return values

    def interval(self, key: str, low: float, high: float) -> tuple[float, float]:
        values = self.numbers(key, low, high)
        if len(values) != 2 or not values[0] < values[1]:
            raise self._fail(key, f"expected [lowest, highest], found {values}")
        return values[0], values[1]

    def finish(self) -> None:
        """Raise for a key that nobody asked for."""

        def keys(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
            for key, value in data.items():
                yield from (
                    keys(value, f"{prefix}{key}.")
                    if isinstance(value, Mapping)
                    else (f"{prefix}{key}",)
                )

        for key in keys(self._data):
            if key not in self._asked:
                near = difflib.get_close_matches(key, self._asked, n=1)
                raise self._fail(
                    key,
                    "unknown key; "
                    + (
                        f"did you mean {near[0]!r}?"
                        if near
                        else f"keys are {', '.join(sorted(self._asked))}"
                    ),
                )


def _is_number(value: Any, low: float, high: float, whole: bool) -> bool:
    return (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


# --- classification
# ----------------------------------------------------------------------------------------------------


def _logit_blocks(section: _Section, one_stage: bool) -> Iterator[Block]:
    span = section.interval("logits", -80, 80)
    steps, glance = section.number("steps", 3, 1000, True), section.number("glance", 3, 1000, True)
    classes = sorted(section.numbers("classes", 1 + one_stage, 100, True))
    others = section.numbers("others", -80, 80)
    ious = section.numbers("ious", 0, 1)
    wrong = section.interval("wrong", 0, 160)
    flatness = section.share("flatness")
    columns = [count + (not one_stage) for count in classes]

    def block(
        name: str,
        steps: int,
        columns: int,
        others: list[float],
        samples: list[_Sample],
        held: bool = True,
    ) -> Block:
        return _logit_block(
            name,
            one_stage,
            np.linspace(*span, steps),
            columns,
            others,
            samples,
            wrong,
            flatness,
            held,
        )

    yield block("glance", glance, columns[0], [0.0], [(True, 1.0)])
    for count in columns:
        yield block(f"{count} columns", steps, count, others, [(True, 1.0), (False, 1.0)])
    yield block(
        "IoUs", steps, columns[0], [0.0], [(True, max(iou, MIN_IOU)) for iou in ious], held=False
    )


_Sample = tuple[
    bool, float
]  # whether it is a positive (of the first class; else background), and its IoU


def _logit_block(
    name: str,
    one_stage: bool,
    position: np.ndarray,
    columns: int,
    others: list[float],
    samples: list[_Sample],
    wrong: tuple[float, float],
    flatness: float,
    held: bool,
) -> Block:
    """Sweeps for each sample: the first takes all logits at once from plainly wrong to plainly
    right; the others take the label's logit up, or another one's down, while all else stays.
    """
    steps = len(position)
    logits, directions, labels, ious, texts = [], [], [], [], []
    for positive, iou in samples:
        label = np.zeros(columns)
        if positive or not one_stage:
            label[0 if positive else -1] = 1
        towards = 2 * label - 1
        lines = [(towards, np.zeros(columns), "all logits go from wrong to right")]
        for other in others:
            for column in (0, columns - 1):
                direction = np.where(np.arange(columns) == column, towards, 0)
                what = (
                    "the label's logit rises"
                    if direction[column] > 0
                    else "another class's logit falls"
                )
                lines.append(
                    (
                        direction,
                        np.where(direction == 0, other, 0.0),
                        f"{what}, the rest at {other:g}",
                    )
                )
        for direction, rest, text in lines:
            logits.append(rest + position[:, None] * direction)
            directions.append(np.broadcast_to(direction, (steps, columns)))
            labels.append(np.broadcast_to(label, (steps, columns)))
            ious.append(np.full((steps, columns), iou))
            texts.append(
                f"{f'positive of IoU {iou:g}' if positive else 'background'}, {columns} columns: {text}"
            )
    shape = (len(samples), len(texts) // len(samples), steps)
    x, direction, y, iou = (
        np.concatenate(part).astype(np.float32) for part in (logits, directions, labels, ious)
    )
    step = np.broadcast_to(np.arange(steps), shape)
    settled = step == steps - 1
    settled[:, 1:] = False
    if one_stage:
        values = {"X": x, "PY": y, "NY": 1 - y, "Q": y * iou}
        weights = ALPHA * y + (1 - ALPHA) * (1 - y)
        margin = np.tile(position, len(texts))  # how far the swept logit lies on its right side
    else:
        values, weights = {"X": x, "Y": y, "Z": iou}, None
        # Of the label over the others. A softmax is put right by either logit: what moves one of
        # them is not flat.
        margin = np.where(
            (direction != 0).all(-1),
            np.where(y == 1, x, 0).sum(-1) - np.where(y == 1, -np.inf, x).max(-1),
            np.inf,
        )
    return Block(
        name,
        shape,
        values,
        {"X": direction},
        weights,
        held,
        settled.ravel(),
        (margin <= -wrong[0]) & (margin >= -wrong[1]),
        flatness,
        tuple(texts),
        "logit",
        np.tile(position, len(texts)),
    )


# --- regression
# --------------------------------------------------------------------------------------------------------

_DIAGONAL = "diagonal translation"
#: Boxes as (centre x, centre y, width, height), in units of the target's width and height; a path
#: runs over t in [0, 1].
_Path = Callable[[np.ndarray], np.ndarray]


def _box_blocks(section: _Section) -> Iterator[Block]:
    steps, glance = section.number("steps", 3, 1000, True), section.number("glance", 3, 1000, True)
    areas = section.numbers("areas", 1e-2, 1e9)
    aspects = section.numbers("aspects", 1e-2, 1e2)
    distance = section.number("distance", 1.01, 100)
    scales = section.numbers("scales", 1e-2, 1e2)
    stretches = section.numbers("stretches", 1e-2, 1e2)
    wrong = section.interval("wrong", 0, 1)
    paths = dict(_box_paths(distance, scales, stretches))
    middle = areas[len(areas) // 2]
    glances = {
        name: path
        for name, path in paths.items()
        if name in (_DIAGONAL, f"scale from {scales[0]:g}")
    }
    flatness = section.share("flatness")
    yield _box_block("glance", glance, [(middle, aspects[0])], glances, wrong, flatness)
    # A loss in squared pixels, such as U - I, moves large boxes only.
    yield _box_block(
        "all areas",
        glance,
        [(area, aspects[0]) for area in areas],
        glances,
        wrong,
        section.share("balance"),
        together=True,
    )
    for area in areas:
        yield _box_block(
            f"paths to {area:g} square pixels",
            steps,
            [(area, aspect) for aspect in aspects],
            paths,
            wrong,
            flatness,
        )
    yield _each_area(areas, aspects, paths[_DIAGONAL])


def _box_paths(
    distance: float, scales: list[float], stretches: list[float]
) -> Iterator[tuple[str, _Path]]:
    def path(x: float = 0, y: float = 0, width: float = 1, height: float = 1) -> _Path:
        """Centre straight to the target's, width and height at constant rates to the target's."""
        return lambda t: np.stack(
            [x * (1 - t), y * (1 - t), width ** (1 - t), height ** (1 - t)], -1
        )

    def corner(size: float) -> _Path:
        """One corner stays on the target's, the opposite one goes straight to its own."""
        return lambda t: np.stack(
            [(size - 1) / 2 * (1 - t), (size - 1) / 2 * (1 - t), *[1 + (size - 1) * (1 - t)] * 2],
            -1,
        )

    def two_legs(scale: float) -> _Path:
        """First to the same centre, with a size of its own; then to the target's size."""
        return lambda t: np.stack(
            [
                distance * (1 + scale) / 2 * np.clip(1 - 2 * t, 0, None),
                0 * t,
                *[scale ** np.clip(2 - 2 * t, None, 1)] * 2,
            ],
            -1,
        )

    yield _DIAGONAL, path(distance, distance)
    yield "horizontal translation", path(x=distance)
    yield "vertical translation", path(y=-distance)
    for scale in scales:
        yield f"scale from {scale:g}", path(width=scale, height=scale)
        yield f"scale from {scale:g} at a corner", corner(scale)
        yield f"translation at scale {scale:g}, then scale", two_legs(scale)
    for stretch in stretches:
        yield f"aspect from {stretch:g}", path(width=stretch, height=1 / stretch)


def areas_of(boxes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Union, intersection and enclosing area as the losses see them.

    Args:
        boxes, targets: (..., 4) as (centre x, centre y, width, height) in pixels.

    Returns:
        (3, ...) in squared pixels.
    """
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    target_low, target_high = (
        targets[..., :2] - targets[..., 2:] / 2,
        targets[..., :2] + targets[..., 2:] / 2,
    )
    overlap = np.clip(np.minimum(high, target_high) - np.maximum(low, target_low), 0, None).prod(-1)
    enclosing = (np.maximum(high, target_high) - np.minimum(low, target_low)).prod(-1)
    union = boxes[..., 2:].prod(-1) + targets[..., 2:].prod(-1) - overlap
    return np.stack([union + AREA_EPSILON, overlap, enclosing + AREA_EPSILON])


def _box_block(
    name: str,
    steps: int,
    targets: list[tuple[float, float]],
    paths: Mapping[str, _Path],
    wrong: tuple[float, float],
    flatness: float,
    together: bool = False,
) -> Block:
    """The paths to each target. ``together``: slopes are compared between targets, too; the losses'
    least values are not."""
    position, nudge = np.linspace(0, 1, steps), 1e-6
    areas, slopes, texts = [], [], []
    for area, aspect in targets:
        target = np.array([0, 0, math.sqrt(area * aspect), math.sqrt(area / aspect)])
        unit = np.tile(target[2:], 2)
        for text, path in paths.items():
            here, before = (areas_of(path(t) * unit, target) for t in (position, position - nudge))
            for overlap in (here[1], before[1]):
                overlap[overlap < 1e-9 * area] = (
                    0  # boxes that touch do not overlap by their rounding
                )
            areas.append(here)
            slopes.append(
                (here - before) / nudge
            )  # from behind: the path ends on the target, where areas have a kink
            texts.append(f"{text}, target of {area:g} square pixels, aspect {aspect:g}")
    area, slope = (np.stack(part, 1).reshape(3, -1, 1) for part in (areas, slopes))
    slope[np.abs(slope) < 1e-9 * area.max(axis=0) / nudge] = 0  # rounding
    union, overlap, _ = area[..., 0]
    iou, rising = overlap / union, (slope[1] * area[0] - slope[0] * area[1])[:, 0] > 0
    settled = np.tile((position == 1) & (not together), len(texts))
    shape = (1, len(texts), steps) if together else (len(targets), len(paths), steps)
    return Block(
        name,
        shape,
        dict(zip("UIE", area.astype(np.float32))),
        dict(zip("UIE", slope.astype(np.float32))),
        None,
        True,
        settled,
        (iou >= wrong[0]) & (iou <= wrong[1]) & rising,
        flatness,
        tuple(texts),
        "share of the path",
        np.tile(position, len(texts)),
    )


def _each_area(areas: list[float], aspects: list[float], path: _Path) -> Block:
    """The gradient by each area alone must be finite, too: along a path it may be hidden by an area
    that stands still, where torch multiplies infinity by 0. Only not by an intersection that is
    empty: what clamps it stops any gradient.
    """
    points, texts = [], []
    for area in areas:
        for aspect in aspects:
            target = np.array([0, 0, math.sqrt(area * aspect), math.sqrt(area / aspect)])
            places = path(np.array([0, 0.75, 1])) * np.tile(
                target[2:], 2
            )  # disjoint, overlapping, there
            points.append(areas_of(places, target).T)
            texts += [
                f"{name} alone, target of {area:g} square pixels, aspect {aspect:g}"
                for name in "UIE"
            ]
    shape = (len(points), 3, 3)
    values = np.stack(points)[:, None].repeat(3, 1).reshape(-1, 3).T[..., None].astype(np.float32)
    slopes = (
        np.tile(np.eye(3)[:, None], (shape[0], 1, shape[2], 1))
        .reshape(-1, 3)
        .T[..., None]
        .astype(np.float32)
    )
    slopes[1] = np.where(values[1] > 0, slopes[1], 0)
    nowhere = np.zeros(values.shape[1], bool)
    return Block(
        "each area alone",
        shape,
        dict(zip("UIE", values)),
        dict(zip("UIE", slopes)),
        None,
        False,
        nowhere,
        nowhere,
        0,
        tuple(texts),
        "share of the path",
        np.tile([0, 0.75, 1], len(texts)),
    )
