"""Where what was made once is kept: the user's cache folder, by digests of what it comes from."""

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/cse_autoloss``, ``~/.cache/cse_autoloss`` unless that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cse_autoloss"


def digest(*parts: bytes | str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the parts."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]
