"""Sweeps of logits: from plainly wrong to plainly right, for a positive and for background, with
the values that the space's other inputs may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cse_autoloss import inputs
from cse_autoloss.inputs import ALPHA, EXTRAS, INPUTS
from cse_autoloss.screening.blocks import Block
from cse_autoloss.screening.probe_settings import ProbeSettings
from cse_autoloss.space import SearchSpace


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


@dataclass(frozen=True)
class _Line:
    """A sweep of one sample's logits: ``rest + position * direction``, both (columns,)."""

    direction: np.ndarray
    rest: np.ndarray
    text: str


_USUAL = (_Sample(True), _Sample(False))


def logit_blocks(settings: ProbeSettings, space: SearchSpace) -> Iterator[Block]:
    """The blocks of a classification space, the cheapest first."""
    one_stage = space.inputs == "one_stage"
    span = settings.interval("logits", -80, 80)
    steps, glance = settings.integer("steps", 3, 1000), settings.integer("glance", 3, 1000)
    classes = sorted(settings.integers("classes", 1 + one_stage, 100))
    others = settings.numbers("others", -80, 80)
    ious = settings.numbers("ious", 0, 1)
    wrong = settings.interval("wrong", 0, 160)
    flatness = settings.tolerance("flatness")
    widths = [count + (not one_stage) for count in classes]

    def block(
        name: str,
        samples: Sequence[_Sample],
        columns: int,
        steps: int = steps,
        others: Sequence[float] = (0.0,),
        held: bool = True,
    ) -> Block:
        positions = np.linspace(*span, steps)
        return _block(name, space, positions, columns, others, samples, wrong, flatness, held)

    yield block("glance", _USUAL[:1], widths[0], glance)
    for columns in widths:
        yield block(f"{columns} columns", _USUAL, columns, others=others)
    yield block("IoUs", [_Sample(True, {"pos_ious": iou}) for iou in ious], widths[0], held=False)
    for name, values, held in _further_inputs(space):
        samples = [_Sample(positive, {name: v}) for v in values for positive in (True, False)]
        yield block(name, samples, widths[0], held=held)


def _further_inputs(space: SearchSpace) -> Iterator[tuple[str, tuple[float, ...], bool]]:
    """What else the space's variables are made of: name, values beside the usual one, whether a
    loss is held to its properties there."""
    for extra in EXTRAS.values():
        if extra.name in inputs.needs(space.inputs, space.variables) and extra.others:
            yield extra.name, extra.others, extra.held
    for row in INPUTS[space.inputs].values():
        if row.name in space.variables and row.ranks:
            yield row.name, row.ranks[1:], True


def _block(
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
    """Each sample's sweeps along the same positions."""
    steps, one_stage = len(position), space.inputs == "one_stage"
    logits, directions, labels, texts, parts = [], [], [], [], []
    for sample in samples:
        label = np.zeros(columns)
        if sample.positive or not one_stage:
            label[0 if sample.positive else -1] = 1
        lines = list(_lines(label, others))
        swept = [line.rest + position[:, None] * line.direction for line in lines]
        target = 0 if sample.positive else columns - (not one_stage)
        parts.append(_variables(space, np.concatenate(swept), target, sample.others))
        logits += swept
        directions += [np.broadcast_to(line.direction, (steps, columns)) for line in lines]
        labels += [np.broadcast_to(label, (steps, columns))] * len(lines)
        texts += [f"{sample}, {columns} columns: {line.text}" for line in lines]
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
    positions = np.tile(position, len(texts))
    if one_stage:
        weights = ALPHA * y + (1 - ALPHA) * (1 - y)
        margin = wrong_at = positions  # how far the swept logit lies on its right side
    else:
        weights = None
        margin = _margin(x, direction, y)
        # A softmax is put right by either logit: what moves one of them is not flat.
        wrong_at = np.where((direction != 0).all(-1), margin, np.inf)
    return Block(
        name=name,
        shape=shape,
        values=values,
        tangents={"X": direction},
        weights=weights,
        held=held,
        aims=not held,
        free=margin > 0,
        settled=settled.ravel(),
        wrong=(wrong_at <= -wrong[0]) & (wrong_at >= -wrong[1]),
        flatness=flatness,
        sweeps=tuple(texts),
        axis="logit",
        positions=positions,
    )


def _lines(label: np.ndarray, others: Sequence[float]) -> Iterator[_Line]:
    """The first takes all logits at once from plainly wrong to plainly right; the others take the
    label's logit up, or another one's down, while all else stays.

    Args:
        label: (columns,) 1 where the label is, else 0.
        others: where all else stays.
    """
    columns = len(label)
    towards = 2 * label - 1
    yield _Line(towards, np.zeros(columns), "all logits go from wrong to right")
    for other in others:
        for column in (0, columns - 1):
            rises = "the label's logit rises" if label[column] else "another class's logit falls"
            moves = np.arange(columns) == column
            yield _Line(
                direction=np.where(moves, towards, 0),
                rest=np.where(moves, 0.0, other),
                text=f"{rises}, the rest at {other:g}",
            )


def _margin(x: np.ndarray, direction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(points,) of a softmax's label over the others, or over the one that is swept alone; all
    arguments are (points, columns)."""
    rivals = np.where((direction < 0).any(-1, keepdims=True), direction < 0, label == 0)
    return np.where(label == 1, x, 0).sum(-1) - np.where(rivals, x, -np.inf).max(-1)


def _variables(
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
