"""The images and boxes of a run as mmdet data sets."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mmcv
from mmdet.datasets import CocoDataset, build_dataset, replace_ImageToTensor

from detectors.setup import Setup


def dataset(
    setup: Setup, split: str, training: bool, pipeline: Sequence[dict[str, Any]] | None = None
) -> CocoDataset:
    """A split, each of its images decoded once.

    Args:
        pipeline: of mmdet's transforms; the config's for training or for measuring where None.
    """
    files = setup.data.splits[split]
    if pipeline is None:
        pipeline = setup.config.data["train" if training else "val"].pipeline
    if not training:
        pipeline = replace_ImageToTensor(pipeline)
    with quiet():
        return build_dataset(
            dict(
                type="CocoDataset",
                ann_file=files.ann_file,
                img_prefix=files.img_prefix,
                classes=setup.data.classes,
                pipeline=[_in_memory(step) for step in pipeline],
                test_mode=not training,
            )
        )


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
