"""The workers of a cluster: started, loaded, replaced when they die or take too long."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cse_autoloss.config import ClusterSection
from cse_autoloss.ray_session import ClusterError
from cse_autoloss.workers import REMOTE, MachineFault, TrialWorker

PATIENCE = 1.0  # seconds to wait for the answer of a worker that is about to get a trial
NOTICE = 10.0  # seconds of waiting for room after which the user is told
LONGEST_PAUSE = 30.0  # seconds between the starts of a worker that does not start

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Worker:
    """A trial worker, and the placement group in which its processes have their room, all of it or
    none.

    Attributes:
        node: that it runs on, once known.
        since: ``time.monotonic()`` when it began to load.
    """

    actor: Any
    group: PlacementGroup | None
    node: str = ""
    since: float = 0.0

    def end(self) -> None:
        """End its processes, those that are left, and give their room back."""
        ray.kill(self.actor)
        if self.group:
            remove_placement_group(self.group)


class WorkerPool:
    """``size`` workers, or as many as the cluster has room for and as start.

    Attributes:
        size: workers that are wanted.
        idle: workers that can take a trial. :meth:`take` and :meth:`give_back` change it.

    Raises (on construction):
        ClusterError: if the cluster cannot hold the workers.
    """

    def __init__(
        self,
        section: ClusterSection,
        options: Mapping[str, Any],
        search_path: Sequence[str],
        may_grow: bool,
    ) -> None:
        self._section, self._options, self._search_path = section, options, list(search_path)
        self._prepared: Any = None
        self._placing: dict[Any, Worker] = {}  # ref -> worker that waits for its room
        self._loading: dict[Any, Worker] = {}  # ref -> worker that loads the trainer
        self.idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._later: list[float] = []  # when workers that did not start are tried again
        self._failed_starts = 0  # since a trial was last taken up
        self._alive = time.monotonic()  # when some worker last had its room
        self._told = False  # that none has
        # In a cluster that may grow, workers that were asked for wait for room.
        fit = None if may_grow and section.workers else self._capacity()
        self.size: int = section.workers or fit or 0
        if fit is not None and self.size > fit:
            raise ClusterError(
                f"cluster.workers: {self.size} workers of {self._needs()} do not fit; {fit} would"
            )

    @property
    def starting(self) -> list[Any]:
        """References that resolve when something is to be settled."""
        return [*self._placing, *self._loading]

    @property
    def with_room(self) -> int:
        """Workers that have no trial, and can take one now or when they have loaded."""
        return len(self.idle) + len(self._loading)

    @property
    def nodes(self) -> set[str]:
        """Where workers live."""
        return {worker.node for worker in [*self.idle, *self._loading.values(), *self._busy]}

    def prepare(self, prepared: bytes | None) -> bytes:
        """Start the workers, with what all trials start from; unless given, the first worker makes
        it.

        Raises:
            ClusterError: if the preparation fails, or takes longer than ``cluster.prepare_limit``.
        """
        first = None
        if prepared is None:
            prepared, first = self._make_prepared()
        self._prepared = ray.put(prepared)  # by this driver: the node that made it may go away
        if first:
            self._load(first)
        for _ in range(self.size - (first is not None)):
            self._start()
        return prepared

    def take(self, worker: Worker) -> bool:
        """Let an idle worker take a trial. False where it turns out to have died: then another is
        started, and it has been no trial's fault."""
        self.idle.remove(worker)
        self._busy.add(worker)
        answer = worker.actor.ping.remote()
        try:
            if ray.wait([answer], timeout=PATIENCE)[0]:
                ray.get(answer)
        except RayError:
            self._replace_unused(worker)
            return False
        self._failed_starts = 0
        return True

    def give_back(self, worker: Worker) -> None:
        """It has done its trial."""
        self._busy.remove(worker)
        self.idle.append(worker)

    def replace(self, worker: Worker) -> None:
        """End a worker that had a trial, and start another in its place."""
        worker.end()
        self._busy.discard(worker)
        self._start()

    def settle(self, reference: Any) -> None:
        """One of :attr:`starting` has resolved.

        Raises:
            ClusterError: if workers do not start, time after time, and none is left.
        """
        placed = reference in self._placing
        worker = (self._placing if placed else self._loading).pop(reference)
        try:
            value = ray.get(reference)
        except RayError as error:
            self._settle_failed(worker, error)
            return
        if placed:
            worker.node = value
            self._load(worker)
        else:
            self.idle.append(worker)

    def keep_up(self) -> None:
        """End workers whose time to load is over, and start those anew whose pause is.

        Raises:
            ClusterError: as :meth:`settle`; or if no worker has found room for as long.
        """
        now, limit = time.monotonic(), self._section.start_limit
        for reference, worker in list(self._loading.items()):
            if now - worker.since > limit:
                del self._loading[reference]
                late = TimeoutError(f"longer than cluster.start_limit={limit:g} s")
                self._settle_failed(worker, late)
        due = [moment for moment in self._later if moment <= now]
        self._later = [moment for moment in self._later if moment > now]
        for _ in due:
            self._start()
        if self._loading or self.idle or self._busy:
            self._alive, self._told = now, False
        elif self._placing:
            self._check_wait(now - self._alive)

    def end(self) -> None:
        """End all workers."""
        for worker in [
            *self._placing.values(),
            *self._loading.values(),
            *self.idle,
            *self._busy,
        ]:
            worker.end()

    def _start(self) -> None:
        processes, group = self._section.processes, None
        options: dict[str, Any] = self._resources()
        if processes > 1:
            room = {kind: need for kind, need in self._process().items() if need}
            group = placement_group([room] * processes, strategy="PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            )
        actor = REMOTE(TrialWorker).options(**options).remote(self._search_path)
        self._placing[actor.place.remote()] = Worker(actor, group)

    def _load(self, worker: Worker) -> None:
        worker.since = time.monotonic()
        reference = worker.actor.load.remote(
            self._options["trainer"],
            self._options,
            self._prepared,
            self._section.processes,
            self._resources(),
        )
        self._loading[reference] = worker

    def _replace_unused(self, worker: Worker) -> None:
        """The same for one that died before it had any, after a pause that grows while none lives
        long enough to take one."""
        worker.end()
        self._busy.discard(worker)
        self._failed_starts += 1
        pause = min(LONGEST_PAUSE, 0.5 * 2 ** min(self._failed_starts, 10))
        self._later.append(time.monotonic() + pause)

    def _settle_failed(self, worker: Worker, error: Exception) -> None:
        self._replace_unused(worker)
        others = self._placing or self._loading or self.idle or self._busy
        if self._failed_starts > self._section.retries and not others:
            raise ClusterError(f"trial workers do not start: {cause_of(error)}") from error

    def _make_prepared(self) -> tuple[bytes, Worker]:
        """Have a first worker make what trials start from; returns that, and the worker."""
        limit, allowed = self._section.prepare_limit, self._section.retries
        for attempt in range(allowed + 1):
            self._start()
            placed, worker = self._placing.popitem()
            try:
                began = time.monotonic()
                while not ray.wait([placed], timeout=PATIENCE)[0]:
                    self._check_wait(time.monotonic() - began)
                worker.node, self._told = ray.get(placed), False
                made = worker.actor.prepare.remote(self._options["trainer"], self._options)
                if not ray.wait([made], timeout=limit)[0]:
                    raise ClusterError(
                        f"the preparation took longer than cluster.prepare_limit={limit:g} s"
                    )
                return ray.get(made), worker
            except RayError as error:
                worker.end()
                own = isinstance(error, RayTaskError) and not isinstance(error, MachineFault)
                if own or attempt == allowed:
                    raise ClusterError(f"the preparation failed: {cause_of(error)}") from error
            except BaseException:
                worker.end()
                raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _resources(self) -> dict[str, float]:
        return {"num_cpus": self._section.num_cpus, "num_gpus": self._section.num_gpus}

    def _process(self) -> dict[str, float]:
        return {"CPU": self._section.num_cpus, "GPU": self._section.num_gpus}

    def _needs(self) -> str:
        processes = self._section.processes
        amounts = {kind: processes * need for kind, need in self._process().items()}
        return _amounts(amounts) + (f" for {processes} processes" if processes > 1 else "")

    def _check_wait(self, seconds: float) -> None:
        """No worker has had its room for so long: say so once, and give up at last.

        Raises:
            ClusterError: after ``cluster.start_limit``.
        """
        limit = self._section.start_limit
        state = (
            f"each needs {self._needs()}; of the cluster's {_amounts(ray.cluster_resources())}, "
            f"{_amounts(ray.available_resources())} are free"
        )
        if seconds > limit:
            raise ClusterError(
                f"no worker has found room for cluster.start_limit={limit:g} s: {state}"
            )
        if seconds > NOTICE and not self._told:
            self._told = True
            _LOG.warning(
                f"waiting up to cluster.start_limit={limit:g} s for room for a worker: {state}"
            )

    def _capacity(self) -> int:
        """Workers that fit into the cluster as it is now: a process has its CPUs on one node, and
        its share of a GPU on one GPU."""
        slots, needs = 0, self._process()
        for node in ray.nodes():
            there = node["Resources"] if node["Alive"] else {}
            fits = [there.get("CPU", 0) / needs["CPU"]]
            if needs["GPU"]:
                fits.append(int(there.get("GPU", 0)) * _whole(1 / needs["GPU"]))
            slots += _whole(min(fits))
        workers = slots // self._section.processes
        if not workers:
            raise ClusterError(
                f"cluster: no worker fits: each needs {self._needs()}; the cluster has "
                f"{_amounts(ray.cluster_resources())}"
            )
        return workers


def _whole(number: float) -> int:
    """The whole part, of a quotient that arithmetic may have left a little short."""
    return math.floor(number + 1e-9)


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def cause_of(error: BaseException) -> str:
    """The one line of a Ray error that says what happened: the innermost exception's."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    # Ray says what happened and then what to do about it; of an actor's death it says why at last.
    advises = isinstance(error, RayError) and not isinstance(error, RayActorError)
    return f"{type(error).__name__}: {lines[0 if advises else -1]}"[:300]
