"""FCOS and ATSS heads in which the IoU of each positive's predicted box with its target stands for
its centerness.

As in the released CSE-Autoloss: that IoU, without gradient, is the target of the centerness branch,
the weight of the regression loss and, summed, its ``avg_factor``; a classification loss that wants
it gets it as ``pos_ious``. All else is mmdet's, and so are the values of any mmdet loss in these
heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmcv.runner import force_fp32
from mmdet.core import reduce_mean
from mmdet.models import HEADS
from mmdet.models.dense_heads import ATSSHead, FCOSHead
from torch import Tensor

from cse_autoloss.inputs import area_of, box_sides
from detectors.heads.rows import aligned_ious, images_of, positives, rows_of
from detectors.heads.seeing import Images, SeesImages, SeesImagesOfLoss
from detectors.losses import handing_over


@HEADS.register_module()
class IoUAwareFCOSHead(FCOSHead):
    """mmdet's FCOSHead with the IoU in centerness's place.

    With ``norm_on_bbox`` the boxes that the regression loss sees are in units of the level's
    stride, as they are in mmdet, and so are the images' sizes: it matters to a loss whose value
    depends on the size of boxes.
    """

    @force_fp32(apply_to=("cls_scores", "bbox_preds", "centernesses"))
    def loss(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        centernesses: list[Tensor],
        gt_bboxes: list[Tensor],
        gt_labels: list[Tensor],
        img_metas: list[dict[str, Any]],
        gt_bboxes_ignore: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As ``mmdet.models.FCOSHead.loss``, with the same arguments: a tensor a level, (images,
        channels, H, W)."""
        sizes = [scores.shape[-2:] for scores in cls_scores]
        points = self.prior_generator.grid_priors(
            sizes, dtype=bbox_preds[0].dtype, device=bbox_preds[0].device
        )
        labels, targets = (
            torch.cat(levels) for levels in self.get_targets(points, gt_bboxes, gt_labels)
        )
        places = [len(level) * len(gt_bboxes) for level in points]
        points = torch.cat([level.repeat(len(gt_bboxes), 1) for level in points])
        scores, deltas, centerness = (
            torch.cat([rows_of(level, width) for level in levels])
            for levels, width in (
                (cls_scores, self.cls_out_channels),
                (bbox_preds, 4),
                (centernesses, 1),
            )
        )
        rows = positives(labels, self.num_classes)
        boxes = self.bbox_coder.decode(points[rows], deltas[rows])
        target_boxes = self.bbox_coder.decode(points[rows], targets[rows])
        ious = aligned_ious(boxes, target_boxes)
        count = max(reduce_mean(torch.tensor(float(len(rows)), device=scores.device)), 1.0)
        # Asked of every process, also of one without positives
        total_iou = max(reduce_mean(ious.sum()), 1e-6)
        images = torch.cat([images_of(level) for level in cls_scores])

        def image_sizes(*_: Tensor) -> Tensor:
            of_images = Images.of(img_metas, gt_bboxes).sizes[images[rows]]
            if not self.norm_on_bbox:
                return of_images
            strides = of_images.new_tensor(self.strides).repeat_interleave(
                torch.tensor(places, device=of_images.device)
            )
            return of_images / strides[rows, None]

        with handing_over(
            self.loss_cls,
            pos_ious=lambda *_: ious,
            image_ids=lambda *_: images,
            pos_areas=lambda *_: area_of(box_sides(target_boxes)) / area_of(image_sizes()),
        ):
            losses = {"loss_cls": self.loss_cls(scores, labels, avg_factor=count)}
        if len(rows):
            with handing_over(self.loss_bbox, image_sizes=image_sizes):
                losses["loss_bbox"] = self.loss_bbox(
                    boxes, target_boxes, weight=ious, avg_factor=total_iou
                )
            losses["loss_centerness"] = self.loss_centerness(
                centerness[rows, 0], ious, avg_factor=count
            )
        else:
            losses["loss_bbox"] = deltas[rows].sum()
            losses["loss_centerness"] = centerness[rows].sum()
        return losses


@HEADS.register_module()
class IoUAwareATSSHead(SeesImagesOfLoss, ATSSHead):
    """mmdet's ATSSHead with the IoU in centerness's place."""

    def loss_single(
        self,
        anchors: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        centerness: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        num_total_samples: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``mmdet.models.ATSSHead.loss_single``, with the same arguments, of one level.

        Returns:
            Losses of classification, regression (a sum, which ``loss`` divides) and centerness; the
            sum of the IoUs.
        """
        scores, deltas = rows_of(cls_score, self.cls_out_channels), rows_of(bbox_pred, 4)
        centerness = rows_of(centerness, 1)
        labels = labels.reshape(-1)
        rows = positives(labels, self.num_classes)
        boxes = self.bbox_coder.decode(anchors.reshape(-1, 4)[rows], deltas[rows])
        targets = bbox_targets.reshape(-1, 4)[rows]
        ious = aligned_ious(boxes, targets)
        for_cls, for_reg = of_anchors(self, anchors, rows, lambda: targets)
        with handing_over(self.loss_cls, pos_ious=lambda *_: ious, **for_cls):
            loss_cls = self.loss_cls(
                scores, labels, weight=label_weights.reshape(-1), avg_factor=num_total_samples
            )
        if len(rows):
            with handing_over(self.loss_bbox, **for_reg):
                loss_bbox = self.loss_bbox(boxes, targets, weight=ious, avg_factor=1.0)
            loss_centerness = self.loss_centerness(
                centerness[rows, 0], ious, avg_factor=num_total_samples
            )
        else:
            loss_bbox, loss_centerness = deltas.sum() * 0, centerness.sum() * 0
        return loss_cls, loss_bbox, loss_centerness, ious.sum()


def of_anchors(
    head: SeesImages,
    anchors: Tensor,
    rows: Tensor,
    targets: Callable[[], Tensor],
    unit: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a level's losses may need beside IoUs, for :func:`handing_over`: that of classification
    and that of regression.

    Args:
        anchors: (images, A, 4) boxes in pixels.
        rows: (P,) places of the positives among all anchors.
        targets: gives (P, 4) their target boxes in pixels.
        unit: of the boxes that the regression loss gets, in pixels.
    """
    boxes = anchors.reshape(-1, 4)
    images = torch.arange(len(anchors), device=boxes.device).repeat_interleave(anchors.shape[1])
    for_cls = head.seen(
        roi_ious=lambda seen: seen.nearest_ious(boxes, images),
        pos_areas=lambda seen: seen.shares(targets(), images[rows]),
    )
    for_reg = head.seen(image_sizes=lambda seen: seen.sizes[images[rows]] / unit)
    return {"image_ids": lambda *_: images, **for_cls}, for_reg
