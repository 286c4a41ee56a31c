"""Populations of expressions as arrays, and how they vary: grow, mutate, cross.

A population is an integer array of prefix programs, so thousands of trees vary in a few array
calls, without a Python loop over trees. Operators are those of genetic programming (Koza 1992);
their names and laws follow DEAP's ``gp`` module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cse_autoloss import literals
from cse_autoloss.expression import Expression
from cse_autoloss.language import PAD, Language

MAX_GROWN_DEPTH = 15
#: Offspring beyond these limits are replaced by their parent, as DEAP's ``staticLimit`` does; 17 is
#: Koza's depth.
OFFSPRING_MAX_SIZE = 80
SCALED = 0.75  # of the numbers that change are multiplied by another, the rest replaced
SCALING = 0.5  # standard deviation of its logarithm
OFFSPRING_MAX_DEPTH = 17


@dataclass(frozen=True, eq=False)
class Population:
    """Expressions of one space as an array.

    Attributes:
        language: what the codes mean.
        programs: (n, L) prefix programs, one a row, padded with ``PAD``; columns are
            contiguous in memory.
        lengths: (n,) number of nodes of each.
    """

    language: Language
    programs: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_expressions(cls, expressions: Iterable[Expression], language: Language) -> Population:
        rows = [[language.code(name) for name in e.program] for e in expressions]
        lengths = np.array([len(row) for row in rows], np.intp)
        programs = np.full((len(rows), lengths.max(initial=1)), PAD, language.code_type, order="F")
        for row, program in enumerate(rows):
            programs[row, : len(program)] = program
        return cls(language, programs, lengths)

    @classmethod
    def concatenate(cls, populations: Sequence[Population]) -> Population:
        """One after the other; all of the same space, at least one."""
        widest = max(population.programs.shape[1] for population in populations)
        dtype = populations[0].language.code_type
        programs = np.full((sum(map(len, populations)), widest), PAD, dtype, order="F")
        start = 0
        for population in populations:
            programs[start : start + len(population), : population.programs.shape[1]] = (
                population.programs
            )
            start += len(population)
        return cls(
            populations[0].language,
            programs,
            np.concatenate([population.lengths for population in populations]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> Population:
        """The population of these rows (indices, or a mask)."""
        lengths = self.lengths[rows]
        columns = self.programs.T[: lengths.max(initial=1)]
        return Population(self.language, columns[:, rows].T, lengths)

    def slice(self, start: int, stop: int) -> Population:
        """Rows ``start`` to ``stop``, without a copy."""
        return Population(self.language, self.programs[start:stop], self.lengths[start:stop])

    def expression(self, row: int) -> Expression:
        codes = self.programs[row, : self.lengths[row]].tolist()
        return Expression(tuple(self.language.token(code) for code in codes))

    def expressions(self) -> list[Expression]:
        return [self.expression(row) for row in range(len(self))]

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n, L) number of nodes of the subtree that starts at each node; 0 in the padding."""
        return self._shape[0]

    @cached_property
    def depths(self) -> np.ndarray:
        """(n,) depth of each tree; a single variable has depth 0."""
        return self._shape[1]

    @cached_property
    def _shape(self) -> tuple[np.ndarray, np.ndarray]:
        count, width = self.programs.shape
        sizes = np.zeros((width + 1, count), np.int32)
        heights = np.zeros((width + 1, count), np.int32)
        rows = np.arange(count)
        # The first argument follows at once, the second after it
        for column in range(width - 1, -1, -1):
            arity = self.language.arity[self.programs[:, column]]
            after = np.minimum(column + 1 + sizes[column + 1], width)
            second = np.where(arity == 2, sizes[after, rows], 0)
            sizes[column] = (
                (column < self.lengths) + np.where(arity > 0, sizes[column + 1], 0) + second
            )
            heights[column] = np.where(
                arity > 0,
                1 + np.maximum(heights[column + 1], np.where(arity == 2, heights[after, rows], 0)),
                0,
            )
        return sizes[:-1].T, heights[0]


