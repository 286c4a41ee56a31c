"""What mmdet 2.28 and mmcv-full 1.7, the last of their line, need to run beside today's torch and
NumPy.

Narrow patches, made once by ``import detectors``. Each touches only the mmcv or mmdet module that
it names; nothing that another library could see is changed.

* torchvision. ``mmcv/runner/checkpoint.py`` imports it at its top, for checkpoints named
  ``torchvision://...`` alone. Where torchvision cannot be imported, a placeholder stands in for it
  while that one module is imported, and is gone from ``sys.modules`` afterwards: ``import
  torchvision`` elsewhere still fails as it should, and a ``torchvision://`` checkpoint is refused
  with a message that says what to install.
* NumPy. Three modules of mmdet write ``np.int``, which NumPy dropped in 1.24. They see a NumPy that
  still has it.
* ``torch.nn.parallel.DistributedDataParallel``. mmcv's subclass reads
  ``_use_replicated_tensor_module``, which torch dropped in 2.1. It gets it back with the value that
  it had for everyone: False.
* ``torch.nn.parallel._functions._get_stream``. mmcv hands it a GPU's number; since 2.1 torch wants
  a ``torch.device``.
* Training on CPUs. mmcv's runner of steps goes on from a checkpoint by way of a GPU; mmdet puts
  seeds on one to tell them to other processes, and wraps a model of theirs for one alone. Where
  there is no GPU, checkpoints and seeds stay on the CPU, and the wrapper is mmcv's with a batch
  unpacked as on one CPU.

mmdet's own ``tools/train.py`` imports ``mmcv.runner`` before it reads a config, and with it
torchvision. A config's ``custom_imports`` is too late for that one line, so where torchvision is
not installed such a script is run as ``python -m detectors tools/train.py CONFIG ...``, which makes
the patches first. ``cse-search train`` needs none of this.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import numpy
import torch

_USERS_OF_NP_INT = (
    "mmdet.datasets.custom",
    "mmdet.datasets.openimages",
    "mmdet.core.bbox.samplers.iou_balanced_neg_sampler",
)


def apply() -> None:
    """Make the patches. Doing it again changes nothing."""
    _import_mmcv_runner()
    from mmcv.parallel import MMDistributedDataParallel

    if not hasattr(MMDistributedDataParallel, "_use_replicated_tensor_module"):
        MMDistributedDataParallel._use_replicated_tensor_module = False
    if not hasattr(numpy, "int"):
        old_numpy = _NumpyWithInt("numpy")
        for name in _USERS_OF_NP_INT:
            importlib.import_module(name).np = old_numpy
    _give_streams_by_number()
    if not torch.cuda.is_available():
        _train_on_cpus()


class _NumpyWithInt(types.ModuleType):
    """NumPy, and ``int`` under the name that NumPy gave up."""

    int = int

    def __getattr__(self, name: str) -> object:
        return getattr(numpy, name)


class _NoTorchvision(types.ModuleType):
    """What ``mmcv.runner.checkpoint`` holds in torchvision's place."""

    def __getattr__(self, name: str) -> object:
        # What the loader of such checkpoints asks for first
        if name not in (
            "__version__",
            "models",
        ):
            raise AttributeError(name)
        raise ImportError(
            "checkpoints named torchvision://... need torchvision: pip install torchvision"
        )


def _import_mmcv_runner() -> None:
    if "mmcv.runner" in sys.modules or _torchvision_works():
        return
    sys.modules["torchvision"] = _NoTorchvision("torchvision")
    try:
        importlib.import_module("mmcv.runner")
    finally:
        del sys.modules["torchvision"]


def _torchvision_works() -> bool:
    """Whether it can be imported: one that was built for another torch is installed and yet fails,
    in many ways."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # ImportError, OSError of the linker, RuntimeError of an operator not there
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


def _give_streams_by_number() -> None:
    from mmcv.parallel import _functions

    if _functions._get_stream.__module__ != __name__:
        given = _functions._get_stream

        def get_stream(device: int | torch.device) -> Any:
            return given(torch.device("cuda", device) if isinstance(device, int) else device)

        _functions._get_stream = get_stream


def _train_on_cpus() -> None:
    from mmcv.parallel import MMDistributedDataParallel
    from mmcv.parallel.scatter_gather import scatter_kwargs
    from mmcv.runner import IterBasedRunner
    from mmdet.apis import train
    from mmdet.core.utils import dist_utils
    from torch import nn

    class OnCPU(MMDistributedDataParallel):
        """mmcv's wrapper unpacks a batch's containers for a GPU alone; here they are unpacked for
        the CPU first."""

        def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
            inputs, kwargs = scatter_kwargs(inputs, kwargs, [-1])
            return super().train_step(*inputs[0], **kwargs[0])

        def val_step(self, *inputs: Any, **kwargs: Any) -> Any:
            inputs, kwargs = scatter_kwargs(inputs, kwargs, [-1])
            return super().val_step(*inputs[0], **kwargs[0])

        def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
            inputs, kwargs = scatter_kwargs(inputs, kwargs, [-1])
            return super()._run_ddp_forward(*inputs[0], **kwargs[0])

    def build_ddp(
        model: nn.Module, device: str, device_ids: list[int], **kwargs: Any
    ) -> MMDistributedDataParallel:
        return OnCPU(model, **kwargs)

    IterBasedRunner.resume.__defaults__ = (True, "cpu")
    dist_utils.sync_random_seed.__defaults__ = (None, "cpu")
    train.build_ddp = build_ddp
