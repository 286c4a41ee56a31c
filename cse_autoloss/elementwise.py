"""A formula without class-axis operators, made ready to be evaluated with its gradient in one go.

Repeated subexpressions are shared, constants folded, signs moved outwards; what is left is computed
in the order that the expression has, so float32 rounds as it does in the expression itself. The
gradient is reverse-mode differentiation by the operator table's derivatives, without torch's graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cse_autoloss.primitives import NUMPY, PRIMITIVES, TORCH, UNBOUNDED, Interval, Primitive

_NEG, _ADD, _SUB, _MUL, _DIV = (PRIMITIVES[name] for name in ("Neg", "Add", "Sub", "Mul", "Div"))


@dataclass(frozen=True)
class Term:
    """A node of a :class:`Formula`, with its sign."""

    node: int
    negative: bool = False

    def __neg__(self) -> Term:
        return Term(self.node, not self.negative)


@dataclass(frozen=True)
class _Node:
    """A leaf (``primitive`` is None: a variable's name or a constant) or an operator on earlier
    nodes."""

    primitive: Primitive | None
    args: tuple[Any, ...]


class Formula:
    """Nodes in an order of evaluation, each there once. Built by :meth:`leaf`, :meth:`constant` and
    :meth:`apply`."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._bounds: list[Interval] = []
        self._places: dict[_Node, int] = {}

    @property
    def nodes(self) -> list[_Node]:
        """All nodes, each after its arguments."""
        return self._nodes

    def leaf(self, name: str, low: float, high: float) -> Term:
        """A variable whose values are finite and lie in [low, high]."""
        return self._place(_Node(None, (name,)), (low, high))

    def constant(self, value: float) -> Term:
        """A number."""
        return self._place(
            _Node(None, (value,)), (value, value) if math.isfinite(value) else UNBOUNDED
        )

    def apply(self, primitive: Primitive, *args: Term) -> Term:
        """An elementwise operator, one that has an adjoint, on terms.

        What it simplifies to has the same value, to the last bit of float32.
        """
        if primitive is _NEG:
            return -args[0]
        if all(self.number(arg) is not None for arg in args):
            with np.errstate(all="ignore"):
                return self.constant(
                    float(primitive.array(NUMPY, *(np.float64(self.number(arg)) for arg in args)))
                )
        if primitive is _SUB:
            return self._sum(args[0], -args[1])
        if primitive is _ADD:
            return self._sum(*args)
        if primitive is _MUL or primitive is _DIV:
            return self._product(primitive, *args)
        return self._operator(primitive, *(self._unsigned(arg) for arg in args))

    def number(self, term: Term) -> float | None:
        """The value of a term that is a constant, else None."""
        node = self._nodes[term.node]
        if node.primitive is None and isinstance(node.args[0], float):
            return -node.args[0] if term.negative else node.args[0]
        return None

    def is_leaf(self, term: Term) -> bool:
        """Whether the term is a variable or a constant."""
        return self._nodes[term.node].primitive is None

    def _sum(self, a: Term, b: Term) -> Term:
        for one, other in ((a, b), (b, a)):
            if self.number(one) == 0:
                return other
        if a == -b and self._bounds[a.node] != UNBOUNDED:
            return self.constant(0.0)
        if a.negative and b.negative:
            return -self._operator(_ADD, Term(a.node), Term(b.node))
        if a.negative:
            return self._operator(_SUB, b, Term(a.node))
        return self._operator(_SUB if b.negative else _ADD, a, Term(b.node))

    def _product(self, primitive: Primitive, a: Term, b: Term) -> Term:
        for one, other in ((a, b), (b, a)) if primitive is _MUL else ((b, a),):
            if abs(number := self.number(one) or 0.0) == 1:
                return other if number > 0 else -other
        bounds = primitive.bounds(self._range(a), self._range(b))
        if bounds == (0, 0):  # a factor is 0 and the other one is finite
            return self.constant(0.0)
        if primitive is _DIV:  # the epsilon of the denominator does not change its sign with it
            b = self._unsigned(b)
        value = self._operator(primitive, Term(a.node), Term(b.node))
        return -value if a.negative != b.negative else value

    def _unsigned(self, term: Term) -> Term:
        if not term.negative:
            return term
        if (number := self.number(term)) is not None:
            return self.constant(number)
        node = self._nodes[term.node]
        if node.primitive is _SUB:
            return self._operator(_SUB, *map(Term, reversed(node.args)))
        return self._operator(_NEG, Term(term.node))

    def _operator(self, primitive: Primitive, *args: Term) -> Term:
        """An operator on terms without a sign; constants among them have their own."""
        places = tuple(arg.node for arg in args)
        if primitive.commutative:
            places = tuple(sorted(places))
        return self._place(
            _Node(primitive, places), primitive.bounds(*(self._bounds[place] for place in places))
        )

    def _range(self, term: Term) -> Interval:
        low, high = self._bounds[term.node]
        return (-high, -low) if term.negative else (low, high)

    def _place(self, node: _Node, bounds: Interval) -> Term:
        if node not in self._places:
            self._places[node] = len(self._nodes)
            self._nodes.append(node)
            self._bounds.append(bounds)
        return Term(self._places[node])

    def program(self, root: Term, differentiate: tuple[str, ...]) -> Program:
        """What computes ``root`` and its derivatives by the named leaves."""
        needed = {root.node}
        for place in range(root.node, -1, -1):
            if place in needed and self._nodes[place].primitive is not None:
                needed.update(self._nodes[place].args)
        places = sorted(needed)
        renamed = {old: new for new, old in enumerate(places)}
        return Program(
            [
                _Node(
                    node.primitive,
                    node.args if node.primitive is None else tuple(map(renamed.get, node.args)),
                )
                for node in map(self._nodes.__getitem__, places)
            ],
            differentiate,
            -1.0 if root.negative else 1.0,
        )


class Program:
    """A formula ready to run.

    Attributes:
        leaves: names of the variables that occur.
        differentiated: those of them that :meth:`backward` differentiates by, with their place
            among the nodes.
        sign: what the value and the derivatives have to be multiplied by.
    """

    def __init__(self, nodes: list[_Node], differentiate: tuple[str, ...], sign: float) -> None:
        self.sign = sign
        self.leaves = frozenset(
            node.args[0]
            for node in nodes
            if node.primitive is None and isinstance(node.args[0], str)
        )
        varying: set[int] = set()
        for place, node in enumerate(nodes):
            if node.primitive is None and node.args[0] in differentiate:
                varying.add(place)
            elif node.primitive is not None and any(
                arg in varying and adjoint
                for arg, adjoint in zip(node.args, node.primitive.adjoint)
            ):
                varying.add(place)
        reached = {len(nodes) - 1}  # from the value, by ways that let a gradient through
        for place in reversed(range(len(nodes))):
            if place in reached and nodes[place].primitive is not None:
                ways = zip(nodes[place].args, nodes[place].primitive.adjoint)
                reached.update(arg for arg, adjoint in ways if adjoint)
        varying &= reached
        self._steps = [(node.primitive and node.primitive.array, node.args) for node in nodes]
        moving = [(place, node) for place, node in enumerate(nodes) if place in varying]
        self._backward = [
            (
                place,
                [
                    (arg, node.primitive.adjoint[i])
                    for i, arg in enumerate(node.args)
                    if arg in varying and node.primitive.adjoint[i]
                ],
                node.args,
            )
            for place, node in reversed(moving)
            if node.primitive
        ]
        self.differentiated = {node.args[0]: place for place, node in moving if not node.primitive}

    def forward(self, leaves: Mapping[str, Any], xp: Any = TORCH) -> list[Any]:
        """The values of all nodes; the last one is the formula's, but for ``sign``. ``xp``: the
        array module that the leaves belong to."""
        values: list[Any] = []
        for array, args in self._steps:
            if array is not None:
                values.append(array(xp, *[values[arg] for arg in args]))
            else:
                values.append(args[0] if isinstance(args[0], float) else leaves[args[0]])
        return values

    def backward(self, values: list[Any], seed: Any = 1.0, xp: Any = TORCH) -> dict[str, Any]:
        """Derivatives of ``seed`` times the formula, but for ``sign``, by each differentiated leaf
        that it has: tensors, or a number where the derivative is constant.

        Args:
            values: what :meth:`forward` returned.
            seed: a number or a tensor that multiplies the formula.
        """
        adjoints: list[Any] = [None] * len(values)
        adjoints[-1] = seed
        for place, paths, args in self._backward:
            operands = [values[arg] for arg in args]
            for arg, adjoint in paths:
                part = adjoint(xp, values[place], operands, adjoints[place])
                adjoints[arg] = part if adjoints[arg] is None else adjoints[arg] + part
        return {name: adjoints[place] for name, place in self.differentiated.items()}
