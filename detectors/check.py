"""Whether a config builds and trains: its losses on a batch made up on the spot, without weights or
a GPU."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from mmcv import Config
from mmcv.runner import build_optimizer, build_runner
from mmdet.core import BitmapMasks
from mmdet.models import build_detector
from torch import nn

from cse_autoloss.trial import ConfigError
from detectors import config_data, config_files
from detectors.images import dataset, loader, quiet
from detectors.setup import Setup

_ROIS = 64  # an image: a head's losses are the same kind of thing on fewer
_SIZE = 128  # pixels: large enough for anchors to find the boxes
_BOXES = ((12.0, 20.0, 76.0, 92.0), (60.0, 8.0, 124.0, 56.0), (30.0, 70.0, 62.0, 118.0))


def check_trains(config: Config, option: str) -> None:
    """Build the config's detector and take its losses on two images of noise.

    Args:
        config: read as mmdet reads it; left as it is.
        option: where the user gave the config; messages begin with it.

    Raises:
        ConfigError: one line: it does not build, does not compute its losses, or a loss, or a
            gradient of one, is not finite.
    """
    unchecked = "; --no-check writes the config all the same"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = _build(config)
            total, values = _losses(model, config)
        except Exception as error:  # whatever a config's own modules raise
            raise ConfigError(
                f"{option}: the config does not train with these losses: "
                f"{config_files.reason(error)}{unchecked}"
            ) from error
        for name, value in values.items():
            if not math.isfinite(value):
                raise ConfigError(f"{option}: {name} is {value} on a batch of noise{unchecked}")
        total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise ConfigError(f"{option}: gradient of {name} is not finite{unchecked}")


def check_trial(setup: Setup) -> None:
    """Build all that a trial is made of, and use it once: model, optimiser, schedule, the images of
    the tiny split as they are trained and measured on; on a CPU losses and boxes, too.

    Raises:
        ConfigError: one line: config and options, and what is wrong with them.
    """
    config, options = setup.config, setup.options
    for training in (True, False):
        config_data.pipeline(config, training)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            model = _build(config)
            runner = build_runner(
                dict(config.runner),
                dict(
                    model=model,
                    optimizer=build_optimizer(model, config.optimizer),
                    logger=logging.getLogger(__name__),
                ),
            )
            runner.register_lr_hook(copy.deepcopy(config.lr_config))
            runner.register_optimizer_hook(copy.deepcopy(config.optimizer_config))
            runner.call_hook("before_run")
            next(iter(loader(dataset(setup, "tiny", training=True), config, seed=0)))
            dataset(setup, "tiny", training=False)[0]
            if setup.device.type == "cpu":  # which all that is written for a GPU need not run on
                _losses(model, config)
                batch = _batch(config.model)
                given = {name: batch[name] for name in ("proposals",) if name in batch}
                with torch.no_grad():
                    model.eval().simple_test(batch["img"], batch["img_metas"], **given)
    except Exception as error:  # whatever a config's own modules raise
        changes = options.cfg_options
        given = f" with cfg_options {', '.join(changes)}" if changes else ""
        near = ", ".join(config_files.neighbours(config_files.read_config(options.config), changes))
        raise ConfigError(
            f"detector.config: {options.config}{given} does not train: {config_files.reason(error)}"
            + (f"; did you mean {near}?" if near else "")
        ) from error


def _build(config: Config) -> nn.Module:
    """The detector of a config, without weights, in training."""
    model = copy.deepcopy(config.model)
    list(without_weights(model))
    for part in config_files.parts(model):
        if part.get("type") in ("SyncBN", "MMSyncBN"):
            part["type"] = "BN"  # batch statistics of all processes are those of one
        if "pos_fraction" in part:
            part["num"] = min(part["num"], _ROIS)
    return build_detector(
        model, train_cfg=config.get("train_cfg"), test_cfg=config.get("test_cfg")
    ).train()


def _losses(model: nn.Module, config: Config) -> tuple[torch.Tensor, Mapping[str, float]]:
    """On two images of noise: the sum, and name to value."""
    return model._parse_losses(model.forward_train(**_batch(config.model)))


def without_weights(model: Any, key: str = "model") -> Iterator[tuple[str, Any]]:
    """Take the checkpoints that its parts start from out of a model's config, changed in place.

    Yields:
        Dotted key and value of each: ``model.backbone.init_cfg``, a dict; ``model.pretrained``, a
        path or URL.
    """
    parts = enumerate(model) if isinstance(model, (list, tuple)) else list(model.items())
    for name, value in parts:
        below = f"{key}.{name}"
        pretrained = isinstance(value, dict) and value.get("type") == "Pretrained"
        if (name == "init_cfg" and pretrained) or (name == "pretrained" and value):
            yield below, value
            model[name] = None
        elif isinstance(value, (dict, list, tuple)):
            yield from without_weights(value, below)


def _batch(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a data pipeline would hand to a detector of this config, masks where it has a mask
    head."""
    shape = (_SIZE, _SIZE, 3)
    meta = dict(
        filename="noise.png",
        ori_filename="noise.png",
        ori_shape=shape,
        img_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape[:2],
        scale_factor=numpy.ones(4, dtype=numpy.float32),
        flip=False,
        flip_direction=None,
        img_norm_cfg=dict(mean=numpy.zeros(3), std=numpy.ones(3), to_rgb=True),
    )
    boxes = torch.tensor(_BOXES)
    batch: dict[str, Any] = dict(
        img=torch.randn(2, 3, _SIZE, _SIZE),
        img_metas=[dict(meta), dict(meta)],
        gt_bboxes=[boxes, boxes[:2].flip(0)],
        gt_labels=[torch.tensor([0, 0, 0]), torch.tensor([0, 0])],
    )
    parts = {key for part in config_files.parts(model) for key, value in part.items() if value}
    if "mask_head" in parts:
        masks = numpy.zeros((len(_BOXES), _SIZE, _SIZE), dtype=numpy.uint8)
        for mask, (left, top, right, bottom) in zip(masks, _BOXES, strict=True):
            mask[int(top) : int(bottom), int(left) : int(right)] = 1
        batch["gt_masks"] = [
            BitmapMasks(masks, _SIZE, _SIZE),
            BitmapMasks(masks[[1, 0]], _SIZE, _SIZE),
        ]
    if "semantic_head" in parts:
        batch["gt_semantic_seg"] = torch.zeros(2, 1, _SIZE // 8, _SIZE // 8, dtype=torch.long)
    if "roi_head" in parts and "rpn_head" not in parts:  # Fast R-CNN: proposals come with the data
        batch["proposals"] = [boxes + 2, boxes + 2]
    return batch
