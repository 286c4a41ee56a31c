"""A trial: one detector trained with one choice of losses, and what came of it.

This is the only door between the engine and the detectors. The engine never imports a detection
library; it names a :class:`Trainer` in the run's configuration (``"package.module:Class"``), and
text goes through: expressions in, numbers out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from cse_autoloss.errors import UserError
from cse_autoloss.named import load_class

BRANCHES = ("cls", "reg")
DEFAULT_TRAINER = "detectors.training:DetectorTrainer"
TASKS = ("tiny", "head", "full")
MACHINE = "the machine failed it"  # how the reason begins of a failure that is no loss's fault


class ConfigError(UserError):
    """What a user configured cannot work. One line: which key or file, what is wrong, what would be
    right."""


@dataclass(frozen=True)
class Trial:
    """One training to be done.

    Attributes:
        key: identity of the trial within its run.
        losses: branch (``"cls"``, ``"reg"``) to expression text; a branch that is absent keeps the
            detector's default.
        spaces: branch to the name (or YAML path) of the search space that its expression is written
            in.
        task: ``"full"`` trains the detector on the train split; ``"head"`` trains a head alone, on
            cached features of the frozen trunk that all trials start from; ``"tiny"`` trains on
            the tiny split (one image of each category) and measures on the same images.
        share: of that task's steps, in (0, 1].
        evaluate: splits that mAP is measured on after training (``"val"``, ``"test"``); ignored by
            ``"tiny"``.
        seed: seeds the head's initial weights, the order of the images and their augmentation.
        scale: branch to the gradient norm that this branch starts with, as a multiple of the
            detector's default loss's. The loss weight of a searched loss is set to reach it on a
            fixed batch, so every loss starts equally strong.
        lr_scale: multiple of the configured learning rate.
        time_limit: seconds after which the trial is given up, or None; a trainer may count those
            that others' work does not add to.
        detections: the one of ``evaluate`` whose boxes the result should hold, for people to look
            at, or None.
    """

    key: str
    losses: Mapping[str, str] = field(default_factory=dict)
    spaces: Mapping[str, str] = field(default_factory=dict)
    task: str = "full"
    share: float = 1.0
    evaluate: tuple[str, ...] = ("val",)
    seed: int = 0
    scale: Mapping[str, float] = field(default_factory=dict)
    lr_scale: float = 1.0
    time_limit: float | None = None
    detections: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task should be one of {', '.join(TASKS)}, found {self.task!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share should be above 0 and at most 1, found {self.share}")

    def to_json(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Trial:
        data = json.loads(text)
        return cls(**{**data, "evaluate": tuple(data["evaluate"])})


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        key: the trial's key.
        mAP: COCO AP (IoU 0.50:0.95) in [0, 1] on the first evaluated split, or None if the trial
            failed.
        metrics: ``"<split>/<metric>"`` to value, e.g. ``"val/mAP"``, ``"val/mAP_50"``,
            ``"test/mAP"``.
        curve: (step, total training loss) pairs.
        loss_weights: branch to the loss weight that was used.
        seconds: wall-clock time of the trial in its worker, training and evaluation.
        steps: optimiser steps done.
        failure: why there is no mAP (one line), or None.
        provenance: versions, configuration digest, device and host that the number was measured
            with.
        detections: of the split that the trial asks for, or of some of its images, the same for
            all trials: file name to ``{"objects": [[x1, y1, x2, y2, class], ...], "found": [[x1,
            y1, x2, y2, class, score], ...]}``, in pixels and class indices; ``found`` the surest
            boxes, as many in all as there are objects. Empty where a trainer does not tell.
    """

    key: str
    mAP: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    failure: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    detections: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        data = json.loads(text)
        return cls(**{**data, "curve": tuple((step, loss) for step, loss in data["curve"])})

    @classmethod
    def failed(cls, trial: Trial, reason: str, seconds: float = 0.0) -> TrialResult:
        return cls(trial.key, None, failure=" ".join(reason.split())[:500], seconds=seconds)


def read_result(trial: Trial, text: object) -> TrialResult:
    """What a worker hands back for a trial, if it can be that; else a failed result that says what
    is wrong with it."""
    try:
        result = TrialResult.from_json(text) if isinstance(text, str) else None
        reason = _wrong(trial, result) if result else f"no text, but {type(text).__name__}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        result, reason = None, f"no result: {type(error).__name__}: {error}"
    if result is None or reason:
        return TrialResult.failed(trial, f"the trainer handed back {reason}")
    return result


def _wrong(trial: Trial, result: TrialResult) -> str | None:
    """What is wrong with a result, in one phrase."""
    if result.key != trial.key:
        return f"the result of another trial, {result.key!r}"
    if result.failure is not None:
        sound = isinstance(result.failure, str) and result.mAP is None
        return None if sound else f"mAP {result.mAP!r} with the failure {result.failure!r}"
    numbers: dict[str, Any] = {"mAP": result.mAP, "seconds": result.seconds, "steps": result.steps}
    numbers |= {f"metrics.{name}": value for name, value in result.metrics.items()}
    numbers |= {f"loss_weights.{name}": value for name, value in result.loss_weights.items()}
    for name, value in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            return f"{name} {value!r}, which is no finite number"
        if name.endswith("mAP") and not 0 <= value <= 1:
            return f"{name} {value!r}; it should be in [0, 1]"
    measured = () if trial.task == "tiny" else trial.evaluate
    missing = [split for split in measured if f"{split}/mAP" not in result.metrics]
    if missing:
        return f"no mAP on {', '.join(missing)}"
    return next(
        (
            f"detections.{name}: rows that are not {width} finite numbers"
            for name, boxes in result.detections.items()
            for kind, width in (("objects", 5), ("found", 6))
            for row in boxes[kind]
            if len(row) != width or not all(map(math.isfinite, row))
        ),
        None,
    )


