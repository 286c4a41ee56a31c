"""How a run stands, read from its journal: the same for the live display, ``status``, ``report``
and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cse_autoloss.config import Config, parse_config
from cse_autoloss.intervals import mean_interval
from cse_autoloss.journal import DEFAULT, FOUND, CandidateState, Journal, TrialRow
from cse_autoloss.run_folder import is_driven
from cse_autoloss.stages import REFERENCE, TUNE, Ladder
from cse_autoloss.story import tell

RECENT = 1000  # trainings that the rate is told by


@dataclass(frozen=True)
class Compared:
    """One row of the final comparison. A training that failed counts as mAP 0.

    Attributes:
        val, test: mAP, a number a seed; none on a split that the comparison does not measure.
        gain: mAP on test over the default losses' with the same seed, a number a seed that both
            have.
        failures: reasons of the trainings that failed.
    """

    label: str
    losses: Mapping[str, str]
    val: tuple[float, ...]
    test: tuple[float, ...]
    gain: tuple[float, ...]
    failures: tuple[str, ...]

    @property
    def measured(self) -> tuple[float, ...]:
        """mAP on val, or on test where that alone is measured."""
        return self.val or self.test


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        phase: preparing, tuning, searching, the name of a stage after the search, or finished.
        funnel: branch to counts of expressions: generated, unique, verified, optimised (they
            optimise predictions), distinct (with gradients that no earlier candidate has).
        stages: stage to (finished trainings, failed ones).
        trained, failed: candidates (choices of losses for all searched branches) that have a mAP
            at the search's last stage, or failed there.
        waiting: candidates that were chosen and wait for a training.
        trials: (done, allowed) trainings at the search's last stage.
        running: keys of the trials that run, with their seconds so far; none where no driver does.
        trials_per_hour: of these trainings, the latest, while a driver was at it; None before the
            first few.
        seconds_left: estimate until these trainings are done, or None before the first ones.
        fitness: the search's last stage, whose mAP on val the next two are.
        references: trainings that ``baseline``'s mAP is the mean of.
        baseline: mAP of the tuned default loss, and its loss-weight scales and learning-rate scale.
        best: of the found candidates: id, losses, mAP (the mean of its trainings).
        comparison: the final table, as far as it has come.
        stopped: why the search ended before its budget, or None.
        story: what the run is doing and why, in sentences.
    """

    folder: str
    phase: str
    funnel: Mapping[str, Mapping[str, Any]]
    stages: Mapping[str, tuple[int, int]]
    trained: int
    failed: int
    waiting: int
    trials: tuple[int, int]
    running: tuple[tuple[str, float], ...]
    trials_per_hour: float | None
    seconds_left: float | None
    fitness: str
    references: int
    baseline: Mapping[str, Any] | None
    best: Mapping[str, Any] | None
    comparison: tuple[Compared, ...]
    stopped: str | None = None
    story: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_status(journal: Journal) -> Status:
    """Read how the run stands now."""
    config = parse_config(journal["config"])
    ladder = Ladder.of(config.stages)
    counts, tuned = journal.counts(), journal["tuned"]
    stages = {name: counts[name] for name in (TUNE, *ladder.stages) if name in counts}
    done = stages.get(ladder.fitness, (0, 0))[0]
    rate, left = _pace(journal, config, ladder.fitness, done)
    best = next(iter(journal.best(ladder.closing, 1)), None)
    reference = [row.result.mAP or 0.0 for row in journal.trials(REFERENCE) if row.result]
    tuning = journal.scores_with(TUNE, **tuned) if tuned else {}
    measured = reference if ladder.needs_reference else list(tuning.values())
    now = time.time()
    status = Status(
        folder=str(journal.folder),
        phase=_phase(journal, ladder, stages),
        funnel=journal["funnel"] or {},
        stages=stages,
        trained=journal.count_trained(),
        failed=journal.count(CandidateState.FAILED),
        waiting=journal.count(CandidateState.WAITING),
        trials=(done, config.budget.trials),
        running=tuple(
            (row.trial.key, max(0.0, now - row.started)) for row in journal.trials(finished=False)
        )
        if is_driven(journal.folder)  # one that was killed leaves trials behind
        else (),
        trials_per_hour=rate,
        seconds_left=left,
        fitness=ladder.fitness,
        references=max(len(measured), 1),
        baseline={"mAP": sum(measured) / len(measured), **tuned} if tuned and measured else None,
        best={
            "id": best.id,
            "losses": dict(best.losses),
            "mAP": best.fitness,
        }
        if best
        else None,
        comparison=read_comparison(journal),
        stopped=journal["stopped"],
    )
    return replace(status, story=tell(journal, config, status))


def _phase(journal: Journal, ladder: Ladder, stages: Mapping[str, tuple[int, int]]) -> str:
    if journal["searched"]:
        begun = [stage for stage in ladder.closing if stage in stages]
        return "finished" if journal["compared"] else begun[-1] if begun else ladder.closing[0]
    return "searching" if journal["tuned"] else "tuning" if TUNE in stages else "preparing"


def _pace(
    journal: Journal, config: Config, stage: str, done: int
) -> tuple[float | None, float | None]:
    """Trainings an hour at a stage, and the seconds until the search is over."""
    ended = journal.ended(stage, RECENT)
    if len(ended) < 3 or ended[0] == ended[-1]:
        return None, None
    rate = 3600 * (len(ended) - 1) / (ended[0] - ended[-1])
    if journal["searched"]:
        return rate, 0.0
    left = max(config.budget.trials - done, 0) / rate * 3600
    if config.budget.minutes:
        gone = (journal["driven"] or 0.0) - (journal["driver began"] or 0.0)
        left = max(0.0, min(left, 60 * config.budget.minutes - gone))
    return rate, left


def read_comparison(journal: Journal) -> tuple[Compared, ...]:
    """The final table: default first, then losses that were not searched, then what was found, best
    mean on val first (on test, where that alone is measured)."""
    stage = Ladder.of(parse_config(journal["config"]).stages).comparison
    groups: dict[str, list[TrialRow]] = {}
    for row in journal.trials(stage):
        groups.setdefault(row.label or "", []).append(row)
    default = _by_seed(groups.get(DEFAULT, []), "test")
    table = []
    for label, rows in groups.items():
        test = _by_seed(rows, "test")
        shared = [seed for seed in test if seed in default and label != DEFAULT]
        table.append(
            Compared(
                label,
                dict(rows[0].trial.losses),
                val=tuple(_by_seed(rows, "val").values()),
                test=tuple(test.values()),
                gain=tuple(test[seed] - default[seed] for seed in shared),
                failures=tuple(
                    row.result.failure for row in rows if row.result and row.result.failure
                ),
            )
        )

    def place(row: Compared) -> tuple[int, float]:
        return (
            0 if row.label == DEFAULT else 2 if row.label.startswith(FOUND) else 1,
            -mean_interval(row.measured).mean if row.measured else 0.0,
        )

    return tuple(sorted(table, key=place))


def _by_seed(rows: list[TrialRow], split: str) -> dict[int, float]:
    return {
        row.trial.seed: row.result.metrics.get(f"{split}/mAP", 0.0)
        if row.result.mAP is not None
        else 0.0
        for row in rows
        if row.result and split in row.trial.evaluate
    }
