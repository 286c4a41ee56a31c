"""Which losses a detector's config has, and putting others in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdet.models import HEADS as MMDET_HEADS

from cse_autoloss import inputs
from cse_autoloss.space import load_space
from cse_autoloss.trial import BRANCHES, ConfigError

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
