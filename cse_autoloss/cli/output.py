"""Where a command writes to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class Output(click.Path):
    """A path that a command will write, refused before any work where it is empty or nobody can
    write there. Folders that are missing are made later."""

    def __init__(self, dir_okay: bool = False) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path == Path():
            self.fail("an empty path", param, ctx)
        folder = path.absolute() if path.is_dir() else path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            self.fail(f"{path}: {folder} is no folder", param, ctx)
        if not (os.access(folder, os.W_OK | os.X_OK) or os.access(path, os.W_OK)):
            self.fail(f"{path}: {folder} cannot be written to", param, ctx)
        return path
