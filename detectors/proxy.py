"""A proxy of any config, measured: how large, how long and from which weights its detector trains
in the time that a trial may take, on the device at hand and the user's data."""

from __future__ import annotations

import json
import math
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from mmcv.runner.checkpoint import CheckpointLoader

from cse_autoloss.cache import cache_dir, digest
from cse_autoloss.files import write_whole
from cse_autoloss.trial import ConfigError, Trial
from detectors import config_files, configure, shrink
from detectors.check import without_weights
from detectors.images import quiet
from detectors.setup import Options, Setup, absolute, read_config, versions
from detectors.shrink import Schedule, Shape
from detectors.training import DetectorTrainer

_SIDES = (128, 160, 192, 256, 320, 384, 512, 640)  # pixels, of the short side, that are tried
_BATCH = 4
_STEPS = (100, 250, 600)  # of a trial: fewest, wanted, most
_MEASURED = 10  # steps that a time is measured on
_TRAINING = 0.8  # share of a trial's time that its steps may take; the rest is measuring mAP
_BAND = (0.05, 0.75)  # mAP of the default between which losses can be told apart
_ADJUSTED = 2  # times that a proxy outside of it is made longer or shorter
_SEEDS = 3
_DOWNLOAD = 20  # seconds that a server may take to answer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Proxy:
    """A proxy and what was measured of it.

    Attributes:
        config: as mmdet reads it.
        shape, schedule: what it has in place of the full size.
        seconds: of each trial, training and measuring.
        gigabytes: at most, of the process on a CPU, allocated on a GPU.
        mAP: of the default losses on val, a seed each.
        notes: one line each: what the user should know of it.
    """

    config: Config
    shape: Shape
    schedule: Schedule
    seconds: tuple[float, ...]
    gigabytes: float
    mAP: tuple[float, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """The table that is printed and that stands in the file."""
        return [
            ("images", f"short side {self.shape.short_side}, {self.shape.batch_size} a step"),
            ("steps", f"{self.shape.steps}, after a warm-up of {self.shape.warmup_steps}"),
            ("schedule", self.schedule.name),
            ("seconds a trial", f"{statistics.mean(self.seconds):.1f}"),
            ("memory", f"{self.gigabytes:.1f} GB"),
            ("mAP of the default", f"{statistics.mean(self.mAP):.3f}"),
            ("spread over seeds", f"{statistics.stdev(self.mAP):.3f} ({len(self.mAP)} seeds)"),
        ]

    def text(self) -> str:
        """The config's file."""
        lines = [f"{name}: {value}" for name, value in self.rows()]
        return "".join(f"# {line}\n" for line in [*lines, *self.notes]) + config_files.config_text(
            self.config
        )


def make(config: Config, options: Mapping[str, Any], seconds: float, say: Say) -> Proxy:
    """Make a proxy of a config.

    Args:
        config: an mmdet 2.x config of a whole training; left as it is.
        options: a run's ``detector`` section; of it data, its seed and the device count.
        seconds: that a trial may take here.
        say: gets a line now and then of what is being done.

    Raises:
        ConfigError: its heads cannot take losses, or a trial cannot be as short; says why.
    """
    configure.heads(config.model)
    keys = ("data", "data_seed", "device")
    kept = absolute({key: options[key] for key in keys if options.get(key) is not None})
    with tempfile.TemporaryDirectory() as folder:
        return _Maker(config, kept, seconds, say, Path(folder)).make()


def adopt(options: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """A run's ``detector`` section with a proxy in its config's place where that config is of a
    whole training, counted in epochs; one that was made before, of the same config and data on the
    same kind of device, is taken from the user's cache. A config that counts steps is a trial as it
    is."""
    if "runner" not in (
        config := config_files.read_config(str(options.get("config", "faster_rcnn_proxy")))
    ):
        return dict(options)
    if config.runner.get("type") == "IterBasedRunner":
        if not config.get("proxy") and not options.get("steps"):
            steps = read_config(options).runner.get("max_iters")
            say(
                f"{options['config']} has no proxy section: each full trial trains its {steps} "
                f"steps; cse-search proxy {options['config']} makes a shorter trial of it"
            )
        return dict(options)
    config_files.change(config, options.get("cfg_options", {}), "detector.cfg_options")
    seconds = float(options.get("trial_seconds", Options().trial_seconds))
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    data = json.dumps([options.get("data"), options.get("data_seed")], sort_keys=True)
    name = digest(config.pretty_text, data, device, str(seconds), json.dumps(versions()))
    path = cache_dir() / "proxies" / f"{Path(options['config']).stem}-{name}.py"
    if not path.is_file():
        say(f"{options['config']} is a whole training's config: making a proxy of it")
        made = make(config, options, seconds, say)
        write_whole(path, made.text().encode())
        for key, value in made.rows():
            say(f"{key:20} {value}")
    say(f"the trials are those of {path}")
    return {**options, "config": str(path), "cfg_options": {}}


class _Maker:
    def __init__(
        self,
        config: Config,
        options: Mapping[str, Any],
        seconds: float,
        say: Say,
        folder: Path,
    ) -> None:
        self._config, self._seconds, self._say = config, seconds, say
        self._options: dict[str, Any] = {**options, "config": str(folder / "proxy.py")}
        self._notes: list[str] = []
        self._start: Mapping[str, Any] = {}

    def make(self) -> Proxy:
        self._start = self._weights()
        shape = self._shape()
        schedule = self._schedule(shape)
        low, high = _BAND
        for _ in range(_ADJUSTED + 1):
            self._say(
                f"warm-up of {shape.warmup_steps} steps, then {_SEEDS} trials of {shape.steps}"
            )
            seconds, values = self._trials(shape, schedule)
            middle = statistics.mean(values)
            if middle < low:
                longer = replace(shape, warmup_steps=2 * shape.warmup_steps)
                self._say(f"mAP of the default is {middle:.3f}: a longer warm-up")
            elif middle > high and shape.steps >= 2 * _STEPS[0]:
                longer = replace(
                    shape, steps=shape.steps // 2, warmup_steps=shape.warmup_steps // 2
                )
                self._say(
                    f"mAP of the default is {middle:.3f}: fewer steps tell losses apart better"
                )
            else:
                break
            last, shape = shape, longer
        else:
            shape = last
        if middle < low:
            self._note(
                f"weak: with an mAP of {middle:.3f} losses can hardly be told apart; more "
                "--seconds, a GPU, or weights to start from would help"
            )
        config = self._proxy(shape, schedule)
        config.proxy.update({"data": self._options["data"]} if "data" in self._options else {})
        return Proxy(
            *(config, shape, schedule, seconds, self._gigabytes(), values, tuple(self._notes))
        )

    def _weights(self) -> dict[str, Any]:
        """Dotted key to value: the config's own checkpoints, where they can be had here."""
        model = self._config.copy().model
        named = [
            (key, value, f"{key}=FILE" if isinstance(value, str) else f"{key}.checkpoint=FILE")
            for key, value in without_weights(model)
        ]
        if whole := self._config.get("load_from"):
            named = [
                (
                    f"model.{part}.init_cfg",
                    dict(type="Pretrained", checkpoint=whole, prefix=f"{part}."),
                    "load_from=FILE",
                )
                for part in ("backbone", "neck", "rpn_head")
                if part in model
            ]
        found = {}
        reasons: dict[str, str | None] = {}
        for key, value, remedy in named:
            path = value if isinstance(value, str) else value["checkpoint"]
            if path not in reasons:
                reasons[path] = _missing(path)
            if reasons[path]:
                self._note(
                    f"{path} cannot be had here ({reasons[path]}): the warm-up starts from new "
                    f"weights; with the file at hand: --cfg-options {remedy}"
                )
            else:
                found[key] = value
        return found

    def _note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)
            self._say(line)

    def _shape(self) -> Shape:
        """The largest images of which a trial of enough steps fits the time, and as many steps as
        fit it."""
        own = shrink.own_short_side(self._config)
        sides = [side for side in _SIDES if side < own] + [own]
        fewest, wanted, most = _STEPS
        training = _TRAINING * self._seconds

        def step(side: int) -> float:
            return self._step_seconds(Shape(side, _BATCH, _MEASURED, 0))

        side, cost = sides[0], step(sides[0])
        if cost * fewest > training:
            needed = math.ceil(cost * fewest / _TRAINING / 10) * 10
            raise ConfigError(
                f"a trial of {fewest} steps of {_BATCH} images of {side} pixels takes about "
                f"{needed} s here, and {self._seconds:g} were asked for: --seconds {needed}, a "
                "GPU, or a smaller backbone"
            )
        # At the rate of the smallest, which a larger one never exceeds
        fit = [other for other in sides if cost * (other / side) ** 2 * wanted <= training]
        for other in sorted(fit, reverse=True):
            if other == side:
                break
            slower = step(other)
            if slower * wanted <= training:
                side, cost = other, slower
                break
        measuring = self._measuring_seconds(Shape(side, _BATCH, _MEASURED, 0))
        left = max(self._seconds - measuring, cost * fewest)
        steps = min(most, max(fewest, int(left / cost) // 10 * 10))
        if measuring + steps * cost > 1.2 * self._seconds:
            self._note(
                f"measuring mAP on val takes {measuring:.0f} s of each trial: fewer val images "
                "would do"
            )
        return Shape(side, _BATCH, steps, 2 * steps)

    def _schedule(self, shape: Shape) -> Schedule:
        """That with which the default's loss falls furthest in half a trial from the start."""
        reached = {}
        for schedule in (shrink.OWN, *shrink.ONE_CYCLE):
            short = replace(shape, steps=max(_MEASURED, shape.steps // 2))
            trainer = self._trainer(short, schedule, warming=True)
            result = trainer.train(Trial("schedule", evaluate=()))
            tail = [loss for _, loss in result.curve[-max(1, len(result.curve) // 5) :]]
            reached[schedule] = math.inf if result.failure else statistics.mean(tail)
            self._say(f"{schedule.name}: loss {reached[schedule]:.3f} after {short.steps} steps")
        best = min(reached, key=lambda schedule: reached[schedule])
        if reached[best] == math.inf:
            raise ConfigError("the detector does not train with its default losses: they diverge")
        return best

    def _trials(
        self, shape: Shape, schedule: Schedule
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        self._write(self._proxy(shape, schedule))
        trainer = DetectorTrainer(self._options, DetectorTrainer.prepare(self._options))
        seconds, values = [], []
        for seed in range(_SEEDS):
            result = trainer.train(Trial(f"proxy-{seed}", seed=seed))
            if result.failure:
                raise ConfigError(f"a trial with the default losses fails: {result.failure}")
            seconds.append(result.seconds)
            values.append(result.mAP)
            self._say(f"seed {seed}: mAP {result.mAP:.3f} in {result.seconds:.0f} s")
        return tuple(seconds), tuple(values)

    def _step_seconds(self, shape: Shape) -> float:
        trainer = self._trainer(shape, shrink.ONE_CYCLE[0], warming=True)
        marks: list[float] = []
        limit = _TRAINING * self._seconds
        began = time.monotonic()
        result = trainer.train(
            Trial("time", evaluate=(), time_limit=limit),
            lambda step, steps: marks.append(time.monotonic()),
        )
        if result.failure and "time limit" not in result.failure:
            raise ConfigError(
                f"the detector does not train with its default losses: {result.failure}"
            )
        if len(marks) < 2:
            return time.monotonic() - began
        cost = (marks[-1] - marks[0]) / (len(marks) - 1)
        self._say(
            f"{shape.batch_size} images of short side {shape.short_side}: {cost:.2f} s a step"
        )
        return cost

    def _measuring_seconds(self, shape: Shape) -> float:
        trainer = self._trainer(shape, shrink.ONE_CYCLE[0], warming=True)
        marks: list[float] = []
        trainer.train(Trial("time"), lambda step, steps: marks.append(time.monotonic()))
        seconds = time.monotonic() - marks[-1]
        self._say(f"measuring mAP on val: {seconds:.1f} s")
        return seconds

    def _trainer(self, shape: Shape, schedule: Schedule, warming: bool) -> DetectorTrainer:
        """One that trains as the warm-up does: nothing frozen."""
        config = self._proxy(shape, schedule)
        if warming:
            config.merge_from_dict(dict(config.proxy.warmup.cfg_options))
        config.proxy.warmup.steps = 0
        self._write(config)
        return DetectorTrainer(self._options, b"")

    def _proxy(self, shape: Shape, schedule: Schedule) -> Config:
        return shrink.proxy(self._config, shape, schedule, self._start)

    def _write(self, config: Config) -> None:
        Path(self._options["config"]).write_text(config.pretty_text, encoding="utf-8")

    def _gigabytes(self) -> float:
        if Setup(self._options).device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _missing(checkpoint: str) -> str | None:
    """Why a checkpoint cannot be had here; None where it can."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD)
    try:
        with quiet():
            CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    except Exception as error:  # of files, of the network, of torchvision
        return config_files.reason(error)
    finally:
        socket.setdefaulttimeout(before)
    return None
