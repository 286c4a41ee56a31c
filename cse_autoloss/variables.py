"""From a formula's values to a loss: what is weighted, summed and divided by what.

An exported loss carries the sources of these functions, as it does the operator table's: each uses
nothing but ``torch``, so that the text runs wherever PyTorch does; the types are
those that ``torch.jit.script`` asks for. Shapes: N samples, C classes, P boxes.
"""

import torch
from torch import Tensor


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
        return loss.sum() / (avg_factor.to(loss.dtype).reshape(()) + 1.1920928955078125e-07)
    return loss.sum() / (avg_factor + 1.1920928955078125e-07)
