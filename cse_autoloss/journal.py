"""The journal: a run on disk, in one SQLite file, safe to kill at any moment.

Whatever the search knows stands here, and every step of it is one transaction: the configuration,
what was screened, every survivor with its features, every candidate with its parents and state,
every trial with its result and provenance. A run is resumed by reading it back; ``status`` and
``report`` read it while it is being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import IO, Any

import numpy as np

from cse_autoloss.files import write_whole
from cse_autoloss.records import (
    DEFAULT,
    FOUND,
    FUNNEL,
    KNOWN,
    Candidate,
    CandidateState,
    Survivor,
    TrialRow,
    found_label,
)
from cse_autoloss.run_folder import (
    FILE,
    LOCK,
    PREPARED,
    check_whole,
    connect,
    connect_read_only,
    create_folder,
    lock_folder,
    unlock_folder,
)
from cse_autoloss.trial import ConfigError
from cse_autoloss.trial_table import TRIALS, TrialTable

__all__ = [
    "DEFAULT",
    "FOUND",
    "FUNNEL",
    "KNOWN",
    "Candidate",
    "CandidateState",
    "Journal",
    "Survivor",
    "TrialRow",
    "found_label",
]

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE seen (         -- hashes of what was screened, 8 bytes each, little-endian
    branch TEXT, round INTEGER, hashes BLOB, PRIMARY KEY (branch, round)) WITHOUT ROWID;
CREATE TABLE rejected (     -- kept where search.keep_rejected asks for it
    branch TEXT, text TEXT, round INTEGER,
    reason TEXT,            -- the property that it missed, or what the simulation said
    PRIMARY KEY (branch, text)) WITHOUT ROWID;
CREATE TABLE survivors (    -- losses of one branch that passed the screening and are new
    id INTEGER PRIMARY KEY,
    branch TEXT, text TEXT, fingerprint TEXT, round INTEGER,
    operator TEXT,          -- what made it
    parents TEXT,           -- JSON: ids of candidates
    features BLOB,          -- of its gradient field, 2 bytes each (float16, little-endian)
    chosen INTEGER);        -- whether a candidate holds it
CREATE INDEX survivors_by_chosen ON survivors (chosen, branch);
CREATE TABLE candidates (
    id INTEGER PRIMARY KEY,
    losses TEXT,            -- JSON: branch to expression
    fingerprint TEXT,       -- JSON: branch to gradient fingerprint
    origin TEXT,            -- 'known: NAME', or what made it
    parents TEXT,           -- JSON: branch to ids of candidates
    round INTEGER,
    predicted REAL, deviation REAL,  -- mAP, as the ranker saw it when the candidate was chosen
    stage TEXT,             -- the stage that it waits for, trains at, or was last measured at
    state TEXT,             -- see CandidateState
    reason TEXT,            -- why it went no further
    fitness REAL,           -- mean mAP at the search's last stage
    trainings INTEGER,      -- that this is the mean of
    estimate REAL);         -- what the ranker believes its fitness is, by all that is known
CREATE INDEX candidates_by_state ON candidates (state, stage);
CREATE INDEX candidates_by_fitness ON candidates (COALESCE(estimate, fitness))
    WHERE fitness IS NOT NULL;
"""


_CANDIDATE = (
    "id, losses, fingerprint, origin, parents, round, predicted, deviation, stage, state, reason, "
    "fitness, trainings, estimate"
)


