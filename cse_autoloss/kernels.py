"""Losses with their gradient by hand: what :mod:`cse_autoloss.losses` runs instead of torch's graph
where it can.

Each kernel computes the reduced loss and its gradient by the prediction in one go, on as little as
the formula lets it:

* two-stage: a formula that the one-hot label cuts down to the label's column is computed on that
  column; of the class axis it takes one softmax, which the gradient is made of in place. Of others
  the label's column and the rest are computed apart (``columns``).
* one-stage: the formula is specialised to elements that are nobody's label (PY = 0, Q = 0, NY = 1)
  and runs over all of them block by block, in cache; the few labels are computed apart.
* boxes: overlaps and their gradient are written out.

``build`` returns None for a formula that a kernel does not cover; the module then uses torch's
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cse_autoloss.columns import ColumnsKernel
from cse_autoloss.elementwise import Formula, Program, Term
from cse_autoloss.expression import Expression
from cse_autoloss.inputs import AREA, AREA_EPSILON, IOU_EPSILON, LOGIT, MIN_IOU
from cse_autoloss.primitives import PRIMITIVES, UNBOUNDED, Interval, Primitive

QUALITY = (0.99 * MIN_IOU, 1.0)  # what an IoU lies between, in any precision
BLOCK = 32_768  # elements of a one-stage block: its temporaries stay in a CPU core's cache

#: (prediction, whether the gradient is wanted) -> (scalar loss, gradient or None)
Compute = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


def apply(pred: Tensor, compute: Compute, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss that ``compute`` gives, with its gradient attached if ``pred`` wants one; ``plain``
    is the same loss in torch's graph, which second derivatives are taken from."""
    if pred.requires_grad and torch.is_grad_enabled():
        return _WithGradient.apply(pred, compute, plain)
    with torch.no_grad():
        return compute(pred, False)[0]


class _WithGradient(torch.autograd.Function):
    """The gradient is computed beside the value and handed over, once; a second backward pass
    computes it again."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, compute: Compute, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(pred)
        ctx.compute, ctx.plain = compute, plain
        loss, ctx.gradient = compute(pred, True)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (pred,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            (gradient,) = torch.autograd.grad(ctx.plain(pred), pred, scale, create_graph=True)
            return gradient, None, None
        gradient = ctx.compute(pred, True)[1] if ctx.gradient is None else ctx.gradient
        ctx.gradient = None
        # On a GPU the look at it would cost more than the product
        if scale.device.type != "cpu" or scale.item() != 1:
            gradient = gradient.mul_(scale)
        return gradient.to(pred.dtype), None, None


def _filled(part: Any, like: Tensor) -> Tensor:
    """A derivative as a tensor of its leaf's shape; it is a number where it is constant."""
    if isinstance(part, Tensor) and part.shape == like.shape:
        return part.to(like.dtype)
    return torch.as_tensor(part, dtype=like.dtype, device=like.device).expand_as(like)


# --- two-stage classification ---


@dataclass(frozen=True)
class _AtLabel:
    """A subexpression in a two-stage formula.

    Attributes:
        wide: whether it has the class axis.
        label: its value in the label's column (its value, if it has no class axis), or None if it
            cannot be had there.
        elsewhere: what its values in the other columns lie between.
        logits: whether it is the logits themselves.
    """

    wide: bool
    label: Term | None
    elsewhere: Interval
    logits: bool = False


