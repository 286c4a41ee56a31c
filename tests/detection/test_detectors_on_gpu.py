"""On a GPU detectors, heads and a cluster's workers train as on the CPU. Skipped, in words, without
one."""

import time

import pytest
import torch
from mmcv.runner import wrap_fp16_model
from mmdet.models import build_detector
from test_six import PROXIES, released

from cse_autoloss.cluster import Cluster
from cse_autoloss.config import ClusterSection
from cse_autoloss.trial import Trial
from detectors.training import DetectorTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
OPTIONS = {"steps": 60, "tiny_steps": 60, "warmup_steps": 100, "head_steps": 100}


def searched(name):
    return dict.fromkeys(("cls", "reg"), released(name))


@pytest.fixture(scope="module")
def trainers():
    """Of a detector and a device, all from one warm-up: the CPU's."""
    prepared, made = {}, {}

    def trainer(name, device):
        options = {**OPTIONS, "config": name, "device": device}
        if name not in prepared:
            prepared[name] = DetectorTrainer.prepare({**options, "device": "cpu"})
        if (name, device) not in made:
            made[name, device] = DetectorTrainer(options, prepared[name])
        return made[name, device]

    return trainer


@pytest.mark.parametrize("name", PROXIES)
def test_losses_start_as_strong_as_on_the_cpu_and_train(trainers, name):
    trials = {
        device: trainers(name, device).train(
            Trial("key", losses=searched(name), evaluate=("val",), share=0.5)
        )
        for device in ("cpu", "cuda")
    }
    assert [trial.failure for trial in trials.values()] == [None, None]
    assert trials["cuda"].loss_weights == pytest.approx(trials["cpu"].loss_weights, rel=2e-2)
    curves = [dict(trial.curve) for trial in trials.values()]
    first = min(curves[0])
    assert curves[1][first] == pytest.approx(curves[0][first], rel=5e-2)
    assert "cuda" in str(trainers(name, "cuda")._device)
    assert torch.cuda.get_device_name() == trials["cuda"].provenance["device"]


@pytest.mark.parametrize("name", ["faster_rcnn_proxy", "atss_proxy"])
def test_heads_learn_on_cached_features_as_they_do_on_the_cpu(trainers, name):
    found = {
        device: trainers(name, device).train(
            Trial("key", losses=searched(name), task="head", evaluate=("val",))
        )
        for device in ("cpu", "cuda")
    }
    assert [trial.failure for trial in found.values()] == [None, None]
    assert found["cuda"].mAP == pytest.approx(found["cpu"].mAP, abs=0.05)
    assert found["cuda"].mAP > 0


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("default", [True, False])
def test_mixed_precision_trains(trainers, name, default):
    trainer = trainers(name, "cuda")
    losses = {} if default else searched(name)
    config, _ = trainer._with_losses(Trial("key", losses=losses))
    model = build_detector(config.model)
    model.init_weights()
    model.cuda().train()
    wrap_fp16_model(model)
    batch = next(iter(trainer._loader(trainer.setup.config, "train", 0)))
    found = trainer._parallel(model)(return_loss=True, **batch)
    total, _ = model._parse_losses(found)
    total.backward()
    assert total.dtype == torch.float32 and torch.isfinite(total)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_workers_share_a_gpu(trainers):
    """Four of a quarter each, all at once; each says where it was."""
    options = {
        **OPTIONS,
        "trainer": "detectors.training:DetectorTrainer",
        "config": "faster_rcnn_proxy",
        "device": "cuda",
    }
    section = ClusterSection(workers=4, num_cpus=0.25, num_gpus=0.25)
    with Cluster(section, options) as cluster:
        cluster.prepare()
        for seed in range(4):
            cluster.submit(Trial(f"{seed}", losses=searched("faster_rcnn_proxy"), seed=seed))
        end, results = time.monotonic() + 300, []
        while len(results) < 4 and time.monotonic() < end:
            results += cluster.wait()
    assert [result.failure for result in results] == [None] * 4
    assert all(result.provenance["device"] == torch.cuda.get_device_name() for result in results)