@dataclass(frozen=True)
class Found:
    """A loss that a search has found, ready to be handed back.

    Attributes:
        losses: branch to expression text.
        spaces: branch to the space that it is written in.
        loss_weights: branch to the loss weight that it was trained with, that of a default loss
            beside it too.
        lr_scale: multiple of the configured learning rate that it was trained with.
        steps: of that training, if it was of the full task.
        strength: branch to the mean gradient norm that it started with, as a multiple of the
            default loss's.
        provenance: run, candidate, mAP with its seeds and budget, versions.
        prepared: path of what its trials started from (:meth:`Trainer.prepare`), or None.
    """

    losses: Mapping[str, str]
    spaces: Mapping[str, str]
    loss_weights: Mapping[str, float]
    provenance: Mapping[str, Any]
    prepared: str | None = None
    lr_scale: float = 1.0
    steps: int | None = None
    strength: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An image to be looked at.

    Attributes:
        width, height: in pixels of the data set's image, which boxes are given in.
        jpeg: the image, perhaps smaller.
    """

    width: int
    height: int
    jpeg: bytes


@runtime_checkable
class HasPictures(Protocol):
    """What a trainer may have besides, whose trials' results hold detections: a run's report draws
    them on its images."""

    @staticmethod
    def pictures(
        options: Mapping[str, Any], split: str, images: Sequence[str]
    ) -> dict[str, Picture]:
        """These images of a split, by the names that ``TrialResult.detections`` gives them."""


class Trainer(Protocol):
    """What the engine asks of the detectors' side. ``options`` is the ``detector`` section of a
    run's configuration.

    Attributes:
        targets: what :meth:`export` can write for; the first one unless asked.
    """

    targets: ClassVar[tuple[str, ...]]

    @staticmethod
    def resolve(options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with their paths made absolute: they mean the same from any folder."""

    @staticmethod
    def describe(options: Mapping[str, Any]) -> str:
        """What is trained on what, as a line of a report has it. Reads no file."""

    @staticmethod
    def versions() -> dict[str, str]:
        """Versions of the packages that its numbers depend on, by name."""

    @staticmethod
    def snippet(expression: str, space: str, loss_weight: float = 1.0) -> str:
        """The lines of a training configuration that use a loss."""

    @staticmethod
    def spaces(options: Mapping[str, Any]) -> dict[str, str]:
        """Branch to the search space that its losses are written in; a branch is absent whose loss
        cannot be another. Reads no data: formulas are checked before it.

        Raises:
            ConfigError: one line that names the key and what would be right.
        """

    @staticmethod
    def check(options: Mapping[str, Any]) -> dict[str, Any]:
        """Validate everything that can be known without training: keys, files, classes, data that
        is not empty.

        Returns:
            ``{"refused": {branch: why}, "untrainable": {task: why}, "hands": {branch: {head: [name
            of an extra]}}, "classes": [...], "images": {split: count}, "digests": {"data": hex,
            "detector": hex}, "notes": [...]}``. A branch whose loss cannot be another is among
            ``refused``, a task that this detector cannot train among ``untrainable``; a space with
            a variable that takes an extra (``inputs.EXTRAS``) which a head does not hand over is
            not searched, unless the trainer says nothing of ``hands``; a run whose digests have
            changed is not resumed; notes are lines that a user should see before a run.

        Raises:
            ConfigError: one line that names the key or file and what would be right.
        """

    @staticmethod
    def adopt(options: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Options that a new run can be made with: those given, or, where they name a training that
        is too large for a trial, those of a trial made of it. May train, and says what it does."""

    @staticmethod
    def prepare(options: Mapping[str, Any]) -> bytes:
        """What all trials start from (initial weights), made once and kept in the user's cache;
        runs on a worker."""

    def __init__(self, options: Mapping[str, Any], prepared: bytes) -> None:
        """Import, load the data, stay: every later trial of this worker pays none of that again."""

    def train(
        self, trial: Trial, progress: Callable[[int, int], None] | None = None
    ) -> TrialResult:
        """Train and measure. Raises nothing for a loss that diverges: that is a failed result with
        its reason.

        Args:
            progress: called with (steps done, steps in all) now and then.
        """

    @staticmethod
    def export(
        options: Mapping[str, Any],
        found: Found,
        base: str | None = None,
        target: str = "mmdet2",
        name: str = "found",
        check: bool = True,
    ) -> dict[str, str]:
        """The files of a training configuration with the found losses.

        Args:
            base: path of the user's own configuration to put the losses into; the run's detector
                where None.
            target: one of :attr:`targets`.
            name: of the configuration's file, without ``.py``. ``NAME_cls.py`` and ``NAME_reg.py``
                will stand beside it: the losses as plain PyTorch modules.
            check: build what is written and take its losses once, on a batch of noise.

        Returns:
            File name to text: ``NAME.py``, and what it imports beside those.

        Raises:
            ConfigError: if the detector's heads cannot take the losses, or the check fails; says
                why.
        """


def load_trainer(name: str) -> type[Trainer]:
    """The trainer class named ``"package.module:Class"``.

    Raises:
        ConfigError: if the name has another form, or does not lead to a class.
    """
    trainer = load_class(name, "detector.trainer")
    parts = ("targets", *(name for name in vars(Trainer) if not name.startswith("_")))
    missing = [part for part in dict.fromkeys(parts) if not hasattr(trainer, part)]
    if missing:
        raise ConfigError(
            f"detector.trainer: {name!r} is no trainer: it lacks {', '.join(missing)} (see "
            "cse_autoloss.trial.Trainer)"
        )
    return trainer
