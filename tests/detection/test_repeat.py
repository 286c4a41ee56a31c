"""What was measured is what is handed back: a trial repeats to the digit in another process, and an
exported config is the one that was trained."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mmcv import Config

from cse_autoloss.config import parse_config
from cse_autoloss.export import export_run
from cse_autoloss.journal import Journal
from cse_autoloss.notes import notes
from cse_autoloss.trial import Found, Trial
from cse_autoloss.trust import sign
from detectors import training
from detectors.commands import train as train_command
from detectors.datasets import shapes
from detectors.training import DetectorTrainer

SPACES = {"cls": "two_stage_cls", "reg": "reg"}
TRIAL = Trial(
    "full-1",
    {"reg": "Add(Sub(1,Div(I,U)),Div(Sub(E,U),E))"},  # GIoU, as a search has it
    {"reg": "reg"},
    seed=3,
    scale={"cls": 2.0, "reg": 0.5},
    lr_scale=0.5,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one trial: a found regression loss beside the default
    classification."""
    folder = tmp_path_factory.mktemp("repeat")
    data = shapes.write(folder / "data", seed=7, splits={"train": 16, "val": 6, "test": 4})
    config = parse_config(
        {
            "detector": {
                "trainer": "detectors.training:DetectorTrainer",
                "config": "faster_rcnn_proxy",
                "data": f"coco:{data}",
                "steps": 11,
                "warmup_steps": 10,
                "device": "cpu",
            }
        }
    )
    prepared = DetectorTrainer.prepare(config.detector)
    result = DetectorTrainer(config.detector, prepared).train(TRIAL)
    assert result.failure is None
    meta = {"config": config.model_dump(mode="json"), "spaces": SPACES, "classes": [], "images": {}}
    journal = Journal.create(folder / "run", meta)
    journal.prepared = prepared
    with journal.step():
        candidate = journal.add_candidate(TRIAL.losses, {"reg": "f"}, "mutation", "full")
        journal.start_trial("full", TRIAL, candidate)
        journal.finish_trial(result)
        journal.set_fitness(candidate, result.mAP, 1)
    sign(journal)
    journal.close()
    return folder / "run"


def test_a_trial_repeats_to_the_digit_in_another_process(run):
    done = subprocess.run(
        [sys.executable, "-m", "cse_autoloss.cli", "train", "--trial", f"{run}:full-1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "full-1: repeated to the digit" in done.stdout and "val/mAP: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trial", "full-1"], "expected RUN:KEY"),
        (["--trial", "RUN:full-2"], "no finished trial 'full-2'; it has 1: full-1"),
        (["--trial", "RUN:full-1", "--seed", "4"], "it takes no other option"),
        ([], "give CONFIG or --trial"),
    ],
)
def test_what_cannot_be_repeated_is_said_in_one_line(run, arguments, message):
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    done = CliRunner().invoke(train_command, arguments)
    assert done.exit_code and message in done.output + str(done.exception)


def test_every_exported_file_says_what_its_formula_expects_and_how_strong_it_was(run, tmp_path):
    files = {
        path.name: path.read_text() for path in export_run(Journal.read(run), tmp_path / "best.py")
    }
    weight = Journal.read(run).trials("full")[0].result.loss_weights["reg"]
    for text in (files["best.py"], files["best_reg.py"]):
        assert "free of scale: boxes in pixels, in shares of the image" in text
        assert f"loss weight {weight:g} and a gradient 0.5 times as strong as the default" in text
    spaces = {"reg": "reg"}
    sized = Found({"reg": "CSE-Autoloss-B"}, spaces, {"reg": 1.0}, {})
    assert notes(sized, "reg")[0].startswith("not free of scale: boxes in pixels")


def test_an_exported_config_is_the_one_that_was_measured(run, tmp_path, monkeypatch):
    export_run(Journal.read(run), tmp_path / "best.py")
    exported = Config.fromfile(str(tmp_path / "best.py"))
    journal = Journal.read(run)
    (row,) = journal.trials("full")
    built = []
    build = training.build_detector
    monkeypatch.setattr(
        training,
        "build_detector",
        lambda config: built.append(copy.deepcopy(config)) or build(config),
    )
    trainer = DetectorTrainer(parse_config(journal["config"]).detector, journal.prepared)
    result = trainer.train(dataclasses.replace(TRIAL, evaluate=()))
    build(exported.model)  # mmdet's detectors write into the config that they are built from
    assert result.curve == row.result.curve and built[-1] == exported.model
    ours = trainer.setup.config
    for key in ("optimizer_config", "runner"):
        assert exported[key] == ours[key], key
    assert exported.data.samples_per_gpu == ours.data.samples_per_gpu
    for split in ("train", "val"):
        assert exported.data[split].pipeline == ours.data[split].pipeline
    head = exported.model.roi_head.bbox_head
    assert head.loss_cls.loss_weight == row.result.loss_weights["cls"] == 2.0
    assert head.loss_bbox.loss_weight == row.result.loss_weights["reg"]
    assert exported.optimizer.lr == exported.lr_config.max_lr == 0.5 * ours.optimizer.lr
    assert (exported.optimizer.type, exported.lr_config.policy) == ("AdamW", "OneCycle")
    assert Path(exported.load_from).read_bytes() == journal.prepared
