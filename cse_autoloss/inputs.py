"""THE table of inputs: what predictions and targets become before a formula sees them.

A row is a variable: how it is computed, whether it carries the prediction's gradient, between what
its values lie. Modules, kernels, exported losses, screening and heads read it; a new variable is
one new row. An exported loss carries the sources of ``compute``: they use nothing but ``torch``,
the constants here and each other, and types are those that ``torch.jit.script`` asks for.

Shapes: N samples, C classes, P boxes; ``pred`` and box ``target`` come in float32 or float64.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALPHA = 0.25  # the weight of a label in one-stage losses; 1 - ALPHA that of any other element
MIN_IOU = 1e-7  # an IoU given to a loss is at least this
AREA_EPSILON = 1e-7  # the least union and enclosing area, squared pixels; in released losses, added
IOU_EPSILON = 1e-6  # the least intersection, as a share of the union; released losses have none
LOGIT = 1e4  # logits are taken to lie in [-LOGIT, LOGIT]
AREA = 1e13  # and areas in [-AREA, AREA] (a box whose corners are swapped has a negative one)
SIDE = 1e6  # and sides and offsets, in sizes of the target, in [-SIDE, SIDE]


@dataclass(frozen=True)
class Extra:
    """What a head hands over beside predictions and targets, by the name of the loss's argument.

    Attributes:
        name: of the argument.
        each: what it has one number for: "positive", "sample", "category" or "box".
        meaning: shape and content, for messages.
        draw: ``draw(rng, positive, classes)``: likely values for a batch, of which ``positive``
            (samples,) tells which are positives.
        optional: whether a loss may go without; what it then takes stands in ``meaning``.
        usual: what it is where screening looks at other things.
        background: its usual value for background; None for the same.
        others: what else it is when screening asks whether the loss is still one.
        held: whether it must be; if not (it may be what the score should be), only be finite.
    """

    name: str
    each: str
    meaning: str
    usual: float
    draw: Callable[[np.random.Generator, np.ndarray, int], np.ndarray]
    others: tuple[float, ...] = ()
    background: float | None = None
    held: bool = True
    optional: bool = False


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra(
            "pos_ious",
            "positive",
            "(number of positives,) IoU of each positive's predicted box with its target; without "
            "it 1",
            usual=1.0,
            draw=lambda rng, positive, classes: rng.uniform(0.5, 1, positive.sum()),
            held=False,
            optional=True,
        ),
        Extra(
            "roi_ious",
            "sample",
            "(N,) IoU of each sample's box before regression with its nearest object",
            usual=1.0,
            draw=lambda rng, positive, classes: rng.uniform(0, 0.5, len(positive)) + positive / 2,
            background=0.0,
            others=(0.0, 0.3, 0.7),
            held=False,
        ),
        Extra(
            "pos_scores",
            "positive",
            "(number of positives,) score in [0, 1] that the assigner gave each positive",
            usual=1.0,
            draw=lambda rng, positive, classes: rng.uniform(0.2, 1, positive.sum()),
            others=(0.0, 0.3, 0.7),
            held=False,
        ),
        Extra(
            "pos_areas",
            "positive",
            "(number of positives,) share of its image that the object of each positive covers",
            usual=0.05,
            draw=lambda rng, positive, classes: 10 ** rng.uniform(-4, 0, positive.sum()),
            others=(1e-4, 1.0),
        ),
        Extra(
            "class_frequency",
            "category",
            "(C,) objects of each class in the train split, over their mean",
            usual=1.0,
            draw=lambda rng, positive, classes: 10 ** rng.uniform(-1.5, 1, classes),
            others=(0.01, 20.0),
        ),
        Extra(
            "image_ids",
            "sample",
            "(N,) number of the image that each sample is of",
            usual=0.0,
            draw=lambda rng, positive, classes: np.zeros(len(positive)),
        ),
        Extra(
            "image_sizes",
            "box",
            "(P, 2) width and height of each box's image in pixels",
            usual=1024.0,
            draw=lambda rng, positive, classes: rng.uniform(512, 1333, (len(positive), 2)),
        ),
    )
}


@dataclass(frozen=True)
class Input:
    """A variable.

    Attributes:
        name: as it stands in a formula.
        meaning: shape, unit and content.
        compute: what it is made of stands in its parameters' names: ``pred``, ``target``,
            ``stable``, extras, other variables of the same kind. None: it is the prediction.
        low, high: between what its values lie.
        predicted: whether it carries the prediction's gradient.
        quality: whether a positive's score may be meant to be this number.
        ranks: whether it compares a sample with others; probes give it (``ranks`` values) as it is.
    """

    name: str
    meaning: str
    compute: Callable[..., Tensor] | None
    low: float
    high: float
    predicted: bool = False
    quality: bool = False
    ranks: tuple[float, ...] = ()

    @functools.cached_property
    def takes(self) -> tuple[str, ...]:
        """Names of what it is computed from."""
        return (
            ("pred",) if self.compute is None else tuple(inspect.signature(self.compute).parameters)
        )


# --- classification ---


def one_hot(pred, target):
    """1 in the label's column; a row whose label is no column has none."""
    return (target[:, None] == torch.arange(pred.shape[1], device=target.device)).to(pred.dtype)


