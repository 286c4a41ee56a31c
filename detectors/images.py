"""The images and boxes of a run as mmdet data sets."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv import Config
from mmdet.datasets import CocoDataset, build_dataloader, build_dataset, replace_ImageToTensor
from mmdet.datasets.api_wrappers import COCOeval
from torch.utils.data import DataLoader

from cse_autoloss.trial import Picture
from detectors import config_data
from detectors.datasets.named import unwrapped
from detectors.setup import Setup

SAMPLE = 200  # images that a trial tells its boxes of
SIDE = 400  # pixels, of a picture's longer side


def dataset(
    setup: Setup, split: str, training: bool, pipeline: Sequence[dict[str, Any]] | None = None
) -> CocoDataset:
    """A split, each of its images decoded once.

    Args:
        pipeline: of mmdet's transforms; the config's for training or for measuring where None.
    """
    if pipeline is None and not training:
        pipeline = config_data.pipeline(setup.config, training)
    own = setup.config.data.train if pipeline is None else dict(pipeline=list(pipeline))
    part = config_data.with_split(own, setup.data.splits[split], setup.data.classes)
    with quiet():
        for inner in unwrapped(part):
            if not training:
                inner["pipeline"] = replace_ImageToTensor(inner["pipeline"])
            inner["pipeline"] = [_in_memory(step) for step in inner["pipeline"]]
            inner["test_mode"] = not training
        return build_dataset(part)


def loader(data: CocoDataset, config: Config, seed: int, processes: int = 1) -> DataLoader:
    """Batches of a data set as a trial trains on them, for one of the processes that share it."""
    return build_dataloader(
        data,
        config.data.samples_per_gpu // processes,
        0,  # no loading processes: the images are in memory already
        dist=False,
        seed=seed,
        runner_type=config.runner.type,
    )


def average_precision(data: CocoDataset, found: Sequence[list[np.ndarray]]) -> dict[str, float]:
    """COCO AP over all sizes: ``mAP``, ``mAP_50`` and ``mAP_75`` in [0, 1].

    The numbers of ``data.evaluate``, unrounded, in a third of its time: it measures small, medium
    and large objects by themselves, too.

    Args:
        found: for each image, for each class, (boxes, 5) of x1 y1 x2 y2 in pixels, and score.
    """
    detections = data._det2json(found)
    if not detections:
        return dict.fromkeys(("mAP", "mAP_50", "mAP_75"), 0.0)
    with quiet():
        measure = COCOeval(data.coco, data.coco.loadRes(detections), "bbox")
        measure.params.imgIds, measure.params.catIds = data.img_ids, data.cat_ids
        measure.params.areaRng, measure.params.areaRngLbl = [[0, 1e10]], ["all"]
        measure.params.maxDets = [100]
        measure.evaluate()
        measure.accumulate()
    precision = measure.eval["precision"]  # (IoUs, recalls, classes, 1, 1); -1: no such object
    thresholds = measure.params.iouThrs.round(2).tolist()
    by_name = {
        "mAP": precision,
        "mAP_50": precision[thresholds.index(0.5)],
        "mAP_75": precision[thresholds.index(0.75)],
    }
    return {name: float(values[values > -1].mean()) for name, values in by_name.items()}


def surest(data: CocoDataset, found: Sequence[list[np.ndarray]]) -> dict[str, dict[str, list]]:
    """The surest boxes of ``SAMPLE`` images, drawn once and for all: as many as there are objects
    in them (``TrialResult.detections``). Scores mean something else with each loss; their order is
    what AP is measured by.

    Args:
        found: as for :func:`average_precision`.
    """
    chosen = np.random.default_rng(0).permutation(len(data))[:SAMPLE]
    images, rows, objects = {}, [], 0
    for index in sorted(chosen.tolist()):
        truth = data.get_ann_info(index)
        objects += len(truth["labels"])
        boxes = np.column_stack([truth["bboxes"].round(1), truth["labels"]])
        name = data.data_infos[index]["filename"]
        images[name] = {"objects": [_plain(row) for row in boxes], "found": []}
        rows += [(name, label, row) for label, of in enumerate(found[index]) for row in of]
    rows.sort(key=lambda entry: -entry[2][4])
    for name, label, (*box, score) in rows[:objects]:
        row = [*np.round(np.array(box, float), 1), label, round(float(score), 3)]
        images[name]["found"].append(_plain(row))
    return images


def _plain(row: Sequence[float]) -> list[float]:
    return [int(value) if value == int(value) else float(value) for value in row]


def pictures(setup: Setup, split: str, names: Sequence[str]) -> dict[str, Picture]:
    """Images of a split by their file names, as its pipeline loads them."""
    data = dataset(setup, split, training=False)
    load = data.pipeline.transforms[0]
    made = {}
    for info in data.data_infos:
        if info["filename"] in names:
            image = load({"img_info": info, "img_prefix": data.img_prefix})["img"]
            height, width = image.shape[:2]
            scale = min(1.0, SIDE / max(height, width))
            small = mmcv.imrescale(image, scale, interpolation="area") if scale < 1 else image
            _, jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
            made[info["filename"]] = Picture(width, height, jpeg.tobytes())
    return made


def _in_memory(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "LoadImageFromFile":
        return {**step, "type": "LoadImageFromMemory"}
    return dict(step)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what pycocotools prints and mmcv and mmdet log about each data set, measurement and
    weight."""
    logger = mmcv.utils.get_logger("mmcv")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)
