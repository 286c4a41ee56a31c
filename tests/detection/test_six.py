"""Six detectors: the four combinations of searched and default losses train in each; configs are
the paper's."""

import copy
from dataclasses import replace

import pytest
import torch
from mmcv import Config
from mmcv.runner import load_checkpoint
from mmdet.core import BitmapMasks, bbox_overlaps
from mmdet.models import build_detector, build_head
from torch import nn

from cse_autoloss.trial import ConfigError, Found, Trial
from detectors import config_files, configure, export
from detectors.configs import mmdet_config
from detectors.training import DetectorTrainer

FULL = [
    "faster_rcnn_r50",
    "faster_rcnn_r101",
    "cascade_rcnn_r50",
    "mask_rcnn_r50",
    "fcos_r50",
    "atss_r50",
]
PROXIES = [
    "faster_rcnn_proxy",
    "faster_rcnn_r101_proxy",
    "cascade_rcnn_proxy",
    "mask_rcnn_proxy",
    "fcos_proxy",
    "atss_proxy",
]
FOUND_B = Found(
    {"cls": "CSE-Autoloss-B", "reg": "CSE-Autoloss-B"},
    {"cls": "one_stage_cls", "reg": "reg"},
    {"cls": 1.0, "reg": 1.0},
    {},
)
CLASSES = 4


def released(name):
    return "CSE-Autoloss-A" if "rcnn" in name else "CSE-Autoloss-B"


def options(name, warmup_steps=0):
    tiny = {"proxy.warmup": dict(_delete_=True, steps=warmup_steps)}  # by images one at a time, too
    return {"config": name, "steps": 10, "batch_size": 1, "device": "cpu", "cfg_options": tiny}


def test_the_package_has_a_full_config_and_a_proxy_of_each():
    assert config_files.config_names() == sorted(FULL + PROXIES)


@pytest.mark.parametrize(
    "branches",
    [(), ("cls",), ("reg",), ("cls", "reg")],
    ids=lambda names: "+".join(names) or "default",
)
@pytest.mark.parametrize("name", PROXIES)
def test_every_combination_takes_real_steps_in_every_detector(trainers, name, branches):
    result = trainers(name).train(
        Trial("key", losses={branch: released(name) for branch in branches}, evaluate=())
    )
    assert result.failure is None and result.steps == 10
    assert all(weight > 0 for weight in result.loss_weights.values())


@pytest.fixture(scope="module")
def trainers():
    made = {}
    return lambda name: made.setdefault(name, DetectorTrainer(options(name), b""))


@pytest.mark.parametrize(
    "name", ["fcos_proxy", "atss_proxy", "cascade_rcnn_proxy", "mask_rcnn_proxy"]
)
def test_searched_losses_start_as_strong_as_the_defaults_whatever_the_head_puts_out(trainers, name):
    trainer = trainers(name)
    losses = {branch: released(name) for branch in ("cls", "reg")}
    config, weights = trainer._with_losses(
        Trial("key", losses=losses, scale={"cls": 2.0, "reg": 1.0})
    )
    norms, default = trainer._gradient_norms(config), trainer._gradient_norms(trainer.setup.config)
    assert norms["cls"] == pytest.approx(2 * default["cls"], rel=1e-3)
    assert norms["reg"] == pytest.approx(default["reg"], rel=1e-3)
    for head in configure.heads(config.model):  # every stage of the cascade
        assert {
            branch: head[key]["loss_weight"] for branch, key in configure.LOSS_KEYS.items()
        } == weights


