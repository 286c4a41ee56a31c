"""The MMDetection side: searched losses and IoU-aware heads as registered modules, data sets,
configs and training.

A config needs one line to use it: ``custom_imports = dict(imports=["detectors"])``.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "On January 1, 2023, MMCV will release", UserWarning)
    from detectors import compat

    compat.apply()

from detectors import heads, losses  # noqa: E402,F401 - imported for what they register
from detectors.datasets import memory  # noqa: E402,F401
