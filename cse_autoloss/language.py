"""Language: the words that expressions are made of.

A search space is a language with more to it (:class:`cse_autoloss.space.SearchSpace`); whoever reads,
grows or evaluates expressions needs the language alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cse_autoloss.primitives import NUMPY, PRIMITIVES, Primitive

PAD = 255  # fills a row of a population after its program's end

#: What a subexpression is: it depends on the prediction; it has the class axis (else one column).
PREDICTED, WIDE = np.uint32(1), np.uint32(2)
#: Factors of the hashes of an operator's first and second argument.
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, eq=False)
class Language:
    """Operators, variables and constants. A token's code is its place among them, in this order.

    Attributes:
        name: what messages call it.
        operators: names of rows of the operator table.
        variables: name to meaning.
        constants: small positive integers.
        predicted: the variables that carry the prediction's gradient.
    """

    name: str
    operators: tuple[str, ...]
    variables: Mapping[str, str]
    constants: tuple[int, ...]
    predicted: frozenset[str]

    def __post_init__(self) -> None:
        if len(self.names) > PAD:
            raise ValueError(
                f"space {self.name}: {len(self.names)} operators, variables and constants are too "
                f"many: at most {PAD}"
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tokens by code."""
        return (*self.operators, *self.variables, *map(str, self.constants))

    @cached_property
    def codes(self) -> dict[str, int]:
        """Codes by token."""
        return {name: code for code, name in enumerate(self.names)}

    @cached_property
    def primitives(self) -> tuple[Primitive, ...]:
        """Rows of the operator table, by code."""
        return tuple(PRIMITIVES[name] for name in self.operators)

    @cached_property
    def arity(self) -> np.ndarray:
        """(256,) number of arguments by code; 0 for leaves and padding."""
        arity = np.zeros(256, np.uint8)
        arity[: len(self.operators)] = [primitive.arity for primitive in self.primitives]
        return arity

    @cached_property
    def keys(self) -> np.ndarray:
        """(256,) hash of each token's name; the same in every process."""
        keys = np.zeros(256, np.uint64)
        for code, name in enumerate(self.names):
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            keys[code] = int.from_bytes(digest, "little")
        return keys

    @cached_property
    def flags(self) -> np.ndarray:
        """(256,) ``PREDICTED`` and ``WIDE`` of leaves."""
        flags = np.zeros(256, np.uint32)
        for name in self.variables:
            flags[self.codes[name]] = WIDE | (PREDICTED if name in self.predicted else 0)
        return flags

    @cached_property
    def keeps(self) -> np.ndarray:
        """(256,) mask on the arguments' flags: an operator that sums over the class axis does not
        keep ``WIDE``."""
        keeps = np.full(256, 0xFFFFFFFF, np.uint32)
        for code, primitive in enumerate(self.primitives):
            arguments = [np.ones((1, 2), np.float32)] * primitive.arity
            if primitive.classwise and primitive.array(NUMPY, *arguments).shape[-1] == 1:
                keeps[code] ^= WIDE
        return keeps

    @cached_property
    def factors(self) -> np.ndarray:
        """(256,) of the second argument's hash; where it is that of the first, arguments may change
        places."""
        factors = np.full(256, SECOND)
        for code, primitive in enumerate(self.primitives):
            if primitive.commutative:
                factors[code] = FIRST
        return factors
