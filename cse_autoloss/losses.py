"""An expression as a loss module with MMDetection's call signature.

    loss = build_loss("Neg(Dot(Mul(Y,Add(1,Sin(Z))),Log(Softmax(X))))", "two_stage_cls")
    loss(cls_score, labels, pos_ious, weight=label_weights, avg_factor=512)

Values and gradients are those of the losses released with CSE-Autoloss (ICLR 2021), in their
float32 form; reduction, sample weights and ``avg_factor`` are those of MMDetection 2.x
(``mmdet/models/losses/utils.py``).
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from cse_autoloss import kernels
from cse_autoloss.expression import Expression
from cse_autoloss.kernels import MIN_IOU
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.space import INPUTS, SearchSpace, load_space
from cse_autoloss.standalone import standalone_module
from cse_autoloss.variables import (
    box_loss,
    box_variables,
    loss_scale,
    one_stage_loss,
    one_stage_variables,
    two_stage_loss,
    two_stage_variables,
)

__all__ = ["ExpressionLoss", "build_loss", "standalone_module"]
REDUCTIONS = ("none", "mean", "sum")


def build_loss(
    expression: str | Expression, space: str | SearchSpace, loss_weight: float = 1.0, **options: Any
) -> ExpressionLoss:
    """A loss module for an expression.

    Args:
        expression: its text, or the name of a known loss of the space (``"CSE-Autoloss-A"``).
        space: name or YAML path of the search space that the expression is written in.
        loss_weight: factor of the reduced loss.
        **options:
            ``reduction``: "mean" (the default), "sum" or "none".
            ``stable``: compute log(softmax), log(sigmoid) and log(1 - sigmoid) at once, so that
                confident logits keep a
            gradient; default False, the released numbers.
            ``alpha``, one-stage: weight of a label, 1 - alpha that of a non-label; default 0.25;
            None for no weighting. ``use_sigmoid``, classification: MMDetection's heads read it from
            a config. It must be, and by default is, True in one-stage spaces and False in two-stage
            ones.

    Raises:
        ExpressionError: if the text is neither an expression of the space nor one of its known
            losses.
        SpaceError: if there is no such space.
        TypeError: for an unknown option.
        ValueError: for an option's impossible value.
    """
    space = space if isinstance(space, SearchSpace) else load_space(space)
    if isinstance(expression, str):
        expression = space.expression(expression)
    return _LOSSES[space.inputs](expression, space, loss_weight, **options)


class ExpressionLoss(nn.Module):
    """What the losses of all spaces have in common. Made by :func:`build_loss`.

    Attributes:
        expression, space: the formula and the language that it is written in.
        loss_weight: factor of the reduced loss; may be set at any time.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        needs_ious: whether the value depends on ``pos_ious``.
    """

    #: Variables that ``pos_ious`` decides.
    _quality: frozenset[str] = frozenset()
    _options: dict[str, Any] = {"reduction": "mean", "stable": False}

    # What MMDetection's R-CNN heads ask a classification loss: nothing about this one is special
    # there.
    custom_cls_channels = False
    custom_activation = False
    custom_accuracy = False

    def __init__(
        self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__()
        for name in options:
            if name not in self._options:
                near = difflib.get_close_matches(name, self._options, n=1)
                raise TypeError(
                    f"a loss of space {space.name} has no option {name!r}; "
                    + (
                        f"did you mean {near[0]!r}?"
                        if near
                        else f"its options are {', '.join(self._options)}"
                    )
                )
        for name, value in {**self._options, **options}.items():
            setattr(self, name, value)
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {', '.join(REDUCTIONS)}, found {self.reduction!r}"
            )
        self.expression = expression
        self.space = space
        self.loss_weight = float(loss_weight)
        self.needs_ious = bool(self._quality & expression.variables)
        self._prepare()

    _build_kernel: Any  # a kernel class's ``build``
    _weighted: Any  # from a formula's values to the weighted loss of each element

    def _prepare(self) -> None:
        self._computed = self.expression
        if self.stable:
            from cse_autoloss.stable import stabilized

            self._computed = stabilized(self.expression)
        self._kernel = self._build_kernel(self._computed)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the formula and its options; what is computed from them is
        computed again."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_computed", "_kernel")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        """What stands in the module's printed form."""
        options = "".join(f", {name}={getattr(self, name)!r}" for name in self._options)
        return f"{str(self.expression)!r}, space={self.space.name!r}, loss_weight={self.loss_weight:g}{options}"

    def _by_kernel(self, reduction: str, count: int) -> bool:
        """Whether a kernel computes this call. torch.compile makes better code from the plain
        formula."""
        return (
            self._kernel is not None
            and reduction != "none"
            and count > 0
            and not torch.compiler.is_compiling()
        )

    def _plain(
        self,
        variables: tuple[Tensor, ...],
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        avg_factor: float | Tensor | None,
        reduction: str,
    ) -> Tensor:
        """The reduced loss in torch's own graph; as MMDetection's ``weight_reduce_loss``, but the
        mean of nothing is 0."""
        alpha = getattr(self, "alpha", None)
        loss = self._weighted(self._evaluate(variables, pred), pred, target, alpha, weight)
        if reduction == "none":
            return loss * self.loss_weight
        return loss.sum() * self._scale(loss.numel(), avg_factor, reduction)

    def _evaluate(self, variables: tuple[Tensor, ...], pred: Tensor) -> Tensor:
        named = dict(zip(INPUTS[self.space.inputs], variables))
        values: list[Tensor] = []
        for name, places in self._computed.steps:
            if places:
                values.append(PRIMITIVES[name].torch(*[values[place] for place in places]))
            else:
                values.append(
                    named[name] if name in named else variables[0].new_tensor(float(name))
                )
        value = values[-1]
        if not self.expression.passes_gradient(self.space.predicted):
            value = (
                value + 0 * pred.sum()
            )  # constant for the prediction, yet backward() must find a graph
        return value

    def _scale(
        self, count: int, avg_factor: float | Tensor | None, reduction: str
    ) -> float | Tensor:
        return loss_scale(count, avg_factor, reduction) * self.loss_weight

    def _reduction(self, override: str | None, avg_factor: float | Tensor | None) -> str:
        if override is not None and override not in REDUCTIONS:
            raise ValueError(
                f"reduction_override: expected one of {', '.join(REDUCTIONS)} or None, found {override!r}"
            )
        reduction = override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor cannot be used with reduction="sum"')
        return reduction