def test_trials_of_dense_heads_start_with_new_logits_on_whose_warm_weights_losses_are_measured():
    tiny = options("fcos_proxy", warmup_steps=10)
    trainer = DetectorTrainer(tiny, DetectorTrainer.prepare(tiny))
    assert {name.split(".")[0] for name in trainer._warm} == {
        "backbone",
        "neck",
        "bbox_head",
        "measured_on",
    }
    # mmdet writes into the configs that it builds from
    config = copy.deepcopy(trainer.setup.config)
    started, measured = (
        trainer._model(config, 0, warm_head).state_dict() for warm_head in (False, True)
    )
    new = DetectorTrainer(tiny, b"")._model(config, 0).state_dict()
    head = "bbox_head.conv_cls.weight"
    warm = (
        "backbone.layer4.0.conv1.weight",
        "bbox_head.reg_convs.0.conv.weight",
        "bbox_head.conv_reg.weight",
    )
    assert torch.equal(started[head], new[head]) and not torch.equal(started[head], measured[head])
    assert torch.equal(measured[head], trainer._warm[f"measured_on.{head}"])
    for name in warm:
        assert torch.equal(started[name], measured[name]) and torch.equal(
            started[name], trainer._warm[name]
        )
        assert not torch.equal(started[name], new[name])

    strength = trainer._gradient_norms(copy.deepcopy(trainer.setup.config))
    trainer._warm[f"measured_on.{head}"].mul_(3)
    assert trainer._gradient_norms(copy.deepcopy(trainer.setup.config)) != strength
    trainer._warm[f"measured_on.{head}"].div_(3)

    text = export.proxy_config(
        config, trainer.setup.data, replace(FOUND_B, prepared=str(trainer.setup.warmup_path()))
    )
    exported = Config.fromstring(text, ".py")
    model = build_detector(exported.model)
    model.init_weights()
    load_checkpoint(model, exported.load_from)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], measured[name]) for name in warm)
    assert not torch.equal(loaded[head], measured[head])


def test_a_found_loss_goes_into_mmdets_own_one_stage_configs():
    for name, head in (
        ("fcos/fcos_center_r50_caffe_fpn_gn-head_1x_coco.py", "IoUAwareFCOSHead"),
        ("atss/atss_r101_fpn_1x_coco.py", "IoUAwareATSSHead"),
    ):
        config = Config.fromstring(
            export.user_config(
                Config.fromfile(mmdet_config(name)),
                export.searched_losses(FOUND_B, list),
                FOUND_B,
            ),
            ".py",
        )
        config.model.backbone.init_cfg = None
        made = build_detector(config.model).bbox_head
        assert type(made).__name__ == head and made.cls_out_channels == 80
        assert str(made.loss_cls.expression) and made.loss_bbox.loss_weight == 1.0


# The heads of FCOS and ATSS, called as their detectors call them


class Recording(nn.Module):
    """A loss that keeps what it was called with."""

    def __init__(self, module=None):
        super().__init__()
        self.module, self.calls = module, []

    def forward(self, pred, target, weight=None, avg_factor=None, pos_ious=None):
        self.calls.append(
            dict(pred=pred, target=target, pos_ious=pos_ious, weight=weight, avg_factor=avg_factor)
        )
        return (
            pred.sum() * 0
            if self.module is None
            else self.module(pred, target, weight, avg_factor=avg_factor)
        )


def dense_head(kind, aware=True, **changes):
    name = {"fcos": "fcos_proxy", "atss": "atss_proxy"}[kind]
    model = copy.deepcopy(config_files.read_config(name).model)
    prefix = "IoUAware" if aware else ""
    config = {
        **model.bbox_head,
        "type": f"{prefix}{kind.upper()}Head",
        "num_classes": CLASSES,
        **changes,
    }
    torch.manual_seed(0)
    head = build_head({**config, "train_cfg": model.train_cfg, "test_cfg": model.test_cfg})
    head.init_weights()
    if kind == "fcos":
        nn.init.constant_(head.conv_reg.bias, 1.5)  # a new FCOS predicts boxes of no size
    return head


def images(objects=3):
    torch.manual_seed(1)
    features = [torch.randn(2, 32, 64 // 2**level, 64 // 2**level) * 0.5 for level in range(1, 5)]
    corner = torch.rand(2, objects, 2) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(2, objects, 2) * 40], -1)
    labels = torch.randint(CLASSES, (2, objects))
    metas = [dict(img_shape=(128, 128, 3), pad_shape=(128, 128, 3))] * 2
    return features, list(boxes), list(labels), metas


def losses_of(head, objects=3):
    features, boxes, labels, metas = images(objects)
    return head.loss(*head(features), boxes, labels, metas)


