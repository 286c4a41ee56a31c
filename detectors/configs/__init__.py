"""Configs of detectors: what each changes; the rest is inherited from mmdet's own, which its
package carries."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcv import Config


def mmdet_config(name: str) -> str:
    """Path of one of mmdet's own configs, for a config's ``_base_``.

    Args:
        name: path below mmdet's ``configs`` folder, e.g.
            ``"fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_...py"``.

    Raises:
        FileNotFoundError: this mmdet has no such config, or was installed without its configs.
    """
    spec = importlib.util.find_spec("mmdet")
    path = Path(spec.submodule_search_locations[0], ".mim", "configs", name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not in the installed mmdet; the package on PyPI carries its configs"
        )
    return str(path)


def changed(path: str, key: str, changes: Mapping[str, Any]) -> Any:
    """A part of another config with changes merged in, each element with the same ones where that
    part is a list.

    A config inherits whole files and merges dicts alone; this is for one that takes the model of
    one file and all else of another, and for the stages of a cascade.

    Args:
        path: of the other config.
        key: dotted, e.g. ``"model.roi_head.bbox_head"``.
        changes: as a config's that inherits that part.
    """
    part: Any = Config.fromfile(path)
    for name in key.split("."):
        part = part[name]
    if isinstance(part, list):
        return [_merged(element, changes) for element in part]
    return _merged(part, changes)


def _merged(part: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    config = Config(dict(part=part))
    # A copy, for merging takes each _delete_ out
    config.merge_from_dict(dict(part=copy.deepcopy(changes)))
    return config.part.to_dict()


def searched_loss(
    expression: str, space: str, loss_weight: float, **options: Any
) -> dict[str, Any]:
    """A searched loss in place of the one that a config inherits."""
    return dict(
        _delete_=True,
        type="SearchedLoss",
        expression=expression,
        space=space,
        loss_weight=loss_weight,
        **options,
    )


def autoloss_a() -> dict[str, Any]:
    """What CSE-Autoloss-A changes in the head of an R-CNN: its losses, on decoded boxes, at the
    paper's weights."""
    return dict(
        type="IoUAwareShared2FCBBoxHead",
        reg_decoded_bbox=True,
        loss_cls=searched_loss("CSE-Autoloss-A", "two_stage_cls", 1.0),
        loss_bbox=searched_loss("CSE-Autoloss-A", "reg", 10.0),
    )


def autoloss_b(head: str) -> dict[str, Any]:
    """What CSE-Autoloss-B changes in a one-stage head: its losses, at the paper's weights, and IoU
    in centerness's place.

    Args:
        head: name of the IoU-aware head.
    """
    return dict(
        type=head,
        loss_cls=searched_loss("CSE-Autoloss-B", "one_stage_cls", 1.0, use_sigmoid=True),
        loss_bbox=searched_loss("CSE-Autoloss-B", "reg", 1.0),
    )
