"""A detector's config as a proxy of itself: the same detector on smaller images, for a few hundred
steps.

What is made smaller goes together: image sizes in the pipelines, and with them anchors, the ranges
of FCOS's levels and of RoIAlign's, so that every box meets the anchors that it met before; RoIs an
image. Backbone, neck and heads stay what they are. Nothing here measures or trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmcv import Config

from cse_autoloss.trial import ConfigError
from detectors import config_files
from detectors.check import without_weights

_DIVISOR = 32  # image sizes are multiples of it, as nearly all backbones want them
_FEWEST_ROIS = 64
_WHOLE_BATCH = 16  # images that mmdet's learning rates are made for
# What parts of mmdet take where their config says nothing.
_USUAL_RANGES = (
    ("SingleRoIExtractor", "finest_scale", 56),
    ("FCOSHead", "regress_ranges", ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))),
)


@dataclass(frozen=True)
class Schedule:
    """How a proxy learns.

    Attributes:
        name: what tables call it.
        lr: of AdamW on one cycle; None for the config's own optimiser and schedule, scaled.
    """

    name: str
    lr: float | None = None


OWN = Schedule("its own")
ONE_CYCLE = tuple(Schedule(f"AdamW, one cycle, {lr:g}", lr) for lr in (2e-4, 1e-3))


@dataclass(frozen=True)
class Shape:
    """What a proxy has in place of the full size.

    Attributes:
        short_side: of its images, pixels, where the config's own test images have a short side.
        batch_size: images a step.
        steps, warmup_steps: of a trial, and of the training whose weights trials start from.
    """

    short_side: int
    batch_size: int
    steps: int
    warmup_steps: int


def own_short_side(config: Config) -> int:
    """Of the config's own test images, pixels.

    Raises:
        ConfigError: its test pipeline names no image size.
    """
    data = config.get("data") or {}
    part = data.get("val") or data.get("test") or data.get("train")
    for step in config_files.parts(part):
        scale = step.get("img_scale")
        if scale:
            scale = scale[0] if isinstance(scale, list) else scale
            return int(min(scale))
    raise ConfigError(
        "the config's test pipeline has no img_scale by which its images could be made smaller"
    )


def proxy(
    config: Config, shape: Shape, schedule: Schedule, start: Mapping[str, Any] | None = None
) -> Config:
    """The config as a proxy.

    Args:
        config: of a whole training; left as it is.
        start: dotted key to value: checkpoints that the warm-up's own weights start from.

    Raises:
        ConfigError: what it needs is missing.
    """
    factor = min(1.0, shape.short_side / own_short_side(config))
    config = copy.deepcopy(config)
    list(without_weights(config.model))
    for key in ("load_from", "resume_from", "fp16", "auto_scale_lr", "custom_hooks", "workflow"):
        config.pop(key, None)
    config.update(load_from=None, resume_from=None, workflow=[("train", 1)], custom_hooks=[])
    for split in ("train", "val", "test"):
        if split in config.data:
            config.data[split] = _smaller_images(config.data[split], factor)
    config.data.samples_per_gpu = shape.batch_size
    config.data.workers_per_gpu = 0
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config.data.pop(loader, None)
    config.model = _smaller_model(config.model, factor)
    _set_schedule(config, shape, schedule)
    warmup = dict(start or {})
    if "frozen_stages" in config.model.backbone:
        warmup["model.backbone.frozen_stages"] = -1
    if "norm_eval" in config.model.backbone:
        warmup["model.backbone.norm_eval"] = False
    config.proxy = dict(
        warmup=dict(steps=shape.warmup_steps, cfg_options=warmup),
        tiny_steps=max(10, shape.steps // 5),
    )
    config.evaluation = dict(interval=shape.steps, metric="bbox")
    config.checkpoint_config = dict(interval=shape.steps, by_epoch=False)
    config_files.add_import(config, "detectors")
    return config


def _smaller_images(part: Any, factor: float) -> Any:
    part = copy.deepcopy(part)
    for step in config_files.parts(part):
        for key in ("img_scale", "crop_size", "size", "dynamic_scale", "pad_size"):
            if step.get(key):
                step[key] = _scaled(step[key], lambda side: _side(side * factor))
        if step.get("border"):  # of RandomAffine: minus half a mosaic's side, to cut it back
            step["border"] = _scaled(step["border"], lambda cut: _cut(cut, factor))
    return part


def _cut(border: int, factor: float) -> int:
    half = _side(2 * abs(border) * factor) // 2 if border else 0
    return -half if border < 0 else half


def _smaller_model(model: Any, factor: float) -> Any:
    model = copy.deepcopy(model)
    for part in config_files.parts(model):
        if "AnchorGenerator" in str(part.get("type")):
            for key in ("octave_base_scale", "scales", "base_sizes", "basesize_ratio_range"):
                if part.get(key):
                    part[key] = _scaled(part[key], lambda size: size * factor)
        for kind, key, usual in _USUAL_RANGES:
            if str(part.get("type")).endswith(kind):
                part.setdefault(key, usual)
        for key in ("regress_ranges", "finest_scale"):
            if part.get(key):
                part[key] = _scaled(part[key], lambda size: _range(size, factor))
    if model.get("input_size"):  # YOLOX
        model["input_size"] = _scaled(model["input_size"], lambda side: _side(side * factor))
        side = min(model["input_size"]) // _DIVISOR
        model["random_size_range"] = (side, side)
    _fewer_rois(model, factor)
    return model


def _fewer_rois(model: dict[str, Any], factor: float) -> None:
    """As many as side lengths allow: what a RoI costs does not depend on its image's size."""
    train, test = model.get("train_cfg") or {}, model.get("test_cfg") or {}
    stages = train.get("rcnn") or []
    for stage in stages if isinstance(stages, list) else [stages]:
        if "num" in (stage.get("sampler") or {}):
            stage["sampler"]["num"] = max(_FEWEST_ROIS, round(stage["sampler"]["num"] * factor))
    for proposals in (train.get("rpn_proposal"), test.get("rpn")):
        for key in ("nms_pre", "max_per_img"):
            if proposals and proposals.get(key):
                proposals[key] = max(2 * _FEWEST_ROIS, round(proposals[key] * factor))


