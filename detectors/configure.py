"""Which losses a detector's config has, and putting others in their place."""

from __future__ import annotations

import copy
import difflib
import inspect
import pprint
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcv import Config
from mmdet.models import HEADS as MMDET_HEADS

from cse_autoloss import inputs
from cse_autoloss.space import load_space
from cse_autoloss.trial import BRANCHES, ConfigError
from detectors.datasets import DataSet, Split
from detectors.datasets.named import datasets

_ALMOST = 0.8  # similarity of a misspelt key and the one that is meant, as difflib counts it
CONFIGS = Path(__file__).parent / "configs"
# Branch to its key in a head, and in the losses a head returns
LOSS_KEYS = {
    "cls": "loss_cls",
    "reg": "loss_bbox",
}


@dataclass(frozen=True)
class HeadKind:
    """What a head of mmdet becomes to take searched losses.

    Attributes:
        aware: its registered subclass here, which hands IoUs to the classification loss.
        refused: branch to the reason why its loss cannot be another.
        boxes_are_decoded: its regression loss is on boxes whatever the config says.
        loss_options: of a searched loss in it, beside formula and weight.
        hands: branch to what it hands over to that loss where it is needed (``inputs.EXTRAS``).
    """

    aware: str
    refused: Mapping[str, str] = field(default_factory=dict)
    boxes_are_decoded: bool = False
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    hands: Mapping[str, frozenset[str]] = field(
        default_factory=lambda: {"cls": frozenset({"pos_ious"}), "reg": frozenset()}
    )


def _hands(*more: str) -> dict[str, Any]:
    names = {"pos_ious", "image_ids", "pos_areas", *more}
    return {"hands": {"cls": frozenset(names), "reg": frozenset({"image_sizes"})}}


_DENSE = dict(boxes_are_decoded=True)
_POINTS, _ANCHORS = _hands(), _hands("roi_ious")
_SUMMED = dict(reduction="sum")  # as YOLOX's own losses, which it divides itself
HEADS = {
    "ConvFCBBoxHead": HeadKind("IoUAwareConvFCBBoxHead", **_ANCHORS),
    "Shared2FCBBoxHead": HeadKind("IoUAwareShared2FCBBoxHead", **_ANCHORS),
    "Shared4Conv1FCBBoxHead": HeadKind("IoUAwareShared4Conv1FCBBoxHead", **_ANCHORS),
    "DoubleConvFCBBoxHead": HeadKind("IoUAwareDoubleConvFCBBoxHead", **_ANCHORS),
    "SABLHead": HeadKind(
        "IoUAwareSABLHead", {"reg": "it regresses by buckets, not by boxes"}, **_ANCHORS
    ),
    "FCOSHead": HeadKind("IoUAwareFCOSHead", **_DENSE, **_POINTS),
    "ATSSHead": HeadKind("IoUAwareATSSHead", **_DENSE, **_ANCHORS),
    "PAAHead": HeadKind("IoUAwarePAAHead", **_DENSE),
    "GFLHead": HeadKind("IoUAwareGFLHead", **_DENSE, **_ANCHORS),
    "RetinaHead": HeadKind("IoUAwareRetinaHead", **_ANCHORS),
    "YOLOXHead": HeadKind("IoUAwareYOLOXHead", loss_options=_SUMMED, **_DENSE),
}
_BY_AWARE_NAME = {kind.aware: kind for kind in HEADS.values()}

_OF_IMAGES = frozenset({"roi_ious", "pos_areas", "image_sizes"})
# RoI heads to the form that shows their box heads the images, which they need for these.
_IMAGE_AWARE = {
    name: f"ImageAware{name}" for name in ("StandardRoIHead", "CascadeRoIHead", "DoubleHeadRoIHead")
}

# RoI heads that use their box head's losses in ways of their own: to branch, to the reason.
_IN_ROI_HEAD = {
    "PISARoIHead": dict.fromkeys(
        BRANCHES, "it weighs RoIs by the values of mmdet's own losses, on encoded boxes"
    ),
    "GridRoIHead": dict.fromkeys(BRANCHES, "its box head regresses no boxes"),
    "DynamicRoIHead": {"reg": "it changes the beta of SmoothL1Loss while it trains"},
}

# Steps that make one image of several, and the one that cuts a mosaic to size: mmdet's YOLOX goes
# without them at its end.
_MIXING = ("Mosaic", "MixUp", "CopyPaste", "RandomAffine")


