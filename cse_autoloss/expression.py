"""Expression: an immutable formula, kept as a flat prefix program.

The text form is that of the released losses, ``Neg(Dot(Y,Log(Softmax(X))))``; the program is the
same without its punctuation, ``("Neg", "Dot", "Y", "Log", "Softmax", "X")``. In prefix order every
subtree is a slice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from cse_autoloss.errors import UserError
from cse_autoloss.language import Language
from cse_autoloss.literals import is_number, normal_form, text_of
from cse_autoloss.primitives import PRIMITIVES, Primitive

MAX_SIZE = 512  # nodes
MAX_DEPTH = 64  # edges from the root to the deepest leaf
MAX_TEXT = 20_000  # characters

T = TypeVar("T")
_PRODUCT_OF_NUMBERS = re.compile(r"(?<=\d)\\,(?=\d)")
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+(?:\.[0-9]+)?|\S)")


class ExpressionError(UserError):
    """A text is no expression of the space: what is wrong, at which column, and what would be
    right."""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


@dataclass(frozen=True)
class Expression:
    """A loss formula. Equal programs are equal expressions.

    Attributes:
        program: names of operators, variables and constants in prefix order.
    """

    program: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, language: Language) -> Expression:
        """Read the text form; whitespace between its parts does not count.

        Raises:
            ExpressionError: with the column (from 1) of the first thing that is wrong, and a
                suggestion. Also for more than ``MAX_TEXT`` characters, ``MAX_SIZE`` nodes or a
                depth of more than ``MAX_DEPTH``.
        """
        return cls(tuple(_read(text, language)))

    def __str__(self) -> str:
        return self.fold(str, lambda primitive, args: f"{primitive.name}({','.join(args)})")

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.program)

    @cached_property
    def depth(self) -> int:
        """Edges from the root to the deepest leaf; a single variable has depth 0."""
        return self.fold(lambda name: 0, lambda primitive, args: 1 + max(args))

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that occur."""
        return frozenset(
            name for name in self.program if name not in PRIMITIVES and not is_number(name)
        )

    def passes_gradient(self, variables: Iterable[str]) -> bool:
        """Whether a gradient reaches one of the variables: it occurs outside of what detaches
        it."""
        variables = frozenset(variables)

        def node(primitive: Primitive, args: list[bool]) -> bool:
            lets_through = primitive.adjoint or [True] * primitive.arity
            return any(arg and adjoint is not None for arg, adjoint in zip(args, lets_through))

        return self.fold(variables.__contains__, node)

    @property
    def constants(self) -> tuple[float, ...]:
        """The numbers that occur, in the program's order."""
        return tuple(float(name) for name in self.program if is_number(name))

    def with_constants(self, values: Iterable[float], language: Language) -> Expression:
        """The expression with other numbers, rounded to a literal's four digits.

        Args:
            values: as many as ``constants``, in their order.

        Raises:
            ExpressionError: if the language has no literals, or a number is none.
            ValueError: if there are more or fewer values than numbers.
        """
        values = list(values)
        if len(values) != len(self.constants):
            raise ValueError(f"{len(values)} values for {len(self.constants)} constants")
        if not language.real_constants:
            raise ExpressionError(
                f"space {language.name} has no real constants (real_constants: true)"
            )
        texts = [text_of(value) for value in values]
        if None in texts:
            raise ExpressionError(f"{values[texts.index(None)]:g} is no literal: out of range")
        left = iter(text for text in texts if text is not None)
        return Expression(tuple(next(left) if is_number(n) else n for n in self.program))

    def subtree(self, start: int) -> slice:
        """The slice of the program that is the subtree whose root stands at ``start``."""
        end, open_slots = start, 1
        while open_slots:
            primitive = PRIMITIVES.get(self.program[end])
            open_slots += (primitive.arity if primitive else 0) - 1
            end += 1
        return slice(start, end)

    def fold(self, leaf: Callable[[str], T], node: Callable[[Primitive, list[T]], T]) -> T:
        """Compute bottom-up: ``leaf(name)`` for variables and constants, ``node(primitive, argument
        results)``."""
        stack: list[T] = []
        for name in reversed(self.program):
            primitive = PRIMITIVES.get(name)
            if primitive is None:
                stack.append(leaf(name))
            else:
                stack.append(node(primitive, [stack.pop() for _ in range(primitive.arity)]))
        (result,) = stack
        return result

    @cached_property
    def steps(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The distinct subexpressions in an order of evaluation: (name, places of the arguments
        among the steps)."""
        places: dict[tuple[str, tuple[int, ...]], int] = {}

        def place(name: str, args: tuple[int, ...]) -> int:
            return places.setdefault((name, args), len(places))

        self.fold(
            lambda name: place(name, ()), lambda primitive, args: place(primitive.name, tuple(args))
        )
        return tuple(places)

    def to_sympy(self, simplify: bool = True) -> Any:
        """The formula in sympy, simplified unless told otherwise (which can take seconds), without
        the epsilons that only guard floating point.

        The S-curves keep their names (``sigma``, ``serf``, ...); ``doit()`` puts their definitions
        in.
        """
        import sympy

        def leaf(name: str) -> Any:
            return sympy.Rational(name) if is_number(name) else sympy.Symbol(name, real=True)

        formula = self.fold(leaf, lambda primitive, args: primitive.sympy(sympy, *args))
        return sympy.simplify(formula, doit=False) if simplify else formula

    def to_latex(self) -> str:
        """The formula in LaTeX, as it stands (not simplified)."""

        def leaf(name: str) -> tuple[str, int]:
            return name if len(name) == 1 or is_number(name) else rf"\mathit{{{name}}}", 2

        def node(primitive: Primitive, args: list[tuple[str, int]]) -> tuple[str, int]:
            binding, *needs = primitive.binds
            text = primitive.latex
            for position, ((argument, tightness), need) in enumerate(zip(args, needs), 1):
                text = text.replace(
                    f"#{position}", argument if tightness >= need else rf"\left({argument}\right)"
                )
            return _PRODUCT_OF_NUMBERS.sub(r"\\cdot ", text.replace("+-", "-")), binding

        return self.fold(leaf, node)[0]


def _read(text: str, language: Language) -> Iterable[str]:
    if len(text) > MAX_TEXT:
        raise ExpressionError(
            f"{len(text)} characters are too many: an expression has at most {MAX_TEXT}"
        )
    waiting: list[list[Any]] = []  # open operators: [name, arguments still to come, column]
    size, complete, position = 0, False, 0
    leaves = [*language.variables, *map(str, language.constants)]

    def fail(column: int, message: str) -> ExpressionError:
        return ExpressionError(f"column {column}: {message}")

    while match := _TOKEN.match(text, position):
        token, column, position = match[1], match.start(1) + 1, match.end()
        if complete and not waiting:
            raise fail(column, f"{_quoted(token)} after the expression has ended")
        if complete:  # one argument is finished: a comma or a bracket follows
            name, missing, opened = waiting[-1]
            if token == "," and missing:
                complete = False
            elif token == ")" and not missing:
                waiting.pop()
            elif missing:
                raise fail(
                    column,
                    f"expected ',' (and {missing} more for {name}, opened at column {opened}), "
                    f"found {_quoted(token)}",
                )
            else:
                raise fail(
                    column,
                    f"expected ')' to close {name} of column {opened}, found {_quoted(token)}",
                )
            continue
        size += 1
        if size > MAX_SIZE:
            raise fail(column, f"the expression is too large: at most {MAX_SIZE} nodes")
        if len(waiting) > MAX_DEPTH:
            raise fail(column, f"the expression is too deep: at most {MAX_DEPTH} levels")
        if waiting:
            waiting[-1][1] -= 1
        if token in language.operators:
            bracket = _TOKEN.match(text, position)
            if not bracket or bracket[1] != "(":
                raise fail(column, f"operator {token} needs its arguments in brackets")
            position = bracket.end()
            waiting.append([token, PRIMITIVES[token].arity, column])
        elif token in leaves:
            complete = True
        elif language.real_constants and is_number(token):
            complete = True
            try:
                token = normal_form(token)
            except ValueError as error:
                raise fail(column, f"{error}") from None
        else:
            raise fail(column, _unknown(token, language, leaves))
        yield token
    if waiting:
        name, missing, column = waiting[-1]
        needed = f"{missing} more argument{'s' * (missing > 1)}" if missing else "')'"
        raise fail(len(text) + 1, f"the text ends, but {name} of column {column} needs {needed}")
    if not complete:
        raise ExpressionError("an empty text is no expression")


def _unknown(token: str, language: Language, leaves: list[str]) -> str:
    if token in PRIMITIVES:
        known = ", ".join(language.operators)
        return f"operator {token} is not in space {language.name} (it has {known})"
    if not token[0].isalnum():
        return f"expected an operator, variable or constant, found {_quoted(token)}"
    if is_number(token):
        known = ", ".join(map(str, language.constants))
        return f"{_quoted(token)} is no constant of space {language.name} (it has {known})"
    near = difflib.get_close_matches(token[:40], [*language.operators, *leaves], n=1, cutoff=0.5)
    kind = "operator" if len(token) > 2 else "name"
    return f"unknown {kind} {_quoted(token)}; " + (
        f"did you mean {near[0]!r}?"
        if near
        else f"variables of space {language.name} are {', '.join(language.variables)}"
    )
