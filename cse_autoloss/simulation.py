"""Model-optimisation simulation on predictions alone: does descent with a loss get labels right,
and boxes onto targets?

Logits, or boxes, are themselves what is optimised, by a few dozen steps of gradient descent whose
length does not depend on the loss's scale. Many candidates descend at once, on one graph
(``screening.graph``). What passes goes on to a tiny detector: a ``Trial`` with ``task="tiny"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cse_autoloss.expression import Expression
from cse_autoloss.screening.graph import Arrays, Graph
from cse_autoloss.screening.predictions import Batch, draw_batch, gradients
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population

SAMPLES = 32
STEPS = 60
# Root mean square of the first step; in logits, or shares of the target's size
STEP_SIZE = {
    "cls": 0.3,
    "reg": 0.03,
}
LEAST = {"cls": 0.95, "reg": 0.7}  # accuracy, or mean IoU, that is asked for at the end
TOGETHER = 256  # candidates that descend on one graph


class Outcome(NamedTuple):
    """What descent with one loss came to.

    Attributes:
        passed: whether it optimises.
        score: final accuracy on the labels, or mean IoU of the boxes with their targets, in [0, 1].
        reason: one line.
        finite: whether all gradients were.
    """

    passed: bool
    score: float
    reason: str
    finite: bool


def simulate_predictions(
    expressions: Sequence[Expression], space: SearchSpace, seed: int = 0
) -> list[Outcome]:
    """Descend with each loss from the same predictions.

    Args:
        seed: of the initial predictions and the targets.
    """
    batch = draw_batch(space, np.random.default_rng(seed), SAMPLES)
    arrays, least = Arrays(), LEAST[space.branch]
    outcomes = []
    for start in range(0, len(expressions), TOGETHER):
        population = Population.from_expressions(expressions[start : start + TOGETHER], space)
        graph = Graph.of_population(population, shared=False)
        for score, finite in zip(*_descend(batch, graph, STEP_SIZE[space.branch], arrays)):
            text = (
                f"{batch.measure} {score:.3f} after {STEPS} steps of descent; at least {least:g} "
                "is asked for"
            )
            if not finite:
                text = f"the gradient became infinite or undefined; {text}"
            outcomes.append(
                Outcome(bool(finite and score >= least), float(score), text, bool(finite))
            )
    return outcomes


def _descend(
    batch: Batch, graph: Graph, step_size: float, arrays: Arrays
) -> tuple[np.ndarray, np.ndarray]:
    """Final score of each of the graph's losses, and whether its gradients stayed finite. Step
    lengths fall to 0 linearly."""
    predictions = np.repeat(batch.initial[None], len(graph.roots), axis=0)
    finite = np.ones(len(predictions), bool)
    for step in range(STEPS):
        gradient = gradients(graph, batch, predictions, arrays)
        finite &= np.isfinite(gradient).all(axis=(1, 2))
        gradient[~finite] = 0
        largest = np.abs(gradient).max(axis=(1, 2), keepdims=True)
        gradient /= np.where(largest > 0, largest, 1)  # a square of it could overflow
        length = np.sqrt(np.mean(np.square(gradient), axis=(1, 2), keepdims=True))
        predictions -= step_size * (1 - step / STEPS) * gradient / np.where(length > 0, length, 1)
    return batch.scores(predictions), finite
