"""From predictions and targets to a formula's variables, and from its values to a loss.

An exported loss carries the sources of these functions, as it does the operator table's: each uses
nothing but ``torch``, and no annotations, so that the text runs wherever PyTorch does. Shapes: N
samples, C classes, P boxes.
"""

import torch


def two_stage_variables(pred, target, pos_ious):
    """X (N, C+1) logits, Y its one-hot labels, Z the IoU of each positive (1 in other rows); no
    IoUs count as 1."""
    pred = pred if pred.dtype == torch.float64 else pred.float()
    label = (target[:, None] == torch.arange(pred.shape[1], device=target.device)).to(pred.dtype)
    quality = pred.new_ones(pred.shape[0])
    if pos_ious is not None:
        positive = (target >= 0) & (target < pred.shape[1] - 1)
        quality = quality.masked_scatter(positive, pos_ious.detach().to(pred.dtype).clamp(min=1e-7))
    return pred, label, quality[:, None].expand_as(pred)


def one_stage_variables(pred, target, pos_ious):
    """X (N, C) logits, Q the IoU where an element is its row's label and else 0, PY the binary
    labels, NY = 1 - PY."""
    pred = pred if pred.dtype == torch.float64 else pred.float()
    label = (target[:, None] == torch.arange(pred.shape[1], device=target.device)).to(pred.dtype)
    quality = label
    if pos_ious is not None:
        positive = (target >= 0) & (target < pred.shape[1])
        ious = pos_ious.detach().to(pred.dtype).clamp(min=1e-7)
        quality = label * pred.new_ones(pred.shape[0]).masked_scatter(positive, ious)[:, None]
    return pred, quality, label, 1 - label


def box_variables(pred, target):
    """U, I, E (P,) areas of union, intersection and smallest enclosing box of boxes x1 y1 x2 y2."""
    pred, target = (
        boxes if boxes.dtype == torch.float64 else boxes.float() for boxes in (pred, target)
    )
    inner = (
        torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])
    ).clamp(min=0)
    outer = (
        torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    ).clamp(min=0)
    overlap = inner[:, 0] * inner[:, 1]
    ours, theirs = (
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (pred, target)
    )
    return ours + theirs - overlap + 1e-7, overlap, outer[:, 0] * outer[:, 1] + 1e-7


def two_stage_loss(value, pred, target, alpha, weight):
    """(N,) a formula's values summed over the class axis, and weighted."""
    loss = value.sum(-1).expand(pred.shape[0])
    return loss if weight is None else loss * weight


def one_stage_loss(value, pred, target, alpha, weight):
    """(N, C) values weighted by alpha at labels and 1 - alpha elsewhere, and by (N,), (N, C) or
    (N*C,) weights."""
    loss = value.expand_as(pred)
    if alpha is not None:
        label = target[:, None] == torch.arange(pred.shape[1], device=target.device)
        loss = loss * (1 - alpha + (2 * alpha - 1) * label.to(loss.dtype))
    if weight is not None:
        loss = loss * (
            weight[:, None] if weight.shape == target.shape else weight.reshape(pred.shape)
        )
    return loss


def box_loss(value, pred, target, alpha, weight):
    """(P,) a formula's values weighted by (P,) weights, or by the row means of (P, 4) ones."""
    loss = value.expand(pred.shape[0])
    if weight is not None:
        loss = loss * (weight.mean(-1) if weight.dim() > 1 else weight)
    return loss


def loss_scale(count, avg_factor, reduction):
    """What a sum over ``count`` elements is multiplied by: 1 for "sum"; for "mean" one over
    ``avg_factor`` or the count."""
    if reduction == "sum":
        return 1.0
    return (
        1.0 / max(count, 1) if avg_factor is None else 1.0 / (avg_factor + 1.1920928955078125e-07)
    )
