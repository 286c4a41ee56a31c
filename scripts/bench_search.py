"""What screening saves a search: its own candidates, and ones that nobody screened, trained alike.

    python scripts/bench_search.py RUN              # a finished run's folder: trains 60 unscreened
    python scripts/bench_search.py RUN --count 200  # goes on from there

Plain evolution trains whatever variation makes. Its candidates are drawn here as the run drew its
own: from the known losses that the run trained first, by the same operators, new in classification,
in regression or in both; but they are neither verified nor simulated. Each trains on the run's
proxy task, on a Ray cluster of its own, with the run's seed and settings. What is compared is the
detector training, in worker seconds and simulations included, that was spent for each new loss that
is as good as the tuned default; one with a known loss's gradients is not new. Results are kept
beside the journal, in unscreened.jsonl, a line each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cse_autoloss.cluster import Cluster
from cse_autoloss.config import Config, parse_config
from cse_autoloss.journal import Journal
from cse_autoloss.report import table as markdown
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.status import read_status
from cse_autoloss.strategies.base import Member
from cse_autoloss.strategies.evolution import Evolution
from cse_autoloss.trial import Trial, TrialResult

AS_GOOD = 0.005  # mAP: as good as the default is what is not further below it; seeds differ by more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=60, help="unscreened candidates")
    options = parser.parse_args()
    journal = Journal.read(options.run)
    config = parse_config(journal["config"])
    results = measure(journal, config, options.count, options.run / "unscreened.jsonl")
    print("\n".join(table(journal, config, results)))


def measure(journal: Journal, config: Config, count: int, path: Path) -> list[TrialResult]:
    """Train what the file does not hold yet."""
    finished = (
        [TrialResult.from_json(line) for line in path.read_text().splitlines()]
        if path.is_file()
        else []
    )
    done = {result.key for result in finished}
    queue = [trial for trial in trials(journal, config, count) if trial.key not in done]
    if queue:
        with Cluster(config.cluster, config.detector) as cluster:
            cluster.prepare(journal.prepared)
            running = len(queue)
            while running:
                while queue and cluster.free > 0:
                    cluster.submit(queue.pop(0))
                for result in cluster.wait():
                    running -= 1
                    finished.append(result)
                    with path.open("a") as file:
                        file.write(result.to_json() + "\n")
                    print(
                        result.key,
                        result.mAP if result.failure is None else result.failure,
                        flush=True,
                    )
    return finished


def trials(journal: Journal, config: Config, count: int) -> list[Trial]:
    """The first ``count`` candidates as the run's own proxy trainings."""
    model = journal.trials(Ladder.of(config.stages).fitness, finished=True)[0].trial
    return [
        replace(model, key=f"unscreened-{i}", losses=losses)
        for i, losses in zip(range(count), candidates(journal, config), strict=False)
    ]


def candidates(journal: Journal, config: Config) -> Iterator[dict[str, str]]:
    """Choices of losses without end: in one branch or all of them a loss that nobody screened, in
    the others a parent's."""
    spaces = {branch: load_space(journal["spaces"][branch]) for branch in config.search.branches}
    strategy, rng = Evolution(config.search), np.random.default_rng(config.seed)
    known = [Member(c.id, c.losses, c.fitness) for c in journal.trained() if c.known]
    patterns = [(branch,) for branch in spaces] + ([tuple(spaces)] if len(spaces) > 1 else [])
    seen: set[str] = set()
    while True:
        for new in patterns:
            losses = dict(strategy.partners(known, 1, rng)[0].losses) if known else {}
            for branch in new:
                fresh = None
                while fresh is None or fresh in seen:
                    offspring = strategy.ask(known, branch, spaces[branch], 10, rng).population
                    fresh = str(offspring.expression(int(rng.integers(len(offspring)))))
                seen.add(fresh)
                losses[branch] = fresh
            yield losses


def table(journal: Journal, config: Config, unscreened: list[TrialResult]) -> list[str]:
    """Markdown: what the trainings of both kinds came to."""
    default = read_status(journal).baseline["mAP"]
    repeats = set(repeated(journal, trials(journal, config, len(unscreened))))
    ladder = Ladder.of(config.stages)
    own = {c.id for c in journal.candidates() if not c.known}
    rows = journal.trials(ladder.fitness, finished=True)
    screened = [row.result for row in rows if row.candidate in own]
    before_it = journal.trials(*ladder.search[:-1], finished=True) if ladder.search[:-1] else []
    simulated = sum(row.result.seconds for row in before_it)
    header = (
        "candidates",
        "trained",
        "known again",
        "failed",
        "mAP, median",
        "best",
        "as good",
        "worker seconds",
        "for each as good",
    )
    rows = []
    for name, results, before in (
        ("screened", screened, simulated),
        ("unscreened", unscreened, 0.0),
    ):
        new = [result for result in results if result.key not in repeats]
        values = [result.mAP for result in new if result.mAP is not None]
        good = sum(value >= default - AS_GOOD for value in values)
        seconds = before + sum(result.seconds for result in results)
        each = f"{seconds / good:,.0f}" if good else f"more than {seconds:,.0f}"
        rows.append(
            (
                name,
                len(results),
                len(results) - len(new),
                len(new) - len(values),
                f"{statistics.median(values or [0]):.3f}",
                f"{max(values, default=0):.3f}",
                good,
                f"{seconds:,.0f}",
                each,
            )
        )
    return [
        *markdown(header, rows),
        "Columns from the fourth on are of new losses; seconds are of all. As good: "
        f"{default - AS_GOOD:.3f} mAP on val or more; the tuned default has {default:.3f}.",
    ]


def repeated(journal: Journal, drawn: list[Trial]) -> Iterator[str]:
    """Keys of the candidates that have, in every branch, the gradients of a known loss."""
    spaces = {branch: load_space(path) for branch, path in journal["spaces"].items()}
    known = {
        branch: set(fingerprint([loss.expression for loss in space.losses.values()], space))
        for branch, space in spaces.items()
    }
    for trial in drawn:
        if all(
            fingerprint([spaces[branch].expression(text)], spaces[branch])[0] in known[branch]
            for branch, text in trial.losses.items()
        ):
            yield trial.key


if __name__ == "__main__":
    main()
