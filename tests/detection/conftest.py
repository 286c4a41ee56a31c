"""Tests of the detectors' side: they need mmdet, and mmdet needs the patches of ``detectors``
first."""

import detectors  # noqa: F401
