"""Trials on Ray: long-lived workers, dispatch as workers become free, time limits, replacement of
workers that die.

A worker is an actor that has imported the detection library and holds the data, so a trial pays for
its training only. Text (JSON) goes to workers and comes back. A worker may be several processes
that train each trial together: the actor that the cluster talks to, and others that it starts and
that end with it.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cse_autoloss.config import ClusterSection
from cse_autoloss.trial import Trial, TrialResult, load_trainer, read_result

GRACE = 15.0  # seconds beyond a trial's own time limit after which its worker is killed


class ClusterError(RuntimeError):
    """The cluster cannot do what is asked: no resources, or workers that do not start."""


@ray.remote
class TrialWorker:
    """Trains trials, alone or as the first of several processes.

    Args:
        processes: how many. This actor starts the others, in its own placement group, and Ray ends
            them when it ends.
        resources: of each process, as for an actor's ``options``.
    """

    def __init__(
        self,
        trainer: str,
        options: Mapping[str, Any],
        prepared: bytes,
        processes: int = 1,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        _hide_others_gpus()
        self._others: list[Any] = []
        if processes > 1:
            address = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
            self._others = [
                _Other.options(**resources).remote(
                    trainer, options, prepared, (address, rank, processes)
                )
                for rank in range(1, processes)
            ]
            _join(address, 0, processes)
        self._trainer = load_trainer(trainer)(options, prepared)

    def ready(self) -> None:
        """Returns when the worker can take trials."""
        ray.get([other.ready.remote() for other in self._others])

    def train(self, trial_json: str) -> str:
        theirs = [other.train.remote(trial_json) for other in self._others]
        result = _train(self._trainer, trial_json)
        try:
            ray.get(theirs)
        except RayActorError:  # the group is broken for good: the cluster starts another worker
            ray.actor.exit_actor()
        return result


@ray.remote
class _Other:
    """One more process of a worker. It trains what the first does; that one's result counts."""

    def __init__(
        self, trainer: str, options: Mapping[str, Any], prepared: bytes, place: tuple[str, int, int]
    ) -> None:
        _hide_others_gpus()
        _join(*place)
        self._trainer = load_trainer(trainer)(options, prepared)

    def ready(self) -> None:
        """Returns when the process can take trials."""

    def train(self, trial_json: str) -> None:
        _train(self._trainer, trial_json)


def _hide_others_gpus() -> None:
    """To be called before anything asks for a GPU: current Ray leaves all of a node's in sight of a
    process without any."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _train(trainer: Any, trial_json: str) -> str:
    trial = Trial.from_json(trial_json)
    started = time.monotonic()
    try:
        result = trainer.train(trial)
    except Exception as error:  # a trial that raises is a failed result; the worker goes on
        result = TrialResult.failed(
            trial, f"{type(error).__name__}: {error}", time.monotonic() - started
        )
    return result.to_json()


def _join(address: str, rank: int, processes: int) -> None:
    import torch

    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=address,
        rank=rank,
        world_size=processes,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _knock(address: str) -> None:
    """Raise OSError at once where nobody listens; Ray itself would go on asking for many
    minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _prepare(trainer: str, options: Mapping[str, Any]) -> bytes:
    _hide_others_gpus()
    return load_trainer(trainer).prepare(options)


@dataclass(frozen=True)
class _Worker:
    """A trial worker, and the placement group in which its processes have their room, all of it or
    none."""

    actor: Any
    group: PlacementGroup | None

    def end(self) -> None:
        """End its processes, those that are left, and give their room back."""
        ray.kill(self.actor)
        if self.group:
            remove_placement_group(self.group)


@dataclass(frozen=True)
class Running:
    """A trial in a worker.

    Attributes:
        started: ``time.monotonic()`` at its dispatch.
        attempt: 1 at first, one more for each worker that died under it.
    """

    trial: Trial
    worker: _Worker
    started: float
    attempt: int


