"""A population as one shared graph of unique subexpressions, evaluated level by level.

:class:`Forest` gives every subtree of a population a 64-bit hash of its meaning, the arguments of
commutative operators in one order. :class:`Graph` keeps one node for each hash and evaluates the
nodes: one array call for all nodes of a level that share an operator, values and directional
derivatives (forward mode) together. Nothing here loops over candidates.

One node costs some tens of nanoseconds, so even a sort of the hashes would be felt: equal hashes
are found by letting them contend for the slots of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cse_autoloss.language import FIRST, PREDICTED, SECOND, WIDE, Language
from cse_autoloss.primitives import NUMPY, TORCH
from cse_autoloss.variation import Population

# Of one operand in one array call: a few of these fit into a core's second-level cache
CHUNK_BYTES = 1 << 17

_SIZE, _LEVEL, _FLAGS = np.uint32(0xFFFF0000), np.uint32(0xFF00), np.uint32(0xFF)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def scramble(x: np.ndarray) -> np.ndarray:
    """uint64 in place: every bit of the input sways the upper bits of the output (xor-shift and
    multiply)."""
    x ^= x >> np.uint64(31)
    x *= _MIX
    x ^= x >> np.uint64(29)
    return x


@dataclass(frozen=True)
class Columns:
    """The programs of some trees, column by column, longest tree first, without the padding.

    So a column is a slice, and work on it takes a few array calls.

    Attributes:
        rows: (n,) the population's row that each tree is.
        lengths: (n,) number of nodes, falling.
        counts, starts: (L,), (L+1,) how many trees reach a column, and its first place.
        tokens: (places,) codes.
    """

    rows: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, population: Population, rows: np.ndarray) -> Columns:
        lengths = population.lengths.take(rows)
        longest = int(lengths.max(initial=0))
        # Sorting by 16 bits takes no comparisons.
        order = np.argsort((longest - lengths).astype(np.uint16), kind="stable")
        rows, lengths = rows.take(order), lengths.take(order)
        counts = len(rows) - np.cumsum(np.bincount(lengths, minlength=longest + 1))[:longest]
        starts = np.concatenate([[0], np.cumsum(counts)])
        tokens = np.empty(starts[-1], population.programs.dtype)
        for column in range(longest):
            tokens[starts[column] : starts[column + 1]] = population.programs[:, column].take(
                rows[: counts[column]]
            )
        return cls(rows, lengths, counts, starts, tokens)

    def hashes(self, keys: np.ndarray) -> np.ndarray:
        """(n,) hash of each program as it is written."""
        result, keyed = np.zeros(len(self.rows), np.uint64), keys.take(self.tokens)
        factors = np.cumprod(np.full(len(self.counts), SECOND))
        for column, count in enumerate(self.counts):
            result[:count] += keyed[self.starts[column] : self.starts[column + 1]] * factors[column]
        return scramble(result)


@dataclass(frozen=True)
class Forest:
    """All subtrees of some trees, as flat arrays over the places of :class:`Columns`.

    Attributes:
        language: of the space.
        columns: the programs.
        hashes: (places,) of each subtree; trees that differ in the order of commutative arguments
            only have one hash.
        shapes: (places,) uint32: ``size << 16 | level << 8 | flags``; a level is the height, 0 for
            a leaf.
        second: (places,) where a binary operator's second argument stands. The first stands in the
            next column.
    """

    language: Language
    columns: Columns
    hashes: np.ndarray
    shapes: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, columns: Columns, language: Language) -> Forest:
        starts, tokens = columns.starts, columns.tokens
        arity, hashes = language.arity.take(tokens), language.keys.take(tokens)
        shapes = language.flags.take(tokens)
        shapes |= np.uint32(1 << 16)
        second = np.empty(len(tokens), np.int32)
        for column in range(len(columns.counts) - 2, -1, -1):  # arguments stand to the right
            below = arity[starts[column] : starts[column] + columns.counts[column + 1]]
            trees = np.flatnonzero(below)
            here, left = trees + starts[column], trees + starts[column + 1]
            token, value, shape = tokens.take(here), hashes.take(left), shapes.take(left)
            binary = np.flatnonzero(below.take(trees) == 2)
            a = shape.take(binary)
            right = starts.take((a >> 16) + np.uint32(column + 1)) + trees.take(binary)
            b = shapes.take(right)
            second[here.take(binary)] = right
            value[binary] = value.take(binary) * FIRST + hashes.take(right) * language.factors.take(
                token.take(binary)
            )
            shape[binary] = (
                ((a & _SIZE) + (b & _SIZE))
                | np.maximum(a & _LEVEL, b & _LEVEL)
                | ((a | b) & _FLAGS)
            )
            value += hashes.take(here)
            hashes[here] = scramble(value)
            shapes[here] = (shape & language.keeps.take(token)) + np.uint32(1 << 16 | 1 << 8)
        return cls(language, columns, hashes, shapes, second)

    def __len__(self) -> int:
        return len(self.columns.rows)


def representatives(hashes: np.ndarray) -> np.ndarray:
    """For each hash the index of one that is equal to it, the same one for all equals. Shape
    (n,)."""
    result = np.empty(len(hashes), np.int32)
    waiting, mine = np.arange(len(hashes), dtype=np.int32), hashes
    # Equals always meet in one slot; who shares it without being equal tries again with other bits.
    while len(waiting):
        bits = len(waiting).bit_length() + 2
        slot = (mine >> np.uint64(64 - bits)).view(np.int64)
        owner = np.empty(1 << bits, np.int32)
        owner[slot] = np.arange(len(waiting), dtype=np.int32)
        winner = owner.take(slot)
        beaten = np.flatnonzero(mine.take(winner) != mine)
        result[waiting] = waiting.take(winner)
        waiting, mine = waiting.take(beaten), scramble(mine.take(beaten) * FIRST)
    return result


@dataclass(frozen=True)
class Group:
    """Nodes ``start`` to ``stop`` of a graph: one level, one token.

    Attributes:
        token: code.
        predicted: for each argument, whether it depends on the prediction; for a leaf, whether it
            does itself.
        narrow: an operator along the class axis whose arguments have no class axis.
    """

    token: int
    start: int
    stop: int
    predicted: tuple[bool, ...]
    narrow: bool


@dataclass(frozen=True)
class Graph:
    """Unique subexpressions of some trees.

    Nodes that do not depend on the prediction come first, then the others; each part goes up level
    by level.

    Attributes:
        language: of the space.
        groups: the nodes in order of evaluation.
        first, second: (nodes,) the arguments' nodes.
        fixed: number of nodes that do not depend on the prediction.
        roots: (trees,) node of each tree, in the order of ``rows``.
        wide: (trees,) whether a tree's value has the class axis.
        tokens: (nodes,) codes.
        owner: (nodes,) tree that a node belongs to, where trees do not share; else None.
    """

    language: Language
    groups: tuple[Group, ...]
    first: np.ndarray
    second: np.ndarray
    fixed: int
    roots: np.ndarray
    wide: np.ndarray
    tokens: np.ndarray
    owner: np.ndarray | None = None

    @classmethod
    def of(cls, forest: Forest, trees: np.ndarray, shared: bool = True) -> Graph:
        """The graph of some of a forest's trees.

        Args:
            trees: (n,) indices, rising.
            shared: whether trees share nodes that depend on the prediction; not where each has a
                prediction of its own.
        """
        columns, language = forest.columns, forest.language
        # The trees that reach a column are the first ones.
        reach = np.searchsorted(-columns.lengths.take(trees), -np.arange(len(columns.counts)))
        parts = [trees[:count] for count in reach]
        places = np.concatenate([part + start for part, start in zip(parts, columns.starts)])
        hashes = forest.hashes.take(places)
        if not shared:
            tree = np.concatenate(parts).astype(np.uint64)
            hashes += (forest.shapes.take(places) & PREDICTED) * (tree + np.uint64(1)) * SECOND
            scramble(hashes)
        equal = representatives(hashes)
        unique = np.flatnonzero(equal == np.arange(len(equal), dtype=np.int32))
        place = places.take(unique)
        token, shape = columns.tokens.take(place), forest.shapes.take(place)
        arity = language.arity.take(token)
        first = np.concatenate(
            [part + start for part, start in zip(parts, columns.starts[1:])]
        ).take(unique)
        first = np.where(arity > 0, first, 0)
        second = np.where(arity == 2, forest.second.take(place), 0)
        # A leaf goes by its own flags
        below = np.where(arity > 0, forest.shapes.take(first), shape)
        beside = np.where(arity == 2, forest.shapes.take(second), 0)
        key = _Key(language)
        keys = key.pack(shape, token, below, beside)
        order = np.argsort(keys, kind="stable")
        keys = keys.take(order)
        node = np.zeros(len(columns.tokens), np.int32)
        node[place.take(order)] = np.arange(len(order), dtype=np.int32)
        node[places] = node.take(places.take(equal))
        starts = (
            np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            if len(keys)
            else np.zeros(0, np.intp)
        )
        groups = tuple(
            key.group(int(keys[start]), int(start), int(stop))
            for start, stop in zip(starts, [*starts[1:], len(keys)])
        )
        owner = None
        if not shared:
            owner = np.searchsorted(trees, np.concatenate(parts).take(unique.take(order)))
        return cls(
            language,
            groups,
            node.take(first.take(order)).astype(np.intp),
            node.take(second.take(order)).astype(np.intp),
            int(np.count_nonzero((shape & PREDICTED) == 0)),
            node.take(trees).astype(np.intp),
            (forest.shapes.take(trees) & WIDE) > 0,
            token.take(order),
            owner,
        )

    @classmethod
    def of_population(cls, population: Population, shared: bool = True) -> Graph:
        """The graph of a whole population; its trees are the population's rows."""
        columns = Columns.of(population, np.arange(len(population)))
        graph = cls.of(Forest.of(columns, population.language), np.arange(len(population)), shared)
        tree = np.argsort(columns.rows)
        return replace(
            graph,
            roots=graph.roots[tree],
            wide=graph.wide[tree],
            owner=None if shared else columns.rows[graph.owner],
        )

    def __len__(self) -> int:
        return len(self.first)

    def evaluate(
        self, values: Mapping[str, Any], tangents: Mapping[str, Any], arrays: Arrays
    ) -> tuple[Any, Any]:
        """Value and directional derivative of every node at the same points.

        Args:
            values: (points, columns) of each variable; or (trees, points, columns) where trees do
                not share, and each has its own.
            tangents: likewise for the variables that depend on the prediction: derivative along the
                point's direction.

        Returns:
            (nodes, points, columns) values, with a narrow node's number in every column; and
            (nodes - fixed, points, columns) derivatives of the others. Overwritten by the next call
            on ``arrays``.
        """
        points, columns = next(iter(tangents.values())).shape[-2:]
        value = arrays.reserve("value", (len(self), points, columns))
        tangent = arrays.reserve("tangent", (len(self) - self.fixed, points, columns))
        first, second = arrays.indices(self.first), arrays.indices(self.second)
        first_tangent, second_tangent = (
            arrays.indices(self.first - self.fixed),
            arrays.indices(self.second - self.fixed),
        )
        step = max(1, CHUNK_BYTES // (4 * points * columns))
        names = self.language.names
        with np.errstate(all="ignore"):
            for group in self.groups:
                if group.token >= len(names):
                    tokens = self.tokens[group.start : group.stop]
                    numbers = arrays.asarray(self.language.numbers.take(tokens))
                    value[group.start : group.stop] = numbers[:, None, None]
                    continue
                if group.token >= len(self.language.operators):
                    name = names[group.token]
                    value[group.start : group.stop] = self._leaf(
                        values.get(name, name), group, arrays
                    )
                    if group.predicted[0]:
                        tangent[group.start - self.fixed : group.stop - self.fixed] = self._leaf(
                            tangents[name], group, arrays
                        )
                    continue
                primitive = self.language.primitives[group.token]
                for start in range(group.start, group.stop, step):
                    nodes = slice(start, min(start + step, group.stop))
                    inputs = [
                        arrays.gather(value, index[nodes])
                        for index in (first, second)[: primitive.arity]
                    ]
                    if group.narrow:
                        inputs = [array[..., :1] for array in inputs]
                    result = primitive.array(arrays.xp, *inputs)
                    value[nodes] = result
                    if not any(group.predicted):
                        continue
                    slopes = [
                        arrays.gather(tangent, index[nodes]) if predicted else 0.0
                        for index, predicted in zip(
                            (first_tangent, second_tangent), group.predicted
                        )
                    ]
                    if group.narrow:
                        slopes = [
                            slope[..., :1] if predicted else slope
                            for slope, predicted in zip(slopes, group.predicted)
                        ]
                    tangent[nodes.start - self.fixed : nodes.stop - self.fixed] = primitive.tangent(
                        arrays.xp, result, inputs, slopes
                    )
        return value, tangent

    def _leaf(self, given: Any, group: Group, arrays: Arrays) -> Any:
        """What a group of leaves is set to: the same for all nodes, or for each its tree's own."""
        if isinstance(given, str):
            return float(given)
        return (
            given
            if given.ndim == 2
            else arrays.gather(given, arrays.indices(self.owner[group.start : group.stop]))
        )


class _Key:
    """Nodes of one key are a group; keys are in order of evaluation. Bits: predicted, level, token,
    the arguments' flags."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._bits = max(5, len(language.names).bit_length())  # all literals are one token here

    def pack(
        self, shapes: np.ndarray, tokens: np.ndarray, below: np.ndarray, beside: np.ndarray
    ) -> np.ndarray:
        key = (shapes & PREDICTED) << 7 | shapes >> 8 & 0x7F
        if self._language.real_constants:
            tokens = np.minimum(tokens, len(self._language.names)).astype(np.uint32)
        key = key << self._bits | tokens
        key = (
            key << 3
            | (below & PREDICTED)
            | (beside & PREDICTED) << 1
            | ((below | beside) & WIDE) << 1
        )
        return key.astype(np.uint16) if self._bits == 5 else key

    def group(self, key: int, start: int, stop: int) -> Group:
        token = key >> 3 & (1 << self._bits) - 1
        leaf = token >= len(self._language.operators)
        primitive = None if leaf else self._language.primitives[token]
        predicted = (bool(key & 1), bool(key & 2))[: primitive.arity if primitive else 1]
        return Group(
            token,
            start,
            stop,
            predicted,
            primitive is not None and primitive.classwise and not key & 4,
        )


class Arrays:
    """Where a graph is evaluated: NumPy on the CPU, or torch tensors on any device. Keeps its big
    buffers between calls."""

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        self.xp = NUMPY if device is None else TORCH
        self._device, self._dtype = device, dtype
        self._buffers: dict[str, Any] = {}

    def asarray(self, array: np.ndarray) -> Any:
        """The array here, in this place's number type."""
        if self._device is None:
            return np.asarray(array, self._dtype)
        return torch.as_tensor(np.asarray(array, self._dtype), device=self._device)

    def reserve(self, name: str, shape: tuple[int, ...]) -> Any:
        """An array with undefined content; the same memory at each call with this name."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name] = self.asarray(np.empty(count, self._dtype))
        return buffer[:count].reshape(shape)

    def indices(self, index: np.ndarray) -> Any:
        return index if self._device is None else torch.as_tensor(index, device=self._device)

    def gather(self, array: Any, index: Any) -> Any:
        """Rows of an array."""
        return array.take(index, axis=0) if self._device is None else array.index_select(0, index)

    def numpy(self, array: Any) -> np.ndarray:
        return array if self._device is None else array.cpu().numpy()
