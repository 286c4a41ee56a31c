"""The library of known losses against MMDetection's own implementations, values and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from mmdet.models import build_head
from mmdet.models import losses as mmdet_losses
from mmdet.models.losses import isr_p
from test_losses import batch

import detectors  # noqa: F401 - registers the heads
from cse_autoloss.losses import build_loss


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights each time: what float32 rounds off depends on them."""
    torch.manual_seed(0)


def compare(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    arguments: dict,
    our_extra: dict,
    their_target: object,
    **common: object,
) -> None:
    pred = arguments["pred"]
    leaf, twin = pred.clone().requires_grad_(), pred.double().requires_grad_()
    ours(leaf, arguments["target"], **our_extra, **common).backward()
    found = ours(leaf, arguments["target"], **our_extra, **common).detach().double()
    right = theirs(twin, their_target, **common)
    right.backward()
    torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-6)
    assert (leaf.grad - twin.grad).abs().max() <= 1e-5 * twin.grad.abs().max()


@pytest.mark.parametrize("avg_factor", [None, 13.0])
@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_is_mmdetections(seed: int, avg_factor: float | None) -> None:
    arguments = batch("two_stage_cls", seed)
    compare(
        build_loss("CrossEntropy", "two_stage_cls", loss_weight=2.0),
        mmdet_losses.CrossEntropyLoss(loss_weight=2.0),
        arguments,
        {"pos_ious": arguments["pos_ious"]},
        arguments["target"],
        weight=torch.rand(40),
        avg_factor=avg_factor,
    )


@pytest.mark.parametrize("avg_factor", [None, 13.0])
@pytest.mark.parametrize("seed", range(3))
def test_focal_loss_is_mmdetections(seed: int, avg_factor: float | None) -> None:
    arguments = batch("one_stage_cls", seed, spread=1.5)
    compare(
        build_loss("Focal", "one_stage_cls"),
        mmdet_losses.FocalLoss(),
        arguments,
        {},
        arguments["target"],
        weight=torch.rand(40),
        avg_factor=avg_factor,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name, theirs",
    [
        ("QualityFocal", mmdet_losses.QualityFocalLoss()),
        ("Varifocal", mmdet_losses.VarifocalLoss()),
    ],
    ids=["QualityFocal", "Varifocal"],
)
def test_quality_aware_losses_are_mmdetections(
    name: str, theirs: torch.nn.Module, seed: int
) -> None:
    arguments = batch("one_stage_cls", seed, spread=1.5)
    positive = arguments["target"] < 7
    score = torch.zeros(40, dtype=torch.float64)
    score[positive] = arguments["pos_ious"].clamp(min=1e-7).double()
    matrix = torch.zeros(40, 7, dtype=torch.float64)
    matrix[positive, arguments["target"][positive]] = score[positive]
    weight = torch.rand(40)
    known = name == "Varifocal"
    theirs.loss_weight = 1.0 if known else 0.75
    compare(
        build_loss(name, "one_stage_cls"),
        (
            lambda pred, target, weight, avg_factor: theirs(
                pred, target, weight[:, None].double(), avg_factor
            )
        )
        if known
        else theirs,
        arguments,
        {"pos_ious": arguments["pos_ious"]},
        matrix if known else (arguments["target"], score),
        weight=weight,
        avg_factor=13.0,
    )


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("IoU", mmdet_losses.IoULoss(mode="log")),
        ("LinearIoU", mmdet_losses.IoULoss(mode="linear")),
        ("SquareIoU", mmdet_losses.IoULoss(mode="square")),
        ("GIoU", mmdet_losses.GIoULoss(eps=1e-7)),
        ("DIoU", mmdet_losses.DIoULoss(eps=1e-7)),
    ],
    ids=["IoU", "LinearIoU", "SquareIoU", "GIoU", "DIoU"],
)
@pytest.mark.parametrize("weight", [None, "a box", "a coordinate"])
@pytest.mark.parametrize("avg_factor", [None, 13.0])
def test_box_losses_are_mmdetections(
    name: str, theirs: torch.nn.Module, weight: str | None, avg_factor: float | None
) -> None:
    arguments = batch("reg", seed=1, spread=4.0)
    weights = {None: None, "a box": torch.rand(40), "a coordinate": torch.rand(40, 4)}[weight]
    compare(
        build_loss(name, "reg_plus"),
        theirs,
        arguments,
        {},
        arguments["target"].double(),
        weight=weights,
        avg_factor=avg_factor,
    )


