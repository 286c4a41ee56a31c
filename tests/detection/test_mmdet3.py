"""What is exported for MMDetection 3.x: its config inherits the user's, its heads compute what
those for 2.x compute.

MMDetection 3 is not installed here (docs/mmdet3.md says what was run with it). The adapter runs on
the heads of 2.28, whose interfaces it uses are the same; the three modules that 2.28 has elsewhere
stand under the names of 3.x.
"""

import importlib
import sys
import types

import mmdet
import pytest
import torch
from mmcv import Config
from mmdet.core import bbox_overlaps, reduce_mean
from mmdet.models import HEADS, build_head

from cse_autoloss.trial import ConfigError, Found
from detectors import config_files, configure, mmdet3
from detectors.training import DetectorTrainer

A = Found(
    dict.fromkeys(("cls", "reg"), "CSE-Autoloss-A"),
    {"cls": "two_stage_cls", "reg": "reg"},
    {"cls": 0.5, "reg": 8.0},
    {},
)
B = Found(
    dict.fromkeys(("cls", "reg"), "CSE-Autoloss-B"),
    {"cls": "one_stage_cls", "reg": "reg"},
    {"cls": 2.0, "reg": 0.5},
    {},
)
# As MMDetection 3.3's configs/_base_/models/faster-rcnn_r50_fpn.py has it, without what no export
# looks at.
THEIRS = """
model = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=50), roi_head=dict(
    type='StandardRoIHead',
    bbox_head=dict(type='Shared2FCBBoxHead', in_channels=256, fc_out_channels=1024,
        roi_feat_size=7, num_classes=3,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
            target_stds=[0.1, 0.1, 0.2, 0.2]),
        reg_class_agnostic=False,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0))))
custom_imports = dict(imports=['their_module'], allow_failed_imports=False)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02))
"""


def export(found, folder, config="faster_rcnn_proxy", base=None, name="mine"):
    texts = DetectorTrainer.export(
        {"config": config}, found, base=base and str(base), target="mmdet3", name=name
    )
    for file, text in texts.items():
        (folder / file).write_text(text)
    return texts


def test_a_users_config_is_inherited_and_its_head_alone_is_changed(tmp_path):
    base = tmp_path / "theirs.py"
    base.write_text(THEIRS)
    export(A, tmp_path, base=base)
    config = Config.fromfile(str(tmp_path / "mine.py"), import_custom_modules=False)
    head = config.model.roi_head.bbox_head
    assert (head.type, head.num_classes, head.reg_decoded_bbox) == (
        "IoUAwareShared2FCBBoxHead",
        3,
        True,
    )
    for loss, branch, weight in ((head.loss_cls, "cls", 0.5), (head.loss_bbox, "reg", 8.0)):
        assert loss == {
            "type": "SearchedLoss",
            "expression": A.losses[branch],
            "space": A.spaces[branch],
            "loss_weight": weight,
        }
    assert config.optim_wrapper.optimizer.lr == 0.02 and config.model.backbone.depth == 50
    assert config.custom_imports["imports"] == ["their_module", "cse_autoloss.adapters.mmdet3"]
    dumped = tmp_path / "elsewhere" / "dumped.py"
    dumped.parent.mkdir()
    dumped.write_text(config.pretty_text)
    again = Config.fromfile(str(dumped), import_custom_modules=False)
    assert again._cfg_dict == config._cfg_dict, "it needs nothing that lies beside it"


@pytest.mark.parametrize(
    ("proxy", "found", "inherited", "heads"),
    [
        ("faster_rcnn_proxy", A, "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", 1),
        ("cascade_rcnn_proxy", A, "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", 3),
        ("mask_rcnn_proxy", A, "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", 1),
        (
            "fcos_proxy",
            B,
            "mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
            1,
        ),
        ("atss_proxy", B, "mmdet::atss/atss_r50_fpn_1x_coco.py", 1),
    ],
)
def test_without_a_config_the_full_size_one_of_the_detector_is_inherited(
    tmp_path, proxy, found, inherited, heads
):
    text = export(found, tmp_path, proxy)["mine.py"]
    assert f"_base_ = '{inherited}'\n" in text
    assert text.count("type='SearchedLoss'") == 2 * heads


