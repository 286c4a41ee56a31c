"""A population as one shared graph of unique subexpressions, evaluated level by level.

:class:`Forest` gives every subtree of a population a 64-bit hash of its meaning, the arguments of commutative operators in
one order. :class:`Graph` keeps one node for each hash and evaluates the nodes: one array call for all nodes of a level that
share an operator, values and directional derivatives (forward mode) together. Nothing here loops over candidates.

One node costs some tens of nanoseconds, so even a sort of the hashes would be felt: equal hashes are found by letting
them contend for the slots of a table.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cse_autoloss.primitives import NUMPY, PRIMITIVES, TORCH, Primitive
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population, Vocabulary

PREDICTED, WIDE = np.uint8(1), np.uint8(2)  # depends on the prediction; has the class axis (else one column)
CHUNK_BYTES = 1 << 17  # of one operand in one array call: a few of these fit into a core's second-level cache

_MIX = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def scramble(x: np.ndarray) -> np.ndarray:
    """uint64 in place: every bit of the input sways the upper bits of the output (xor-shift and multiply)."""
    x ^= x >> np.uint64(31)
    x *= _MIX
    x ^= x >> np.uint64(29)
    return x


@dataclass(frozen=True)
class Language:
    """What a space's tokens mean for the graph, by code.

    Attributes:
        vocabulary: names and arities.
        primitives: rows of the operator table.
        keys: (256,) hash of each token's name; the same in every process.
        flags: (256,) ``PREDICTED`` and ``WIDE`` of leaves.
        keeps: (256,) mask on the arguments' flags: an operator that sums over the class axis does not keep ``WIDE``.
        commutative: (256,) of operators.
    """

    vocabulary: Vocabulary
    primitives: tuple[Primitive, ...]
    keys: np.ndarray
    flags: np.ndarray
    keeps: np.ndarray
    commutative: np.ndarray

    @classmethod
    def of(cls, space: SearchSpace) -> Language:
        vocabulary = Vocabulary.of(space)
        primitives = tuple(PRIMITIVES[name] for name in space.operators)
        keys, flags = np.zeros(256, np.uint64), np.zeros(256, np.uint8)
        keeps, commutative = np.full(256, 255, np.uint8), np.zeros(256, bool)
        for code, name in enumerate(vocabulary.names):
            keys[code] = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            if name in space.variables:
                flags[code] = WIDE | (PREDICTED if name in space.predicted else np.uint8(0))
        for code, primitive in enumerate(primitives):
            commutative[code] = primitive.commutative
            if primitive.classwise and primitive.array(NUMPY, *[np.ones((1, 2), np.float32)] * primitive.arity).shape[-1] == 1:
                keeps[code] = ~WIDE
        return cls(vocabulary, primitives, keys, flags, keeps, commutative)


@dataclass(frozen=True)
class Forest:
    """All subtrees of a population, as flat arrays over the nodes of its trees ("places").

    Places are ordered by column of the program, then by tree, longest tree first: so a column is a slice, and the work on
    it is a few array calls, last column first.

    Attributes:
        language: of the space.
        order: (n,) the row of the population that the i-th tree here is.
        counts, starts: (L,), (L+1,) places of each column, and the first of them.
        tokens, hashes, levels, flags: (places,) of each subtree; a level is the height, 0 for a leaf.
        first, second: (places,) places of the arguments, where there are any.
    """

    language: Language
    order: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    hashes: np.ndarray
    levels: np.ndarray
    flags: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, population: Population, language: Language) -> Forest:
        longest = int(population.lengths.max(initial=0))
        order = np.argsort((longest - population.lengths).astype(np.uint16), kind="stable")
        counts = len(order) - np.cumsum(np.bincount(population.lengths, minlength=longest + 1))[:longest]  # trees reaching it
        starts = np.concatenate([[0], np.cumsum(counts)])
        tokens = np.empty(starts[-1], np.uint8)
        for column in range(longest):
            tokens[starts[column]:starts[column + 1]] = population.programs[:, column].take(order[:counts[column]])
        arity = language.vocabulary.arity.take(tokens)
        hashes, flags = language.keys.take(tokens), language.flags.take(tokens)
        levels, sizes = np.zeros(len(tokens), np.uint8), np.ones(len(tokens), np.uint16)
        first, second = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
        for column in range(longest - 2, -1, -1):
            # The first argument stands in the next column, the second where the first one ends.
            below = arity[starts[column]:starts[column] + counts[column + 1]]
            rows = np.flatnonzero(below)
            here, left = rows + starts[column], rows + starts[column + 1]
            token, value = tokens.take(here), hashes.take(left)
            height, size, flag = levels.take(left), sizes.take(left), flags.take(left)
            binary = np.flatnonzero(below.take(rows) == 2)
            right = starts.take(column + 1 + size.take(binary)) + rows.take(binary)
            a, b = value.take(binary), hashes.take(right)
            either = language.commutative.take(token.take(binary))
            value[binary] = np.where(either, np.minimum(a, b), a) * _FIRST ^ np.where(either, np.maximum(a, b), b) * _SECOND
            height[binary] = np.maximum(height.take(binary), levels.take(right))
            size[binary] += sizes.take(right)
            flag[binary] |= flags.take(right)
            first[here], second[here.take(binary)] = left, right
            value += hashes.take(here)
            hashes[here] = scramble(value)
            levels[here] = height + np.uint8(1)
            sizes[here] = size + np.uint16(1)
            flags[here] = flag & language.keeps.take(token)
        return cls(language, order, counts, starts, tokens, hashes, levels, flags, first, second)

    @property
    def roots(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes and flags of the whole trees, in the population's order. Shapes (n,)."""
        hashes, flags = np.empty(len(self.order), np.uint64), np.empty(len(self.order), np.uint8)
        hashes[self.order], flags[self.order] = self.hashes[:len(self.order)], self.flags[:len(self.order)]
        return hashes, flags


