"""From predictions and targets to a formula's variables, and from its values to a loss.

An exported loss carries the sources of these functions, as it does the operator table's: each uses
nothing but ``torch``, so that the text runs wherever PyTorch does; the types are
those that ``torch.jit.script`` asks for. Shapes: N samples, C classes, P boxes.
"""

import torch
from torch import Tensor


def two_stage_variables(pred, target, pos_ious: Tensor | None):
    """X (N, C+1) logits, Y its one-hot labels, Z the IoU of each positive (1 in other rows); no
    IoUs count as 1."""
    pred = pred if pred.dtype == torch.float64 else pred.float()
    label = (target[:, None] == torch.arange(pred.shape[1], device=target.device)).to(pred.dtype)
    quality = torch.ones_like(pred[:, 0])
    if pos_ious is not None:
        positive = (target >= 0) & (target < pred.shape[1] - 1)
        quality = quality.masked_scatter(positive, pos_ious.detach().to(pred.dtype).clamp(min=1e-7))
    return pred, label, quality[:, None].expand_as(pred)


def one_stage_variables(pred, target, pos_ious: Tensor | None):
    """X (N, C) logits, Q the IoU where an element is its row's label and else 0, PY the binary
    labels, NY = 1 - PY."""
    pred = pred if pred.dtype == torch.float64 else pred.float()
    label = (target[:, None] == torch.arange(pred.shape[1], device=target.device)).to(pred.dtype)
    quality = label
    if pos_ious is not None:
        positive = (target >= 0) & (target < pred.shape[1])
        ious = pos_ious.detach().to(pred.dtype).clamp(min=1e-7)
        quality = label * torch.ones_like(pred[:, 0]).masked_scatter(positive, ious)[:, None]
    return pred, quality, label, 1 - label


def box_variables(pred, target, stable: bool):
    """U, I, E (P,) areas of union, intersection and smallest enclosing box of boxes x1 y1 x2 y2.

    U and E are at least 1e-7, and I at least a millionth of U; not ``stable``: as released, with
    1e-7 added to U and E.
    """
    pred = pred if pred.dtype == torch.float64 else pred.float()
    target = target if target.dtype == torch.float64 else target.float()
    inner = torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])
    outer = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    ours, theirs = pred[:, 2:] - pred[:, :2], target[:, 2:] - target[:, :2]
    inner, outer = inner.clamp(min=0), outer.clamp(min=0)
    overlap = inner[:, 0] * inner[:, 1]
    around = outer[:, 0] * outer[:, 1]
    union = ours[:, 0] * ours[:, 1] + theirs[:, 0] * theirs[:, 1] - overlap
    if stable:
        union = union.clamp(min=1e-7)
        return union, torch.maximum(overlap, 1e-6 * union), around.clamp(min=1e-7)
    return union + 1e-7, overlap, around + 1e-7


def two_stage_loss(value, pred, target, alpha: float | None, weight: Tensor | None):
    """(N,) a formula's values summed over the class axis, 0 where the label is negative, and
    weighted by (N,) or (N, 1) weights."""
    loss = value.sum(-1).expand(pred.shape[0]).masked_fill(target < 0, 0.0)
    return loss if weight is None else loss * weight.reshape(-1)


def one_stage_loss(value, pred, target, alpha: float | None, weight: Tensor | None):
    """(N, C) values, 0 where the label is negative, weighted by alpha at labels and 1 - alpha
    elsewhere, and by (N,), (N, 1), (N, C) or (N*C,) weights."""
    loss = value.expand_as(pred).masked_fill((target < 0)[:, None], 0.0)
    if alpha is not None:
        label = target[:, None] == torch.arange(pred.shape[1], device=target.device)
        loss = loss * (1 - alpha + (2 * alpha - 1) * label.to(loss.dtype))
    if weight is not None:
        whole = weight.numel() == pred.numel()
        loss = loss * (weight.reshape(pred.shape) if whole else weight.reshape(-1, 1))
    return loss


def box_loss(value, pred, target, alpha: float | None, weight: Tensor | None):
    """(P,) a formula's values weighted by (P,) or (P, 1) weights, or by the row means of (P, 4)
    ones."""
    loss = value.expand(pred.shape[0])
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss = loss * (weight.mean(-1) if weight.dim() > 1 else weight)
    return loss


def reduced(loss, avg_factor: float | Tensor | None, reduction: str):
    """The loss of each element, their sum, or their sum over ``avg_factor`` or, without one, over
    their number; of nothing 0."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if avg_factor is None:
        return loss.sum() / max(loss.numel(), 1)
    if isinstance(avg_factor, Tensor):
        return loss.sum() / (avg_factor.to(loss.dtype) + 1.1920928955078125e-07)
    return loss.sum() / (avg_factor + 1.1920928955078125e-07)
