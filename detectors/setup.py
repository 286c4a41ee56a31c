"""What a trial is made of: the ``detector`` section of a run, its config and its data, read and
checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import mmcv
import torch
from mmcv import Config
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cse_autoloss.cache import cache_dir, digest
from cse_autoloss.config import first_line
from cse_autoloss.trial import ConfigError
from cse_autoloss.version import __version__
from detectors import config_data, config_files, configure, datasets

_FEWEST = 10  # steps: fewer are no schedule
_MOST = 10_000_000  # steps
_LARGEST_BATCH = 1024  # images, which a run's check reads
Steps = Annotated[int, Field(ge=_FEWEST, le=_MOST)]
BatchSize = Annotated[int, Field(gt=0, le=_LARGEST_BATCH)]
# Counts the ways in which training.py has made warm weights; a cached one of another way is stale.
_WARMUP = "3"


class Options(BaseModel):
    """The ``detector`` section of a run's configuration.

    Attributes:
        trainer: the class that reads this; the engine's key.
        config: a name in ``detectors/configs`` or the path of an mmdet config.
        data: a data set's name (:mod:`detectors.datasets.dataset`); unless given, the config's own
            where it names one, else ``embedded``.
        data_seed: of the embedded data set, and of splits that are drawn.
        steps, batch_size: of a trial, 10 steps at least, which a schedule needs; the config's
            ``runner.max_iters`` and ``data.samples_per_gpu`` unless given.
        tiny_steps, head_steps, warmup_steps: of the tiny and the head task, and of the warm-up that
            all trials start from; the config's ``proxy.tiny_steps``, ``proxy.head.steps`` and
            ``proxy.warmup.steps`` unless given. No warm-up at 0: weights as the config says.
        device: ``cpu`` or ``cuda``; a GPU where there is one unless given.
        cfg_options: changes of the config, dotted key to value, as in mmdet's ``--cfg-options``.
        trial_seconds: that a trial may take, where a run makes a proxy of a whole training's
            config.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    trainer: str = "detectors.training:DetectorTrainer"
    config: str = "faster_rcnn_proxy"
    data: str | dict[str, Any] | None = None
    data_seed: int = Field(0, ge=0)
    steps: Steps | None = None
    batch_size: BatchSize | None = None
    tiny_steps: Steps | None = None
    head_steps: Steps | None = None
    warmup_steps: int | None = Field(None, ge=0, le=_MOST)
    device: Literal["cpu", "cuda"] | None = None
    cfg_options: dict[str, Any] = {}
    trial_seconds: float = Field(60.0, gt=0)


class HeadOptions(BaseModel):
    """How heads are trained alone: ``proxy.head`` of a config.

    Attributes:
        steps, batch_size: of a training; images a step.
        lr: multiple of the config's learning rate.
        precision: of a head's matrix products and convolutions in training; losses, and heads that
            are measured, are in float32 always. ``"auto"`` is bfloat16 where the device multiplies
            it in hardware, which is twice as fast, and float32 elsewhere, where bfloat16 is
            several times slower.
        cache_bytes: of features of the train split, in the user's cache, or in a GPU's memory;
            images that have no room are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Steps = 1000
    batch_size: BatchSize = 8
    lr: float = Field(1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    cache_bytes: int = Field(2 << 30, gt=0)


def absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the paths of the config and the data made absolute; names stay."""
    resolved, options = dict(options), _options(options)
    if "config" in resolved and options.config not in config_files.config_names():
        resolved["config"] = str(Path(options.config).expanduser().absolute())
    if options.data is not None:
        resolved["data"] = datasets.absolute(options.data)
    return resolved


def read_config(options: Mapping[str, Any]) -> Config:
    """The config that the options name, with their changes.

    Raises:
        ConfigError: one line that names the option and what would be right.
    """
    checked = _options(options)
    config = config_files.read_config(checked.config)
    config_files.change(config, checked.cfg_options, "detector.cfg_options")
    return config


