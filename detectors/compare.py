"""Two trainings side by side: their curves, and what their last checkpoints detect beside the
ground truth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmcv import Config
from mmdet.apis import inference_detector, init_detector
from mmdet.datasets import CocoDataset, build_dataset
from mmdet.utils import get_device

from cse_autoloss.trial import ConfigError
from detectors.images import quiet

_COLOURS = ("#1b6ca8", "#d1495b")  # of the two trainings
_CLASS_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#f032e6",
    "#808000",
    "#000075",
)


@dataclass(frozen=True)
class Curves:
    """What mmcv's JSON logs say of a training. Time is in epochs, or in steps where the config
    counts in steps.

    Attributes:
        unit: ``"epoch"`` or ``"step"``.
        loss: (time, total training loss) at each line of the log.
        mAP: (time, COCO AP of boxes in [0, 1]) at each measurement.
    """

    unit: str
    loss: tuple[tuple[float, float], ...]
    mAP: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class WorkDir:
    """A finished or running training's folder: its config, last checkpoint and curves."""

    folder: Path
    config: Config
    checkpoint: Path
    curves: Curves


def compare(
    first: Path, second: Path, output: Path, images: int = 6, score: float = 0.3
) -> list[WorkDir]:
    """Draw two trainings into one picture: loss and mAP, then images with ground truth and both's
    detections.

    Args:
        first, second: work folders of ``cse-search train`` or mmdet's ``tools/train.py``.
        output: the picture (.png, .pdf, .svg).
        images: of the first config's val split that have an object, evenly spaced.
        score: detections below it are not drawn.

    Raises:
        ConfigError: one line for a folder that holds no training, or two that do not know the same
            classes.
    """
    both = [read(first), read(second)]
    with quiet():
        dataset = build_dataset(both[0].config.data.val, dict(test_mode=True))
        models = [
            init_detector(run.config, str(run.checkpoint), device=get_device()) for run in both
        ]
    if list(models[0].CLASSES) != list(models[1].CLASSES):
        raise ConfigError(
            f"{first} and {second}: trained on different classes; they have no picture in common"
        )
    shown = _choose(dataset, images)
    rows = math.ceil(len(shown) / 2)  # two images in each, three pictures of an image
    figure = Figure(figsize=(12, 3.2 + 2.1 * rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.2, 2.1 * rows])
    _draw_curves(upper.subplots(1, 2), both)
    for half, part in enumerate(lower.subfigures(1, 2, wspace=0.03)):
        cells = part.subplots(rows, 3, squeeze=False)
        for cell in cells.ravel():
            cell.set_axis_off()
        for row, index in zip(cells, shown[half::2], strict=False):
            _draw_image(row, dataset, index, models, score)
        for cell, title in zip(cells[0], ("ground truth", *_names(both)), strict=True):
            cell.set_title(title, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    return both


def read(folder: Path) -> WorkDir:
    """A work folder's config, checkpoint and curves.

    Raises:
        ConfigError: what is missing in it.
    """
    logs = sorted(folder.glob("*.log.json"))
    configs = sorted(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)
    checkpoint = folder / "latest.pth"
    for what, found in (
        ("log *.log.json", logs),
        ("config *.py", configs),
        ("checkpoint latest.pth", checkpoint.exists()),
    ):
        if not found:
            raise ConfigError(f"{folder}: no {what}; expected a work folder of cse-search train")
    config = Config.fromfile(str(configs[-1]))
    return WorkDir(folder, config, checkpoint, read_curves(logs, config))


def read_curves(logs: Sequence[Path], config: Config) -> Curves:
    """The curves in a training's JSON logs, oldest first; a log that goes on from a checkpoint
    replaces what came after it."""
    by_step = config.get("runner", {}).get("type") == "IterBasedRunner"
    interval = config.get("evaluation", {}).get("interval", 1)
    loss: list[tuple[float, float]] = []
    measured: list[tuple[float, float]] = []
    for log in logs:
        lines = [
            json.loads(line)
            for line in log.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        training = [line for line in lines if line.get("mode") == "train"]
        if not training:
            continue
        # Steps, as far as they were logged
        in_epoch = 1 if by_step else max(line["iter"] for line in training)
        now = start = (
            training[0]["iter"]
            if by_step
            else training[0]["epoch"] - 1 + training[0]["iter"] / in_epoch
        )
        loss = [point for point in loss if point[0] < start]
        measured = [point for point in measured if point[0] < start]
        for line in lines:
            if line.get("mode") == "train":
                now = line["iter"] if by_step else line["epoch"] - 1 + line["iter"] / in_epoch
                loss.append((now, line["loss"]))
            elif "bbox_mAP" in line:
                # A measurement's line has no step of its own: it is that of the interval's next
                # end.
                measured.append(
                    (
                        math.ceil(now / interval) * interval if by_step else line["epoch"],
                        line["bbox_mAP"],
                    )
                )
    return Curves("step" if by_step else "epoch", tuple(loss), tuple(measured))


def _choose(dataset: CocoDataset, count: int) -> list[int]:
    """Indices of images with an object, evenly spaced in the data set's order."""
    candidates = [
        index for index in range(len(dataset)) if len(dataset.get_ann_info(index)["bboxes"])
    ]
    places = np.linspace(0, len(candidates) - 1, min(count, len(candidates)))
    return [candidates[round(place)] for place in places]


def _names(both: Sequence[WorkDir]) -> list[str]:
    names = [run.folder.resolve().name for run in both]
    return names if names[0] != names[1] else [str(run.folder) for run in both]


def _draw_curves(axes: Sequence[Axes], both: Sequence[WorkDir]) -> None:
    left, right = axes
    for run, name, colour in zip(both, _names(both), _COLOURS, strict=True):
        curves = run.curves
        if curves.loss:
            left.plot(*zip(*curves.loss, strict=True), color=colour, label=name)
        if curves.mAP:
            best = max(value for _, value in curves.mAP)
            right.plot(
                *zip(*curves.mAP, strict=True),
                color=colour,
                marker="o",
                markersize=4,
                label=f"{name}: {best:.3f} at best",
            )
    for axis, title in (
        (left, "training loss (each its own: values of different losses do not compare)"),
        (right, "mAP of boxes on val"),
    ):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(both[0].curves.unit)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    right.set_ylim(bottom=0)


def _draw_image(
    cells: Sequence[Axes], dataset: CocoDataset, index: int, models: Sequence[object], score: float
) -> None:
    info = dataset.data_infos[index]
    path = Path(dataset.img_prefix or "", info["filename"])
    image = mmcv.imread(str(path))
    truth = dataset.get_ann_info(index)
    _draw_boxes(cells[0], image, truth["bboxes"], truth["labels"], dataset.CLASSES)
    for cell, model in zip(cells[1:], models, strict=True):
        with quiet():
            found = inference_detector(model, str(path))
        found = found[0] if isinstance(found, tuple) else found  # (boxes, masks)
        labels = np.repeat(np.arange(len(found)), [len(boxes) for boxes in found])
        boxes = np.concatenate(found)
        kept = boxes[:, 4] >= score
        _draw_boxes(cell, image, boxes[kept], labels[kept], dataset.CLASSES)


def _draw_boxes(
    cell: Axes, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> None:
    """(n, 4) boxes in pixels, or (n, 5) with their scores, on a BGR image."""
    cell.imshow(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    for (left, top, right, bottom, *scores), label in zip(boxes, labels, strict=True):
        colour = _CLASS_COLOURS[label % len(_CLASS_COLOURS)]
        cell.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2
            )
        )
        cell.text(
            left,
            max(top, image.shape[0] * 0.05),
            " ".join([classes[label], *(f"{score:.2f}" for score in scores)]),
            fontsize=5,
            color="white",
            verticalalignment="bottom",
            clip_on=True,
            bbox=dict(facecolor=colour, edgecolor="none", pad=0.6),
        )
