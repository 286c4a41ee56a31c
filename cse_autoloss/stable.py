"""Logarithms of probabilities that keep a gradient for confident logits, and the losses that go
without.

In float32 the released ``Log(Sub(1,Sig(X)))`` is log(1e-20), flat, from X = 17 on, and
``Log(Softmax(X))`` fades 46 below the largest logit. The two operators here are those logarithms
taken at once. They belong to no search space. Every loss is computed with them but the released
ones, whose numbers are kept. The slope of a root is infinite at 0, which ``Sig(X)`` is from X = -89
down and ``Sub(1,Sig(X))`` from X = 17 on: the gradient would be nan, so that it is a root of 1e-20
there.
"""

from __future__ import annotations

import torch

from cse_autoloss.canonical import same_loss
from cse_autoloss.expression import Expression
from cse_autoloss.primitives import PRIMITIVES, Primitive, elementwise, register
from cse_autoloss.space import SearchSpace

Program = tuple[str, ...]


def log_softmax(x):
    return torch.log_softmax(x, dim=-1)


def log_sigmoid(x):
    return torch.nn.functional.logsigmoid(x)


register(
    Primitive(
        "LogSoftmax",
        1,
        lambda xp, x: x - xp.max(x) - xp.log(xp.sum(xp.exp(x - xp.max(x)))),
        lambda xp, v, a, t: t[0] - xp.sum(xp.exp(v) * t[0]),
        log_softmax,
        lambda sp, x: sp.log(PRIMITIVES["Softmax"].sympy(sp, x)),
        r"\log\operatorname{softmax}\left(#1\right)",
        (2, 0),
        classwise=True,
    )
)
register(
    Primitive(
        "LogSig",
        1,
        lambda xp, x: -xp.relu(-x) - xp.log1p(xp.exp(-xp.abs(x))),
        elementwise(lambda xp, v, x: xp.sigmoid(-x)),
        log_sigmoid,
        lambda sp, x: sp.log(PRIMITIVES["Sig"].sympy(sp, x)),
        r"\log\sigma\left(#1\right)",
        (2, 0),
        monotone=True,
    )
)


def is_released(expression: Expression, space: SearchSpace) -> bool:
    """Whether the expression is, up to its canonical form, a loss whose released numbers count."""
    return any(
        loss.released and same_loss(expression, loss.expression, space)
        for loss in space.losses.values()
    )


def stabilized(expression: Expression) -> Expression:
    """The expression with each log(softmax), log(sigmoid) and log(1 - sigmoid) taken at once, and
    no root of such a probability taken of 0."""
    return Expression(expression.fold(lambda name: (name,), _node))


def _node(primitive: Primitive, args: list[Program]) -> Program:
    logarithm = _logarithm(args[0])
    if primitive.name == "Log" and logarithm:
        return logarithm
    if primitive.name == "Sqrt" and logarithm:
        return "Sqrt", "Add", *args[0], "1e-20"
    return primitive.name, *(name for arg in args for name in arg)


def _logarithm(probability: Program) -> Program | None:
    """That of a softmax, a sigmoid or 1 - sigmoid, at once; None of anything else."""
    if probability[0] == "Softmax":
        return "LogSoftmax", *probability[1:]
    if probability[0] == "Sig":
        return "LogSig", *probability[1:]
    for complement in (("Sub", "1", "Sig"), ("Add", "1", "Neg", "Sig")):
        if probability[: len(complement)] == complement:
            return "LogSig", "Neg", *probability[len(complement) :]
    if probability[:3] == ("Add", "Neg", "Sig"):
        if probability[Expression(probability).subtree(1).stop :] == ("1",):
            return "LogSig", "Neg", *probability[3:-1]
    return None
