"""Where what was made once is kept: the user's cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cse_autoloss.cache import cache_dir

__all__ = ["cache_dir", "digest", "write_atomically"]

from cse_autoloss.files import write_whole


def digest(*parts: bytes | str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the parts."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]


def write_atomically(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, also when two processes write it at once."""
    write_whole(path, data)
