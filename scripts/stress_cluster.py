"""Forty real Ray workers on one machine, and all that can happen to them.

    python scripts/stress_cluster.py crowd      # workers that hang, crash, start late or never
    python scripts/stress_cluster.py memory     # a worker that Ray kills for memory

Nothing trains: a trial is a short sleep, or the end of its worker. Each trial counts how often it
was begun; what came of it, and how often, must be what docs/architecture.md says, else the exit
status is 1. ``crowd`` takes some minutes on two cores, most of them for the starts of processes.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cse_autoloss.trial import Trial, TrialResult

RETRIES = 2
SECONDS = 10.0  # of a good trial, so that all workers have one at once
LIMIT = 12.0  # seconds of a trial that hangs
GOOD, HANGS, CRASHES, CRASHES_ONCE, KILLED_ONCE, HOGS = range(6)
NAMES = ("good", "hangs", "SIGSEGV", "SIGSEGV once", "SIGKILL once", "takes all memory")
#: Of a hundred trials, those that are no good ones.
MIX = {HANGS: 4, CRASHES: 4, CRASHES_ONCE: 6, KILLED_ONCE: 6}
LATE, NEVER = 4, 4  # of the workers that start first
HOG = 2 << 30  # bytes, above what the machine holds when it starts


class StressTrainer:
    """Does what a trial's seed says; see :class:`cse_autoloss.trial.Trainer`."""

    targets = ("none",)
    resolve = adopt = describe = versions = snippet = spaces = check = export = None

    @staticmethod
    def prepare(options: Mapping[str, Any]) -> bytes:
        return b""

    def __init__(self, options: Mapping[str, Any], prepared: bytes) -> None:
        self._folder = Path(options["folder"])
        place = _count(self._folder / "starts")
        if place <= options["never"]:
            time.sleep(3600)
        if place <= options["never"] + options["late"]:
            time.sleep(5)

    def train(
        self, trial: Trial, progress: Callable[[int, int], None] | None = None
    ) -> TrialResult:
        first = _count(self._folder / trial.key) == 1
        if trial.seed == HANGS:
            time.sleep(3600)
        if trial.seed == CRASHES or (trial.seed == CRASHES_ONCE and first):
            os.kill(os.getpid(), signal.SIGSEGV)
        if trial.seed == KILLED_ONCE and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.seed == HOGS:
            held = []
            while True:  # until Ray's monitor ends it
                held.append(bytearray(os.urandom(1 << 20)) * 64)
                time.sleep(0.05)
        time.sleep(SECONDS)
        return TrialResult(trial.key, 0.5, {"val/mAP": 0.5})


def _count(path: Path) -> int:
    """How often this was called for the path, this call included; for all processes."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, b"x")
        return os.lseek(handle, 0, os.SEEK_CUR)
    finally:
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("crowd", "memory"))
    parser.add_argument("--workers", type=int, default=40)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    if options.what == "crowd":
        kinds = [kind for kind, count in MIX.items() for _ in range(count)]
        kinds += [GOOD] * (100 - len(kinds))
        kinds = [kinds[37 * place % 100] for place in range(options.trials)]  # well mixed
        sys.exit(stress(kinds, options.workers, LATE, NEVER))
    import psutil

    memory = psutil.virtual_memory()
    os.environ["RAY_memory_usage_threshold"] = f"{(memory.used + HOG) / memory.total:.4f}"
    os.environ["RAY_memory_monitor_refresh_ms"] = "100"
    sys.exit(stress([GOOD, HOGS, GOOD], 1, 0, 0))


def stress(kinds: list[int], workers: int, late: int, never: int) -> int:
    """Run a trial of each kind; print what came of them.

    Returns:
        0, or 1 if something came of them that should not.
    """
    from cse_autoloss.cluster import Cluster  # here, and not in each worker
    from cse_autoloss.config import ClusterSection

    share = max(1e-4, int(1e4 * (os.cpu_count() or 1) / workers) / 1e4)
    section = ClusterSection(
        workers=workers, num_cpus=min(1.0, share), retries=RETRIES, start_limit=60
    )
    queue = [
        Trial(f"{place:04}", seed=kind, time_limit=LIMIT if kind == HANGS else None)
        for place, kind in enumerate(kinds)
    ]
    results: dict[str, TrialResult] = {}
    began, most = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        options = {"trainer": "stress_cluster:StressTrainer", "folder": folder}
        options |= {"late": late, "never": never}
        with Cluster(section, options, [str(Path(__file__).parent)]) as cluster:
            cluster.prepare()
            while len(results) < len(kinds):
                while queue and cluster.free > 0:
                    cluster.submit(queue.pop(0))
                results |= {result.key: result for result in cluster.wait()}
                most = max(most, len(cluster.running))
        seconds, driver = time.monotonic() - began, time.process_time()
        begun = {key: (Path(folder) / key).stat().st_size for key in results}
        starts = (Path(folder) / "starts").stat().st_size
    print(
        f"{len(kinds)} trials, {workers} workers, {most} of them busy at once; {starts} starts in "
        f"{seconds:.0f} s; driver {driver:.1f} s of CPU\n"
    )
    wrong = 0
    print("| trial | of these | begun | what came of it |\n|---|---|---|---|")
    for kind in sorted(set(kinds)):
        came = collections.Counter(
            (begun[key], results[key].failure or f"mAP {results[key].mAP}")
            for key in results
            if kinds[int(key)] == kind
        )
        for (count, what), number in sorted(came.items()):
            right = _right(kind, count, what)
            wrong += 0 if right else number
            said = what.split(". ")[0] + ("" if right else " (WRONG)")
            print(f"| {NAMES[kind]} | {number} | {count} | {said} |")
    return 1 if wrong else 0


def _right(kind: int, begun: int, what: str) -> bool:
    tries = RETRIES + 1
    if kind == HANGS:
        return begun == 1 and what == f"outlived its time limit of {LIMIT:g} s"
    if kind in (CRASHES, HOGS):
        fault = "OutOfMemoryError" if kind == HOGS else "ActorDiedError"
        return begun == tries and what.startswith(f"the machine failed it {tries} times: {fault}")
    return what == "mAP 0.5" and begun == (1 if kind == GOOD else 2)


if __name__ == "__main__":
    main()
