"""Language: the words that expressions are made of.

A search space is a language with more to it (:class:`cse_autoloss.space.SearchSpace`); whoever
reads, grows or evaluates expressions needs the language alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cse_autoloss import literals
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
        constants: positive numbers that trees are grown with.
        predicted: the variables that carry the prediction's gradient.
        real_constants: whether other numbers may stand in an expression, too (``literals.py``).
    """

    name: str
    operators: tuple[str, ...]
    variables: Mapping[str, str]
    constants: tuple[int | float, ...]
    predicted: frozenset[str]
    real_constants: bool

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
        """Codes by token, but for literals."""
        return {name: code for code, name in enumerate(self.names)}

    def code(self, name: str) -> int:
        """The code of a token.

        Raises:
            KeyError: if the language does not have it.
        """
        if name not in self.codes and self.real_constants and literals.is_number(name):
            return int(literals.codes_of(np.array(float(name))))
        return self.codes[name]

    def token(self, code: int) -> str:
        """The token of a code."""
        if code < literals.FIRST_CODE:
            return self.names[code]
        text = literals.text_of(float(literals.values_of(np.array(code))))
        assert text is not None, "codes are made of literals alone"
        return text

    @property
    def code_type(self) -> type[np.unsignedinteger]:
        """What a population's programs are made of."""
        return np.uint16 if self.real_constants else np.uint8

    @property
    def _codes(self) -> int:
        """How many codes the tables below have room for."""
        return literals.CODES if self.real_constants else 256

    @cached_property
    def primitives(self) -> tuple[Primitive, ...]:
        """Rows of the operator table, by code."""
        return tuple(PRIMITIVES[name] for name in self.operators)

    @cached_property
    def detaching(self) -> tuple[str, ...]:
        """Operators with an argument that lets no gradient through."""
        return tuple(row.name for row in self.primitives if None in (row.adjoint or ()))

    @cached_property
    def arity(self) -> np.ndarray:
        """(codes,) number of arguments by code; 0 for leaves and padding."""
        arity = np.zeros(self._codes, np.uint8)
        arity[: len(self.operators)] = [primitive.arity for primitive in self.primitives]
        return arity

    @cached_property
    def keys(self) -> np.ndarray:
        """(codes,) hash of each token's name; the same in every process."""
        keys = np.zeros(self._codes, np.uint64)
        for code, name in enumerate(self.names):
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            keys[code] = int.from_bytes(digest, "little")
        if self.real_constants:
            numbers = np.arange(literals.FIRST_CODE, literals.CODES, dtype=np.uint64)
            keys[literals.FIRST_CODE :] = (numbers * FIRST) ^ (numbers * SECOND >> np.uint64(32))
            for constant in self.constants:  # which can be written as a literal, too
                place = literals.codes_of(np.array(float(constant)))
                keys[place] = keys[self.codes[str(constant)]]
        return keys

    @cached_property
    def numbers(self) -> np.ndarray:
        """(codes,) what constants and literals are worth; NaN for other codes."""
        numbers = np.full(self._codes, np.nan)
        for constant in self.constants:
            numbers[self.codes[str(constant)]] = constant
        if self.real_constants:
            codes = np.arange(literals.FIRST_CODE, literals.CODES)
            numbers[literals.FIRST_CODE :] = literals.values_of(codes)
        return numbers

    @cached_property
    def flags(self) -> np.ndarray:
        """(codes,) ``PREDICTED`` and ``WIDE`` of leaves."""
        flags = np.zeros(self._codes, np.uint32)
        for name in self.variables:
            flags[self.codes[name]] = WIDE | (PREDICTED if name in self.predicted else 0)
        return flags

    @cached_property
    def keeps(self) -> np.ndarray:
        """(codes,) mask on the arguments' flags: an operator that sums over the class axis does not
        keep ``WIDE``."""
        keeps = np.full(self._codes, 0xFFFFFFFF, np.uint32)
        for code, primitive in enumerate(self.primitives):
            arguments = [np.ones((1, 2), np.float32)] * primitive.arity
            if primitive.classwise and primitive.array(NUMPY, *arguments).shape[-1] == 1:
                keeps[code] ^= WIDE
        return keeps

    @cached_property
    def factors(self) -> np.ndarray:
        """(codes,) of the second argument's hash; where it is that of the first, arguments may
        change places."""
        factors = np.full(self._codes, SECOND)
        for code, primitive in enumerate(self.primitives):
            if primitive.commutative:
                factors[code] = FIRST
        return factors