def grow(
    rng: np.random.Generator, count: int, language: Language, min_depth: int = 2, max_depth: int = 6
) -> Population:
    """Random trees by ramped half-and-half.

    Each tree has a depth limit drawn from ``min_depth..max_depth``; half of the trees are full
    (every branch reaches the limit), half are grown (from ``min_depth`` on, a node is any operator
    or leaf, all equally likely). This is the law of DEAP's ``genHalfAndHalf``.

    Raises:
        ValueError: if the depths are not ``0 <= min_depth <= max_depth <= 15``.
    """
    if not 0 <= min_depth <= max_depth <= MAX_GROWN_DEPTH:
        raise ValueError(
            f"depths: expected 0 <= min_depth <= max_depth <= {MAX_GROWN_DEPTH}, found "
            f"{min_depth} and {max_depth}"
        )
    operators, tokens = len(language.operators), len(language.names)
    # The node at a depth of a tree of a kind (its limit, and from where on leaves may come) is an
    # operator, anything, or a leaf: the first code of its range, and how many there are.
    kinds = [
        (limit, leaves_from)
        for limit in range(min_depth, max_depth + 1)
        for leaves_from in (limit, min_depth)
    ]
    first, choices = np.zeros((len(kinds), 256), np.uint32), np.zeros((len(kinds), 256), np.uint32)
    for kind, (limit, leaves_from) in enumerate(kinds):
        first[kind, limit:] = operators
        choices[kind, :leaves_from], choices[kind, leaves_from:limit], choices[kind, limit:] = (
            operators,
            tokens,
            tokens - operators,
        )
    first, choices = first.ravel(), choices.ravel()
    deepest = np.zeros(2 << max_depth, np.uint8)
    for depth in range(max_depth + 1):
        deepest[1 << depth : 2 << depth] = depth
    # A tree's state is one number: its kind, the depth of its next node, and above them a bit for
    # each depth at which a second argument is still to come (these stand at different depths of one
    # branch).
    state = rng.integers(len(kinds), size=count, dtype=np.uint32) << 8
    rows = np.arange(count, dtype=np.int32)
    columns, lengths = [], np.zeros(count, np.intp)
    while len(rows):
        spot = state & 0xFFFF
        token = rng.integers(1 << 16, size=len(rows), dtype=np.uint16) * choices.take(spot)
        token >>= 16
        token += first.take(spot)
        token = token.astype(language.code_type)
        columns.append(np.full(count, PAD, language.code_type))
        columns[-1][rows] = token
        arity = language.arity.take(token)
        state += 1
        binary = np.flatnonzero(arity == 2)
        pairs = state.take(binary)
        state[binary] = pairs | np.uint32(1 << 16) << (pairs & 0xFF)
        leaf = np.flatnonzero(arity == 0)
        back = state.take(leaf)
        waiting = back >> 16
        depth = deepest.take(waiting).astype(np.uint32)
        state[leaf] = (back & 0xFF00 | depth) | (waiting ^ np.uint32(1) << depth) << 16
        ended = leaf.compress(waiting == 0)
        if len(ended):
            lengths[rows.take(ended)] = len(columns)
            going = np.ones(len(rows), bool)
            going[ended] = False
            rows, state = rows.compress(going), state.compress(going)
    return Population(language, np.array(columns or [np.empty(0, language.code_type)]).T, lengths)


def mutate(rng: np.random.Generator, population: Population, language: Language) -> Population:
    """One change in each tree, drawn anew for each: a random subtree is replaced by a new one of
    depth 0 to 2, or one node by another of its arity, or a subtree by one of its own arguments
    (which shrinks the tree). In a language with literals, a node that is a number is mostly
    multiplied by another one near 1.
    """
    kind = rng.integers(3, size=len(population))
    spots = _random_nodes(rng, population)
    rows = np.arange(len(population))
    sizes = population.sizes[rows, spots]
    tokens = population.programs[rows, spots]
    arity = population.language.arity[tokens]
    donors = grow(rng, len(population), language, 0, 2)
    # Shrinking keeps the subtree's first or second argument: the donor is the tree itself.
    second = (arity == 2) & (rng.random(len(population)) < 0.5)
    first_size = population.sizes[rows, np.minimum(spots + 1, population.programs.shape[1] - 1)]
    argument = np.where(second, spots + 1 + first_size, spots + 1)
    argument = np.where((kind == 2) & (arity > 0), argument, spots)
    own = population.sizes[rows, argument]
    mutants = _graft(population, spots, sizes, population, argument, own)
    grafted = _graft(population, spots, sizes, donors, np.zeros_like(spots), donors.lengths)
    mutants = _choose(kind == 0, grafted, mutants)
    point = np.flatnonzero(kind == 1)
    programs = mutants.programs.copy(order="F")
    programs[point, spots[point]] = _same_arity(rng, population.language, tokens[point])
    if population.language.real_constants:
        scaled = point[np.isfinite(population.language.numbers[tokens[point]])]
        scaled = scaled[rng.random(len(scaled)) < SCALED]
        numbers = population.language.numbers[tokens[scaled]]
        numbers = numbers * np.exp(rng.normal(0, SCALING, len(scaled)))
        programs[scaled, spots[scaled]] = literals.codes_of(numbers)
    return _within_limits(Population(population.language, programs, mutants.lengths), population)