@pytest.mark.parametrize(
    ("change", "found", "name", "message"),
    [
        (
            ("Shared2FCBBoxHead", "DIIHead"),
            A,
            "mine",
            "DIIHead has no IoU-aware form for MMDetection 3; heads that work: ConvFCBBoxHead, "
            "Shared2FCBBoxHead, Shared4Conv1FCBBoxHead, FCOSHead, ATSSHead",
        ),
        (
            ("", ""),
            B,
            "mine",
            "the cls loss was found for one_stage_cls, this detector's is two_stage_cls",
        ),
        (
            ("Shared2FCBBoxHead", "DoubleConvFCBBoxHead"),
            A,
            "mine",
            "DoubleConvFCBBoxHead has no IoU-aware form for MMDetection 3",
        ),
        (("model =", "_base_ = 'mmdet::x.py'; detector ="), A, "mine", "does not read"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, change, found, name, message):
    base = tmp_path / "theirs.py"
    base.write_text(THEIRS.replace(*change) if change[0] else THEIRS)
    with pytest.raises(ConfigError) as caught:
        DetectorTrainer.export({}, found, base=str(base), target="mmdet3", name=name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def adapter(monkeypatch):
    """The adapter as MMDetection 3 would import it; its heads land in the registry of 2.28 under
    names of their own."""

    def registered(name=None, module=None):
        return lambda cls: (
            monkeypatch.setitem(HEADS.module_dict, f"ForThree{cls.__name__}", cls) or cls
        )

    stand_ins = {
        "mmdet.registry": dict(MODELS=types.SimpleNamespace(register_module=registered)),
        "mmdet.structures": {},
        "mmdet.structures.bbox": dict(
            bbox_overlaps=bbox_overlaps, get_box_tensor=lambda boxes: boxes
        ),
    }
    for name, contents in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mmdet.utils, "reduce_mean", reduce_mean, raising=False)
    monkeypatch.delitem(sys.modules, "cse_autoloss.adapters.mmdet3", raising=False)
    yield importlib.import_module("cse_autoloss.adapters.mmdet3")
    del sys.modules["cse_autoloss.adapters.mmdet3"]


def pair(config, found):
    """The head for 2.x and that for 3.x, of the same weights."""
    searched = {
        branch: dict(
            type="SearchedLoss",
            expression=found.losses[branch],
            space=found.spaces[branch],
            loss_weight=found.loss_weights[branch],
        )
        for branch in found.losses
    }
    configure.set_losses(config, searched)
    (head,) = configure.heads(config)
    extra = (
        {} if "roi_head" in config else dict(train_cfg=config.train_cfg, test_cfg=config.test_cfg)
    )
    torch.manual_seed(0)
    ours = build_head({**head, **extra})
    theirs = build_head({**head, **extra, "type": f"ForThree{head['type']}"})
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        mine, other = (
            torch.stack(value) if isinstance(value, list) else value
            for value in (ours[key], theirs[key])
        )
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_the_adapter_has_the_heads_that_an_export_names(adapter):
    assert set(mmdet3._HEADS) <= set(vars(adapter))


def test_the_head_of_two_stage_detectors_computes_what_ours_computes(adapter):
    ours, theirs = pair(config_files.read_config("faster_rcnn_proxy").model, A)
    features = torch.randn(40, 32, 5, 5)
    corners = torch.rand(40, 2) * 60
    rois = torch.cat([torch.zeros(40, 1), corners, corners + 20 + torch.rand(40, 2) * 40], 1)
    labels = torch.randint(0, ours.num_classes + 1, (40,))
    targets = (labels, torch.ones(40), rois[:, 1:] + torch.randn(40, 4) * 3, torch.ones(40, 4))
    assert_equal(
        ours.loss(*ours(features), rois, *targets), theirs.loss(*theirs(features), rois, *targets)
    )


def dense_batch(head):
    features = [torch.randn(2, 32, size, size) for size in (32, 16, 8, 4)]
    boxes = [
        torch.tensor([[10.0, 10, 40, 50], [60, 70, 110, 100]]),
        torch.tensor([[20.0, 30, 90, 120]]),
    ]
    labels = [torch.tensor([1, 3]), torch.tensor([0])]
    metas = [dict(img_shape=(128, 128, 3), pad_shape=(128, 128, 3))] * 2
    return head(features), boxes, labels, metas


def test_positives_are_counted_in_float32_where_scores_are_in_half_precision(adapter):
    """As under autocast; bfloat16 holds no odd number above 256."""
    for head in pair(config_files.read_config("fcos_proxy").model, B):
        (scores, *others), *_ = dense_batch(head)
        sizes = [level.shape[-2:].numel() * 2 for level in scores]
        labels = torch.full((sum(sizes),), head.num_classes)
        labels[:257] = 0
        aims = [torch.full((size, 4), 9.0) for size in sizes]
        head.get_targets = lambda *_: (labels.split(sizes), aims)
        counts = []
        head.loss_cls.register_forward_pre_hook(
            lambda _loss, _args, named: counts.append(float(named["avg_factor"])), with_kwargs=True
        )
        loss = getattr(head, "loss_by_feat", head.loss)
        loss([level.bfloat16() for level in scores], *others, [torch.zeros(1, 4)] * 2, [], [])
        assert counts == [257]


def test_the_heads_of_one_stage_detectors_compute_what_ours_compute(adapter):
    for name in ("fcos", "atss"):
        ours, theirs = pair(config_files.read_config(f"{name}_proxy").model, B)
        outputs, boxes, labels, metas = dense_batch(ours)
        expected = ours.loss(*outputs, boxes, labels, metas)
        if name == "fcos":  # the targets of 3.x come of a list of instances
            targets = type(theirs).get_targets
            theirs.get_targets = lambda points, instances: targets(
                theirs, points, *zip(*instances, strict=True)
            )
            found = theirs.loss_by_feat(*outputs, list(zip(boxes, labels, strict=True)), metas)
        else:  # loss_single is loss_by_feat_single in 3.x
            single = theirs.loss_by_feat_single
            theirs.loss_single = lambda *args, num_total_samples: single(
                *args, avg_factor=num_total_samples
            )
            found = theirs.loss(*outputs, boxes, labels, metas)
        assert_equal(expected, found)
