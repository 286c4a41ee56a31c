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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cse_autoloss import inputs
from cse_autoloss.inputs import ALPHA, EXTRAS, INPUTS, IOU_EPSILON
from cse_autoloss.space import SearchSpace, SpaceError


@dataclass(frozen=True)
class Tolerances:
    """How far a property may be missed. All are shares, so a loss may be multiplied by any positive
    number.

    Attributes:
        monotonicity: how steeply a loss may rise where it must not, as a share of its steepest
            slope on the same sweep.
        rebound: how far a loss may rise where it may, as a share of its range on the same sweep.
        convergence: how far above the group's least value the loss may be at the label or target,
            as a share of its
        range. fading: slope at the label that is allowed, as a share of the steepest
        (classification only).
    """

    monotonicity: float
    rebound: float
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
        aims: where they are not: whether there must be one best score, wherever it lies.
        free: (points,) where a loss may rise again: the prediction is right (a score's aim may be
            short of 1), or a box hardly overlaps its target.
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
    aims: bool
    free: np.ndarray
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
            blocks, fading = tuple(_box_blocks(section, space)), None
        else:
            blocks, fading = (
                tuple(_logit_blocks(section, space)),
                section.share("fading"),
            )
        tolerances = Tolerances(
            section.share("monotonicity"),
            section.share("rebound"),
            section.share("convergence"),
            fading,
        )
        section.finish()
        return cls(blocks, tolerances)


class _Section:
    """The raw mapping; each key is asked for once, with the values that it may have."""

    def __init__(self, space: SearchSpace) -> None:
        self._origin, self._data = space.origin or space.name, space.probes
        self._asked: set[str] = set()

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
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """What a sweep is about.

    Attributes:
        positive: whether it is a positive, of the first class; else it is background.
        others: what extras, and variables that are given as they are, have in place of their usual
            values.
    """

    positive: bool
    others: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        iou = f" of IoU {self.others.get('pos_ious', 1.0):g}"
        rest = [f", {name} {value:g}" for name, value in self.others.items() if name != "pos_ious"]
        return f"{f'positive{iou}' if self.positive else 'background'}{''.join(rest)}"


_USUAL = (_Sample(True), _Sample(False))


def _logit_blocks(section: _Section, space: SearchSpace) -> Iterator[Block]:
    one_stage = space.inputs == "one_stage"
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
        samples: Sequence[_Sample],
        columns: int,
        steps: int = steps,
        others: Sequence[float] = (0.0,),
        held: bool = True,
    ) -> Block:
        positions = np.linspace(*span, steps)
        return _logit_block(name, space, positions, columns, others, samples, wrong, flatness, held)

    yield block("glance", _USUAL[:1], columns[0], glance)
    for count in columns:
        yield block(f"{count} columns", _USUAL, count, others=others)
    yield block("IoUs", [_Sample(True, {"pos_ious": iou}) for iou in ious], columns[0], held=False)
    for name, values, held in _further_inputs(space):
        samples = [_Sample(positive, {name: v}) for v in values for positive in (True, False)]
        yield block(name, samples, columns[0], held=held)


def _further_inputs(space: SearchSpace) -> Iterator[tuple[str, tuple[float, ...], bool]]:
    """What else the space's variables are made of: name, values beside the usual one, whether a
    loss is held to its properties there."""
    for extra in EXTRAS.values():
        if extra.name in inputs.needs(space.inputs, space.variables) and extra.others:
            yield extra.name, extra.others, extra.held
    for row in INPUTS[space.inputs].values():
        if row.name in space.variables and row.ranks:
            yield row.name, row.ranks[1:], True