def _scaled(value: Any, scale: Callable[[float], float]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(element, scale) for element in value)
    return scale(value)


def _side(pixels: float) -> int:
    return max(_DIVISOR, round(pixels / _DIVISOR) * _DIVISOR)


def _range(size: float, factor: float) -> float:
    return size if size in (-1, 1e8) else size * factor


def _set_schedule(config: Config, shape: Shape, schedule: Schedule) -> None:
    steps, epochs = shape.steps, _length(config)
    own = config.lr_config if config.get("lr_config") else {}
    if schedule.lr is None:
        base = (config.get("auto_scale_lr") or {}).get("base_batch_size", _WHOLE_BATCH)
        config.optimizer.lr *= shape.batch_size / base
        warmup = dict(warmup="linear", warmup_iters=max(1, steps // 10), warmup_ratio=0.001)
        if own.get("policy") == "step" and epochs:
            marks = own["step"] if isinstance(own["step"], list) else [own["step"]]
            marks = [max(1, round(mark / epochs * steps)) for mark in marks]
            config.lr_config = dict(policy="step", by_epoch=False, step=marks, **warmup)
        else:
            config.lr_config = dict(
                policy="CosineAnnealing", by_epoch=False, min_lr_ratio=0.05, **warmup
            )
    else:
        kept = {
            key: value
            for key, value in config.optimizer.items()
            if key in ("paramwise_cfg", "constructor")
        }
        config.optimizer = dict(type="AdamW", lr=schedule.lr, weight_decay=0.05, **kept)
        config.lr_config = dict(policy="OneCycle", max_lr=schedule.lr, pct_start=0.2)
    config.optimizer_config = dict(grad_clip=dict(max_norm=10, norm_type=2))
    config.pop("momentum_config", None)
    config.runner = dict(type="IterBasedRunner", max_iters=steps)
    config.pop("total_epochs", None)


def _length(config: Config) -> int | None:
    """Of the config's own training, in what its schedule counts: epochs or steps."""
    runner = config.get("runner") or {}
    return runner.get("max_epochs") or runner.get("max_iters") or config.get("total_epochs")
