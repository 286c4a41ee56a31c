"""The trials of a run's journal: a row each, from its start to what came of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from cse_autoloss.records import TrialRow
from cse_autoloss.trial import MACHINE, Trial, TrialResult

TRIALS = """
CREATE TABLE trials (
    key TEXT PRIMARY KEY,
    stage TEXT,             -- 'tune', or one of the ladder's
    candidate INTEGER REFERENCES candidates,
    label TEXT,             -- whom a training outside of the search belongs to
    trial TEXT,             -- JSON: Trial
    result TEXT,            -- JSON: TrialResult, or null while it runs
    mAP REAL, failure TEXT,
    started REAL,           -- time of day
    seconds REAL,           -- from start to end
    at REAL);               -- when it ended, in seconds that drivers have spent on the run
CREATE INDEX trials_by_candidate ON trials (candidate, stage);
CREATE INDEX trials_by_stage ON trials (stage, at, mAP);
CREATE INDEX trials_running ON trials (stage) WHERE result IS NULL;
"""


class TrialTable:
    """What a journal holds of trainings. Written inside a ``Journal.step``."""

    _database: sqlite3.Connection

    def start_trial(
        self, stage: str, trial: Trial, candidate: int | None = None, label: str | None = None
    ) -> None:
        self._database.execute(
            "INSERT INTO trials VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL, ?, NULL, NULL)",
            (trial.key, stage, candidate, label, trial.to_json(), time.time()),
        )

    def restart_trial(self, key: str) -> None:
        """A trial that was in flight when the run was stopped begins anew: its time is not the
        pause's."""
        self._database.execute("UPDATE trials SET started = ? WHERE key = ?", (time.time(), key))

    def finish_trial(self, result: TrialResult, seconds: float = 0.0, at: float = 0.0) -> None:
        """Write down what came of a trial, in how many seconds, and how long drivers have worked on
        the run by then."""
        self._database.execute(
            "UPDATE trials SET result = ?, mAP = ?, failure = ?, seconds = ?, at = ? WHERE key = ?",
            (result.to_json(), result.mAP, result.failure, seconds, at, result.key),
        )

    def failed_by_machine(self, *stages: str) -> int:
        """How many trials at these stages a machine has failed."""
        return self._database.execute(
            f"SELECT COUNT(*) FROM trials WHERE stage IN ({', '.join('?' * len(stages))}) "
            "AND failure LIKE ?",
            (*stages, f"{MACHINE} %"),
        ).fetchone()[0]

    def forget_failed(self, *stages: str, machine: bool = False) -> None:
        """Let trials at these stages that failed, or that a machine has failed, be as if they had
        never been started."""
        self._database.execute(
            f"DELETE FROM trials WHERE stage IN ({', '.join('?' * len(stages))}) "
            "AND failure LIKE ?",
            (*stages, f"{MACHINE} %" if machine else "%"),
        )

    def forget_trials_of(self, candidate: int, stage: str) -> None:
        """The same with all of a candidate's trials at a stage."""
        self._database.execute(
            "DELETE FROM trials WHERE candidate = ? AND stage = ?", (candidate, stage)
        )

    def trials(self, *stages: str, finished: bool | None = None) -> list[TrialRow]:
        """Trials at these stages (all, if none is given) in the order in which they were
        started."""
        marks = ", ".join("?" * len(stages))
        where = [f"stage IN ({marks})"] if stages else []
        if finished is not None:
            where.append(f"result IS {'NOT ' if finished else ''}NULL")
        return self._trials(f"{'WHERE ' * bool(where)}{' AND '.join(where)}", *stages)

    def trials_of(self, candidate: int, stage: str) -> list[TrialRow]:
        """A candidate's trials at a stage, in the order in which they were started."""
        return self._trials("WHERE candidate = ? AND stage = ?", candidate, stage)

    def _trials(self, where: str, *values: Any, order: str = "rowid") -> list[TrialRow]:
        rows = self._database.execute(
            "SELECT stage, candidate, label, trial, result, started, seconds FROM trials "
            f"{where} ORDER BY {order}",
            values,
        )
        return [
            TrialRow(
                stage,
                candidate,
                label,
                Trial.from_json(trial),
                TrialResult.from_json(result) if result else None,
                started,
                seconds,
            )
            for stage, candidate, label, trial, result, started, seconds in rows
        ]

    def count_trials(self, stage: str) -> int:
        """Trials at a stage, running ones too."""
        return self._database.execute(
            "SELECT COUNT(*) FROM trials WHERE stage = ?", (stage,)
        ).fetchone()[0]

    def scores(self, candidate: int, stage: str) -> list[float | None]:
        """mAP of each finished training of a candidate at a stage; None for a failure."""
        rows = self._database.execute(
            "SELECT mAP FROM trials WHERE candidate = ? AND stage = ? AND at IS NOT NULL "
            "ORDER BY rowid",
            (candidate, stage),
        )
        return [mAP for (mAP,) in rows]

    def scores_with(
        self, stage: str, scale: Mapping[str, float], lr_scale: float
    ) -> dict[int, float]:
        """Seed to mAP of the finished trainings at a stage with these loss-weight scales and this
        learning rate; 0 for a failure."""
        return {
            row.trial.seed: row.result.mAP or 0.0
            for row in self.trials(stage, finished=True)
            if row.result and (row.trial.scale, row.trial.lr_scale) == (scale, lr_scale)
        }

    def means(self, stage: str) -> dict[int, float]:
        """Candidate to its mean mAP over its finished trainings at a stage; a failure counts as
        0."""
        return dict(
            self._database.execute(
                "SELECT candidate, AVG(COALESCE(mAP, 0)) FROM trials WHERE stage = ? AND at IS NOT "
                "NULL AND candidate IS NOT NULL GROUP BY candidate",
                (stage,),
            ).fetchall()
        )

    def by_seed(self, candidate: int, stage: str) -> dict[int, float]:
        """Seed to mAP of a candidate's finished trainings at a stage; 0 for a failure."""
        rows = self._database.execute(
            "SELECT json_extract(trial, '$.seed'), COALESCE(mAP, 0) FROM trials "
            "WHERE candidate = ? AND stage = ? AND at IS NOT NULL ORDER BY rowid",
            (candidate, stage),
        )
        return dict(rows.fetchall())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Stage to (finished trainings, failed ones)."""
        rows = self._database.execute(
            "SELECT stage, COUNT(at), COUNT(at) - COUNT(mAP) FROM trials GROUP BY stage"
        )
        return {stage: (done, failed) for stage, done, failed in rows}

    def bests(self) -> dict[str, float]:
        """Stage to the best mAP of its trainings."""
        rows = self._database.execute(
            "SELECT stage, MAX(mAP) FROM trials WHERE mAP IS NOT NULL GROUP BY stage"
        )
        return dict(rows.fetchall())

    def durations(self, *stages: str, last: int) -> list[float]:
        """Seconds of the trainings at these stages that ended last, the last one first."""
        rows: list[tuple[float, float]] = []
        for stage in stages:
            rows += self._database.execute(
                "SELECT at, seconds FROM trials WHERE stage = ? AND at IS NOT NULL "
                "ORDER BY at DESC LIMIT ?",
                (stage, last),
            ).fetchall()
        return [seconds for _, seconds in sorted(rows, reverse=True)[:last]]

    def ended_since(self, at: float) -> list[TrialRow]:
        """Trainings that ended later than ``at``, in drivers' seconds, in that order."""
        return self._trials("WHERE at > ?", at, order="at, rowid")

    def ended(self, stage: str, last: int) -> list[float]:
        """When the trainings at a stage that ended last did so, in drivers' seconds, the last one
        first."""
        return [
            at
            for (at,) in self._database.execute(
                "SELECT at FROM trials WHERE stage = ? AND at IS NOT NULL ORDER BY at DESC LIMIT ?",
                (stage, last),
            )
        ]
