"""RetinaNet's, GFL's, PAA's, YOLOX's, Double-Head's and SABL's heads, IoU-aware: mmdet's with
mmdet's losses, and with ours the IoU that a loss gets is that of the boxes that the head
regresses."""

import copy

import pytest
import torch
from mmcv import Config
from mmdet.core import bbox_overlaps
from mmdet.models import build_head
from torch import nn

from cse_autoloss.trial import ConfigError
from detectors import configure
from detectors.configs import mmdet_config

DENSE = {
    "RetinaHead": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "GFLHead": "gfl/gfl_r50_fpn_1x_coco.py",
    "PAAHead": "paa/paa_r50_fpn_1x_coco.py",
    "YOLOXHead": "yolox/yolox_tiny_8x8_300e_coco.py",
}
QUALITY = dict(type="SearchedLoss", expression="CSE-Autoloss-B", space="one_stage_cls")
BOXES = [torch.tensor([[8.0, 8, 60, 70], [40, 50, 120, 110]]), torch.tensor([[20.0, 30, 90, 120]])]
LABELS = [torch.tensor([1, 3]), torch.tensor([0])]
METAS = [dict(img_shape=(128, 128, 3), pad_shape=(128, 128, 3))] * 2


def small(name, **losses):
    """The head of mmdet's config with few channels, and what the model's config says of
    training."""
    model = Config.fromfile(mmdet_config(DENSE[name])).model
    head = model.bbox_head
    head.update(in_channels=32, feat_channels=32, stacked_convs=1, num_classes=5)
    if "anchor_generator" in head and name != "RetinaHead":
        head.anchor_generator.octave_base_scale = 4
    outer = dict(bbox_head=head)
    configure.set_losses(outer, losses)
    return {**outer["bbox_head"], "train_cfg": model.train_cfg, "test_cfg": model.test_cfg}


def build(config, seed=0):
    torch.manual_seed(seed)
    return build_head(copy.deepcopy(config)).train()


def features(head):
    strides = [stride[0] for stride in head.prior_generator.strides]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 32, 128 // s, 128 // s, generator=generator) for s in strides]


def losses(head):
    torch.manual_seed(2)
    return head.forward_train(features(head), METAS, BOXES, LABELS)


