"""What a loss does to a detector, as a row of numbers: its gradient on a batch of predictions.

Training sees a loss through its gradient alone. Two expressions with one gradient field are one
loss (``equivalence.py`` hashes the field), and two with fields that are close train to a similar
mAP: that is what a ranker learns from (``rankers/``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cse_autoloss.expression import Expression
from cse_autoloss.screening.graph import Arrays, Graph
from cse_autoloss.screening.predictions import Batch, draw_batch, gradients
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population

SAMPLES = 96
TOGETHER = 512  # losses whose gradients are computed on one graph, which bounds memory
_SEED = 20210503
_LINEAR = 1 / 3  # gradients up to this share of the mean norm count as they are, larger ones less


def gradient_field(
    expressions: Sequence[Expression], space: SearchSpace, batch: Batch
) -> np.ndarray:
    """The gradient of each loss in each prediction of a batch, in float64.

    Returns:
        (losses, samples, parameters); infinite or NaN where the loss's gradient is.
    """
    arrays = Arrays(dtype="float64")
    parts = [np.zeros((0, *batch.initial.shape))]
    for start in range(0, len(expressions), TOGETHER):
        some = Population.from_expressions(expressions[start : start + TOGETHER], space)
        parts.append(gradients(Graph.of_population(some), batch, batch.initial, arrays))
    return np.concatenate(parts)


def at_equal_strength(field: np.ndarray) -> np.ndarray:
    """A field (losses, samples, parameters) with each loss's gradients at a mean L2 norm of 1 a
    sample, as trials scale their losses; NaN throughout for a loss without a finite, nonzero
    gradient."""
    with np.errstate(all="ignore"):
        field = field / np.abs(field).max(axis=(1, 2), keepdims=True)  # a square could overflow
        field = field / np.linalg.norm(field, axis=2).mean(axis=1)[:, None, None]
    field[~np.isfinite(field).all(axis=(1, 2))] = np.nan
    return field


def branch_features(
    expressions: Sequence[Expression], space: SearchSpace, batch: Batch | None = None
) -> np.ndarray:
    """One branch's features: the gradient field at equal strength, large gradients compressed.

    Args:
        batch: predictions to take the gradient in; a fixed random batch where None.

    Returns:
        (losses, d) float32; a row of NaN for a loss without a finite, nonzero gradient.
    """
    batch = batch or draw_batch(space, np.random.default_rng(_SEED), SAMPLES)
    field = at_equal_strength(gradient_field(expressions, space, batch))
    # A detector clips gradients and adapts its step, so ten times the norm is not ten times as far.
    return np.arcsinh(field / _LINEAR).reshape(len(field), batch.initial.size).astype(np.float32)


def with_defaults(
    losses: Sequence[Mapping[str, str]], spaces: Mapping[str, SearchSpace]
) -> list[dict[str, str]]:
    """Candidates with a stand-in for the detector's default where they leave a branch to it: the
    space's first known loss, which is the default, or close to it (-log IoU for L1 on boxes).

    A branch whose space knows no loss stays away.
    """
    stand_ins = {
        branch: str(next(iter(space.losses.values())).expression)
        for branch, space in spaces.items()
        if space.losses
    }
    return [{**stand_ins, **entry} for entry in losses]


def features(
    losses: Sequence[Mapping[str, str]],
    spaces: Mapping[str, SearchSpace],
    batches: Mapping[str, Batch] | None = None,
) -> np.ndarray:
    """Features of candidates: those of all branches of ``spaces``, one after the other.

    A branch that a candidate leaves to the default has those of ``with_defaults``. Each
    expression's field is computed once, however many candidates hold it.

    Args:
        losses: branch to expression text, for each candidate.
        spaces: branch to its search space, for the branches that are searched.
        batches: branch to the predictions to take gradients in (see ``branch_features``).

    Returns:
        (candidates, d) float32; a row holds NaN where a loss has no finite, nonzero gradient.

    Raises:
        ExpressionError: if a text is no loss of its space.
    """
    columns = [np.zeros((len(losses), 0), np.float32)]
    entries = with_defaults(losses, spaces)
    for branch, space in spaces.items():
        places: dict[str, int] = {}
        held = [
            places.setdefault(entry[branch], len(places)) if branch in entry else -1
            for entry in entries
        ]
        table = branch_features(
            [Expression.parse(text, space) for text in places],
            space,
            (batches or {}).get(branch),
        )
        nothing = np.zeros((1, table.shape[1]), np.float32)
        columns.append(np.concatenate([table, nothing])[held])
    return np.concatenate(columns, axis=1)


class KeptFeatures:
    """The same rows for one run, round after round: each expression's field is computed once, and
    kept in half precision, as a journal keeps its survivors'."""

    def __init__(self, spaces: Mapping[str, SearchSpace]) -> None:
        self._spaces = spaces
        self._rows: dict[tuple[str, str], np.ndarray] = {}  # by branch and text

    def keep(self, branch: str, text: str, row: np.ndarray) -> None:
        """Hold what is known already, (d,) float16, of an expression."""
        self._rows[branch, text] = row

    def of(self, losses: Sequence[Mapping[str, str]]) -> np.ndarray:
        """As :func:`features`."""
        columns, entries = [], with_defaults(losses, self._spaces)
        for branch, space in self._spaces.items():
            texts = {entry[branch] for entry in entries if branch in entry}
            missing = sorted(text for text in texts if (branch, text) not in self._rows)
            rows = branch_features([Expression.parse(text, space) for text in missing], space)
            for text, row in zip(missing, rows.astype(np.float16)):
                self._rows[branch, text] = row
            table = np.zeros((len(entries), rows.shape[1]), np.float32)
            for place, entry in enumerate(entries):
                if branch in entry:
                    table[place] = self._rows[branch, entry[branch]]
            columns.append(table)
        return np.concatenate(columns, axis=1)
