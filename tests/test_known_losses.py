"""The known losses equal their published definitions, written down here a second time in torch.

MMDetection's own implementations are held against them in ``detection/test_losses_in_mmdet.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_losses import batch
from torch import Tensor
from torch.nn import functional

from cse_autoloss import load_space
from cse_autoloss.losses import build_loss

Reference = Callable[..., Tensor]

# --- softmax: of logits (N, C+1) and labels (N,), the loss of each row ---


def at_label(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) the label's probability."""
    return torch.softmax(logits, 1)[torch.arange(len(target)), target]


def softmax_brier(logits: Tensor, target: Tensor) -> Tensor:
    label = functional.one_hot(target, logits.shape[1])
    return (torch.softmax(logits, 1) - label).square().sum(1)


TWO_STAGE: dict[str, Reference] = {
    "CrossEntropy": lambda x, t: functional.cross_entropy(x, t, reduction="none"),
    "Focal": lambda x, t: -((1 - at_label(x, t)) ** 2) * at_label(x, t).log(),
    "Poly-1": lambda x, t: -at_label(x, t).log() + (1 - at_label(x, t)),
    "Poly-1-Minus": lambda x, t: -at_label(x, t).log() - (1 - at_label(x, t)),
    "GCE": lambda x, t: (1 - at_label(x, t) ** 0.5) / 0.5,
    "Brier": softmax_brier,
}

# --- sigmoid: of probabilities p, labels y and IoUs q at labels, all (N, C), the loss of each
# element as published, and what the space's loss is of it ---


def varifocal(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    entropy = functional.binary_cross_entropy(p, q, reduction="none")
    return torch.where(y > 0, q, 0.75 * p**2) * entropy


def matchability_aware(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    entropy = functional.binary_cross_entropy(p, q**1.5, reduction="none")
    return torch.where(y > 0, 1.0, p**1.5) * entropy


def focal(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    certainty = torch.where(y > 0, p, 1 - p)
    return -torch.where(y > 0, 0.25, 0.75) * (1 - certainty) ** 2 * certainty.log()


def poly_focal(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    certainty = torch.where(y > 0, p, 1 - p)
    return focal(p, y, q) + torch.where(y > 0, 0.25, 0.75) * (1 - certainty) ** 3


def quality_focal(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return (q - p).abs() ** 2 * functional.binary_cross_entropy(p, q, reduction="none")


ONE_STAGE: dict[str, tuple[float, Reference]] = {
    "Focal": (1.0, focal),
    "QualityFocal": (0.75, quality_focal),
    "BCE": (0.75, lambda p, y, q: functional.binary_cross_entropy(p, y, reduction="none")),
    "Varifocal": (1.0, varifocal),
    "MAL": (0.75, matchability_aware),
    "Poly-1": (1.0, poly_focal),
    "GCE": (0.75, lambda p, y, q: (1 - torch.where(y > 0, p, 1 - p) ** 0.5) / 0.5),
    "Brier": (0.75, lambda p, y, q: (p - y) ** 2),
}

# --- boxes (P, 4) ---


def paired_iou(pred: Tensor, target: Tensor) -> Tensor:
    inner = torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])
    overlap = inner.clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (pred, target)]
    return overlap / (areas[0] + areas[1] - overlap)


REG: dict[str, Reference] = {
    "IoU": lambda pred, target: -paired_iou(pred, target).log(),
    "LinearIoU": lambda pred, target: 1 - paired_iou(pred, target),
    "Alpha-IoU": lambda pred, target: 1 - paired_iou(pred, target) ** 3,
    "SquareIoU": lambda pred, target: 1 - paired_iou(pred, target) ** 2,
}


def compare(name: str, space: str, published: Callable[[Tensor], Tensor], **arguments) -> None:
    """Values of each element and gradients of their sum, to 1e-5 of the largest."""
    pred = arguments.pop("pred")
    leaf, twin = pred.clone().requires_grad_(), pred.double().requires_grad_()
    loss = build_loss(name, space)
    loss(leaf, **arguments, reduction_override="sum").backward()
    right = published(twin)
    right.sum().backward()
    with torch.no_grad():
        found = loss(pred, **arguments, reduction_override="none")
    assert found.shape == right.shape
    assert (found - right).abs().max() <= 1e-5 * right.abs().max()
    assert (leaf.grad - twin.grad).abs().max() <= 1e-5 * twin.grad.abs().max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stage_losses_are_as_published(name: str, seed: int) -> None:
    arguments = batch("two_stage_cls", seed)
    compare(name, "two_stage_cls", lambda x: TWO_STAGE[name](x, arguments["target"]), **arguments)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_losses_are_as_published(name: str, seed: int) -> None:
    arguments = batch("one_stage_cls", seed)
    factor, reference = ONE_STAGE[name]
    target = arguments["target"]
    label = functional.one_hot(target, 8)[:, :7].double()
    quality = torch.zeros_like(label)
    quality[target < 7] = label[target < 7] * arguments["pos_ious"].double()[:, None]
    compare(
        name,
        "one_stage_cls",
        lambda x: factor * reference(torch.sigmoid(x), label, quality),
        **arguments,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", REG)
def test_box_losses_are_as_published(name: str, seed: int) -> None:
    arguments = batch("reg", seed)
    compare(name, "reg", lambda x: REG[name](x, arguments["target"].double()), **arguments)


def test_every_known_loss_is_held_against_its_definition() -> None:
    """Here, or against MMDetection or the released code (whose names begin with CSE-Autoloss)."""
    for space, here in (("two_stage_cls", TWO_STAGE), ("one_stage_cls", ONE_STAGE), ("reg", REG)):
        names = {name for name in load_space(space).losses if not name.startswith("CSE-Autoloss")}
        assert names - {"GIoU"} == set(here)
