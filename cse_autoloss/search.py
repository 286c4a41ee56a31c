"""The search: the algorithm and nothing else.

    tune the default losses -> search until the budget is spent -> the stages after the search, the
    last of which is the comparison on fresh seeds

The journal is the loop's memory: what is to be done next is read from it, and each step is written
to it before the next one begins. So a run that was killed goes on where it stood.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from cse_autoloss.breeder import Breeder
from cse_autoloss.candidates import Candidates
from cse_autoloss.comparison import compared
from cse_autoloss.config import Config
from cse_autoloss.errors import SearchError
from cse_autoloss.journal import DEFAULT, CandidateState, Journal, found_label
from cse_autoloss.runner import ClusterLike, Job, Outcome, TrialRunner
from cse_autoloss.stages import REFERENCE, TUNE, Ladder
from cse_autoloss.trial import Trial

REFERENCE_SEEDS = 2  # trainings of the default losses at the search's last stage, at most
SOON = 0.1  # seconds to wait for trainings while a worker waits for proposals


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
        self._config, self._journal = config, journal
        self._runner = TrialRunner(config, spaces, journal, cluster, on_progress)
        self._candidates = Candidates(config, spaces, journal)
        self._ladder, self._breeder = Ladder.of(config.stages), breeder
        self._compared = compared(config, spaces)

    def run(self) -> None:
        """Do all that is still to be done.

        Raises:
            ClusterError: if workers do not start.
            SearchError: if the default loss does not train, or no candidate gets anywhere.
        """
        with self._journal.step():  # a resumed run tries again what no decision was made by
            self._journal.forget_failed(*self._ladder.closing, machine=True)
            if not self._journal["tuned"]:
                self._journal.forget_failed(TUNE)
            if not self._journal["searched"]:
                self._candidates.try_again()
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
        mean on val is the baseline."""
        tuning = self._config.tuning
        scales = [(f"{cls:g}-{reg:g}", {"cls": cls, "reg": reg}, 1.0) for cls, reg in tuning.scales]
        self._runner.train_all(TUNE, self._tuning(scales), self._record)
        best = self._best_tuned()
        rates = [(f"lr-{lr_scale:g}", best.scale, lr_scale) for lr_scale in tuning.lr_scales]
        self._runner.train_all(TUNE, self._tuning(rates), self._record)
        best = self._best_tuned()
        with self._journal.step():
            self._journal["tuned"] = {"scale": dict(best.scale), "lr_scale": best.lr_scale}
        if self._ladder.needs_reference and self._config.budget.trials:
            seeds = range(min(self._ladder.stages[self._ladder.fitness].seeds, REFERENCE_SEEDS))
            jobs = [
                Job(REFERENCE, self._runner.trial(REFERENCE, f"{seed}", {}, seed), label=DEFAULT)
                for seed in seeds
            ]
            self._runner.train_all(REFERENCE, jobs, self._record_reference)

    def _tuning(self, tried: Sequence[tuple[str, Mapping[str, float], float]]) -> list[Job]:
        """Trainings of settings: a key, the scales and the learning rate's of each."""
        jobs = []
        for seed in range(self._config.tuning.repeats):
            for name, scale, lr_scale in tried:
                key = f"{name}-{seed}" if seed else name
                trial = self._runner.trial(
                    TUNE, key, {}, seed, scale=dict(scale), lr_scale=lr_scale
                )
                jobs.append(Job(TUNE, trial, label=DEFAULT))
        return jobs

    def _best_tuned(self) -> Trial:
        """The first training with the settings whose mean mAP is the best."""
        rows = self._journal.trials(TUNE, finished=True)
        results = [(row.trial, row.result) for row in rows if row.result]
        trained = [trial for trial, result in results if result.mAP is not None]
        if not trained:
            raise SearchError(
                f"the detector's default loss does not train: {results[0][1].failure}"
            )

        def mean(trial: Trial) -> float:
            scores = self._journal.scores_with(TUNE, trial.scale, trial.lr_scale)
            return statistics.mean(scores.values())

        return max(trained, key=mean)

    def _search(self) -> None:
        self._candidates.add_known_losses()
        while True:
            self._candidates.promote()
            if self._runner.free > 0 and not self._spent():
                self._runner.start(self._candidates.next(self._runner))
            if not self._spent():
                if self._propose():
                    continue
            elif not self._runner.running:
                break
            hurry = self._breeder.busy and self._runner.free > 0
            self._record(self._runner.collect(SOON if hurry else 1.0))
        while self._breeder.busy:
            if made := self._breeder.take(1.0):
                self._candidates.enter(made)
        self._breeder.begin((self._journal["round"] or 0) + 1, 0)  # what is believed in the end
        while (last := self._breeder.take(1.0)) is None:
            pass
        with self._journal.step():
            self._journal.set_estimates(last.estimates)
            self._journal["standing"] = last.standing
            self._journal["searched"] = True

    def _propose(self) -> bool:
        """Have the next round made in time, and take it in when it is there."""
        number = self._journal["round"] or 0
        if not self._breeder.busy:
            # The first round waits for parents: the first known loss that has trained.
            alone = not number and self._runner.running and not self._journal.measured()
            if not alone and self._journal.count(CandidateState.WAITING) < self._runner.size:
                count = max(self._config.search.candidates, self._runner.size)
                self._breeder.begin(number + 1, count)
        made = self._breeder.take(0.0 if self._runner.running else 1.0)
        if made:
            self._candidates.enter(made)
        return made is not None

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

    def _record(self, outcomes: list[Outcome]) -> None:
        """Write down what trainings came to, and where their candidates stand now."""
        if outcomes:
            with self._journal.step():
                for outcome in outcomes:
                    self._runner.finish(outcome)
                    self._candidates.judge(outcome)
            self._candidates.check(outcomes, self._runner.size)

    def _record_reference(self, outcomes: list[Outcome]) -> None:
        """The same of the default, which has to train: against a default of mAP 0 anything would be
        a find. What failed is not written down, so a resumed run tries it again."""
        failed = [o for o in outcomes if o.job.stage == REFERENCE and o.result.mAP is None]
        self._record([outcome for outcome in outcomes if outcome not in failed])
        for outcome in failed:
            raise SearchError(
                f"the detector's default loss does not train at stage {self._ladder.fitness}, "
                f"seed {outcome.job.trial.seed}: {outcome.result.failure}"
            )

    def _spent(self) -> bool:
        if self._candidates.trials >= self._config.budget.trials or self._candidates.stopped:
            return True
        left = self._left_after(-1)
        if left is None:
            return False
        late = self._runner.elapsed + self._runner.expected(self._ladder.fitness) > left
        # However slow the machine, a run ends with a loss of its own.
        return late and bool(self._journal.best(count=1))

    def _left_after(self, place: int) -> float | None:
        """Seconds of this driver by which a closing stage (-1: the search) should end, so that
        those after it have their time; None without a limit."""
        if self._config.budget.minutes is None:
            return None
        later = 0.0
        for name in self._ladder.closing[place + 1 :]:
            stage = self._ladder.stages[name]
            beside = len(self._compared) if name == self._ladder.comparison else 0
            waves = math.ceil(stage.seeds * ((stage.best or 0) + beside) / self._runner.size)
            later += waves * self._runner.expected(name)
        return 60 * self._config.budget.minutes - later
