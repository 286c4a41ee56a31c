"""Trials on Ray: dispatch as workers become free, time limits, another try after a fault.

A trial that fails is a result and its worker goes on. Whatever else happens to it (any error of
Ray's) is a fault of the machine: the worker is replaced and the trial tried again, on another node
where there is one, ``cluster.retries`` times; then it is a failure with its reason. A fault that
meets a worker before it has taken the trial up is counted against none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from cse_autoloss.config import ClusterSection
from cse_autoloss.ray_session import ClusterError, Lifelines, open_ray
from cse_autoloss.trial import MACHINE, Trial, TrialResult, read_result
from cse_autoloss.worker_pool import Worker, WorkerPool, cause_of

__all__ = ["Cluster", "ClusterError", "Running"]

BUSY = 4.0  # a trial's time limit may be of its own seconds: by the clock it is given so many times
GRACE = 15.0  # ... and these seconds, after which its worker is killed


@dataclass(frozen=True)
class _Task:
    """A trial on its way.

    Attributes:
        faults: of machines, that it has met.
        avoid: nodes where it met them.
    """

    trial: Trial
    faults: int = 0
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Running:
    """A trial in a worker.

    Attributes:
        started: ``time.monotonic()`` at its dispatch.
    """

    trial: Trial
    started: float
    worker: Worker
    task: _Task


class Cluster:
    """Workers for one run. A context manager; leaving it ends the workers, and the local cluster if
    it started one.

    Args:
        options: of the trainer, which ``options["trainer"]`` names.
        search_path: folders that workers may import from beside the usual ones; the current folder
            where None.

    Raises (on construction):
        ClusterError: if the cluster cannot be reached or started, or cannot hold the workers.
    """

    def __init__(
        self,
        section: ClusterSection,
        options: Mapping[str, Any],
        search_path: Sequence[str] | None = None,
    ) -> None:
        self._retries, self._start_limit = section.retries, section.start_limit
        self._running: dict[Any, Running] = {}  # result ref -> what runs
        self._waiting: list[_Task] = []
        joined = open_ray(section)
        try:
            self._lifelines = Lifelines()
            self._pool = WorkerPool(
                section, options, [os.getcwd()] if search_path is None else search_path, joined
            )
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.end()
        ray.shutdown()

    @property
    def size(self) -> int:
        """Workers, once all have started."""
        return self._pool.size

    def prepare(self, prepared: bytes | None = None) -> bytes:
        """Start the workers, with what all trials start from; unless given, the first worker makes
        it, or has it in its cache.

        Returns:
            What the trials start from.

        Raises:
            ClusterError: if the preparation fails, or takes longer than ``cluster.prepare_limit``.
        """
        return self._pool.prepare(prepared)

    def clock(self) -> float:
        """Seconds that only go on."""
        return time.monotonic()

    @property
    def free(self) -> int:
        """How many more trials can be submitted without waiting for a worker that has its room."""
        return max(0, self._pool.with_room - len(self._waiting))

    @property
    def running(self) -> list[Running]:
        return list(self._running.values())

    def submit(self, trial: Trial) -> None:
        """Hand a trial to a worker; it waits in line while workers still start."""
        self._waiting.append(_Task(trial))
        self._dispatch()

    def wait(self, timeout: float = 1.0) -> list[TrialResult]:
        """Results that have come in, after at most ``timeout`` seconds. Dead workers are replaced
        on the way.

        Raises:
            ClusterError: if no worker can be started, or Ray is gone.
        """
        self._lifelines.check()
        pending = [*self._pool.starting, *self._running]
        if not pending:
            time.sleep(min(timeout, 0.1))
        done, _ = ray.wait(pending, num_returns=1, timeout=timeout) if pending else ([], [])
        if done:  # and whatever else has come in by now
            done, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        results = []
        for reference in done:
            if reference not in self._running:
                self._pool.settle(reference)
            elif result := self._settle(self._running.pop(reference), reference):
                results.append(result)
        results += self._end_late()
        self._pool.keep_up()
        self._dispatch()
        return results

    def _dispatch(self) -> None:
        """Each waiting trial to an idle worker, on a node that it has met no fault of if any worker
        lives on such a one."""
        nodes = self._pool.nodes
        held: list[_Task] = []
        while self._pool.idle and self._waiting:
            task = self._waiting.pop(0)
            avoid = task.avoid if nodes - task.avoid else ()
            worker = next((w for w in self._pool.idle if w.node not in avoid), None)
            if worker is None:
                held.append(task)
                continue
            if not self._pool.take(worker):
                held.append(task)
                continue
            reference = worker.actor.train.remote(task.trial.to_json())
            self._running[reference] = Running(task.trial, time.monotonic(), worker, task)
        self._waiting[:0] = held

    def _settle(self, running: Running, reference: Any) -> TrialResult | None:
        try:
            text = ray.get(reference)
        except RayError as error:
            return self._settle_fault(running, error)
        self._pool.give_back(running.worker)
        return read_result(running.trial, text)

    def _settle_fault(self, running: Running, error: RayError) -> TrialResult | None:
        """A machine's fault under a trial: it is tried again, or has failed."""
        self._pool.replace(running.worker)
        met = running.task
        task = replace(met, faults=met.faults + 1, avoid=met.avoid | {running.worker.node})
        if task.faults <= self._retries:
            self._waiting.insert(0, task)
            return None
        return TrialResult.failed(
            running.trial,
            f"{MACHINE} {task.faults} times: {cause_of(error)}",
            time.monotonic() - running.started,
        )

    def _end_late(self) -> list[TrialResult]:
        """Results of trials that outlived their time limit; their workers are replaced."""
        results = []
        for reference, running in list(self._running.items()):
            elapsed, limit = time.monotonic() - running.started, running.trial.time_limit
            grace = GRACE
            if running.trial.task == "head":  # a node's first one computes features, untimed
                grace += self._start_limit
            if limit is not None and elapsed > BUSY * limit + grace:
                del self._running[reference]
                self._pool.replace(running.worker)
                reason = f"outlived its time limit of {limit:g} s"
                results.append(TrialResult.failed(running.trial, reason, elapsed))
        return results
