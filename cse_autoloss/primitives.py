"""The operator table: one row a primitive, and in that row everything that the primitive means.

A row says how an operator is computed on arrays (NumPy arrays or torch tensors, with the derivative
beside the value), in a torch graph, how sympy and LaTeX write it. Nothing else in the project knows
an operator's meaning; a new operator is one new row. A plug-in module that a search space names
adds rows with :func:`register`.

Conventions. Arrays hold float32; the last axis is the class axis where there is one, and only
``Softmax`` and ``Dot`` look along it (``Dot`` keeps it, as one column). Values follow the released
losses of CSE-Autoloss (ICLR 2021): ``Log`` and ``Div`` add 1e-20, ``Exp`` stops at 88, and the four
S-curves all have slope 1/4 at 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

EPSILON = 1e-20
EXP_LIMIT = 88.0
FLOAT32_LIMIT = 3e38

Interval = tuple[float, float]
UNBOUNDED: Interval = (-math.inf, math.inf)


def _along_classes(combine: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """Column by column: NumPy's own reductions of a short last axis take ten times as long."""
    return lambda x: functools.reduce(combine, (x[..., column] for column in range(x.shape[-1])))[
        ..., None
    ]


def _of_tensors(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """Two arguments of which one may be a number: torch's own functions want two tensors."""

    def both(a: Any, b: Any) -> torch.Tensor:
        like = a if isinstance(a, torch.Tensor) else b
        return function(*(x if isinstance(x, torch.Tensor) else like.new_tensor(x) for x in (a, b)))

    return both


#: The two array modules that the table's array functions run on: the same names, the same meanings.
NUMPY = SimpleNamespace(
    name="numpy",
    exp=np.exp,
    log=np.log,
    sqrt=np.sqrt,
    abs=np.abs,
    sign=np.sign,
    sin=np.sin,
    cos=np.cos,
    tanh=np.tanh,
    arctan=np.arctan,
    log1p=np.log1p,
    erf=lambda x: torch.erf(torch.as_tensor(x)).numpy(),  # scipy's is slow
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    where=np.where,
    maximum=np.maximum,
    minimum=np.minimum,
    power=np.power,
    relu=lambda x: np.maximum(x, np.float32(0)),
    at_most=lambda x, limit: np.minimum(x, np.float32(limit)),
    positive=lambda x: (x > 0).astype(x.dtype),
    below=lambda x, limit: (x <= limit).astype(x.dtype),
    sum=_along_classes(np.add),
    max=_along_classes(np.maximum),
)
TORCH = SimpleNamespace(
    name="torch",
    exp=torch.exp,
    log=torch.log,
    sqrt=torch.sqrt,
    abs=torch.abs,
    sign=torch.sign,
    sin=torch.sin,
    cos=torch.cos,
    tanh=torch.tanh,
    arctan=torch.atan,
    log1p=torch.log1p,
    erf=torch.erf,
    sigmoid=torch.sigmoid,
    where=torch.where,
    maximum=_of_tensors(torch.maximum),
    minimum=_of_tensors(torch.minimum),
    power=torch.pow,
    relu=torch.relu,
    at_most=lambda x, limit: torch.clamp(x, max=limit),
    positive=lambda x: (x > 0).to(x.dtype),
    below=lambda x, limit: (x <= limit).to(x.dtype),
    sum=lambda x: torch.sum(x, dim=-1, keepdim=True),
    max=lambda x: torch.amax(x, dim=-1, keepdim=True),
)


@dataclass(frozen=True)
class Primitive:
    """One operator.

    Attributes:
        name: as it stands in an expression's text.
        arity: number of arguments.
        array: ``array(xp, *args) -> value``; ``xp`` is :data:`NUMPY` or :data:`TORCH`.
        tangent: ``tangent(xp, value, args, tangents) -> directional derivative``, where
            ``tangents`` are the directional derivatives of ``args``. An argument that does not
            depend on the prediction has the tangent 0 (a number).
        torch: ``torch(*tensors) -> tensor``, differentiable, written with nothing but ``torch`` and
            ``math`` and without names from this module: an exported loss carries its source.
        sympy: ``sympy(sp, *args)`` with ``sp`` the sympy module.
        latex: template with ``#1`` and ``#2`` for the arguments.
        binds: how tightly the LaTeX form binds (0 a sum, 1 a product, 2 an atom), and for each
            argument how tightly it must bind to go without parentheses.
        commutative: whether the two arguments may change places.
        classwise: whether it looks along the class axis.
        monotone: whether its extremes over a box of arguments lie at the box's corners.
        range: ``range(*intervals) -> (lowest, highest)`` where the corners are not the extremes.
        adjoint: for each argument ``adjoint[i](xp, value, args, gradient) -> the argument's
            gradient``; None for an argument that lets none through. A unary elementwise row needs
            none, its tangent is its adjoint. What stops a gradient stops an infinite one, too, as
            in torch. A loss with a row that has no adjoints is differentiated by torch.
    """

    name: str
    arity: int
    array: Callable[..., Any]
    tangent: Callable[..., Any]
    torch: Callable[..., torch.Tensor]
    sympy: Callable[..., Any]
    latex: str
    binds: tuple[int, ...]
    commutative: bool = False
    classwise: bool = False
    monotone: bool = False
    range: Callable[..., Interval] | None = None
    adjoint: tuple[Callable[..., Any] | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.adjoint is None and self.arity == 1 and not self.classwise:
            object.__setattr__(self, "adjoint", (lambda xp, v, a, g: self.tangent(xp, v, a, (g,)),))

    def bounds(self, *intervals: Interval) -> Interval:
        """Between what its values lie when argument i lies in ``intervals[i]``.

        Bounds that are finite promise that value and derivatives are finite, too; ``(-inf, inf)``
        promises nothing.
        """
        if not all(math.isfinite(end) for interval in intervals for end in interval):
            return UNBOUNDED
        if self.range is None and not self.monotone:
            return UNBOUNDED
        ends = [(np.float64(low), np.float64(high)) for low, high in intervals]
        with np.errstate(all="ignore"):  # NumPy's numbers overflow to infinity, Python's raise
            if self.range is not None:
                low, high = map(float, self.range(*ends))
            else:
                corners = [self.array(NUMPY, *corner) for corner in itertools.product(*ends)]
                low, high = float(np.min(corners)), float(np.max(corners))
        # What float32 cannot hold, and nan, is unbounded.
        return (low, high) if abs(low) < FLOAT32_LIMIT and abs(high) < FLOAT32_LIMIT else UNBOUNDED


PRIMITIVES: dict[str, Primitive] = {}


def register(primitive: Primitive) -> Primitive:
    """Add a row to the table, after a trial of all its forms (``operator_check.py``).

    Raises:
        ValueError: if the name is taken by another row or is no identifier, the arity is not 1 or
            2, or the forms do not say the same: one line with the reason.
    """
    from cse_autoloss.operator_check import check_operator

    if not (primitive.name.isidentifier() and primitive.name.isascii()):
        raise ValueError(f"primitive {primitive.name!r}: the name must be an ASCII identifier")
    if primitive.arity not in (1, 2) or len(primitive.binds) != primitive.arity + 1:
        raise ValueError(
            f"primitive {primitive.name!r}: arity must be 1 or 2, and 'binds' one longer than the "
            "arity"
        )
    if PRIMITIVES.get(primitive.name, primitive) is not primitive:
        raise ValueError(f"primitive {primitive.name!r} is registered already")
    check_operator(primitive)
    return PRIMITIVES.setdefault(primitive.name, primitive)


def elementwise(derivative: Callable[..., Any]) -> Callable[..., Any]:
    """The tangent of a unary elementwise function from ``derivative(xp, value, x)``."""

    def tangent(xp: Any, value: Any, args: Any, tangents: Any) -> Any:
        return derivative(xp, value, args[0]) * tangents[0]

    return tangent


# --- S-curves and other functions that need more than a lambda ---


def _softmax(xp: Any, x: Any) -> Any:
    powers = xp.exp(x - xp.max(x))
    return powers / xp.sum(powers)


def _serf(xp: Any, x: Any) -> Any:
    return xp.erf(x * (math.sqrt(math.pi) / 4)) * 0.5 + 0.5


def _serf_slope(xp: Any, value: Any, x: Any) -> Any:
    return xp.exp(x * x * (-math.pi / 16)) * 0.25


def _sgdf_slope(xp: Any, value: Any, x: Any) -> Any:
    # sech(z) = 2 e^-|z| / (1 + e^-2|z|), which cannot overflow
    decay = xp.exp(xp.abs(x) * (-math.pi / 4))
    return decay / (decay * decay + 1) * 0.5


def _larger_slope(xp: Any, a: Any, b: Any, larger: Any, smaller: Any) -> Any:
    """``larger`` where a > b, ``smaller`` where a < b, and where they are equal the mean, as torch
    has it."""
    return xp.where(a > b, larger, xp.where(a < b, smaller, (larger + smaller) * 0.5))


def _power_slope(xp: Any, a: Any, b: Any) -> Any:
    """Derivative of a^b by a: 0 for the exponent 0, also at a = 0."""
    if isinstance(b, float):
        return b * xp.power(a, b - 1) if b else 0.0
    return xp.where(b == 0, 0.0, b * xp.power(a, b - 1))


def _power_range(a: Interval, b: Interval) -> Interval:
    if a[0] <= 0 and not (a[0] == 0 and b[0] >= 1):
        return UNBOUNDED
    corners = [x**y for x in a for y in b]
    return min(corners), max(corners)


# --- torch functions: an exported loss carries these sources, so each stands on torch and math
# alone -------------------


def log(x):
    return torch.log(x + 1e-20)


def div(a, b):
    return a / (b + 1e-20)


def exp(x):
    return torch.exp(torch.clamp(x, max=88.0))


def softmax(x):
    return torch.softmax(x, dim=-1)


def dot(a, b):
    return torch.sum(a * b, dim=-1, keepdim=True)


def sgdf(x):
    return 2.0 * torch.atan(torch.tanh(x * (math.pi / 8))) / math.pi + 0.5


def salf(x):
    half = x / 2
    return (half / torch.sqrt(1 + half * half) + 1) / 2


def serf(x):
    return (torch.erf(x * (math.sqrt(math.pi) / 4)) + 1) / 2


def serfc(x):
    return 1 - (torch.erf(x * (math.sqrt(math.pi) / 4)) + 1) / 2


def power(a, b):
    return torch.pow(a, b.detach())


# --- sympy: the S-curves keep their names, so that formulas stay readable; ``doit()`` puts their
# definitions in ------------


@functools.cache
def _curve(sp: Any, name: str, definition: Callable[[Any, Any], Any], detached: bool) -> Any:
    def fdiff(self: Any, argindex: int = 1) -> Any:
        x = sp.Dummy()
        return definition(sp, x).diff(x).subs(x, self.args[0]) if not detached else sp.Integer(0)

    def doit(self: Any, **hints: Any) -> Any:
        return definition(sp, self.args[0].doit(**hints))

    return type(name, (sp.Function,), {"fdiff": fdiff, "doit": doit})


def _named(
    name: str, definition: Callable[[Any, Any], Any], detached: bool = False
) -> Callable[[Any, Any], Any]:
    return lambda sp, x: _curve(sp, name, definition, detached)(x)


# --- the table ---

_SUM, _PRODUCT, _ATOM = range(3)
_CALL = (_ATOM, _SUM)


def _between(low: float, high: float) -> Callable[..., Interval]:
    return lambda *intervals: (low, high)


for row in (
    Primitive(
        "Neg",
        1,
        lambda xp, x: -x,
        lambda xp, v, a, t: -t[0],
        torch.neg,
        lambda sp, x: -x,
        "-#1",
        (_SUM, _PRODUCT),
        monotone=True,
    ),
    Primitive(
        "Exp",
        1,
        lambda xp, x: xp.exp(xp.at_most(x, EXP_LIMIT)),
        elementwise(lambda xp, v, x: v * xp.below(x, EXP_LIMIT)),
        exp,
        lambda sp, x: sp.exp(x),
        "e^{#1}",
        _CALL,
        monotone=True,
        adjoint=(lambda xp, v, a, g: xp.where(a[0] <= EXP_LIMIT, v * g, 0.0),),
    ),
    Primitive(
        "Log",
        1,
        lambda xp, x: xp.log(x + EPSILON),
        lambda xp, v, a, t: t[0] / (a[0] + EPSILON),
        log,
        lambda sp, x: sp.log(x),
        r"\log\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Abs",
        1,
        lambda xp, x: xp.abs(x),
        elementwise(lambda xp, v, x: xp.sign(x)),
        torch.abs,
        lambda sp, x: sp.Abs(x),
        r"\left|#1\right|",
        _CALL,
        range=lambda x: (0.0, max(abs(x[0]), abs(x[1]))),
    ),
    Primitive(
        "Sqrt",
        1,
        lambda xp, x: xp.sqrt(x),
        lambda xp, v, a, t: t[0] * 0.5 / v,
        torch.sqrt,
        lambda sp, x: sp.sqrt(x),
        r"\sqrt{#1}",
        _CALL,
        range=lambda x: (math.sqrt(x[0]), math.sqrt(x[1])) if x[0] > 0 else UNBOUNDED,
    ),
    Primitive(
        "Softmax",
        1,
        _softmax,
        lambda xp, v, a, t: v * (t[0] - xp.sum(v * t[0])),
        softmax,
        lambda sp, x: sp.Function("softmax")(x),
        r"\operatorname{softmax}\left(#1\right)",
        _CALL,
        classwise=True,
        range=_between(0.0, 1.0),
    ),
    Primitive(
        "Softplus",
        1,
        lambda xp, x: xp.relu(x) + xp.log1p(xp.exp(-xp.abs(x))),
        elementwise(lambda xp, v, x: xp.sigmoid(x)),
        torch.nn.functional.softplus,
        _named("softplus", lambda sp, x: sp.log(1 + sp.exp(x))),
        r"\log\left(1+e^{#1}\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Sig",
        1,
        lambda xp, x: xp.sigmoid(x),
        elementwise(lambda xp, v, x: v * (1 - v)),
        torch.sigmoid,
        _named("sigma", lambda sp, x: 1 / (1 + sp.exp(-x))),
        r"\sigma\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Sgdf",
        1,
        lambda xp, x: xp.arctan(xp.tanh(x * (math.pi / 8))) * (2 / math.pi) + 0.5,
        elementwise(_sgdf_slope),
        sgdf,
        _named(
            "sgdf", lambda sp, x: 2 * sp.atan(sp.tanh(sp.pi * x / 8)) / sp.pi + sp.Rational(1, 2)
        ),
        r"\operatorname{sgdf}\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Salf",
        1,
        lambda xp, x: x / xp.sqrt(x * x + 4) * 0.5 + 0.5,
        elementwise(lambda xp, v, x: 0.25 / (x * x * 0.25 + 1) ** 1.5),
        salf,
        _named("salf", lambda sp, x: (x / 2 / sp.sqrt(1 + x**2 / 4) + 1) / 2),
        r"\operatorname{salf}\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Serf",
        1,
        _serf,
        elementwise(_serf_slope),
        serf,
        _named("serf", lambda sp, x: (sp.erf(sp.sqrt(sp.pi) * x / 4) + 1) / 2),
        r"\operatorname{serf}\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Serfc",
        1,
        lambda xp, x: 1 - _serf(xp, x),
        elementwise(lambda xp, v, x: -_serf_slope(xp, v, x)),
        serfc,
        _named("serfc", lambda sp, x: 1 - (sp.erf(sp.sqrt(sp.pi) * x / 4) + 1) / 2),
        r"\operatorname{serfc}\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Tanh",
        1,
        lambda xp, x: xp.tanh(x),
        elementwise(lambda xp, v, x: 1 - v * v),
        torch.tanh,
        lambda sp, x: sp.tanh(x),
        r"\tanh\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Relu",
        1,
        lambda xp, x: xp.relu(x),
        elementwise(lambda xp, v, x: xp.positive(x)),
        torch.relu,
        lambda sp, x: sp.Max(0, x),
        r"\max\left(0,#1\right)",
        _CALL,
        monotone=True,
        adjoint=(lambda xp, v, a, g: xp.where(v > 0, g, 0.0),),
    ),
    Primitive(
        "Sin",
        1,
        lambda xp, x: xp.sin(x),
        elementwise(lambda xp, v, x: xp.cos(x)),
        torch.sin,
        lambda sp, x: sp.sin(x),
        r"\sin\left(#1\right)",
        _CALL,
        range=_between(-1.0, 1.0),
    ),
    Primitive(
        "Cos",
        1,
        lambda xp, x: xp.cos(x),
        elementwise(lambda xp, v, x: -xp.sin(x)),
        torch.cos,
        lambda sp, x: sp.cos(x),
        r"\cos\left(#1\right)",
        _CALL,
        range=_between(-1.0, 1.0),
    ),
    Primitive(
        "Add",
        2,
        lambda xp, a, b: a + b,
        lambda xp, v, a, t: t[0] + t[1],
        torch.add,
        lambda sp, a, b: a + b,
        "#1+#2",
        (_SUM, _SUM, _SUM),
        commutative=True,
        monotone=True,
        adjoint=(lambda xp, v, a, g: g, lambda xp, v, a, g: g),
    ),
    Primitive(
        "Sub",
        2,
        lambda xp, a, b: a - b,
        lambda xp, v, a, t: t[0] - t[1],
        torch.sub,
        lambda sp, a, b: a - b,
        "#1-#2",
        (_SUM, _SUM, _PRODUCT),
        monotone=True,
        adjoint=(lambda xp, v, a, g: g, lambda xp, v, a, g: -g),
    ),
    Primitive(
        "Mul",
        2,
        lambda xp, a, b: a * b,
        lambda xp, v, a, t: t[0] * a[1] + a[0] * t[1],
        torch.mul,
        lambda sp, a, b: a * b,
        r"#1\,#2",
        (_PRODUCT, _PRODUCT, _PRODUCT),
        commutative=True,
        monotone=True,
        adjoint=(lambda xp, v, a, g: g * a[1], lambda xp, v, a, g: a[0] * g),
    ),
    Primitive(
        "Div",
        2,
        lambda xp, a, b: a / (b + EPSILON),
        lambda xp, v, a, t: (t[0] - v * t[1]) / (a[1] + EPSILON),
        div,
        lambda sp, a, b: a / b,
        r"\frac{#1}{#2}",
        (_ATOM, _SUM, _SUM),
        range=lambda a, b: (
            (min(a[0] / b[0], a[0] / b[1]), max(a[1] / b[0], a[1] / b[1]))
            if b[0] > 0
            else UNBOUNDED
        ),
        adjoint=(
            lambda xp, v, a, g: g / (a[1] + EPSILON),
            lambda xp, v, a, g: -v * g / (a[1] + EPSILON),
        ),
    ),
    Primitive(
        "Dot",
        2,
        lambda xp, a, b: xp.sum(a * b),
        lambda xp, v, a, t: xp.sum(t[0] * a[1] + a[0] * t[1]),
        dot,
        lambda sp, a, b: sp.Function("dot", commutative=True)(a, b),
        r"\operatorname{dot}\left(#1,\,#2\right)",
        (_ATOM, _SUM, _SUM),
        commutative=True,
        classwise=True,
    ),
    # What the released search did not have.
    Primitive(
        "Detach",
        1,
        lambda xp, x: x,
        lambda xp, v, a, t: 0.0,
        torch.detach,
        _named("detach", lambda sp, x: x, detached=True),
        r"\operatorname{sg}\left(#1\right)",
        _CALL,
        monotone=True,
        adjoint=(None,),
    ),
    Primitive(
        "Square",
        1,
        lambda xp, x: x * x,
        elementwise(lambda xp, v, x: 2 * x),
        torch.square,
        lambda sp, x: x**2,
        r"\left(#1\right)^{2}",
        _CALL,
        range=lambda x: (
            0.0 if x[0] <= 0 <= x[1] else min(x[0] * x[0], x[1] * x[1]),
            max(x[0] * x[0], x[1] * x[1]),
        ),
    ),
    Primitive(
        "Atan",
        1,
        lambda xp, x: xp.arctan(x),
        elementwise(lambda xp, v, x: 1 / (x * x + 1)),
        torch.atan,
        lambda sp, x: sp.atan(x),
        r"\arctan\left(#1\right)",
        _CALL,
        monotone=True,
    ),
    Primitive(
        "Max",
        2,
        lambda xp, a, b: xp.maximum(a, b),
        lambda xp, v, a, t: _larger_slope(xp, *a, *t),
        torch.maximum,
        lambda sp, a, b: sp.Max(a, b),
        r"\max\left(#1,\,#2\right)",
        (_ATOM, _SUM, _SUM),
        commutative=True,
        monotone=True,
        adjoint=(
            lambda xp, v, a, g: _larger_slope(xp, *a, g, 0.0),
            lambda xp, v, a, g: _larger_slope(xp, *a, 0.0, g),
        ),
    ),
    Primitive(
        "Min",
        2,
        lambda xp, a, b: xp.minimum(a, b),
        lambda xp, v, a, t: _larger_slope(xp, *a, *reversed(t)),
        torch.minimum,
        lambda sp, a, b: sp.Min(a, b),
        r"\min\left(#1,\,#2\right)",
        (_ATOM, _SUM, _SUM),
        commutative=True,
        monotone=True,
        adjoint=(
            lambda xp, v, a, g: _larger_slope(xp, *a, 0.0, g),
            lambda xp, v, a, g: _larger_slope(xp, *a, g, 0.0),
        ),
    ),
    Primitive(  # the exponent counts as a constant: no gradient passes through it
        "Pow",
        2,
        lambda xp, a, b: xp.power(a, b),
        lambda xp, v, a, t: _power_slope(xp, *a) * t[0],
        power,
        lambda sp, a, b: a**b,
        r"\left(#1\right)^{#2}",
        (_ATOM, _SUM, _SUM),
        range=_power_range,
        adjoint=(lambda xp, v, a, g: _power_slope(xp, *a) * g, None),
    ),
):
    PRIMITIVES[row.name] = row