def of_positives(pred, target, classes: int, values):
    """A number for each row whose label is one of the classes, 1 in other rows; without
    gradient."""
    positive = (target >= 0) & (target < classes)
    values = values.detach().to(pred.dtype).clamp(min=MIN_IOU)
    return torch.ones_like(pred[:, 0]).masked_scatter(positive, values)[:, None].expand_as(pred)


def softmax_quality(pred, target, pos_ious: Tensor | None):
    if pos_ious is None:
        return torch.ones_like(pred)
    return of_positives(pred, target, pred.shape[1] - 1, pos_ious)


def label_quality(pred, target, PY, pos_ious: Tensor | None):
    return PY if pos_ious is None else PY * of_positives(pred, target, pred.shape[1], pos_ious)


def no_label(PY):
    return 1 - PY


def label_score(pred, target, PY, pos_scores):
    return PY * of_positives(pred, target, pred.shape[1], pos_scores)


def overlap_before(pred, roi_ious):
    return roi_ious.detach().to(pred.dtype).clamp(min=MIN_IOU)[:, None].expand_as(pred)


def softmax_area(pred, target, pos_areas):
    return of_positives(pred, target, pred.shape[1] - 1, pos_areas)


def label_area(pred, target, pos_areas):
    return of_positives(pred, target, pred.shape[1], pos_areas)


def softmax_frequency(pred, class_frequency):
    frequency = class_frequency.to(pred.dtype)
    return torch.cat([frequency, torch.ones_like(frequency[:1])]).expand_as(pred)


def label_frequency(pred, class_frequency):
    return class_frequency.to(pred.dtype).expand_as(pred)


def rank_in_image(pred, score, image_ids):
    """Share of its image's samples whose score is not above the sample's: 1 is the best."""
    order = torch.argsort(score.detach(), stable=True)
    order = order[torch.argsort(image_ids[order], stable=True)]
    images = image_ids[order].contiguous()
    first = torch.searchsorted(images, images)
    count = torch.searchsorted(images, images, right=True) - first
    place = torch.arange(len(order), device=order.device) - first
    rank = (place + 1).to(pred.dtype) / count
    return torch.zeros_like(rank).scatter(0, order, rank)[:, None].expand_as(pred)


def softmax_rank(pred, image_ids):
    return rank_in_image(pred, pred[:, :-1].amax(1) - pred[:, -1], image_ids)


def label_rank(pred, image_ids):
    return rank_in_image(pred, pred.amax(1), image_ids)


# --- boxes x1 y1 x2 y2 in pixels ---


