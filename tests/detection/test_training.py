"""A trial in, mAP out: real mmdet trainings of the proxy, short ones, on the embedded data set."""

import io
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmdet
import numpy as np
import pytest
import torch
from mmcv import Config
from mmdet.datasets import CocoDataset

from cse_autoloss.config import read_config
from cse_autoloss.run import check
from cse_autoloss.trial import ConfigError, Found, Trial, TrialResult, read_result
from detectors import config_files, configure, training
from detectors.check import check_trial
from detectors.datasets import shapes
from detectors.images import dataset
from detectors.setup import Setup
from detectors.training import DetectorTrainer

OPTIONS = {"steps": 12, "tiny_steps": 40, "warmup_steps": 30, "device": "cpu"}
A = {"cls": "CSE-Autoloss-A", "reg": "CSE-Autoloss-A"}
COMBINATIONS = [{}, {"cls": A["cls"]}, {"reg": A["reg"]}, A]


@pytest.fixture(scope="module")
def prepared():
    return DetectorTrainer.prepare(OPTIONS)


@pytest.fixture(scope="module")
def trainer(prepared):
    return DetectorTrainer(OPTIONS, prepared)


def trial(**changes):
    return Trial("key", **{"evaluate": (), **changes})


def test_reading_a_split_to_measure_on_warns_of_nothing(trainer):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dataset(trainer.setup, "val", training=False)
    assert not told


def test_a_gpu_that_a_worker_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match="detector.device: cuda, and this worker has no GPU; cluster.num_gpus=1"
    ):
        DetectorTrainer({**OPTIONS, "device": "cuda"}, b"")


