"""Losses for Ultralytics' YOLO detectors (v8 and later).

    model = YOLO("yolo11n.yaml")
    model.add_callback("on_train_start", use_losses(cls="CSE-Autoloss-B", reg="GIoU"))
    model.train(data="coco8.yaml")

The criterion stays the library's, with its assigner, its distribution focal loss and its gains; two
modules in it are replaced. The assigner's score, Ultralytics' soft label, is handed over where a
loss takes an IoU: what the library does with it by default is cross-entropy towards it.

Ultralytics is licensed under the AGPL-3.0, which reaches what is built on it; this project's own
code contains none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.loss import BboxLoss, v8DetectionLoss
from ultralytics.utils.torch_utils import unwrap_model

from cse_autoloss.adapters.fitting import fitting_loss
from cse_autoloss.losses import ExpressionLoss


def use_losses(**losses: Any) -> Callable[[Any], None]:
    """A callback for ``on_train_start`` that puts losses into the model that is being trained, and
    into its moving average, which is what the library validates.

    Args:
        **losses: as for :func:`criterion`.
    """

    def on_train_start(trainer: Any) -> None:
        model, average = unwrap_model(trainer.model), getattr(trainer, "ema", None)
        # Of two heads whose training is resumed: how far their weights are
        updates = getattr(getattr(model, "criterion", None), "updates", None)
        model.criterion = criterion(model, **losses)
        if updates is not None:
            model.criterion.updates = updates - 1
            model.criterion.update()
        if average is not None:
            average.ema.criterion = criterion(average.ema, **losses)

    return on_train_start


def criterion(
    model: nn.Module,
    cls: str | None = None,
    reg: str | None = None,
    cls_weight: float = 1.0,
    reg_weight: float = 1.0,
    cls_space: str = "one_stage_cls",
    reg_space: str = "reg",
    alpha: float | None = None,
) -> Any:
    """A detection model's own criterion with losses put into it; to be set as ``model.criterion``.

    Args:
        model: Ultralytics' ``DetectionModel``.
        cls, reg: expressions, or names of known losses; the library's own where None. Boxes
            are in pixels of the training image.
        cls_weight, reg_weight: their factors, on top of the library's gains.
        cls_space, reg_space: the search spaces that they are written in.
        alpha: weight of labels in the classification loss, 1 - alpha that of the others; None, as
            in the library, for no weighting (MMDetection's detectors have 0.25).

    Raises:
        ValueError: if the model's criterion is not built on ``v8DetectionLoss``, or a loss or a
            space does not fit.
        ExpressionError, SpaceError: as :func:`cse_autoloss.build_loss`.
    """
    made = model.init_criterion()
    # A model without NMS has two criteria, of its two heads.
    parts = [made, *vars(made).values()] if not isinstance(made, v8DetectionLoss) else [made]
    parts = [part for part in parts if isinstance(part, v8DetectionLoss)]
    if not parts:
        raise ValueError(
            f"model: its criterion is {type(made).__name__}; a detection model's is v8DetectionLoss"
        )
    name = type(model).__name__
    soft = fitting_loss(
        "cls",
        cls,
        cls_space,
        "one_stage",
        name,
        loss_weight=cls_weight,
        alpha=alpha,
        reduction="none",
    )
    boxes = fitting_loss("reg", reg, reg_space, "boxes", name, loss_weight=reg_weight)
    for part in parts:
        if soft is not None:
            part.bce = _SoftLabels(soft)
        if boxes is not None:
            if type(part.bbox_loss) is not BboxLoss:
                raise ValueError(
                    f"reg: {name} has a {type(part.bbox_loss).__name__}, of other boxes than "
                    "x1 y1 x2 y2; give cls alone"
                )
            part.bbox_loss = _BoxLoss(part.reg_max, boxes).to(part.device)
    return made


class _SoftLabels(nn.Module):
    """In the place of ``BCEWithLogitsLoss``: (..., C) logits and scores to (..., C) losses."""

    def __init__(self, loss: ExpressionLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, scores: Tensor) -> Tensor:
        best, label = scores.flatten(0, -2).max(-1)
        label = torch.where(best > 0, label, scores.shape[-1])
        losses = self.loss(logits.flatten(0, -2), label, pos_ious=best[best > 0])
        return losses.view_as(logits)


class _BoxLoss(BboxLoss):
    """The library's box losses, the first of which is a searched one."""

    def __init__(self, reg_max: int, loss: ExpressionLoss) -> None:
        super().__init__(reg_max)
        self.loss = loss

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        fg_mask: Tensor,
        imgsz: Tensor,
        stride: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, distribution = super().forward(
            pred_dist,
            pred_bboxes,
            anchor_points,
            target_bboxes,
            target_scores,
            target_scores_sum,
            fg_mask,
            imgsz,
            stride,
        )
        pixels = (boxes * stride for boxes in (pred_bboxes, target_bboxes))
        pred, target = (boxes[fg_mask] for boxes in pixels)
        weight = target_scores[fg_mask].sum(-1)
        return self.loss(pred, target, weight=weight, avg_factor=target_scores_sum), distribution
