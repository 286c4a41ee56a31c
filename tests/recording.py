"""What the comparison of one process with many needs of a config: a hook that records, a sampler
without hidden state."""

from pathlib import Path

import torch
from mmcv.runner import HOOKS, Hook, get_dist_info
from mmdet.core.bbox.builder import BBOX_SAMPLERS
from mmdet.core.bbox.samplers import RandomSampler


@HOOKS.register_module()
class RecordSteps(Hook):
    """Losses and gradients of every step, as the first process has them after all processes' were
    averaged."""

    def __init__(self, path):
        self._path, self._steps = Path(path), []

    def after_train_iter(self, runner):
        losses = {
            name: value for name, value in runner.outputs["log_vars"].items() if "loss" in name
        }
        named = runner.model.module.named_parameters()
        gradients = {
            name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None
        }
        self._steps.append((losses, gradients))

    def after_run(self, runner):
        if get_dist_info()[0] == 0:
            torch.save(self._steps, self._path)


@BBOX_SAMPLERS.register_module()
class SamplerByImage(RandomSampler):
    """mmdet's random sampler, drawing from a generator that starts anew with each image.

    mmdet draws from one stream for all images of a process, so which boxes an image gets depends on
    the images before it.
    """

    def sample(self, assign_result, bboxes, gt_bboxes, gt_labels=None, **kwargs):
        self._generator = torch.Generator().manual_seed(
            int(gt_bboxes.double().sum().item() * 1000) % 2**31
        )
        return super().sample(assign_result, bboxes, gt_bboxes, gt_labels, **kwargs)

    def random_choice(self, gallery, num):
        return gallery[torch.randperm(len(gallery), generator=self._generator)[:num]]
