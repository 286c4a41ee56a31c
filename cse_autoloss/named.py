"""Code that a configuration names: trainers, strategies, rankers, plug-ins of search spaces.

This is the only place where a name from a file or a command line becomes an import. It can be shut
while something is read that came from somewhere else.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from cse_autoloss.errors import UserError
from cse_autoloss.text import printable

_shut: list[str] = []  # why, while nothing may be imported


class NamedError(UserError):
    """A name that leads to no module or class."""


class ForeignCode(UserError):
    """Something that was made elsewhere would have code imported."""


@contextmanager
def nothing_imported(reason: str) -> Iterator[None]:
    """While this lasts, every name is refused, with ``reason``."""
    _shut.append(reason)
    try:
        yield
    finally:
        _shut.pop()


def import_named(name: str, key: str) -> ModuleType:
    """The module of that name, looked for in the current folder, too.

    Args:
        key: what gave the name, for messages.

    Raises:
        UserError: there is none, or it raises something, or ends the program.
    """
    shown = printable(name, 80)
    if _shut:
        raise ForeignCode(f"{key}: {shown} would be imported; {_shut[-1]}")
    add_search_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NamedError(f"{key}: cannot import {shown!r}: {printable(reason, 200)}") from error


def load_class(name: str, key: str) -> type[Any]:
    """The class named ``"package.module:Class"``.

    Raises:
        UserError: the name has another form, or leads to no class.
    """
    module, colon, attribute = name.partition(":")
    shown = printable(name, 80)
    if not (
        colon and attribute.isidentifier() and all(p.isidentifier() for p in module.split("."))
    ):
        raise NamedError(f"{key}: {shown!r} is not of the form 'package.module:Class'")
    found = getattr(import_named(module, key), attribute, None)
    if not isinstance(found, type):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise NamedError(f"{key}: {shown!r} should lead to a class; {attribute} there is {kind}")
    return found


def add_search_path(folder: str) -> None:
    """Have modules looked for in a folder, too: after all others, so that none is hidden."""
    if folder not in sys.path:
        sys.path.append(folder)
