"""The journal: a run on disk, in one SQLite file, safe to kill at any moment.

Whatever the search knows stands here, and every step of it is one transaction: the configuration,
the population, every expression that was screened and why it fell, every candidate's fate, every
trial with its result and provenance. A run is resumed by reading it back; ``status`` and ``report``
read it while it is being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cse_autoloss.trial import ConfigError, Trial, TrialResult

FILE, LOCK, PREPARED = "journal.sqlite", "driver.lock", "prepared"
DEFAULT = "default"  # label of the trials of the detector's own losses
FOUND = "found"  # how the label begins of a candidate that the search did find
KNOWN = "known: "  # how the origin of a candidate begins that the search did not find itself

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE expressions (
    branch TEXT, text TEXT, round INTEGER,
    fate TEXT,              -- 'passed', or the property or simulation that it fell to
    PRIMARY KEY (branch, text)) WITHOUT ROWID;
CREATE TABLE candidates (
    id INTEGER PRIMARY KEY,
    losses TEXT,            -- JSON: branch to expression
    fingerprint TEXT,       -- JSON: branch to gradient fingerprint
    origin TEXT,            -- 'known: NAME', 'mutation', ...
    round INTEGER,
    fate TEXT,              -- see Fate
    reason TEXT,            -- why it went no further
    simulated REAL,         -- mAP on the tiny set
    fitness REAL);          -- mAP on val after the proxy training
CREATE INDEX candidates_by_fate ON candidates (fate);
CREATE INDEX candidates_by_fingerprint ON candidates (fingerprint);
CREATE TABLE trials (
    key TEXT PRIMARY KEY,
    kind TEXT,              -- 'tune', 'tiny', 'full', 'confirm', 'final'
    candidate INTEGER REFERENCES candidates,
    label TEXT,             -- whom a tune or final trial belongs to
    trial TEXT,             -- JSON: Trial
    result TEXT,            -- JSON: TrialResult, or null while it runs
    mAP REAL, failure TEXT,
    started REAL, finished REAL);
"""


class Fate:
    """Where a candidate stands. It moves down this list and stops where it falls."""

    SURVIVED = (
        "survived"  # passed verification and the simulation on predictions; waits for the tiny set
    )
    SIMULATING = "simulating"
    SIMULATED = "simulated"  # waits for the round's best to be chosen
    DROPPED = "dropped"
    PROMOTED = "promoted"  # waits for a proxy training
    TRAINING = "training"
    TRAINED = "trained"
    FAILED = "failed"
    EQUIVALENT = "equivalent"


@dataclass(frozen=True)
class Candidate:
    """A choice of losses on its way through the search.

    ``fitness`` is mAP on val after the proxy training, ``confirmed`` its mean over the trainings
    that confirmed it, so far.
    """

    id: int
    losses: Mapping[str, str]
    fingerprint: Mapping[str, str]
    origin: str
    round: int
    fate: str
    reason: str | None
    simulated: float | None
    fitness: float | None
    confirmed: float | None


def found_label(candidate: Candidate) -> str:
    """What a found candidate is called in tables."""
    return f"{FOUND} #{candidate.id}"


@dataclass(frozen=True)
class TrialRow:
    """A trial as it stands in the journal; ``result`` is None while it runs."""

    kind: str
    candidate: int | None
    label: str | None
    trial: Trial
    result: TrialResult | None
    started: float
    finished: float | None