def _check_logits(pred: Tensor, target: Tensor) -> None:
    if pred.dim() != 2:
        raise ValueError(f"pred: expected logits of shape (N, classes), found {tuple(pred.shape)}")
    if target.shape != pred.shape[:1]:
        raise ValueError(
            f"target: expected labels of shape ({pred.shape[0]},) beside logits of shape "
            f"{tuple(pred.shape)}, found {tuple(target.shape)}"
        )


def _dtype(pred: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64 predictions."""
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


def _check_ious(pos_ious: Tensor, count: int) -> None:
    if pos_ious.shape != (count,):
        raise ValueError(
            f"pos_ious: expected shape ({count},), an IoU for each positive (a target in 0..C-1) in their order, "
            f"found {tuple(pos_ious.shape)} (sample weights are given as 'weight')"
        )


class TwoStageLoss(ExpressionLoss):
    """Classification in R-CNNs: X logits, Y one-hot label, Z IoU."""

    _quality = frozenset("Z")
    _build_kernel = staticmethod(kernels.TwoStageKernel.build)
    _weighted = staticmethod(two_stage_loss)
    _options = {**ExpressionLoss._options, "use_sigmoid": False}

    def __init__(
        self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if self.use_sigmoid:
            raise ValueError(
                f"use_sigmoid: space {space.name} has softmax logits with a background column; expected False"
            )

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        pos_ious: Tensor | None = None,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, C+1) logits, background last.
            target: (N,) labels in 0..C; 0..C-1 are positives, C is background. (Others are not
                looked for: torch refuses them where it takes the label's column.)
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target,
                in the positives' order. No gradient passes. None counts as IoU 1.
            weight: (N,) sample weights.
            avg_factor: divisor of the sum in place of N; only with reduction "mean".
            reduction_override: replaces the module's reduction.

        Returns:
            A scalar, or (N,) for reduction "none".

        Raises:
            ValueError: for shapes or a reduction that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        _check_logits(pred, target)
        background = pred.shape[1] - 1
        if weight is not None and weight.shape != target.shape:
            raise ValueError(
                f"weight: expected shape {tuple(target.shape)}, found {tuple(weight.shape)}"
            )
        if self._by_kernel(reduction, len(pred)):
            quality = None
            if self.needs_ious:
                quality = torch.ones(len(pred), dtype=_dtype(pred), device=pred.device)
                if pos_ious is not None:
                    positive = target < background
                    _check_ious(pos_ious, positive.count_nonzero().item())
                    quality.masked_scatter_(
                        positive, pos_ious.detach().to(quality.dtype).clamp(min=MIN_IOU)
                    )
            scale = self._scale(len(pred), avg_factor, reduction)
            return kernels.apply(
                pred,
                lambda pred, gradient: self._kernel(pred, gradient, target, quality, weight, scale),
            )
        if (
            pos_ious is not None and not torch.compiler.is_compiling()
        ):  # a look at the data would break the graph
            _check_ious(pos_ious, int(((target >= 0) & (target < background)).sum()))
        return self._plain(
            two_stage_variables(pred, target, pos_ious), pred, target, weight, avg_factor, reduction
        )


class OneStageLoss(ExpressionLoss):
    """Classification in one-stage detectors: X logits, PY binary label, NY = 1 - PY, Q = PY *
    IoU."""

    _quality = frozenset("Q")
    _build_kernel = staticmethod(kernels.OneStageKernel.build)
    _weighted = staticmethod(one_stage_loss)
    _options = {**ExpressionLoss._options, "use_sigmoid": True, "alpha": 0.25}

    def __init__(
        self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if not self.use_sigmoid:
            raise ValueError(
                f"use_sigmoid: space {space.name} has independent sigmoids without background; expected True"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1] or None, found {self.alpha!r}")

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        pos_ious: Tensor | None = None,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, C) logits.
            target: (N,) labels; 0..C-1 are positives, any other label is background.
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target,
                in the positives' order. No gradient passes. None counts as IoU 1.
            weight: (N,) sample weights, or one for each element: (N, C) or (N*C,).
            avg_factor: divisor of the sum in place of N*C; only with reduction "mean".
            reduction_override: replaces the module's reduction.

        Returns:
            A scalar, or (N, C) for reduction "none".

        Raises:
            ValueError: for shapes or a reduction that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        _check_logits(pred, target)
        if weight is not None and weight.shape != target.shape and weight.numel() != pred.numel():
            expected = f"{tuple(target.shape)} or {tuple(pred.shape)}"
            raise ValueError(f"weight: expected shape {expected}, found {tuple(weight.shape)}")
        if self._by_kernel(reduction, pred.numel()):
            rows = ((target >= 0) & (target < pred.shape[1])).nonzero()[:, 0]
            quality = None
            if self.needs_ious:
                quality = torch.ones(len(rows), dtype=_dtype(pred), device=pred.device)
                if pos_ious is not None:
                    _check_ious(pos_ious, len(rows))
                    quality = pos_ious.detach().to(quality.dtype).clamp(min=MIN_IOU)
            if weight is not None:
                weight = (
                    weight[:, None] if weight.shape == target.shape else weight.reshape(pred.shape)
                )
            scale = self._scale(pred.numel(), avg_factor, reduction)
            alphas = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
            return kernels.apply(
                pred,
                lambda pred, gradient: self._kernel(
                    pred, gradient, target, rows, quality, weight, alphas, scale
                ),
            )
        if (
            pos_ious is not None and not torch.compiler.is_compiling()
        ):  # a look at the data would break the graph
            _check_ious(pos_ious, int(((target >= 0) & (target < pred.shape[1])).sum()))
        return self._plain(
            one_stage_variables(pred, target, pos_ious), pred, target, weight, avg_factor, reduction
        )


class BoxLoss(ExpressionLoss):
    """Regression on boxes: U union, I intersection, E smallest enclosing box (areas in squared
    pixels)."""

    _build_kernel = staticmethod(kernels.BoxKernel.build)
    _weighted = staticmethod(box_loss)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (P, 4) boxes x1 y1 x2 y2 in pixels.
            target: (P, 4) boxes.
            weight: (P,), or (P, 4) whose rows count as their mean.
            avg_factor: divisor of the sum in place of P; only with reduction "mean".
            reduction_override: replaces the module's reduction.

        Returns:
            A scalar, or (P,) for reduction "none".

        Raises:
            ValueError: for shapes or a reduction that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        for name, boxes in (("pred", pred), ("target", target)):
            if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != len(pred):
                raise ValueError(
                    f"{name}: expected boxes of shape ({len(pred)}, 4), found {tuple(boxes.shape)}"
                )
        if weight is not None and weight.shape not in (pred.shape, pred.shape[:1]):
            raise ValueError(
                f"weight: expected shape ({len(pred)},) or ({len(pred)}, 4), found {tuple(weight.shape)}"
            )
        if self._by_kernel(reduction, len(pred)):
            if weight is not None and weight.dim() > 1:
                weight = weight.mean(-1)
            scale = self._scale(len(pred), avg_factor, reduction)
            return kernels.apply(
                pred, lambda pred, gradient: self._kernel(pred, gradient, target, weight, scale)
            )
        return self._plain(box_variables(pred, target), pred, target, weight, avg_factor, reduction)


_LOSSES: dict[str, type[ExpressionLoss]] = {
    "two_stage": TwoStageLoss,
    "one_stage": OneStageLoss,
    "boxes": BoxLoss,
}