class TwoStageKernel:
    """Formulas whose sum over the class axis is their value at the label: every other column has
    the factor Y = 0."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._leaves = program.leaves

    @classmethod
    def build(cls, expression: Expression) -> TwoStageKernel | None:
        """The kernel for a two-stage formula, or None."""
        if not expression.variables <= {"X", "Y", "Z"}:
            return None
        formula = Formula()

        def leaf(name: str) -> _AtLabel:
            if name == "X":
                return _AtLabel(
                    True, formula.leaf("X", -LOGIT, LOGIT), (-LOGIT, LOGIT), logits=True
                )
            if name == "Y":
                return _AtLabel(True, formula.constant(1.0), (0.0, 0.0))
            if name == "Z":
                return _AtLabel(True, formula.leaf("Z", *QUALITY), QUALITY)
            return _AtLabel(False, formula.constant(float(name)), (float(name), float(name)))

        def node(primitive: Primitive, args: list[_AtLabel]) -> _AtLabel:
            labels = [arg.label for arg in args]
            if any(label is None for label in labels):
                return _AtLabel(True, None, UNBOUNDED)
            elsewhere = primitive.bounds(*(arg.elsewhere for arg in args))
            if primitive.adjoint is not None:
                return _AtLabel(
                    any(arg.wide for arg in args), formula.apply(primitive, *labels), elsewhere
                )
            if primitive.name in ("Softmax", "LogSoftmax") and args[0].logits:
                bounds = (0.0, 1.0) if primitive.name == "Softmax" else (-3 * LOGIT, 0.0)
                return _AtLabel(True, formula.leaf(primitive.name, *bounds), bounds)
            if primitive.name == "Dot":
                product = node(PRIMITIVES["Mul"], args)
                if not product.wide or product.elsewhere == (0, 0):
                    return _AtLabel(False, product.label, UNBOUNDED)
            return _AtLabel(True, None, UNBOUNDED)

        root = expression.fold(leaf, node)
        if root.label is None or (root.wide and root.elsewhere != (0, 0)):
            return None
        program = formula.program(root.label, ("X", "Softmax", "LogSoftmax"))
        return cls(program) if program.differentiated else None

    def __call__(
        self,
        pred: Tensor,
        gradient: bool,
        target: Tensor,
        quality: Tensor | None,
        weight: Tensor | None,
        scale: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``scale`` times the weighted sum of the loss, and its gradient.

        Args:
            pred: (N, C+1) logits.
            target: (N,) labels in 0..C, or negative for rows that are ignored.
            quality: (N,) the variable Z, or None if the formula does not have it.
            weight: (N,) or None.
        """
        logits = pred if pred.dtype == torch.float64 else pred.float()
        # A row with a negative label is ignored: its weight is 0, its column any.
        ignored = target < 0
        index = target.long().clamp(min=0).unsqueeze(1)
        leaves: dict[str, Tensor] = {}
        dense = None
        if quality is not None:
            leaves["Z"] = quality
        if "X" in self._leaves:
            leaves["X"] = logits.gather(1, index).squeeze(1)
        if "LogSoftmax" in self._leaves:
            dense = torch.log_softmax(logits, -1)
            leaves["LogSoftmax"] = dense.gather(1, index).squeeze(1)
            dense = dense.exp_() if gradient or "Softmax" in self._leaves else dense
        elif "Softmax" in self._leaves:
            dense = torch.softmax(logits, -1)
        if "Softmax" in self._leaves:
            leaves["Softmax"] = dense.gather(1, index).squeeze(1)
        values = self.program.forward(leaves)
        seed = scale * self.program.sign
        seed = (
            torch.ones_like(target, dtype=logits.dtype) * seed
            if weight is None
            else weight.to(logits.dtype) * seed
        )
        seed = seed.masked_fill_(ignored, 0)
        loss = torch.dot(values[-1], seed)
        if not gradient:
            return loss, None
        parts = {
            name: _filled(part, leaves[name])
            for name, part in self.program.backward(values, seed).items()
        }
        rising = parts.get("LogSoftmax")  # the derivative by log softmax(x) at the label, in all
        if "Softmax" in parts:
            rising = (
                parts["Softmax"] * leaves["Softmax"]
                if rising is None
                else rising.addcmul(parts["Softmax"], leaves["Softmax"])
            )
        at_label = (
            rising if "X" not in parts else parts["X"] if rising is None else parts["X"] + rising
        )
        result = torch.zeros_like(logits) if rising is None else dense.mul_(-rising.unsqueeze(1))
        return loss, result.scatter_add_(1, index, at_label.unsqueeze(1))


def two_stage_kernel(expression: Expression) -> TwoStageKernel | ColumnsKernel | None:
    """The quickest kernel for a two-stage formula, or None."""
    return TwoStageKernel.build(expression) or ColumnsKernel.build(expression)


# --- one-stage classification ---


