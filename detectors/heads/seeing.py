"""What a head may tell its losses of the images of a batch: their sizes, and where their objects
are.

mmdet hands images to a dense head's ``loss``, but not to that of an R-CNN's box head: there a RoI
head tells it, in the forms that are registered here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from mmdet.core import bbox_overlaps
from mmdet.models import HEADS
from mmdet.models.roi_heads import CascadeRoIHead, DoubleHeadRoIHead, StandardRoIHead
from torch import Tensor, nn

from cse_autoloss.inputs import area_of, box_sides


class Images(NamedTuple):
    """The images of a batch, as a head sees them: resized, not padded.

    Attributes:
        sizes: (images, 2) widths and heights in pixels.
        objects: of each image, (G, 4) boxes of its objects, x1 y1 x2 y2 in pixels.
    """

    sizes: Tensor
    objects: Sequence[Tensor]

    @classmethod
    def of(cls, img_metas: Sequence[dict[str, Any]], gt_bboxes: Sequence[Tensor]) -> Images:
        """From what mmdet hands to heads."""
        shapes = [meta["img_shape"] for meta in img_metas]
        return cls(gt_bboxes[0].new_tensor([[w, h] for h, w, *_ in shapes]), gt_bboxes)

    def shares(self, boxes: Tensor, images: Tensor) -> Tensor:
        """(P,) share of its image that each of (P, 4) boxes covers; ``images``, (P,), are places in
        the batch."""
        return area_of(box_sides(boxes)) / area_of(self.sizes[images])

    @torch.no_grad()
    def nearest_ious(self, boxes: Tensor, images: Tensor) -> Tensor:
        """(N,) IoU of each of (N, 4) boxes with the object of its image that it overlaps most; 0
        where there is none."""
        ious = boxes.new_zeros(len(boxes))
        for number, objects in enumerate(self.objects):
            if len(objects):
                of_image = images == number
                ious[of_image] = bbox_overlaps(boxes[of_image], objects).amax(1)
        return ious


class SeesImages:
    """Mixed into a head: within :meth:`seeing` it knows the images that its predictions are of.

    Attributes:
        images: these, or None.
    """

    images: Images | None = None

    @contextlib.contextmanager
    def seeing(
        self, img_metas: Sequence[dict[str, Any]], gt_bboxes: Sequence[Tensor]
    ) -> Iterator[None]:
        self.images = Images.of(img_metas, gt_bboxes)
        try:
            yield
        finally:
            self.images = None

    def seen(self, **given: Callable[[Images], Tensor]) -> dict[str, Callable[..., Tensor]]:
        """For :func:`detectors.losses.handing_over`: what is computed from the images; nothing
        where the head sees none."""
        images = self.images
        if images is None:
            return {}
        return {name: lambda *_, make=make: make(images) for name, make in given.items()}


class SeesImagesOfLoss(SeesImages):
    """Mixed into a dense head: its ``loss``, which mmdet hands the images, sees them."""

    def loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As that of mmdet's head, with the same arguments."""
        loss = super().loss
        given = inspect.signature(loss).bind(*args, **kwargs).arguments
        with self.seeing(given["img_metas"], given["gt_bboxes"]):
            return loss(*args, **kwargs)


class _ShowsImages:
    """Mixed into a RoI head: its box heads see the images."""

    def forward_train(
        self,
        x: Sequence[Tensor],
        img_metas: Sequence[dict[str, Any]],
        proposal_list: Sequence[Tensor],
        gt_bboxes: Sequence[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """As ``mmdet.models.StandardRoIHead.forward_train``, with the same arguments."""
        heads = self.bbox_head
        with contextlib.ExitStack() as stack:
            for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                stack.enter_context(head.seeing(img_metas, gt_bboxes))
            return super().forward_train(x, img_metas, proposal_list, gt_bboxes, *args, **kwargs)


@HEADS.register_module()
class ImageAwareStandardRoIHead(_ShowsImages, StandardRoIHead):
    """mmdet's StandardRoIHead whose box head sees the images."""


@HEADS.register_module()
class ImageAwareCascadeRoIHead(_ShowsImages, CascadeRoIHead):
    """mmdet's CascadeRoIHead whose box heads see the images."""


@HEADS.register_module()
class ImageAwareDoubleHeadRoIHead(_ShowsImages, DoubleHeadRoIHead):
    """mmdet's DoubleHeadRoIHead whose box head sees the images."""
