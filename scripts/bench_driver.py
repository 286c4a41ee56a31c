"""What the driver of a search costs, and how busy it keeps its workers.

    python scripts/bench_driver.py journal     # reading the status, and writing a training down
    python scripts/bench_driver.py workers     # busy share of simulated workers

No detector trains here: workers are simulated, in virtual time that goes on by the CPU time that
the driver takes, too. Rounds of proposals are ready-made and take ``ROUND`` virtual seconds, as
those of a real run do in a process of their own (20,000 offspring in each of two branches).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cse_autoloss.branch import Sifted
from cse_autoloss.config import parse_config
from cse_autoloss.journal import FUNNEL, CandidateState, Journal, Survivor
from cse_autoloss.proposals import Proposal, Round
from cse_autoloss.runner import Job, TrialRunner
from cse_autoloss.search import Search
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.status import read_status
from cse_autoloss.trial import Trial, TrialResult

SPACES = {"cls": "two_stage_cls", "reg": "reg"}
ROUND = 3.5  # seconds
KEPT = 600  # survivors of a round, in each branch
SIZES = [100, 1_000, 10_000, 100_000]
WORKERS = [8, 64, 256, 1_000]
WAVES = 12  # trainings for each worker
FORMULA = "Neg(Dot(Y,Mul(Log(Softmax(X)),Add(1,Sin(Z)))))"
PROVENANCE = {f"package {place}": "1.2.3" for place in range(12)}
STAGES = {"full": {}, "final": {"best": 1, "seeds": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("journal", "workers"))
    parser.add_argument("--sizes", type=int, nargs="+", help="candidates, or workers")
    parser.add_argument("--seconds", type=float, nargs="+", default=[20.0, 600.0])
    options = parser.parse_args()
    if options.what == "journal":
        row(("candidates", "journal, MB", "status, ms", "a training, ms"))
        row(["---"] * 4)
        for size in options.sizes or SIZES:
            row(measure_journal(size))
        return
    row(("workers", "a training, s", "trainings", "driver, CPU ms for each", "busy share"))
    row(["---"] * 5)
    for seconds in options.seconds:
        for workers in options.sizes or WORKERS:
            row(measure_workers(workers, seconds))


def row(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def new_run(folder: str, trials: int) -> tuple[Journal, object]:
    config = parse_config({"budget": {"trials": trials}, "search": {"known": 2}, "stages": STAGES})
    meta = {"config": config.model_dump(mode="json"), "spaces": SPACES}
    return Journal.create(Path(folder) / "run", meta), config


def measure_journal(size: int) -> Sequence[object]:
    """Megabytes and milliseconds of CPU time, of a run with so many candidates."""
    with tempfile.TemporaryDirectory() as folder:
        journal, config = new_run(folder, 10**6)
        rng = np.random.default_rng(0)
        for start in range(0, size, 5_000):
            with journal.step():
                for place in range(start, min(start + 5_000, size)):
                    write_candidate(journal, place, rng)
        status = milliseconds(lambda: read_status(journal), 5)
        runner = TrialRunner(config, SPACES, journal, SimulatedCluster(trained(rng), 1))

        def one_training() -> None:
            (candidate,) = journal.waiting("full", 1) or [None]
            if candidate is None:
                with journal.step():
                    number = journal.add_candidate({"cls": FORMULA}, {"cls": "x"}, "new", "full")
                candidate = journal.candidate(number)
            trial = runner.trial("full", f"{candidate.id}-0", candidate.losses, 0)
            runner.start([Job("full", trial, candidate.id)])
            (outcome,) = runner.collect()
            with journal.step():
                runner.finish(outcome)
                journal.move(candidate.id, CandidateState.SCORED)
                journal.set_fitness(candidate.id, outcome.result.mAP, 1)

        each = milliseconds(one_training, 100)
        megabytes = sum(path.stat().st_size for path in (Path(folder) / "run").iterdir()) / 1e6
        return f"{size:,}", f"{megabytes:.0f}", f"{status:.1f}", f"{each:.2f}"


def write_candidate(journal: Journal, place: int, rng: np.random.Generator) -> None:
    """One that has been trained, as a run leaves it."""
    prints = {"cls": f"{place:016x}", "reg": f"{place:016x}"}
    losses = {"cls": FORMULA, "reg": "Sub(1,Div(I,U))"}
    number = journal.add_candidate(losses, prints, "mutation", "full", place // 8, {"cls": (1,)})
    trial = Trial(f"full-{number}-0", losses, SPACES, scale={"cls": 2.0, "reg": 1.0})
    journal.start_trial("full", trial, number)
    result = trained(rng)(trial)
    journal.finish_trial(result, 20.0, 20.0 * place)
    journal.move(number, CandidateState.SCORED)
    journal.set_fitness(number, result.mAP, 1)


def milliseconds(action: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        action()
    return 1000 * (time.process_time() - start) / times


def measure_workers(workers: int, seconds: float) -> Sequence[object]:
    """Busy share from the first round's arrival to the last training's start."""
    rng, trials = np.random.default_rng(0), max(1_000, WAVES * workers)
    spans: list[tuple[float, float]] = []

    def duration(trial: Trial) -> float:
        # Uneven: most between half and twice the mean, a few much longer.
        took = float(seconds * rng.lognormal(-0.125, 0.5))
        if trial.key.startswith("full"):
            spans.append((cluster.now, cluster.now + took))
        return took

    with tempfile.TemporaryDirectory() as folder:
        journal, config = new_run(folder, trials)
        cluster = SimulatedCluster(trained(rng), workers, duration, driver_time=True)
        breeder = ReadyBreeder(cluster)
        search = Search(config, SPACES, journal, cluster, breeder)
        start = time.process_time()
        search.run()
        each = 1000 * (time.process_time() - start) / trials
    first, last = breeder.first, max(begin for begin, _ in spans)
    busy = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in spans)
    return workers, f"{seconds:g}", trials, f"{each:.2f}", f"{busy / (last - first) / workers:.3f}"


def trained(rng: np.random.Generator) -> Callable[[Trial], TrialResult]:
    def train(trial: Trial) -> TrialResult:
        score = float(rng.uniform(0.2, 0.4))
        metrics = {f"{split}/mAP": score for split in trial.evaluate}
        curve = tuple((step, 1.0) for step in range(0, 250, 10))
        weights = {"cls": 1.0, "reg": 1.0}
        return TrialResult(trial.key, score, metrics, curve, weights, 20.0, 250, None, PROVENANCE)

    return train


class ReadyBreeder:
    """Rounds that are there ``ROUND`` virtual seconds after they were begun."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._request: tuple[int, int, float] | None = None
        self.first = 0.0  # when the first round was there

    @property
    def busy(self) -> bool:
        return self._request is not None

    def begin(self, number: int, count: int) -> None:
        self._request = number, count, self._cluster.now + ROUND

    def take(self, timeout: float = 0.0) -> Round | None:
        if self._request is None:
            return None
        number, count, ready = self._request
        self._cluster.now += max(0.0, min(timeout, ready - self._cluster.now))
        if self._cluster.now < ready:
            return None
        self._request, self.first = None, self.first or self._cluster.now
        return ready_round(number, count)

    def close(self) -> None:
        pass


def ready_round(number: int, count: int) -> Round:
    if not count:
        return Round(number, {})
    first = number * 2 * KEPT

    def sifted(branch: str, places: range) -> Sifted:
        survivors = [
            Survivor(
                *(first + place, branch, f"{FORMULA} {number} {place}", f"{number:08x}{place:08x}"),
                *(number, "mutation", (1, 2), np.zeros(384, np.float16)),
            )
            for place in places
        ]
        counts, reasons = dict.fromkeys(FUNNEL, KEPT), {"monotonicity": 4_000}
        return Sifted(counts, reasons, np.arange(4_600, dtype=np.uint64), survivors)

    proposals = [
        Proposal(
            {"cls": FORMULA, "reg": "Sub(1,Div(I,U))"},
            {"cls": f"{number}-{place}", "reg": f"{number}-{place}"},
            "mutation",
            {"cls": (1,), "reg": (2,)},
            (first + place % (2 * KEPT),),
        )
        for place in range(count)
    ]
    branches = {
        branch: sifted(branch, range(start, 2 * KEPT, 2))
        for start, branch in enumerate(("cls", "reg"))
    }
    return Round(number, {}, branches=branches, proposals=proposals)


if __name__ == "__main__":
    main()
