"""Two-stage formulas in which every class counts, with their gradient by hand.

Each subexpression is kept twice: in the label's column, where Y is 1, as (N, 1), and in the other
columns, where Y is 0. There it often is the same number in all of them (``Mul(X,Y)`` is 0), and is
kept as (N, 1), too; only what still depends on those columns' logits is computed on (N, C+1), with
anything in the label's column. Softmax and sums over the classes put the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cse_autoloss.elementwise import Formula, Term
from cse_autoloss.expression import Expression
from cse_autoloss.inputs import LOGIT, MIN_IOU
from cse_autoloss.primitives import PRIMITIVES, TORCH, UNBOUNDED, Interval, Primitive

_SOFTMAX: dict[str, Interval] = {"Softmax": (0.0, 1.0), "LogSoftmax": (-3 * LOGIT, 0.0)}


@dataclass(frozen=True)
class _Columns:
    """A subexpression: in the label's column, in the others, and whether it has columns at all."""

    label: Term
    other: Term
    wide: bool
    logits: bool = False


@dataclass(frozen=True)
class _Reduction:
    """What looks along the classes: ``Softmax``, ``LogSoftmax`` or ``Sum`` of a subexpression."""

    kind: str
    source: _Columns


class ColumnsKernel:
    """A two-stage formula whose operators all have adjoints, or are reductions."""

    def __init__(self, formula: Formula, reductions: dict[str, _Reduction], root: Term) -> None:
        self._reductions, self._root = reductions, root
        nodes = formula.nodes
        needed = {root.node}
        for place in range(root.node, -1, -1):
            if place in needed:
                needed.update(self._parents(nodes[place]))
                if str(nodes[place].args[0]).endswith(".other"):
                    needed.add(place - 1)  # a softmax's two parts stand side by side
        self._order = [(place, nodes[place]) for place in sorted(needed)]
        self._dense: set[int] = set()
        varying: set[int] = set()
        for place, node in self._order:
            parents = self._parents(node)
            if node.primitive is not None:
                dense = any(arg in self._dense for arg in parents)
                moves = any(a in varying and d for a, d in zip(node.args, node.primitive.adjoint))
            else:
                reduction = self._reduction(node)
                dense = node.args[0] == "X.other" or (
                    reduction is not None
                    and node.args[0].endswith(".other")
                    and (reduction.source.logits or reduction.source.other.node in self._dense)
                )
                moves = str(node.args[0]).startswith("X.") or any(a in varying for a in parents)
            self._dense.update([place] if dense else [])
            varying.update([place] if moves else [])
        self._backward = [
            (place, node) for place, node in reversed(self._order) if place in varying
        ]
        self._varying = varying

    @classmethod
    def build(cls, expression: Expression) -> ColumnsKernel | None:
        """The kernel for a two-stage formula, or None."""
        if not expression.variables <= {"X", "Y", "Z"}:
            return None
        formula, reductions, covered = Formula(), {}, True
        known: dict[tuple[str, Term, Term], str] = {}

        def leaf(name: str) -> _Columns:
            if name == "X":
                parts = (formula.leaf(f"X.{part}", -LOGIT, LOGIT) for part in ("label", "other"))
                return _Columns(*parts, wide=True, logits=True)
            if name == "Y":
                return _Columns(formula.constant(1.0), formula.constant(0.0), wide=True)
            if name == "Z":
                quality = formula.leaf("Z", 0.99 * MIN_IOU, 1.0)
                return _Columns(quality, quality, wide=True)
            number = formula.constant(float(name))
            return _Columns(number, number, wide=False)

        def reduce(kind: str, source: _Columns) -> str:
            key = (kind, source.label, source.other)
            if key not in known:
                known[key] = f"{kind}{len(known)}"
                reductions[known[key]] = _Reduction(kind, source)
            return known[key]

        def total(source: _Columns) -> Term:
            if formula.number(source.other) == 0:
                return source.label
            return formula.leaf(reduce("Sum", source), *UNBOUNDED)

        def node(primitive: Primitive, args: list[_Columns]) -> _Columns:
            nonlocal covered
            if primitive.adjoint is not None:
                label = formula.apply(primitive, *(arg.label for arg in args))
                other = formula.apply(primitive, *(arg.other for arg in args))
                return _Columns(label, other, any(arg.wide for arg in args))
            if primitive.name in _SOFTMAX:
                if not args[0].wide:  # a single column
                    number = formula.constant(1.0 if primitive.name == "Softmax" else 0.0)
                    return _Columns(number, number, wide=False)
                name, bounds = reduce(primitive.name, args[0]), _SOFTMAX[primitive.name]
                parts = (formula.leaf(f"{name}.{part}", *bounds) for part in ("label", "other"))
                return _Columns(*parts, wide=True)
            covered &= primitive.name == "Dot"
            product = node(PRIMITIVES["Mul"], args)
            one = total(product) if product.wide else product.label
            return _Columns(one, one, wide=False)

        columns = expression.fold(leaf, node)
        if not covered:
            return None
        kernel = cls(formula, reductions, total(columns) if columns.wide else columns.label)
        return kernel if kernel._root.node in kernel._varying else None

    def _reduction(self, node: Any) -> _Reduction | None:
        return self._reductions.get(str(node.args[0]).split(".")[0]) if not node.primitive else None

    def _parents(self, node: Any) -> tuple[int, ...]:
        if node.primitive is not None:
            return node.args
        reduction = self._reduction(node)
        source = reduction and (reduction.source.label, reduction.source.other)
        return tuple(term.node for term in source or ())

    def __call__(
        self,
        pred: Tensor,
        gradient: bool,
        target: Tensor,
        quality: Tensor | None,
        weight: Tensor | None,
        scale: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :class:`cse_autoloss.kernels.TwoStageKernel`'s."""
        logits = pred if pred.dtype == torch.float64 else pred.float()
        index = target.long().clamp(min=0).unsqueeze(1)
        rows = _Rows(self, logits, index, quality)
        rows.forward()
        seed = logits.new_ones(()) if weight is None else weight.to(logits.dtype)[:, None]
        sign = -1.0 if self._root.negative else 1.0
        seed = (seed * (scale * sign)).expand_as(index).masked_fill(target[:, None] < 0, 0)
        loss = (rows.values[self._root.node] * seed).sum()
        return loss, rows.backward(seed) if gradient else None


class _Rows:
    """A kernel on one batch: values of all nodes, and the way back."""

    def __init__(
        self, kernel: ColumnsKernel, logits: Tensor, index: Tensor, quality: Tensor | None
    ) -> None:
        self.kernel, self.logits, self.index = kernel, logits, index
        self.others = logits.shape[1] - 1
        self.values: dict[int, Any] = {}
        self.quality = None if quality is None else quality[:, None]
        self.shares: dict[str, tuple[Any, Any]] = {}  # a softmax, at the label and elsewhere

    def forward(self) -> None:
        for place, node in self.kernel._order:
            if node.primitive is not None:
                operands = [self.values[arg] for arg in node.args]
                self.values[place] = node.primitive.array(TORCH, *operands)
            else:
                self.values[place] = self._leaf(node)

    def _leaf(self, node: Any) -> Any:
        name = node.args[0]
        if isinstance(name, float):
            return name
        if name == "Z":
            return self.quality
        if name == "X.other":
            return self.logits
        if name == "X.label":
            return self.logits.gather(1, self.index)
        reduction = self.kernel._reduction(node)
        label, other = (
            self._signed(term) for term in (reduction.source.label, reduction.source.other)
        )
        if reduction.kind == "Sum":
            total = label + self._over_others(other)
            return self.logits.new_full((1, 1), total) if isinstance(total, float) else total
        base, part = name.split(".")
        if base not in self.shares:
            self.shares[base] = self._softmax(reduction, label, other)
        return self.shares[base][part == "other"]

    def _softmax(self, reduction: _Reduction, label: Any, other: Any) -> tuple[Any, Any]:
        take = torch.softmax if reduction.kind == "Softmax" else torch.log_softmax
        if reduction.source.logits or _is_dense(other):
            full = self.logits if reduction.source.logits else self._put(other, label)
            dense = take(full, 1)
            return dense.gather(1, self.index), dense
        margin = torch.as_tensor(label - other, dtype=self.logits.dtype, device=self.logits.device)
        margin = margin.expand_as(self.index) - math.log(self.others)
        if reduction.kind == "Softmax":
            return margin.sigmoid(), (-margin).sigmoid() / self.others
        log_sigmoid = torch.nn.functional.logsigmoid
        return log_sigmoid(margin), log_sigmoid(-margin) - math.log(self.others)

    def backward(self, seed: Tensor) -> Tensor:
        """The gradient by the logits, ``seed`` (N, 1) times the root's."""
        adjoints: dict[int, Any] = {self.kernel._root.node: seed}
        full = None  # of all columns at once
        halves: dict[str, dict[str, Any]] = {}  # adjoints of a softmax, by part

        def add(place: int, part: Any, dense: bool) -> None:
            if place not in self.kernel._varying:
                return
            if dense and place not in self.kernel._dense:
                part = self._over_others(part)
            adjoints[place] = part if place not in adjoints else adjoints[place] + part

        def add_term(term: Term, part: Any, dense: bool) -> None:
            add(term.node, -part if term.negative else part, dense)

        for place, node in self.kernel._backward:
            reduction = self.kernel._reduction(node)
            if place not in adjoints and (reduction is None or reduction.kind == "Sum"):
                continue
            dense = place in self.kernel._dense
            if node.primitive is not None:
                operands = [self.values[arg] for arg in node.args]
                for i, arg in enumerate(node.args):
                    if arg in self.kernel._varying and node.primitive.adjoint[i]:
                        step = node.primitive.adjoint[i]
                        add(arg, step(TORCH, self.values[place], operands, adjoints[place]), dense)
            elif reduction is not None and reduction.kind == "Sum":
                add_term(reduction.source.label, adjoints[place], False)
                add_term(reduction.source.other, adjoints[place], True)
            elif reduction is not None:
                base, part = node.args[0].split(".")
                mine = halves.setdefault(base, {})
                mine[part] = adjoints.get(place)
                if part == "label":  # made before the other half: both are known by now
                    whole = self._softmax_slope(reduction, base, mine)
                    if whole is None:
                        continue
                    if reduction.source.logits:
                        full = whole if full is None else full.add_(whole)
                    elif whole.shape[1] > 1:
                        add_term(reduction.source.label, whole.gather(1, self.index), False)
                        add_term(reduction.source.other, whole, True)
                    else:
                        add_term(reduction.source.label, whole, False)
                        add_term(reduction.source.other, -whole, False)
        return self._gathered(adjoints, full)

    def _softmax_slope(
        self, reduction: _Reduction, base: str, halves: dict[str, Any]
    ) -> Tensor | None:
        """By all columns of a softmax's argument; by the label's, (N, 1), where the others are one
        number."""
        label, other = halves.get("label"), halves.get("other")
        if label is None and other is None:
            return None
        at_label, elsewhere = self.shares[base]
        plain = reduction.kind == "Softmax"
        if not (reduction.source.logits or _is_dense(elsewhere)):
            label, other = (0.0 if half is None else half for half in (label, other))
            if plain:
                return (label - other / self.others) * at_label * (elsewhere * self.others)
            return -label * torch.expm1(at_label) - other * at_label.exp()
        label = torch.zeros_like(at_label) if label is None else label.expand_as(at_label)
        # The label's share alone: its slope is everywhere a multiple of the softmax
        if other is None:
            rising = label * at_label if plain else label
            shares = elsewhere if plain else elsewhere.exp()
            return (shares * -rising).scatter_add_(1, self.index, rising)
        given = self._put(other.expand_as(elsewhere), label)
        if plain:
            moved = given * elsewhere
            return moved - elsewhere * moved.sum(1, keepdim=True)
        return given - elsewhere.exp() * given.sum(1, keepdim=True)

    def _gathered(self, adjoints: dict[int, Any], full: Tensor | None) -> Tensor:
        parts = {
            node.args[0]: adjoints.get(place)
            for place, node in self.kernel._backward
            if str(node.args[0]).startswith("X.")
        }
        label, other = parts.get("X.label"), parts.get("X.other")
        if other is not None:
            other = self._put(other.expand_as(self.logits), 0.0 if label is None else label)
            return other if full is None else other + full
        result = torch.zeros_like(self.logits) if full is None else full
        if label is not None:
            result.scatter_add_(1, self.index, label.expand_as(self.index))
        return result

    def _signed(self, term: Term) -> Any:
        value = self.values[term.node]
        return -value if term.negative else value

    def _put(self, dense: Tensor, label: Any) -> Tensor:
        """A copy of (N, C+1) numbers with the label's column replaced."""
        if isinstance(label, Tensor):
            return dense.scatter(1, self.index, label.expand_as(self.index))
        return dense.scatter(1, self.index, label)

    def _over_others(self, value: Any) -> Any:
        """The sum over the other columns, (N, 1)."""
        if _is_dense(value):
            return self._put(value, 0.0).sum(1, keepdim=True)
        return value * self.others


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1
