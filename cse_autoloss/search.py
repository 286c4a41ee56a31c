"""The search: the loop that ties the rooms together.

    prepare -> tune the default loss -> evolve until the budget is spent -> confirm the fittest ->
    compare on fresh seeds

The journal is the loop's memory: what is to be done next is read from it, and each step is written
to it before the next one begins. So a run that was killed goes on where it stood.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cse_autoloss import evolution
from cse_autoloss.canonical import canonical
from cse_autoloss.cluster import Cluster
from cse_autoloss.config import Config
from cse_autoloss.evolution import Member, State
from cse_autoloss.expression import ExpressionError
from cse_autoloss.journal import DEFAULT, FOUND, KNOWN, Candidate, Fate, Journal, found_label
from cse_autoloss.screening import Screener
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.screener import BATCH_SIZE
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.trial import ConfigError, Trial, TrialResult

RELEASED = "CSE-Autoloss"  # the known loss of this name in the detector's cls space is compared with at the end
CONFIRM_SEEDS, FINAL_SEEDS = (
    1000,
    2000,
)  # from the search's seed on: confirmation's and comparison's are nobody else's
MAX_BARREN_ROUNDS = 50
MEASURING_TEST = 1.25  # a final trial measures test beside val


class SearchError(RuntimeError):
    """The search cannot go on: what happened, and what to change."""


class Search:
    """One run. ``watch`` is called every second or so, to show how it stands."""

    def __init__(
        self,
        config: Config,
        spaces: Mapping[str, str],
        journal: Journal,
        cluster: Cluster,
        watch: Callable[[list[Any]], None] = lambda running: None,
    ) -> None:
        self._config, self._journal, self._cluster, self._watch = config, journal, cluster, watch
        self._origins = dict(spaces)
        self._spaces = {branch: load_space(spaces[branch]) for branch in config.search.branches}
        self._screeners = {
            branch: self._screener(branch, space) for branch, space in self._spaces.items()
        }
        state = journal["evolution"]
        self._state = State.from_json(state) if state else State.initial(config.seed)
        self._tuned: dict[str, Any] = {}
        # Branch to fingerprint to the expression that stands for all with these gradients.
        self._names = {
            branch: {
                self._fingerprint({branch: name})[branch]: str(loss.expression)
                for name, loss in space.losses.items()
            }
            for branch, space in self._spaces.items()
        }
        for candidate in journal.candidates():
            self._name(candidate.fingerprint, candidate.losses)
        self._deadline = (
            time.monotonic() + 60 * config.budget.minutes if config.budget.minutes else None
        )

    def run(self) -> None:
        """Do all that is still to be done.

        Raises:
            ClusterError: if workers do not start.
            SearchError: if the default loss does not train, or no candidate ever survives.
        """
        self._watch([])
        self._journal.prepared = self._cluster.prepare(self._journal.prepared)
        for row in self._journal.trials(finished=False):  # in flight when the run was last stopped
            with self._journal.step():
                self._journal.restart_trial(row.trial.key)
            self._cluster.submit(row.trial)
        self._tune()
        if not self._journal["searched"]:
            self._evolve()
        self._confirm()
        self._compare()

    # --- phases ---

    def _tune(self) -> None:
        """Train the default loss at each loss-weight scale, then at each learning rate; the best on
        val is the baseline."""
        tuning = self._config.tuning
        self._do_all(
            "tune",
            [
                (
                    f"scale {cls:g}, {reg:g}",
                    None,
                    self._trial(f"tune-{cls:g}-{reg:g}", {}, scale={"cls": cls, "reg": reg}),
                )
                for cls, reg in tuning.scales
            ],
        )
        best = self._best_tuned()
        self._tuned = {"scale": best.scale, "lr_scale": 1.0}
        if tuning.lr_scales:
            self._do_all(
                "tune",
                [
                    (f"learning rate {lr:g}", None, self._trial(f"tune-lr-{lr:g}", {}, lr_scale=lr))
                    for lr in tuning.lr_scales
                ],
            )
            best = self._best_tuned()
        self._tuned = {"scale": best.scale, "lr_scale": best.lr_scale}
        with self._journal.step():
            self._journal["tuned"] = {"scale": dict(best.scale), "lr_scale": best.lr_scale}

    def _best_tuned(self) -> Trial:
        rows = self._journal.trials("tune", finished=True)
        good = [row for row in rows if row.result.mAP is not None]
        if not good:
            raise SearchError(
                f"the detector's default loss does not train: {rows[0].result.failure}"
            )
        return max(good, key=lambda row: row.result.mAP).trial

    def _evolve(self) -> None:
        self._sow()
        barren = 0
        while True:
            while self._cluster.free > 0 and (job := self._next()):
                self._cluster.submit(job)
            if self._spent():
                if not self._journal.trials(finished=False):
                    break
            elif (
                not self._journal.count(Fate.PROMOTED)
                and self._journal.count(Fate.SURVIVED) < self._cluster.size
            ):
                barren = (
                    0 if self._breed() else barren + 1
                )  # while the workers train: the next ones are ready in time
                if barren == MAX_BARREN_ROUNDS:
                    raise SearchError(
                        f"{barren} rounds of {self._config.search.offspring} offspring left no survivor: "
                        "raise search.offspring, or widen the space's tolerances"
                    )
                if self._cluster.free > 0:
                    continue
            self._collect()
        with self._journal.step():
            self._journal["searched"] = True

    def _confirm(self) -> None:
        """The fittest by one training train again on seeds of their own; the best by their mean
        take part in the comparison."""
        settings, found = self._config.confirm, self._journal.found()
        fittest = sorted(found, key=lambda candidate: -candidate.fitness)[: settings.candidates]
        self._do_all(
            "confirm",
            [
                (
                    found_label(candidate),
                    candidate.id,
                    self._trial(
                        f"confirm-{candidate.id}-{seed}",
                        candidate.losses,
                        seed=self._config.seed + CONFIRM_SEEDS + seed,
                    ),
                )
                for seed in range(settings.seeds)
                for candidate in fittest
            ],
        )

    def _compare(self) -> None:
        """Default, released, those asked for and best found, each trained on the same fresh seeds,
        measured on val and test."""
        entries: dict[str, tuple[int | None, Mapping[str, str]]] = {DEFAULT: (None, {})}
        released = next(
            (name for name in load_space(self._origins["cls"]).losses if name.startswith(RELEASED)),
            None,
        )
        if all(released in space.losses for space in self._spaces.values()):
            entries[released] = (
                None,
                {
                    branch: str(space.losses[released].expression)
                    for branch, space in self._spaces.items()
                },
            )
        for label, losses in compared_besides(self._config, self._origins).items():
            entries[label] = None, losses
        for candidate in self._journal.found()[: self._config.final.candidates]:
            entries[found_label(candidate)] = candidate.id, candidate.losses
        self._do_all(
            "final",
            [
                (
                    label,
                    candidate,
                    self._trial(
                        f"final-{label}-{seed}",
                        losses,
                        evaluate=("val", "test"),
                        seed=self._config.seed + FINAL_SEEDS + seed,
                    ),
                )
                for seed in range(self._config.final.seeds)
                for label, (candidate, losses) in entries.items()
            ],
        )
        with self._journal.step():
            self._journal["compared"] = True

    # --- the pipeline of candidates ---

    def _sow(self) -> None:
        """The first candidates: known losses, straight to the proxy task."""
        if self._journal["sown"]:
            return
        with self._journal.step():
            self._journal["sown"] = True
            if not self._config.search.from_scratch:
                for names, losses in _known(self._spaces)[: self._config.search.known]:
                    self._journal.add_candidate(
                        losses, self._fingerprint(losses), f"{KNOWN}{names}", 0, Fate.PROMOTED
                    )

    def _next(self) -> Trial | None:
        """The next training: a promoted candidate's, else a survivor's on the tiny set. None if
        none waits."""
        if self._spent():
            return None
        self._promote()
        if waiting := self._journal.candidates(Fate.PROMOTED):
            return self._launch("full", waiting[0], Fate.TRAINING)
        if waiting := self._journal.candidates(Fate.SURVIVED):
            return self._launch("tiny", waiting[0], Fate.SIMULATING, task="tiny")
        return None

    def _spent(self) -> bool:
        if (
            self._journal.count(Fate.TRAINING, Fate.TRAINED, Fate.FAILED)
            >= self._config.budget.trials
        ):
            return True
        # However slow the machine, a run ends with a loss of its own.
        late = self._deadline is not None and time.monotonic() + self._reserve() > self._deadline
        return late and bool(self._journal.found())

    def _reserve(self) -> float:
        """Seconds that a training which starts now and what comes after the search will take, by
        the trainings so far."""
        confirm, final = self._config.confirm, self._config.final
        trainings = (
            confirm.seeds * confirm.candidates,
            final.seeds * (2 + len(final.others) + final.candidates),
        )
        waves = 1 + sum(math.ceil(count / self._cluster.size) for count in trainings)
        return (
            waves
            * statistics.mean(self._journal.durations("tune", "full", last=10))
            * MEASURING_TEST
        )

    def _launch(self, kind: str, candidate: Candidate, fate: str, **options: Any) -> Trial:
        trial = self._trial(f"{kind}-{candidate.id}", candidate.losses, **options)
        with self._journal.step():
            self._journal.move(candidate.id, fate)
            self._journal.start_trial(kind, trial, candidate.id)
        return trial

    def _promote(self) -> None:
        """Once a round's worth has trained on the tiny set, its best go on to the proxy task."""
        settings = self._config.search
        simulated = self._journal.candidates(Fate.SIMULATED)
        if len(simulated) < settings.simulations:
            return
        simulated.sort(key=lambda candidate: -candidate.simulated)
        with self._journal.step():
            for place, candidate in enumerate(simulated):
                if place < settings.promoted:
                    self._journal.move(candidate.id, Fate.PROMOTED)
                else:
                    self._journal.move(
                        candidate.id,
                        Fate.DROPPED,
                        f"mAP {candidate.simulated:.3f} on the tiny set, place "
                        f"{place + 1} of {len(simulated)}; the first {settings.promoted} go on",
                    )

    def _breed(self) -> int:
        """One round: offspring of the population, screened, simulated on predictions; survivors
        become candidates.

        Returns:
            How many candidates the round made.
        """
        settings, state = self._config.search, self._state
        number = (self._journal["round"] or 0) + 1
        funnel: dict[str, Counter] = {
            branch: Counter(self._funnel().get(branch, {})) for branch in self._spaces
        }
        fresh: dict[str, list[str]] = {}
        fates: dict[str, list[tuple[str, str]]] = {}
        for branch, space in self._spaces.items():
            offspring, state = evolution.ask(state, settings.offspring, branch, space, settings)
            report = self._screeners[branch].screen(offspring)
            survivors = report.survivors
            outcomes = simulate_predictions(survivors, space, seed=self._config.seed)
            passed = sorted(
                (canonical(e, space) for e, o in zip(survivors, outcomes) if o.passed),
                key=lambda e: e.size,
            )
            distinct: dict[str, str] = {}
            for gradients, expression in zip(fingerprint(passed, space), passed):
                if gradients not in self._names[branch]:
                    distinct.setdefault(gradients, str(expression))
            fates[branch] = [
                *report.fates(),
                *(
                    (str(e), "passed" if o.passed else f"simulation: {o.reason}")
                    for e, o in zip(survivors, outcomes)
                ),
            ]
            funnel[branch].update(
                generated=report.generated,
                unique=report.unique,
                verified=len(survivors),
                optimised=len(passed),
                distinct=len(distinct),
            )
            rng = evolution.generator(state)
            texts = list(distinct.values())
            fresh[branch] = [texts[i] for i in rng.permutation(len(texts))]
            state = replace(state, random=rng.bit_generator.state)
        pairs, state = self._pair(fresh, state)
        with self._journal.step():
            self._journal["round"] = number
            self._journal["funnel"] = funnel
            for branch, rows in fates.items():
                self._journal.add_expressions(branch, number, rows)
                self._journal[f"seen {branch}"] = self._screeners[branch].seen.to_json()
            for losses in pairs:
                self._enter(losses, number)
            self._journal["evolution"] = state.to_json()
        self._state = state
        return len(pairs)

    def _pair(
        self, fresh: Mapping[str, list[str]], state: State
    ) -> tuple[list[dict[str, str]], State]:
        """A round's candidates: new losses in one branch or in all, what is left from a parent; or
        two parents' crossed."""
        pairs: list[dict[str, str]] = []
        patterns = [(branch,) for branch in fresh] + ([tuple(fresh), ()] if len(fresh) > 1 else [])
        while len(pairs) < self._config.search.simulations:
            fitting = [
                new
                for new in patterns
                if all(fresh[branch] for branch in new) and (new or len(state.members) > 1)
            ]
            if not any(fitting):
                break
            new = fitting[len(pairs) % len(fitting)]
            losses: dict[str, str] = {}
            for branch in fresh:  # each branch's parent is drawn anew
                parent, state = evolution.partner(state, self._config.search)
                losses |= (
                    {branch: parent.losses[branch]} if parent and branch in parent.losses else {}
                )
            pairs.append(losses | {branch: fresh[branch].pop() for branch in new})
        return pairs, state

    def _enter(self, losses: Mapping[str, str], number: int) -> None:
        """Write a candidate down. The same loss as an earlier one in all but form takes that one's
        fitness."""
        prints = self._fingerprint(losses)
        self._name(prints, losses)
        if twin := self._journal.candidate_like(prints):
            self._journal.add_candidate(
                losses,
                prints,
                "offspring",
                number,
                Fate.EQUIVALENT,
                f"the same gradients as #{twin.id}",
                twin.fitness,
            )
        else:
            self._journal.add_candidate(losses, prints, "offspring", number, Fate.SURVIVED)

    # --- trials ---

    def _trial(self, key: str, losses: Mapping[str, str], **options: Any) -> Trial:
        settings = {
            "seed": self._config.seed,
            "time_limit": self._config.cluster.time_limit,
            **self._tuned,
            **options,
        }
        return Trial(
            key, dict(losses), {branch: self._origins[branch] for branch in losses}, **settings
        )

    def _do_all(self, kind: str, trials: Iterable[tuple[str, int | None, Trial]]) -> None:
        """Train all that the journal does not hold yet, given as (label, candidate, trial); wait
        until all have finished."""
        known = {row.trial.key for row in self._journal.trials(kind)}
        queue = [entry for entry in trials if entry[-1].key not in known]
        while queue or self._journal.trials(kind, finished=False):
            while queue and self._cluster.free > 0:
                label, candidate, trial = queue.pop(0)
                with self._journal.step():
                    self._journal.start_trial(kind, trial, candidate, label)
                self._cluster.submit(trial)
            self._collect()

    def _collect(self) -> None:
        for result in self._cluster.wait():
            self._record(result)
        self._watch(self._cluster.running)

    def _record(self, result: TrialResult) -> None:
        kind, _, identity = result.key.partition("-")
        with self._journal.step():
            self._journal.finish_trial(result)
            if kind == "tiny":
                if result.mAP:
                    self._journal.move(int(identity), Fate.SIMULATED, simulated=result.mAP)
                else:
                    self._journal.move(
                        int(identity),
                        Fate.DROPPED,
                        f"tiny set: {result.failure or 'mAP 0 on it'}",
                        simulated=result.mAP,
                    )
            elif kind == "full" and result.mAP is None:
                self._journal.move(int(identity), Fate.FAILED, result.failure)
            elif kind == "full":
                self._journal.move(int(identity), Fate.TRAINED, fitness=result.mAP)
                member = Member(self._journal.candidate(int(identity)).losses, result.mAP)
                self._state = evolution.tell(self._state, member, self._config.search)
                self._journal["evolution"] = self._state.to_json()

    # --- helpers ---

    def _screener(self, branch: str, space: SearchSpace) -> Screener:
        return Screener(
            space,
            batch_size=self._config.search.batch_size or BATCH_SIZE,
            seen=self._journal[f"seen {branch}"],
        )

    def _fingerprint(self, losses: Mapping[str, str]) -> dict[str, str]:
        return {
            branch: fingerprint([self._spaces[branch].expression(text)], self._spaces[branch])[0]
            for branch, text in losses.items()
        }

    def _name(self, prints: Mapping[str, str], losses: Mapping[str, str]) -> None:
        for branch, text in losses.items():
            self._names[branch].setdefault(prints[branch], text)

    def _funnel(self) -> dict[str, dict[str, int]]:
        return self._journal["funnel"] or {}