def config_text(config: Config) -> str:
    """A config as Python in which every value is written as what it is: text from a data set or a
    path stays text, whatever stands in it.

    Raises:
        ConfigError: for a key that is no name.
    """
    lines = []
    for key, value in config._cfg_dict.to_dict().items():
        if not key.isidentifier():
            raise ConfigError(f"the config's key {key!r} is no Python name")
        lines.append(f"{key} = {pprint.pformat(value, width=100, sort_dicts=False)}\n")
    return "".join(lines)


def config_names() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def read_config(name: str, option: str = "detector.config") -> Config:
    """A config that comes with the package, by name, or any mmdet 2.x config, by path.

    Args:
        option: where the user gave the name; messages begin with it.

    Raises:
        ConfigError: there is no such config, it does not read, it has no model, or it is one of
            MMDetection 3.
    """
    path = CONFIGS / f"{name}.py" if name in config_names() else Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(Path(name).stem, config_names(), n=1)
        right = (
            f"did you mean {near[0]!r}?"
            if near
            else f"names are {', '.join(config_names())}; or give a path"
        )
        raise ConfigError(f"{option}: no config {name!r}; {right}")
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is a program: anything can come out of it
        raise ConfigError(f"{option}: {path} does not read: {reason(error)}") from error
    if is_mmdet3(config):
        raise ConfigError(
            f"{option}: {path} is a config of MMDetection 3, and this is for 2.x; export --target "
            "mmdet3 puts a found loss into it"
        )
    if not isinstance(config.get("model"), dict):
        raise ConfigError(
            f"{option}: {path} has no model; give a config that inherits one (_base_)"
        )
    return config


def reason(error: BaseException) -> str:
    """An exception in one line: its type and message, or those of the one that it came from where
    it has no message of its own."""
    while not str(error) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def change(config: Config, changes: Mapping[str, Any], option: str) -> None:
    """Change a config in place, as mmdet's ``--cfg-options`` does.

    Args:
        changes: dotted key to value.
        option: where the user gave them; messages begin with it.

    Raises:
        ConfigError: one line: a key leads nowhere; or is new, in a place where nothing checks keys,
            and almost that of a neighbour; or a dict's value is none.
    """
    for path, value in _leaves(changes):
        before, near, checked = _there(config, path)
        if near and not checked:
            raise ConfigError(f"{option}.{path}: the config has no such key; did you mean {near}?")
        if isinstance(before, dict) and isinstance(value, (str, bool, int, float)):
            raise ConfigError(
                f"{option}.{path}: should be a dict with keys such as "
                f"{', '.join(list(before)[:3])}, found {value!r}"
            )
    try:
        # mmcv takes each _delete_ out of what it merges
        config.merge_from_dict(copy.deepcopy(dict(changes)))
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{option}: {' '.join(str(error).split())}") from error


def neighbours(config: Config, changes: Mapping[str, Any]) -> list[str]:
    """Dotted keys of a config, those that new ones among the changes are almost."""
    found = (_there(config, path)[1] for path, _ in _leaves(changes))
    return [near for near in found if near]


