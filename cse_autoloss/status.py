"""How a run stands, read from its journal: the same for the live display, ``status``, ``report``
and programs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cse_autoloss.config import parse_config
from cse_autoloss.journal import DEFAULT, FOUND, Fate, Journal

STAGES = ("generated", "unique", "verified", "optimised", "distinct")


@dataclass(frozen=True)
class Compared:
    """One row of the final comparison.

    Attributes:
        val, test: mAP, a number a seed.
        gain: mAP on test over the default losses' with the same seed, a number a seed that both
            have.
    """

    label: str
    losses: Mapping[str, str]
    val: tuple[float, ...]
    test: tuple[float, ...]
    gain: tuple[float, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        phase: preparing, tuning, searching, confirming, comparing, or finished.
        funnel: branch to counts of expressions: generated, unique, verified, optimised (they
            optimise predictions), distinct (with gradients that no earlier candidate has).
        simulated, trained, failed: counts of candidates (choices of losses for all searched
            branches).
        trials: (done, allowed) proxy trainings.
        running: keys of the trials that run, with their seconds so far.
        trials_per_hour: proxy trainings, by the wall-clock of the driver that is at it (or was,
            last), or None before its first.
        seconds_left: estimate until the proxy trainings are done, or None before the first ones.
        baseline: mAP on val of the tuned default loss, and its loss-weight scales and learning-rate
            scale.
        best: of the found candidates: id, losses, mAP (of its confirmation's mean, where it has
            been confirmed).
        comparison: the final table, as far as it has come.
    """

    folder: str
    phase: str
    funnel: Mapping[str, Mapping[str, int]]
    simulated: int
    trained: int
    failed: int
    equivalent: int
    trials: tuple[int, int]
    running: tuple[tuple[str, float], ...]
    trials_per_hour: float | None
    seconds_left: float | None
    baseline: Mapping[str, Any] | None
    best: Mapping[str, Any] | None
    comparison: tuple[Compared, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_status(journal: Journal) -> Status:
    """Read how the run stands now."""
    config = parse_config(journal["config"])
    now = time.time()
    proxies = journal.trials("full")
    done = [row for row in proxies if row.result]
    counts = Counter(candidate.fate for candidate in journal.candidates())
    comparison = read_comparison(journal)
    rate = left = None
    # A run may have stood still between two drivers: the rate is this driver's.
    since = max(journal["driver started"] or 0, min((row.started for row in proxies), default=0))
    if recent := [row for row in done if row.finished > since]:
        rate = 3600 * len(recent) / (max(row.finished for row in recent) - since)
        left = (
            0.0 if journal["searched"] else max(config.budget.trials - len(done), 0) / rate * 3600
        )
        if config.budget.minutes and not journal["searched"]:
            left = max(0.0, min(left, journal["driver started"] + 60 * config.budget.minutes - now))
    tuned = journal["tuned"]
    if journal["searched"]:
        phase = (
            "finished"
            if journal["compared"]
            else "comparing"
            if journal.trials("final")
            else "confirming"
        )
    else:
        phase = "searching" if tuned else "tuning" if journal.trials("tune") else "preparing"
    best = next(iter(journal.found()), None)
    return Status(
        folder=str(journal.folder),
        phase=phase,
        funnel=journal["funnel"] or {},
        simulated=len([row for row in journal.trials("tiny", finished=True)]),
        trained=counts[Fate.TRAINED],
        failed=counts[Fate.FAILED],
        equivalent=counts[Fate.EQUIVALENT],
        trials=(len(done), config.budget.trials),
        running=tuple((row.trial.key, now - row.started) for row in journal.trials(finished=False)),
        trials_per_hour=rate,
        seconds_left=left,
        baseline={
            "mAP": max(row.result.mAP or 0 for row in journal.trials("tune", finished=True)),
            **tuned,
        }
        if tuned
        else None,
        best={
            "id": best.id,
            "losses": dict(best.losses),
            "mAP": best.fitness if best.confirmed is None else best.confirmed,
        }
        if best
        else None,
        comparison=comparison,
    )


def read_comparison(journal: Journal) -> tuple[Compared, ...]:
    """The final table: default first, then losses that were not searched, then what was found, best
    mean on val first."""
    groups: dict[str, list[Any]] = {}
    measured: dict[str, dict[int, Mapping[str, float]]] = {}  # label to seed to metrics
    for row in journal.trials("final"):
        groups.setdefault(row.label, []).append(row)
        if row.result and row.result.mAP is not None:
            measured.setdefault(row.label, {})[row.trial.seed] = row.result.metrics
    default = measured.get(DEFAULT, {})

    def values(label: str, split: str) -> tuple[float, ...]:
        return tuple(metrics[f"{split}/mAP"] for metrics in measured.get(label, {}).values())

    table = [
        Compared(
            label,
            dict(rows[0].trial.losses),
            values(label, "val"),
            values(label, "test"),
            gain=tuple(
                metrics["test/mAP"] - default[seed]["test/mAP"]
                for seed, metrics in measured.get(label, {}).items()
                if seed in default and label != DEFAULT
            ),
            failures=tuple(row.result.failure for row in rows if row.result and row.result.failure),
        )
        for label, rows in groups.items()
    ]

    def place(row: Compared) -> tuple[int, float]:
        return (
            0 if row.label == DEFAULT else 2 if row.label.startswith(FOUND) else 1,
            -statistics.mean(row.val) if row.val else 0.0,
        )

    return tuple(sorted(table, key=place))
