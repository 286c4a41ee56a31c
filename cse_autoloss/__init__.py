"""Search loss functions for object detectors (CSE-Autoloss, ICLR 2021, as an open engine)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cse_autoloss.version import __version__

if TYPE_CHECKING:
    from cse_autoloss.expression import Expression, ExpressionError
    from cse_autoloss.screening import Verdict, screen, verify
    from cse_autoloss.space import SearchSpace, SpaceError, load_space

_HOMES = {
    "Expression": "expression",
    "ExpressionError": "expression",
    "SearchSpace": "space",
    "SpaceError": "space",
    "load_space": "space",
    "Verdict": "screening",
    "screen": "screening",
    "verify": "screening",
}
__all__ = [
    "Expression",
    "ExpressionError",
    "SearchSpace",
    "SpaceError",
    "Verdict",
    "__version__",
    "load_space",
    "screen",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import at first use: `cse-search --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
