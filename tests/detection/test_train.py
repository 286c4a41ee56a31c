"""`cse-search train`: any config, any losses, mmdet's own training; what is wrong is said before
anything starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from click.testing import CliRunner
from mmcv import Config

from cse_autoloss.errors import UserError
from detectors import config_files
from detectors.commands import compare as compare_command
from detectors.commands import train as train_command
from detectors.compare import read as read_work_dir
from detectors.compare import read_curves
from detectors.datasets import shapes
from detectors.setup import Setup
from detectors.train import Training, _start_as_trials_do, join_processes, read
from detectors.training import DetectorTrainer

SMALL = {"train": 24, "val": 6, "test": 4}
# One step takes a tenth of a second; no warm-up, whose weights are tested where they are made.
SHORT = ["--cfg-options", "proxy.warmup.steps=0", "data.samples_per_gpu=2", "log_config.interval=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"coco:{shapes.write(tmp_path_factory.mktemp('data') / 'shapes', seed=7, splits=SMALL)}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """Two trainings of six steps: CSE-Autoloss-A beside GIoU, and the default losses."""
    folder = tmp_path_factory.mktemp("trained")
    for name, losses in (
        ("a", ["--loss_cls", "CSE-Autoloss-A", "--loss-reg", "GIoU"]),
        ("default", ["--loss-cls", "default", "--loss_reg", "default"]),
    ):
        result = CliRunner().invoke(
            train_command,
            [
                "faster_rcnn_proxy",
                *losses,
                "--data",
                data,
                "--work_dir",
                str(folder / name),
                *SHORT,
                "runner.max_iters=6",
            ],
        )
        assert result.exit_code == 0, result.output + repr(result.exception)
    return folder


def lines(folder, mode):
    log = sorted(folder.glob("*.log.json"))[-1].read_text().splitlines()
    return [line for line in map(json.loads, log) if line.get("mode") == mode]


def test_it_trains_measures_and_keeps_checkpoints_and_config(trained):
    steps, measured = lines(trained / "a", "train"), lines(trained / "a", "val")
    assert [line["iter"] for line in steps] == [1, 2, 3, 4, 5, 6] and all(
        "loss_bbox" in line for line in steps
    )
    assert len(measured) == 3, (
        "the largest number of measurements up to five that divides six steps"
    )
    assert all(0 <= line["bbox_mAP"] <= 1 for line in measured)
    config = Config.fromfile(str(trained / "a" / "faster_rcnn_proxy.py"))
    head = config.model.roi_head.bbox_head
    assert head.loss_cls.expression == "CSE-Autoloss-A" and head.loss_bbox.expression == "GIoU"
    assert head.reg_decoded_bbox and config.seed == 0 and config.data.samples_per_gpu == 2
    meta = torch.load(trained / "a" / "latest.pth", weights_only=True)["meta"]
    assert meta["iter"] == 5, (
        "mmcv counts a step after its checkpoint is written: going on repeats one"
    )
    assert tuple(meta["CLASSES"]) == shapes.CLASSES
    assert lines(trained / "default", "train")[0]["loss_bbox"] != steps[0]["loss_bbox"]


def test_it_goes_on_from_a_checkpoint(trained, data, tmp_path):
    shutil.copytree(trained / "a", tmp_path / "work", symlinks=True)
    result = CliRunner().invoke(
        train_command,
        [
            "faster_rcnn_proxy",
            "--loss-cls",
            "CSE-Autoloss-A",
            "--loss-reg",
            "GIoU",
            "--data",
            data,
            "--work-dir",
            str(tmp_path / "work"),
            "--resume-from",
            str(trained / "a" / "iter_4.pth"),
            "--no-validate",
            *SHORT,
            "runner.max_iters=8",
        ],
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert [line["iter"] for line in lines(tmp_path / "work", "train")] == [4, 5, 6, 7, 8]
    curves = read_work_dir(tmp_path / "work").curves
    assert [step for step, _ in curves.loss] == [1, 2, 3, 4, 5, 6, 7, 8], (
        "what came after the checkpoint is replaced"
    )


def test_two_trainings_are_drawn_side_by_side(trained, tmp_path):
    picture = tmp_path / "both.png"
    arguments = [
        str(trained / "a"),
        str(trained / "default"),
        "-o",
        str(picture),
        "--images",
        "3",
        "--score",
        "0.05",
    ]
    result = CliRunner().invoke(compare_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (
        "best mAP 0." in result.output
        and picture.read_bytes().startswith(b"\x89PNG")
        and picture.stat().st_size > 50_000
    )


def test_curves_of_epochs_are_in_epochs(tmp_path):
    log = tmp_path / "1.log.json"
    entries = [{"env_info": ""}] + [
        {"mode": "train", "epoch": epoch, "iter": step, "loss": 10.0 * epoch + step}
        for epoch in (1, 2)
        for step in (50, 100)
    ]
    entries.insert(3, {"mode": "val", "epoch": 1, "iter": 7, "bbox_mAP": 0.25})
    log.write_text("\n".join(map(json.dumps, entries)))
    curves = read_curves([log], Config(dict(runner=dict(type="EpochBasedRunner", max_epochs=2))))
    assert curves.unit == "epoch" and curves.mAP == ((1, 0.25),)
    assert curves.loss == ((0.5, 60.0), (1.0, 110.0), (1.5, 70.0), (2.0, 120.0))


def test_a_folder_without_a_training_is_said_in_one_line(trained, tmp_path):
    with pytest.raises(UserError, match=r"no log \*.log.json"):
        read_work_dir(tmp_path)


def test_default_takes_a_searched_loss_out_of_a_full_size_config(data):
    for name in ("faster_rcnn_r50", "cascade_rcnn_r50", "fcos_r50", "atss_r50"):
        config = read(Training(name, {"cls": "default", "reg": "default"}, data))
        heads = (
            config.model.roi_head.bbox_head
            if "roi_head" in config.model
            else config.model.bbox_head
        )
        for head in heads if isinstance(heads, list) else [heads]:
            assert head.loss_cls.type in ("CrossEntropyLoss", "FocalLoss")
            assert head.loss_bbox.type in ("L1Loss", "SmoothL1Loss", "GIoULoss")
            assert not head.get("reg_decoded_bbox") and head.num_classes == len(shapes.CLASSES)
    kept = read(Training("faster_rcnn_r50", {"cls": "default"}, data)).model.roi_head.bbox_head
    assert (
        kept.loss_cls.type == "CrossEntropyLoss" and kept.loss_bbox.expression == "CSE-Autoloss-A"
    )


def test_a_config_of_mmdets_own_takes_any_losses_and_data(data):
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    config = read(Training(str(folder / "retinanet" / "retinanet_r50_fpn_1x_coco.py"), data=data))
    assert config.model.bbox_head.type == "RetinaHead", (
        "with its own losses any detector trains as it is"
    )
    voc = folder / "pascal_voc" / "faster_rcnn_r50_fpn_1x_voc0712.py"
    config = read(Training(str(voc), {"cls": "CSE-Autoloss-A"}, data))
    assert (
        config.data.train.type == "RepeatDataset"
        and config.data.train.dataset.type == "CocoDataset"
    )
    assert (
        config.evaluation.metric == "bbox"
        and config.model.roi_head.bbox_head.type == "IoUAwareShared2FCBBoxHead"
    )


OWN = """data = dict(train=dict(ann_file='{0}/annotations/instances_train2017.json',
    img_prefix='{0}/train2017'), val=dict(ann_file='{0}/annotations/instances_val2017.json',
    img_prefix='{0}/val2017'), test=dict(ann_file='{0}/annotations/instances_val2017.json',
    img_prefix='{0}/val2017'))"""


@pytest.mark.parametrize("named", ["proxy = dict(data='coco:{0}')", OWN], ids=["made with", "own"])
def test_a_proxy_trains_on_what_its_trials_train_on_from_the_same_weights(
    named, data, tmp_path, monkeypatch, capsys
):
    folder, path, prepared = data.removeprefix("coco:"), tmp_path / "proxy.py", []
    base = str(config_files.CONFIGS / "faster_rcnn_proxy.py")
    path.write_text(f"_base_ = {base!r}\n{named.format(folder)}\n")
    monkeypatch.setattr(
        DetectorTrainer, "prepare", lambda options: prepared.append(options) or b"weights"
    )
    training = Training(str(path), work_dir=tmp_path / "work")
    config, trials = read(training), Setup({"config": str(path)})
    assert config.data.train.ann_file == trials.data.splits["train"].ann_file
    assert folder in capsys.readouterr().err.splitlines()[-1]
    _start_as_trials_do(training, config)
    assert Setup(prepared[0]).warmup_path() == trials.warmup_path()


def test_it_says_first_what_it_trains_on(data, capsys):
    read(Training("faster_rcnn_proxy", data=data))
    assert capsys.readouterr().err.splitlines()[-1] == f"training on {data}: 6 classes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["faster_rcn_proxy"], "did you mean 'faster_rcnn_proxy'?"),
        (
            ["faster_rcnn_proxy", "--loss-cls", "CSE-Autoloss-C"],
            "--loss-cls: no loss 'CSE-Autoloss-C'",
        ),
        (["faster_rcnn_proxy", "--loss-reg", "Loog(U)"], "--loss-reg: "),
        (["atss_proxy", "--loss-cls", "Dot(X,Y)"], "--loss-cls: "),
        (["faster_rcnn_proxy", "--data", "coco:/nowhere"], "/nowhere is no folder"),
        (["faster_rcnn_proxy", "--cfg-options", "optimizer.lr.x=1"], "--cfg-options: "),
        (["faster_rcnn_proxy", "--cfg-options=lr"], "--cfg-options lr: expected KEY=VALUE"),
        (
            ["faster_rcnn_proxy", "--resume-from", "/nowhere.pth"],
            "/nowhere.pth: no such checkpoint",
        ),
        (["faster_rcnn_proxy", "--launcher", "pytorch"], "not started by torchrun"),
        (
            ["faster_rcnn_r50"],
            "instances_train2017.json: no such file (data.train.ann_file); give --data",
        ),
        (["faster_rcnn_proxy", "--cfg-options", "model.neck.type=FNP"], "FNP"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_starts(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain = ["--cfg-options", "proxy.warmup.steps=0"]
    result = CliRunner().invoke(train_command, [*arguments, *plain])
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not list(tmp_path.rglob("*.log"))


def test_without_a_launcher_there_are_no_processes_to_join():
    assert join_processes("none") is False


def test_a_torchvision_that_is_installed_and_broken_is_as_good_as_none(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import detectors, mmcv.runner; print('works')"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
    )
    assert done.stdout == "works\n", done.stderr[-1000:]