@pytest.mark.parametrize("kind", ["fcos", "atss"])
def test_the_iou_is_centerness_target_regression_weight_and_what_the_classification_loss_gets(
    kind,
):
    head = dense_head(kind)
    head.loss_cls, head.loss_bbox, head.loss_centerness = Recording(), Recording(), Recording()
    losses_of(head)
    regression, centerness = head.loss_bbox.calls, head.loss_centerness.calls
    assert sum(len(call["pred"]) for call in regression) > 20
    for call, center in zip(regression, centerness, strict=True):
        ious = bbox_overlaps(call["pred"], call["target"], is_aligned=True).detach()
        assert (
            torch.allclose(call["weight"], ious.clamp(min=1e-7), atol=1e-6)
            and not call["weight"].requires_grad
        )
        assert call["pred"].requires_grad
        assert torch.equal(center["target"], call["weight"])
    given = torch.cat([call["pos_ious"] for call in head.loss_cls.calls])
    assert torch.equal(given, torch.cat([call["weight"] for call in regression]))
    positives = sum(
        ((call["target"] >= 0) & (call["target"] < CLASSES)).sum() for call in head.loss_cls.calls
    )
    assert len(given) == positives and given.std() > 0.01
    if kind == "fcos":
        assert float(regression[0]["avg_factor"]) == pytest.approx(float(given.sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["fcos", "atss"])
def test_with_losses_of_mmdets_own_the_values_are_those_of_mmdets_head_given_the_iou_for_centerness(
    kind,
):
    ours, mmdets = dense_head(kind), dense_head(kind, aware=False)
    ours.loss_bbox = Recording(ours.loss_bbox)
    found = losses_of(ours)
    ious = iter([call["weight"] for call in ours.loss_bbox.calls])
    mmdets.centerness_target = lambda *_: next(ious)
    expected = losses_of(mmdets)
    assert found.keys() == expected.keys()
    for key in expected:
        ours_levels, mmdets_levels = (
            value if isinstance(value, list) else [value] for value in (found[key], expected[key])
        )
        for one, other in zip(ours_levels, mmdets_levels, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), key
    if kind == "fcos":
        centered = losses_of(dense_head(kind, aware=False))
        assert torch.allclose(found["loss_cls"], centered["loss_cls"], rtol=1e-6)
        assert not torch.allclose(found["loss_bbox"], centered["loss_bbox"], rtol=1e-3), (
            "the IoU must matter"
        )


@pytest.mark.parametrize("kind", ["fcos", "atss"])
@pytest.mark.parametrize("objects", [0, 3])
def test_the_released_losses_reach_every_branch_also_of_images_without_objects(kind, objects):
    cls = dict(
        type="SearchedLoss", expression="CSE-Autoloss-B", space="one_stage_cls", use_sigmoid=True
    )
    head = dense_head(
        kind,
        loss_cls=cls,
        loss_bbox=dict(type="SearchedLoss", expression="CSE-Autoloss-B", space="reg"),
    )
    losses = losses_of(head, objects)
    total = sum(
        part.sum()
        for value in losses.values()
        for part in (value if isinstance(value, list) else [value])
    )
    total.backward()
    gradients = {name: value.grad for name, value in head.named_parameters()}
    assert all(
        gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values()
    )
    branch = {
        "fcos": ("conv_cls", "conv_reg", "conv_centerness"),
        "atss": ("atss_cls", "atss_reg", "atss_centerness"),
    }[kind]
    reached = [bool(gradients[f"{name}.weight"].abs().sum() > 0) for name in branch]
    assert reached == [True, objects > 0, objects > 0]


# Configs at full size


@pytest.mark.parametrize("name", FULL)
def test_a_full_config_builds_and_has_the_papers_losses_in_iou_aware_heads(name):
    config = config_files.read_config(name)
    one_stage = "rcnn" not in name
    for head in configure.heads(config.model):
        assert head.type.startswith("IoUAware")
        assert dict(head.loss_cls) == dict(
            type="SearchedLoss",
            expression=released(name),
            loss_weight=1.0,
            space="one_stage_cls" if one_stage else "two_stage_cls",
            **({"use_sigmoid": True} if one_stage else {}),
        )
        assert dict(head.loss_bbox) == dict(
            type="SearchedLoss",
            expression=released(name),
            space="reg",
            loss_weight=1.0 if one_stage else 10.0,
        )
        assert one_stage or head.reg_decoded_bbox
        assert head.loss_bbox.loss_weight == configure.searched_weights(config.model)["reg"]
        assert head.num_classes == 80
    assert config.runner.max_epochs == 12 and list(config.lr_config.step) == [8, 11]
    assert config.custom_imports["imports"] == ["detectors"]
    assert config.model.backbone.depth == (101 if "r101" in name else 50)
    config.model.backbone.init_cfg = None
    model = build_detector(config.model)
    assert type(model).__name__.lower().startswith(name.replace("_", "")[:4])
    losses = losses_of_one_image(model, masks="mask" in name)
    found = {key.split(".")[-1]: value for key, value in losses.items() if "loss" in key}
    assert {"loss_cls", "loss_bbox"} <= found.keys() and ("loss_mask" in found) == ("mask" in name)
    for value in found.values():
        assert all(
            torch.isfinite(part).all() for part in (value if isinstance(value, list) else [value])
        )


def losses_of_one_image(model, masks):
    torch.manual_seed(0)
    meta = dict(
        img_shape=(96, 96, 3),
        pad_shape=(96, 96, 3),
        ori_shape=(96, 96, 3),
        scale_factor=1.0,
        flip=False,
    )
    extra = (
        {"gt_masks": [BitmapMasks(torch.ones(1, 96, 96, dtype=torch.uint8).numpy(), 96, 96)]}
        if masks
        else {}
    )
    return model.forward_train(
        torch.randn(1, 3, 96, 96),
        [meta],
        [torch.tensor([[10.0, 10.0, 80.0, 70.0]])],
        [torch.tensor([2])],
        **extra,
    )


def test_a_full_config_changes_nothing_else_of_mmdets():
    mmdets = {
        "faster_rcnn_r50": "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py",
        "faster_rcnn_r101": "faster_rcnn/faster_rcnn_r101_fpn_1x_coco.py",
        "cascade_rcnn_r50": "cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco.py",
        "mask_rcnn_r50": "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py",
        "fcos_r50": "fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco.py",
        "atss_r50": "atss/atss_r50_fpn_1x_coco.py",
    }
    changes = {"type", "loss_cls", "loss_bbox", "reg_decoded_bbox"}
    for name, path in mmdets.items():
        ours, theirs = config_files.read_config(name), Config.fromfile(mmdet_config(path))
        for mine, original in zip(
            configure.heads(ours.model), configure.heads(theirs.model), strict=True
        ):
            for key in changes:
                mine.pop(key, None), original.pop(key, None)
        ours.pop("custom_imports")
        assert ours._cfg_dict == theirs._cfg_dict, name


def test_fcos_has_its_three_options_and_cascade_its_three_stages():
    head = config_files.read_config("fcos_r50").model.bbox_head
    assert head.norm_on_bbox and head.centerness_on_reg and head.center_sampling
    stages = configure.heads(config_files.read_config("cascade_rcnn_r50").model)
    assert [stage.bbox_coder.target_stds[0] for stage in stages] == [0.1, 0.05, 0.033]
    assert all(stage.reg_class_agnostic for stage in stages)


def test_spaces_and_losses_go_with_the_detector():
    model = config_files.read_config("fcos_proxy").model
    assert configure.spaces(model) == {"cls": "one_stage_cls", "reg": "reg"}
    configure.set_losses(
        model, {"cls": dict(type="SearchedLoss", expression="Focal", space="one_stage_cls")}
    )
    assert model.bbox_head.loss_cls["use_sigmoid"] and model.bbox_head.loss_bbox.type == "GIoULoss"
    model.bbox_head.type = "FoveaHead"
    with pytest.raises(
        ConfigError,
        match="the config's head 'FoveaHead' has no IoU-aware form.*FCOSHead, ATSSHead",
    ):
        configure.heads(model)
