"""One name for one loss: the canonical form of an expression.

Sums and products are flattened and sorted, signs gathered, like terms added up, constants folded;
what comes out is an expression of the same space again. It keeps the values (to rounding) wherever
those of the expression are finite. So it leaves alone what only looks equal: ``Div(X,X)`` is 0 at
0, ``Div(1,Neg(X))`` and ``Neg(Div(1,X))`` differ there by the epsilon in ``Div``, and in
classification ``Sub(X,X)`` is a zero for each class, which a constant is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import groupby

import numpy as np

from cse_autoloss.expression import MAX_DEPTH, MAX_SIZE, Expression
from cse_autoloss.literals import is_number, text_of
from cse_autoloss.primitives import NUMPY, Primitive
from cse_autoloss.space import SearchSpace

Program = tuple[str, ...]
#: A factor of a product, in the order that factors are sorted by: (whether it divides, its size,
#: its program).
Factor = tuple[bool, int, Program]
#: A normal form: products, each with its coefficient, added up. ``()`` is the product of nothing:
#: the constant.
Normal = dict[tuple[Factor, ...], "int | Fraction"]

_ARITHMETIC = ("Neg", "Add", "Sub", "Mul", "Div")


def canonical(expression: Expression, space: SearchSpace) -> Expression:
    """The expression that stands for all that differ from it by commutativity, associativity, signs
    and constants.

    ``canonical(canonical(e)) == canonical(e)``. Of a space without the five arithmetic operators or
    the constant 1, and of an expression whose canonical form would be too large or too deep to be
    one, only commuting arguments are sorted.
    """
    if 1 in space.constants and all(name in space.operators for name in _ARITHMETIC):
        result = Expression(_Canonical(space).program(expression))
        if result.size <= MAX_SIZE and result.depth <= MAX_DEPTH:
            return result
    return Expression(expression.fold(lambda name: (name,), _sorted_node))


def same_loss(one: Expression, other: Expression, space: SearchSpace) -> bool:
    """Whether two expressions have one canonical form."""
    return one == other or canonical(one, space) == canonical(other, space)


def known_name(expression: Expression, space: SearchSpace) -> str | None:
    """The name of the known loss of the space that an expression is, or None."""
    return _known(space).get(canonical(expression, space))


def named(losses: Mapping[str, str], spaces: Mapping[str, SearchSpace]) -> str | None:
    """``CSE-Autoloss-A with GIoU`` of losses by branch that are known ones; None where any is not,
    or there is none."""
    names = [known_name(spaces[k].expression(text), spaces[k]) for k, text in losses.items()]
    return " with ".join(filter(None, names)) if names and all(names) else None


@functools.lru_cache(maxsize=64)
def _known(space: SearchSpace) -> dict[Expression, str]:
    return {
        canonical(loss.expression, space): loss.name for loss in reversed(space.losses.values())
    }


def _sorted_node(primitive: Primitive, args: list[Program]) -> Program:
    return sum(
        sorted(args, key=lambda arg: (len(arg), arg)) if primitive.commutative else args,
        (primitive.name,),
    )


def _factor(program: Program, divides: bool = False) -> Factor:
    return divides, len(program), program


class _Canonical:
    """Turns expressions of one space into normal forms and those into programs."""

    def __init__(self, space: SearchSpace) -> None:
        self._constants = space.constants
        self._predicted = space.predicted
        self._literals = space.real_constants
        self._squares = "Square" in space.operators
        self._has_classes = space.branch == "cls"
        self._sums: dict[Program, Normal] = {}  # programs of sums that became factors

    def program(self, expression: Expression) -> Program:
        return self._write(
            expression.fold(
                lambda name: (
                    {(): _whole(Fraction(name))} if is_number(name) else {(_factor((name,)),): 1}
                ),
                self._node,
            )
        )

    def _node(self, primitive: Primitive, args: list[Normal]) -> Normal:
        match primitive.name:
            case "Neg":
                return {product: -coefficient for product, coefficient in args[0].items()}
            case "Add":
                return self._add(args[0], args[1], 1)
            case "Sub":
                return self._add(args[0], args[1], -1)
            case "Mul":
                return self._multiply(*map(self._monomial, args))
            case "Div":
                if args[1].keys() == {()} and args[1][()] != 0:
                    return self._multiply(self._monomial(args[0]), (_divide(1, args[1][()]), ()))
                return self._multiply(
                    self._monomial(args[0]), (1, (_factor(self._write(args[1]), divides=True),))
                )
            case "Square":
                return self._multiply(*2 * (self._monomial(args[0]),))
            case "Pow" if args[1].keys() == {()} and args[1][()] in (1, 2, 3, 4):
                factor = self._monomial(args[0])
                result = args[0]
                for _ in range(args[1][()] - 1):
                    result = self._multiply(self._monomial(result), factor)
                return result
            case "Detach" if not any(self._moves(product) for product in args[0]):
                return args[0]
            case "Dot":
                (a, factors), (b, more) = map(self._monomial, args)
                if not (factors or more):
                    return {(): a * b}
                first, *rest = sorted(factors + more)
                if first[0]:
                    first, rest = _factor(("1",)), [first, *rest]
                return {(_factor(("Dot", *first[-1], *self._product(1, rest))),): a * b}
        if not primitive.classwise and all(arg.keys() == {()} for arg in args):
            with np.errstate(all="ignore"):
                value = float(primitive.array(NUMPY, *(np.float64(float(arg[()])) for arg in args)))
            # Only what a small fraction is exactly can be written down: Log(1) is 0, Sig(0) a half.
            if abs(value) < 1e6 and (simple := Fraction(value).limit_denominator(12)) == value:
                return {(): _divide(simple.numerator, simple.denominator)}
        return {(_factor(_sorted_node(primitive, [self._write(arg) for arg in args])),): 1}

    def _add(self, a: Normal, b: Normal, sign: int) -> Normal:
        total = dict(a)
        for product, coefficient in b.items():
            total[product] = total.get(product, 0) + sign * coefficient
        # In classification, a product that cancels out still gives the sum its class axis.
        kept = {product: c for product, c in total.items() if c or (self._has_classes and product)}
        return kept or {(): 0}

    def _monomial(self, normal: Normal) -> tuple[int | Fraction, tuple[Factor, ...]]:
        """(coefficient, product). A sum is one factor: the one of it and its negative whose first
        coefficient is positive."""
        if len(normal) == 1:
            ((product, coefficient),) = normal.items()
            return coefficient, product
        leading = normal.get((), 0) or next((normal[p] for p in sorted(normal) if normal[p]), 1)
        sign = 1 if leading > 0 else -1
        positive = {product: sign * coefficient for product, coefficient in normal.items()}
        program = self._write(positive)
        self._sums[program] = positive
        return sign, (_factor(program),)

    def _multiply(
        self,
        a: tuple[int | Fraction, tuple[Factor, ...]],
        b: tuple[int | Fraction, tuple[Factor, ...]],
    ) -> Normal:
        coefficient, product = a[0] * b[0], tuple(sorted(a[1] + b[1]))
        if coefficient == 0 and not self._has_classes:
            return {(): 0}
        if (
            len(product) == 1
            and coefficient in (-1, 0, 1)
            and not product[0][0]
            and product[0][-1] in self._sums
        ):
            return {
                p: coefficient * c
                for p, c in self._sums[product[0][-1]].items()
                if coefficient or p
            }
        return {product: _whole(coefficient)}

    def _write(self, normal: Normal) -> Program:
        products = sorted(normal, key=lambda product: (product != (), product))
        positive = [self._product(normal[p], p) for p in products if normal[p] > 0]
        negative = [self._product(-normal[p], p) for p in products if normal[p] < 0]
        nothing = [
            ("Sub", *term, *term)
            for term in (self._product(1, p) for p in products if normal[p] == 0)
        ]
        if positive:
            text, *positive = positive
        elif negative:
            text = ("Neg", *functools.reduce(lambda a, b: ("Add", *a, *b), negative))
            negative = []
        else:
            text, *nothing = nothing
        for term in positive:
            text = ("Add", *text, *term)
        for term in negative:
            text = ("Sub", *text, *term)
        for term in nothing:
            text = ("Add", *text, *term)
        return text

    def _product(
        self, coefficient: int | Fraction, factors: tuple[Factor, ...] | list[Factor]
    ) -> Program:
        parts = [program for divides, _, program in factors if not divides]
        divisors = [program for divides, _, program in factors if divides]
        if self._squares:
            parts = [part for program, same in groupby(parts) for part in _squared(program, same)]
        text: Program = ()
        if self._literals and coefficient != 1 and (literal := _literal(coefficient)):
            text, coefficient = (literal,), 1
        elif coefficient.numerator != 1 or not parts:
            text = self._integer(coefficient.numerator)
        # By turns, so that a high power of a ratio overflows no more than the ratio does.
        ahead = 0
        for part in parts:
            text = ("Mul", *text, *part) if text else part
            ahead += 2 if part[0] == "Square" else 1
            while divisors and ahead > 1:
                text = ("Div", *text, *divisors.pop(0))
                ahead -= 1
        for program in divisors:
            text = ("Div", *text, *program)
        return (
            text
            if coefficient.denominator == 1
            else ("Div", *text, *self._integer(coefficient.denominator))
        )

    def _moves(self, product: tuple[Factor, ...]) -> bool:
        """Whether a product depends on the prediction."""
        return any(name in self._predicted for _, _, program in product for name in program)

    def _integer(self, number: int) -> Program:
        """A natural number, written in the base of the space's largest constant."""
        if number in self._constants:
            return (str(number),)
        base = max(self._constants)
        if base == 1:
            base = 2
            if number == 2:
                return ("Add", "1", "1")
        quotient, rest = divmod(number, base)
        text = (
            self._integer(base)
            if quotient == 1
            else ("Mul", *self._integer(base), *self._integer(quotient))
        )
        return text if rest == 0 else ("Add", *self._integer(rest), *text)


def _squared(program: Program, same: Iterable[Program]) -> list[Program]:
    """A factor that occurs several times, as squares and what is left over."""
    pairs, single = divmod(len(list(same)), 2)
    return [("Square", *program)] * pairs + [program] * single


def _literal(number: int | Fraction) -> str | None:
    """The text of a number that is a literal, to its last digit."""
    text = text_of(Fraction(number))
    return text if text is not None and Fraction(text) == number else None


def _whole(number: int | Fraction) -> int | Fraction:
    return number.numerator if number.denominator == 1 else number


def _divide(a: int, b: int | Fraction) -> int | Fraction:
    return _whole(Fraction(a) / b)
