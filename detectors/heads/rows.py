"""Predictions as rows, those of them that are positives, and how well these are localised."""

from __future__ import annotations

import torch
from mmdet.core import bbox_overlaps
from torch import Tensor

from cse_autoloss.inputs import MIN_IOU


def rows_of(level: Tensor, width: int) -> Tensor:
    """(images, anchors * width, H, W) to (images * H * W * anchors, width)."""
    return level.permute(0, 2, 3, 1).reshape(-1, width)


def images_of(level: Tensor) -> Tensor:
    """The image of each row of :func:`rows_of` with one prior at a place."""
    places = level.shape[-2] * level.shape[-1]
    return torch.arange(len(level), device=level.device).repeat_interleave(places)


def positives(labels: Tensor, classes: int) -> Tensor:
    """Rows of labels in 0..classes-1."""
    return ((labels >= 0) & (labels < classes)).nonzero()[:, 0]


@torch.no_grad()
def aligned_ious(boxes: Tensor, targets: Tensor) -> Tensor:
    """(P,) IoU of (P, 4) boxes with their targets, in [1e-7, 1], without gradient."""
    return bbox_overlaps(boxes, targets, is_aligned=True).clamp(min=MIN_IOU)