def representatives(hashes: np.ndarray) -> np.ndarray:
    """For each hash the index of one that is equal to it, the same one for all equals. Shape (n,)."""
    result = np.empty(len(hashes), np.int32)
    bits = max(1, int(len(hashes)).bit_length() + 1)
    owner = np.empty(1 << bits, np.int32)
    waiting = np.arange(len(hashes), dtype=np.int32)
    while len(waiting):  # equals always meet in one slot; who shares it without being equal tries other bits
        mine = hashes.take(waiting)
        slot = (mine >> np.uint64(64 - bits)).view(np.int64)
        owner[slot] = waiting
        winner = owner.take(slot)
        settled = hashes.take(winner) == mine
        result[waiting[settled]] = winner[settled]
        waiting = waiting[~settled]
        if len(waiting):
            hashes = hashes.copy()
            hashes[waiting] = scramble(hashes[waiting] * _FIRST)
    return result


@dataclass(frozen=True)
class Group:
    """Nodes ``start`` to ``stop`` of a graph: one level, one token.

    Attributes:
        token: code.
        predicted: for each argument, whether it depends on the prediction; for a leaf, whether it does itself.
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

    Nodes that do not depend on the prediction come first, then the others; each part goes up level by level.

    Attributes:
        language: of the space.
        groups: the nodes in order of evaluation.
        first, second: (nodes,) the arguments' nodes.
        fixed: number of nodes that do not depend on the prediction.
        roots: (trees,) node of each tree, in the order of ``rows``.
        wide: (trees,) whether a tree's value has the class axis.
        owner: (nodes,) tree that a node belongs to, where trees do not share; else None.
    """

    language: Language
    groups: tuple[Group, ...]
    first: np.ndarray
    second: np.ndarray
    fixed: int
    roots: np.ndarray
    wide: np.ndarray
    owner: np.ndarray | None = None

    @classmethod
    def of(cls, forest: Forest, rows: np.ndarray, shared: bool = True) -> Graph:
        """The graph of the population's trees ``rows`` (a mask over the population).

        Args:
            shared: whether trees share nodes that depend on the prediction; not where each has a prediction of its own.
        """
        chosen = rows[forest.order]
        places = np.flatnonzero(np.concatenate([chosen[:count] for count in forest.counts]) if len(forest.counts) else chosen)
        hashes = forest.hashes.take(places)
        trees = None
        if not shared:
            trees = (places - forest.starts.take(np.searchsorted(forest.starts, places, "right") - 1)).astype(np.uint64)
            apart = (forest.flags.take(places) & PREDICTED).astype(np.uint64)
            hashes = scramble(hashes + apart * (trees + np.uint64(1)) * _SECOND)
        equal = representatives(hashes)
        unique = np.flatnonzero(equal == np.arange(len(equal), dtype=np.int32))
        place = places.take(unique)
        token, level, flag = forest.tokens.take(place), forest.levels.take(place), forest.flags.take(place)
        first, second = forest.first.take(place), forest.second.take(place)
        arity = forest.language.vocabulary.arity.take(token)
        below = np.where(arity > 0, forest.flags.take(first), flag)  # a leaf goes by its own flags
        beside = np.where(arity == 2, forest.flags.take(second), 0)
        key = _Key(forest.language)
        keys = key.pack(flag, level, token, below, beside)
        order = np.argsort(keys, kind="stable")
        keys = keys.take(order)
        node = np.zeros(len(forest.tokens), np.int32)
        node[place.take(order)] = np.arange(len(order), dtype=np.int32)
        node[places] = node.take(places.take(equal))
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.intp)
        groups = tuple(key.group(int(keys[start]), int(start), int(stop)) for start, stop in zip(starts, [*starts[1:], len(keys)]))
        position = np.empty(len(forest.order), np.int64)
        position[forest.order] = np.arange(len(forest.order))
        root = position[rows]
        owner = None
        if not shared:
            rank = np.zeros(len(forest.order), np.int64)
            rank[root] = np.arange(len(root))
            owner = rank.take(trees.take(unique.take(order)).astype(np.int64))
        return cls(forest.language, groups, node.take(first.take(order)), node.take(second.take(order)),
                   int(np.count_nonzero((flag & PREDICTED) == 0)), node.take(root), (forest.flags.take(root) & WIDE) > 0, owner)

    def __len__(self) -> int:
        return len(self.first)

    def evaluate(self, values: Mapping[str, Any], tangents: Mapping[str, Any], arrays: Arrays) -> tuple[Any, Any]:
        """Value and directional derivative of every node at the same points.

        Args:
            values: (points, columns) of each variable; or (trees, points, columns) where trees do not share, and each has
                its own.
            tangents: likewise for the variables that depend on the prediction: derivative along the point's direction.

        Returns:
            (nodes, points, columns) values, with a narrow node's number in every column; and
            (nodes - fixed, points, columns) derivatives of the others. Overwritten by the next call on ``arrays``.
        """
        points, columns = next(iter(tangents.values())).shape[-2:]
        value = arrays.reserve("value", (len(self), points, columns))
        tangent = arrays.reserve("tangent", (len(self) - self.fixed, points, columns))
        first, second = arrays.indices(self.first), arrays.indices(self.second)
        first_tangent, second_tangent = arrays.indices(self.first - self.fixed), arrays.indices(self.second - self.fixed)
        step = max(1, CHUNK_BYTES // (4 * points * columns))
        names = self.language.vocabulary.names
        with np.errstate(all="ignore"):
            for group in self.groups:
                name = names[group.token]
                if group.token >= self.language.vocabulary.operators:
                    value[group.start:group.stop] = self._leaf(values.get(name, name), group, arrays)
                    if group.predicted[0]:
                        tangent[group.start - self.fixed:group.stop - self.fixed] = self._leaf(tangents[name], group, arrays)
                    continue
                primitive = self.language.primitives[group.token]
                for start in range(group.start, group.stop, step):
                    nodes = slice(start, min(start + step, group.stop))
                    inputs = [arrays.gather(value, index[nodes]) for index in (first, second)[:primitive.arity]]
                    if group.narrow:
                        inputs = [array[..., :1] for array in inputs]
                    result = primitive.array(arrays.xp, *inputs)
                    value[nodes] = result
                    if not any(group.predicted):
                        continue
                    slopes = [arrays.gather(tangent, index[nodes]) if predicted else 0.0
                              for index, predicted in zip((first_tangent, second_tangent), group.predicted)]
                    if group.narrow:
                        slopes = [slope[..., :1] if predicted else slope for slope, predicted in zip(slopes, group.predicted)]
                    tangent[nodes.start - self.fixed:nodes.stop - self.fixed] = primitive.tangent(
                        arrays.xp, result, inputs, slopes)
        return value, tangent

    def _leaf(self, given: Any, group: Group, arrays: Arrays) -> Any:
        """What a group of leaves is set to: the same for all nodes, or for each its tree's own."""
        if isinstance(given, str):
            return float(given)
        return given if given.ndim == 2 else arrays.gather(given, arrays.indices(self.owner[group.start:group.stop]))


class _Key:
    """Nodes of one key are a group; keys are in order of evaluation. Bits: predicted, level, token, the arguments' flags."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._bits = max(5, (len(language.vocabulary.names) - 1).bit_length())

    def pack(self, flags: np.ndarray, levels: np.ndarray, tokens: np.ndarray, below: np.ndarray, beside: np.ndarray) -> np.ndarray:
        key = (flags & PREDICTED).astype(np.uint32) << 7 | levels
        key = key << self._bits | tokens
        key = key << 3 | (below & PREDICTED) | (beside & PREDICTED) << 1 | ((below | beside) & WIDE) << 1
        return key.astype(np.uint16) if self._bits == 5 else key  # sorting by 16 bits takes no comparisons

    def group(self, key: int, start: int, stop: int) -> Group:
        token = key >> 3 & (1 << self._bits) - 1
        leaf = token >= self._language.vocabulary.operators
        primitive = None if leaf else self._language.primitives[token]
        predicted = (bool(key & 1), bool(key & 2))[:primitive.arity if primitive else 1]
        return Group(token, start, stop, predicted, primitive is not None and primitive.classwise and not key & 4)


class Arrays:
    """Where a graph is evaluated: NumPy on the CPU, or torch tensors on any device. Keeps its big buffers between calls."""

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
        return index if self._device is None else torch.as_tensor(index, device=self._device, dtype=torch.int64)

    def gather(self, array: Any, index: Any) -> Any:
        """Rows of an array."""
        return array.take(index, axis=0) if self._device is None else array.index_select(0, index)

    def numpy(self, array: Any) -> np.ndarray:
        return array if self._device is None else array.cpu().numpy()
