"""A trial of a search that two processes on Ray train together gives what one process gives."""

import time

import pytest

from cse_autoloss.cluster import Cluster
from cse_autoloss.config import ClusterSection
from cse_autoloss.trial import Trial
from detectors.training import DetectorTrainer

# ATSS samples no boxes, and nothing is flipped: no random draw depends on the process.
OPTIONS = {
    "trainer": "detectors.training:DetectorTrainer",
    "config": "atss_proxy",
    "steps": 10,
    "tiny_steps": 10,
    "warmup_steps": 0,
    "batch_size": 2,
    "device": "cpu",
    "cfg_options": {
        "data.train.pipeline.3.flip_ratio": 0.0,
        "data.train.pipeline.3.direction": "horizontal",
    },
}
TRIAL = Trial("b", losses={"cls": "CSE-Autoloss-B", "reg": "CSE-Autoloss-B"}, task="tiny")


def test_two_processes_train_a_trial_as_one_does():
    alone = DetectorTrainer(OPTIONS, b"").train(TRIAL)
    with Cluster(ClusterSection(workers=1, num_cpus=0.5, processes=2), OPTIONS) as cluster:
        cluster.prepare()
        cluster.submit(TRIAL)
        end, results = time.monotonic() + 120, []
        while not results and time.monotonic() < end:
            results = cluster.wait()
    (together,) = results
    assert (
        together.failure is None
        and together.provenance["processes"] == 2
        and alone.provenance["processes"] == 1
    )
    assert len(alone.curve) == 10
    assert [loss for _, loss in together.curve] == pytest.approx(
        [loss for _, loss in alone.curve], rel=1e-3
    )
    assert together.mAP == pytest.approx(alone.mAP, abs=0.01)
    ratio = {
        branch: together.loss_weights[branch] / alone.loss_weights[branch]
        for branch in ("cls", "reg")
    }
    assert ratio == pytest.approx({"cls": 1.0, "reg": 1.0}, rel=1e-3)