def compared_besides(config: Config, spaces: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """``final.others`` with expressions in the place of names.

    Raises:
        ConfigError: for a name that stands for something else, or text that is no loss.
    """
    resolved: dict[str, dict[str, str]] = {}
    for label, losses in config.final.others.items():
        if label.startswith((DEFAULT, RELEASED, FOUND)):
            raise ConfigError(
                f"final.others.{label}: names that start with {DEFAULT}, {RELEASED} or {FOUND} stand for what "
                "takes part anyway; choose another"
            )
        resolved[label] = {}
        for branch, text in losses.items():
            try:
                resolved[label][branch] = str(load_space(spaces[branch]).expression(text))
            except ExpressionError as error:
                raise ConfigError(f"final.others.{label}.{branch}: {error}") from None
    return resolved


def _known(spaces: Mapping[str, SearchSpace]) -> list[tuple[str, dict[str, str]]]:
    """Known losses, or pairs of them: first those that were released together, then each with
    each."""
    first, *rest = [
        [{branch: loss} for loss in space.losses.values()] for branch, space in spaces.items()
    ]
    entries = [entry | other for entry in first for other in rest[0]] if rest else first
    entries.sort(key=lambda entry: len({loss.name for loss in entry.values()}))
    return [
        (
            " + ".join(dict.fromkeys(loss.name for loss in entry.values())),
            {branch: str(loss.expression) for branch, loss in entry.items()},
        )
        for entry in entries
    ]