class Setup:
    """Options, config and data, read and checked; what one of them leaves open, the next
    decides."""

    def __init__(self, options: Mapping[str, Any], open_images: bool = False) -> None:
        """
        Args:
            open_images: check every image of the data set, too, which a run does once.
        """
        self.options = _options(options)
        self.device = torch.device(
            self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.config = config = config_files.read_config(self.options.config)
        given = self.options.data
        self.data = datasets.find(
            config_data.usual_data(config) if given is None else given,
            self.options.data_seed,
            config=config,
            masks=config_data.has_masks(config.model),
            open_images=open_images,
        )
        config_files.change(config, self.options.cfg_options, "detector.cfg_options")
        if (config.get("runner") or {}).get("type") != "IterBasedRunner":
            raise ConfigError(
                "detector.config: a trial is measured in steps; the config should have "
                "runner=dict(type='IterBasedRunner', max_iters=...) and an lr_config with "
                f"by_epoch=False; cse-search proxy {self.options.config} makes one"
            )
        configure.set_losses(config.model, {})
        config_data.set_num_classes(config.model, len(self.data.classes))
        if self.options.steps:
            config.runner.max_iters = self.options.steps
        if self.options.batch_size:
            config.data.samples_per_gpu = self.options.batch_size
        given = (config.get("data") or {}).get("samples_per_gpu")
        _whole("data.samples_per_gpu", given, most=_LARGEST_BATCH)
        proxy = config.get("proxy") or {}
        self._warmup = proxy.get("warmup", {})
        self.steps = _whole("runner.max_iters", config.runner.get("max_iters"))
        tiny = self.options.tiny_steps or proxy.get("tiny_steps")
        self.tiny_steps = _whole("proxy.tiny_steps", tiny or max(_FEWEST, self.steps // 4))
        self.head = _head_options(proxy.get("head", {}), self.options.head_steps)
        given = self.options.warmup_steps
        warmup = self._warmup.get("steps", 0) if given is None else given
        self.warmup_steps = _whole("proxy.warmup.steps", warmup, 0)
        if 0 < self.warmup_steps < _FEWEST:
            raise ConfigError(
                f"detector.warmup_steps: should be 0 or at least {_FEWEST}, found "
                f"{self.warmup_steps}"
            )
        self.config_digest = digest(config.pretty_text)

    def steps_of(self, task: str, share: float = 1.0) -> int:
        """Optimiser steps of a trial: that share of its task's, and enough for a schedule."""
        steps = {"tiny": self.tiny_steps, "head": self.head.steps, "full": self.steps}[task]
        return max(_FEWEST, round(share * steps))

    def warmup_config(self) -> Config:
        """The config that the weights are made with which all trials start from."""
        config = copy.deepcopy(self.config)
        config.merge_from_dict(copy.deepcopy(dict(self._warmup.get("cfg_options", {}))))
        config.runner.max_iters = self.warmup_steps
        (config.get("proxy") or {}).pop("head", None)  # that trains on what the warm-up made
        return config

    def warmup_path(self) -> Path:
        """Where the warm weights are, or will be, in the user's cache."""
        made_by = json.dumps([self.device.type, versions()])
        name = digest(_WARMUP, self.warmup_config().pretty_text, self.data.digest, made_by)
        return cache_dir() / "warmup" / f"{name}.pt"


def _options(options: Mapping[str, Any]) -> Options:
    try:
        return Options.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(f"detector.{first_line(error, Options)}") from None


def _whole(key: str, number: Any, least: int = 1, most: int = _MOST) -> int:
    if type(number) is not int or not least <= number <= most:
        raise ConfigError(
            f"detector.config: {key} should be a whole number from {least} to {most:,}, found "
            f"{number!r}"
        )
    return number


def _head_options(given: Any, steps: int | None) -> HeadOptions:
    if not isinstance(given, Mapping):
        raise ConfigError(f"detector.config: proxy.head should be a dict, found {given!r}")
    try:
        return HeadOptions.model_validate({**given, **({"steps": steps} if steps else {})})
    except ValidationError as error:
        where = "detector.config: proxy.head"
        raise ConfigError(f"{where}.{first_line(error, HeadOptions)}") from None


def versions() -> dict[str, str]:
    """Of what a training's numbers depend on."""
    return {
        "cse_autoloss": __version__,
        "torch": torch.__version__,
        "mmcv-full": mmcv.__version__,
        **{name: version(name) for name in ("mmdet", "numpy", "pycocotools")},
    }
