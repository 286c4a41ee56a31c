"""``python -m cse_autoloss.adapters.mmdet3_check CONFIG``: whether a config of MMDetection 3.x, an
exported one, builds and trains: one forward and one backward pass on images of noise."""

from __future__ import annotations

import sys

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData


def check(path: str) -> dict[str, float]:
    """Take the losses of a config's detector, and their gradients, on two images of noise.

    Returns:
        Name to value.

    Raises:
        ValueError: a loss or a gradient is not finite.
    """
    config = Config.fromfile(path)
    init_default_scope(config.get("default_scope", "mmdet"))
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).train()
    boxes = torch.tensor([[12.0, 20, 76, 92], [60, 8, 124, 56]])
    samples = []
    for _ in range(2):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(128, 128),
                ori_shape=(128, 128),
                batch_input_shape=(128, 128),
                pad_shape=(128, 128),
                scale_factor=(1.0, 1.0),
                img_id=0,
                img_path="noise.png",
            )
        )
        sample.gt_instances = InstanceData(bboxes=boxes.clone(), labels=torch.tensor([0, 0]))
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long())
        samples.append(sample)
    total, values = model.parse_losses(model.loss(torch.randn(2, 3, 128, 128), samples))
    total.backward()
    found = {name: float(value) for name, value in values.items()}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not all(torch.isfinite(value).all() for value in (total, *gradients)):
        raise ValueError(f"{path}: losses or gradients are not finite: {found}")
    return found


if __name__ == "__main__":
    for name, value in check(sys.argv[1]).items():
        print(f"{name}: {value:.4f}")
