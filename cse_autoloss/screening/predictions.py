"""Batches of predictions with their labels or targets, and the gradient of many losses by them at
once.

The gradient is taken in forward mode: a sample has few parameters (its logits, or its box's four),
and each is a direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cse_autoloss import inputs
from cse_autoloss.inputs import ALPHA, EXTRAS, INPUTS, MIN_IOU
from cse_autoloss.screening.box_probes import box_variables
from cse_autoloss.screening.graph import Arrays, Graph
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
        further: other variables, (samples, columns).
    """

    initial: np.ndarray
    labels: np.ndarray
    ious: np.ndarray
    one_stage: bool
    further: Variables = field(default_factory=dict)
    measure = "accuracy"

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        samples: int,
        one_stage: bool,
        variables: Iterable[str] = (),
    ) -> LogitBatch:
        """A third or so of the samples is background; IoUs of the others lie in [0.5, 1].

        Args:
            variables: those of the space; what some are made of is drawn, too.
        """
        columns = CLASSES if one_stage else CLASSES + 1
        label = rng.integers(CLASSES + 1, size=samples)
        labels = (label[:, None] == np.arange(columns)).astype(float)
        ious = np.where(label == CLASSES, 1, rng.uniform(0.5, 1, samples))
        initial = rng.normal(0, 1.5, (samples, columns))
        kind = "one_stage" if one_stage else "two_stage"
        given = {"pred": torch.from_numpy(initial), "target": torch.from_numpy(label)}
        further = [name for name in variables if name not in ("X", "Y", "Z", "Q", "PY", "NY")]
        for name in sorted(inputs.needs(kind, further)):
            drawn = EXTRAS[name].draw(rng, label < CLASSES, CLASSES)
            given[name] = torch.from_numpy(drawn)
        found = inputs.variables(kind, further, given)
        return cls(
            initial, labels, ious, one_stage, {name: found[name].numpy() for name in further}
        )

    @property
    def weights(self) -> np.ndarray | None:
        return (
            (ALPHA * self.labels + (1 - ALPHA) * (1 - self.labels)).repeat(self.labels.shape[1], 0)
            if self.one_stage
            else None
        )

    @cached_property
    def _fixed(self) -> Variables:
        """The variables that stand still, samples times directions."""
        columns = self.labels.shape[1]
        ious = np.broadcast_to(np.maximum(self.ious, MIN_IOU)[:, None], self.labels.shape)
        values = (
            {"PY": self.labels, "NY": 1 - self.labels, "Q": self.labels * ious}
            if self.one_stage
            else {"Y": self.labels, "Z": ious}
        )
        return {
            name: array.repeat(columns, 0) for name, array in {**values, **self.further}.items()
        }

    def variables(self, logits: np.ndarray) -> tuple[Variables, Variables]:
        """Variables and their tangents, samples times directions. ``logits`` is (..., samples,
        columns)."""
        samples, columns = self.labels.shape
        values = {"X": logits.repeat(columns, -2), **self._fixed}
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
        names: of the variables that are asked for.
        image_sizes: (samples, 2) widths and heights of the images; the usual ones where None.
    """

    initial: np.ndarray
    targets: np.ndarray
    names: tuple[str, ...] = ("U", "I", "E")
    image_sizes: np.ndarray | None = None
    measure = "mean IoU"
    weights = None

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        samples: int,
        variables: Iterable[str] = ("U", "I", "E"),
    ) -> BoxBatch:
        """Targets from 8 to 512 pixels; boxes off by a third of the size or so, and every eighth
        beside its target."""
        side, aspect = np.exp2(rng.uniform(3, 9, samples)), np.exp2(rng.uniform(-1, 1, samples))
        initial = np.concatenate(
            [rng.normal(0, 0.25, (samples, 2)), rng.normal(0, 0.35, (samples, 2))], axis=1
        )
        initial[::8, 0] = rng.choice([-1, 1], len(initial[::8])) * rng.uniform(
            1.5, 2, len(initial[::8])
        )
        targets = np.stack([side * np.sqrt(aspect), side / np.sqrt(aspect)], -1)
        sizes = None
        if inputs.needs("boxes", variables):
            sizes = EXTRAS["image_sizes"].draw(rng, np.ones(samples, bool), CLASSES)
        return cls(initial, targets, tuple(variables), sizes)

    def variables(self, boxes: np.ndarray) -> tuple[Variables, Variables]:
        """Variables and their tangents, samples times directions. ``boxes`` is (..., samples,
        4)."""
        points = (*boxes.shape[:-2], -1, 1)
        parameters = torch.tensor(boxes.reshape(-1, 4), requires_grad=True)
        found = self._compute(self.names, parameters)
        values, tangents = {}, {}
        for name in self.names:
            values[name] = found[name].detach().numpy().repeat(4).reshape(points)
            if INPUTS["boxes"][name].predicted:
                total = found[name].sum()  # a box's variable depends on that box alone
                (slope,) = torch.autograd.grad(total, parameters, retain_graph=True)
                tangents[name] = slope.numpy().reshape(points)
        return values, tangents

    def scores(self, boxes: np.ndarray) -> np.ndarray:
        """Mean IoU with the targets. Shape (candidates,)."""
        found = self._compute(("U", "I"), torch.from_numpy(boxes.reshape(-1, 4)))
        return (found["I"] / found["U"]).numpy().reshape(boxes.shape[:-1]).mean(-1)

    def _compute(self, names: Iterable[str], boxes: Tensor) -> dict[str, Tensor]:
        """Variables of (boxes, 4), the samples' over and over."""
        targets = torch.from_numpy(self.targets).repeat(len(boxes) // len(self.targets), 1)
        size = boxes[:, 2:].clamp(max=20).exp()
        pixels = torch.cat([boxes[:, :2] * targets, size * targets], 1)
        sizes = self.image_sizes
        if sizes is not None:
            sizes = torch.from_numpy(sizes).repeat(len(boxes) // len(sizes), 1)
        return box_variables(names, pixels, torch.cat([0 * targets, targets], 1), sizes)


Batch = LogitBatch | BoxBatch


def draw_batch(space: SearchSpace, rng: np.random.Generator, samples: int) -> Batch:
    """Random predictions and labels, or targets, of the kind that a space is about."""
    return (
        BoxBatch.draw(rng, samples, space.variables)
        if space.inputs == "boxes"
        else LogitBatch.draw(rng, samples, space.inputs == "one_stage", space.variables)
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
