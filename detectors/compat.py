"""What mmdet 2.28 and mmcv-full 1.7, the last of their line, need to run beside today's torch and NumPy.

Three narrow mends, made once by ``import detectors``. Each touches only the mmcv or mmdet module that it names; nothing
that another library could see is changed.

* torchvision. ``mmcv/runner/checkpoint.py`` imports it at its top, for checkpoints named ``torchvision://...`` alone.
  Where torchvision cannot be imported, a placeholder stands in for it while that one module is imported, and is gone
  from ``sys.modules`` afterwards: ``import torchvision`` elsewhere still fails as it should, and a ``torchvision://``
  checkpoint is refused with a message that says what to install.
* NumPy. Three modules of mmdet write ``np.int``, which NumPy dropped in 1.24. They see a NumPy that still has it.
* ``torch.nn.parallel.DistributedDataParallel``. mmcv's subclass reads ``_use_replicated_tensor_module``, which torch
  dropped in 2.1. It gets it back with the value that it had for everyone: False.

mmdet's own ``tools/train.py`` imports ``mmcv.runner`` before it reads a config, and with it torchvision. A config's
``custom_imports`` is too late for that one line, so where torchvision is not installed such a script is run as
``python -m detectors tools/train.py CONFIG ...``, which makes the mends first. ``cse-search train`` needs none of this.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy

_USERS_OF_NP_INT = (
    "mmdet.datasets.custom",
    "mmdet.datasets.openimages",
    "mmdet.core.bbox.samplers.iou_balanced_neg_sampler",
)


def apply() -> None:
    """Make the mends. Doing it again changes nothing."""
    _import_mmcv_runner()
    from mmcv.parallel import MMDistributedDataParallel

    if not hasattr(MMDistributedDataParallel, "_use_replicated_tensor_module"):
        MMDistributedDataParallel._use_replicated_tensor_module = False
    if not hasattr(numpy, "int"):
        old_numpy = _NumpyWithInt("numpy")
        for name in _USERS_OF_NP_INT:
            importlib.import_module(name).np = old_numpy


class _NumpyWithInt(types.ModuleType):
    """NumPy, and ``int`` under the name that NumPy gave up."""

    int = int

    def __getattr__(self, name: str) -> object:
        return getattr(numpy, name)


class _NoTorchvision(types.ModuleType):
    """What ``mmcv.runner.checkpoint`` holds in torchvision's place."""

    def __getattr__(self, name: str) -> object:
        if name not in ("__version__", "models"):  # what the loader of such checkpoints asks for first
            raise AttributeError(name)
        raise ImportError("checkpoints named torchvision://... need torchvision: pip install torchvision")


def _import_mmcv_runner() -> None:
    if "mmcv.runner" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    sys.modules["torchvision"] = _NoTorchvision("torchvision")
    try:
        importlib.import_module("mmcv.runner")
    finally:
        del sys.modules["torchvision"]
