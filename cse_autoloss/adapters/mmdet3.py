"""Searched losses in MMDetection 3.x, and heads that tell the classification loss the IoU of each
positive's predicted box with its target.

    custom_imports = dict(imports=["cse_autoloss.adapters.mmdet3"], allow_failed_imports=False)
    loss_cls = dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="two_stage_cls")

In FCOS and ATSS that IoU, without gradient, also is the centerness target, the weight of the
regression loss and, summed, its avg_factor. As in CSE-Autoloss (ICLR 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead
from mmdet.models.losses import accuracy
from mmdet.models.roi_heads.bbox_heads import (
    BBoxHead,
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmdet.utils import reduce_mean
from torch import Tensor

from cse_autoloss.losses import build_loss, needs

MODELS.register_module(name="SearchedLoss", module=build_loss)


@torch.no_grad()
def aligned_ious(boxes: Any, targets: Any) -> Tensor:
    """(P,) IoU of (P, 4) boxes with their targets, in [1e-7, 1], without gradient."""
    return bbox_overlaps(get_box_tensor(boxes), get_box_tensor(targets), is_aligned=True).clamp(
        min=1e-7
    )


class IoUAware(BBoxHead):
    """Mixed into a BBoxHead: hands ``loss_cls`` the IoU of each positive's predicted box with its
    target."""

    def loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: Tensor | None,
        rois: Any,
        labels: Any,
        label_weights: Any,
        bbox_targets: Any,
        bbox_weights: Any,
        reduction_override: Any = None,
    ) -> dict[str, Tensor]:
        """As ``BBoxHead.loss``, with the same arguments."""
        targets = (labels, label_weights, bbox_targets, bbox_weights, reduction_override)
        if (
            cls_score is None
            or cls_score.numel() == 0
            or bbox_pred is None
            or not needs(self.loss_cls, "pos_ious")
        ):
            return super().loss(cls_score, bbox_pred, rois, *targets)
        losses = dict(
            loss_cls=self.loss_cls(
                cls_score,
                labels,
                weight=label_weights,
                avg_factor=max((label_weights > 0).sum().item(), 1.0),
                reduction_override=reduction_override,
                pos_ious=self.pos_ious(bbox_pred, rois, labels, bbox_targets),
            ),
            acc=accuracy(cls_score, labels),
        )
        losses.update(super().loss(None, bbox_pred, rois, *targets))
        return losses

    @torch.no_grad()
    def pos_ious(
        self, bbox_pred: Tensor, rois: Tensor, labels: Tensor, bbox_targets: Tensor
    ) -> Tensor:
        """(positives,) IoUs of predicted boxes, each of its own class, with their targets."""
        positive = (labels >= 0) & (labels < self.num_classes)
        boxes, deltas, targets = rois[positive, 1:], bbox_pred[positive], bbox_targets[positive]
        if not self.reg_class_agnostic:
            deltas = deltas.view(len(deltas), self.num_classes, 4)[
                torch.arange(len(deltas)), labels[positive]
            ]
        if not self.reg_decoded_bbox:
            targets = self.bbox_coder.decode(boxes, targets)
        return aligned_ious(self.bbox_coder.decode(boxes, deltas), targets)


@MODELS.register_module()
class IoUAwareConvFCBBoxHead(IoUAware, ConvFCBBoxHead):
    pass


@MODELS.register_module()
class IoUAwareShared2FCBBoxHead(IoUAware, Shared2FCBBoxHead):
    pass


@MODELS.register_module()
class IoUAwareShared4Conv1FCBBoxHead(IoUAware, Shared4Conv1FCBBoxHead):
    pass


def rows(level: Tensor, width: int) -> Tensor:
    """(images, anchors * width, H, W) to (images * H * W * anchors, width)."""
    return level.permute(0, 2, 3, 1).reshape(-1, width)


@MODELS.register_module()
class IoUAwareFCOSHead(FCOSHead):
    def loss_by_feat(
        self,
        cls_scores: Any,
        bbox_preds: Any,
        centernesses: Any,
        batch_gt_instances: Any,
        batch_img_metas: Any,
        batch_gt_instances_ignore: Any = None,
    ) -> dict[str, Tensor]:
        """As ``FCOSHead.loss_by_feat``, with the same arguments."""
        sizes = [scores.shape[-2:] for scores in cls_scores]
        points = self.prior_generator.grid_priors(
            sizes, dtype=bbox_preds[0].dtype, device=bbox_preds[0].device
        )
        labels, targets = (
            torch.cat(levels) for levels in self.get_targets(points, batch_gt_instances)
        )
        points = torch.cat([level.repeat(len(batch_gt_instances), 1) for level in points])
        scores, deltas, centerness = (
            torch.cat([rows(level, width) for level in levels])
            for levels, width in (
                (cls_scores, self.cls_out_channels),
                (bbox_preds, 4),
                (centernesses, 1),
            )
        )
        positive = ((labels >= 0) & (labels < self.num_classes)).nonzero()[:, 0]
        boxes = self.bbox_coder.decode(points[positive], deltas[positive])
        target_boxes = self.bbox_coder.decode(points[positive], targets[positive])
        ious = aligned_ious(boxes, target_boxes)
        count = max(reduce_mean(torch.tensor(float(len(positive)), device=scores.device)), 1.0)
        total_iou = max(reduce_mean(ious.sum()), 1e-6)
        extra = dict(pos_ious=ious) if needs(self.loss_cls, "pos_ious") else {}
        losses = dict(loss_cls=self.loss_cls(scores, labels, avg_factor=count, **extra))
        if len(positive):
            losses["loss_bbox"] = self.loss_bbox(
                boxes, target_boxes, weight=ious, avg_factor=total_iou
            )
            losses["loss_centerness"] = self.loss_centerness(
                centerness[positive, 0], ious, avg_factor=count
            )
        else:
            losses["loss_bbox"] = deltas[positive].sum()
            losses["loss_centerness"] = centerness[positive].sum()
        return losses


@MODELS.register_module()
class IoUAwareATSSHead(ATSSHead):
    def loss_by_feat_single(
        self,
        anchors: Any,
        cls_score: Tensor,
        bbox_pred: Tensor,
        centerness: Any,
        labels: Any,
        label_weights: Any,
        bbox_targets: Any,
        avg_factor: Any,
    ) -> tuple[Tensor, ...]:
        """As ``ATSSHead.loss_by_feat_single``, with the same arguments, of one level."""
        scores, deltas = rows(cls_score, self.cls_out_channels), rows(bbox_pred, 4)
        centerness = rows(centerness, 1)
        labels = labels.reshape(-1)
        positive = ((labels >= 0) & (labels < self.num_classes)).nonzero()[:, 0]
        boxes = self.bbox_coder.decode(anchors.reshape(-1, 4)[positive], deltas[positive])
        targets = bbox_targets.reshape(-1, 4)[positive]
        ious = aligned_ious(boxes, targets)
        extra = dict(pos_ious=ious) if needs(self.loss_cls, "pos_ious") else {}
        loss_cls = self.loss_cls(
            scores, labels, weight=label_weights.reshape(-1), avg_factor=avg_factor, **extra
        )
        if len(positive):
            loss_bbox = self.loss_bbox(boxes, targets, weight=ious, avg_factor=1.0)
            loss_centerness = self.loss_centerness(
                centerness[positive, 0], ious, avg_factor=avg_factor
            )
        else:
            loss_bbox, loss_centerness = deltas.sum() * 0, centerness.sum() * 0
        return loss_cls, loss_bbox, loss_centerness, ious.sum()
