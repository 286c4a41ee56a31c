"""An expression as a loss module with MMDetection's call signature.

    loss = build_loss("Neg(Dot(Mul(Y,Add(1,Sin(Z))),Log(Softmax(X))))", "two_stage_cls")
    loss(cls_score, labels, pos_ious, weight=label_weights, avg_factor=512)

Values and gradients are those of the losses released with CSE-Autoloss (ICLR 2021), in their float32 form; reduction,
sample weights and ``avg_factor`` are those of MMDetection 2.x (``mmdet/models/losses/utils.py``).
"""
from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from cse_autoloss import kernels
from cse_autoloss.expression import Expression
from cse_autoloss.kernels import AREA_EPSILON, MIN_IOU
from cse_autoloss.space import SearchSpace, load_space

REDUCTIONS = ("none", "mean", "sum")


def build_loss(expression: str | Expression, space: str | SearchSpace, loss_weight: float = 1.0,
               **options: Any) -> ExpressionLoss:
    """A loss module for an expression.

    Args:
        expression: its text, or the name of a known loss of the space (``"CSE-Autoloss-A"``).
        space: name or YAML path of the search space that the expression is written in.
        loss_weight: factor of the reduced loss.
        **options: ``reduction`` ("mean", "sum", "none"; default "mean"); for classification ``use_sigmoid`` (MMDetection's
            heads read it from a config; it must be True in one-stage spaces and False in two-stage ones, which is also
            the default); for one-stage classification ``alpha`` (weight of a label, 1 - alpha that of a non-label;
            default 0.25; None for no weighting).

    Raises:
        ExpressionError: if the text is neither an expression of the space nor one of its known losses.
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
    _options: dict[str, Any] = {"reduction": "mean"}

    # What MMDetection's R-CNN heads ask a classification loss: nothing about this one is special there.
    custom_cls_channels = False
    custom_activation = False
    custom_accuracy = False

    def __init__(self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self._options:
                near = difflib.get_close_matches(name, self._options, n=1)
                raise TypeError(f"a loss of space {space.name} has no option {name!r}; " + (
                    f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(self._options)}"))
        for name, value in {**self._options, **options}.items():
            setattr(self, name, value)
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {self.reduction!r}")
        self.expression = expression
        self.space = space
        self.loss_weight = float(loss_weight)
        self.needs_ious = bool(self._quality & expression.variables)
        self._kernel = self._build_kernel(expression)

    _build_kernel: Any  # the kernel class's ``build``

    def extra_repr(self) -> str:
        """What stands in the module's printed form."""
        options = "".join(f", {name}={getattr(self, name)!r}" for name in self._options)
        return f"{str(self.expression)!r}, space={self.space.name!r}, loss_weight={self.loss_weight:g}{options}"

    def _evaluate(self, variables: dict[str, Tensor], pred: Tensor) -> Tensor:
        """The formula in torch's own graph; shape: what broadcasting makes of the variables."""

        def leaf(name: str) -> Tensor:
            return variables[name] if name in variables else pred.new_full((1,) * pred.dim(), float(name))

        value = self.expression.fold(leaf, lambda primitive, args: primitive.torch(*args))
        if not self.expression.variables & self.space.predicted:
            value = value + 0 * pred.sum()  # constant for the prediction, yet backward() must find a graph
        return value

    def _by_hand(self, reduction: str, count: int) -> bool:
        """Whether a kernel computes this call. torch.compile makes better code from the plain formula."""
        return self._kernel is not None and reduction != "none" and count > 0 and not torch.compiler.is_compiling()

    def _scale(self, avg_factor: float | Tensor | None, reduction: str, count: int) -> float | Tensor:
        """What the sum of the weighted loss is multiplied by; ``count`` is the number of its elements."""
        if reduction == "sum":
            return self.loss_weight
        divisor = max(count, 1) if avg_factor is None else avg_factor + torch.finfo(torch.float32).eps
        return self.loss_weight / divisor

    def _reduction(self, override: str | None, avg_factor: float | Tensor | None) -> str:
        if override is not None and override not in REDUCTIONS:
            raise ValueError(f"reduction_override: expected one of {', '.join(REDUCTIONS)} or None, found {override!r}")
        reduction = override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor cannot be used with reduction="sum"')
        return reduction

    def _reduce(self, loss: Tensor, weight: Tensor | None, avg_factor: float | Tensor | None, reduction: str) -> Tensor:
        """MMDetection's ``weight_reduce_loss``, except that the mean of nothing is 0."""
        if weight is not None:
            loss = loss * weight
        if reduction == "none":
            return loss * self.loss_weight
        return loss.sum() * self._scale(avg_factor, reduction, loss.numel())


