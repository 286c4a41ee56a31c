"""Trainings of a run: handed to workers, written down, and taken up again after a stop.

The journal knows of a training before a worker does, and of its result before anybody decides by
it: so nothing finished is lost, and nothing is done twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cse_autoloss.config import Config
from cse_autoloss.journal import CandidateState, Journal, TrialRow
from cse_autoloss.stages import REFERENCE, TUNE, Ladder
from cse_autoloss.trial import Trial, TrialResult

ANOTHER_SPLIT = 0.25  # of a training's time, to measure on one more split
RECENT = 5  # trainings at least, whose mean duration is what the next one is expected to take


class ClusterLike(Protocol):
    """What the search asks of a cluster: ``cluster.Cluster``, or ``simulated.SimulatedCluster``."""

    @property
    def size(self) -> int: ...
    def prepare(self, prepared: bytes | None = None) -> bytes: ...
    @property
    def free(self) -> int: ...
    def submit(self, trial: Trial) -> None: ...
    def wait(self, timeout: float = 1.0) -> list[TrialResult]: ...
    def clock(self) -> float: ...


@dataclass(frozen=True)
class Job:
    """A training at a stage: of a candidate, or of the losses that a label stands for."""

    stage: str
    trial: Trial
    candidate: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A training that has come back, as it stands in the journal."""

    job: Job
    result: TrialResult


class TrialRunner:
    """Dispatch, recording and resuming.

    Args:
        spaces: branch to the origin of its search space.
        on_progress: called every second or so.
    """

    def __init__(
        self,
        config: Config,
        spaces: Mapping[str, str],
        journal: Journal,
        cluster: ClusterLike,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._spaces, self._journal = config, spaces, journal
        self._ladder = Ladder.of(config.stages)
        self._cluster, self._on_progress = cluster, on_progress
        self._running: dict[str, tuple[Job, float]] = {}  # by key, with the start on the clock
        self._driven: float = journal["driven"] or 0.0  # seconds, by earlier drivers
        self._began = cluster.clock()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free(self) -> int:
        return self._cluster.free

    @property
    def size(self) -> int:
        return self._cluster.size

    @property
    def elapsed(self) -> float:
        """Seconds since this driver began."""
        return self._cluster.clock() - self._began

    def prepare(self) -> None:
        """Start the workers, and what was in flight when the run was last stopped."""
        self._on_progress()
        kept = self._journal.prepared
        prepared = self._cluster.prepare(kept)
        if kept is None:
            self._journal.prepared = prepared
        for row in self._journal.trials(finished=False):
            with self._journal.step():
                self._journal.restart_trial(row.trial.key)
            self._submit(_job(row))

    def trial(
        self, stage: str, key: str, losses: Mapping[str, str], seed: int, **changes: Any
    ) -> Trial:
        """A training as its stage says, with what the tuning has found so far.

        Args:
            seed: which of the stage's seeds, from 0.
        """
        # The default losses are tuned for what they are compared at.
        other = {TUNE: self._ladder.comparison, REFERENCE: self._ladder.fitness}
        measure = self._ladder.stages[other.get(stage, stage)]
        first = 0 if stage in other else self._ladder.first_seed(stage)
        splits = ("val",) if stage in other else self._ladder.splits(stage)
        drawn = stage == self._ladder.comparison and not seed and "test" in splits
        settings: dict[str, Any] = {
            "task": measure.task,
            "share": measure.share,
            "evaluate": splits,
            "detections": "test" if drawn else None,
            "seed": self._config.seed + first + seed,
            "time_limit": self._config.cluster.time_limit,
            **(self._journal["tuned"] or {}),
            **changes,
        }
        spaces = {branch: self._spaces[branch] for branch in losses}
        return Trial(f"{stage}-{key}", dict(losses), spaces, **settings)

    def start(self, jobs: Sequence[Job]) -> None:
        """Write trainings down and hand them to workers."""
        if not jobs:
            return
        with self._journal.step():
            for job in jobs:
                self._journal.start_trial(job.stage, job.trial, job.candidate, job.label)
                if job.candidate is not None and job.stage in self._ladder.search:
                    self._journal.move(job.candidate, CandidateState.TRAINING, job.stage)
        for job in jobs:
            self._submit(job)

    def collect(self, timeout: float = 1.0) -> list[Outcome]:
        """Trainings that have come back, after at most ``timeout`` seconds; they are to be written
        down with ``finish``."""
        results = self._cluster.wait(timeout)
        self._on_progress()
        return [Outcome(self._running[result.key][0], result) for result in results]

    def finish(self, outcome: Outcome) -> None:
        """Write a training down that has come back (inside the caller's step)."""
        now = self._cluster.clock()
        _, started = self._running.pop(outcome.job.trial.key)
        at = self._driven + now - self._began
        self._journal.finish_trial(outcome.result, now - started, at)
        self._journal["driven"] = at

    def train_all(
        self,
        stage: str,
        jobs: Iterable[Job],
        record: Callable[[list[Outcome]], None],
        until: float | None = None,
        least: int = 0,
    ) -> None:
        """Do all of a stage's trainings that the journal does not hold yet; wait until they have
        come back.

        Args:
            record: takes whatever comes back meanwhile.
            until: seconds of this driver after which no training should end: none is started then
                that is expected to.
            least: how many, the first, are done in any case.
        """
        known = {row.trial.key for row in self._journal.trials(stage)}
        queue = [entry for entry in enumerate(jobs) if entry[1].trial.key not in known]
        while queue or any(job.stage == stage for job, _ in self._running.values()):
            while queue and self._cluster.free > 0:
                place, job = queue.pop(0)
                if until is None or place < least or self.elapsed + self.expected(stage) <= until:
                    self.start([job])
            if queue or self._running:  # workers that still start are waited for here, too
                record(self.collect())

    def expected(self, stage: str) -> float:
        """Seconds that a training at a stage takes, by those of its kind that ended last and those
        that already run for longer than these did; 0 before the first."""
        alike = self._ladder.same_measure(stage)
        last, longer = max(RECENT, self.size), 1.0
        known = self._journal.durations(*alike, last=last)
        if not known:  # of the tuning, or others that measure one split alone
            task = self._ladder.stages[stage].task
            longer += ANOTHER_SPLIT * (len(self._ladder.splits(stage)) - 1)
            alike = tuple(n for n, s in self._ladder.stages.items() if s.task == task)
            known = self._journal.durations(*alike, TUNE, last=last)
        if not known:
            return 0.0
        now, mean = self._cluster.clock(), statistics.mean(known)
        slow = [
            now - started
            for job, started in self._running.values()
            if job.stage in alike and now - started > mean
        ]
        return longer * statistics.mean([*known, *slow])

    def _submit(self, job: Job) -> None:
        self._running[job.trial.key] = job, self._cluster.clock()
        self._cluster.submit(job.trial)


def _job(row: TrialRow) -> Job:
    return Job(row.stage, row.trial, row.candidate, row.label)
