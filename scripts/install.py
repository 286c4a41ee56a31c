"""Set the project up in a virtual environment: torch, mmcv-full with its compiled ops, everything
else, the project.

mmcv-full has no wheels for current torch (mmcv's own end at torch 2.1), so it is compiled against
the torch that is installed, with the CUDA ops where torch has CUDA, nvcc is found, and there is a
GPU or TORCH_CUDA_ARCH_LIST says for which. The wheel is kept in the user's cache, keyed by all that
it depends on, so that a second checkout installs it in seconds. Needs nothing but Python's standard
library and a C++ compiler; installs with uv where there is one, else with pip.

Environment: TORCH (a requirement, default from constraints.txt), MAX_JOBS (compile jobs, default
all cores), XDG_CACHE_HOME (default ~/.cache).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# mmcv's setup.py imports pkg_resources, which setuptools 81 drops.
BUILD_TOOLS = ["setuptools<81", "wheel", "ninja", "psutil"]
DESCRIBE = """
import os, platform, sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
known = torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")
cuda = torch.version.cuda if torch.version.cuda and CUDA_HOME and known else "cpu"
python = "cp%d%d" % sys.version_info[:2]
print(f"torch{torch.__version__}-cuda{cuda}-{python}-{sysconfig.get_platform()}")
"""
HAS_OPS = (
    "import importlib.util, torch, mmcv; assert importlib.util.find_spec('mmcv._ext'); "
    "import mmcv._ext"
)


def cache_folder() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cse_autoloss" / "wheels"
    )


def run(*command: str, **environment: str) -> None:
    """Run a command, or stop."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"setup: failed ({done.returncode}): {' '.join(command)}")


def say(started: float, message: str) -> None:
    print(f"setup: [{time.monotonic() - started:4.0f} s] {message}", flush=True)


def mmcv_wheel(python: str, started: float) -> Path:
    """The cached wheel for the torch in this environment, built first if there is none."""
    key = subprocess.run(
        [python, "-W", "ignore", "-c", DESCRIBE], check=True, capture_output=True, text=True
    ).stdout.strip()
    folder = cache_folder() / key
    if not any(folder.glob("mmcv_full-*.whl")):
        say(started, f"mmcv-full: compiling its ops for {key}; about 5 core-minutes, once")
        environment = {} if "-cudacpu-" in key else {"FORCE_CUDA": "1"}
        run(python, str(Path(__file__).with_name("build_mmcv.py")), str(folder), **environment)
    (wheel,) = folder.glob("mmcv_full-*.whl")
    say(started, f"mmcv-full: {wheel}")
    return wheel


def installer(python: str, constraints: Path) -> tuple[str, ...]:
    """The command that installs packages into the environment, up to their names."""
    if uv := shutil.which("uv"):
        return (uv, "pip", "install", "--quiet", "--python", python, "-c", str(constraints))
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    return (*pip, "-c", str(constraints))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the virtual environment (default: .venv)"
    )
    folder = parser.parse_args().venv.resolve()
    started = time.monotonic()
    torch = os.environ.get("TORCH", "")
    inputs = [
        torch,
        *(path.read_text() for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))),
    ]
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    stamp = folder / "cse_autoloss.stamp"
    if stamp.is_file() and stamp.read_text() == f"{digest} {ROOT}":
        return
    if sys.version_info < (3, 11):
        sys.exit(
            f"setup: Python 3.11 or newer is needed, this is {sys.version.split()[0]} (make "
            "PYTHON=python3.11 ...)"
        )

    python = str(folder / "bin" / "python")
    if not Path(folder, "bin", "pip").exists():  # what Debian leaves without python3-venv has none
        say(started, f"virtual environment in {folder}")
        venv.create(folder, with_pip=True)
    with tempfile.TemporaryDirectory() as scratch:
        lines = CONSTRAINTS.read_text().splitlines()
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text(
            "\n".join(line for line in lines if not (torch and line.startswith("torch==")))
            + f"\n{torch}\n"
        )
        install = installer(python, constraints)
        say(started, "torch and the build tools")
        # OpenCV comes first: mmcv's setup.py writes the flavour that it finds into the wheel's
        # requirements.
        run(*install, torch or "torch", "numpy", "opencv-python-headless", *BUILD_TOOLS)
        wheel = mmcv_wheel(python, started)
        say(started, "the other packages")
        run(*install, str(wheel))
        run(python, "-W", "ignore", "-c", HAS_OPS)
        run(*install, "--no-build-isolation", "-e", f"{ROOT}[detectors,test,bench]")
    stamp.write_text(f"{digest} {ROOT}")
    say(started, "done")


if __name__ == "__main__":
    main()
