"""What `export` accepts builds and trains; what cannot be is refused with the reason, before
anything is written."""

import re

import pytest
from mmcv import Config

from cse_autoloss.config import parse_config
from cse_autoloss.run import check
from cse_autoloss.trial import ConfigError, Found
from detectors import config_files
from detectors.datasets.named import unwrapped
from detectors.train import Training, read
from detectors.training import DetectorTrainer

TWO_STAGE, ONE_STAGE = (
    Found(
        dict.fromkeys(("cls", "reg"), name),
        {"cls": space, "reg": "reg"},
        {"cls": 1.0, "reg": 2.0},
        {},
    )
    for name, space in (("CSE-Autoloss-A", "two_stage_cls"), ("CSE-Autoloss-B", "one_stage_cls"))
)


def written(folder, text, base="faster_rcnn_proxy"):
    path = folder / "theirs.py"
    inherits = f"_base_ = {str(config_files.CONFIGS / base)!r} + '.py'\n" if base else ""
    path.write_text(inherits + text)
    return str(path)


def export(path, found=TWO_STAGE, **options):
    return DetectorTrainer.export({}, found, base=path, name="mine", **options)["mine.py"]


def message(action, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "custom_imports = dict(_delete_=True, imports='mmcv.ops')",
        "custom_imports = None",
        "model = dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)))",
    ],
)
def test_what_is_exported_reads_builds_and_trains(tmp_path, text):
    config = Config.fromstring(export(written(tmp_path, text)), ".py")
    assert config.custom_imports["imports"][-1] == "detectors"
    assert config.model.roi_head.bbox_head.loss_cls.expression == "CSE-Autoloss-A"


@pytest.mark.parametrize(
    ("text", "base", "right"),
    [
        ("model = dict(roi_head=dict(type='PISARoIHead'))", "faster_rcnn_proxy", "PISARoIHead: it"),
        (
            "model = dict(roi_head=dict(type='DynamicRoIHead'))",
            "faster_rcnn_proxy",
            "reg loss .* SmoothL1",
        ),
        (
            "model = dict(roi_head=dict(bbox_head=dict(with_reg=False)))",
            "faster_rcnn_proxy",
            "regresses no boxes",
        ),
        ("model = dict(roi_head=[dict(type='CoStandardRoIHead')])", None, "a list of RoI heads"),
        ("data = dict(samples_per_gpu=2)", None, "has no model"),
        ("model = dict(data_preprocessor=dict())", None, "MMDetection 3.*--target mmdet3"),
        ("", "atss_proxy", "found for two_stage_cls, this detector's is one_stage_cls"),
        (
            "custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)",
            "faster_rcnn_proxy",
            "does not read.*no_such_module",
        ),
        (
            "model = dict(neck=dict(in_channels=[1, 2, 3, 4]))",
            "faster_rcnn_proxy",
            "does not train with these losses.*--no-check",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, text, base, right):
    assert re.search(right, message(export, written(tmp_path, text, base)))


def test_a_search_refuses_a_branch_for_the_same_reason_as_an_export():
    detector = {
        "trainer": "detectors.training:DetectorTrainer",
        "cfg_options": {
            "model.roi_head.type": "DynamicRoIHead",
            "model.roi_head.bbox_head.loss_bbox.type": "SmoothL1Loss",
            "model.train_cfg.rcnn.dynamic_rcnn": {
                "iou_topk": 75,
                "beta_topk": 10,
                "update_iter_interval": 100,
                "initial_iou": 0.4,
                "initial_beta": 1.0,
            },
        },
    }
    right = "DynamicRoIHead: it changes the beta of SmoothL1Loss.*search.branch=cls"
    assert re.search(right, message(check, parse_config({"detector": detector})))
    checked = check(parse_config({"detector": detector, "search": {"branch": "cls"}}))
    assert checked["spaces"].keys() == {"cls"}


def test_a_base_of_mmdetection_2_is_not_taken_for_one_of_3(tmp_path):
    path = written(tmp_path, "")
    assert "--target mmdet2" in message(
        DetectorTrainer.export, {}, TWO_STAGE, base=path, target="mmdet3", name="mine"
    )


def test_the_check_sees_a_loss_that_is_not_finite(tmp_path):
    path = written(tmp_path, "")
    endless = Found({"reg": "Exp(Mul(U,U))"}, {"reg": "reg"}, {"reg": 1e38}, {})
    assert "loss_bbox is" in message(export, path, endless)
    assert "Exp(Mul(U,U))" in export(path, endless, check=False)


OWN = "data = dict(train=dict(ann_file='/mine/train.json'))"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (OWN, "/mine/train.json: no such file"),
        (
            "data = dict(train=[dict(ann_file='/mine/a.json', pipeline=[])])",
            "/mine/a.json: no such file",
        ),
        (
            "runner = dict(_delete_=True, type='EpochBasedRunner', max_epochs=2)",
            "no runner.max_iters",
        ),
    ],
)
def test_a_config_of_ones_own_data_is_never_trained_on_other_data(tmp_path, text, right):
    if text.startswith("data = dict(train=["):
        text = f"_base_ = {str(config_files.CONFIGS / 'faster_rcnn_proxy.py')!r}\n" + (
            "data = dict(_delete_=True, train=[dict(type='CocoDataset', ann_file='/mine/a.json', "
            "pipeline=[])])"
        )
        path = written(tmp_path, text, base=None)
    else:
        path = written(tmp_path, text)
    assert right in message(read, Training(path))


@pytest.mark.parametrize(
    "train",
    [
        "[dict(type='CocoDataset', ann_file='a.json', pipeline=pipeline)] * 2",
        "dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', ann_file='a.json', "
        "pipeline=pipeline)])",
        "dict(type='RepeatDataset', times=2, dataset=dict(type='CocoDataset', ann_file='a.json', "
        "pipeline=pipeline))",
    ],
)
def test_data_by_name_goes_into_lists_and_wrappers_and_needs_no_test_split(tmp_path, train):
    text = (
        "pipeline = [dict(type='LoadImageFromFile')]\n"
        f"data = dict(_delete_=True, samples_per_gpu=1, train={train}, "
        "val=dict(type='CocoDataset', ann_file='v.json', pipeline=pipeline))"
    )
    config = read(Training(written(tmp_path, text), data="embedded"))
    (part,) = unwrapped(config.data.train)
    assert part["type"] == "CocoDataset" and len(part["classes"]) == 6
    assert part["pipeline"] == [dict(type="LoadImageFromFile")] and "test" not in config.data