class Cluster:
    """Workers for one run. A context manager; leaving it ends the workers, and the local cluster if
    it started one.

    Raises (on construction):
        ClusterError: if the cluster cannot be reached or cannot hold a single worker.
    """

    def __init__(self, section: ClusterSection, options: Mapping[str, Any]) -> None:
        self._section, self._options, self._trainer = section, options, options["trainer"]
        self._prepared: Any = None
        self._starting: dict[Any, _Worker] = {}  # ready ref -> worker
        self._idle: list[_Worker] = []
        self._running: dict[Any, Running] = {}  # result ref -> what runs
        self._again: list[
            tuple[Trial, int]
        ] = []  # trials whose worker died, with their next attempt
        self._failed_starts = 0
        address = section.address or os.environ.get("RAY_ADDRESS")
        self._joined = address is not None
        cores = max(
            os.cpu_count() or 1,
            math.ceil((section.workers or 1) * section.processes * section.num_cpus),
        )
        try:
            if self._joined:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level="error")
            else:
                ray.init(
                    address="local",
                    num_cpus=cores,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (OSError, RayError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split())[:300]
            raise ClusterError(
                f"cluster.address: cannot reach a Ray cluster at {address}: {message}"
            ) from error
        self._resources = {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus}
        try:
            self.size = section.workers or self._capacity()
            if (
                section.processes > 1 and self.size > self._capacity()
            ):  # they would wait for room that others of them hold
                raise ClusterError(
                    f"cluster.workers: {self.size} workers of {section.processes} processes each do not fit; "
                    f"{self._capacity()} would"
                )
        except ClusterError:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in [
            *self._starting.values(),
            *self._idle,
            *(running.worker for running in self._running.values()),
        ]:
            worker.end()
        ray.shutdown()

    def prepare(self, prepared: bytes | None = None) -> bytes:
        """Start the workers, with what all trials start from; unless given, a worker node makes it,
        or has it in its cache.

        Returns:
            What the trials start from.

        Raises:
            ClusterError: if the preparation fails.
        """
        if prepared is None:
            task = ray.remote(_prepare).options(
                max_retries=self._section.retries, **self._resources
            )
            try:
                prepared = ray.get(task.remote(self._trainer, self._options))
            except RayError as error:
                raise ClusterError(
                    f"the preparation of initial weights failed: {_cause(error)}"
                ) from error
        self._prepared = ray.put(prepared)  # by this driver: the node that made it may go away
        for _ in range(self.size):
            self._start_worker()
        return prepared

    def clock(self) -> float:
        """Seconds that only go on."""
        return time.monotonic()

    @property
    def free(self) -> int:
        """How many more trials can be submitted without waiting for a worker."""
        return self.size - len(self._running) - len(self._again)

    @property
    def running(self) -> list[Running]:
        return list(self._running.values())

    def submit(self, trial: Trial) -> None:
        """Hand a trial to a worker; it waits in line while workers still start."""
        self._again.append((trial, 1))
        self._dispatch()

    def wait(self, timeout: float = 1.0) -> list[TrialResult]:
        """Results that have come in, after at most ``timeout`` seconds. Dead workers are replaced
        on the way.

        Raises:
            ClusterError: if workers fail to start time after time.
        """
        pending = [*self._starting, *self._running]
        done, _ = ray.wait(pending, num_returns=1, timeout=timeout) if pending else ([], [])
        if done:  # and whatever else has come in by now
            done, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        results = []
        for reference in done:
            if reference in self._starting:
                self._settle_start(reference)
            elif result := self._settle_trial(reference):
                results.append(result)
        for reference, running in list(self._running.items()):
            elapsed, limit = time.monotonic() - running.started, running.trial.time_limit
            grace = GRACE
            if running.trial.task == "head":  # a node's first one computes features, untimed
                grace += self._section.start_limit
            if limit is not None and elapsed > limit + grace:
                del self._running[reference]
                self._replace(running.worker)
                results.append(
                    TrialResult.failed(
                        running.trial,
                        f"outlived its time limit of {limit:g} s",
                        elapsed,
                    )
                )
        self._dispatch()
        return results

    def _dispatch(self) -> None:
        while self._idle and self._again:
            worker = self._idle.pop()
            trial, attempt = self._again.pop(0)
            reference = worker.actor.train.remote(trial.to_json())
            self._running[reference] = Running(trial, worker, time.monotonic(), attempt)

    def _settle_trial(self, reference: Any) -> TrialResult | None:
        running = self._running.pop(reference)
        try:
            result = read_result(running.trial, ray.get(reference))
        except RayTaskError as error:  # raised outside the trainer: the worker itself is sound
            self._idle.append(running.worker)
            return TrialResult.failed(running.trial, _cause(error))
        except RayActorError as error:
            self._replace(running.worker)
            if running.attempt <= self._section.retries:
                self._again.insert(0, (running.trial, running.attempt + 1))
                return None
            return TrialResult.failed(
                running.trial,
                f"its worker died {running.attempt} times: {_cause(error)}",
                time.monotonic() - running.started,
            )
        self._idle.append(running.worker)
        return result

    def _settle_start(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts > self._section.retries:
                raise ClusterError(f"trial workers do not start: {_cause(error)}") from error
            self._replace(worker)
            return
        self._failed_starts = 0
        self._idle.append(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._start_worker()

    def _start_worker(self) -> None:
        processes, options, group = self._section.processes, dict(self._resources), None
        if processes > 1:
            room = {"CPU": self._section.num_cpus, "GPU": self._section.num_gpus}
            group = placement_group(
                [{kind: need for kind, need in room.items() if need}] * processes, strategy="PACK"
            )
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            )
        actor = TrialWorker.options(**options).remote(
            self._trainer, self._options, self._prepared, processes, self._resources
        )
        self._starting[actor.ready.remote()] = _Worker(actor, group)

    def _capacity(self) -> int:
        """Workers that fit into the cluster as it is now."""
        total = ray.cluster_resources()
        cpus, gpus = (
            self._section.processes * need
            for need in (self._section.num_cpus, self._section.num_gpus)
        )
        fits = [total.get(kind, 0) // need for kind, need in (("CPU", cpus), ("GPU", gpus)) if need]
        if not min(fits):
            raise ClusterError(
                f"cluster: no worker fits: each needs {cpus:g} CPUs and {gpus:g} "
                f"GPUs; the cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}"
            )
        return int(min(fits))


def _cause(error: BaseException) -> str:
    """The one line of a Ray error that says what happened: the innermost exception's."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
