"""The losses of CSE-Autoloss written down a second time, straight from the paper's and the released
code's definitions.

Nothing here comes from the operator table: its operators are spelled out below, evaluated by torch
in any precision and differentiated by torch's graph, so that what the engine computes can be held
against it.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

EPSILON = 1e-20
OPERATORS = {
    "Neg": lambda x: -x,
    "Exp": lambda x: torch.exp(torch.clamp(x, max=88.0)),
    "Log": lambda x: torch.log(x + EPSILON),
    "Abs": lambda x: torch.abs(x),
    "Sqrt": lambda x: torch.sqrt(x),
    "Softmax": lambda x: torch.softmax(x, dim=1),
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Sig": lambda x: torch.sigmoid(x),
    "Sgdf": lambda x: (2 * torch.atan(torch.tanh(math.pi * x / 8)) * 2 / math.pi + 1) / 2,
    "Salf": lambda x: (x / 2 / torch.sqrt(1 + (x / 2) ** 2) + 1) / 2,
    "Serf": lambda x: (torch.erf(math.sqrt(math.pi) / 2 * x / 2) + 1) / 2,
    "Serfc": lambda x: 1 - (torch.erf(math.sqrt(math.pi) / 2 * x / 2) + 1) / 2,
    "Tanh": lambda x: torch.tanh(x),
    "Relu": lambda x: torch.relu(x),
    "Sin": lambda x: torch.sin(x),
    "Cos": lambda x: torch.cos(x),
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / (b + EPSILON),
    "Dot": lambda a, b: (a * b).sum(dim=1, keepdim=True),
    "Detach": lambda x: x.detach(),
    "Square": lambda x: x**2,
    "Atan": lambda x: torch.atan(x),
    "Max": lambda a, b: torch.max(a, b),
    "Min": lambda a, b: torch.min(a, b),
    "Pow": lambda a, b: a ** b.detach(),
}


def evaluate(text: str, variables: dict[str, Tensor]) -> Tensor:
    """The value of an expression's text, read by a recursive descent of its own."""
    tokens = re.findall(r"[\w.]+|[(),]", text)
    like = next(iter(variables.values()))

    def term() -> Tensor:
        name = tokens.pop(0)
        if name in variables:
            return variables[name]
        if name[0].isdigit():
            return like.new_full((1,) * like.dim(), float(name))
        tokens.pop(0)
        args = [term()]
        while tokens.pop(0) == ",":
            args.append(term())
        return OPERATORS[name](*args)

    return term()


def two_stage(text: str, pred: Tensor, target: Tensor, ious: Tensor) -> Tensor:
    """(N,) the loss of each sample."""
    label = torch.nn.functional.one_hot(target, pred.shape[1]).to(pred.dtype)
    quality = torch.ones_like(pred)
    quality[target < pred.shape[1] - 1] = ious.clamp(min=1e-7).to(pred.dtype)[:, None]
    return evaluate(text, {"X": pred, "Y": label, "Z": quality}).sum(1).expand(len(pred))


def one_stage(text: str, pred: Tensor, target: Tensor, ious: Tensor, alpha: float = 0.25) -> Tensor:
    """(N, C) the loss of each element."""
    rows = (target < pred.shape[1]).nonzero()[:, 0]
    label, quality = torch.zeros_like(pred), torch.zeros_like(pred)
    label[rows, target[rows]] = 1.0
    quality[rows, target[rows]] = ious.clamp(min=1e-7).to(pred.dtype)
    loss = evaluate(text, {"X": pred, "Q": quality, "PY": label, "NY": 1 - label}).expand_as(pred)
    return loss * (alpha * label + (1 - alpha) * (1 - label))


def boxes(text: str, pred: Tensor, target: Tensor, released: bool = False) -> Tensor:
    """(P,) the loss of each box; a released loss has epsilons where others have bounds."""
    wh = (torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])).clamp(
        min=0
    )
    around = (torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])).clamp(
        min=0
    )
    overlap = wh[:, 0] * wh[:, 1]
    area = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (pred, target)]
    union, enclosing = area[0] + area[1] - overlap, around[:, 0] * around[:, 1]
    if released:
        variables = {"U": union + 1e-7, "I": overlap, "E": enclosing + 1e-7}
    else:
        tiny = torch.full_like(union, 1e-7)
        union, enclosing = torch.max(union, tiny), torch.max(enclosing, tiny)
        variables = {"U": union, "I": torch.max(overlap, 1e-6 * union), "E": enclosing}
    return evaluate(text, variables).expand(len(pred))