def box_sides(boxes):
    return boxes[:, 2:] - boxes[:, :2]


def area_of(sides):
    return sides[:, 0] * sides[:, 1]


def shared_area(pred, target):
    inner = torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])
    return area_of(inner.clamp(min=0))


def enclosing_sides(pred, target):
    outer = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    return outer.clamp(min=0)


def union_area(pred, target, stable: bool):
    both = area_of(box_sides(pred)) + area_of(box_sides(target))
    union = both - shared_area(pred, target)
    return union.clamp(min=AREA_EPSILON) if stable else union + AREA_EPSILON


def intersection_area(pred, target, U, stable: bool):
    overlap = shared_area(pred, target)
    return torch.maximum(overlap, IOU_EPSILON * U) if stable else overlap


def enclosing_area(pred, target, stable: bool):
    area = area_of(enclosing_sides(pred, target))
    return area.clamp(min=AREA_EPSILON) if stable else area + AREA_EPSILON


def target_size(target):
    """(P, 1) the root of the target's area, in pixels: the unit of what follows."""
    return area_of(box_sides(target).clamp(min=0)).clamp(min=AREA_EPSILON).sqrt()[:, None]


def centre_offset(pred, target):
    return (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) / (2 * target_size(target))


def offset_x(pred, target):
    return centre_offset(pred, target)[:, 0]


def offset_y(pred, target):
    return centre_offset(pred, target)[:, 1]


def predicted_width(pred, target):
    return (box_sides(pred) / target_size(target))[:, 0]


def predicted_height(pred, target):
    return (box_sides(pred) / target_size(target))[:, 1]


def target_width(target):
    return (box_sides(target) / target_size(target))[:, 0]


def target_height(target):
    return (box_sides(target) / target_size(target))[:, 1]


def enclosing_width(pred, target):
    return (enclosing_sides(pred, target) / target_size(target))[:, 0]


def enclosing_height(pred, target):
    return (enclosing_sides(pred, target) / target_size(target))[:, 1]


def image_share(target, image_sizes):
    return target_size(target)[:, 0].square() / area_of(image_sizes.to(target.dtype))


def image_diagonal(target, image_sizes):
    return image_sizes.to(target.dtype).square().sum(1).sqrt() / target_size(target)[:, 0]


# --- the table: kind to its variables, each after what it is computed from ---

_LOGITS = Input("X", "class logits", None, -LOGIT, LOGIT, predicted=True)
_OF_OBJECT = (
    "share of its image that a positive's object covers, in the whole row; 1 in a negative's"
)
_BEFORE = Input(
    "R",
    "IoU of the sample's box before regression with its nearest object, in the whole row; no "
    "gradient",
    overlap_before,
    MIN_IOU,
    1.0,
    quality=True,
)
_RANK = {
    "meaning": "share of its image's samples whose score is not above the sample's; no gradient",
    "low": 0.0,
    "high": 1.0,
    "ranks": (0.5, 0.01, 1.0),
}
_FREQUENCY = "objects of the column's class in the train split, over the mean of all classes"

