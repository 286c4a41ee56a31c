"""Compile mmcv-full's ops into a wheel, five times as fast as pip does.

All of mmcv's C++ files include one header, and with it torch's, which costs a compiler more than
the file itself. So that header is compiled first, with the very flags that the build then uses,
and GCC takes it from there (``-O2 -g0`` besides: debug information is half a gigabyte). Other
compilers take the plain way. CUDA's ``.cu`` files do not read the header, the ``.cpp`` files do.

    python scripts/build_mmcv.py FOLDER      # needs torch, setuptools < 81, wheel, ninja, psutil

Environment: MAX_JOBS (compile jobs, default all cores), CXX (the compiler, default g++),
FORCE_CUDA=1 (build the CUDA ops).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

MMCV = "mmcv-full==1.7.2"
HEADER = Path("mmcv/ops/csrc/common/pytorch_cpp_helper.hpp")
FASTER = ("-O2", "-g0", "-w")
# mmcv's setup.py reads its version from the locals that exec leaves behind; from Python 3.13 on it
# leaves none there (PEP 667). pip and setuptools read any setup.py by tokenize.open.
OLD, NEW = (
    "version_file, 'exec'))\n    return locals()[",
    "version_file, 'exec'), globals())\n    return globals()[",
)
MENDED = f"""
import io, tokenize
plain = tokenize.open
tokenize.open = lambda name: io.StringIO(plain(name).read().replace({OLD!r}, {NEW!r}))
"""
_COMPILER, _SOURCES = "BUILD_MMCV_CXX", "BUILD_MMCV_SOURCES"  # what compile_one is told by main
_DONE = re.compile(r"^\[(\d+)/(\d+)\]")  # ninja's count


def main(folder: Path) -> None:
    """Build the wheel into ``folder``, telling how far it is; the log is ``folder/build.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        sys.exit(
            "mmcv-full has to be compiled, and no C++ compiler was found: install g++ "
            "(Debian: apt install g++)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(
            "mmcv-full has to be compiled, and Python's headers are missing: install python3-dev "
            f"(of Python {sys.version_info.major}.{sys.version_info.minor})"
        )
    with tempfile.TemporaryDirectory(dir=folder) as scratch, open(folder / "build.log", "w") as log:
        source = _unpack(Path(scratch), log)
        environment = {
            **os.environ,
            "MMCV_WITH_OPS": "1",
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count()),
        }
        if _is_gcc(compiler):
            wrapper = Path(scratch, "cxx")
            wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ES "{__file__}" --one "$@"\n')
            wrapper.chmod(0o755)
            environment |= {"CXX": str(wrapper), _COMPILER: compiler, _SOURCES: str(source)}
        command = [sys.executable, "setup.py", "bdist_wheel", "-d", scratch]
        build = subprocess.Popen(
            command,
            cwd=source,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        _follow(build, log)
        if build.wait():
            log.flush()
            tail = (folder / "build.log").read_text(errors="replace").splitlines()[-25:]
            sys.exit("\n".join([*tail, f"mmcv-full did not compile; full log: {log.name}"]))
        (wheel,) = Path(scratch).glob("mmcv_full-*.whl")
        wheel.rename(folder / wheel.name)


def _unpack(folder: Path, log: TextIO) -> Path:
    command = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-d", str(folder), MMCV]
    mended = folder / "mended" / "sitecustomize.py"
    mended.parent.mkdir()
    mended.write_text(MENDED)
    environment = {**os.environ, "PYTHONPATH": str(mended.parent)}
    if subprocess.run(
        [sys.executable, *command], stdout=log, stderr=log, env=environment
    ).returncode:
        sys.exit(f"{MMCV}: its source does not download; full log: {log.name}")
    (archive,) = folder.glob("mmcv*.tar.gz")
    shutil.unpack_archive(archive, folder)  # tarfile's filters are newer than Debian 12's Python
    source = folder / archive.name.removesuffix(".tar.gz")
    setup = source / "setup.py"
    setup.write_text(setup.read_text(encoding="utf-8").replace(OLD, NEW), encoding="utf-8")
    return source


def _is_gcc(compiler: str) -> bool:
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in shown


def _follow(build: subprocess.Popen[str], log: TextIO) -> None:
    """Copy what the build prints to the log; every ten seconds say how many files are done."""
    started = told = time.monotonic()
    for line in build.stdout:
        log.write(line)
        count = _DONE.match(line)
        if count and time.monotonic() - told > 10 and int(count[1]) > 5:
            told = time.monotonic()
            done, total = map(int, count.groups())
            left = (told - started) / done * (total - done)
            print(f"mmcv-full: {done} of {total} files, {left / 60:.1f} min left", flush=True)


def compile_one(arguments: Sequence[str]) -> None:
    """What the build runs as its compiler: GCC, with the precompiled header made by the first."""
    command = [os.environ[_COMPILER], *arguments]
    if "-c" in arguments and any(argument.endswith(".cpp") for argument in arguments):
        command += FASTER
        _precompile(command, Path(os.environ[_SOURCES]) / HEADER)
    os.execvp(command[0], command)


def _precompile(command: list[str], header: Path) -> None:
    """Compile the header with a source file's flags, unless another file's compiler has done it."""
    made = header.with_name(header.name + ".gch")
    with open(header.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return
        flags, kept = iter(command), []
        for flag in flags:
            if flag in ("-c", "-o", "-MF"):
                next(flags)
            elif flag != "-MMD":
                kept.append(flag)
        part = made.with_name(made.name + ".part")
        done = subprocess.run([*kept, "-x", "c++-header", "-c", str(header), "-o", str(part)])
        if done.returncode == 0:
            part.rename(made)
        else:
            made.mkdir()  # an empty folder of that name: GCC goes on without


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        compile_one(sys.argv[2:])
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]).resolve())
    else:
        sys.exit(__doc__)
