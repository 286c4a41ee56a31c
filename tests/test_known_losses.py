"""The known losses equal their published definitions, written down here a second time in torch, or
in torch's own functions.

MMDetection's own implementations are held against them in ``detection/test_losses_in_mmdet.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_losses import batch
from torch import Tensor
from torch.nn import functional

from cse_autoloss import load_space
from cse_autoloss.comparison import known_candidates
from cse_autoloss.losses import build_loss

Reference = Callable[..., Tensor]

# --- softmax: of logits (N, C+1) and labels (N,), the loss of each row ---


def at_label(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) the label's probability."""
    return torch.softmax(logits, 1)[torch.arange(len(target)), target]


def softmax_brier(logits: Tensor, target: Tensor, q: Tensor) -> Tensor:
    label = functional.one_hot(target, logits.shape[1])
    return (torch.softmax(logits, 1) - label).square().sum(1)


OBJECTS = torch.tensor([5.0, 700.0, 30.0, 60.0, 1000.0, 2.0, 100.0])  # of each class in training


def class_balanced(logits: Tensor, target: Tensor, q: Tensor) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n), beta e^(-1/m) = 1 - 1/m; a class of m objects weighs 1."""
    counts = torch.cat([OBJECTS, OBJECTS.mean()[None]]).double()
    beta = math.exp(-1 / OBJECTS.mean().item())
    weights = (1 - math.exp(-1)) / (1 - beta**counts)
    return functional.cross_entropy(logits, target, weights, reduction="none")


def logit_adjusted(logits: Tensor, target: Tensor, q: Tensor) -> Tensor:
    prior = torch.cat([OBJECTS / OBJECTS.mean(), torch.ones(1)]).double()
    return functional.cross_entropy(logits + prior.log(), target, reduction="none")


TWO_STAGE: dict[str, Reference] = {
    "CrossEntropy": lambda x, t, q: functional.cross_entropy(x, t, reduction="none"),
    "Focal": lambda x, t, q: -((1 - at_label(x, t)) ** 2) * at_label(x, t).log(),
    "Poly-1": lambda x, t, q: -at_label(x, t).log() + (1 - at_label(x, t)),
    "Poly-1-Minus": lambda x, t, q: -at_label(x, t).log() - (1 - at_label(x, t)),
    "GCE": lambda x, t, q: (1 - at_label(x, t) ** 0.5) / 0.5,
    "Brier": softmax_brier,
    "IoU-Balanced": lambda x, t, q: -(q**1.5) * at_label(x, t).log(),
    "LabelSmoothing": lambda x, t, q: functional.cross_entropy(
        x, t, reduction="none", label_smoothing=0.1
    ),
    "ClassBalanced": class_balanced,
    "LogitAdjusted": logit_adjusted,
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


def iou_aware(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    aim = torch.where(y > 0, (p**0.25 * q**0.75).detach(), 0.0)
    entropy = -aim * p.log() - (1 - aim) * (1 - p).log()
    return torch.where(y > 0, 1.0, p**2) * entropy


def asymmetric(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    shifted = (p - 0.05).clamp(min=0)
    return torch.where(y > 0, -p.log(), -(shifted**4) * (1 - shifted).log())


ONE_STAGE: dict[str, tuple[float, Reference]] = {
    "Focal": (1.0, focal),
    "QualityFocal": (0.75, quality_focal),
    "BCE": (0.75, lambda p, y, q: functional.binary_cross_entropy(p, y, reduction="none")),
    "Varifocal": (1.0, varifocal),
    "IoU-Balanced": (
        0.75,
        lambda p, y, q: -torch.where(y > 0, q**1.5 * p.log(), (1 - p).log()),
    ),
    "MAL": (0.75, matchability_aware),
    "Poly-1": (1.0, poly_focal),
    "GCE": (0.75, lambda p, y, q: (1 - torch.where(y > 0, p, 1 - p) ** 0.5) / 0.5),
    "Brier": (0.75, lambda p, y, q: (p - y) ** 2),
    "IA-BCE": (0.75, iou_aware),
    "ASL": (0.75, asymmetric),
}

# --- boxes (P, 4) ---


def paired_iou(pred: Tensor, target: Tensor) -> Tensor:
    inner = torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])
    overlap = inner.clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (pred, target)]
    return overlap / (areas[0] + areas[1] - overlap)


def centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def enclosing(pred: Tensor, target: Tensor) -> Tensor:
    """(P, 2) sides of the smallest box around both."""
    return torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])


def distance_iou(pred: Tensor, target: Tensor) -> Tensor:
    offset = centre_and_size(pred)[0] - centre_and_size(target)[0]
    diagonal = enclosing(pred, target).square().sum(1)
    return 1 - paired_iou(pred, target) + offset.square().sum(1) / diagonal


def complete_iou(pred: Tensor, target: Tensor) -> Tensor:
    (wide, high), (wide_t, high_t) = (centre_and_size(b)[1].unbind(1) for b in (pred, target))
    v = 4 / math.pi**2 * (torch.atan(wide_t / high_t) - torch.atan(wide / high)) ** 2
    alpha = (v / (1 - paired_iou(pred, target) + v)).detach()
    return distance_iou(pred, target) + alpha * v


def efficient_iou(pred: Tensor, target: Tensor) -> Tensor:
    change = centre_and_size(pred)[1] - centre_and_size(target)[1]
    return distance_iou(pred, target) + (change / enclosing(pred, target)).square().sum(1)


def wasserstein(pred: Tensor, target: Tensor) -> Tensor:
    (centre, size), (centre_t, size_t) = centre_and_size(pred), centre_and_size(target)
    squared = (centre - centre_t).square().sum(1) + ((size - size_t) / 2).square().sum(1)
    return 1 - torch.exp(-(squared + 1e-3).sqrt() / 12.8)


IMAGE = (640.0, 480.0)


def point_distance(pred: Tensor, target: Tensor) -> Tensor:
    """IoU, and the squared distances of both corners in squared diagonals of the image."""
    squared = (pred - target).square().sum(1)
    return 1 - paired_iou(pred, target) + squared / (IMAGE[0] ** 2 + IMAGE[1] ** 2)


REG: dict[str, Reference] = {
    "IoU": lambda pred, target: -paired_iou(pred, target).log(),
    "LinearIoU": lambda pred, target: 1 - paired_iou(pred, target),
    "Alpha-IoU": lambda pred, target: 1 - paired_iou(pred, target) ** 3,
    "SquareIoU": lambda pred, target: 1 - paired_iou(pred, target) ** 2,
    "DIoU": distance_iou,
    "CIoU": complete_iou,
    "EIoU": efficient_iou,
    "Focal-EIoU": lambda pred, target: (
        paired_iou(pred, target).sqrt().detach() * efficient_iou(pred, target)
    ),
    "NWD": wasserstein,
    "SmoothL1": lambda pred, target: functional.smooth_l1_loss(pred, target, reduction="none").sum(
        1
    ),
    "MPDIoU": point_distance,
}


def compare(name: str, space: str, published: Callable[[Tensor], Tensor], **arguments) -> None:
    """Values of each element and gradients of their sum, to 1e-5 of the largest (of smooth L1,
    whose corners are put together from centres and sizes in float32, 3e-5)."""
    pred = arguments.pop("pred")
    leaf, twin = pred.clone().requires_grad_(), pred.double().requires_grad_()
    loss = build_loss(name, space)
    loss(leaf, **arguments, reduction_override="sum").backward()
    right = published(twin)
    right.sum().backward()
    with torch.no_grad():
        found = loss(pred, **arguments, reduction_override="none")
    assert found.shape == right.shape
    owed = 3e-5 if name == "SmoothL1" else 1e-5
    assert (found - right).abs().max() <= owed * right.abs().max()
    assert (leaf.grad - twin.grad).abs().max() <= owed * twin.grad.abs().max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stage_losses_are_as_published(name: str, seed: int) -> None:
    arguments = batch("two_stage_cls", seed)
    target = arguments["target"]
    quality = torch.ones(len(target)).double()  # background counts 1
    quality[target < 7] = arguments["pos_ious"].double()
    compare(
        name,
        "two_stage_cls_plus",
        lambda x: TWO_STAGE[name](x, target, quality),
        class_frequency=OBJECTS / OBJECTS.mean(),
        **arguments,
    )


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
        "one_stage_cls_plus",
        lambda x: factor * reference(torch.sigmoid(x), label, quality),
        **arguments,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", REG)
def test_box_losses_are_as_published(name: str, seed: int) -> None:
    arguments = batch("reg", seed)
    sizes = torch.tensor(IMAGE).expand(40, 2)
    compare(
        name,
        "reg_plus_image",
        lambda x: REG[name](x, arguments["target"].double()),
        image_sizes=sizes,
        **arguments,
    )


def test_every_known_loss_is_held_against_its_definition() -> None:
    """Here, or against MMDetection or the released code (whose names begin with CSE-Autoloss)."""
    for here, *spaces in (
        (TWO_STAGE, "two_stage_cls", "two_stage_cls_plus"),
        (ONE_STAGE, "one_stage_cls", "one_stage_cls_plus"),
        (REG, "reg", "reg_plus", "reg_plus_image"),
    ):
        names = {name for space in spaces for name in load_space(space).losses}
        assert {name for name in names if not name.startswith("CSE-")} - {"GIoU"} == set(here)


@pytest.mark.parametrize("cls", ["two_stage_cls", "one_stage_cls"])
def test_of_known_pairs_the_first_few_have_no_loss_in_common(cls: str) -> None:
    spaces = {"cls": load_space(cls), "reg": load_space("reg")}
    pairs = [losses for _, losses in known_candidates(spaces)]
    (name, _), *_ = known_candidates(spaces)
    assert name in ("CSE-Autoloss-A", "CSE-Autoloss-B"), "released together"
    for branch, space in spaces.items():
        assert len({pair[branch] for pair in pairs[:4]}) == 4
        assert {pair[branch] for pair in pairs} == {
            str(of.expression) for of in space.losses.values()
        }
    assert len({tuple(pair.values()) for pair in pairs}) == len(pairs)