INPUTS: dict[str, dict[str, Input]] = {
    kind: {row.name: row for row in rows}
    for kind, rows in {
        "two_stage": (
            replace(_LOGITS, meaning="(N, C+1) class logits, background last"),
            Input("Y", "(N, C+1) one-hot label, last column background", one_hot, 0.0, 1.0),
            Input(
                "Z",
                "(N, C+1) IoU of the predicted box with its target in every column of a positive's "
                "row, 1 in a negative's; no gradient",
                softmax_quality,
                MIN_IOU,
                1.0,
                quality=True,
            ),
            _BEFORE,
            Input("A", _OF_OBJECT, softmax_area, 0.0, 1.0),
            Input("F", f"{_FREQUENCY}; 1 for background", softmax_frequency, 0.0, 1e6),
            Input("K", compute=softmax_rank, **_RANK),
        ),
        "one_stage": (
            replace(_LOGITS, meaning="(N, C) class logits"),
            Input("PY", "(N, C) binary label", one_hot, 0.0, 1.0),
            Input(
                "Q",
                "(N, C) IoU of the predicted box with its target where PY is 1, else 0; no "
                "gradient",
                label_quality,
                0.0,
                1.0,
                quality=True,
            ),
            Input("NY", "(N, C) 1 - PY", no_label, 0.0, 1.0),
            Input(
                "S",
                "(N, C) the assigner's score where PY is 1, else 0; no gradient",
                label_score,
                0.0,
                1.0,
                quality=True,
            ),
            _BEFORE,
            Input("A", _OF_OBJECT, label_area, 0.0, 1.0),
            Input("F", _FREQUENCY, label_frequency, 0.0, 1e6),
            Input("K", compute=label_rank, **_RANK),
        ),
        "boxes": (
            Input(
                "U",
                "(P,) area of the union of prediction and target, squared pixels",
                union_area,
                -AREA,
                AREA,
                predicted=True,
            ),
            Input(
                "I",
                "(P,) area of their intersection, squared pixels",
                intersection_area,
                -AREA,
                AREA,
                predicted=True,
            ),
            Input(
                "E",
                "(P,) area of the smallest box that encloses both, squared pixels",
                enclosing_area,
                -AREA,
                AREA,
                predicted=True,
            ),
            *(
                Input(
                    name,
                    f"(P,) {what}, in sizes (roots of the area) of the target",
                    compute,
                    -SIDE if signed else 0.0,
                    SIDE,
                    predicted=predicted,
                )
                for name, what, compute, signed, predicted in (
                    ("DX", "prediction's centre right of the target's", offset_x, True, True),
                    ("DY", "prediction's centre below the target's", offset_y, True, True),
                    ("WP", "width of the prediction", predicted_width, True, True),
                    ("HP", "height of the prediction", predicted_height, True, True),
                    ("WT", "width of the target", target_width, True, False),
                    ("HT", "height of the target", target_height, True, False),
                    ("EW", "width of the enclosing box", enclosing_width, False, True),
                    ("EH", "height of the enclosing box", enclosing_height, False, True),
                    ("D", "diagonal of the image", image_diagonal, False, False),
                )
            ),
            Input("A", "(P,) share of its image that the target covers", image_share, 0.0, 1.0),
        ),
    }.items()
}


def needed(kind: str, names: Iterable[str]) -> tuple[Input, ...]:
    """The rows that the named variables take, in the table's order: each after those that it takes
    itself, whatever the order of the names. What is no variable of the kind is left out."""
    table, wanted = INPUTS[kind], set(names)
    for row in reversed(table.values()):
        if row.name in wanted:
            wanted.update(row.takes)
    return tuple(row for row in table.values() if row.name in wanted)


def needs(kind: str, names: Iterable[str]) -> frozenset[str]:
    """The extras that the named variables take."""
    return frozenset(name for row in needed(kind, names) for name in row.takes if name in EXTRAS)


def variables(kind: str, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named variables, and those that they take.

    Args:
        given: ``pred`` and ``target``, ``stable`` for boxes, extras; and variables that are not to
            be computed.

    Raises:
        ValueError: for an extra that is missing and cannot be done without.
    """
    known = dict(given)
    found = {}
    for row in needed(kind, names):
        if row.name not in known:
            if row.compute is None:
                known[row.name] = known["pred"]
            else:
                known[row.name] = row.compute(
                    **{name: _argument(name, known) for name in row.takes}
                )
        found[row.name] = known[row.name]
    return found


def _argument(name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    if name in EXTRAS and EXTRAS[name].optional:
        return None
    meaning = f", {EXTRAS[name].meaning}" if name in EXTRAS else ""
    raise ValueError(f"this loss needs {name}{meaning}")