def test_a_detector_on_the_cpu_stays_there_where_torch_sees_a_gpu(trainer, monkeypatch):
    where = sys.modules[torch.nn.DataParallel.__module__]
    monkeypatch.setattr(where, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(where, "_get_all_device_indices", lambda: [0])
    assert trainer.train(trial()).failure is None


def test_check_says_what_will_be_trained_on_what():
    checked = DetectorTrainer.check(OPTIONS)
    assert DetectorTrainer.spaces(OPTIONS) == {"cls": "two_stage_cls", "reg": "reg"}
    assert len(checked["classes"]) == checked["images"]["tiny"] >= 6
    assert (
        checked["images"]["train"] > checked["images"]["val"] > 100
        and checked["images"]["test"] > 100
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stpes": 5}, "detector.stpes: unknown key; did you mean 'steps'?"),
        ({"steps": "many"}, "detector.steps: should be a valid integer"),
        ({"steps": 3}, "detector.steps: should be greater than or equal to 10"),
        ({"steps": 10**18}, "detector.steps: should be less than or equal to"),
        ({"batch_size": 10**9}, "detector.batch_size: should be less than or equal to 1024"),
        ({"data": ""}, "detector.data: '' is no folder"),
        ({"warmup_steps": 3}, "detector.warmup_steps: should be 0 or at least 10"),
        ({"config": "faster_rcn_proxy"}, "did you mean 'faster_rcnn_proxy'?"),
        ({"config": "/here/faster_rcn_proxy"}, "did you mean 'faster_rcnn_proxy'?"),
        ({"config": "/nowhere/config.py"}, "no config '/nowhere/config.py'"),
        ({"data": "coco:/nowhere"}, "/nowhere is no folder"),
        ({"device": "tpu"}, "detector.device: should be 'cpu' or 'cuda', found 'tpu'"),
        (
            {"cfg_options": {"runner.type": "EpochBasedRunner"}},
            "runner=dict(type='IterBasedRunner'",
        ),
        (
            {"cfg_options": {"model.roi_head.bbox_head.type": "DIIHead"}},
            "heads that work: ConvFCBBoxHead",
        ),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_would_be_right(options, message):
    with pytest.raises(ConfigError) as caught:
        DetectorTrainer.check(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_stages_of_heads_without_a_warm_trunk_are_refused_before_a_run():
    cold = ["detector.warmup_steps=0", "detector.device=cpu"]
    with pytest.raises(ConfigError, match="stages.head.task: head: detector.warmup_steps: 0, and"):
        check(read_config(None, "quickstart", cold))
    whole = [*cold, "stages.head.task=full", "stages.final.task=full"]
    assert check(read_config(None, "quickstart", whole))["untrainable"].keys() == {"head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # what the model is built of knows its keys
        ({"model.backbone.depht": 18}, "; did you mean model.backbone.depth?"),
        ({"model.backbone.depth": 19}, "model.backbone.depth does not train: KeyError"),
        ({"model": {"neck": {"num_outz": 5}}}, "did you mean model.neck.num_outs?"),
        ({"optimizer.lr": "fast"}, "with cfg_options optimizer.lr does not train: TypeError"),
        ({"lr_config.policy": "OneCicle"}, "OneCicleLrUpdaterHook is not in the hook"),
        ({"data.samples_per_gpu": "8"}, "data.samples_per_gpu should be a whole number from 1 to"),
        ({"data.samples_per_gpu": 10**9}, "should be a whole number from 1 to 1,024, found 100000"),
        ({"": 1}, "detector.cfg_options.: is no key; one is such as optimizer.lr"),
        ({"class.lr": 1}, "detector.cfg_options.class.lr: is no key"),
        ({"model..lr": 1}, "detector.cfg_options.model..lr: is no key"),
        ({"proxy.head": [1]}, "proxy.head should be a dict, found [1]"),
        ({"proxy.warmup.steps": -5}, "proxy.warmup.steps should be a whole number from 0 to"),
        ({"runner": None}, "runner=dict(type='IterBasedRunner'"),
        ({"data.train.pipeline.1.with_boxx": 1}, "did you mean data.train.pipeline.1.with_bbox"),
        ({"model": None}, "cfg_options.model: should be a dict with keys such as type"),
        ({"model.test_cfg.rcnn.nms": 7}, "rcnn.nms: should be a dict with keys such as type"),
        ({"model.test_cfg.rcnn.nms.type": "mns"}, "rcnn.nms.type does not train: NameError"),
        ({"model.train_cfg.rcnn.sampler.num": "m"}, "sampler.num does not train: TypeError"),
        ({"data.train.pipeline": []}, "config's data.train should have a pipeline"),
        ({"data.val": None, "data.test": None}, "data.val or data.test should have a pipeline"),
        ({"runner.max_iters": "1e3"}, "runner.max_iters should be a whole number from 1"),
        # and here nobody would say a word
        ({"model.test_cfg.rcnn.score_th": 0.1}, "did you mean model.test_cfg.rcnn.score_thr?"),
        (
            {"model.train_cfg.rcnn.sampler.numm": 9},
            "did you mean model.train_cfg.rcnn.sampler.num?",
        ),
        ({"optimzer.lr": 1}, "optimzer.lr: the config has no such key; did you mean optimizer?"),
    ],
)
def test_options_that_break_the_model_are_found_before_anything_starts(changes, message):
    with pytest.raises(ConfigError) as caught:
        check_trial(Setup({"device": "cpu", "cfg_options": changes}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_are_new_to_the_config_and_right_are_taken():
    changes = {
        "model.roi_head.bbox_head.conv_out_channels": 64,
        "optimizer_config.grad_clip": {"max_norm": 10},
        "model.test_cfg.rcnn.nms": {"type": "soft_nms", "min_score": 0.1},
    }
    check_trial(Setup({**OPTIONS, "cfg_options": changes}))


def test_the_weights_that_trials_start_from_are_made_once_and_are_those_of_backbone_neck_and_rpn(
    prepared,
):
    weights = torch.load(io.BytesIO(prepared), weights_only=True)
    assert {name.split(".")[0] for name in weights} == {"backbone", "neck", "rpn_head"}
    assert DetectorTrainer.prepare(OPTIONS) == prepared


def test_a_trial_is_reproducible_and_its_seed_matters(trainer):
    first = trainer.train(trial(losses=A, seed=1, evaluate=("val",)))
    again = trainer.train(trial(losses=A, seed=1, evaluate=("val",)))
    other = trainer.train(trial(losses=A, seed=2))
    assert first.failure is None and 0 <= first.mAP <= 1
    assert (first.curve, first.metrics) == (again.curve, again.metrics)
    assert other.curve != first.curve
    assert TrialResult.from_json(first.to_json()) == first and first.detections == {}
    assert {"torch", "mmdet", "mmcv-full", "config_digest", "data_digest", "device", "host"} <= set(
        first.provenance
    )


@pytest.mark.parametrize("losses", COMBINATIONS, ids=lambda losses: "+".join(losses) or "default")
def test_all_four_combinations_of_searched_and_default_losses_learn(trainer, losses):
    steps = []
    result = trainer.train(trial(losses=losses), lambda done, total: steps.append((done, total)))
    assert result.failure is None and result.steps == 12 and steps[-1] == (12, 12)
    values = [loss for _, loss in result.curve]
    assert sum(values[-4:]) < sum(values[:4])


def test_searched_losses_start_with_the_gradient_norm_of_the_defaults(trainer):
    config, weights = trainer._with_losses(trial(losses=A, scale={"cls": 1.0, "reg": 2.0}))
    norms, default = trainer._gradient_norms(config), trainer._gradient_norms(trainer.setup.config)
    assert norms["cls"] == pytest.approx(default["cls"], rel=1e-3)
    assert norms["reg"] == pytest.approx(2 * default["reg"], rel=1e-3)
    assert weights["cls"] != 1.0 != weights["reg"]
    _, tripled = trainer._with_losses(trial(losses={"cls": "Mul(3,Neg(Dot(Y,Log(Softmax(X)))))"}))
    _, plain = trainer._with_losses(trial(losses={"cls": "Neg(Dot(Y,Log(Softmax(X))))"}))
    assert plain["cls"] == pytest.approx(1.0, rel=1e-3), (
        "cross-entropy as an expression is the default itself"
    )
    assert tripled["cls"] == pytest.approx(plain["cls"] / 3, rel=1e-3)


def test_the_scale_of_a_default_loss_is_its_weight(trainer):
    config, weights = trainer._with_losses(trial(scale={"cls": 2.0, "reg": 0.5}))
    assert weights == {"cls": 2.0, "reg": 0.5}
    head = config.model.roi_head.bbox_head
    assert (head.loss_cls.loss_weight, head.loss_bbox.loss_weight) == (2.0, 0.5)
    assert not head.get("reg_decoded_bbox"), "mmdet's L1 is on encoded deltas"


def test_cross_entropy_as_an_expression_trains_as_mmdets_own(trainer):
    ours = trainer.train(trial(losses={"cls": "Neg(Dot(Y,Log(Softmax(X))))"}))
    default = trainer.train(trial())
    assert [loss for _, loss in ours.curve] == pytest.approx(
        [loss for _, loss in default.curve], rel=0.02
    )


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ({"cls": "Dot(Y,Exp(Exp(Exp(X))))"}, "diverged at step"),
        ({"cls": "1"}, "gradient norm 0.0 of the cls loss"),
        ({"cls": "Neg(Dot(Y,Log(Div(X,Sub(X,X)))))"}, "of the cls loss before the first step"),
    ],
)
def test_a_loss_that_breaks_down_is_a_failed_result_with_its_reason(trainer, losses, reason):
    result = trainer.train(trial(losses=losses, lr_scale=1e4))
    assert result.mAP is None and reason in result.failure


def test_a_trial_ends_at_its_time_limit(trainer):
    result = trainer.train(trial(time_limit=0.5))
    assert result.mAP is None and "time limit reached" in result.failure and result.seconds < 5


def test_a_busy_machine_does_not_add_to_a_trials_time(trainer, monkeypatch):
    slow = SimpleNamespace(
        monotonic=lambda: 1000 * time.monotonic(), process_time=time.process_time
    )
    monkeypatch.setattr("detectors.training.time", slow)
    result = trainer.train(trial(time_limit=100.0))
    assert result.failure is None and result.seconds > 100


def test_the_tiny_task_learns_its_few_images(trainer):
    result = trainer.train(trial(task="tiny"))
    assert result.steps == 40 and result.mAP == result.metrics["tiny/mAP"]
    curve = [loss for _, loss in result.curve]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("task", ["full", "head"])
def test_each_split_is_measured_on_its_own_images_and_boxes(task, tmp_path, monkeypatch):
    folder = shapes.write(tmp_path, seed=7, splits={"train": 12, "val": 3, "test": 5})
    options = {"data": f"coco:{folder}", "steps": 10, "head_steps": 10, "warmup_steps": 10}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trainer = DetectorTrainer({**options, "device": "cpu"}, b"")
    weights = trainer._model(trainer.setup.config, 0).state_dict()  # that nobody has trained
    trainer._warm = {k: v for k, v in weights.items() if not k.startswith("roi_head.")}
    read, measured = [], []

    def names(data):
        return {f"{data.img_prefix}/{info['filename']}" for info in data.data_infos}

    def reading(data, index):
        read.append(f"{data.img_prefix}/{data.data_infos[index]['filename']}")
        return item(data, index)

    def measuring(function):
        return lambda data, *args, **more: measured.append(data) or function(data, *args, **more)

    item = CocoDataset.__getitem__
    monkeypatch.setattr(CocoDataset, "__getitem__", reading)
    monkeypatch.setattr(CocoDataset, "evaluate", measuring(CocoDataset.evaluate))
    monkeypatch.setattr(training, "average_precision", measuring(training.average_precision))
    result = trainer.train(trial(task=task, evaluate=("test",)))
    assert result.failure is None and "test/mAP" in result.metrics
    own = {split: names(dataset(trainer.setup, split, False)) for split in ("val", "test")}
    assert len(own["val"]) == 3 and len(own["test"]) == 5
    assert own["test"] <= set(read) and not own["val"] & set(read)
    assert measured and all(names(data) == own["test"] for data in measured)


def test_an_exported_config_trains_with_mmdets_own_script(tmp_path):
    found = Found(
        A, {"cls": "two_stage_cls", "reg": "reg"}, {"cls": 0.5, "reg": 4.0}, {"mAP on val": 0.3}
    )
    path = tmp_path / "found.py"
    path.write_text(DetectorTrainer.export(OPTIONS, found)["found.py"])
    assert "0.3" in path.read_text() and "proxy" not in Config.fromfile(str(path))
    script = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    command = [
        sys.executable,
        "-m",
        "detectors",
        str(script),
        str(path),
        "--work-dir",
        str(tmp_path / "work"),
        "--no-validate",
        "--cfg-options",
        "runner.max_iters=6",
        "checkpoint_config.interval=6",
        "device=cpu",
        "log_config.interval=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "work" / "iter_6.pth").is_file()
    assert "loss_bbox" in done.stderr + done.stdout


def test_a_found_loss_goes_into_a_users_own_config(tmp_path):
    base = (
        Path(mmdet.__file__).parent
        / ".mim"
        / "configs"
        / "faster_rcnn"
        / "faster_rcnn_r50_fpn_1x_coco.py"
    )
    found = Found(A, {"cls": "two_stage_cls", "reg": "reg"}, {"cls": 1.0, "reg": 10.0}, {})
    path = tmp_path / "mine.py"
    path.write_text(DetectorTrainer.export(OPTIONS, found, base=str(base))["found.py"])
    config = Config.fromfile(str(path))
    head = config.model.roi_head.bbox_head
    assert (
        head.type == "IoUAwareShared2FCBBoxHead"
        and head.reg_decoded_bbox
        and head.loss_bbox.loss_weight == 10.0
    )
    original = Config.fromfile(str(base))
    for key in ("optimizer", "lr_config", "data", "runner"):
        assert config[key] == original[key]
    other = base.parents[1] / "deformable_detr" / "deformable_detr_r50_16x2_50e_coco.py"
    with pytest.raises(ConfigError, match="'DeformableDETRHead' has no IoU-aware form"):
        DetectorTrainer.export(OPTIONS, found, base=str(other))


def test_every_config_of_the_package_reads_and_inherits_from_mmdets():
    for name in config_files.config_names():
        config = config_files.read_config(name)
        assert configure.heads(config.model) and "FPN" in config.model.neck.type


def test_a_trial_tells_its_surest_boxes_in_some_images_of_a_split(trainer, prepared, monkeypatch):
    monkeypatch.setattr("detectors.images.SAMPLE", 30)
    wanted = trial(evaluate=("tiny", "test"), detections="test")
    result = trainer.train(wanted)
    names = {info["filename"] for info in trainer._dataset("test", False).data_infos}
    assert len(result.detections) == 30 and result.detections.keys() < names
    seen = list(result.detections.values())
    objects = [box for of in seen for box in of["objects"]]
    assert len([box for of in seen for box in of["found"]]) == len(objects) > 30
    for *box, label in objects:
        assert 0 <= box[0] < box[2] <= 128 and label in range(6)
    for *_, label, score in (box for of in seen for box in of["found"]):
        assert 0 < score <= 1 and label in range(6)
    assert read_result(wanted, result.to_json()) == result
    some = sorted(result.detections)[:2]
    pictures = DetectorTrainer.pictures(OPTIONS, "test", some)
    assert sorted(pictures) == some
    for picture in pictures.values():
        image = cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (picture.height, picture.width, 3) and image.std() > 10