def total(value):
    return sum(part.sum() for part in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("name", DENSE)
def test_with_mmdets_losses_it_is_mmdets_head(name):
    ours = build(small(name))
    theirs = build({**small(name), "type": name})
    theirs.load_state_dict(ours.state_dict())
    found, expected = losses(ours), losses(theirs)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(total(found[key]), total(expected[key]), msg=key)


class Recorded(nn.Module):
    """A loss that keeps what each call of it was given."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.calls = loss, []

    def forward(self, pred, target, weight=None, **rest):
        self.calls.append((pred, target, rest))
        return self.loss(pred, target, weight, **rest)


class RecordedQuality(Recorded):
    def forward(self, pred, target, weight=None, *, pos_ious, **rest):
        self.calls.append((pred, target, pos_ious))
        return self.loss(pred, target, weight, pos_ious=pos_ious, **rest)


@pytest.mark.parametrize("name", DENSE)
def test_a_loss_gets_the_iou_of_the_boxes_that_are_regressed(name):
    box_loss = dict(type="SearchedLoss", expression="GIoU", space="reg")
    head = build(small(name, cls=QUALITY, reg=box_loss))
    head.loss_cls, head.loss_bbox = RecordedQuality(head.loss_cls), Recorded(head.loss_bbox)
    value = sum(total(part) for part in losses(head).values())
    value.backward()
    assert value.isfinite() and all(
        p.grad.isfinite().all() for p in head.parameters() if p.grad is not None
    )
    assert head.loss_cls.calls[-1][2].requires_grad is False
    expected = [
        bbox_overlaps(pred.detach(), target, is_aligned=True).clamp(min=1e-7)
        for pred, target, _ in head.loss_bbox.calls
    ]
    got = [ious for *_, ious in head.loss_cls.calls if len(ious)]
    assert sum(map(len, got)) >= 3, "positives in the batch"
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=1e-4, atol=1e-6)
    for pred, target, ious in head.loss_cls.calls:
        assert ((target >= 0) & (target < 5)).sum() == len(ious) and pred.shape == (len(target), 5)


def test_quality_focal_as_an_expression_is_gfls_own():
    searched = {**QUALITY, "expression": "QualityFocal", "loss_weight": 4 / 3}  # times 3/4
    ours = build(small("GFLHead", cls=searched))
    theirs = build(small("GFLHead"))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        total(losses(ours)["loss_cls"]), total(losses(theirs)["loss_cls"]), rtol=1e-4, atol=1e-6
    )


def test_a_yolox_positive_whose_box_misses_its_object_is_left_out():
    head = build(small("YOLOXHead", cls=QUALITY))
    target = torch.tensor([[0.0, 0.4, 0, 0, 0], [0, 0, 0, 0, 0], [0.7, 0, 0, 0, 0]])
    (pred, labels), given = head._labels_and_ious(None, (torch.randn(3, 5), target), {})
    assert labels.tolist() == [1, 0] and len(pred) == 2
    assert given["pos_ious"].tolist() == pytest.approx([0.4, 0.7])


def rois_and_labels():
    torch.manual_seed(0)
    corner = torch.rand(6, 2) * 40
    boxes = torch.cat([corner, corner + 20 + torch.rand(6, 2) * 30], 1)
    labels = torch.tensor([0, 5, 2, 5, 4, 1])
    return torch.cat([torch.zeros(6, 1), boxes], 1), labels


def test_sabl_tells_the_iou_of_what_its_buckets_mean():
    config = Config.fromfile(mmdet_config("sabl/sabl_faster_rcnn_r50_fpn_1x_coco.py"))
    model = config.model
    head = model.roi_head.bbox_head
    head.update(num_classes=5, cls_in_channels=4, reg_in_channels=4, cls_out_channels=8)
    head.update(reg_offset_out_channels=8, reg_cls_out_channels=8)
    configure.set_losses(
        model,
        {"cls": dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="two_stage_cls")},
    )
    made = build(head)
    made.loss_cls = RecordedQuality(made.loss_cls)
    rois, labels = rois_and_labels()
    positive = labels < 5
    truth = rois[:, 1:] + torch.randn(6, 4)
    offsets, offset_weights, buckets, bucket_weights = made.bbox_coder.encode(rois[:, 1:], truth)
    perfect = (buckets * 50, offsets)
    scores = torch.randn(6, 6, requires_grad=True)
    rest = ((buckets, offsets), (bucket_weights, offset_weights))
    made.loss(scores, perfect, rois, labels, torch.ones(6), *rest)
    ious = made.loss_cls.calls[0][2]
    expected = bbox_overlaps(
        made.bbox_coder.decode(rois[:, 1:], perfect)[0], truth, is_aligned=True
    )
    assert len(ious) == positive.sum() and (ious > 0.99).all() and (expected[positive] > 0.95).all()
    off = (buckets * 50, offsets + 2)
    made.loss(scores, off, rois, labels, torch.ones(6), *rest)
    assert (made.loss_cls.calls[1][2] < 0.95).any()
    with pytest.raises(ConfigError, match="SABLHead: it regresses by buckets"):
        configure.set_losses(
            model, {"reg": dict(type="SearchedLoss", expression="GIoU", space="reg")}
        )


def test_double_heads_box_head_is_iou_aware_as_the_others():
    head = build(
        dict(
            type="IoUAwareDoubleConvFCBBoxHead",
            num_convs=1,
            num_fcs=1,
            in_channels=4,
            conv_out_channels=8,
            fc_out_channels=8,
            roi_feat_size=3,
            num_classes=5,
            reg_decoded_bbox=True,
            loss_cls=dict(type="SearchedLoss", expression="CSE-Autoloss-A", space="two_stage_cls"),
        )
    )
    head.loss_cls = RecordedQuality(head.loss_cls)
    rois, labels = rois_and_labels()
    deltas = torch.zeros(6, 20)
    head.loss(torch.randn(6, 6), deltas, rois, labels, torch.ones(6), rois[:, 1:], torch.ones(6, 4))
    torch.testing.assert_close(head.loss_cls.calls[0][2], torch.ones(4), msg="a box on its target")


def test_a_loss_that_needs_nothing_is_told_nothing():
    head = build(small("RetinaHead", cls={**QUALITY, "expression": "Focal"}))
    called = []
    head.loss_cls.register_forward_pre_hook(
        lambda loss, args, kwargs: called.append(kwargs.get("pos_ious")), with_kwargs=True
    )
    head.loss_cls.needs, head.bbox_coder.decode = frozenset(), None
    losses(head)
    assert called and not any(ious is not None for ious in called)
