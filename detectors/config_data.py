"""What a detector's config says of its data, and putting other data in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv import Config

from cse_autoloss.trial import ConfigError
from detectors.config_files import parts
from detectors.datasets import DataSet, Split
from detectors.datasets.named import unwrapped

# Steps that make one image of several, and the one that cuts a mosaic to size: mmdet's YOLOX goes
# without them at its end.
_MIXING = ("Mosaic", "MixUp", "CopyPaste", "RandomAffine")


def has_masks(model: Mapping[str, Any]) -> bool:
    """Whether a detector learns masks, which its data then needs."""
    return bool((model.get("roi_head") or {}).get("mask_head"))


def own_data(config: Mapping[str, Any]) -> str | None:
    """The annotations that a config's author named for its training, where they are not those of
    COCO that mmdet's own configs name."""
    for part in unwrapped((config.get("data") or {}).get("train") or {}):
        name = part.get("ann_file")
        name = name[0] if isinstance(name, (list, tuple)) and name else name
        if name and name != "data/coco/annotations/instances_train2017.json":
            return str(name)
    return None


def usual_data(config: Mapping[str, Any]) -> Any:
    """The name of the data that a config's trials train on unless told: the one that a proxy was
    made with, or ``config`` where its author named data, or ``embedded``."""
    made_with = (config.get("proxy") or {}).get("data")
    return made_with or ("config" if own_data(config) else "embedded")


def pipeline(config: Mapping[str, Any], training: bool) -> list[dict[str, Any]]:
    """The steps by which one image is read: for training, or for measuring (val's, else test's).

    Of several data sets the first one's; of a ``MultiImageMixDataset``, whose own steps come after
    those of the data set in it, those that take one image.

    Raises:
        ConfigError: the config has none.
    """
    splits = ("train",) if training else ("val", "test")
    for split in splits:
        if steps := _steps((config.get("data") or {}).get(split)):
            return steps
    raise ConfigError(
        f"the config's data.{' or data.'.join(splits)} should have a pipeline, by which images are "
        "read; there is none"
    )


def _steps(part: Any) -> list[dict[str, Any]]:
    if isinstance(part, (list, tuple)):
        part = next(iter(part), None)
    if not part:
        return []
    own, inner = part.get("pipeline") or [], part.get("dataset") or part.get("datasets")
    if not inner:
        return list(own)
    return _steps(inner) + [step for step in own if step["type"] not in _MIXING]


def with_split(part: Any, split: Split, classes: Sequence[str]) -> dict[str, Any]:
    """A ``data.train`` and the like with other images: mmdet's wrappers and pipelines as they are,
    of several data sets the first.

    Raises:
        ConfigError: it has no pipeline.
    """
    if isinstance(part, (list, tuple)):
        return with_split(part[0], split, classes)
    if "dataset" in part:
        return {**part, "dataset": with_split(part["dataset"], split, classes)}
    if "datasets" in part:
        return {**part, "datasets": [with_split(part["datasets"], split, classes)]}
    if "pipeline" not in part:
        raise ConfigError(
            f"the config's data has a {part.get('type', 'data set')} without a pipeline, by which "
            "other images could be read"
        )
    return dict(
        type="CocoDataset",
        ann_file=split.ann_file,
        img_prefix=split.img_prefix,
        classes=list(classes),
        pipeline=part["pipeline"],
    )


def set_data(config: Config, data: DataSet) -> None:
    """Train, val and test splits of a data set in the places of a config's own, and its number of
    classes; changed in place.

    Raises:
        ConfigError: as :func:`with_split`, or the config has no ``data.train``.
    """
    own = config.get("data") or {}
    if "train" not in own:
        raise ConfigError("the config has no data.train, whose pipeline would read other images")
    for split in ("train", "val", "test"):
        if split in own:
            own[split] = with_split(own[split], data.splits[split], data.classes)
    set_num_classes(config.model, len(data.classes))
    if (config.get("evaluation") or {}).get("metric") == "mAP":  # of a VOC config; COCO format now
        config.evaluation.metric = "bbox"


def set_num_classes(config: Any, count: int) -> None:
    """Every ``num_classes`` in a config, changed in place."""
    for part in parts(config):
        if "num_classes" in part:
            part["num_classes"] = count