def _leaves(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that changes set."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value and "_delete_" not in value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _there(config: Config, path: str) -> tuple[Any, str | None, bool]:
    """What a config has at a dotted key; where nothing, the key beside it that it is almost, and
    whether what is built of that part of the config takes no key that it does not know."""
    part: Any = config._cfg_dict
    names = path.split(".")
    for depth, name in enumerate(names):
        if isinstance(part, (list, tuple)) and name.isdigit() and int(name) < len(part):
            part = part[int(name)]
        elif isinstance(part, dict) and name in part:
            part = part[name]
        elif isinstance(part, dict):
            near = difflib.get_close_matches(name, list(part), n=1, cutoff=_ALMOST)
            takes_any = "type" not in part or str(part["type"]).endswith("Sampler")
            return None, ".".join([*names[:depth], near[0]]) if near else None, not takes_any
        else:
            return None, None, True
    return part, None, True


def is_mmdet3(config: Mapping[str, Any]) -> bool:
    """Whether a config is written for MMDetection 3, whose data and training have other keys."""
    model = config.get("model") or {}
    theirs = ("train_dataloader", "optim_wrapper", "param_scheduler", "default_scope")
    return "data_preprocessor" in model or any(key in config for key in theirs)


def box_heads(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The heads of a detector's config that classify and regress boxes, of whatever kind."""
    outer = model.get("roi_head")
    outers = outer if isinstance(outer, (list, tuple)) else [model if outer is None else outer]
    found = [inner.get("bbox_head") or [] for inner in outers]
    return [
        head for inner in found for head in (inner if isinstance(inner, (list, tuple)) else [inner])
    ]


def heads(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The heads of a detector's config that hold its box losses: one, or each stage's of a cascade.

    Raises:
        ConfigError: the detector has no head of a kind that can be made IoU-aware.
    """
    if isinstance(model.get("roi_head"), (list, tuple)):
        raise ConfigError(
            "the config's model has a list of RoI heads; searched losses go into one alone"
        )
    found = box_heads(model)
    if not found:
        raise ConfigError(
            "the config's model has neither roi_head.bbox_head nor bbox_head, where box losses "
            "stand"
        )
    for head in found:
        if "roi_head" not in model and len(found) > 1:
            raise ConfigError(
                "the config's model has a list of dense heads; searched losses go into one alone"
            )
        if head["type"] not in HEADS and head["type"] not in _BY_AWARE_NAME:
            raise ConfigError(
                f"the config's head {head['type']!r} has no IoU-aware form; heads that work: "
                f"{', '.join(HEADS)}"
            )
        if head.get("with_reg") is False:
            raise ConfigError(
                f"the config's head {head['type']!r} regresses no boxes (with_reg=False), so that "
                "there is no IoU to tell its classification loss"
            )
    why = _refused(model, found)
    if len(why) == len(BRANCHES):
        raise ConfigError(f"the config's losses cannot be others: {why['cls']}")
    return found


def kind(head: Mapping[str, Any]) -> HeadKind:
    """Of a head that :func:`heads` returned."""
    return HEADS.get(head["type"]) or _BY_AWARE_NAME[head["type"]]


def _refused(model: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, str]:
    """Branch to the reason why its loss stays what it is."""
    by_heads = {
        branch: f"{head['type']}: {why}"
        for head in found
        for branch, why in kind(head).refused.items()
    }
    outer = model.get("roi_head", {}).get("type")
    return by_heads | {
        branch: f"{outer}: {why}" for branch, why in _IN_ROI_HEAD.get(outer, {}).items()
    }


def spaces(model: Mapping[str, Any]) -> dict[str, str]:
    """Branch to the search space that its losses are written in; a branch is absent whose loss
    cannot be another.

    Raises:
        ConfigError: as :func:`heads`.
    """
    kept = _refused(model, heads(model))
    written = {"cls": "two_stage_cls" if "roi_head" in model else "one_stage_cls", "reg": "reg"}
    return {branch: space for branch, space in written.items() if branch not in kept}


def space(model: Mapping[str, Any], branch: str) -> str:
    """The search space that a branch's losses are written in.

    Raises:
        ConfigError: as :func:`heads`, or this branch's loss cannot be another; says why.
    """
    own = spaces(model)
    if branch not in own:
        raise ConfigError(refused(model)[branch])
    return own[branch]


def refused(model: Mapping[str, Any]) -> dict[str, str]:
    """Branch to the reason why its loss stays what it is."""
    return {
        branch: f"the config's {branch} loss cannot be another: {why}"
        for branch, why in _refused(model, heads(model)).items()
    }


def check_losses(model: Mapping[str, Any], written: Mapping[str, str]) -> None:
    """Whether a detector's heads can take losses.

    Args:
        written: branch to the search space (name or YAML path) that its loss is written in.

    Raises:
        ConfigError: one line that says why they cannot.
    """
    for branch, name in written.items():
        own = space(model, branch)
        if load_space(name).inputs != load_space(own).inputs:
            raise ConfigError(f"the {branch} loss was found for {name}, this detector's is {own}")


def set_losses(model: dict[str, Any], losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Put losses in place, in every head, and what goes with them.

    That is an IoU-aware head and regression on decoded boxes; in FCOS and ATSS the IoU takes the
    centerness target's place also where no loss is given, so that the default is compared with in
    the same head.

    Args:
        model: a detector's config, changed in place.
        losses: branch to the loss's config; an absent branch keeps its loss.

    Raises:
        ConfigError: the heads cannot take them.
    """
    check_losses(
        model, {branch: loss["space"] for branch, loss in losses.items() if "space" in loss}
    )
    needed = {branch: needs(loss) - loss.keys() for branch, loss in losses.items()}
    check_needs(model, needed)
    if "roi_head" in model and _OF_IMAGES & frozenset().union(*needed.values()):
        outer = model["roi_head"]
        outer["type"] = _IMAGE_AWARE.get(outer["type"], outer["type"])
    for head in heads(model):
        of = kind(head)
        for branch in BRANCHES:
            if branch not in of.refused:
                head.setdefault(LOSS_KEYS[branch], _usual_loss(of.aware, LOSS_KEYS[branch]))
        head["type"] = of.aware
        for branch, loss in losses.items():
            head[LOSS_KEYS[branch]] = {**loss, **of.loss_options}
        if "roi_head" not in model:
            # By which mmdet's dense heads count their channels
            head["loss_cls"].setdefault("use_sigmoid", True)
        if "reg" in losses and not of.boxes_are_decoded:
            head["reg_decoded_bbox"] = (
                True  # mmdet's default, L1, is on encoded deltas; searched ones are on boxes
            )


def needs(loss: Mapping[str, Any]) -> frozenset[str]:
    """What the formula of a searched loss's config needs beside predictions and targets; nothing
    for another loss."""
    if not {"space", "expression"} <= loss.keys():
        return frozenset()
    written = load_space(loss["space"])
    return inputs.needs(written.inputs, written.expression(loss["expression"]).variables)


def give_frequencies(
    losses: Mapping[str, dict[str, Any]], class_frequency: Callable[[], list[float]]
) -> None:
    """Give those of the searched losses' configs that need them the frequencies of the classes,
    changed in place; where none does they are not asked for."""
    for loss in losses.values():
        if "class_frequency" in needs(loss):
            loss["class_frequency"] = class_frequency()


def hands(model: Mapping[str, Any]) -> dict[str, dict[str, frozenset[str]]]:
    """Branch to the heads that hold its loss, by their type, and what each hands over to it."""
    outer = model.get("roi_head", {}).get("type")
    hidden = outer and outer not in {*_IMAGE_AWARE, *_IMAGE_AWARE.values()}
    return {
        branch: {
            head["type"]: kind(head).hands[branch] - (_OF_IMAGES if hidden else frozenset())
            for head in heads(model)
        }
        for branch in BRANCHES
    }


def check_needs(model: Mapping[str, Any], needed: Mapping[str, frozenset[str]]) -> None:
    """Whether a detector's heads hand over what losses need.

    Args:
        needed: branch to names of ``inputs.EXTRAS``.

    Raises:
        ConfigError: one line that names what is missing, and the head.
    """
    for branch, names in needed.items():
        for head, handed in hands(model)[branch].items():
            for missing in sorted(names - handed):
                raise ConfigError(
                    f"the {branch} loss needs {missing}, {inputs.EXTRAS[missing].meaning}, which "
                    f"the config's head {head!r} does not hand over"
                )


def set_loss_weights(model: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """Branch to the weight of its loss in every head, whatever the loss; changed in place."""
    for head in heads(model):
        for branch, weight in weights.items():
            head[LOSS_KEYS[branch]]["loss_weight"] = weight


def scale_learning_rate(config: Config, factor: float) -> None:
    """Multiply the learning rate, and the peak of a schedule that has one; changed in place."""
    config.optimizer.lr *= factor
    if "max_lr" in config.lr_config:
        config.lr_config.max_lr *= factor


def _usual_loss(head: str, key: str) -> dict[str, Any]:
    """The loss that a head has where its config names none."""
    for cls in MMDET_HEADS.get(head).__mro__:
        parameter = inspect.signature(cls.__init__).parameters.get(key)
        if parameter is not None:
            return dict(parameter.default)
    raise LookupError(f"{head} has no {key}")


def searched_weights(model: Mapping[str, Any]) -> dict[str, float]:
    """Branch to the weight that the paper gives a searched loss at full size, where none is found
    on a batch."""
    return {"cls": 1.0, "reg": 10.0 if "roi_head" in model else 1.0}


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """A config's mappings, the outer before the inner."""
    if isinstance(config, dict):
        yield config
    if isinstance(config, (dict, list, tuple)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from parts(value)


def set_num_classes(config: Any, count: int) -> None:
    """Every ``num_classes`` in a config, changed in place."""
    for part in parts(config):
        if "num_classes" in part:
            part["num_classes"] = count


def add_import(config: dict[str, Any], module: str) -> None:
    """Let a config import a module, beside what it imports; changed in place."""
    imports = dict(config.get("custom_imports") or dict(allow_failed_imports=False))
    names = imports.get("imports") or []
    names = [names] if isinstance(names, str) else list(names)
    imports["imports"] = list(dict.fromkeys([*names, module]))
    config["custom_imports"] = imports


def has_masks(model: Mapping[str, Any]) -> bool:
    """Whether a detector learns masks, which its data then needs."""
    return bool((model.get("roi_head") or {}).get("mask_head"))


def own_data(config: Mapping[str, Any]) -> str | None:
    """The annotations that a config's author named for its training, where they are not those of
    COCO that mmdet's own configs name."""
    for part in datasets((config.get("data") or {}).get("train") or {}):
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
