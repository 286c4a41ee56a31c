"""Losses for torchvision's detectors: FCOS, RetinaNet, Faster and Mask R-CNN.

    model = fcos_resnet50_fpn(weights=None, num_classes=3)
    use_losses(model, cls="CSE-Autoloss-B", reg="CSE-Autoloss-B")

The heads become subclasses of torchvision's own, with the same parameters: what they compute around
a loss, and how they predict, stays the library's. Classification losses are handed the IoU of each
positive's predicted box with its target. In R-CNNs class 0 is the background there and the last
class here: columns are rolled.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads

from cse_autoloss.adapters.boxes import in_single, paired_iou
from cse_autoloss.adapters.fitting import fitting_loss
from cse_autoloss.losses import ExpressionLoss

Targets = list[dict[str, Tensor]]


def use_losses(
    model: nn.Module,
    cls: str | None = None,
    reg: str | None = None,
    cls_weight: float = 1.0,
    reg_weight: float = 1.0,
    cls_space: str | None = None,
    reg_space: str = "reg",
) -> nn.Module:
    """Put losses into a detector.

    Args:
        model: torchvision's ``FCOS``, ``RetinaNet``, ``FasterRCNN`` or ``MaskRCNN``; changed in
            place.
        cls, reg: expressions, or names of known losses; torchvision's own loss where None, whatever
            was put in before. A box loss is computed on decoded boxes, in pixels of the images as
            the detector resizes them.
        cls_weight, reg_weight: their factors. In R-CNNs torchvision divides the box loss by all
            sampled boxes; the paper's weight for a loss on decoded boxes is 10 there, else 1.
        cls_space, reg_space: the search spaces that they are written in; for classification None is
            ``two_stage_cls`` in R-CNNs, else ``one_stage_cls``.

    Returns:
        The model.

    Raises:
        ValueError: for another kind of model, or a loss or a space that does not fit.
        ExpressionError, SpaceError: as :func:`cse_autoloss.build_loss`.
    """
    heads = (
        (FCOS, "head", _FCOSHead, "one_stage"),
        (RetinaNet, "head", _RetinaNetHead, "one_stage"),
        (FasterRCNN, "roi_heads", _RoIHeads, "two_stage"),
    )
    for kind, part, ours, inputs in heads:
        if isinstance(model, kind):
            break
    else:
        raise ValueError(
            f"model: {type(model).__name__} is none of torchvision's FCOS, RetinaNet, FasterRCNN, "
            "MaskRCNN"
        )
    head, name = getattr(model, part), kind.__name__
    searched_cls = fitting_loss("cls", cls, cls_space, inputs, name, loss_weight=cls_weight)
    searched_reg = fitting_loss("reg", reg, reg_space, "boxes", name, loss_weight=reg_weight)
    head.__class__ = ours  # the same module with the same parameters, and other losses
    head.searched_cls, head.searched_reg = searched_cls, searched_reg
    return model


class _FCOSHead(FCOSHead):
    searched_cls: ExpressionLoss | None
    searched_reg: ExpressionLoss | None

    def compute_loss(
        self,
        targets: Targets,
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        logits = head_outputs["cls_logits"].flatten(0, 1)
        labels, boxes = _assigned(targets, matched_idxs, logits.shape[1])
        deltas = in_single(head_outputs["bbox_regression"])
        pred = self.box_coder.decode(deltas, torch.stack(anchors))
        positive = labels < logits.shape[1]
        pred, boxes = pred.flatten(0, 1)[positive], boxes[positive]
        count = max(1, len(boxes))
        if self.searched_cls is not None:
            losses["classification"] = self.searched_cls(
                logits, labels, pos_ious=paired_iou(pred, boxes), avg_factor=count
            )
        if self.searched_reg is not None:
            losses["bbox_regression"] = self.searched_reg(pred, boxes, avg_factor=count)
        return losses


class _RetinaNetHead(RetinaNetHead):
    searched_cls: ExpressionLoss | None
    searched_reg: ExpressionLoss | None

    def compute_loss(
        self,
        targets: Targets,
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        ignored = self.classification_head.BETWEEN_THRESHOLDS
        coder = self.regression_head.box_coder
        cls, reg = [], []  # torchvision's mean over images of each image's own mean
        for image, matched in enumerate(matched_idxs):
            logits = head_outputs["cls_logits"][image]
            labels, boxes = _assigned([targets[image]], [matched], logits.shape[1])
            positive = labels < logits.shape[1]
            deltas = in_single(head_outputs["bbox_regression"][image][positive])
            pred, boxes = coder.decode_single(deltas, anchors[image][positive]), boxes[positive]
            count = max(1, len(boxes))
            if self.searched_cls is not None:
                valid = matched != ignored
                ious = paired_iou(pred, boxes)  # no positive is among the ignored
                cls.append(
                    self.searched_cls(logits[valid], labels[valid], pos_ious=ious, avg_factor=count)
                )
            if self.searched_reg is not None:
                reg.append(self.searched_reg(pred, boxes, avg_factor=count))
        if cls:
            losses["classification"] = torch.stack(cls).mean()
        if reg:
            losses["bbox_regression"] = torch.stack(reg).mean()
        return losses


class _RoIHeads(RoIHeads):
    searched_cls: ExpressionLoss | None
    searched_reg: ExpressionLoss | None

    def select_training_samples(self, proposals: list[Tensor], targets: Targets) -> Any:
        sampled = super().select_training_samples(proposals, targets)
        self._sampled = sampled[0]
        return sampled

    def forward(self, *arguments: Any, **named: Any) -> Any:
        # The library's own forward pass, as it is, with our function under the name of its loss's.
        own = RoIHeads.forward
        scope = {**own.__globals__, "fastrcnn_loss": self._losses}
        return FunctionType(own.__code__, scope, "forward", own.__defaults__)(
            self, *arguments, **named
        )

    def _losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Classification and box loss; (N, C+1) logits, (N, 4 (C+1)) deltas, background first."""
        defaults = RoIHeads.forward.__globals__["fastrcnn_loss"]
        losses = defaults(logits, deltas, labels, regression_targets)
        label = torch.cat(labels)
        rows = label.nonzero()[:, 0]
        places = torch.cat(self._sampled)[rows]
        own = in_single(deltas.reshape(len(deltas), -1, 4)[rows, label[rows]])
        pred = self.box_coder.decode_single(own, places).reshape(-1, 4)
        aims = in_single(torch.cat(regression_targets)[rows])
        boxes = self.box_coder.decode_single(aims, places).reshape(-1, 4)
        cls, reg = losses
        if self.searched_cls is not None:
            background = logits.shape[1] - 1
            cls = self.searched_cls(
                logits.roll(-1, dims=1),
                torch.where(label == 0, background, label - 1),
                pos_ious=paired_iou(pred, boxes),
            )
        if self.searched_reg is not None:
            reg = self.searched_reg(pred, boxes, avg_factor=max(1, len(label)))
        return cls, reg


def _assigned(targets: Targets, matched: list[Tensor], background: int) -> tuple[Tensor, Tensor]:
    """The label of each location of all images, ``background`` where it has none, and its box.

    Shapes (N,) and (N, 4); the boxes of locations without a label are meaningless.
    """
    labels, boxes = [], []
    for target, places in zip(targets, matched, strict=True):
        positive = places >= 0
        label = places.new_full(places.shape, background)
        box = target["boxes"].new_zeros((len(places), 4))
        label[positive] = target["labels"][places[positive]]
        box[positive] = target["boxes"][places[positive]]
        labels.append(label)
        boxes.append(box)
    return torch.cat(labels), torch.cat(boxes)
