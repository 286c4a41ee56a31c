"""Losses for the DETR family of Hugging Face's transformers, through the library's own door.

    model.loss_function = detr_loss(model, cls="CSE-Autoloss-B", reg="CSE-Autoloss-B")

What the library computes around a loss (the matching of queries with objects, denoising queries,
auxiliary outputs, L1 on boxes, weights) stays its own, in the version that is installed: its
function for the model runs with a criterion of ours, a subclass of its own, in the place of its
own. Works for every model whose criterion has ``get_loss``: DETR, Table Transformer, YOLOS,
Conditional, Deformable and DAB DETR, RT-DETR, D-FINE, LW-DETR, RF-DETR, DEIM; GroundingDINO, which
has no labels to classify by, keeps its own classification loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_grounding_dino import GroundingDinoImageLoss

from cse_autoloss.adapters.boxes import in_single, paired_iou
from cse_autoloss.adapters.fitting import fitting_loss
from cse_autoloss.losses import ExpressionLoss

#: What a criterion calls its classification losses, and under which key it returns each.
_CLS_KEYS = {
    "labels": "loss_ce",
    "vfl": "loss_vfl",
    "mal": "loss_mal",
    "focal": "loss_focal",
    "bce": "loss_bce",
}
_IMAGE_SIZE = (640, 640)


def detr_loss(
    model: PreTrainedModel,
    cls: str | None = None,
    reg: str | None = None,
    cls_weight: float = 1.0,
    reg_weight: float = 1.0,
    cls_space: str | None = None,
    reg_space: str = "reg",
    image_size: tuple[int, int] = _IMAGE_SIZE,
) -> Callable[..., Any]:
    """A ``loss_function`` for an object detection model, with searched losses in it.

    Args:
        model: a ``...ForObjectDetection`` model of the DETR family.
        cls: expression, or name of a known loss, in the place of the model's classification loss;
            the model's own where None. The IoU of each matched query's box with its object is
            handed over.
        reg: the same in the place of the GIoU loss. The L1 loss on boxes stays.
        cls_weight, reg_weight: factors of these losses, on top of the weights in the model's
            config.
        cls_space, reg_space: the search spaces that they are written in. Models with a softmax over
            classes and "no object" (DETR) take ``two_stage_cls``, all others, with independent
            sigmoids, ``one_stage_cls``; that is also what None stands for.
        image_size: (height, width) in pixels that boxes, which these models have in shares of the
            image, are scaled to where a label does not say its image's ``size``.

    Returns:
        A function to be set as ``model.loss_function``.

    Raises:
        ValueError: if the model's own loss is none of the DETR family's, or a loss or a space does
            not fit.
        ExpressionError, SpaceError: as :func:`cse_autoloss.build_loss`.
    """
    own = model.loss_function
    own = own.own if isinstance(own, _LossFunction) else own
    name = type(model).__name__
    criterion, base = _criterion_of(own, name)
    if cls is not None and issubclass(base, GroundingDinoImageLoss):
        raise ValueError(
            f"cls: {name} tells objects by the words of a text, not by labels: it keeps its "
            "classification loss; give reg alone"
        )
    softmax = issubclass(base, ImageLoss) and not issubclass(base, DeformableDetrImageLoss)
    inputs = "two_stage" if softmax else "one_stage"
    losses = {
        "cls": fitting_loss("cls", cls, cls_space, inputs, name, loss_weight=cls_weight),
        "reg": fitting_loss("reg", reg, reg_space, "boxes", name, loss_weight=reg_weight),
    }
    return _LossFunction(own, criterion, losses, image_size)


class _LossFunction:
    """The library's function for a model, as it is, with a criterion of ours in the place of its
    own. Copied and pickled with its model, it is made again of what it was made of."""

    def __init__(
        self,
        own: Callable[..., Any],
        criterion: str,
        losses: Mapping[str, ExpressionLoss | None],
        size: tuple[int, int],
    ) -> None:
        self.own = own
        self._made_of = own, criterion, losses, size
        base = own.__globals__[criterion]
        self.criterion = type(
            f"Searched{base.__name__}",
            (_Searched, base),
            {"losses_by_branch": losses, "size": size},
        )
        # It looks its criterion up by name among its module's globals.
        self._function = FunctionType(
            own.__code__,
            {**own.__globals__, criterion: self.criterion},
            own.__name__,
            own.__defaults__,
            own.__closure__,
        )

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return _LossFunction, self._made_of


def _criterion_of(function: Callable[..., Any], model: str) -> tuple[str, type[nn.Module]]:
    """The criterion that a library's loss function makes: its name there, and the class."""
    for name in getattr(getattr(function, "__code__", None), "co_names", ()):
        found = function.__globals__.get(name)
        if isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "get_loss"):
            return name, found
    raise ValueError(
        f"model: {model} has no loss of the DETR family (DETR, Deformable DETR, RT-DETR, D-FINE, "
        "...), in which a classification and a box loss could take another's place"
    )


