"""A run's folder: made whole or not at all, one driver at a time, readable where it cannot be
written."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import IO

from cse_autoloss.trial import ConfigError

FILE, LOCK, OWNER, PREPARED = "journal.sqlite", "driver.lock", "driver.owner", "prepared"
FORMAT = 2  # of the journal's tables; PRAGMA user_version
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gpfs"} | {
    "beegfs",
    "glusterfs",
    "9p",
    "pvfs2",
    "orangefs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.s3fs",
}


def network_file_system(folder: Path) -> str | None:
    """The kind of network file system that a folder is on, or None."""
    folder = folder.resolve()
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    above = [(len(m[1]), m[2]) for m in mounts if folder.is_relative_to(m[1].replace("\\040", " "))]
    kind = max(above, default=(0, ""))[1]
    return kind if kind in _NETWORK else None


def create_folder(folder: Path, fill: Callable[[sqlite3.Connection], None]) -> IO[str]:
    """Make a run's folder with a journal that ``fill`` writes; returns the lock on it.

    The folder appears with the whole journal in it, or not at all: it is made beside its place and
    renamed.

    Raises:
        ConfigError: if the folder holds a run, or anything else, or cannot be made.
    """
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder}: holds a run already; continue it with cse-search resume "
            f"{quote(str(folder))}, or name another folder with --out"
        )
    draft = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is not empty; name a new folder with --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", dir=folder.parent))
        draft.chmod(0o777 & ~_umask())
        lock = lock_folder(draft)
        database = connect(draft / FILE)
        database.execute(f"PRAGMA user_version = {FORMAT}")
        with database:
            fill(database)
        database.close()
        draft.rename(folder)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{folder}: cannot be made: {error}") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return lock


def connect(path: Path) -> sqlite3.Connection:
    """Open a journal to write to it. SQLite's write-ahead log needs memory that processes share,
    which a network file system has not: there the journal has a rollback log."""
    if path.is_symlink():
        raise ConfigError(f"{path}: is a link; nothing is written through it")
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    network = network_file_system(path.parent)
    database.execute(f"PRAGMA journal_mode = {'TRUNCATE' if network else 'WAL'}")
    # Whole transactions survive the end of the process in both modes; with a write-ahead log this
    # mode spares a wait for the disk at each of them. A crash of the machine may lose the last
    # ones.
    database.execute(f"PRAGMA synchronous = {'FULL' if network else 'NORMAL'}")
    return database


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a journal to look at it, also while a driver writes to it, on a medium that cannot be
    written, and where it is another user's.

    Raises:
        ConfigError: if it cannot be read.
    """
    uri = f"file:{_quoted(path)}"
    log = path.with_name(f"{FILE}-wal")
    try:
        try:
            return _checked(sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=30), path)
        except sqlite3.OperationalError:
            if not log.exists() or log.stat().st_size == 0:
                return _checked(sqlite3.connect(f"{uri}?immutable=1", uri=True), path)
        # What a driver wrote last stands in the log, which SQLite reads only where it may write.
        with tempfile.TemporaryDirectory() as copies:
            for source in (path, log):
                shutil.copy(source, copies)
            copy = sqlite3.connect(Path(copies) / FILE)
            memory = sqlite3.connect(":memory:", isolation_level=None)
            copy.backup(memory)
            copy.close()
        return _checked(memory, path)
    except (sqlite3.Error, OSError) as error:
        raise unreadable(path.parent, error) from error


def unreadable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{folder}: its journal cannot be read: {error}")


def check_format(database: sqlite3.Connection, path: Path) -> None:
    """Refuse a journal of another format, and a database that is none.

    Raises:
        ConfigError: naming both formats.
    """
    rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    if not {"meta", "trials"} <= {name for (name,) in rows}:
        raise ConfigError(
            f"{path.parent}: its {path.name} is no journal of a run: it is empty, was cut off or "
            "is another program's"
        )
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found != FORMAT:
        age = "a newer" if found > FORMAT else "an older"
        raise ConfigError(
            f"{path.parent}: its journal was written by {age} version of cse-autoloss (format "
            f"{found}; this version reads {FORMAT}); use that version for it, or start a new run"
        )


def check_whole(database: sqlite3.Connection, folder: Path) -> None:
    """Refuse a journal that is damaged: it may be read all the same, and wrongly. Reads all of it,
    200 MB in a second or so.

    Raises:
        ConfigError: naming what is wrong first.
    """
    try:
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        raise unreadable(folder, error) from error
    if found != "ok":
        raise ConfigError(
            f"{folder}: its journal cannot be read: it is damaged ({found.splitlines()[-1]}), as "
            "that of a folder may be that was copied while the run went on: copy it when the run "
            "has stopped"
        )


def lock_folder(folder: Path) -> IO[str]:
    """Hold a run for this process; the lock goes with the process, however it ends.

    Raises:
        ConfigError: if another driver holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # nothing through a link
    handle = os.fdopen(os.open(folder / LOCK, flags, 0o666), "a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            _own(folder)  # a file system without locks
        else:
            handle.close()
            raise ConfigError(
                f"{folder}: {owner} is working on this run; watch it with "
                f"cse-search status {quote(str(folder))}, or stop it before you resume"
            ) from None
    handle.truncate(0)
    handle.write(_this_process())
    handle.flush()
    return handle


def is_driven(folder: Path) -> bool:
    """Whether a process works on a run; where that cannot be told, one does."""
    try:
        with open(folder / LOCK) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return (folder / OWNER).exists()


def unlock_folder(folder: Path, lock: IO[str]) -> None:
    (folder / OWNER).unlink(missing_ok=True)
    lock.close()


def _own(folder: Path) -> None:
    """Where files cannot be locked: one that only one process can make."""
    path = folder / OWNER
    try:
        with open(path, "x") as file:
            file.write(_this_process())
    except FileExistsError:
        owner = path.read_text().strip()
        raise ConfigError(
            f"{folder}: {owner} is working on this run, or was killed: this file system has no "
            f"locks. If it is no longer there, delete {path} and try again"
        ) from None


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _checked(database: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    database.isolation_level = None
    check_format(database, path)
    return database


def _quoted(path: Path) -> str:
    return str(path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
