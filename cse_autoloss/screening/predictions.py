"""Batches of predictions with their labels or targets, and the gradient of many losses by them at
once.

The gradient is taken in forward mode: a sample has few parameters (its logits, or its box's four),
    and each is a direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cse_autoloss.kernels import MIN_IOU
from cse_autoloss.screening.graph import Arrays, Graph
from cse_autoloss.screening.probes import ALPHA, areas_of
from cse_autoloss.screening.properties import reduce
from cse_autoloss.space import SearchSpace

CLASSES = 3

Variables = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LogitBatch:
    """Samples to classify.

    Attributes:
        initial: (samples, columns) logits to start from.
        labels: (samples, columns) 1 where the label is, else 0.
        ious: (samples,) IoU of the sample's box with its target; 1 for background.
        one_stage: whether the columns are independent sigmoids.
    """

    initial: np.ndarray
    labels: np.ndarray
    ious: np.ndarray
    one_stage: bool
    measure = "accuracy"

    @classmethod
    def draw(cls, rng: np.random.Generator, samples: int, one_stage: bool) -> LogitBatch:
        """A third or so of the samples is background; IoUs of the others lie in [0.5, 1]."""
        columns = CLASSES if one_stage else CLASSES + 1
        label = rng.integers(CLASSES + 1, size=samples)
        labels = (label[:, None] == np.arange(columns)).astype(float)
        ious = np.where(label == CLASSES, 1, rng.uniform(0.5, 1, samples))
        return cls(rng.normal(0, 1.5, (samples, columns)), labels, ious, one_stage)

    @property
    def weights(self) -> np.ndarray | None:
        return (
            (ALPHA * self.labels + (1 - ALPHA) * (1 - self.labels)).repeat(self.labels.shape[1], 0)
            if self.one_stage
            else None
        )

    def variables(self, logits: np.ndarray) -> tuple[Variables, Variables]:
        """Variables and their tangents, samples times directions. ``logits`` is (..., samples,
        columns)."""
        samples, columns = self.labels.shape
        labels = self.labels.repeat(columns, 0)
        ious = np.broadcast_to(np.maximum(self.ious, MIN_IOU)[:, None], self.labels.shape).repeat(
            columns, 0
        )
        values = {"X": logits.repeat(columns, -2)}
        values |= (
            {"PY": labels, "NY": 1 - labels, "Q": labels * ious}
            if self.one_stage
            else {"Y": labels, "Z": ious}
        )
        return values, {"X": np.tile(np.eye(columns), (samples, 1))}

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Share of samples whose label has a softmax score above 1/2; or, with independent
        sigmoids, the mean of the shares of labels with a score above half their IoU, and of the
        others with one below 1/4. Shape (candidates,).
        """
        if not self.one_stage:
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            return ((powers * self.labels).sum(-1) > powers.sum(-1) / 2).mean(-1)
        with np.errstate(over="ignore"):
            high = (
                1 / (1 + np.exp(-logits)) > np.where(self.labels == 1, self.ious[:, None], 0.5) / 2
            )
        return (high[:, self.labels == 1].mean(-1) + (~high)[:, self.labels == 0].mean(-1)) / 2


@dataclass(frozen=True)
class BoxBatch:
    """Boxes to move onto their targets. A box is (centre x, centre y, log width, log height)
    relative to its target, in the target's widths and heights: what a detector's regression branch
    puts out, up to the anchor.

    Attributes:
        initial: (samples, 4) boxes to start from.
        targets: (samples, 2) widths and heights of the targets in pixels.
    """

    initial: np.ndarray
    targets: np.ndarray
    measure = "mean IoU"
    weights = None

    @classmethod
    def draw(cls, rng: np.random.Generator, samples: int) -> BoxBatch:
        """Targets from 8 to 512 pixels; boxes off by a third of the size or so, and every eighth
        beside its target."""
        side, aspect = np.exp2(rng.uniform(3, 9, samples)), np.exp2(rng.uniform(-1, 1, samples))
        initial = np.concatenate(
            [rng.normal(0, 0.25, (samples, 2)), rng.normal(0, 0.35, (samples, 2))], axis=1
        )
        initial[::8, 0] = rng.choice([-1, 1], len(initial[::8])) * rng.uniform(
            1.5, 2, len(initial[::8])
        )
        return cls(initial, np.stack([side * np.sqrt(aspect), side / np.sqrt(aspect)], -1))

    def variables(self, boxes: np.ndarray) -> tuple[Variables, Variables]:
        """Variables and their tangents, samples times directions. ``boxes`` is (..., samples,
        4)."""
        areas, slopes = areas_and_slopes(boxes, self.targets)
        points = (*boxes.shape[:-2], -1, 1)
        return (
            {name: area.repeat(4, -1).reshape(points) for name, area in zip("UIE", areas)},
            {name: slope.reshape(points) for name, slope in zip("UIE", slopes)},
        )

    def scores(self, boxes: np.ndarray) -> np.ndarray:
        """Mean IoU with the targets. Shape (candidates,)."""
        union, overlap, _ = areas_and_slopes(boxes, self.targets)[0]
        return (overlap / union).mean(-1)


