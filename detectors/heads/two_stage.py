"""R-CNN heads that hand their losses what these need: the IoU of each positive's predicted box with
its target, and what else ``inputs.EXTRAS`` has.

With losses that need nothing they are mmdet's. Cascade R-CNN has one in each stage; Mask R-CNN has
one beside its masks.
"""

from __future__ import annotations

import torch
from mmcv.runner import force_fp32
from mmdet.models import HEADS
from mmdet.models.losses import accuracy
from mmdet.models.roi_heads.bbox_heads import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from torch import Tensor

from detectors.heads.rows import aligned_ious, positives
from detectors.heads.seeing import SeesImages
from detectors.losses import handing_over, needs


class IoUAware(SeesImages):
    """Mixed into a BBoxHead of mmdet: hands ``loss_cls`` the IoU of each positive's predicted box
    with its target; and the losses what is known of the images where its RoI head shows them."""

    @force_fp32(apply_to=("cls_score", "bbox_pred"))
    def loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: Tensor | None,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """As ``mmdet.models.roi_heads.BBoxHead.loss``, with the same arguments."""
        images = rois[:, 0].long()
        of_positives = self.seen(
            pos_areas=lambda seen: seen.shares(
                self._target_boxes(rois, labels, bbox_targets), images[self._positives(labels)]
            ),
            image_sizes=lambda seen: seen.sizes[images[self._positives(labels)]],
        )
        of_rois = self.seen(roi_ious=lambda seen: seen.nearest_ious(rois[:, 1:], images))
        with (
            handing_over(self.loss_cls, image_ids=lambda *_: images, **of_rois, **of_positives),
            handing_over(self.loss_bbox, **of_positives),
        ):
            return self._loss(
                *(cls_score, bbox_pred, rois, labels, label_weights, bbox_targets, bbox_weights),
                reduction_override,
            )

    def _loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: Tensor | None,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None,
    ) -> dict[str, Tensor]:
        targets = (labels, label_weights, bbox_targets, bbox_weights, reduction_override)
        if (
            cls_score is None
            or cls_score.numel() == 0
            or bbox_pred is None
            or not needs(self.loss_cls, "pos_ious")
        ):
            return super().loss(cls_score, bbox_pred, rois, *targets)
        losses = {
            "loss_cls": self.loss_cls(
                cls_score,
                labels,
                weight=label_weights,
                avg_factor=max((label_weights > 0).sum().item(), 1.0),
                reduction_override=reduction_override,
                pos_ious=self.pos_ious(bbox_pred, rois, labels, bbox_targets),
            ),
            "acc": accuracy(cls_score, labels),
        }
        losses.update(super().loss(None, bbox_pred, rois, *targets))
        return losses

    @torch.no_grad()
    def pos_ious(
        self, bbox_pred: Tensor, rois: Tensor, labels: Tensor, bbox_targets: Tensor
    ) -> Tensor:
        """IoU of each positive's predicted box, of its own class, with its target.

        Args:
            bbox_pred: (N, 4) or (N, 4 * classes) deltas.
            rois: (N, 5), image index and x1 y1 x2 y2 in pixels.
            labels: (N,), background last.
            bbox_targets: (N, 4), boxes if ``reg_decoded_bbox``, deltas otherwise.

        Returns:
            (positives,) in [1e-7, 1], without gradient, in the order of the rows.
        """
        rows = self._positives(labels)
        boxes, deltas = rois[rows, 1:], bbox_pred[rows]
        if not self.reg_class_agnostic:
            deltas = deltas.view(len(deltas), self.num_classes, 4)[
                torch.arange(len(deltas), device=deltas.device), labels[rows]
            ]
        targets = self._target_boxes(rois, labels, bbox_targets)
        return aligned_ious(self.bbox_coder.decode(boxes, deltas), targets)

    def _positives(self, labels: Tensor) -> Tensor:
        return positives(labels, self.num_classes)

    def _target_boxes(self, rois: Tensor, labels: Tensor, bbox_targets: Tensor) -> Tensor:
        """(positives, 4) boxes that the positives should become."""
        rows = self._positives(labels)
        targets = bbox_targets[rows]
        return targets if self.reg_decoded_bbox else self.bbox_coder.decode(rois[rows, 1:], targets)


@HEADS.register_module()
class IoUAwareConvFCBBoxHead(IoUAware, ConvFCBBoxHead):
    """mmdet's ConvFCBBoxHead with the IoU of each positive handed to the classification loss."""


@HEADS.register_module()
class IoUAwareShared2FCBBoxHead(IoUAware, Shared2FCBBoxHead):
    """mmdet's Shared2FCBBoxHead with the IoU of each positive handed to the classification loss."""


@HEADS.register_module()
class IoUAwareShared4Conv1FCBBoxHead(IoUAware, Shared4Conv1FCBBoxHead):
    """mmdet's Shared4Conv1FCBBoxHead with the IoU of each positive handed to the classification
    loss."""
