"""Configs of detectors: what each changes; the rest is inherited from mmdet's own, which its package carries."""
from __future__ import annotations

import importlib.util
from pathlib import Path


def mmdet_config(name: str) -> str:
    """Path of one of mmdet's own configs, for a config's ``_base_``.

    Args:
        name: path below mmdet's ``configs`` folder, e.g. ``"fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_...py"``.

    Raises:
        FileNotFoundError: this mmdet has no such config, or was installed without its configs.
    """
    spec = importlib.util.find_spec("mmdet")
    path = Path(spec.submodule_search_locations[0], ".mim", "configs", name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not in the installed mmdet; the package on PyPI carries its configs")
    return str(path)
