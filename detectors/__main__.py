"""``python -m detectors SCRIPT ARGS...``: run a script of mmdet's with the patches of
:mod:`detectors.compat` made first."""

import runpy
import sys

import detectors  # noqa: F401 - for its patches

if len(sys.argv) < 2:
    sys.exit(
        "usage: python -m detectors SCRIPT [ARGS...], for instance mmdet's tools/train.py and a "
        "config"
    )
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
