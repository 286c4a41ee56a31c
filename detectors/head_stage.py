"""The head stage of a trial: a new head trained on features of the frozen, warm trunk, which are
computed once a node.

What is left of a training step is the head and its losses. Heads, assigners, samplers, coders,
losses and NMS are mmdet's own; :mod:`detectors.head_features` says what is cached.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.core.bbox.transforms import bbox_flip
from torch import nn

from cse_autoloss.cache import digest
from cse_autoloss.trial import ConfigError
from detectors import config_data
from detectors.feature_cache import Writer, shared
from detectors.head_features import FeatureMaps, RoIFeatures, Seen, precision_of
from detectors.images import dataset
from detectors.setup import Setup, versions

_MADE = "2"  # counts the ways features have been made in; cached ones of another way are stale
_MEASURED_AT_ONCE = 8  # images


class HeadStage:
    """Features of one trunk, and heads that are trained and measured on them.

    Args:
        setup: of the trials.
        trunk: the detector with the weights that trials start from; its head does not matter.
        weights: digest of these weights.

    Attributes:
        precision: of the heads' matrix products in training.
    """

    def __init__(self, setup: Setup, trunk: nn.Module, weights: str) -> None:
        self._setup = setup
        self._trunk = trunk.eval()
        config, limit = setup.config, setup.head.cache_bytes
        training, self._measuring = (config_data.pipeline(config, flag) for flag in (True, False))
        made_from = [config.model, training, self._measuring, versions()]
        self._digest = digest(
            *(_MADE, json.dumps(made_from, sort_keys=True, default=repr), setup.data.digest),
            *(weights, str(limit), setup.device.type),
        )
        self._flips = _flips(training)
        self._directions = [direction for _, direction, _ in self._flips if direction is not None]
        self._kind = RoIFeatures if RoIFeatures.can_do(trunk) else FeatureMaps
        self._splits: dict[str, RoIFeatures | FeatureMaps] = {}
        self.precision = precision_of(setup.head.precision, setup.device)
        if self._kind is FeatureMaps and hasattr(trunk, "roi_head"):  # mmdet's own forward_train
            self.precision = torch.float32

    def load(self, splits: Iterable[str]) -> None:
        """Make the features of these splits, or read what is there: it can take minutes."""
        for split in splits:
            self._features(split)

    def trainable(self, model: nn.Module) -> nn.Module:
        """The model's box head alone, with mmcv's ``train_step`` for batches of :meth:`batches`."""
        return _Trainable(model, self._features("train"))

    def batches(self, size: int, seed: int) -> Batches:
        """Of ``size`` images, without end.

        Raises:
            ConfigError: fewer images than that fit into the cache.
        """
        info = self._features("train").info
        if info["images"] < size:
            raise ConfigError(
                f"proxy.head.cache_bytes: features of {info['images']} images fit; a batch is "
                f"{size}"
            )
        return Batches(info["images"], info["chances"], size, seed)

    @property
    def views(self) -> list[str]:
        """How images are shown to a head that is measured: ``"as is"``, and in each flip that
        training shows."""
        return ["as is", *self._directions]

    def detect(
        self, model: nn.Module, split: str, view: int = 0
    ) -> Iterator[list[list[np.ndarray]]]:
        """Boxes found, in a few images at a time, in the order of the data set.

        For each image, for each class: (boxes, 5) of x1 y1 x2 y2 in pixels of the original image,
        and score.
        """
        model.eval()
        features, views = self._features(split), len(self.views)
        every = range(view, len(features.metas), views)
        for start in range(0, len(every), _MEASURED_AT_ONCE):
            images = every[start : start + _MEASURED_AT_ONCE]
            with torch.no_grad():
                found = features.detect(model, images)
            metas = [features.metas[image] for image in images]
            yield [_as_is(boxes, meta) for boxes, meta in zip(found, metas, strict=True)]

    def _features(self, split: str) -> RoIFeatures | FeatureMaps:
        if split not in self._splits:
            make = self._make_training if split == "train" else self._make_measuring
            name = digest(self._digest, split)
            arrays = shared(name, lambda writer: make(writer, split), self._setup.device)
            self._splits[split] = self._kind(arrays, self._trunk, self.precision)
        return self._splits[split]

    def _make_training(self, writer: Writer, split: str) -> dict[str, Any]:
        """Each image in all its flips; as many images, in a random order, as there is room for."""
        sets = [dataset(self._setup, split, True, pipeline) for pipeline, _, _ in self._flips]
        images, rows = 0, []
        for index in np.random.default_rng(0).permutation(len(sets[0])):
            if writer.size > self._setup.head.cache_bytes:
                break
            rows += [self._write(writer, data[index], training=True) for data in sets]
            images += 1
        return {"images": images, "chances": [chance for _, _, chance in self._flips], "rows": rows}

    def _make_measuring(self, writer: Writer, split: str) -> dict[str, Any]:
        """Each image as it is, and in each flip, one after the other."""
        pipeline = [
            {**step, "flip": bool(self._directions), "flip_direction": self._directions}
            if step["type"] == "MultiScaleFlipAug"
            else step
            for step in self._measuring
        ]
        data, rows = dataset(self._setup, split, False, pipeline), []
        for index in range(len(data)):
            seen = data[index]  # a list of views for each key
            rows += [
                self._write(writer, dict(zip(seen, view, strict=True)), training=False)
                for view in zip(*seen.values(), strict=True)
            ]
        return {"rows": rows}

    @torch.no_grad()
    def _write(self, writer: Writer, item: dict[str, Any], training: bool) -> dict[str, Any]:
        """Add an image's features; returns what else must be known of it."""
        image, meta = item["img"].data[None].to(self._setup.device), item["img_metas"].data
        trunk, proposals, truth = self._trunk, None, ()
        maps = trunk.extract_feat(image)
        if hasattr(trunk, "rpn_head"):
            cfg = trunk.train_cfg.get("rpn_proposal", trunk.test_cfg.rpn) if training else None
            outputs = trunk.rpn_head(maps)
            (proposals,) = trunk.rpn_head.get_bboxes(*outputs, img_metas=[meta], cfg=cfg)
        if training:
            truth = (item[name].data.to(self._setup.device) for name in ("gt_bboxes", "gt_labels"))
        return self._kind.write(writer, trunk, Seen(maps, meta, proposals, *truth))


