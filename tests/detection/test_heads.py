"""IoU-aware heads, the registered searched loss, and the patches that let mmdet run."""

import subprocess
import sys
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.core import bbox_overlaps
from mmdet.models import HEADS, LOSSES, build_head, build_loss
from torch import nn

from detectors import configure

A_CLS = dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="two_stage_cls")
A_REG = dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="reg")
CLASSES = 5


class Recording(nn.Module):
    """A classification loss that asks for IoUs and keeps them."""

    def forward(
        self, pred, target, weight=None, avg_factor=None, reduction_override=None, pos_ious=None
    ):
        self.pos_ious = pos_ious
        return pred.sum() * 0


def head(name="IoUAwareShared2FCBBoxHead", **changes):
    return build_head(
        dict(
            type=name,
            in_channels=4,
            fc_out_channels=8,
            roi_feat_size=3,
            num_classes=CLASSES,
            **changes,
        )
    )


def batch(decoded, agnostic=False, positives=(True, False, True, True, False)):
    torch.manual_seed(0)
    n = len(positives)
    corner = torch.rand(n, 2) * 40
    boxes = torch.cat([corner, corner + 10 + torch.rand(n, 2) * 30], 1)
    targets = boxes + torch.randn(n, 4) * 2
    labels = torch.where(torch.tensor(positives), torch.arange(n) % CLASSES, CLASSES)
    deltas = torch.randn(n, 4 if agnostic else 4 * CLASSES) * 0.5
    coder = head().bbox_coder
    encoded = targets if decoded else coder.encode(boxes, targets)
    rois = torch.cat([torch.zeros(n, 1), boxes], 1)
    weights = (labels < CLASSES).float()[:, None].expand(n, 4)
    scores = torch.randn(n, CLASSES + 1, requires_grad=True)
    return (scores, deltas.requires_grad_(), rois, labels, torch.ones(n), encoded, weights), targets


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("agnostic", [True, False])
def test_each_positive_brings_the_iou_of_its_own_classs_predicted_box(decoded, agnostic):
    made = head(reg_decoded_bbox=decoded, reg_class_agnostic=agnostic)
    made.loss_cls = Recording()
    arguments, targets = batch(decoded, agnostic)
    made.loss(*arguments)
    _, deltas, rois, labels, *_ = arguments
    expected = []
    for row in range(len(labels)):
        if labels[row] < CLASSES:
            start = 0 if agnostic else 4 * labels[row]
            box = made.bbox_coder.decode(
                rois[row : row + 1, 1:], deltas[row : row + 1, start : start + 4]
            )
            expected.append(bbox_overlaps(box, targets[row : row + 1])[0, 0])
    assert torch.allclose(made.loss_cls.pos_ious, torch.stack(expected), atol=1e-5)
    assert not made.loss_cls.pos_ious.requires_grad


def test_an_iou_is_never_zero_and_no_positives_are_no_ious():
    made = head()
    made.loss_cls = Recording()
    arguments, _ = batch(False)
    far = (*arguments[:5], arguments[5] + torch.tensor([60.0, 60.0, 0.0, 0.0]), arguments[6])
    made.loss(*far)
    assert (made.loss_cls.pos_ious == 1e-7).all() and len(made.loss_cls.pos_ious) == 3
    arguments, _ = batch(False, positives=(False, False))
    made.loss(*arguments)
    assert made.loss_cls.pos_ious.shape == (0,)


def test_with_a_loss_that_wants_no_iou_the_head_is_mmdets():
    arguments, _ = batch(False)
    for name, kind in configure.HEADS.items():
        aware = kind.aware
        assert issubclass(HEADS.get(aware), HEADS.get(name))
        if "FCBBoxHead" not in name or name.startswith("Double"):
            continue
        layers = {"num_shared_fcs": 1} if name == "ConvFCBBoxHead" else {}
        ours, mmdets = head(aware, **layers), head(name, **layers)
        expected, found = mmdets.loss(*arguments), ours.loss(*arguments)
        assert expected.keys() == found.keys() and all(
            torch.equal(expected[key], found[key]) for key in expected
        )


def test_a_searched_loss_is_built_by_mmdets_registry_and_reaches_both_branches():
    assert "SearchedLoss" in LOSSES
    assert build_loss({**A_REG, "loss_weight": 10.0}).loss_weight == 10.0
    made = head(reg_decoded_bbox=True, loss_cls=A_CLS, loss_bbox=A_REG)
    arguments, _ = batch(True)
    losses = made.loss(*arguments)
    (losses["loss_cls"] + losses["loss_bbox"]).backward()
    scores, deltas, _, labels, *_ = arguments
    assert torch.isfinite(scores.grad).all() and torch.isfinite(deltas.grad).all()
    assert (scores.grad.abs().sum(1) > 0).all()
    assert (deltas.grad.abs().sum(1) > 0).tolist() == (labels < CLASSES).tolist()


def test_the_released_classification_loss_weighs_a_positive_by_one_plus_the_sine_of_its_iou():
    made = head(loss_cls={**A_CLS, "reduction": "none"})
    arguments, _ = batch(False)
    scores, _, _, labels, *_ = arguments
    ious = torch.zeros(len(labels))
    ious[labels < CLASSES] = made.pos_ious(arguments[1], arguments[2], labels, arguments[5])
    entropy = nn.functional.cross_entropy(scores, labels, reduction="none")
    expected = entropy * torch.where(labels < CLASSES, 1 + torch.sin(ious), 1 + np.sin(1))
    value = made.loss(*arguments, reduction_override="none")["loss_cls"]
    assert torch.allclose(value, expected, atol=1e-5)


def test_importing_the_package_leaves_no_torchvision_and_no_old_numpy_behind():
    code = (
        "import sys, numpy, importlib.util, detectors\n"
        "from mmcv.runner.checkpoint import get_torchvision_models\n"
        "from mmcv.parallel import MMDistributedDataParallel as D\n"
        "import mmdet.datasets.custom as custom\n"
        "assert custom.np.zeros(1).astype(custom.np.int).dtype == int\n"
        "assert not hasattr(numpy, 'int') and D._use_replicated_tensor_module is False\n"
        "if importlib.util.find_spec('torchvision') is None:\n"
        "    assert 'torchvision' not in sys.modules\n"
        "    try: get_torchvision_models()\n"
        "    except ImportError as error: assert 'pip install torchvision' in str(error)\n"
        "    else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mmdets_own_scripts_run_under_the_patches():
    script = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    done = subprocess.run(
        [sys.executable, "-m", "detectors", str(script), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "train config file path" in done.stdout, done.stderr


def test_a_rank_is_counted_within_the_image() -> None:
    loss = dict(
        type="SearchedLoss",
        expression="Neg(Dot(Mul(Y,K),Log(Softmax(X))))",
        space="two_stage_cls_plus",
    )
    arguments, _ = batch(decoded=True)
    arguments[2][:, 0] = torch.tensor([0.0, 0, 1, 1, 1])
    made = head(loss_cls=loss, reg_decoded_bbox=True, loss_bbox=A_REG)
    found = made.loss(*arguments)["loss_cls"]
    right = made.loss_cls(arguments[0], arguments[3], image_ids=arguments[2][:, 0], avg_factor=5.0)
    assert torch.allclose(found, right)
