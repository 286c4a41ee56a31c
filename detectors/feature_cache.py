"""Arrays that are computed once a node and read by all of its workers: memory-mapped files in the
user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from cse_autoloss.cache import cache_dir

LIMIT_ALL = 8 << 30  # bytes on disk; beyond, what was not used for longest goes
_INDEX = "index.json"


class Writer:
    """Arrays that grow along their first dimension, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._arrays: dict[str, dict[str, Any]] = {}

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Append rows to the array of that name; all of its rows are of one shape and type."""
        values = rows.cpu().numpy()
        if name not in self._files:
            self._files[name] = open(self._folder / name, "wb")
            self._arrays[name] = {"dtype": values.dtype.str, "shape": [0, *values.shape[1:]]}
        self._files[name].write(values.tobytes())
        self._arrays[name]["shape"][0] += len(values)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return sum(file.tell() for file in self._files.values())

    def close(self, info: Any) -> None:
        """Write down what the arrays are, and what else should be known of them, as JSON."""
        for file in self._files.values():
            file.close()
        (self._folder / _INDEX).write_text(json.dumps({"arrays": self._arrays, "info": info}))


class Arrays:
    """What a :class:`Writer` wrote.

    Attributes:
        info: what was given to ``Writer.close``.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        index = json.loads((folder / _INDEX).read_text())
        self.info = index["info"]
        self._arrays = {
            name: _mapped(folder / name, **array).to(device)
            for name, array in index["arrays"].items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._arrays[name]


def shared(name: str, make: Callable[[Writer], Any], device: torch.device) -> Arrays:
    """The arrays of that name, made by the first of a node's processes that asks; others wait.

    On a CPU they are memory-mapped, so that all processes share one copy; a GPU holds its own.

    Args:
        name: a digest of everything that the arrays come from.
        make: fills the writer and returns the arrays' info.
    """
    folder = cache_dir() / "features" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        arrays = _kept(folder, device)
        if arrays is None:
            scratch = folder.with_suffix(".part")  # of a process that died here, if it is there
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                scratch.mkdir()
                writer = Writer(scratch)
                writer.close(make(writer))
                shutil.rmtree(folder, ignore_errors=True)  # what could not be read
                os.rename(scratch, folder)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)  # a full disk has its room back
                raise
            arrays = Arrays(folder, device)
        os.utime(folder)
    _tidy(folder.parent)
    return arrays


def _kept(folder: Path, device: torch.device) -> Arrays | None:
    """The arrays in a folder; None if there are none, or, after a crash of the machine, parts of
    them alone."""
    try:
        return Arrays(folder, device)
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _mapped(path: Path, dtype: str, shape: list[int]) -> torch.Tensor:
    if 0 in shape:  # nothing to map
        return torch.from_numpy(np.empty(shape, dtype))
    return torch.from_numpy(np.memmap(path, dtype, mode="c", shape=tuple(shape)))


@contextlib.contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield


def _tidy(parent: Path) -> None:
    """Delete whole folders until the others are within the limit, and what processes that died have
    left; who has one mapped keeps it. Several processes may do so at once."""
    for part in parent.glob("*.part"):
        with contextlib.suppress(OSError), _locked(part.with_suffix(".lock"), fcntl.LOCK_NB):
            shutil.rmtree(part)
    for gone in parent.glob("*.gone"):
        shutil.rmtree(gone, ignore_errors=True)
    folders = []
    for folder in parent.iterdir():
        if folder.is_dir() and not folder.suffix:
            with contextlib.suppress(FileNotFoundError):  # another process deletes it
                size = sum(file.stat().st_size for file in folder.iterdir())
                folders.append((folder.stat().st_mtime, size, folder))
    held = 0
    for number, (_, size, folder) in enumerate(sorted(folders, reverse=True)):
        held += size
        if number and held > LIMIT_ALL:
            gone = folder.with_suffix(".gone")
            with contextlib.suppress(OSError):
                os.rename(folder, gone)  # at once: nobody finds a part of it
            shutil.rmtree(gone, ignore_errors=True)
