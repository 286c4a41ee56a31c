"""Found losses for MMDetection 3.x: a config that inherits the user's, or MMDetection's own.

It holds the losses as text and imports :mod:`cse_autoloss.adapters.mmdet3`, which makes modules of
them, and nothing else: copied, inherited or dumped by mmengine, it is the same config. MMDetection
3 need not be installed to write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcv import Config

from cse_autoloss.inputs import EXTRAS
from cse_autoloss.trial import ConfigError, Found
from detectors import config_files, configure
from detectors.export import header

_ADAPTER = "cse_autoloss.adapters.mmdet3"
_HEADS = (  # that the adapter has
    "IoUAwareConvFCBBoxHead",
    "IoUAwareShared2FCBBoxHead",
    "IoUAwareShared4Conv1FCBBoxHead",
    "IoUAwareFCOSHead",
    "IoUAwareATSSHead",
)
# A detector's type to its config here, whose heads are those of MMDetection 3's, and to MMDetection
# 3's own config.
_OWN = {
    "FasterRCNN": ("faster_rcnn_r50", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
    "CascadeRCNN": ("cascade_rcnn_r50", "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"),
    "MaskRCNN": ("mask_rcnn_r50", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"),
    "FCOS": (
        "fcos_r50",
        "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
    ),
    "ATSS": ("atss_r50", "atss/atss_r50_fpn_1x_coco.py"),
}


def config_text(
    base: str | None, run: Config, losses: Mapping[str, Mapping[str, Any]], found: Found
) -> str:
    """The config's file.

    Args:
        base: path of an MMDetection 3.x config that the new one inherits; where None, MMDetection's
            own R50 one, on COCO, for the kind of detector that the run trained.
        run: the config that the run trained.
        losses: those of :func:`detectors.export.searched_losses`.

    Raises:
        ConfigError: the base does not read, or its heads cannot take the losses; names those that
            can.
    """
    if base is None:
        kind = run.model.type
        if kind not in _OWN:
            raise ConfigError(
                f"--target mmdet3: no config known for {kind}; give one with --config"
            )
        own, inherited = _OWN[kind][0], f"mmdet::{_OWN[kind][1]}"
        model, imports = config_files.read_config(own).model, []
    else:
        config = _read(base)
        inherited = str(Path(base).absolute())
        model, imports = config.model, (config.get("custom_imports") or {}).get("imports") or []
        imports = [imports] if isinstance(imports, str) else list(imports)
    for head in configure.box_heads(model):
        known = configure.HEADS.get(head["type"])
        if (known.aware if known else head["type"]) not in _HEADS:
            raise ConfigError(
                f"--target mmdet3: {head['type']} has no IoU-aware form for MMDetection 3; heads "
                f"that work: {', '.join(name.removeprefix('IoUAware') for name in _HEADS)}"
            )
    for branch, loss in losses.items():
        for missing in sorted(configure.needs(loss) - {"pos_ious"} - loss.keys()):
            raise ConfigError(
                f"--target mmdet3: the {branch} loss needs {missing}, {EXTRAS[missing].meaning}, "
                "which the heads for MMDetection 3 do not hand over; --target mmdet2 does"
            )
    configure.set_losses(model, losses)
    return _config(inherited, model, [*imports, _ADAPTER], found)


def _read(path: str) -> Config:
    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # a config is a program: anything can come out of it
        raise ConfigError(
            f"--config {path} does not read: {config_files.reason(error)}; bases should be given "
            "by path, not as 'mmdet::...' or read_base()"
        ) from error
    if not isinstance(config.get("model"), dict):
        raise ConfigError(f"--config {path}: it has no model; give a config that inherits one")
    if not config_files.is_mmdet3(config) and ("runner" in config or "optimizer" in config):
        raise ConfigError(f"--config {path} is a config of MMDetection 2.x: --target mmdet2")
    return config


def _config(inherited: str, model: Mapping[str, Any], imports: list[str], found: Found) -> str:
    two_stage = "roi_head" in model
    head = model["roi_head"]["bbox_head"] if two_stage else model["bbox_head"]
    # A list replaces the inherited one; a dict would be merged into it
    if not isinstance(head, list):
        head = {**head, "_delete_": True}
    changes = dict(roi_head=dict(bbox_head=head)) if two_stage else dict(bbox_head=head)
    body = Config(
        dict(model=changes, custom_imports=dict(imports=imports, allow_failed_imports=False))
    ).pretty_text
    comment = header(found).replace(
        "Trains with mmdet's tools/train.py or with: cse-search train THIS_FILE",
        "Trains with the tools/train.py of MMDetection 3, where cse-autoloss is installed.",
    )
    return f"{comment}_base_ = {inherited!r}\n{body}"
