"""Which losses a detector's config has, and putting others in their place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcv import Config

from cse_autoloss.trial import ConfigError

CONFIGS = Path(__file__).parent / "configs"
LOSS_KEYS = {
    "cls": "loss_cls",
    "reg": "loss_bbox",
}  # branch to its key in a head, and in the losses a head returns

# Heads of mmdet to their registered subclasses here that hand IoUs to the classification loss.
IOU_AWARE_HEADS = {
    name: f"IoUAware{name}"
    for name in (
        "ConvFCBBoxHead",
        "Shared2FCBBoxHead",
        "Shared4Conv1FCBBoxHead",
        "FCOSHead",
        "ATSSHead",
    )
}


def config_names() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def read_config(name: str, option: str = "detector.config") -> Config:
    """A config that comes with the package, by name, or any mmdet config, by path.

    Args:
        option: where the user gave the name; messages begin with it.

    Raises:
        ConfigError: there is no such config, or it does not read.
    """
    path = CONFIGS / f"{name}.py" if name in config_names() else Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, config_names(), n=1)
        right = (
            f"did you mean {near[0]!r}?"
            if near
            else f"names are {', '.join(config_names())}; or give a path"
        )
        raise ConfigError(f"{option}: no config {name!r}; {right}")
    try:
        return Config.fromfile(str(path))
    except Exception as error:  # a config is a program: anything can come out of it
        raise ConfigError(
            f"{option}: {path} does not read: {type(error).__name__}: {error}"
        ) from error


def heads(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The heads of a detector's config that hold its box losses: one, or each stage's of a cascade.

    Raises:
        ConfigError: the detector has no head of a kind that can be made IoU-aware.
    """
    found = model["roi_head"]["bbox_head"] if "roi_head" in model else model.get("bbox_head")
    if found is None:
        raise ConfigError(
            "the config's model has neither roi_head nor bbox_head, where box losses stand"
        )
    found = found if isinstance(found, list) else [found]
    known = {**IOU_AWARE_HEADS, **{name: name for name in IOU_AWARE_HEADS.values()}}
    for head in found:
        if head["type"] not in known:
            raise ConfigError(
                f"the config's head {head['type']!r} has no IoU-aware form; heads that work: "
                f"{', '.join(IOU_AWARE_HEADS)}"
            )
    return found


def spaces(model: Mapping[str, Any]) -> dict[str, str]:
    """Branch to the search space that its losses are written in."""
    return {"cls": "two_stage_cls" if "roi_head" in model else "one_stage_cls", "reg": "reg"}


def set_losses(model: dict[str, Any], losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Put losses in place, in every head, and what goes with them.

    That is an IoU-aware head and regression on decoded boxes; in FCOS and ATSS the IoU takes the
    centerness target's place also where no loss is given, so that the default is compared with in
    the same head.

    Args:
        model: a detector's config, changed in place.
        losses: branch to the loss's config; an absent branch keeps its loss.
    """
    for head in heads(model):
        head["type"] = IOU_AWARE_HEADS.get(head["type"], head["type"])
        for branch, loss in losses.items():
            head[LOSS_KEYS[branch]] = dict(loss)
        if "roi_head" not in model:
            head["loss_cls"].setdefault(
                "use_sigmoid", True
            )  # by which mmdet's dense heads count their channels
        elif "reg" in losses:
            head["reg_decoded_bbox"] = (
                True  # mmdet's default, L1, is on encoded deltas; searched ones are on boxes
            )


def searched_weights(model: Mapping[str, Any]) -> dict[str, float]:
    """Branch to the weight that the paper gives a searched loss at full size, where none is found
    on a batch."""
    return {"cls": 1.0, "reg": 10.0 if "roi_head" in model else 1.0}


def set_num_classes(config: Any, count: int) -> None:
    """Every ``num_classes`` in a config, changed in place."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "num_classes":
                config[key] = count
            else:
                set_num_classes(value, count)
    elif isinstance(config, (list, tuple)):
        for value in config:
            set_num_classes(value, count)
