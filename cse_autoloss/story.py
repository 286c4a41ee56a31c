"""What a run is doing and why, in sentences: the same in the terminal and on the live page.

Everything said is read from the journal: the stage, the trainings that run, the order that the
ranker gave their candidates, and the standing that the last round of proposals left behind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cse_autoloss.canonical import named
from cse_autoloss.config import Config
from cse_autoloss.intervals import mean_interval
from cse_autoloss.journal import DEFAULT, FOUND, Journal, TrialRow
from cse_autoloss.space import load_space
from cse_autoloss.stages import REFERENCE, TUNE, Ladder, Stage

if TYPE_CHECKING:
    from cse_autoloss.status import Status

NAMED = 3  # losses in a sentence; of more, how many there are
SURE = 1.96  # deviations in half a 95% interval


def tell(journal: Journal, config: Config, status: Status) -> tuple[str, ...]:
    """A few sentences, the most important first."""
    ladder = Ladder.of(config.stages)
    if status.phase == "preparing":
        return (_preparing(journal),)
    if status.phase == "tuning":
        return (_tuning(config, status),)
    if status.phase == "searching":
        said = [*_training(journal, config, ladder), _standing(journal, status)]
        return tuple(sentence for sentence in said if sentence)
    if status.phase == "finished":
        return (f"All is done. {_compared(journal, status)}".rstrip(),)
    said = [_over(config, status), _closing(ladder, status)]
    if status.phase == ladder.comparison:
        said.append(_compared(journal, status))
    return tuple(sentence for sentence in said if sentence)


def _preparing(journal: Journal) -> str:
    if journal["prepared digest"]:
        return "The workers start and load the data."
    return (
        "The workers start; then what all trainings start from is made, once (or read from the "
        "cache)."
    )


def _tuning(config: Config, status: Status) -> str:
    done, _ = status.stages.get(TUNE, (0, 0))
    tuning = config.tuning
    wanted = tuning.repeats * (len(tuning.scales) + len(tuning.lr_scales))
    return (
        f"Tuning the default losses, {done} of {wanted} trainings done: whatever is found has to "
        "beat them at their best."
    )


def _training(journal: Journal, config: Config, ladder: Ladder) -> list[str]:
    """What the workers do, one sentence a kind."""
    kinds: Counter[str] = Counter()
    again = []
    for row in journal.trials(finished=False):
        if row.candidate is None:
            kinds[_reference(row, ladder)] += 1
            continue
        candidate = journal.candidate(row.candidate)
        task = _task(ladder.stages[row.stage])
        if candidate.trainings and row.stage == ladder.fitness:
            again.append(row.candidate)
        elif candidate.known:
            kinds[f"{task} with known losses, the first parents"] += 1
        elif row.stage != ladder.search[0]:
            kinds[f"{task} with the best of the stage before"] += 1
        elif candidate.predicted is None:
            kinds[f"{task} with new losses of which nothing is known yet"] += 1
        else:
            kinds[f"{task} with losses that the {config.search.ranker} ranks first"] += 1
    said = [f"Training {kind}." for kind in kinds]
    if again:
        numbers = listed([f"#{number}" for number in dict.fromkeys(again)])
        several = len(set(again)) > 1
        said.append(
            f"{numbers} {'train' if several else 'trains'} once more: one training can be luck."
        )
    return said or ["Growing and screening the next losses; no training runs."]


def _reference(row: TrialRow, ladder: Ladder) -> str:
    where = ladder.fitness if row.stage == REFERENCE else row.stage
    stage = ladder.stages.get(where)
    return f"{_task(stage) if stage else 'detectors'} with the tuned default, to compare with"


def _task(stage: Stage) -> str:
    return {"tiny": "on the tiny set", "head": "heads", "full": "whole detectors"}[stage.task]


def _standing(journal: Journal, status: Status) -> str:
    """Who leads, by how much, and whether that is settled."""
    standing: dict[str, Any] | None = journal["standing"]
    if not standing or not status.baseline:
        return ""
    leader = f"#{int(standing['leader'])}"
    ahead = standing["mAP"] - status.baseline["mAP"]
    error = math.hypot(standing["deviation"], standing["noise"] / math.sqrt(status.references))
    sentence = f"{leader} {_lead(ahead, SURE * error)}"
    rivals = [f"#{int(number)}" for number in standing["rivals"]]
    if rivals:
        why = "the race goes on because " if standing["raced"] else ""
        return f"{sentence}; {why}{listed([leader, *rivals])} cannot be told apart."
    if standing["trained"] > 1:
        return f"{sentence}; none of the others that have trained is likely to overtake it."
    return f"{sentence}."


def _lead(ahead: float, half: float) -> str:
    """``leads the default by 0.8 ± 0.5 points``, hundredths of mAP."""
    spread = f" ± {100 * half:.1f}" if math.isfinite(half) else ""
    if ahead < 0:
        return f"is {-100 * ahead:.1f}{spread} points behind the default"
    return f"leads the default by {100 * ahead:.1f}{spread} points"


def _over(config: Config, status: Status) -> str:
    done, allowed = status.trials
    if not allowed:
        return ""
    if status.stopped:
        return f"The search is over: {status.stopped}."
    if done >= allowed:
        return f"The search is over: its {allowed} trainings are done."
    return f"The search is over: its time is spent, after {done} trainings."


def _closing(ladder: Ladder, status: Status) -> str:
    stage = ladder.stages[status.phase]
    done, _ = status.stages.get(status.phase, (0, 0))
    seeds = f"{stage.seeds} seed{'s' * (stage.seeds > 1)} that nothing was chosen by"
    if status.phase != ladder.comparison:
        return (
            f"The best {stage.best} train again ({_task(stage)}) on {seeds}, because the best of "
            f"many are the luckiest, too: {done} trainings are done."
        )
    labels = [row.label for row in status.comparison if row.label != DEFAULT]
    return (
        f"Comparing {listed(labels) or 'the best'} with the tuned default ({_task(stage)}) on "
        f"{seeds}: {done} trainings are done."
    )


def _compared(journal: Journal, status: Status) -> str:
    """How the best found loss does in the comparison, as far as it has come."""
    best = next((row for row in status.comparison if row.label.startswith(FOUND)), None)
    if best is None or not best.gain:
        return ""
    interval = mean_interval(best.gain)
    seeds = f"{interval.n} seed{'s' * (interval.n > 1)}"
    spaces = {branch: load_space(journal["spaces"][branch]) for branch in best.losses}
    known = named(best.losses, spaces)
    label = f"{best.label} ({known}, known before)" if known else best.label
    sentence = f"{label} {_lead(interval.mean, interval.half)} on test, over {seeds}"
    if interval.n == 1:
        return f"{sentence}, which says nothing of luck."
    if math.isfinite(interval.half) and not interval.above_zero and interval.high > 0:
        return f"{sentence}: that may be luck."
    return f"{sentence}."


def listed(names: Sequence[str]) -> str:
    """``a, b and c``, or ``a, b, c and 4 others``."""
    shown, more = list(names[:NAMED]), len(names) - NAMED
    if more > 0:
        shown.append(f"{more} other{'s' * (more > 1)}")
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)