def _check_logits(pred: Tensor, target: Tensor) -> None:
    if pred.dim() != 2:
        raise ValueError(f"pred: expected logits of shape (N, classes), found {tuple(pred.shape)}")
    if target.shape != pred.shape[:1]:
        raise ValueError(f"target: expected labels of shape ({pred.shape[0]},) beside logits of shape "
                         f"{tuple(pred.shape)}, found {tuple(target.shape)}")


def _dtype(pred: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64 predictions."""
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(_dtype(tensor))


def _all_in(target: Tensor, classes: int) -> bool:
    low, high = target.aminmax()
    return low.item() >= 0 and high.item() < classes


def _checked_ious(pos_ious: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    if pos_ious.dim() != 1:
        raise ValueError(f"pos_ious: expected shape (number of positives,), found {tuple(pos_ious.shape)}")
    if len(pos_ious) != count:
        raise ValueError(f"pos_ious: {len(pos_ious)} IoUs for {count} positives: expected one for each target in 0..C-1, "
                         "in their order (are these the sample weights? those are 'weight')")
    return pos_ious.detach().to(dtype).clamp(min=MIN_IOU)


def _spread(pos_ious: Tensor | None, positive: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) the IoU of each positive in its place, 1 elsewhere."""
    ones = torch.ones(positive.shape, dtype=dtype, device=positive.device)
    if pos_ious is None:
        return ones
    if torch.compiler.is_compiling():  # a count that depends on the data would break the graph
        return ones.masked_scatter(positive, _checked_ious(pos_ious, len(pos_ious), dtype))
    rows = positive.nonzero()[:, 0]
    return ones.index_copy_(0, rows, _checked_ious(pos_ious, len(rows), dtype))


class TwoStageLoss(ExpressionLoss):
    """Classification in R-CNNs: X logits, Y one-hot label, Z IoU."""

    _quality = frozenset("Z")
    _build_kernel = staticmethod(kernels.TwoStageKernel.build)
    _options = {"reduction": "mean", "use_sigmoid": False}

    def __init__(self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if self.use_sigmoid:
            raise ValueError(f"use_sigmoid: space {space.name} has softmax logits with a background column; expected False")

    def forward(self, pred: Tensor, target: Tensor, pos_ious: Tensor | None = None, weight: Tensor | None = None,
                avg_factor: float | Tensor | None = None, reduction_override: str | None = None) -> Tensor:
        """The loss.

        Args:
            pred: (N, C+1) logits, background last.
            target: (N,) labels; 0..C-1 are positives, C is background. Any other label marks no class: its row of Y is 0.
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target, in the positives'
                order. No gradient passes. None counts as IoU 1.
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
        quality = None
        if self.needs_ious:
            quality = _spread(pos_ious, (target >= 0) & (target < pred.shape[1] - 1), _dtype(pred))
        if self._by_hand(reduction, len(pred)) and _all_in(target, pred.shape[1]):
            scale = self._scale(avg_factor, reduction, len(pred))
            return kernels.apply(pred, lambda pred, gradient: self._kernel(
                pred, gradient, target, quality, weight, scale))
        logits = _at_least_float32(pred)
        labels = (target[:, None] == torch.arange(logits.shape[1], device=target.device)).to(logits.dtype)
        variables = {"X": logits, "Y": labels}
        if quality is not None:
            variables["Z"] = quality[:, None].expand_as(logits)
        loss = self._evaluate(variables, logits).sum(-1).expand(len(logits))
        return self._reduce(loss, weight, avg_factor, reduction)


class OneStageLoss(ExpressionLoss):
    """Classification in one-stage detectors: X logits, PY binary label, NY = 1 - PY, Q = PY * IoU."""

    _quality = frozenset("Q")
    _build_kernel = staticmethod(kernels.OneStageKernel.build)
    _options = {"reduction": "mean", "use_sigmoid": True, "alpha": 0.25}

    def __init__(self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if not self.use_sigmoid:
            raise ValueError(f"use_sigmoid: space {space.name} has independent sigmoids without background; expected True")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1] or None, found {self.alpha!r}")

    def forward(self, pred: Tensor, target: Tensor, pos_ious: Tensor | None = None, weight: Tensor | None = None,
                avg_factor: float | Tensor | None = None, reduction_override: str | None = None) -> Tensor:
        """The loss.

        Args:
            pred: (N, C) logits.
            target: (N,) labels; 0..C-1 are positives, any other label is background.
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target, in the positives'
                order. No gradient passes. None counts as IoU 1.
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
        positive = (target >= 0) & (target < pred.shape[1])
        if weight is not None:
            weight = weight[:, None] if weight.shape == target.shape else weight.reshape(pred.shape)
        if self._by_hand(reduction, pred.numel()):
            rows = positive.nonzero()[:, 0]
            quality = None
            if self.needs_ious:
                quality = rows.new_ones(len(rows), dtype=_dtype(pred)) if pos_ious is None else _checked_ious(
                    pos_ious, len(rows), _dtype(pred))
            scale = self._scale(avg_factor, reduction, pred.numel())
            alphas = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
            return kernels.apply(pred, lambda pred, gradient: self._kernel(
                pred, gradient, target, rows, quality, weight, alphas, scale))
        logits = _at_least_float32(pred)
        labels = (target[:, None] == torch.arange(logits.shape[1], device=target.device)).to(logits.dtype)
        quality = labels * _spread(pos_ious, positive, logits.dtype)[:, None] if self.needs_ious else labels
        variables = {"X": logits, "Q": quality, "PY": labels, "NY": 1 - labels}
        loss = self._evaluate(variables, logits).expand_as(logits)
        if self.alpha is not None:
            loss = loss * (1 - self.alpha + (2 * self.alpha - 1) * labels)
        return self._reduce(loss, weight, avg_factor, reduction)


class BoxLoss(ExpressionLoss):
    """Regression on boxes: U union, I intersection, E smallest enclosing box (areas in squared pixels)."""

    _build_kernel = staticmethod(kernels.BoxKernel.build)

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None,
                avg_factor: float | Tensor | None = None, reduction_override: str | None = None) -> Tensor:
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
                raise ValueError(f"{name}: expected boxes of shape ({len(pred)}, 4), found {tuple(boxes.shape)}")
        if weight is not None and weight.dim() > 1:
            weight = weight.mean(-1)
        if self._by_hand(reduction, len(pred)):
            scale = self._scale(avg_factor, reduction, len(pred))
            return kernels.apply(pred, lambda pred, gradient: self._kernel(pred, gradient, target, weight, scale))
        boxes, aims = _at_least_float32(pred), _at_least_float32(target)
        (x1, y1, x2, y2), (a1, b1, a2, b2) = boxes.unbind(1), aims.unbind(1)
        overlap = ((torch.minimum(x2, a2) - torch.maximum(x1, a1)).clamp(min=0)
                   * (torch.minimum(y2, b2) - torch.maximum(y1, b1)).clamp(min=0))
        enclosing = ((torch.maximum(x2, a2) - torch.minimum(x1, a1)).clamp(min=0)
                     * (torch.maximum(y2, b2) - torch.minimum(y1, b1)).clamp(min=0))
        union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - overlap
        variables = {"U": union + AREA_EPSILON, "I": overlap, "E": enclosing + AREA_EPSILON}
        loss = self._evaluate(variables, boxes[:, 0]).expand(len(boxes))
        return self._reduce(loss, weight, avg_factor, reduction)


_LOSSES: dict[str, type[ExpressionLoss]] = {"two_stage": TwoStageLoss, "one_stage": OneStageLoss, "boxes": BoxLoss}
