"""Many processes train as one does: same seed, same global batch, same losses and gradients."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from detectors.configs import __file__ as configs
from detectors.train import Training, train

ROOT = Path(__file__).parents[2]
STEPS = 10
CONFIG = """
_base_ = "{base}"
proxy = dict(warmup=dict(steps=0))
data = dict(samples_per_gpu={images})
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", img_scale=(128, 128), keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=0.0),
    dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        to_rgb=True),
    dict(type="Pad", size_divisor=32), dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels"]),
]
data["train"] = dict(pipeline=train_pipeline)
optimizer = dict(_delete_=True, type="SGD", lr=0.005, momentum=0.9)
optimizer_config = dict(grad_clip=None)
lr_config = dict(_delete_=True, policy="fixed", by_epoch=False)
runner = dict(max_iters={steps})
custom_hooks = [dict(type="RecordSteps", path="{record}")]
custom_imports = dict(imports=["detectors", "recording"])
{extra}
"""
BY_IMAGE = """
by_image = dict(sampler=dict(type="SamplerByImage"))
model = dict(train_cfg=dict(rpn=by_image, rcnn=by_image))
"""


def training(folder, base, images, processes):
    """A config file and where its record of ten steps goes, with as many images a step in all."""
    path, config = folder / f"{base}-{processes}.pt", folder / f"{base}_{processes}.py"
    config.write_text(
        CONFIG.format(
            base=Path(configs).parent / f"{base}.py",
            images=images // processes,
            steps=STEPS,
            record=path,
            extra=BY_IMAGE if "rcnn" in base else "",
        )
    )
    return config, path


def norm(gradients):
    """The Euclidean norm of a whole model's gradients."""
    return torch.linalg.vector_norm(
        torch.cat([gradient.double().flatten() for gradient in gradients.values()])
    ).item()


@pytest.mark.parametrize(
    ("base", "name", "images"),
    [("faster_rcnn_proxy", "CSE-Autoloss-A", 4), ("atss_proxy", "CSE-Autoloss-B", 4)],
)
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path, base, name, images):
    """In float32 over ten steps of SGD; what differs is the order of sums.

    Gradients are compared as one vector: rounding can switch a ReLU whose input is within it of 0,
    for one position of a step.
    """
    losses = {"cls": name, "reg": name}
    config, path = training(tmp_path, base, images, processes=1)
    train(Training(str(config), losses, work_dir=tmp_path / "one", validate=False))
    one = torch.load(path, weights_only=True)
    config, path = training(tmp_path, base, images, processes=2)
    command = [
        ROOT / "scripts" / "dist_train.sh",
        config,
        "2",
        "--work-dir",
        tmp_path / "two",
        "--no-validate",
        "--loss-cls",
        name,
        "--loss-reg",
        name,
    ]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parents[1]}",
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(path, weights_only=True)
    assert len(one) == len(two) == STEPS
    losses, gradients = [], []
    for (losses_1, gradients_1), (losses_2, gradients_2) in zip(one, two, strict=True):
        assert losses_1.keys() == losses_2.keys() and gradients_1.keys() == gradients_2.keys()
        losses += [
            abs(losses_1[key] - losses_2[key]) / max(1, abs(losses_1[key])) for key in losses_1
        ]
        difference = {key: gradients_1[key] - gradients_2[key] for key in gradients_1}
        gradients.append(norm(difference) / norm(gradients_1))
    print(
        f"{base}: {STEPS} steps, largest relative difference of a loss {max(losses):.1e}, of the "
        f"gradient {max(gradients):.1e} (median {median(gradients):.1e})"
    )
    assert max(losses) < 1e-4 and max(gradients) < 1e-4 and median(gradients) < 1e-5
    assert one[0][0]["loss"] != one[-1][0]["loss"], "ten different steps"