class Journal(TrialTable):
    """A run's journal. Use :meth:`create`, :meth:`resume` (both lock the run for this process) or
    :meth:`read`."""

    def __init__(
        self, folder: Path, database: sqlite3.Connection, lock: IO[str] | None = None
    ) -> None:
        self.folder, self._database, self._lock = folder, database, lock

    @classmethod
    def create(cls, folder: str | Path, meta: Mapping[str, Any]) -> Journal:
        """Start a run in a new or empty folder.

        Raises:
            ConfigError: if the folder holds a run, or anything else, or cannot be made.
        """
        folder = Path(folder)

        def fill(database: sqlite3.Connection) -> None:
            database.executescript(_SCHEMA + TRIALS)
            rows = [(key, json.dumps(value)) for key, value in meta.items()]
            database.executemany("INSERT INTO meta VALUES (?, ?)", rows)

        lock = create_folder(folder, fill)
        return cls(folder, connect(folder / FILE), lock)

    @classmethod
    def resume(cls, folder: str | Path) -> Journal:
        """Open a run to go on with it.

        Raises:
            ConfigError: if there is no run, or another driver is at it, or it cannot be written to,
                or its journal is damaged.
        """
        folder = _existing(folder)
        database = connect_read_only(folder / FILE)  # refuses what is no journal of this format
        try:
            check_whole(database, folder)
        finally:
            database.close()
        try:
            lock = lock_folder(folder)
            return cls(folder, connect(folder / FILE), lock)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{folder}: cannot be written to: {error}") from error

    @classmethod
    def read(cls, folder: str | Path) -> Journal:
        """Open a run to look at it, also while a driver writes, and where nothing may be written.

        Raises:
            ConfigError: if there is no run, or none that can be read.
        """
        folder = _existing(folder)
        return cls(folder, connect_read_only(folder / FILE))

    def close(self) -> None:
        self._database.close()
        if self._lock:
            unlock_folder(self.folder, self._lock)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Everything written inside is kept together or not at all.

        Raises:
            ConfigError: if the folder is no longer this driver's, or the disk is full.
        """
        self._check_lock()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.rollback()
                raise
            self._database.commit()
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self.folder}: its journal cannot be written to: {error}; nothing finished is "
                f"lost: cse-search resume {quote(str(self.folder))}"
            ) from error

    def _check_lock(self) -> None:
        if self._lock is None:
            return
        try:
            there = os.stat(self.folder / LOCK).st_ino
        except OSError:
            there = None
        if there != os.fstat(self._lock.fileno()).st_ino:
            raise ConfigError(
                f"{self.folder}: was deleted, moved or taken over while the run went on; this "
                "driver stops"
            )

    @property
    def prepared(self) -> bytes | None:
        """What the run's trials start from, once it is known: a resumed run's start from it too,
        whatever has changed since.

        Raises:
            ConfigError: if the file is not the one that the run began with.
        """
        digest = self["prepared digest"]
        if digest is None:
            return None
        try:
            data = self.prepared_path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.prepared_path}: cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise ConfigError(
                f"{self.prepared_path}: is not what this run's trainings started from; put the "
                "file back, or start a new run"
            )
        return data

    @prepared.setter
    def prepared(self, data: bytes) -> None:
        write_whole(self.prepared_path, data)
        with self.step():
            self["prepared digest"] = hashlib.sha256(data).hexdigest()

    @property
    def prepared_path(self) -> Path:
        """Where :attr:`prepared` is kept."""
        return self.folder / PREPARED

    # --- meta ---

    def __getitem__(self, key: str) -> Any:
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def __setitem__(self, key: str, value: Any) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value))
        )

    # --- screening ---

    def add_seen(self, branch: str, round_number: int, hashes: np.ndarray) -> None:
        """Write down the hashes of what a round screened. Shape (n,), uint64."""
        self._database.execute(
            "INSERT INTO seen VALUES (?, ?, ?)",
            (branch, round_number, hashes.astype("<u8").tobytes()),
        )

    def seen(self, branch: str) -> np.ndarray:
        """Hashes of all that was screened for a branch. Shape (n,), uint64."""
        rows = self._database.execute("SELECT hashes FROM seen WHERE branch = ?", (branch,))
        return np.frombuffer(b"".join(blob for (blob,) in rows), "<u8").astype(np.uint64)

    def add_rejected(
        self, branch: str, round_number: int, reasons: Iterable[tuple[str, str]]
    ) -> None:
        """Write down rejected expressions as (text, reason)."""
        self._database.executemany(
            "INSERT OR IGNORE INTO rejected VALUES (?, ?, ?, ?)",
            ((branch, text, round_number, reason) for text, reason in reasons),
        )

    def rejected(self, branch: str) -> Iterator[tuple[str, str]]:
        """(text, reason) of the rejected expressions that the run was asked to keep."""
        return iter(
            self._database.execute(
                "SELECT text, reason FROM rejected WHERE branch = ? ORDER BY round, text", (branch,)
            )
        )

    def add_survivors(self, survivors: Iterable[Survivor]) -> None:
        self._database.executemany(
            "INSERT INTO survivors VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (
                (
                    *(s.id, s.branch, s.text, s.fingerprint, s.round, s.operator),
                    json.dumps(s.parents),
                    s.features.astype("<f2").tobytes(),
                )
                for s in survivors
            ),
        )

    def choose_survivors(self, ids: Iterable[int]) -> None:
        """These are in a candidate from now on."""
        self._database.executemany(
            "UPDATE survivors SET chosen = 1 WHERE id = ?", ((number,) for number in ids)
        )

    def survivors(self, chosen: bool | None = None) -> list[Survivor]:
        """In the order in which they were found."""
        rows = self._database.execute(
            "SELECT id, branch, text, fingerprint, round, operator, parents, features "
            "FROM survivors WHERE (:chosen IS NULL OR chosen = :chosen) ORDER BY id",
            {"chosen": chosen},
        )
        return [
            Survivor(
                number,
                branch,
                text,
                fingerprint,
                found_in,
                operator,
                tuple(json.loads(parents)),
                np.frombuffer(features, "<f2"),
            )
            for number, branch, text, fingerprint, found_in, operator, parents, features in rows
        ]

    @property
    def last_survivor(self) -> int:
        """The highest id of a survivor; 0 before the first."""
        return self._database.execute("SELECT COALESCE(MAX(id), 0) FROM survivors").fetchone()[0]

    def survivor_fingerprints(self) -> list[tuple[str, str]]:
        """(branch, fingerprint) of all survivors."""
        return self._database.execute("SELECT branch, fingerprint FROM survivors").fetchall()

    # --- candidates ---

    def add_candidate(
        self,
        losses: Mapping[str, str],
        fingerprint: Mapping[str, str],
        origin: str,
        stage: str,
        round_number: int = 0,
        parents: Mapping[str, Sequence[int]] | None = None,
        predicted: float | None = None,
        deviation: float | None = None,
    ) -> int:
        """Write down a candidate that waits for a stage; returns its id."""
        cursor = self._database.execute(
            f"INSERT INTO candidates ({_CANDIDATE}) "
            "VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, 0, NULL)",
            (
                json.dumps(dict(losses)),
                json.dumps(dict(fingerprint), sort_keys=True),
                origin,
                json.dumps({branch: list(ids) for branch, ids in (parents or {}).items()}),
                round_number,
                predicted,
                deviation,
                stage,
                CandidateState.WAITING,
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def move(
        self, candidate: int, state: str, stage: str | None = None, reason: str | None = None
    ) -> None:
        """Write down where a candidate stands now; at its stage unless another is given."""
        self._database.execute(
            "UPDATE candidates SET state = ?, stage = COALESCE(?, stage), reason = ? WHERE id = ?",
            (state, stage, reason, candidate),
        )

    def set_fitness(self, candidate: int, fitness: float, trainings: int) -> None:
        self._database.execute(
            "UPDATE candidates SET fitness = ?, trainings = ? WHERE id = ?",
            (fitness, trainings, candidate),
        )

    def set_estimates(self, estimates: Mapping[int, float]) -> None:
        self._database.executemany(
            "UPDATE candidates SET estimate = ? WHERE id = ?",
            ((mean, number) for number, mean in estimates.items()),
        )

    def candidate(self, number: int) -> Candidate:
        (candidate,) = self._candidates("WHERE id = ?", number)
        return candidate

    def candidates(self, *states: str, stage: str | None = None) -> list[Candidate]:
        """Candidates in these states (all, if none is given), in the order in which they were
        made."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else "WHERE 1"
        return self._candidates(
            f"{where} {'AND stage = ?' if stage else ''} ORDER BY id",
            *states,
            *([stage] if stage else []),
        )

    def waiting(self, stage: str, count: int) -> list[Candidate]:
        """The oldest candidates that wait for a stage, so many at most."""
        return self._candidates(
            "WHERE state = ? AND stage = ? ORDER BY id LIMIT ?",
            *(CandidateState.WAITING, stage, count),
        )

    def trained(self) -> list[Candidate]:
        """Candidates with a fitness, in the order in which they were made."""
        return self._candidates("WHERE fitness IS NOT NULL ORDER BY id")

    def count_trained(self) -> int:
        """How many candidates have a fitness, those that train once more too."""
        return self._database.execute(
            "SELECT COUNT(*) FROM candidates WHERE fitness IS NOT NULL"
        ).fetchone()[0]

    def count(self, *states: str, stage: str | None = None) -> int:
        marks = ", ".join("?" * len(states))
        return self._database.execute(
            f"SELECT COUNT(*) FROM candidates WHERE state IN ({marks}) "
            f"{'AND stage = ?' if stage else ''}",
            (*states, *([stage] if stage else [])),
        ).fetchone()[0]

    def fingerprints(self) -> list[dict[str, str]]:
        """The fingerprints of all candidates."""
        rows = self._database.execute("SELECT fingerprint FROM candidates")
        return [json.loads(text) for (text,) in rows]

    def best(self, closing: Sequence[str] = (), count: int = -1) -> list[Candidate]:
        """Candidates that the search found, best first: by their mean at the last of the closing
        stages that they took part in, those of a later stage before those of an earlier; then by
        what the ranker believes of their fitness.

        Args:
            closing: the stages after the search that count, in their order.
            count: how many at most; all where -1.
        """
        means: dict[int, tuple[int, float]] = {}
        for place, stage in enumerate(closing):
            means |= {number: (place, mean) for number, mean in self.means(stage).items()}
        measured = [self.candidate(number) for number in means]
        fittest = self._candidates(
            "WHERE fitness IS NOT NULL AND origin NOT LIKE ? "
            "ORDER BY COALESCE(estimate, fitness) DESC, fitness DESC, id LIMIT ?",
            f"{KNOWN}%",
            -1 if count < 0 else count + len(means),
        )
        measured.sort(key=lambda candidate: means[candidate.id], reverse=True)
        ranked = [replace(candidate, closing=means[candidate.id][1]) for candidate in measured] + [
            candidate for candidate in fittest if candidate.id not in means
        ]
        return ranked if count < 0 else ranked[:count]

    def measured(self) -> list[tuple[int, float]]:
        """(id, fitness) of all candidates at the end of the search's ladder; 0 where the training
        failed."""
        return self._database.execute(
            "SELECT id, COALESCE(fitness, 0) FROM candidates WHERE fitness IS NOT NULL "
            "UNION ALL SELECT id, 0 FROM candidates WHERE state = ?",
            (CandidateState.FAILED,),
        ).fetchall()

    def _candidates(self, rest: str, *values: Any) -> list[Candidate]:
        rows = self._database.execute(f"SELECT {_CANDIDATE} FROM candidates {rest}", values)
        return [
            Candidate(
                row[0], json.loads(row[1]), json.loads(row[2]), row[3], json.loads(row[4]), *row[5:]
            )
            for row in rows
        ]


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{folder}: no run here (no {FILE}); 'cse-search run --out {folder}' starts one"
        )
    return folder
