"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: str | bytes, private: bool = False) -> None:
    """Write a file, in its folder if need be, so that no reader ever sees a part of it.

    Where a link of that name stands, the file takes the link's place: nothing is written through
    it. Two processes may write at once; one of them is the last.

    Args:
        private: for this user's eyes alone; otherwise as the umask says.

    Raises:
        OSError: the folder cannot be written to, or is full; it names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, flags, 0o600 if private else 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)  # else a crash of the machine may leave an empty one
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:  # which knows the draft's name, or, on a full disk, none
        raise OSError(error.errno, error.strerror, str(path)) from error
