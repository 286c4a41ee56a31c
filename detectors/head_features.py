"""What a frozen trunk makes of images, as arrays, and mmdet's heads on them.

For a Faster or Mask R-CNN: RoI features. Proposals, assignment and RoIAlign do not depend on the
head, so a step is sampling and the box head alone. For the others, a cascade, whose RoIs move, and
dense heads: feature maps. Features are kept in half precision.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.core import AssignResult, SamplingResult, bbox2result, bbox2roi
from mmdet.core.bbox.samplers import PseudoSampler, RandomSampler
from mmdet.models.dense_heads import ATSSHead, GFLHead
from mmdet.models.roi_heads import StandardRoIHead
from torch import Tensor, nn
from torch.nn import functional as F

from detectors.feature_cache import Arrays, Writer
from detectors.heads.seeing import ImageAwareStandardRoIHead

_KEPT_TARGETS = 256 << 20  # bytes, in each process
_META = ("img_shape", "pad_shape", "ori_shape", "scale_factor")  # of mmdet's, what heads read


class Seen(NamedTuple):
    """An image after the trunk.

    Attributes:
        maps: of each level, (1, C, h, w).
        meta: mmdet's ``img_meta``.
        proposals: (P, 5) boxes x1 y1 x2 y2 in pixels, and score; None without an RPN.
        gt_bboxes, gt_labels: (G, 4) and (G,), of an image to train on.
    """

    maps: Sequence[Tensor]
    meta: dict[str, Any]
    proposals: Tensor | None
    gt_bboxes: Tensor | None = None
    gt_labels: Tensor | None = None


class RoIFeatures:
    """Images as RoI features of mmdet's StandardRoIHead, assigned to their ground truth."""

    @staticmethod
    def can_do(model: nn.Module) -> bool:
        """Whether the model's RoIs are the same for every head, and sampled as here."""
        head = getattr(model, "roi_head", None)
        return (
            type(head) in (StandardRoIHead, ImageAwareStandardRoIHead)
            and not head.with_shared_head
            and type(head.bbox_sampler) is RandomSampler
            and head.bbox_sampler.neg_pos_ub < 0
        )

    @staticmethod
    def write(writer: Writer, model: nn.Module, seen: Seen) -> dict[str, Any]:
        head, boxes = model.roi_head, seen.proposals[:, :4]
        row = _row(seen)
        if seen.gt_bboxes is not None:
            assigned = head.bbox_assigner.assign(boxes, seen.gt_bboxes, None, seen.gt_labels)
            if head.bbox_sampler.add_gt_as_proposals:
                assigned.add_gt_(seen.gt_labels)
                boxes = torch.cat([seen.gt_bboxes, boxes])
            writer.add("gt_inds", assigned.gt_inds)
            writer.add("labels", assigned.labels)
            writer.add("gt_bboxes", seen.gt_bboxes)
        extractor = head.bbox_roi_extractor
        features = extractor(seen.maps[: extractor.num_inputs], bbox2roi([boxes]))
        writer.add("features", features.half())
        writer.add("boxes", boxes)
        return {**row, "rois": len(boxes)}

    def __init__(self, arrays: Arrays, model: nn.Module, precision: torch.dtype) -> None:
        self.info, self._precision = arrays.info, precision
        rows = self.info["rows"]
        self._features, self._boxes = arrays["features"], arrays["boxes"]
        self._starts = _starts(row["rois"] for row in rows)
        self.metas = [_meta(row) for row in rows]
        if "images" in self.info:
            self._sampler = model.roi_head.bbox_sampler
            self._assign(arrays, [row["objects"] for row in rows])

    def _assign(self, arrays: Arrays, objects: list[int]) -> None:
        """To mmdet the images together are one with very many objects."""
        gt_inds, first = arrays["gt_inds"].clone(), _starts(objects)
        self._positives, self._negatives = [], []
        for number, start in enumerate(self._starts[:-1]):
            within = gt_inds[start : self._starts[number + 1]]
            self._positives.append(start + (within > 0).nonzero()[:, 0])
            self._negatives.append(start + (within == 0).nonzero()[:, 0])
            within[within > 0] += first[number]
        self._gt_bboxes = arrays["gt_bboxes"]
        self._objects = self._gt_bboxes.split(objects)
        self._assigned = AssignResult(len(self._gt_bboxes), gt_inds, None, arrays["labels"])
        self._no_flags = torch.zeros_like(gt_inds, dtype=torch.uint8)

    def losses(self, model: nn.Module, images: Sequence[int]) -> dict[str, Tensor]:
        """Losses of the box head, as mmdet's ``forward_train`` names them."""
        sampled, places = self._sample(images)
        head = model.roi_head.bbox_head
        features = self._features[torch.cat([sampled.pos_inds, sampled.neg_inds])]
        with _in_precision(self._precision, features.device):
            outputs = head(features.float())
        targets = head.get_targets([sampled], None, None, model.roi_head.train_cfg)
        rois = torch.cat([places[:, None].to(sampled.bboxes), sampled.bboxes], dim=1)
        shown = ([of[image] for image in images] for of in (self.metas, self._objects))
        with head.seeing(*shown):
            return head.loss(*(output.float() for output in outputs), rois, *targets)

    def _sample(self, images: Sequence[int]) -> tuple[SamplingResult, Tensor]:
        """RoIs of each image as mmdet's RandomSampler draws them; and of each RoI, positives first,
        the place of its image in the batch."""
        sampler, positives, negatives = self._sampler, [], []
        for image in images:
            positive = _draw(
                sampler, self._positives[image], int(sampler.num * sampler.pos_fraction)
            )
            negative = _draw(sampler, self._negatives[image], sampler.num - len(positive))
            positives.append(positive)
            negatives.append(negative)
        drawn = [*positives, *negatives]
        places = torch.cat([torch.full_like(of, i % len(images)) for i, of in enumerate(drawn)])
        sampled = SamplingResult(
            torch.cat(positives),
            torch.cat(negatives),
            *(self._boxes, self._gt_bboxes, self._assigned, self._no_flags),
        )
        return sampled, places

    def detect(self, model: nn.Module, images: Sequence[int]) -> list[list[np.ndarray]]:
        """For each image, for each class, (boxes, 5): x1 y1 x2 y2 in the original image, score."""
        rois = [slice(*self._starts[image : image + 2]) for image in images]
        boxes = [self._boxes[some] for some in rois]
        features = torch.cat([self._features[some] for some in rois]).float()
        head = model.roi_head
        head.bbox_roi_extractor = _Extracted()
        found = head.simple_test_bboxes(
            (features,), [self.metas[i] for i in images], boxes, head.test_cfg, rescale=True
        )
        return [bbox2result(*one, head.bbox_head.num_classes) for one in zip(*found, strict=True)]


class FeatureMaps:
    """Images as feature maps, with their proposals where the detector has an RPN."""

    @staticmethod
    def write(writer: Writer, model: nn.Module, seen: Seen) -> dict[str, Any]:
        row = {**_row(seen), "sizes": [list(level.shape[1:]) for level in seen.maps]}
        writer.add("features", torch.cat([level.flatten() for level in seen.maps]).half())
        if seen.proposals is not None:
            writer.add("proposals", seen.proposals)
            row["proposals"] = len(seen.proposals)
        if seen.gt_bboxes is not None:
            writer.add("gt_bboxes", seen.gt_bboxes)
            writer.add("gt_labels", seen.gt_labels)
        return row

    def __init__(self, arrays: Arrays, model: nn.Module, precision: torch.dtype) -> None:
        self.info, self._precision = arrays.info, precision
        rows = self.info["rows"]
        self.metas = [_meta(row) for row in rows]
        self._sizes = [[tuple(size) for size in row["sizes"]] for row in rows]
        self._values = [[math.prod(size) for size in sizes] for sizes in self._sizes]
        self._maps = arrays["features"].split([sum(levels) for levels in self._values])
        self._proposals = self._gt_bboxes = self._gt_labels = None
        self._targets = _Targets(_KEPT_TARGETS)
        if rows and "proposals" in rows[0]:
            self._proposals = arrays["proposals"].split([row["proposals"] for row in rows])
        if "images" in self.info:
            objects = [row["objects"] for row in rows]
            self._gt_bboxes = arrays["gt_bboxes"].split(objects)
            self._gt_labels = arrays["gt_labels"].split(objects)

    def losses(self, model: nn.Module, images: Sequence[int]) -> dict[str, Any]:
        """Losses of the head, as mmdet's ``forward_train`` names them."""
        maps, metas = self._batch(images)
        truth = [[of[i] for i in images] for of in (self._gt_bboxes, self._gt_labels)]
        if self._proposals is None:
            with _in_precision(self._precision, maps[0].device):
                outputs = model.bbox_head(maps)
            outputs = ([level.float() for level in levels] for levels in outputs)
            with self._targets.kept(model.bbox_head, [level.shape[2:] for level in maps]):
                return model.bbox_head.loss(*outputs, *truth, metas)
        model.roi_head.mask_head = None
        proposals = [self._proposals[i] for i in images]
        return model.roi_head.forward_train(maps, metas, proposals, *truth)

    def detect(self, model: nn.Module, images: Sequence[int]) -> list[list[np.ndarray]]:
        """For each image, for each class, (boxes, 5): x1 y1 x2 y2 in the original image, score."""
        maps, metas = self._batch(images)
        if self._proposals is None:
            found = model.bbox_head.simple_test(maps, metas, rescale=True)
            return [bbox2result(*one, model.bbox_head.num_classes) for one in found]
        model.roi_head.mask_head = None
        proposals = [self._proposals[i] for i in images]
        return model.roi_head.simple_test(maps, proposals, metas, rescale=True)

    def _batch(self, images: Sequence[int]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Maps of each level, (images, C, h, w), the smaller ones padded; and metas."""
        flat = [self._maps[i].float().split(self._values[i]) for i in images]
        levels = []
        for level in range(len(flat[0])):
            each = [
                maps[level].view(self._sizes[i][level])
                for i, maps in zip(images, flat, strict=True)
            ]
            height, width = (max(one.shape[axis] for one in each) for axis in (1, 2))
            levels.append(
                torch.stack(
                    [
                        F.pad(one, (0, width - one.shape[2], 0, height - one.shape[1]))
                        for one in each
                    ]
                )
            )
        return levels, [self.metas[i] for i in images]


class _Targets:
    """What a dense head of ATSS's kind is to predict for an image, which no prediction changes,
    computed once: a seventh of the head's time on small images. (FCOS's targets take none.)

    Args:
        limit: bytes of tensors that are kept; what comes later is computed each time.
    """

    _FIXED = {of._get_target_single for of in (ATSSHead, GFLHead)}

    def __init__(self, limit: int) -> None:
        self._kept: dict[Any, tuple[Any, ...]] = {}
        self._left = limit

    @contextlib.contextmanager
    def kept(self, head: nn.Module, sizes: Sequence[tuple[int, ...]]) -> Iterator[None]:
        """Within it the head finds its targets here.

        Args:
            sizes: of the batch's feature maps, on which anchors, and those that count, depend.
        """
        compute = getattr(head, "_get_target_single", None)
        fixed = getattr(compute, "__func__", None) in self._FIXED
        if not fixed or type(head.sampler) is not PseudoSampler:
            yield
            return
        head._get_target_single = self._remembering(compute, tuple(sizes))
        try:
            yield
        finally:
            del head._get_target_single

    def _remembering(self, compute: Callable[..., Any], sizes: Any) -> Callable[..., Any]:
        parameters = list(inspect.signature(compute).parameters)
        truth = parameters.index("gt_bboxes")  # one tensor an image, as long as the features live
        decoded = compute.__self__.reg_decoded_bbox

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = id(args[truth]), sizes, decoded
            if key in self._kept:
                return self._kept[key]
            found = compute(*args, **kwargs)
            self._left -= sum(part.nbytes for part in found if part is not None)
            if self._left > 0:
                self._kept[key] = found
            return found

        return remembered


class _Extracted(nn.Module):
    """In a RoI extractor's place where the RoIs' features are there already."""

    num_inputs = 1

    def forward(self, features: Sequence[Tensor], _rois: Tensor) -> Tensor:
        return features[0]


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """What ``proxy.head.precision`` is on a device."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # x86's instructions, and Arm's; an older torch does not tell
        knows = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(knows.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def _in_precision(precision: torch.dtype, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def _draw(sampler: RandomSampler, gallery: Tensor, count: int) -> Tensor:
    return gallery if len(gallery) <= count else sampler.random_choice(gallery, count)


def _row(seen: Seen) -> dict[str, Any]:
    """What JSON keeps of an image."""
    row: dict[str, Any] = {name: np.asarray(seen.meta[name]).tolist() for name in _META}
    row["flip_direction"] = seen.meta["flip_direction"] if seen.meta["flip"] else None
    if seen.gt_bboxes is not None:
        row["objects"] = len(seen.gt_bboxes)
    return row


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    meta = {name: tuple(row[name]) for name in _META}
    scale = np.array(row["scale_factor"], np.float32)
    return {**meta, "scale_factor": scale, "flip_direction": row["flip_direction"]}


def _starts(counts: Iterable[int]) -> list[int]:
    """Where each begins that follows the ones before it, and where the last one ends."""
    return [0, *np.cumsum(list(counts)).tolist()]
