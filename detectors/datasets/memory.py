"""Images that are decoded once: mmdet's LoadImageFromFile with a memory."""

from __future__ import annotations

import numpy as np
from mmdet.datasets import PIPELINES
from mmdet.datasets.pipelines import LoadImageFromFile


@PIPELINES.register_module()
class LoadImageFromMemory(LoadImageFromFile):
    """Reads an image on its first use and keeps it, decoded, until ``limit`` bytes are held; then
    it reads as usual.

    Args:
        limit: bytes of decoded images to keep, for each data set and process.
        **kwargs: those of mmdet's ``LoadImageFromFile``.
    """

    def __init__(self, limit: int = 2 << 30, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.limit = limit
        self._room = limit
        self._images: dict[str, np.ndarray] = {}

    def __call__(self, results: dict) -> dict:
        name = results["img_info"]["filename"]
        image = self._images.get(name)
        if image is None:
            results = super().__call__(results)
            if results["img"].nbytes <= self._room:
                self._room -= results["img"].nbytes
                self._images[name] = results["img"].copy()
            return results
        results.update(
            filename=f"{results['img_prefix'] or ''}{name}",
            ori_filename=name,
            img=image.copy(),  # a transform may write into it
            img_shape=image.shape,
            ori_shape=image.shape,
            img_fields=["img"],
        )
        return results
