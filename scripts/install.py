"""Set the project up in a virtual environment: torch, mmcv-full with its compiled ops, everything
else, the project.

mmcv-full has no wheels for current torch, so it is compiled against the torch that is installed
(with the CUDA ops where torch has CUDA and nvcc is found). The wheel is kept in the user's cache,
keyed by everything that it depends on, so that a second checkout installs it in seconds. Needs
nothing but Python's standard library and a C++ compiler.

Environment: TORCH (a requirement, default from constraints.txt), MAX_JOBS (compile jobs, default
    all cores),
XDG_CACHE_HOME (default ~/.cache).
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
MMCV = "mmcv-full==1.7.2"
BUILD_TOOLS = [
    "setuptools<81",
    "wheel",
    "ninja",
    "psutil",
]  # setuptools 81 drops pkg_resources, which mmcv's setup.py imports
DESCRIBE = """
import platform, sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
cuda = torch.version.cuda if torch.version.cuda and CUDA_HOME else "cpu"
print(f"torch{torch.__version__}-cuda{cuda}-cp{sys.version_info[0]}{sys.version_info[1]}-{sysconfig.get_platform()}")
"""
HAS_OPS = "import importlib.util, torch, mmcv; assert importlib.util.find_spec('mmcv._ext'); import mmcv._ext"


def cache_folder() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cse_autoloss" / "wheels"
    )


def run(*command: str, log: Path | None = None, **environment: str) -> None:
    """Run a command; on failure show the end of what it printed and stop."""
    output = open(log, "w") if log else None
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT if log else None,
    )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:]) if log else ""
        sys.exit(
            f"{tail}\nsetup: failed ({done.returncode}): {' '.join(command)}"
            + (f"\nfull log: {log}" if log else "")
        )


def say(started: float, message: str) -> None:
    print(f"setup: [{time.monotonic() - started:4.0f} s] {message}", flush=True)


def mmcv_wheel(python: str, started: float) -> Path:
    """The cached wheel for the torch in this environment, built first if there is none."""
    key = subprocess.run(
        [python, "-c", DESCRIBE], check=True, capture_output=True, text=True
    ).stdout.strip()
    folder = cache_folder() / key
    for wheel in folder.glob("mmcv_full-*.whl"):
        say(started, f"mmcv-full: {wheel} (cached)")
        return wheel
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        sys.exit(
            "setup: mmcv-full has to be compiled, and no C++ compiler was found: install g++ (Debian: apt install g++)"
        )
    say(started, f"mmcv-full: compiling its ops for {key}; about 20 core-minutes, once")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        environment = {
            "MMCV_WITH_OPS": "1",
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count()),
        }
        if "-cudacpu-" not in key:
            environment["FORCE_CUDA"] = "1"
        run(
            python,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-cache-dir",
            "-w",
            scratch,
            MMCV,
            log=folder / "build.log",
            **environment,
        )
        (built,) = Path(scratch).glob("mmcv_full-*.whl")
        return built.rename(folder / built.name)


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
            f"setup: Python 3.11 or newer is needed, this is {sys.version.split()[0]} (make PYTHON=python3.11 ...)"
        )

    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        say(started, f"virtual environment in {folder}")
        venv.create(folder, with_pip=True)
    with tempfile.TemporaryDirectory() as scratch:
        lines = CONSTRAINTS.read_text().splitlines()
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text(
            "\n".join(line for line in lines if not (torch and line.startswith("torch==")))
            + f"\n{torch}\n"
        )
        pip = (
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(constraints),
        )
        say(started, "torch and the build tools")
        # OpenCV comes first: mmcv's setup.py writes the flavour that it finds into the wheel's
        # requirements.
        run(*pip, torch or "torch", "numpy", "opencv-python-headless", *BUILD_TOOLS)
        wheel = mmcv_wheel(python, started)
        say(started, "the other packages")
        run(*pip, str(wheel))
        run(python, "-W", "ignore", "-c", HAS_OPS)
        run(*pip, "--no-build-isolation", "-e", f"{ROOT}[detectors,test,bench]")
    stamp.write_text(f"{digest} {ROOT}")
    say(started, "done")


if __name__ == "__main__":
    main()