def variables_of(
    space: SearchSpace, logits: np.ndarray, target: int, others: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """The space's variables for samples of one label.

    Args:
        logits: (points, columns).
        target: the label of all.
        others: see :class:`_Sample`.
    """
    classes = logits.shape[1] - (space.inputs == "two_stage")
    pred = torch.from_numpy(logits)
    counts = {"positive": len(logits) * (target < classes), "sample": len(logits)}
    given: dict[str, Any] = {"pred": pred, "target": torch.full((len(logits),), target)}
    for name in inputs.needs(space.inputs, space.variables):
        extra = EXTRAS[name]
        usual = extra.usual
        if extra.background is not None and target >= classes:
            usual = extra.background
        value = others.get(name, usual)
        if extra.each == "category":  # of the first class
            given[name] = torch.tensor([value] + [extra.usual] * (classes - 1)).double()
        else:
            given[name] = torch.full((counts[extra.each],), value, dtype=pred.dtype)
    for row in INPUTS[space.inputs].values():
        if row.ranks:
            given[row.name] = torch.full_like(pred, others.get(row.name, row.ranks[0]))
    found = inputs.variables(space.inputs, space.variables, given)
    return {name: found[name].numpy() for name in space.variables}


def _logit_block(
    name: str,
    space: SearchSpace,
    position: np.ndarray,
    columns: int,
    others: Sequence[float],
    samples: Sequence[_Sample],
    wrong: tuple[float, float],
    flatness: float,
    held: bool,
) -> Block:
    """Sweeps for each sample: the first takes all logits at once from plainly wrong to plainly
    right; the others take the label's logit up, or another one's down, while all else stays.
    """
    steps, one_stage = len(position), space.inputs == "one_stage"
    logits, directions, labels, texts, parts = [], [], [], [], []
    for sample in samples:
        label = np.zeros(columns)
        if sample.positive or not one_stage:
            label[0 if sample.positive else -1] = 1
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
        swept = [rest + position[:, None] * direction for direction, rest, _ in lines]
        target = 0 if sample.positive else columns - (not one_stage)
        parts.append(variables_of(space, np.concatenate(swept), target, sample.others))
        logits += swept
        directions += [np.broadcast_to(direction, (steps, columns)) for direction, _, _ in lines]
        labels += [np.broadcast_to(label, (steps, columns))] * len(lines)
        texts += [f"{sample}, {columns} columns: {text}" for _, _, text in lines]
    shape = (len(samples), len(texts) // len(samples), steps)
    x, direction, y = (
        np.concatenate(part).astype(np.float32) for part in (logits, directions, labels)
    )
    values = {
        name: np.concatenate([part[name] for part in parts]).astype(np.float32)
        for name in space.variables
    }
    step = np.broadcast_to(np.arange(steps), shape)
    settled = step == steps - 1
    settled[:, 1:] = False
    if one_stage:
        weights = ALPHA * y + (1 - ALPHA) * (1 - y)
        margin = np.tile(position, len(texts))  # how far the swept logit lies on its right side
        wrong_at = margin
    else:
        weights = None
        # Of the label over the others, or over the one that is swept alone.
        rivals = np.where((direction < 0).any(-1, keepdims=True), direction < 0, y == 0)
        margin = np.where(y == 1, x, 0).sum(-1) - np.where(rivals, x, -np.inf).max(-1)
        # A softmax is put right by either logit: what moves one of them is not flat.
        wrong_at = np.where((direction != 0).all(-1), margin, np.inf)
    return Block(
        name,
        shape,
        values,
        {"X": direction},
        weights,
        held,
        not held,
        margin > 0,
        settled.ravel(),
        (wrong_at <= -wrong[0]) & (wrong_at >= -wrong[1]),
        flatness,
        tuple(texts),
        "logit",
        np.tile(position, len(texts)),
    )


# --- regression
# --------------------------------------------------------------------------------------------------

_DIAGONAL = "diagonal translation"
#: Boxes as (centre x, centre y, width, height), in units of the target's width and height; a path
#: runs over t in [0, 1].
_Path = Callable[[np.ndarray], np.ndarray]


def _box_blocks(section: _Section, space: SearchSpace) -> Iterator[Block]:
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
    yield _box_block("glance", space, glance, [(middle, aspects[0])], glances, wrong, flatness)
    # A loss in squared pixels, such as U - I, moves large boxes only.
    yield _box_block(
        "all areas",
        space,
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
            space,
            steps,
            [(area, aspect) for aspect in aspects],
            paths,
            wrong,
            flatness,
        )
    yield _each_alone(space, areas, aspects, paths[_DIAGONAL])


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


def box_variables(
    names: Iterable[str], boxes: Tensor, targets: Tensor, image_sizes: Tensor | None = None
) -> dict[str, Tensor]:
    """Variables of boxes, bounded as the losses are trained with them.

    Args:
        boxes, targets: (P, 4) as (centre x, centre y, width, height) in pixels.
        image_sizes: (P, 2); the usual ones where absent.
    """
    corners = [
        torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)
        for box in (boxes, targets)
    ]
    if image_sizes is None:
        image_sizes = boxes.new_full((len(boxes), 2), EXTRAS["image_sizes"].usual)
    given = dict(zip(("pred", "target"), corners)) | {"stable": True, "image_sizes": image_sizes}
    return inputs.variables("boxes", names, given)


def _along(
    names: Sequence[str], path: _Path, position: np.ndarray, width: float, height: float
) -> np.ndarray:
    """(names, positions) variables on the way to a target of a width and height in pixels."""
    unit, target = np.array([width, height] * 2), np.array([0, 0, width, height])
    boxes = torch.from_numpy(path(position) * unit)
    found = box_variables(names, boxes, torch.from_numpy(target).expand_as(boxes))
    return np.stack([found[name].numpy() for name in names])


def _with_areas(space: SearchSpace) -> list[str]:
    """The space's variables, and the areas, which tell where a box stands."""
    return list(dict.fromkeys(["U", "I", "E", *space.variables]))


def _box_block(
    name: str,
    space: SearchSpace,
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
    names = _with_areas(space)
    values, slopes, texts = [], [], []
    for area, aspect in targets:
        size = math.sqrt(area * aspect), math.sqrt(area / aspect)
        for text, path in paths.items():
            here, before = (_along(names, path, t, *size) for t in (position, position - nudge))
            values.append(here)
            # From behind: the path ends on the target, where areas have a kink
            slopes.append((here - before) / nudge)
            texts.append(f"{text}, target of {area:g} square pixels, aspect {aspect:g}")
    value, slope = (np.stack(part, 1).reshape(len(names), -1) for part in (values, slopes))
    scale = np.maximum(np.abs(value), 1)
    scale[:3] = value[:3].max(axis=0)
    slope[np.abs(slope) < 1e-9 * scale / nudge] = 0  # rounding
    union, overlap = value[:2]
    iou, rising = overlap / union, slope[1] * union - slope[0] * overlap > 0
    settled = np.tile((position == 1) & (not together), len(texts))
    shape = (1, len(texts), steps) if together else (len(targets), len(paths), steps)
    return Block(
        name,
        shape,
        _columns(names, value, space.variables),
        _columns(names, slope, space.predicted),
        None,
        True,
        False,
        iou < wrong[0],
        settled,
        (iou >= wrong[0]) & (iou <= wrong[1]) & rising,
        flatness,
        tuple(texts),
        "share of the path",
        np.tile(position, len(texts)),
    )


def _columns(names: Sequence[str], rows: np.ndarray, kept: Iterable[str]) -> dict[str, np.ndarray]:
    """(points, 1) float32 of each variable that is kept, from (names, points)."""
    return {name: row[:, None].astype(np.float32) for name, row in zip(names, rows) if name in kept}


def _each_alone(space: SearchSpace, areas: list[float], aspects: list[float], path: _Path) -> Block:
    """The gradient by each variable alone must be finite, too: along a path it may be hidden by one
    that stands still, where torch multiplies infinity by 0. Only not by an intersection that is
    empty: what bounds it stops any gradient.
    """
    position = np.array([0, 0.75, 1])  # disjoint, overlapping, there
    bound = 2 * IOU_EPSILON
    names, moving = _with_areas(space), [n for n in space.variables if n in space.predicted]
    values, slopes, texts = [], [], []
    for area in areas:
        for aspect in aspects:
            size = math.sqrt(area * aspect), math.sqrt(area / aspect)
            here = _along(names, path, position, *size)
            for alone in moving:
                slope = np.array([[name == alone] for name in names]) * np.ones(len(position))
                slope[1] = np.where(here[1] > bound * here[0], slope[1], 0)
                values.append(here)
                slopes.append(slope)
                texts.append(f"{alone} alone, target of {area:g} square pixels, aspect {aspect:g}")
    value, slope = (np.concatenate(part, 1) for part in (values, slopes))
    nowhere = np.zeros(value.shape[1], bool)
    return Block(
        "each variable alone",
        (len(areas) * len(aspects), len(moving), len(position)),
        _columns(names, value, space.variables),
        _columns(names, slope, space.predicted),
        None,
        False,
        False,
        nowhere,
        nowhere,
        nowhere,
        0,
        tuple(texts),
        "share of the path",
        np.tile(position, len(texts)),
    )
