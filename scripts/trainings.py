"""Trainings of many losses with many seeds, a row of the benchmark each, in as many processes as
asked for: what make_lossbench.py and table_known.py share."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cse_autoloss.lossbench import Loss, Origin, Row
from cse_autoloss.trial import Trial

if TYPE_CHECKING:
    from detectors.training import DetectorTrainer

# Gradient norm of each branch as a multiple of the default's configured loss: what tuning on val,
# with the four scales of presets/quickstart.yaml and one seed, chose for the default.
SCALE = {
    "faster_rcnn_proxy": {"cls": 2.0, "reg": 2.0},
    "faster_rcnn_r101_proxy": {"cls": 2.0, "reg": 1.0},
    "cascade_rcnn_proxy": {"cls": 2.0, "reg": 2.0},
    "mask_rcnn_proxy": {"cls": 2.0, "reg": 1.0},
    "atss_proxy": {"cls": 2.0, "reg": 2.0},
    "fcos_proxy": {"cls": 1.0, "reg": 2.0},
}
_trainer: DetectorTrainer  # of a worker process


@dataclass(frozen=True)
class Wanted:
    """A training: a loss (in spaces of its own where it has some) and a seed."""

    loss: Loss
    seed: int
    spaces: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Instrument:
    """What trains.

    Attributes:
        config: the trainer's options.
        task: ``head`` or ``full``.
        origin: of the rows that it makes.
        prepared: what trainings start from.
    """

    config: Mapping[str, Any]
    task: str
    origin: Origin
    prepared: bytes

    @classmethod
    def of(cls, config: Mapping[str, Any], task: str) -> Instrument:
        """Made ready: the warm-up and, for heads, the caches are there."""
        from detectors.training import DetectorTrainer

        prepared = DetectorTrainer.prepare(config)
        trainer = DetectorTrainer(config, prepared)
        if task == "head":
            trainer.train(Trial("first", task="head", share=0.01, evaluate=("val", "test")))
        made_from, setup = trainer.provenance(Trial("none")), trainer.setup
        digests = made_from["weights_digest"], made_from["config_digest"]
        origin = setup.options.config, task, setup.steps_of(task), *digests
        return cls(config, task, origin, prepared)


def measure(
    instrument: Instrument,
    wanted: Iterable[Wanted],
    path: Path,
    processes: int,
) -> None:
    """Train each, and append its row to the file as it is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(instrument.config, instrument.prepared),
    ) as pool:
        for row in _in_flight(pool, iter(wanted), instrument.task, 2 * processes):
            with path.open("a") as file:
                file.write(row.to_json() + "\n")
            print(
                f"{row.detector} {row.loss:32} seed {row.seed}: val {row.val} test {row.test} "
                f"{row.cpu_seconds:.1f} s {row.failure or ''}",
                flush=True,
            )


def _in_flight(
    pool: ProcessPoolExecutor, wanted: Iterator[Wanted], task: str, many: int
) -> Iterator[Row]:
    """Results in order, so that a cut leaves whole losses; a few trainings ahead, not all."""
    ahead = [pool.submit(_train, one, task) for one in itertools.islice(wanted, many)]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(_train, one, task) for one in itertools.islice(wanted, 1)]


def _start(config: Mapping[str, Any], prepared: bytes) -> None:
    global _trainer
    import torch

    import detectors  # noqa: F401 - patches mmcv, before anything imports it
    from detectors.training import DetectorTrainer

    torch.set_num_threads(1)
    _trainer = DetectorTrainer(config, prepared)


def _train(wanted: Wanted, task: str) -> Row:
    detector = _trainer.setup.options.config
    spaces = wanted.spaces or _default_spaces(wanted.loss)
    trial = Trial(
        wanted.loss.name,
        wanted.loss.losses,
        spaces,
        task=task,
        evaluate=("val", "test"),
        seed=wanted.seed,
        scale=SCALE.get(detector, {}),
    )
    made_from = _trainer.provenance(trial)
    started = time.process_time()
    result = _trainer.train(trial)
    metrics = {name: round(value, 5) for name, value in result.metrics.items()}
    return Row(
        loss=wanted.loss.name,
        losses=wanted.loss.losses,
        detector=detector,
        task=task,
        seed=wanted.seed,
        steps=_trainer.setup.steps_of(task),
        val=metrics.get("val/mAP"),
        test=metrics.get("test/mAP"),
        views={name: value for name, value in metrics.items() if "/mAP " in name},
        failure=result.failure,
        cpu_seconds=round(time.process_time() - started, 2),
        scale=trial.scale,
        weights=made_from["weights_digest"],
        config=made_from["config_digest"],
        data=made_from["data_digest"],
        versions={
            name: made_from[name] for name in ("cse_autoloss", "torch", "mmcv-full", "mmdet")
        },
        device=made_from["device"],
        precision=made_from.get("precision", ""),
    )


def _default_spaces(loss: Loss) -> dict[str, str]:
    from detectors import configure

    spaces = configure.spaces(_trainer.setup.config.model)
    return {branch: spaces[branch] for branch in loss.losses}
