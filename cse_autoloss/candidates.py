"""Candidates on their way up the ladder: which trains next, who goes on, who falls and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cse_autoloss.comparison import known_candidates
from cse_autoloss.config import Config
from cse_autoloss.errors import SearchError
from cse_autoloss.journal import KNOWN, CandidateState, Journal
from cse_autoloss.proposals import Round
from cse_autoloss.runner import Job, Outcome, TrialRunner
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder, places_in_batches
from cse_autoloss.trial import MACHINE

MAX_EMPTY_ROUNDS = 50
MAX_FAILURES = 50  # trainings one after the other at a stage: it is not the losses that fail

WAITING, SCORED = CandidateState.WAITING, CandidateState.SCORED
DROPPED, FAILED = CandidateState.DROPPED, CandidateState.FAILED


class Candidates:
    """The candidates of one run, as they stand in its journal.

    Attributes:
        trials: trainings at the search's last stage, running ones too.
        stopped: whether the search is over before its budget: no loss can still win, or none is
            left to train.
    """

    def __init__(self, config: Config, spaces: Mapping[str, str], journal: Journal) -> None:
        self._config, self._spaces, self._journal = config, spaces, journal
        self._ladder = Ladder.of(config.stages)
        self.trials = journal.count_trials(self._ladder.fitness)
        self.stopped = journal["stopped"] is not None
        self._failures: Counter[str] = Counter()  # stage to its failures since its last success
        self._empty_rounds = 0

    def add_known_losses(self) -> None:
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

    def try_again(self) -> None:
        """Let candidates that a machine has failed, and not their loss, wait anew (inside the
        caller's step)."""
        for stage in self._ladder.search:
            for candidate in self._journal.candidates(FAILED, DROPPED, stage=stage):
                if (candidate.reason or "").startswith(f"{stage}: {MACHINE} "):
                    self._journal.forget_trials_of(candidate.id, stage)
                    self._journal.move(candidate.id, WAITING)
        self.trials = self._journal.count_trials(self._ladder.fitness)

    def next(self, runner: TrialRunner) -> list[Job]:
        """The next trainings, for all free workers, of the candidates that have come furthest."""
        jobs: list[Job] = []
        for stage in reversed(self._ladder.search):
            last, room = stage == self._ladder.fitness, runner.free - len(jobs)
            room = min(room, self._config.budget.trials - self.trials) if last else room
            for candidate in self._journal.waiting(stage, room):
                seed = candidate.trainings if last else 0
                key = f"{candidate.id}-{seed}"
                trial = runner.trial(stage, key, candidate.losses, seed)
                jobs.append(Job(stage, trial, candidate.id))
            self.trials += len(jobs) if last else 0
        return jobs

    def promote(self) -> None:
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

    def enter(self, made: Round) -> None:
        """Write a round down.

        Too many of them one after the other that have proposed nothing end the search.

        Raises:
            SearchError: if they do before any found loss has trained.
        """
        self._empty_rounds = 0 if made.proposals or made.repeats else self._empty_rounds + 1
        stopped = made.stopped
        if stopped is None and self._empty_rounds >= MAX_EMPTY_ROUNDS:
            stopped = (
                f"{MAX_EMPTY_ROUNDS} rounds of {self._config.search.offspring} offspring left no "
                "survivor; raise search.offspring, or widen the space's tolerances"
            )
            if not self._journal.best(count=1):
                raise SearchError(stopped)
        funnel: dict[str, Any] = self._journal["funnel"] or {}
        for branch, sifted in made.branches.items():
            before = funnel.get(branch, {})
            reasons = Counter(before.get("reasons", {})) + Counter(sifted.reasons)
            totals = {name: before.get(name, 0) + count for name, count in sifted.counts.items()}
            funnel[branch] = {**totals, "reasons": reasons}
        with self._journal.step():
            self._journal["round"], self._journal["funnel"] = made.number, funnel
            self._journal["stopped"], self._journal["standing"] = stopped, made.standing
            self._journal.set_estimates(made.estimates)
            for candidate in made.repeats:
                self._journal.move(candidate, WAITING)
            for branch, sifted in made.branches.items():
                self._journal.add_seen(branch, made.number, sifted.seen)
                self._journal.add_rejected(branch, made.number, sifted.rejected)
            self._journal.add_survivors(made.survivors)
            for proposal in made.proposals:
                self._journal.choose_survivors(proposal.survivors)
                self._journal.add_candidate(
                    *(proposal.losses, proposal.fingerprint, proposal.origin),
                    *(self._ladder.search[0], made.number, proposal.parents),
                    *(proposal.predicted, proposal.deviation),
                )
        self.stopped = stopped is not None

    def judge(self, outcome: Outcome) -> None:
        """Say where a candidate stands after a training (inside the caller's step)."""
        stage, number, result = outcome.job.stage, outcome.job.candidate, outcome.result
        if number is None or stage not in self._ladder.search:
            return
        last = stage == self._ladder.fitness
        scores = self._journal.scores(number, stage)
        sound = [score for score in scores if score is not None and (last or score)]
        self._failures[stage] = 0 if result.mAP else self._failures[stage] + 1
        if not sound:
            reason = f"{stage}: {result.failure or 'mAP 0'}"
            self._journal.move(number, FAILED if last else DROPPED, None, reason)
            return
        self._journal.move(number, SCORED)
        if last:
            self._journal.set_fitness(number, sum(sound) / len(scores), len(scores))

    def check(self, outcomes: list[Outcome], workers: int) -> None:
        """Give up where nothing comes of any training.

        Raises:
            SearchError: if too many at one stage have failed one after the other.
        """
        for stage, failures in self._failures.items():
            if failures >= max(MAX_FAILURES, 2 * workers):
                reasons = [o.result.failure or "mAP 0" for o in outcomes if o.job.stage == stage]
                raise SearchError(
                    f"{failures} trainings one after the other came to nothing at stage {stage}; "
                    f"the last one: {reasons[-1]}"
                )