class OneStageKernel:
    """Formulas without class-axis operators."""

    def __init__(self, negatives: Program, positives: Program) -> None:
        self.negatives, self.positives = negatives, positives

    @classmethod
    def build(cls, expression: Expression) -> OneStageKernel | None:
        """The kernel for a one-stage formula, or None."""
        if not expression.variables <= {"X", "Q", "PY", "NY"}:
            return None
        programs = []
        for fixed in ({"Q": 0.0, "PY": 0.0, "NY": 1.0}, {"PY": 1.0, "NY": 0.0}):
            formula, covered = Formula(), True

            def leaf(name: str) -> Term:
                if name == "X":
                    return formula.leaf("X", -LOGIT, LOGIT)
                if name == "Q" and name not in fixed:
                    return formula.leaf("Q", *QUALITY)
                return formula.constant(fixed[name] if name in fixed else float(name))

            def node(primitive: Primitive, args: list[Term]) -> Term:
                nonlocal covered
                covered &= primitive.adjoint is not None
                return formula.apply(primitive, *args) if covered else args[0]

            root = expression.fold(leaf, node)
            if not covered or formula.is_leaf(root) and formula.number(root) is None:
                return None
            programs.append(formula.program(root, ("X",)))
        return cls(*programs) if any(program.differentiated for program in programs) else None

    def __call__(
        self,
        pred: Tensor,
        gradient: bool,
        target: Tensor,
        positive: Tensor,
        quality: Tensor | None,
        weight: Tensor | None,
        alphas: tuple[float, float],
        scale: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``scale`` times the weighted sum of the loss, and its gradient.

        Args:
            pred: (N, C) logits.
            target: (N,) labels.
            positive: (number of positives,) rows whose target is a class, ascending.
            quality: (number of positives,) their IoU, or None if the formula does not have it.
            weight: (N, 1) or (N, C), or None.
            alphas: the weight of an element that is a label, and of one that is not.
        """
        logits = pred if pred.dtype == torch.float64 else pred.float()
        rows, classes = logits.shape
        flat = logits.reshape(-1)
        places = positive * classes + target[positive]
        result = torch.empty_like(flat).view(rows, classes) if gradient else None
        sums = []
        for_label, for_other = alphas[0] * self.positives.sign, alphas[1] * self.negatives.sign
        step = rows if logits.device.type != "cpu" else max(1, BLOCK // classes)
        starts = list(range(0, rows, step))
        cuts = (
            torch.searchsorted(
                places, torch.tensor([*starts, rows], device=places.device) * classes
            ).tolist()
            if len(starts) > 1
            else [0, len(places)]
        )
        for start, first, last in zip(starts, cuts, cuts[1:]):
            block = logits[start : start + step]
            seed = for_other if weight is None else weight[start : start + step] * for_other
            values = self.negatives.forward({"X": block})
            value = _filled(values[-1], block).contiguous()
            if value.data_ptr() == block.data_ptr():  # of a formula that is the logits, detached
                value = value.clone()
            if weight is not None:
                value = value * weight[start : start + step]
            if last > first:
                labels = places[first:last] - start * classes
                value.view(-1).index_fill_(0, labels, 0)
            sums.append(value.sum() * for_other)
            if gradient:
                slope = self.negatives.backward(values).get("X", 0.0)
                torch.mul(_filled(slope, block), seed * scale, out=result[start : start + step])
        if len(places):
            leaves = {"X": flat[places]}
            if quality is not None:
                leaves["Q"] = quality
            seed = (
                for_label
                if weight is None
                else weight.expand_as(logits).reshape(-1)[places] * for_label
            )
            values = self.positives.forward(leaves)
            sums.append((_filled(values[-1], leaves["X"]) * seed).sum())
            if gradient:
                slope = self.positives.backward(values, seed * scale).get("X", 0.0)
                result.view(-1)[places] = _filled(slope, leaves["X"])
        return torch.stack(sums).sum() * scale, result


# --- boxes ---


class BoxKernel:
    """Formulas of the areas of union, intersection and smallest enclosing box."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @classmethod
    def build(cls, expression: Expression) -> BoxKernel | None:
        """The kernel for a formula on boxes, or None."""
        if not expression.variables <= {"U", "I", "E"}:
            return None
        formula, covered = Formula(), True

        def leaf(name: str) -> Term:
            return (
                formula.leaf(name, -AREA, AREA)
                if name in ("U", "I", "E")
                else formula.constant(float(name))
            )

        def node(primitive: Primitive, args: list[Term]) -> Term:
            nonlocal covered
            covered &= primitive.adjoint is not None
            return formula.apply(primitive, *args) if covered else args[0]

        root = expression.fold(leaf, node)
        if not covered or formula.number(root) is not None:
            return None
        program = formula.program(root, ("U", "I", "E"))
        return cls(program) if program.differentiated else None

    def __call__(
        self,
        pred: Tensor,
        gradient: bool,
        target: Tensor,
        weight: Tensor | None,
        scale: Any,
        stable: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``scale`` times the weighted sum of the loss, and its gradient.

        Args:
            pred, target: (P, 4) boxes.
            weight: (P,) or None.
            stable: bound areas and IoU below, instead of adding an epsilon.
        """
        boxes, aims = (b if b.dtype == torch.float64 else b.float() for b in (pred, target))
        # With the far corner's signs turned, "inner" and "outer" are one maximum and one minimum
        # for all four sides, and a box's width and height are minus the sum of its two corners.
        turn = boxes.new_tensor([1, 1, -1, -1])
        boxes, aims = boxes * turn, aims * turn

        def sides(corners: Tensor) -> Tensor:
            return -(corners[:, :2] + corners[:, 2:])

        ours, theirs = sides(boxes), sides(aims)
        inner, outer = sides(torch.maximum(boxes, aims)), sides(torch.minimum(boxes, aims))
        shared, around = inner.clamp(min=0), outer.clamp(min=0)
        overlap = shared[:, 0] * shared[:, 1]
        union = ours[:, 0] * ours[:, 1] + theirs[:, 0] * theirs[:, 1] - overlap
        enclosing = around[:, 0] * around[:, 1]
        if stable:
            bounded = union.clamp(min=AREA_EPSILON)
            least = IOU_EPSILON * bounded
            leaves = {
                "U": bounded,
                "I": torch.maximum(overlap, least),
                "E": enclosing.clamp(min=AREA_EPSILON),
            }
        else:
            leaves = {"U": union + AREA_EPSILON, "I": overlap, "E": enclosing + AREA_EPSILON}
        values = self.program.forward(leaves)
        seed = scale * self.program.sign
        seed = seed if weight is None else weight * seed
        loss = (values[-1] * seed).sum()
        if not gradient:
            return loss, None
        parts = self.program.backward(values, seed)
        by_union, by_overlap, by_enclosing = (
            _filled(parts.get(name, 0.0), overlap) for name in ("U", "I", "E")
        )
        if stable:  # where a bound holds, it has the gradient
            apart = overlap < least
            by_union = torch.where(apart, by_union + IOU_EPSILON * by_overlap, by_union)
            by_union = by_union * (union >= AREA_EPSILON)
            by_overlap = by_overlap.masked_fill(apart, 0)
            by_enclosing = by_enclosing * (enclosing >= AREA_EPSILON)
        by_union, by_overlap, by_enclosing = (
            part[:, None] for part in (by_union, by_overlap, by_enclosing)
        )
        # By the sides of each rectangle: the other side, where clamp lets a gradient through.
        by_ours = by_union * ours.flip(1)
        # (A slope of infinity where nothing is let through is none.)
        by_inner = ((by_overlap - by_union) * shared.flip(1)).masked_fill(inner < 0, 0)
        by_outer = (by_enclosing * around.flip(1)).masked_fill(outer < 0, 0)
        # The corner that maximum takes passes the inner side's gradient, the other one the outer's;
        # a tie halves both.
        common = by_ours + (by_inner + by_outer) / 2
        difference = (by_inner - by_outer) / 2
        larger = torch.sign(boxes - aims).view(-1, 2, 2)
        result = torch.addcmul(common[:, None], difference[:, None], larger).view(-1, 4)
        return loss, result * -turn