def test_boxes_apart_from_their_targets_have_mmdetections_giou() -> None:
    target = batch("reg")["target"]
    compare(
        build_loss("GIoU", "reg"),
        mmdet_losses.GIoULoss(eps=1e-7),
        {"pred": target + 150, "target": target},
        {},
        target.double(),
    )


def test_a_batch_of_weight_0_costs_nothing_as_in_mmdetection() -> None:
    arguments = batch("reg")
    leaf = arguments["pred"].clone().requires_grad_()
    loss = build_loss("GIoU", "reg")(
        leaf, arguments["target"], weight=torch.zeros(40, 4), avg_factor=40
    )
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()


@pytest.mark.parametrize("name", ["CrossEntropy", "CSE-Autoloss-A"])
def test_label_weights_are_the_third_argument_as_in_mmdetection(name: str) -> None:
    arguments = batch("two_stage_cls")
    arguments["target"] = arguments["target"].clamp(max=6)  # positives alone
    weight, loss = torch.rand(40), build_loss(name, "two_stage_cls")
    found = loss(arguments["pred"], arguments["target"], weight, 13.0)
    right = mmdet_losses.CrossEntropyLoss()(arguments["pred"], arguments["target"], weight, 13.0)
    factor = 1.0 if name == "CrossEntropy" else 1 + math.sin(1)
    torch.testing.assert_close(found, right * factor, rtol=1e-5, atol=0)


def test_ignored_labels_are_mmdetections() -> None:
    arguments = batch("two_stage_cls")
    arguments["target"][::3] = -100
    compare(
        build_loss("CrossEntropy", "two_stage_cls"),
        mmdet_losses.CrossEntropyLoss(),
        {"pred": arguments["pred"], "target": arguments["target"]},
        {},
        arguments["target"],
        avg_factor=13.0,
    )


def test_samplers_and_losses_that_call_the_heads_loss_themselves_take_searched_losses() -> None:
    """OHEM's hard mining and PISA's losses, with IoU-aware heads."""
    loss_cls = dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="two_stage_cls")
    head = build_head(
        dict(
            type="IoUAwareShared2FCBBoxHead",
            in_channels=4,
            fc_out_channels=8,
            roi_feat_size=3,
            num_classes=5,
            loss_cls=loss_cls,
        )
    )
    scores, labels = torch.randn(12, 6, requires_grad=True), torch.arange(12) % 6
    rois = torch.rand(12, 5) * 40
    rois[:, 3:] += rois[:, 1:3] + 5
    mined = head.loss(
        scores, None, rois, labels, torch.rand(12), None, None, reduction_override="none"
    )
    assert mined["loss_cls"].shape == (12,)
    results = SimpleNamespace(
        pos_is_gt=torch.zeros(10, dtype=torch.uint8),
        pos_assigned_gt_inds=torch.arange(10) % 3,
        bboxes=rois[:, 1:],
    )
    deltas = torch.randn(12, 20) * 0.1
    targets = (labels, torch.ones(12), torch.randn(12, 4) * 0.1, torch.ones(12, 4))
    weights = isr_p(
        scores, deltas, targets, rois, [results], head.loss_cls, head.bbox_coder, num_class=5
    )[1]
    assert weights.shape == (12,) and weights.isfinite().all()


def test_complete_iou_is_mmdetections_where_boxes_overlap_by_more_than_half() -> None:
    """MMDetection leaves its aspect term out elsewhere."""
    arguments = batch("reg", spread=1.0)
    compare(
        build_loss("CIoU", "reg_plus"),
        mmdet_losses.CIoULoss(eps=1e-7),
        arguments,
        {},
        arguments["target"].double(),
    )


@pytest.mark.parametrize("seed", range(3))
def test_smooth_l1_is_the_sum_of_mmdetections_over_coordinates(seed: int) -> None:
    arguments, weight = batch("reg", seed), torch.rand(40)
    compare(
        build_loss("SmoothL1", "reg_plus"),
        lambda pred, target, weight, avg_factor: mmdet_losses.SmoothL1Loss(beta=1.0)(
            pred, target, weight[:, None].expand(40, 4), avg_factor
        ),
        arguments,
        {},
        arguments["target"].double(),
        weight=weight,
        avg_factor=13.0,
    )
