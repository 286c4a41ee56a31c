"""Screening: candidates in, verdicts out, thousands at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cse_autoloss.expression import Expression
from cse_autoloss.screening.blocks import Block
from cse_autoloss.screening.equivalence import Seen
from cse_autoloss.screening.graph import Arrays, Columns, Forest, Graph
from cse_autoloss.screening.probes import Probes
from cse_autoloss.screening.properties import (
    PROPERTIES,
    USES_PREDICTION,
    first_failures,
    reduce,
    violations,
)
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population

BATCH_SIZE = 65_536
ACCEPTED, DUPLICATE = -1, -2  # verdict codes beside the indices of PROPERTIES
BLOCK_BYTES = 1 << 26  # of the nodes' values on one block: more trees than that are taken in turns


@dataclass(frozen=True)
class Trace:
    """A loss along a sweep.

    Attributes:
        sweep: which sweep, in words.
        axis: what ``positions`` are.
        positions, values, slopes: along the sweep; the derivative is by the position.
        at: index of the point in question: where the property is missed, or the start.
        variables: the expression's variables at that point.
    """

    sweep: str
    axis: str
    positions: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]
    at: int
    variables: dict[str, list[float]]


@dataclass(frozen=True)
class Verdict:
    """What verification says of a candidate.

    Attributes:
        accepted: whether it has all properties.
        failed: the first property that it misses (one of ``PROPERTIES``), or None.
        detail: one line for a reader.
        counterexample: where it misses it; None if it has all, or does not use the prediction at
            all.
    """

    accepted: bool
    failed: str | None
    detail: str
    counterexample: Trace | None = None


@dataclass(frozen=True, eq=False)
class ScreenReport:
    """What became of a population.

    Attributes:
        population: what was screened.
        codes: (n,) int8: ``ACCEPTED``, ``DUPLICATE`` (of an earlier row, or of a candidate of an
            earlier call), or the index in ``PROPERTIES`` of the property that fell.
        hashes: (n,) uint64; equal for duplicates.
    """

    population: Population
    codes: np.ndarray
    hashes: np.ndarray

    @property
    def generated(self) -> int:
        return len(self.codes)

    @property
    def unique(self) -> int:
        return int(np.count_nonzero(self.codes != DUPLICATE))

    @cached_property
    def rejected(self) -> dict[str, int]:
        """Property to the number of unique candidates that fell to it, in order of checking."""
        return {
            name: int(np.count_nonzero(self.codes == index))
            for index, name in enumerate(PROPERTIES)
        }

    @cached_property
    def survivors(self) -> list[Expression]:
        return self.population.take(self.codes == ACCEPTED).expressions()

    def fates(self) -> list[tuple[str, str]]:
        """(text, property that fell) of each unique candidate that was rejected."""
        return [
            (str(self.population.expression(row)), PROPERTIES[self.codes[row]])
            for row in np.flatnonzero(self.codes >= 0)
        ]


class Screener:
    """Screens candidates of one space; keeps its probes and buffers between calls, and what it has
    seen.

    Args:
        batch_size: candidates that share a graph. More of them share more; memory grows with it
            (docs/screening.md).
        seen: what ``Seen.to_json`` wrote, to go on from there.
        device: a torch device such as ``"cuda"``; None is NumPy on the CPU.
    """

    def __init__(
        self,
        space: SearchSpace,
        batch_size: int = BATCH_SIZE,
        seen: str | None = None,
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        self.space, self.batch_size = space, batch_size
        self.seen = Seen() if seen is None else Seen.from_json(seen)
        self.probes = Probes.of(space)
        self._arrays = Arrays(device)
        self._inputs = [
            (
                {name: self._arrays.asarray(array) for name, array in block.values.items()},
                {name: self._arrays.asarray(array) for name, array in block.tangents.items()},
            )
            for block in self.probes.blocks
        ]

    def screen(self, candidates: Population | Iterable[Expression]) -> ScreenReport:
        """Judge each candidate that is not a duplicate, and remember it as seen."""
        population = (
            candidates
            if isinstance(candidates, Population)
            else Population.from_expressions(candidates, self.space)
        )
        codes, hashes = np.empty(len(population), np.int8), np.empty(len(population), np.uint64)
        for start in range(0, len(population), self.batch_size):
            batch = slice(start, start + self.batch_size)
            codes[batch], hashes[batch] = self._batch(
                population.slice(start, start + self.batch_size)
            )
        return ScreenReport(population, codes, hashes)

    def verify(self, expression: Expression) -> Verdict:
        """Judge one candidate, whether seen or not, and say where it fails."""
        graph = self._graph(expression)
        if graph is None:
            predicted = ", ".join(sorted(self.space.predicted))
            return Verdict(
                False,
                USES_PREDICTION,
                f"the loss does not depend on the prediction ({predicted} is missing)",
            )
        detached = self._has(
            Population.from_expressions([expression], self.space), self.space.detaching
        )
        for index, block in enumerate(self.probes.blocks):
            values, slopes = self._losses(graph, index)
            with np.errstate(all="ignore"):
                tolerances = self.probes.tolerances
                for name, where in violations(values, slopes, block, tolerances, detached):
                    if where.any():
                        trace = _trace(block, values[:, 0], slopes[:, 0], int(np.argmax(where)))
                        return Verdict(False, name, _detail(name, trace), trace)
        aim = ""
        if any(self._follows_its_quality(graph, i) for i in range(len(self.probes.blocks))):
            aim = "; the best score of a positive rises with its IoU"
        return Verdict(True, None, f"all properties hold{aim}")

    def _follows_its_quality(self, graph: Graph, index: int) -> bool:
        """Whether, on a block of positives of rising IoU, the score that is best rises with it."""
        block = self.probes.blocks[index]
        if not block.aims or block.name != "IoUs":
            return False
        _, slopes = self._losses(graph, index)
        sweeps = block.shape[0] * block.shape[1]
        # Where descent stops: the slope is no longer negative.
        rising = slopes[:, 0].reshape(sweeps, -1) >= 0
        best = np.where(rising.any(1), rising.argmax(1), rising.shape[1])[:: block.shape[1]]
        return bool((np.diff(best) >= 0).all() and best[0] < best[-1])

    def traces(self, expression: Expression) -> list[Trace]:
        """The loss along every sweep of the largest block that it is held to; empty if it does not
        use the prediction."""
        graph = self._graph(expression)
        if graph is None:
            return []
        index = max(
            (i for i, block in enumerate(self.probes.blocks) if block.held),
            key=lambda i: len(self.probes.blocks[i].positions),
        )
        block, (values, slopes) = self.probes.blocks[index], self._losses(graph, index)
        return [
            _trace(block, values[:, 0], slopes[:, 0], start)
            for start in range(0, len(values), block.shape[2])
        ]

    def _graph(self, expression: Expression) -> Graph | None:
        population = Population.from_expressions([expression], self.space)
        return Graph.of_population(population) if self.uses_prediction(population)[0] else None

    def uses_prediction(self, population: Population) -> np.ndarray:
        """(n,) bool: whether a variable that depends on the prediction occurs."""
        return self._has(population, self.space.predicted)

    def _has(self, population: Population, names: Iterable[str]) -> np.ndarray:
        """(n,) bool: whether a token of these names occurs."""
        found = np.zeros(len(population), bool)
        for name in names:
            for column in population.programs.T:
                found |= column == population.language.codes[name]
        return found

    def _batch(self, population: Population) -> tuple[np.ndarray, np.ndarray]:
        uses = self.uses_prediction(population)
        codes, hashes = np.empty(len(population), np.int8), np.empty(len(population), np.uint64)
        # Need not be understood, only be told apart
        columns = Columns.of(population, np.flatnonzero(~uses))
        hashes[columns.rows] = columns.hashes(self.space.keys)
        codes[columns.rows] = np.where(
            self.seen.add(hashes[columns.rows]), PROPERTIES.index(USES_PREDICTION), DUPLICATE
        )
        columns = Columns.of(population, np.flatnonzero(uses))
        forest = Forest.of(columns, self.space)
        hashes[columns.rows] = forest.hashes[: len(forest)]
        verdicts = np.where(
            self.seen.add(forest.hashes[: len(forest)]), np.int8(ACCEPTED), np.int8(DUPLICATE)
        )
        detached = self._has(population, self.space.detaching)[columns.rows]
        for index, block in enumerate(self.probes.blocks):
            for trees in self._parts(columns, np.flatnonzero(verdicts == ACCEPTED), block):
                verdicts[trees] = first_failures(
                    *self._losses(Graph.of(forest, trees), index),
                    block,
                    self.probes.tolerances,
                    detached[trees],
                )
        codes[columns.rows] = verdicts
        return codes, hashes

    def _parts(self, columns: Columns, trees: np.ndarray, block: Block) -> list[np.ndarray]:
        """The trees in as many parts as keep a part's values within ``BLOCK_BYTES``."""
        if not len(trees):
            return []
        size = 4 * len(block.positions) * block.columns
        return np.split(
            trees,
            np.flatnonzero(np.diff(np.cumsum(columns.lengths.take(trees)) * size // BLOCK_BYTES))
            + 1,
        )

    def _losses(self, graph: Graph, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(points, trees) losses and slopes of the graph's trees on a block."""
        arrays, weights = self._arrays, self.probes.blocks[index].weights
        values, tangents = graph.evaluate(*self._inputs[index], arrays)
        roots = arrays.indices(graph.roots)
        with np.errstate(all="ignore"):
            return (
                reduce(arrays.numpy(arrays.gather(values, roots)), graph.wide, weights),
                reduce(
                    arrays.numpy(arrays.gather(tangents, roots - graph.fixed)), graph.wide, weights
                ),
            )


def _trace(block: Block, values: np.ndarray, slopes: np.ndarray, point: int) -> Trace:
    sweep, at = divmod(point, block.shape[2])
    line = slice(sweep * block.shape[2], (sweep + 1) * block.shape[2])
    numbers = (tuple(array[line].tolist()) for array in (block.positions, values, slopes))
    return Trace(
        block.sweeps[sweep],
        block.axis,
        *numbers,
        at,
        {name: array[point].tolist() for name, array in block.values.items()},
    )


_SAYS = {
    "finite-values": "the loss is {value:g}",
    "finite-gradients": "the gradient is {slope:g}",
    "monotonicity": "the loss rises towards the label or target "
    "(value {value:.6g}, slope {slope:.3g})",
    "convergence": "the loss is not least or not settled at the label or target, or has two best "
    "scores (value {value:.6g}, slope {slope:.3g})",
    "not-flat": "there is next to no gradient where the prediction is wrong (slope {slope:.3g})",
}


def _detail(name: str, example: Trace) -> str:
    text = _SAYS[name].format(value=example.values[example.at], slope=example.slopes[example.at])
    place = f"{example.axis} {example.positions[example.at]:.3g}"
    return f"{text} at {place} on the sweep '{example.sweep}'"
