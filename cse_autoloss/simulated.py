"""A cluster in virtual time: the same protocol as ``cluster.Cluster``, without Ray or a detector.

The search's decisions are tested on it, and what a driver does to a thousand workers is measured
on it, in seconds.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from cse_autoloss.trial import Trial, TrialResult, read_result


@dataclass(frozen=True)
class SimulatedRunning:
    """A trial at work; ``started`` is virtual."""

    trial: Trial
    started: float


class SimulatedCluster:
    """Workers that take ``seconds(trial)`` of virtual time to hand back ``train(trial)``.

    Args:
        train: what a worker does; called when the trial's time is up. What is no result is taken
            for the text that came back.
        size: workers.
        seconds: virtual duration of a trial.
        driver_time: let the clock also go on by the CPU time that this process spends between two
            calls of ``wait``: what the driver costs its workers.

    Attributes:
        now: virtual seconds since the cluster was made.
        busy: virtual seconds that workers spent on trials that have come back.
        trained: keys of the trials that have come back, in that order.
    """

    def __init__(
        self,
        train: Callable[[Trial], object],
        size: int = 2,
        seconds: Callable[[Trial], float] = lambda trial: 1.0,
        driver_time: bool = False,
    ) -> None:
        self.size, self._train, self._seconds = size, train, seconds
        self.now, self.busy, self.trained = 0.0, 0.0, list[str]()
        self._ends: list[tuple[float, int, SimulatedRunning]] = []  # a heap
        self._count = itertools.count()  # of equal ends, the one submitted first
        self._left = time.process_time() if driver_time else None

    def clock(self) -> float:
        self._charge()
        return self.now

    def prepare(self, prepared: bytes | None = None) -> bytes:
        return prepared or b"simulated"

    @property
    def free(self) -> int:
        return self.size - len(self._ends)

    @property
    def running(self) -> list[SimulatedRunning]:
        return [running for _, _, running in self._ends]

    def submit(self, trial: Trial) -> None:
        assert self.free > 0, "a trial for no free worker"
        self._charge()
        end = self.now + self._seconds(trial)
        heapq.heappush(self._ends, (end, next(self._count), SimulatedRunning(trial, self.now)))

    def wait(self, timeout: float = 1.0) -> list[TrialResult]:
        """What comes back next: time goes on to the end of the trial that ends first, by
        ``timeout`` at most."""
        self._charge()
        until = min(self._ends[0][0], self.now + timeout) if self._ends else self.now + timeout
        self.now = max(self.now, until)
        results = []
        while self._ends and self._ends[0][0] <= self.now:
            end, _, running = heapq.heappop(self._ends)
            self.busy += end - running.started
            self.trained.append(running.trial.key)
            made = self._train(running.trial)
            text = made.to_json() if isinstance(made, TrialResult) else made
            results.append(read_result(running.trial, text))
        if self._left is not None:
            self._left = time.process_time()
        return results

    def close(self) -> None:
        pass

    def _charge(self) -> None:
        if self._left is not None:
            now = time.process_time()
            self.now, self._left = self.now + now - self._left, now
