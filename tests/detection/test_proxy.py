"""A proxy of any config: made smaller together, measured on the user's data, taken by a run as its
own."""

import pytest
from mmcv import Config

from cse_autoloss.trial import ConfigError
from detectors import config_files, proxy, shrink
from detectors.check import check_trains, check_trial
from detectors.configs import mmdet_config
from detectors.datasets import shapes
from detectors.setup import Setup
from detectors.shrink import ONE_CYCLE, OWN, Shape
from detectors.training import DetectorTrainer

SHAPE = Shape(short_side=160, batch_size=2, steps=120, warmup_steps=240)
WHOLE = """
_base_ = {base!r}
data = dict(train=dict(ann_file={train!r}, img_prefix={images!r}),
    val=dict(ann_file={val!r}, img_prefix={val_images!r}),
    test=dict(ann_file={val!r}, img_prefix={val_images!r}))
optimizer = dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9)
lr_config = dict(_delete_=True, policy='step', step=[8, 11], warmup='linear',
    warmup_iters=500, warmup_ratio=0.001)
runner = dict(_delete_=True, type='EpochBasedRunner', max_epochs=12)
load_from = 'https://example.invalid/theirs.pth'
proxy = None
"""


def small(name, schedule=ONE_CYCLE[0]):
    return shrink.proxy(Config.fromfile(mmdet_config(name)), SHAPE, schedule)


def scales(config):
    return [part["img_scale"] for part in config_files.parts(config.data) if part.get("img_scale")]


def test_images_anchors_and_rois_become_smaller_together():
    config = small("faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py")
    assert set(map(tuple, scales(config))) == {(256, 160)}, (
        "a fifth of 1333 x 800, in whole strides"
    )
    rpn, roi = config.model.rpn_head, config.model.roi_head
    assert rpn.anchor_generator.scales == [pytest.approx(8 / 5)]
    assert roi.bbox_roi_extractor.get("finest_scale", 56) == pytest.approx(56 / 5)
    assert config.model.train_cfg.rcnn.sampler.num == 102
    assert config.model.backbone.depth == 50 and roi.bbox_head.fc_out_channels == 1024
    assert config.model.backbone.init_cfg is None, "checkpoints are the warm-up's"
    fcos = small("fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py").model.bbox_head
    assert (
        fcos.regress_ranges[0] == (-1, pytest.approx(64 / 5)) and fcos.regress_ranges[-1][1] == 1e8
    )


@pytest.mark.parametrize(
    "name", ["retinanet/retinanet_r18_fpn_1x_coco.py", "yolox/yolox_tiny_8x8_300e_coco.py"]
)
def test_a_proxy_of_a_stock_config_is_a_trial_and_its_losses_are_finite(name, tmp_path):
    config = small(name)
    path = tmp_path / "proxy.py"
    path.write_text(config.pretty_text)
    setup = Setup({"config": str(path), "data": "embedded", "device": "cpu"})
    assert (setup.steps, setup.warmup_steps, setup.tiny_steps) == (120, 240, 24)
    assert setup.warmup_config().runner.max_iters == 240
    check_trains(setup.config, name)
    check_trial(setup)


def test_a_mosaic_is_cut_back_to_the_size_that_it_was_made_of():
    steps = small("yolox/yolox_tiny_8x8_300e_coco.py").data.train.pipeline
    (mosaic,) = (step for step in steps if step.type == "Mosaic")
    (affine,) = (step for step in steps if step.type == "RandomAffine")
    assert tuple(-2 * cut for cut in affine.border) == tuple(mosaic.img_scale) < (640, 640)


def test_its_own_schedule_is_scaled_to_steps_and_images():
    config = small("faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py", OWN)
    assert config.lr_config.step == [80, 110] and config.lr_config.by_epoch is False
    assert config.lr_config.warmup_iters == 12
    assert config.optimizer.lr == pytest.approx(0.02 * 2 / 16), "made for 16 images a step"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config of a whole training on data of its author's."""
    folder = tmp_path_factory.mktemp("whole")
    data = shapes.write(folder / "data", seed=7, splits={"train": 16, "val": 8, "test": 4})
    path = folder / "theirs.py"
    path.write_text(
        WHOLE.format(
            base=str(config_files.CONFIGS / "faster_rcnn_proxy.py"),
            **{
                key: str(data / "annotations" / f"instances_{split}2017.json")
                for key, split in (("train", "train"), ("val", "val"))
            },
            images=str(data / "train2017"),
            val_images=str(data / "val2017"),
        )
    )
    return path


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A proxy in seconds, and a cache of its own to keep it in."""
    for name, value in dict(_SIDES=(64,), _STEPS=(10, 10, 12), _SEEDS=2, _ADJUSTED=0).items():
        monkeypatch.setattr(proxy, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_run_makes_a_proxy_of_a_whole_trainings_config_once(whole, quick):
    lines = []
    options = {"config": str(whole), "device": "cpu", "trial_seconds": 90.0}
    adopted = proxy.adopt(options, lines.append)
    said = "\n".join(lines)
    assert "theirs.pth cannot be had here" in said and "--cfg-options load_from=FILE" in said
    assert "mAP of the default" in said and "weak: with an mAP" in said, "of a dozen steps"
    config = Config.fromfile(adopted["config"])
    assert config.runner.type == "IterBasedRunner" and config.proxy.warmup.steps >= 20
    assert config.data.train.ann_file.endswith("instances_train2017.json")
    assert "# seconds a trial: " in open(adopted["config"]).read()
    checked = DetectorTrainer.check(adopted)
    assert checked["images"]["train"] == 16
    assert DetectorTrainer.spaces(adopted).keys() == {"cls", "reg"}
    again = []
    assert proxy.adopt(options, again.append) == adopted and len(again) == 1
    assert proxy.adopt(adopted, again.append) == adopted and len(again) == 1


def test_a_config_that_counts_steps_is_a_trial_as_it_is_and_a_long_one_is_said(tmp_path):
    path, lines = tmp_path / "theirs.py", []
    base = mmdet_config("faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py")
    runner = "dict(_delete_=True, type='IterBasedRunner', max_iters=90000)"
    path.write_text(f"_base_ = {base!r}\nrunner = {runner}\n")
    options = {"config": str(path)}
    assert proxy.adopt(options, lines.append) == options
    (line,) = lines
    assert "90000 steps; cse-search proxy" in line and str(path) in line
    for known in ({"config": str(path), "steps": 300}, {"config": "faster_rcnn_proxy"}, {}):
        assert proxy.adopt(known, lines.append) == known and len(lines) == 1


def test_a_trial_that_cannot_be_as_short_is_refused_with_what_would_do(whole, quick):
    config = config_files.read_config(str(whole))
    with pytest.raises(
        ConfigError, match=r"a trial of 10 steps .* takes about \d+ s here.*--seconds \d+"
    ):
        proxy.make(config, {"device": "cpu"}, 0.05, lambda line: None)
