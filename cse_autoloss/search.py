"""The search: the algorithm and nothing else.

    tune the default losses -> search until the budget is spent -> the stages after the search, the
    last of which is the comparison on fresh seeds

The journal is the loop's memory: what is to be done next is read from it, and each step is written
to it before the next one begins. So a run that was killed goes on where it stood.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cse_autoloss.breeder import Breeder
from cse_autoloss.comparison import compared, known_candidates
from cse_autoloss.config import Config
from cse_autoloss.journal import DEFAULT, KNOWN, CandidateState, Journal, found_label
from cse_autoloss.proposals import Round
from cse_autoloss.runner import ClusterLike, Job, Outcome, TrialRunner
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.space import load_space
from cse_autoloss.stages import REFERENCE, TUNE, Ladder, places_in_batches
from cse_autoloss.trial import Trial, TrialResult

REFERENCE_SEEDS = 2  # trainings of the default losses at the search's last stage, at most
MAX_EMPTY_ROUNDS = 50
MAX_FAILURES = 50  # trainings one after the other at a stage: it is not the losses that fail
SOON = 0.1  # seconds to wait for trainings while a worker waits for proposals

WAITING = CandidateState.WAITING
SCORED, DROPPED, FAILED = CandidateState.SCORED, CandidateState.DROPPED, CandidateState.FAILED


class SearchError(RuntimeError):
    """The search cannot go on: what happened, and what to change."""


class Search:
    """One run.

    Args:
        spaces: branch to the origin of its search space.
        on_progress: called every second or so, to show how the run stands.
    """

    def __init__(
        self,
        config: Config,
        spaces: Mapping[str, str],
        journal: Journal,
        cluster: ClusterLike,
        breeder: Breeder,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._spaces, self._journal = config, spaces, journal
        self._runner = TrialRunner(config, spaces, journal, cluster, on_progress)
        self._ladder, self._breeder = Ladder.of(config.stages), breeder
        self._compared = compared(config, spaces)
        self._trials = journal.count_trials(self._ladder.fitness)
        self._failures: Counter[str] = Counter()  # stage to its failures since its last success
        self._reason = ""  # of the last failure
        self._stopped = journal["stopped"] is not None  # no loss can still win
        self._empty_rounds = 0

    def run(self) -> None:
        """Do all that is still to be done.

        Raises:
            ClusterError: if workers do not start.
            SearchError: if the default loss does not train, or no candidate gets anywhere.
        """
        self._runner.prepare()
        self._tune()
        if not self._journal["searched"]:
            self._search()
        for stage in self._ladder.closing:
            self._close(stage)
        with self._journal.step():
            self._journal["compared"] = True

    def _tune(self) -> None:
        """Train the default losses at each loss-weight scale, then at each learning rate; the best
        on val is the baseline."""
        scales, lr_scales = self._config.tuning.scales, self._config.tuning.lr_scales
        jobs = [self._tuning(f"{cls:g}-{reg:g}", {"cls": cls, "reg": reg}) for cls, reg in scales]
        self._runner.train_all(TUNE, jobs, self._record)
        best = self._best_tuned()
        jobs = [self._tuning(f"lr-{lr_scale:g}", best.scale, lr_scale) for lr_scale in lr_scales]
        self._runner.train_all(TUNE, jobs, self._record)
        best = self._best_tuned()
        with self._journal.step():
            self._journal["tuned"] = {"scale": dict(best.scale), "lr_scale": best.lr_scale}
        if self._ladder.needs_reference and self._config.budget.trials:
            seeds = range(min(self._ladder.stages[self._ladder.fitness].seeds, REFERENCE_SEEDS))
            jobs = [
                Job(REFERENCE, self._runner.trial(REFERENCE, f"{seed}", {}, seed), label=DEFAULT)
                for seed in seeds
            ]
            self._runner.train_all(REFERENCE, jobs, self._record)

    def _tuning(self, key: str, scale: Mapping[str, float], lr_scale: float = 1.0) -> Job:
        trial = self._runner.trial(TUNE, key, {}, 0, scale=dict(scale), lr_scale=lr_scale)
        return Job(TUNE, trial, label=DEFAULT)

    def _best_tuned(self) -> Trial:
        rows = self._journal.trials(TUNE, finished=True)
        results = [(row.trial, row.result) for row in rows if row.result]
        good = {result.mAP: trial for trial, result in reversed(results) if result.mAP is not None}
        if not good:
            raise SearchError(
                f"the detector's default loss does not train: {results[0][1].failure}"
            )
        return good[max(good)]

    def _search(self) -> None:
        self._add_known_losses()
        while True:
            self._promote()
            if self._runner.free > 0 and not self._spent() and (jobs := self._next()):
                self._runner.start(jobs)
            if not self._spent():
                if self._propose():
                    continue
            elif not self._runner.running:
                break
            hurry = self._breeder.busy and self._runner.free > 0
            self._record(self._runner.collect(SOON if hurry else 1.0))
        while self._breeder.busy:
            if made := self._breeder.take(1.0):
                self._enter(made)
        self._breeder.begin((self._journal["round"] or 0) + 1, 0)  # what is believed in the end
        while (last := self._breeder.take(1.0)) is None:
            pass
        with self._journal.step():
            self._journal.set_estimates(last.estimates)
            self._journal["searched"] = True

    def _close(self, stage: str) -> None:
        """A stage after the search: the best so far train on seeds of their own; beside them, in
        the comparison, the default and other losses."""
        place = self._ladder.closing.index(stage)
        count = self._ladder.stages[stage].best
        best = self._journal.best(self._ladder.closing[:place], -1 if count is None else count)
        entries: list[tuple[str, int | None, Mapping[str, str]]] = [
            (found_label(candidate), candidate.id, candidate.losses) for candidate in best
        ]
        if stage == self._ladder.comparison:
            entries = [(label, None, losses) for label, losses in self._compared.items()] + entries
        jobs = [
            Job(stage, self._runner.trial(stage, f"{label}-{seed}", losses, seed), number, label)
            for seed in range(self._ladder.stages[stage].seeds)
            for label, number, losses in entries
        ]
        self._runner.train_all(
            *(stage, jobs, self._record),
            until=self._left_after(place),
            least=len(entries) if stage == self._ladder.comparison else 0,
        )

    # --- candidates on their way ---

    def _add_known_losses(self) -> None:
        """The first candidates: known losses, straight to the search's last stage."""
        spaces = {
            branch: load_space(self._spaces[branch]) for branch in self._config.search.branches
        }
        if self._journal["known"] or self._config.search.from_scratch:
            return
        with self._journal.step():
            self._journal["known"] = True
            for name, losses in known_candidates(spaces)[: self._config.search.known]:
                prints = {
                    branch: fingerprint([spaces[branch].expression(text)], spaces[branch])[0]
                    for branch, text in losses.items()
                }
                self._journal.add_candidate(losses, prints, f"{KNOWN}{name}", self._ladder.fitness)

    def _next(self) -> list[Job]:
        """The next trainings, for all free workers, of the candidates that have come furthest."""
        jobs: list[Job] = []
        for stage in reversed(self._ladder.search):
            last, room = stage == self._ladder.fitness, self._runner.free - len(jobs)
            room = min(room, self._config.budget.trials - self._trials) if last else room
            for candidate in self._journal.waiting(stage, room):
                seed = candidate.trainings if last else 0
                key = f"{candidate.id}-{seed}"
                trial = self._runner.trial(stage, key, candidate.losses, seed)
                jobs.append(Job(stage, trial, candidate.id))
            self._trials += len(jobs) if last else 0
        return jobs

    def _promote(self) -> None:
        """Once a batch has a score at a stage, its best go on to the next."""
        for stage in self._ladder.search[:-1]:
            settings = self._ladder.stages[stage]
            if self._journal.count(SCORED, stage=stage) < (settings.batch or 1):
                continue
            candidates = self._journal.candidates(SCORED, stage=stage)
            scores = {c.id: self._journal.scores(c.id, stage)[0] or 0.0 for c in candidates}
            with self._journal.step():
                for candidate, place in places_in_batches(scores, settings).items():
                    if place <= (settings.keep or 0):
                        self._journal.move(candidate, WAITING, self._ladder.following(stage))
                    else:
                        self._journal.move(
                            *(candidate, DROPPED, stage),
                            f"mAP {scores[candidate]:.3f} at {stage}, place {place} of "
                            f"{settings.batch}; the first {settings.keep} go on",
                        )

    def _propose(self) -> bool:
        """Have the next round made in time, and take it in when it is there."""
        number = self._journal["round"] or 0
        if not self._breeder.busy:
            # The first round waits for parents: the first known loss that has trained.
            alone = not number and self._runner.running and not self._journal.measured()
            if not alone and self._journal.count(WAITING) < self._runner.size:
                count = max(self._config.search.candidates, self._runner.size)
                self._breeder.begin(number + 1, count)
        made = self._breeder.take(0.0 if self._runner.running else 1.0)
        if made:
            self._enter(made)
        return made is not None

    def _enter(self, made: Round) -> None:
        """Write a round down."""
        funnel: dict[str, Any] = self._journal["funnel"] or {}
        for branch, counts in made.counts.items():
            before = funnel.get(branch, {})
            reasons = Counter(before.get("reasons", {})) + Counter(made.reasons[branch])
            totals = {name: before.get(name, 0) + count for name, count in counts.items()}
            funnel[branch] = {**totals, "reasons": reasons}
        with self._journal.step():
            self._journal["round"], self._journal["funnel"] = made.number, funnel
            self._journal["stopped"] = made.stopped
            self._journal.set_estimates(made.estimates)
            for candidate in made.repeats:
                self._journal.move(candidate, WAITING)
            for branch, hashes in made.seen.items():
                self._journal.add_seen(branch, made.number, hashes)
                self._journal.add_rejected(branch, made.number, made.rejected[branch])
            self._journal.add_survivors(made.survivors)
            for proposal in made.proposals:
                self._journal.choose_survivors(proposal.survivors)
                self._journal.add_candidate(
                    *(proposal.losses, proposal.fingerprint, proposal.origin),
                    *(self._ladder.search[0], made.number, proposal.parents),
                    *(proposal.predicted, proposal.deviation),
                )
        self._stopped = made.stopped is not None
        self._empty_rounds = 0 if made.proposals or made.repeats else self._empty_rounds + 1
        if self._empty_rounds == MAX_EMPTY_ROUNDS:
            raise SearchError(
                f"{MAX_EMPTY_ROUNDS} rounds of {self._config.search.offspring} offspring left no "
                "survivor: raise search.offspring, or widen the space's tolerances"
            )

    def _record(self, outcomes: list[Outcome]) -> None:
        """Write down what trainings came to, and where their candidates stand now."""
        if not outcomes:
            return
        with self._journal.step():
            for outcome in outcomes:
                self._runner.finish(outcome)
                if outcome.job.candidate is not None and outcome.job.stage in self._ladder.search:
                    self._judge(outcome.job.stage, outcome.job.candidate, outcome.result)
        for stage, failures in self._failures.items():
            if failures >= max(MAX_FAILURES, 2 * self._runner.size):
                raise SearchError(
                    f"{failures} trainings one after the other came to nothing at stage {stage}; "
                    f"the last one: {self._reason}"
                )

    def _judge(self, stage: str, number: int, result: TrialResult) -> None:
        last = stage == self._ladder.fitness
        scores = self._journal.scores(number, stage)
        sound = [score for score in scores if score is not None and (last or score)]
        self._failures[stage] = 0 if result.mAP else self._failures[stage] + 1
        self._reason = result.failure or "mAP 0"
        if not sound:
            self._journal.move(
                number, FAILED if last else DROPPED, None, f"{stage}: {self._reason}"
            )
            return
        self._journal.move(number, SCORED)
        if last:
            self._journal.set_fitness(number, sum(sound) / len(scores), len(scores))

    # --- the budget ---

    def _spent(self) -> bool:
        if self._trials >= self._config.budget.trials or self._stopped:
            return True
        # However slow the machine, a run ends with a loss of its own.
        left = self._left_after(-1)
        late = (
            left is not None
            and self._runner.elapsed + self._runner.expected(self._ladder.fitness) > left
        )
        return late and bool(self._journal.best(count=1))

    def _left_after(self, place: int) -> float | None:
        """Seconds of this driver by which a closing stage (-1: the search) should end, so that those
        after it have their time; None without a limit."""
        if self._config.budget.minutes is None:
            return None
        later = 0.0
        for name in self._ladder.closing[place + 1 :]:
            stage = self._ladder.stages[name]
            beside = len(self._compared) if name == self._ladder.comparison else 0
            waves = math.ceil(stage.seeds * ((stage.best or 0) + beside) / self._runner.size)
            later += waves * self._runner.expected(name)
        return 60 * self._config.budget.minutes - later
