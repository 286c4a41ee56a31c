"""An expression as a loss module with MMDetection's call signature.

    loss = build_loss("Neg(Dot(Mul(Y,Add(1,Sin(Z))),Log(Softmax(X))))", "two_stage_cls")
    loss(cls_score, labels, label_weights, avg_factor=512, pos_ious=ious)

The order of arguments, reduction, sample weights and ``avg_factor`` are those of MMDetection 2.x
(``mmdet/models/losses/utils.py``). Values and gradients of the losses released with CSE-Autoloss
(ICLR 2021) are the released ones, in their float32 form.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cse_autoloss import inputs, kernels
from cse_autoloss.errors import hint
from cse_autoloss.expression import Expression
from cse_autoloss.inputs import ALPHA, EXTRAS, MIN_IOU
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.stable import is_released, stabilized
from cse_autoloss.standalone import standalone_module
from cse_autoloss.variables import (
    box_loss,
    one_stage_loss,
    reduced,
    two_stage_loss,
)

__all__ = ["ExpressionLoss", "build_loss", "needs", "standalone_module"]
REDUCTIONS = ("none", "mean", "sum")
_FLOAT_EPSILON = torch.finfo(torch.float32).eps  # what MMDetection adds to avg_factor


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
            ``stable``: log(softmax), log(sigmoid) and log(1 - sigmoid) are taken at once, so that
            confident logits keep a gradient; areas and the IoU of boxes are bounded below. By
            default True but for the losses that the space calls released: those keep their numbers.
            ``alpha``, one-stage: weight of a label, 1 - alpha that of a non-label; default 0.25;
            None for no weighting.
            ``class_frequency``, classification: (C,) numbers for formulas with F, where calls do
            not give them.
            ``use_sigmoid``, classification: MMDetection's heads read it from a config. It must be,
            and by default is, True in one-stage spaces and False in two-stage ones.

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


def needs(loss: nn.Module, name: str) -> bool:
    """Whether a loss's value depends on what a head may hand over by that name: one of its
    ``needs`` or else, of a loss that somebody wrote by hand, an argument of its ``forward``."""
    declared = getattr(loss, "needs", None)
    if declared is None:
        declared = arguments(type(loss))  # type: ignore[arg-type]  # classes do hash
    return name in declared


@functools.cache  # a signature costs as much as a small loss, and heads ask at each step
def arguments(kind: type[nn.Module]) -> frozenset[str]:
    """Names of what losses of a class are called with."""
    return frozenset(inspect.signature(kind.forward).parameters)


class ExpressionLoss(nn.Module):
    """What the losses of all spaces have in common. Made by :func:`build_loss`.

    Attributes:
        expression, space: the formula and the language that it is written in.
        loss_weight: factor of the reduced loss; may be set at any time.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        needs: names of the extras (``inputs.EXTRAS``) that the value depends on; heads hand over
            these.
        needs_ious: whether ``pos_ious`` is one of them.
    """

    _options: dict[str, Any] = {"reduction": "mean", "stable": None}
    reduction: str
    stable: bool | None

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
                raise TypeError(
                    f"a loss of space {space.name} has no option {name!r}; "
                    f"{hint(name, self._options, 'its options')}"
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
        if self.stable is None:
            self.stable = not is_released(expression, space)
        self.needs = inputs.needs(space.inputs, expression.variables)
        self.needs_ious = "pos_ious" in self.needs
        self._prepare()

    _build_kernel: Any  # a kernel class's ``build``
    _weighted: Any  # from a formula's values to the weighted loss of each element

    def _prepare(self) -> None:
        self._computed = stabilized(self.expression) if self.stable else self.expression
        # Found here: torch.compile enters no lock, as Python 3.11 puts around a cached property.
        self._steps = self._computed.steps
        self._kernel = self._build_kernel(self._computed)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the formula and its options; what is computed from them is
        computed again."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_computed", "_steps", "_kernel")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        """What stands in the module's printed form."""
        options = "".join(f", {name}={getattr(self, name)!r}" for name in self._options)
        formula, space = str(self.expression), self.space.name
        return f"{formula!r}, space={space!r}, loss_weight={self.loss_weight:g}{options}"

    def _by_kernel(self, reduction: str, count: int, *constant: Any) -> bool:
        """Whether a kernel computes this call: it knows the prediction's gradient alone, not those
        of what should be ``constant``. torch.compile makes better code from the plain formula."""
        return (
            self._kernel is not None
            and reduction != "none"
            and count > 0
            and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
            and not any(isinstance(value, Tensor) and value.requires_grad for value in constant)
        )

    def _plain(
        self,
        variables: Mapping[str, Tensor],
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        avg_factor: float | Tensor | None,
        reduction: str,
    ) -> Tensor:
        """The reduced loss in torch's own graph."""
        alpha = getattr(self, "alpha", None)
        loss = self._weighted(self._evaluate(variables, pred), pred, target, alpha, weight)
        return reduced(loss, avg_factor, reduction) * self.loss_weight

    def _variables(self, pred: Tensor, target: Tensor, **given: Any) -> dict[str, Tensor]:
        """What the formula is computed from."""
        given = {"pred": pred.to(_dtype(pred)), "target": target, **given}
        return inputs.variables(self.space.inputs, self._computed.variables, given)

    def _with_own(self, extras: dict[str, Tensor], pred: Tensor) -> dict[str, Tensor]:
        """Extras, and the class frequencies that the loss was made with where none are given."""
        if self.class_frequency is None or "class_frequency" not in self.needs:
            return extras
        frequency = pred.new_tensor(self.class_frequency, dtype=_dtype(pred))
        return {"class_frequency": frequency, **extras}

    def _evaluate(self, variables: Mapping[str, Tensor], pred: Tensor) -> Tensor:
        values: list[Tensor] = []
        for name, places in self._steps:
            if places:
                values.append(PRIMITIVES[name].torch(*[values[place] for place in places]))
            else:
                values.append(
                    variables[name]
                    if name in variables
                    else pred.new_tensor(float(name), dtype=_dtype(pred))
                )
        value = values[-1]
        if not self.expression.passes_gradient(self.space.predicted):
            # Constant for the prediction, yet backward() must find a graph.
            value = value + 0 * pred.sum(dtype=_dtype(pred))
        return value

    def _scale(
        self, pred: Tensor, count: int, avg_factor: float | Tensor | None, reduction: str
    ) -> float | Tensor:
        """What a kernel multiplies its sum by; :func:`reduced` and ``loss_weight`` in one."""
        if reduction == "sum":
            return self.loss_weight
        if avg_factor is None:
            return self.loss_weight / count
        if isinstance(avg_factor, Tensor):
            avg_factor = avg_factor.to(_dtype(pred)).reshape(())
        return self.loss_weight / (avg_factor + _FLOAT_EPSILON)

    def _reduction(self, override: str | None, avg_factor: float | Tensor | None) -> str:
        if override is not None and override not in REDUCTIONS:
            raise AssertionError(
                f"reduction_override: expected one of {', '.join(REDUCTIONS)} or None, found "
                f"{override!r}"
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


def _check_extras(extras: Mapping[str, Tensor | None], **shapes: Any) -> None:
    """Whether extras are known and have the shape that their ``each`` stands for in ``shapes``.
    (Positives are not counted under torch.compile: it would break the graph.)"""
    for name, value in extras.items():
        if name not in EXTRAS or EXTRAS[name].each not in shapes:
            known = [extra.name for extra in EXTRAS.values() if extra.each in shapes]
            raise TypeError(f"unexpected argument {name!r}; extras are {', '.join(known)}")
        if value is None or torch.compiler.is_compiling():
            continue
        expected = shapes[EXTRAS[name].each]
        expected = (int(expected.count_nonzero()),) if isinstance(expected, Tensor) else expected
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name}: expected shape {expected}, found {tuple(value.shape)}: "
                f"{EXTRAS[name].meaning}"
            )