class _Searched:
    """What a criterion of the library's becomes: some of its losses are searched ones."""

    losses_by_branch: Mapping[str, ExpressionLoss | None]
    size: tuple[int, int]
    # The criterion's own.
    num_classes: int
    empty_weight: Tensor
    _get_source_permutation_idx: Callable[..., tuple[Tensor, Tensor]]

    def get_loss(
        self,
        loss: str,
        outputs: Mapping[str, Tensor],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
        num_boxes: float,
        **options: Any,
    ) -> dict[str, Tensor]:
        cls, reg = self.losses_by_branch["cls"], self.losses_by_branch["reg"]
        if loss in _CLS_KEYS and cls is not None:
            return {
                _CLS_KEYS[loss]: self._classification(cls, outputs, targets, indices, num_boxes)
            }
        matched = (outputs, targets, indices, num_boxes)
        result = super().get_loss(loss, *matched, **options)  # type: ignore[misc]
        if loss == "boxes" and reg is not None:
            pred, target = self._boxes(outputs, targets, indices)
            result["loss_giou"] = reg(pred, target, avg_factor=num_boxes)
        return result

    def _classification(
        self,
        loss: nn.Module,
        outputs: Mapping[str, Tensor],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
        num_boxes: float,
    ) -> Tensor:
        logits = outputs["logits"]
        place = self._get_source_permutation_idx(indices)
        labels = torch.full(
            logits.shape[:2],
            self.num_classes,
            dtype=torch.int64,
            device=logits.device,
        )
        labels[place] = torch.cat(
            [target["class_labels"][j] for target, (_, j) in zip(targets, indices, strict=True)]
        )
        # Losses take IoUs in the order of the rows; matched queries come in the matcher's.
        matched = paired_iou(*self._boxes(outputs, targets, indices))
        ious = matched.new_zeros(labels.shape)
        ious[place] = matched
        positive = labels < self.num_classes
        softmax = loss.space.inputs == "two_stage"
        weight = self.empty_weight[labels.flatten()] if softmax else None
        return loss(
            logits.flatten(0, 1),
            labels.flatten(),
            pos_ious=ious[positive],
            weight=weight,
            avg_factor=num_boxes if weight is None else weight.sum(),
        )

    def _boxes(
        self,
        outputs: Mapping[str, Tensor],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """(P, 4) predicted boxes of the matched queries and their targets, x1 y1 x2 y2 in
        pixels, in float32 or float64."""
        pred = in_single(outputs["pred_boxes"][self._get_source_permutation_idx(indices)])
        chosen = [target["boxes"][j] for target, (_, j) in zip(targets, indices, strict=True)]
        sizes = [
            torch.as_tensor(target.get("size", self.size), device=pred.device)
            .flip(-1)
            .repeat(len(j), 2)
            for target, (_, j) in zip(targets, indices, strict=True)
        ]
        pixels = torch.cat(sizes).to(pred.dtype)
        return (
            center_to_corners_format(pred) * pixels,
            center_to_corners_format(torch.cat(chosen).to(pred.dtype)) * pixels,
        )