def rescale(rng: np.random.Generator, population: Population, language: Language) -> Population:
    """Each tree with all of its numbers multiplied by others near 1, each by its own; nothing else
    changes. The language has literals."""
    places = np.nonzero(np.isfinite(language.numbers[population.programs]))
    numbers = language.numbers[population.programs[places]]
    programs = population.programs.copy(order="F")
    programs[places] = literals.codes_of(numbers * np.exp(rng.normal(0, SCALING, len(numbers))))
    return Population(population.language, programs, population.lengths)


def crossover(
    rng: np.random.Generator, mothers: Population, fathers: Population, language: Language
) -> Population:
    """Each mother with a random subtree replaced by a random subtree of her father (one-point
    crossover).

    Raises:
        ValueError: if there are not as many fathers as mothers.
    """
    if len(mothers) != len(fathers):
        raise ValueError(
            f"crossover: {len(mothers)} mothers and {len(fathers)} fathers: expected as many"
        )
    rows = np.arange(len(mothers))
    spots, taken = _random_nodes(rng, mothers), _random_nodes(rng, fathers)
    children = _graft(
        mothers, spots, mothers.sizes[rows, spots], fathers, taken, fathers.sizes[rows, taken]
    )
    return _within_limits(children, mothers)


def _random_nodes(rng: np.random.Generator, population: Population) -> np.ndarray:
    return (rng.random(len(population)) * population.lengths).astype(np.intp)


def _same_arity(rng: np.random.Generator, language: Language, tokens: np.ndarray) -> np.ndarray:
    """For each token another one, uniformly, of the same arity (itself where there is no other)."""
    result = tokens.copy()
    arity = language.arity[: len(language.names)]
    for count in range(3):
        group = np.flatnonzero(arity == count)
        chosen = np.flatnonzero(language.arity[tokens] == count)
        if len(group) > 1 and len(chosen):
            place = np.searchsorted(group, tokens[chosen])
            shift = 1 + rng.integers(len(group) - 1, size=len(chosen))
            result[chosen] = group[(place + shift) % len(group)]
    return result


def _graft(
    population: Population,
    spots: np.ndarray,
    sizes: np.ndarray,
    donors: Population,
    starts: np.ndarray,
    donor_sizes: np.ndarray,
) -> Population:
    """Each tree with the ``sizes`` nodes at ``spots`` replaced by the donor's ``donor_sizes`` nodes
    at ``starts``."""
    lengths = population.lengths - sizes + donor_sizes
    column = np.arange(lengths.max(initial=1))[:, None]
    rows = np.arange(len(population))
    # Reading outside a program happens only where the result is the donor's or padding.
    own = np.clip(
        np.where(column < spots, column, column - donor_sizes + sizes),
        0,
        population.programs.shape[1] - 1,
    )
    other = np.clip(column - spots + starts, 0, donors.programs.shape[1] - 1)
    inside = (column >= spots) & (column < spots + donor_sizes)
    programs = np.where(inside, donors.programs[rows, other], population.programs[rows, own])
    programs[column >= lengths] = PAD
    return Population(population.language, programs.T, lengths)


def _choose(condition: np.ndarray, yes: Population, no: Population) -> Population:
    both = Population.concatenate([yes, no])
    return both.take(np.where(condition, 0, len(yes)) + np.arange(len(yes)))


def _within_limits(children: Population, parents: Population) -> Population:
    fits = (children.lengths <= OFFSPRING_MAX_SIZE) & (children.depths <= OFFSPRING_MAX_DEPTH)
    return _choose(fits, children, parents)