class Batches:
    """Numbers of cached images: each image once an epoch in a random order, in one of its flips."""

    epoch = 0  # what mmcv's runner asks a loader for

    def __init__(self, images: int, chances: Sequence[float], size: int, seed: int) -> None:
        self._images, self._chances, self._size = images, chances, size
        self._rng = np.random.default_rng(seed)
        self._order = np.empty(0, int)

    def __next__(self) -> np.ndarray:
        while len(self._order) < self._size:
            self._order = np.concatenate([self._order, self._rng.permutation(self._images)])
        images, self._order = np.split(self._order, [self._size])
        flips = self._rng.choice(len(self._chances), self._size, p=self._chances)
        return images * len(self._chances) + flips


class _Trainable(nn.Module):
    """What mmcv's runner trains: the box head, and nothing of the trunk."""

    def __init__(self, model: nn.Module, features: RoIFeatures | FeatureMaps) -> None:
        super().__init__()
        self.head = model.roi_head.bbox_head if hasattr(model, "roi_head") else model.bbox_head
        self._of = (model, features)  # in a tuple, so that the trunk is no part of this module

    def train_step(self, batch: np.ndarray, _optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model, features = self._of
        loss, log_vars = model._parse_losses(features.losses(model, batch))
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(batch)}


def _as_is(found: list[np.ndarray], meta: dict[str, Any]) -> list[np.ndarray]:
    """Boxes of each class where they are in the image that was not flipped."""
    if meta["flip_direction"] is None:
        return found
    for boxes in found:
        at = torch.from_numpy(boxes[:, :4])
        boxes[:, :4] = bbox_flip(at, meta["ori_shape"], meta["flip_direction"]).numpy()
    return found


def _flips(
    pipeline: Sequence[dict[str, Any]],
) -> list[tuple[list[dict[str, Any]], str | None, float]]:
    """The pipeline once for each thing that its RandomFlip may do; in which direction, or None; and
    how likely that is."""
    places = [i for i, step in enumerate(pipeline) if step["type"] == "RandomFlip"]
    if not places:
        return [(list(pipeline), None, 1.0)]
    step = pipeline[places[0]]
    directions, chances = step.get("direction", "horizontal"), step.get("flip_ratio") or 0.0
    if isinstance(directions, str):
        directions = [directions]
    if isinstance(chances, int | float):
        chances = [chances / len(directions)] * len(directions)
    outcomes = [(dict(step, flip_ratio=0.0), None, 1 - sum(chances))]
    outcomes += [
        (dict(step, flip_ratio=1.0, direction=direction), direction, chance)
        for direction, chance in zip(directions, chances, strict=True)
    ]
    return [
        ([*pipeline[: places[0]], changed, *pipeline[places[0] + 1 :]], direction, chance)
        for changed, direction, chance in outcomes
        if chance > 0
    ]