class Journal:
    """A run's journal. Use :meth:`create`, :meth:`resume` (both lock the run for this process) or
    :meth:`read`."""

    def __init__(self, folder: Path, database: sqlite3.Connection, lock: Any = None) -> None:
        self.folder = folder
        self._database = database
        self._lock = lock

    @classmethod
    def create(cls, folder: str | Path, meta: Mapping[str, Any]) -> Journal:
        """Start a run in a new or empty folder.

        Raises:
            ConfigError: if the folder holds a run, or anything else.
        """
        folder = Path(folder)
        if (folder / FILE).exists():
            raise ConfigError(
                f"{folder}: holds a run already; continue it with 'cse-search resume {folder}', "
                "or name another folder with --out"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is not empty; name a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        draft = folder / f"{FILE}.new"
        draft.unlink(missing_ok=True)
        database = _connect(draft)
        database.executescript(_SCHEMA)
        with database:
            database.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [(key, json.dumps(value)) for key, value in meta.items()],
            )
        database.close()  # a file with this name is always a whole journal
        draft.rename(folder / FILE)
        return cls(folder, _connect(folder / FILE), lock)

    @classmethod
    def resume(cls, folder: str | Path) -> Journal:
        """Open a run to go on with it.

        Raises:
            ConfigError: if there is no run, or another driver is at it.
        """
        folder = _existing(folder)
        lock = _lock(folder)
        return cls(folder, _connect(folder / FILE), lock)

    @classmethod
    def read(cls, folder: str | Path) -> Journal:
        """Open a run to look at it, also while a driver writes.

        Raises:
            ConfigError: if there is no run.
        """
        folder = _existing(folder)
        database = _connect(folder / FILE)
        database.execute("PRAGMA query_only = ON")
        return cls(folder, database)

    def close(self) -> None:
        self._database.close()
        if self._lock:
            self._lock.close()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Everything written inside is kept together or not at all."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.rollback()
            raise
        self._database.commit()

    @property
    def prepared(self) -> bytes | None:
        """What the run's trials start from, once it is known: a resumed run's start from it too,
        whatever has changed since."""
        return self.prepared_path.read_bytes() if self.prepared_path.is_file() else None

    @prepared.setter
    def prepared(self, data: bytes) -> None:
        draft = self.folder / f"{PREPARED}.new"
        draft.write_bytes(data)
        draft.replace(self.prepared_path)

    @property
    def prepared_path(self) -> Path:
        """Where :attr:`prepared` is kept."""
        return self.folder / PREPARED

    # --- meta ---

    def __getitem__(self, key: str) -> Any:
        (value,) = self._database.execute(
            "SELECT value FROM meta WHERE key = ?", (key,)
        ).fetchone() or (None,)
        return None if value is None else json.loads(value)

    def __setitem__(self, key: str, value: Any) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value))
        )

    # --- expressions and candidates ---

    def add_expressions(
        self, branch: str, round_number: int, fates: Iterable[tuple[str, str]]
    ) -> None:
        """Write down screened expressions as (text, fate)."""
        self._database.executemany(
            "INSERT OR IGNORE INTO expressions VALUES (?, ?, ?, ?)",
            ((branch, text, round_number, fate) for text, fate in fates),
        )

    def expressions(self, branch: str) -> Iterator[tuple[str, str]]:
        """(text, fate) of every expression that was screened for a branch."""
        rows = self._database.execute(
            "SELECT text, fate FROM expressions WHERE branch = ? ORDER BY round, text", (branch,)
        )
        return iter(rows)

    def add_candidate(
        self,
        losses: Mapping[str, str],
        fingerprint: Mapping[str, str],
        origin: str,
        round_number: int,
        fate: str,
        reason: str | None = None,
        fitness: float | None = None,
    ) -> int:
        cursor = self._database.execute(
            "INSERT INTO candidates (losses, fingerprint, origin, round, fate, reason, fitness) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                json.dumps(dict(losses)),
                json.dumps(dict(fingerprint), sort_keys=True),
                origin,
                round_number,
                fate,
                reason,
                fitness,
            ),
        )
        return int(cursor.lastrowid)

    def move(
        self, candidate: int, fate: str, reason: str | None = None, **numbers: float | None
    ) -> None:
        """Set a candidate's fate, and ``simulated`` or ``fitness`` where given."""
        columns = "".join(
            f", {name} = :{name}" for name in numbers if name in ("simulated", "fitness")
        )
        self._database.execute(
            f"UPDATE candidates SET fate = :fate, reason = :reason{columns} WHERE id = :id",
            {"fate": fate, "reason": reason, "id": candidate, **numbers},
        )

    def candidates(self, *fates: str) -> list[Candidate]:
        """Candidates with one of these fates (all, if none is named), oldest first."""
        return self._candidates(f"fate IN ({','.join('?' * len(fates))})" if fates else "1", *fates)

    def candidate(self, identity: int) -> Candidate:
        (candidate,) = self._candidates("id = ?", identity)
        return candidate

    def found(self) -> list[Candidate]:
        """Trained candidates that the search itself found, best first: by ``confirmed`` where they
        have it, then by fitness."""
        return self._candidates(
            "fate = ? AND origin NOT LIKE ?",
            Fate.TRAINED,
            f"{KNOWN}%",
            order="confirmed DESC NULLS LAST, fitness DESC, id",
        )

    def candidate_like(self, fingerprint: Mapping[str, str]) -> Candidate | None:
        """The first candidate with the same gradients in every branch, or None."""
        found = self._candidates("fingerprint = ?", json.dumps(dict(fingerprint), sort_keys=True))
        return found[0] if found else None

    def _candidates(self, where: str, *values: Any, order: str = "id") -> list[Candidate]:
        confirmed = (
            "SELECT AVG(COALESCE(mAP, 0)) FROM trials "  # a training that failed counts as 0
            "WHERE kind = 'confirm' AND candidate = candidates.id AND result IS NOT NULL"
        )
        rows = self._database.execute(
            "SELECT id, losses, fingerprint, origin, round, fate, reason, simulated, fitness, "
            f"({confirmed}) AS confirmed FROM candidates WHERE {where} ORDER BY {order}",
            values,
        )
        return [Candidate(row[0], json.loads(row[1]), json.loads(row[2]), *row[3:]) for row in rows]

    def count(self, *fates: str) -> int:
        return self._database.execute(
            f"SELECT COUNT(*) FROM candidates WHERE fate IN ({','.join('?' * len(fates))})", fates
        ).fetchone()[0]

    # --- trials ---

    def start_trial(
        self, kind: str, trial: Trial, candidate: int | None = None, label: str | None = None
    ) -> None:
        self._database.execute(
            "INSERT INTO trials VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL, ?, NULL)",
            (trial.key, kind, candidate, label, trial.to_json(), time.time()),
        )

    def restart_trial(self, key: str) -> None:
        """A trial that was in flight when the run was stopped begins anew: its time is not the
        pause's."""
        self._database.execute("UPDATE trials SET started = ? WHERE key = ?", (time.time(), key))

    def durations(self, *kinds: str, last: int) -> list[float]:
        """Seconds from start to finish of the trials of these kinds that were started last and are
        finished."""
        rows = self._database.execute(
            f"SELECT finished - started FROM trials WHERE kind IN ({','.join('?' * len(kinds))}) AND result IS NOT NULL "
            "ORDER BY rowid DESC LIMIT ?",
            (*kinds, last),
        )
        return [seconds for (seconds,) in rows]

    def finish_trial(self, result: TrialResult) -> None:
        self._database.execute(
            "UPDATE trials SET result = ?, mAP = ?, failure = ?, finished = ? WHERE key = ?",
            (result.to_json(), result.mAP, result.failure, time.time(), result.key),
        )

    def trials(self, kind: str | None = None, finished: bool | None = None) -> list[TrialRow]:
        """Trials in the order in which they were started."""
        rows = self._database.execute(
            "SELECT kind, candidate, label, trial, result, started, finished FROM trials WHERE (:kind IS NULL OR kind = :kind) "
            "AND (:finished IS NULL OR (result IS NOT NULL) = :finished) ORDER BY rowid",
            {"kind": kind, "finished": finished},
        )
        return [
            TrialRow(
                row[0],
                row[1],
                row[2],
                Trial.from_json(row[3]),
                TrialResult.from_json(row[4]) if row[4] else None,
                row[5],
                row[6],
            )
            for row in rows
        ]


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    return database


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{folder}: no run here (no {FILE}); 'cse-search run --out {folder}' starts one"
        )
    return folder


def _lock(folder: Path) -> Any:
    """Hold the run for this process; the lock goes with the process, however it ends."""
    handle = open(folder / LOCK, "a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        handle.close()
        raise ConfigError(
            f"{folder}: {owner} is working on this run; watch it with 'cse-search status {folder}', "
            "or stop it before you resume"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle
