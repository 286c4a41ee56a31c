"""More heads of mmdet that hand the classification loss the IoU of each positive's predicted box
with its target, and what else :mod:`detectors.configure` says of them.

With mmdet's own losses they are mmdet's heads. GFL and YOLOX teach their own classification loss an
IoU as the score itself; a loss of ours gets labels there, and that IoU beside them. GFL's
distribution focal loss, PAA's IoU branch, YOLOX's objectness and SABL's bucketed regression stay
what they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from mmcv.runner import force_fp32
from mmdet.models import HEADS
from mmdet.models.dense_heads import GFLHead, PAAHead, RetinaHead, YOLOXHead
from mmdet.models.dense_heads.paa_head import levels_to_images
from mmdet.models.roi_heads.bbox_heads import DoubleConvFCBBoxHead, SABLHead
from torch import Tensor, nn

from detectors.heads.one_stage import of_anchors
from detectors.heads.rows import aligned_ious, positives, rows_of
from detectors.heads.seeing import SeesImages, SeesImagesOfLoss
from detectors.heads.two_stage import IoUAware
from detectors.losses import handing_over, wants_pos_ious


@HEADS.register_module()
class IoUAwareDoubleConvFCBBoxHead(IoUAware, DoubleConvFCBBoxHead):
    """Double-Head R-CNN's head with the IoU of each positive handed to the classification loss."""


@HEADS.register_module()
class IoUAwareSABLHead(SeesImages, SABLHead):
    """SABL's R-CNN head; the IoUs are of the boxes that its buckets and offsets mean."""

    def loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: tuple[Tensor, Tensor] | None,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: tuple[Tensor, Tensor],
        bbox_weights: tuple[Tensor, Tensor],
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """As ``mmdet.models.roi_heads.SABLHead.loss``, with the same arguments."""

        images = rois[:, 0].long()

        def rows() -> Tensor:
            return positives(labels, self.num_classes)

        def decoded(encoded: tuple[Tensor, Tensor]) -> Tensor:
            parts = tuple(part.detach()[rows()] for part in encoded)
            return self.bbox_coder.decode(rois[rows(), 1:], parts)[0]

        given = self.seen(
            roi_ious=lambda seen: seen.nearest_ious(rois[:, 1:], images),
            pos_areas=lambda seen: seen.shares(decoded(bbox_targets), images[rows()]),
        )
        if bbox_pred is not None:
            given["pos_ious"] = lambda *_: aligned_ious(decoded(bbox_pred), decoded(bbox_targets))
        targets = (labels, label_weights, bbox_targets, bbox_weights, reduction_override)
        with handing_over(self.loss_cls, image_ids=lambda *_: images, **given):
            return super().loss(cls_score, bbox_pred, rois, *targets)


@HEADS.register_module()
class IoUAwareRetinaHead(SeesImagesOfLoss, RetinaHead):
    """RetinaNet's head. A loss on decoded boxes sees those of positives alone: boxes of other
    anchors have no target."""

    def loss_single(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        anchors: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        num_total_samples: float,
    ) -> tuple[Tensor, Tensor]:
        """As ``mmdet.models.RetinaHead.loss_single``, with the same arguments, of one level."""
        flat = labels.reshape(-1)
        rows = positives(flat, self.num_classes)
        deltas, boxes = rows_of(bbox_pred, 4)[rows], anchors.reshape(-1, 4)[rows]
        targets = bbox_targets.reshape(-1, 4)[rows]

        def true_boxes() -> Tensor:
            return targets if self.reg_decoded_bbox else self.bbox_coder.decode(boxes, targets)

        def pos_ious(_scores: Tensor, _labels: Tensor) -> Tensor:
            return aligned_ious(self.bbox_coder.decode(boxes, deltas.detach()), true_boxes())

        for_cls, for_reg = of_anchors(self, anchors, rows, true_boxes)
        with handing_over(self.loss_cls, pos_ious=pos_ious, **for_cls):
            loss_cls = self.loss_cls(
                rows_of(cls_score, self.cls_out_channels),
                flat,
                label_weights.reshape(-1),
                avg_factor=num_total_samples,
            )
        if not len(rows):
            return loss_cls, bbox_pred.sum() * 0
        predicted = self.bbox_coder.decode(boxes, deltas) if self.reg_decoded_bbox else deltas
        weights = bbox_weights.reshape(-1, 4)[rows]
        with handing_over(self.loss_bbox, **for_reg):
            loss_bbox = self.loss_bbox(predicted, targets, weights, avg_factor=num_total_samples)
        return loss_cls, loss_bbox


@HEADS.register_module()
class IoUAwareGFLHead(SeesImagesOfLoss, GFLHead):
    """GFL's head. The boxes that its regression loss sees are in units of the level's stride, as
    they are in mmdet, and so are the images' sizes."""

    def loss_single(
        self,
        anchors: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        stride: tuple[int, int],
        num_total_samples: float,
    ) -> tuple[Tensor, ...]:
        """As ``mmdet.models.GFLHead.loss_single``, with the same arguments, of one level."""
        rows = positives(labels.reshape(-1), self.num_classes)
        targets = bbox_targets.reshape(-1, 4)[rows]
        for_cls, for_reg = of_anchors(self, anchors, rows, lambda: targets, stride[0])
        arguments = (cls_score, bbox_pred, labels, label_weights, bbox_targets, stride)
        with contextlib.ExitStack() as stack:
            stack.enter_context(handing_over(self.loss_bbox, **for_reg))
            if wants_pos_ious(self.loss_cls):
                stack.enter_context(handing_over(self.loss_cls, **for_cls))
                hook = self.loss_cls.register_forward_pre_hook(
                    self._labels_and_ious, with_kwargs=True
                )
                stack.callback(hook.remove)
            return super().loss_single(anchors, *arguments, num_total_samples)

    def _labels_and_ious(self, _loss: nn.Module, args: Any, kwargs: Any) -> Any:
        """In place of (labels, score), as quality focal loss has it."""
        pred, (labels, score) = args
        ious = score[positives(labels, self.num_classes)]
        return (pred, labels), {**kwargs, "pos_ious": ious}


@HEADS.register_module()
class IoUAwarePAAHead(PAAHead):
    """PAA's head; anchors compete for an object by losses that know the IoU, too."""

    @force_fp32(apply_to=("cls_scores", "bbox_preds", "iou_preds"))
    def loss(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        iou_preds: list[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """As ``mmdet.models.PAAHead.loss``, with the same arguments."""
        deltas = torch.cat([image.reshape(-1, 4) for image in levels_to_images(bbox_preds)])

        def pos_ious(_scores: Tensor, labels: Tensor) -> Tensor:
            rows = positives(labels, self.num_classes)
            return self._decoded_ious(
                self._anchors[rows], deltas.detach()[rows], self._targets[rows]
            )

        with handing_over(self.loss_cls, pos_ious=pos_ious):
            return super().loss(cls_scores, bbox_preds, iou_preds, *args, **kwargs)

    def get_targets(self, anchor_list: list[list[Tensor]], *args: Any, **kwargs: Any) -> Any:
        """As ``mmdet.models.PAAHead.get_targets``; anchors and boxes are kept for the IoUs."""
        targets = super().get_targets(anchor_list, *args, **kwargs)
        self._anchors = torch.cat([torch.cat(levels) for levels in anchor_list])
        self._targets = torch.cat(targets[2])
        return targets

    def get_pos_loss(
        self,
        anchors: list[Tensor],
        cls_score: Tensor,
        bbox_pred: Tensor,
        label: Tensor,
        label_weight: Tensor,
        bbox_target: Tensor,
        bbox_weight: Tensor,
        pos_inds: Tensor,
    ) -> tuple[Tensor]:
        """As ``mmdet.models.PAAHead.get_pos_loss``, with the same arguments, of one image."""

        def pos_ious(_scores: Tensor, _labels: Tensor) -> Tensor:
            boxes = torch.cat(anchors)[pos_inds]
            return self._decoded_ious(boxes, bbox_pred.detach()[pos_inds], bbox_target[pos_inds])

        with handing_over(self.loss_cls, pos_ious=pos_ious):
            return super().get_pos_loss(
                *(anchors, cls_score, bbox_pred, label),
                *(label_weight, bbox_target, bbox_weight, pos_inds),
            )

    def _decoded_ious(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> Tensor:
        return aligned_ious(self.bbox_coder.decode(anchors, deltas), targets)


@HEADS.register_module()
class IoUAwareYOLOXHead(YOLOXHead):
    """YOLOX's head, whose classification loss sees positives alone."""

    def loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As ``mmdet.models.YOLOXHead.loss``, with the same arguments."""
        if not wants_pos_ious(self.loss_cls):
            return super().loss(*args, **kwargs)
        hook = self.loss_cls.register_forward_pre_hook(self._labels_and_ious, with_kwargs=True)
        try:
            return super().loss(*args, **kwargs)
        finally:
            hook.remove()

    def _labels_and_ious(self, _loss: nn.Module, args: Any, kwargs: Any) -> Any:
        """In place of the IoU in the label's column. Where a box misses its object altogether that
        column is 0 as any other, and nobody knows the label: such a positive is left out."""
        pred, target = args
        known = target.sum(dim=1) > 0
        labels = target[known].argmax(dim=1)
        return (pred[known], labels), {**kwargs, "pos_ious": target[known].sum(dim=1)}