Batch = LogitBatch | BoxBatch


def draw_batch(space: SearchSpace, rng: np.random.Generator, samples: int) -> Batch:
    """Random predictions and labels, or targets, of the kind that a space is about."""
    return (
        BoxBatch.draw(rng, samples)
        if space.inputs == "boxes"
        else LogitBatch.draw(rng, samples, space.inputs == "one_stage")
    )


def gradients(graph: Graph, batch: Batch, predictions: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Gradient of each loss, summed over the samples, by the predictions.

    Args:
        predictions: (samples, parameters), or (trees, samples, parameters) where each tree has its
            own (a graph that is not shared).

    Returns:
        (trees, samples, parameters); 0 for a tree that does not depend on the prediction.
    """
    values, tangents = (
        {name: arrays.asarray(array) for name, array in variables.items()}
        for variables in batch.variables(predictions)
    )
    _, slopes = graph.evaluate(values, tangents, arrays)
    result = np.zeros((len(graph.roots), *predictions.shape[-2:]))
    moving = np.flatnonzero(graph.roots >= graph.fixed)
    with np.errstate(all="ignore"):
        roots = arrays.numpy(
            arrays.gather(slopes, arrays.indices(graph.roots[moving] - graph.fixed))
        )
        result[moving] = reduce(roots, graph.wide[moving], batch.weights).T.reshape(
            -1, *predictions.shape[-2:]
        )
    return result


def areas_and_slopes(boxes: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Union, intersection and enclosing area of boxes with targets centred at 0, and their
    derivatives.

    Args:
        boxes: (..., 4) centre x, centre y, log width, log height, in units of the target.
        targets: (..., 2) width and height in pixels.

    Returns:
        (3, ...) in squared pixels, and (3, ..., 4) their derivatives by the boxes' parameters.
    """
    centre, size = boxes[..., :2] * targets, np.exp(np.minimum(boxes[..., 2:], 20)) * targets
    low, high, edge = centre - size / 2, centre + size / 2, targets / 2
    overlap = np.clip(np.minimum(high, edge) - np.maximum(low, -edge), 0, None)
    enclosing = np.maximum(high, edge) - np.minimum(low, -edge)
    # How overlap and enclosing extents change with the upper and the lower side.
    touching = overlap > 0
    upper, lower = (high < edge) & touching, (low > -edge) & touching
    outer_upper, outer_lower = high > edge, low < -edge
    by_centre = np.stack([upper * 1.0 - lower, outer_upper * 1.0 - outer_lower]) * targets
    by_size = np.stack([upper * 0.5 + lower * 0.5, outer_upper * 0.5 + outer_lower * 0.5]) * size
    other = np.stack([overlap, enclosing])[
        ..., ::-1
    ]  # the other side's extent: the height for the width
    overlap_slope, enclosing_slope = np.concatenate([by_centre * other, by_size * other], -1)
    area_slope = np.concatenate(
        [np.zeros_like(size), np.broadcast_to(size.prod(-1)[..., None], size.shape)], -1
    )
    areas = areas_of(np.concatenate([centre, size], -1), np.concatenate([0 * targets, targets], -1))
    return areas, np.stack([area_slope - overlap_slope, overlap_slope, enclosing_slope])
