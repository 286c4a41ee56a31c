"""Where what was made once is kept: the user's cache folder."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/cse_autoloss``, ``~/.cache/cse_autoloss`` unless that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cse_autoloss"