def _check_weight(weight: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if weight is not None and tuple(weight.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"weight: expected shape {expected}, found {tuple(weight.shape)}")


class TwoStageLoss(ExpressionLoss):
    """Classification in R-CNNs: X logits, Y one-hot label, Z IoU."""

    _build_kernel = staticmethod(kernels.two_stage_kernel)
    _weighted = staticmethod(two_stage_loss)
    _options = {**ExpressionLoss._options, "use_sigmoid": False, "class_frequency": None}

    def __init__(
        self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if self.use_sigmoid:
            raise ValueError(
                f"use_sigmoid: space {space.name} has softmax logits with a background column; "
                "expected False"
            )

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        pos_ious: Tensor | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, C+1) logits, background last.
            target: (N,) labels in 0..C; 0..C-1 are positives, C is background. A row whose label
                is negative is ignored: its loss is 0. (Labels above C are not looked for: torch
                refuses them where it takes the label's column.)
            weight: (N,) or (N, 1) sample weights.
            avg_factor: divisor of the sum in place of N; only with reduction "mean".
            reduction_override: replaces the module's reduction.
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target,
                in the positives' order. No gradient passes. None counts as IoU 1.
            **extras: what else the formula's variables need (``needs``); ``inputs.EXTRAS`` says
                what each is.

        Returns:
            A scalar, or (N,) for reduction "none".

        Raises:
            AssertionError: for a reduction_override that is no reduction, as in MMDetection.
            ValueError: for shapes that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        _check_logits(pred, target)
        count = len(pred)
        _check_weight(weight, (count,), (count, 1))

        def plain(pred: Tensor) -> Tensor:
            variables = self._variables(pred, target, pos_ious=pos_ious, **extras)
            return self._plain(variables, pred, target, weight, avg_factor, reduction)

        classes = pred.shape[1] - 1
        positive = (target >= 0) & (target < classes)
        extras = self._with_own(extras, pred)
        given = {"pos_ious": pos_ious, **extras}
        _check_extras(given, positive=positive, sample=(count,), category=(classes,))
        if not self._by_kernel(reduction, count, weight, avg_factor):
            return plain(pred)
        quality = None
        if self.needs_ious:
            quality = torch.ones(count, dtype=_dtype(pred), device=pred.device)
            if pos_ious is not None:
                ious = pos_ious.detach().to(quality.dtype).clamp(min=MIN_IOU)
                quality.masked_scatter_(positive, ious)
        weight = None if weight is None else weight.reshape(-1)
        scale = self._scale(pred, count, avg_factor, reduction)
        return kernels.apply(
            pred,
            lambda pred, gradient: self._kernel(pred, gradient, target, quality, weight, scale),
            plain,
        )


class OneStageLoss(ExpressionLoss):
    """Classification in one-stage detectors: X logits, PY binary label, NY = 1 - PY, Q = PY *
    IoU."""

    _build_kernel = staticmethod(kernels.OneStageKernel.build)
    _weighted = staticmethod(one_stage_loss)
    _options = {
        **ExpressionLoss._options,
        "use_sigmoid": True,
        "alpha": ALPHA,
        "class_frequency": None,
    }

    def __init__(
        self, expression: Expression, space: SearchSpace, loss_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(expression, space, loss_weight, **options)
        if not self.use_sigmoid:
            raise ValueError(
                f"use_sigmoid: space {space.name} has independent sigmoids without background; "
                "expected True"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1] or None, found {self.alpha!r}")

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        pos_ious: Tensor | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, C) logits.
            target: (N,) labels; 0..C-1 are positives, a negative label's row is ignored (its loss
                is 0), any other label is background.
            weight: (N,) or (N, 1) sample weights, or one for each element: (N, C) or (N*C,).
            avg_factor: divisor of the sum in place of N*C; only with reduction "mean".
            reduction_override: replaces the module's reduction.
            pos_ious: (number of positives,) IoU of each positive's predicted box with its target,
                in the positives' order. No gradient passes. None counts as IoU 1.
            **extras: what else the formula's variables need (``needs``); ``inputs.EXTRAS`` says
                what each is.

        Returns:
            A scalar, or (N, C) for reduction "none".

        Raises:
            AssertionError: for a reduction_override that is no reduction, as in MMDetection.
            ValueError: for shapes that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        _check_logits(pred, target)
        (count, classes), elements = pred.shape, pred.numel()
        _check_weight(weight, (count,), (count, 1), (count, classes), (elements,))

        def plain(pred: Tensor) -> Tensor:
            variables = self._variables(pred, target, pos_ious=pos_ious, **extras)
            return self._plain(variables, pred, target, weight, avg_factor, reduction)

        positive = (target >= 0) & (target < classes)
        extras = self._with_own(extras, pred)
        given = {"pos_ious": pos_ious, **extras}
        _check_extras(given, positive=positive, sample=(count,), category=(classes,))
        if not self._by_kernel(reduction, elements, weight, avg_factor):
            return plain(pred)
        rows = positive.nonzero()[:, 0]
        quality = None
        if self.needs_ious:
            quality = torch.ones(len(rows), dtype=_dtype(pred), device=pred.device)
            if pos_ious is not None:
                quality = pos_ious.detach().to(quality.dtype).clamp(min=MIN_IOU)
        weights = None
        if weight is not None:
            weights = weight.reshape(pred.shape if weight.numel() == elements else (count, 1))
            weights = weights.to(_dtype(pred))
        if (ignored := target < 0).any():
            kept = (~ignored).to(_dtype(pred))[:, None]
            weights = kept if weights is None else kept * weights
        scale = self._scale(pred, elements, avg_factor, reduction)
        alphas = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        return kernels.apply(
            pred,
            lambda pred, gradient: self._kernel(
                pred, gradient, target, rows, quality, weights, alphas, scale
            ),
            plain,
        )


class BoxLoss(ExpressionLoss):
    """Regression on boxes: U union, I intersection, E smallest enclosing box (areas in squared
    pixels).

    Attributes:
        scale_free: whether the value is the same for boxes of another size, or in another unit.
    """

    _build_kernel = staticmethod(kernels.BoxKernel.build)
    _weighted = staticmethod(box_loss)

    def _prepare(self) -> None:
        super()._prepare()
        self.scale_free = self._is_scale_free()
        self._check_unit = not self.scale_free

    def _is_scale_free(self) -> bool:
        """Whether the value is the same for boxes of twice the size, tried on four pairs of
        them."""
        pairs = torch.tensor([[0, 0, 7, 5], [0, 0, 9, 9], [3, 1, 11, 4], [0, 2, 8, 9.0]]).double()
        one, other = (
            self._evaluate(
                self._variables(
                    pairs * size,
                    pairs.flip(0) * size,
                    stable=True,
                    image_sizes=pairs[:, 2:] * 10 * size,
                ),
                pairs,
            )
            for size in (1.0, 4.0)
        )
        return torch.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True)

    def _warn_of_unit(self, target: Tensor) -> None:
        """Once: boxes in [0, 1] for a formula with numbers of squared pixels in it."""
        if self._check_unit and len(target) and not torch.compiler.is_compiling():
            self._check_unit = False
            if target.detach().abs().max() <= 1.5:
                warnings.warn(
                    f"{str(self.expression)[:80]}: the value of this loss depends on the size of "
                    "boxes, and these are normalised; give boxes in pixels",
                    stacklevel=3,
                )

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (P, 4) boxes x1 y1 x2 y2 in pixels (in other units only if the formula is
                scale-free).
            target: (P, 4) boxes.
            weight: (P,) or (P, 1), or (P, 4) whose rows count as their mean.
            avg_factor: divisor of the sum in place of P; only with reduction "mean".
            reduction_override: replaces the module's reduction.
            **extras: what else the formula's variables need (``needs``).

        Returns:
            A scalar, or (P,) for reduction "none".

        Raises:
            AssertionError: for a reduction_override that is no reduction, as in MMDetection.
            ValueError: for shapes that do not fit.
        """
        reduction = self._reduction(reduction_override, avg_factor)
        count = len(pred)
        for name, boxes in (("pred", pred), ("target", target)):
            if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != count:
                raise ValueError(
                    f"{name}: expected boxes of shape ({count}, 4), found {tuple(boxes.shape)}"
                )
        _check_weight(weight, (count,), (count, 1), (count, 4))
        _check_extras(extras, box=(count, 2))
        self._warn_of_unit(target)

        def plain(pred: Tensor) -> Tensor:
            aims = target.to(_dtype(target))
            variables = self._variables(pred, aims, stable=self.stable, **extras)
            return self._plain(variables, pred, target, weight, avg_factor, reduction)

        if not self._by_kernel(reduction, count, weight, avg_factor, target):
            return plain(pred)
        weights = None
        if weight is not None:
            weights = weight.to(_dtype(pred))
            weights = weights.mean(-1) if weights.dim() > 1 else weights
        scale = self._scale(pred, count, avg_factor, reduction)
        return kernels.apply(
            pred,
            lambda pred, gradient: self._kernel(
                pred, gradient, target, weights, scale, self.stable
            ),
            plain,
        )


_LOSSES: dict[str, type[ExpressionLoss]] = {
    "two_stage": TwoStageLoss,
    "one_stage": OneStageLoss,
    "boxes": BoxLoss,
}
