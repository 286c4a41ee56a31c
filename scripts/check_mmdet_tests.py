"""MMDetection's own tests of heads and losses, run against ours.

    python scripts/check_mmdet_tests.py CHECKOUT   # a clone of open-mmlab/mmdetection, tag v2.28.2

Each test file runs three times: as it is; with the IoU-aware heads in the place of mmdet's; and
with searched losses in these: for classification CSE-Autoloss-A in R-CNN heads and CSE-Autoloss-B
in one-stage ones, for regression CSE-Autoloss-A's, which is never negative, as such tests expect of
a loss. What passes as it is and not with ours is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODES = ("mmdet's heads", "ours, default losses", "ours, searched losses")
FOLDERS = ("test_dense_heads", "test_roi_heads", "test_loss_compatibility.py", "test_loss.py")
_MODE, _OUT = "CSE_MMDET_TESTS_MODE", "CSE_MMDET_TESTS_OUT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-k", help="as pytest's: which tests")
    given = parser.parse_args()
    tests = given.checkout / "tests" / "test_models"
    paths = [str(tests / name) for name in FOLDERS if (tests / name).exists()]
    if not paths:
        sys.exit(f"{tests}: no such tests; give a clone of open-mmlab/mmdetection at v2.28.2")
    outcomes = [_run(mode, given.checkout, paths, given.k) for mode in range(len(MODES))]
    for mode, outcome in zip(MODES, outcomes, strict=True):
        passed = sum(result == "passed" for result in outcome.values())
        print(f"{mode}: {passed} of {len(outcome)} pass")
    for mode, outcome in zip(MODES[1:], outcomes[1:], strict=True):
        for test, result in outcomes[0].items():
            if result == "passed" != outcome.get(test):
                print(f"{mode}: {test}: {outcome.get(test, 'not run')}")


def _run(mode: int, checkout: Path, paths: list[str], chosen: str | None) -> dict[str, str]:
    """Test to outcome."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outcomes.json")
        environment = {
            **os.environ,
            _MODE: str(mode),
            _OUT: str(out),
            "PYTHONPATH": os.pathsep.join(
                [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            here.stem,
            "--rootdir",
            str(checkout),
        ]
        command += [
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            *paths,
            *(["-k", chosen] if chosen else []),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.is_file():
            sys.exit(f"pytest: {(done.stdout + done.stderr)[-1000:]}")
        return json.loads(out.read_text())


# --- as pytest's plug-in, in the processes that run the tests ---

_outcomes: dict[str, str] = {}


def pytest_configure(config: Any) -> None:
    import detectors  # noqa: F401 - its patches let mmdet run
    from detectors import configure

    if mode := int(os.environ[_MODE]):
        for name, kind in configure.HEADS.items():
            _replace(name, kind, searched=mode == 2)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome == "failed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ[_OUT]).write_text(json.dumps(_outcomes))


def _replace(name: str, kind: Any, searched: bool) -> None:
    """Our head by mmdet's name, in the registry and in the modules that tests import it from."""
    from mmdet.models import HEADS

    from cse_autoloss.losses import build_loss

    theirs, ours = HEADS.get(name), HEADS.get(kind.aware)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        ours.__init__(self, *args, **kwargs)
        two_stage = "BBoxHead" in name or name == "SABLHead"
        loss, space = ("A", "two_stage_cls") if two_stage else ("B", "one_stage_cls")
        self.loss_cls = build_loss(f"CSE-Autoloss-{loss}", space, **kind.loss_options)
        if "reg" not in kind.refused and (kind.boxes_are_decoded or self.reg_decoded_bbox):
            self.loss_bbox = build_loss("CSE-Autoloss-A", "reg", **kind.loss_options)

    head = type(name, (ours,), {"__init__": __init__}) if searched else ours
    HEADS.module_dict[name] = head
    for module in _modules():
        if getattr(module, name, None) is theirs:
            setattr(module, name, head)


def _modules() -> Iterator[Any]:
    """mmdet's packages that export heads; not the modules that define them, whose classes
    inherit."""
    for name in ("models", "models.dense_heads", "models.roi_heads", "models.roi_heads.bbox_heads"):
        yield sys.modules[f"mmdet.{name}"]


if __name__ == "__main__":
    main()
