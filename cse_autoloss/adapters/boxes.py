"""What all adapters need of boxes."""

import torch
from torch import Tensor


def in_single(values: Tensor) -> Tensor:
    """In float32, or as they are in float64: half precision moves a small object by pixels, and
    holds no area of a large one."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def paired_iou(pred: Tensor, target: Tensor) -> Tensor:
    """(P,) IoU of each box with its own target, without a gradient; (P, 4) boxes x1 y1 x2 y2."""
    pred, target = pred.detach(), target.detach()
    top_left = torch.maximum(pred[:, :2], target[:, :2])
    inner = (torch.minimum(pred[:, 2:], target[:, 2:]) - top_left).clamp(min=0)
    overlap = inner.prod(-1)
    ours, theirs = ((box[:, 2:] - box[:, :2]).clamp(min=0).prod(-1) for box in (pred, target))
    return overlap / (ours + theirs - overlap).clamp(min=torch.finfo(overlap.dtype).tiny)
