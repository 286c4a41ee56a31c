"""Formulas in, an honest judgement out: what a search knows of a loss, for losses of any origin.

    with Evaluator(config) as evaluate:
        evaluation = evaluate("Neg(Dot(Y,Log(Softmax(X))))")

A formula is verified, descends on predictions, and trains with several seeds beside the default
loss, tuned as a search tunes it. Everything that was trained is kept in the user's cache: the same
formula on the same detector, data, seed and versions is never trained again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cse_autoloss.cache import cache_dir, digest
from cse_autoloss.canonical import canonical
from cse_autoloss.cluster import Cluster
from cse_autoloss.config import Config
from cse_autoloss.expression import Expression
from cse_autoloss.intervals import mean_interval, paired_interval
from cse_autoloss.screening import Screener
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import load_space
from cse_autoloss.stages import EVALUATION, SEEDS
from cse_autoloss.trial import ConfigError, Trial, TrialResult

TASKS = ("none", "tiny", "head", "full")
FIRST_SEED = EVALUATION * SEEDS  # from the configuration's seed on: no run of that seed has these


@dataclass(frozen=True)
class Evaluation:
    """What is known of one formula. mAP is COCO AP (IoU 0.50:0.95) in [0, 1] on val.

    Attributes:
        expression: the formula's text, of the branch ``branch`` in the space ``space``.
        accepted: whether it has the convergence properties.
        verdict: one line on that, with where it misses one.
        counterexample: the variables at that point, or None.
        optimises: whether descent with it gets predictions right; None where it was not tried.
        simulation: one line on that.
        task: what was trained: ``tiny``, ``head``, ``full`` or ``none``.
        mAP, default: with the formula and with the tuned default loss, a number a seed; a training
            of the formula that failed counts as 0.
        gain: mean of the formula's mAP less the default's with the same seed, or None.
        gain_half: half the 95% interval of that mean, or None with fewer than two seeds.
        failures: why trainings failed.
        trained: how many trainings this evaluation took; the others were known already.
    """

    expression: str
    branch: str
    space: str
    accepted: bool
    verdict: str
    counterexample: Mapping[str, Any] | None
    optimises: bool | None
    simulation: str
    task: str
    mAP: tuple[float, ...] = ()
    default: tuple[float, ...] = ()
    gain: float | None = None
    gain_half: float | None = None
    failures: tuple[str, ...] = ()
    trained: int = 0

    @property
    def mean(self) -> float | None:
        return mean_interval(self.mAP).mean if self.mAP else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``mean`` stands beside the rest."""
        return asdict(self) | {"mean": self.mean}


class Evaluator(AbstractContextManager["Evaluator"]):
    """Evaluates formulas on one detector. The workers start with the first training and stay.

    Args:
        config: detector, cluster, tuning and seed as in a run.
        spaces: branch to the space that its formulas are written in.
        branch: which branch's formulas are given.
        task: what is trained; with ``none`` a formula is verified and simulated alone.
        seeds: trainings of each formula, and of the default.
        beside: losses of the other branch, by its name, that formula and default have in common.
        results: file to keep results in; the user's cache where None.
        cluster: makes the cluster that trains.
        depends: what the numbers depend on (:func:`cse_autoloss.pins.pins` and the configuration).
            Where it is given, no worker starts for formulas of which all is known.
        say: gets a line of what is about to be trained.

    Raises:
        ConfigError: if the task is none of those, or ``beside`` names the branch itself.
    """

    def __init__(
        self,
        config: Config,
        spaces: Mapping[str, str],
        branch: str = "cls",
        task: str = "head",
        seeds: int = 3,
        beside: Mapping[str, str] | None = None,
        results: Path | None = None,
        cluster: Callable[[], Cluster] | None = None,
        depends: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"--task {task}: expected one of {', '.join(TASKS)}")
        if branch in (beside or {}):
            raise ConfigError(f"--with {branch}=...: formulas of this branch are what is evaluated")
        for name in (beside or {}).keys() - spaces.keys():
            raise ConfigError(
                f"--with {name}=...: expected BRANCH=EXPR with the branch "
                f"{' or '.join(spaces.keys() - {branch})}"
            )
        self._config, self._spaces, self._branch = config, dict(spaces), branch
        self._space = load_space(spaces[branch])
        self._screener = Screener(self._space)
        self._task, self._seeds = task, range(FIRST_SEED, FIRST_SEED + seeds)
        self._beside = {
            name: str(load_space(spaces[name]).expression(text))
            for name, text in (beside or {}).items()
        }
        self._store = _Results(results or cache_dir() / "evaluations.sqlite")
        self._make = cluster or (lambda: Cluster(config.cluster, config.detector))
        self._cluster: Cluster | None = None
        self._say = say
        told = json.dumps([dict(depends or {}), config.cluster.num_gpus], sort_keys=True)
        self._depends = digest(told) if depends else None
        self._context = self._store.context(self._depends) if self._depends else None
        self._tuned: dict[str, Any] | None = None

    def expression(self, text: str) -> Expression:
        """A formula, as it is read.

        Raises:
            ExpressionError: for text that is neither an expression of the space nor the name of one
                of its known losses.
        """
        return self._space.expression(text)

    def __call__(self, text: str, force: bool = False) -> Evaluation:
        """Evaluate a formula.

        Args:
            text: an expression of the space, or the name of one of its known losses.
            force: train also what fell before.

        Raises:
            ExpressionError: as :meth:`expression`.
            ClusterError: if workers do not start.
            ConfigError: if the default loss does not train.
        """
        expression = self.expression(text)
        verdict = self._screener.verify(expression)
        found = Evaluation(
            str(expression),
            self._branch,
            self._space.name,
            verdict.accepted,
            verdict.detail,
            verdict.counterexample.variables if verdict.counterexample else None,
            None,
            "not tried: it lacks a convergence property",
            self._task,
        )
        if verdict.accepted or force:
            (outcome,) = simulate_predictions([expression], self._space, self._config.seed)
            found = replace(found, optimises=outcome.passed, simulation=outcome.reason)
        if self._task == "none" or not (found.optimises or force):
            return replace(found, task="none")
        # One form for all that are one loss: what was measured of another form counts.
        form = str(canonical(expression, self._space))
        trials = [self._trial({self._branch: form}, seed) for seed in self._seeds]
        trials += [self._trial({}, seed) for seed in self._seeds]
        results, trained = self._train(trials, "formula and default")
        mine, default = results[: len(self._seeds)], results[len(self._seeds) :]
        for result in default:  # against a default of mAP 0 anything would be a find
            if result.mAP is None:
                raise ConfigError(_untrained(result))
        by_seed = [
            dict(zip(self._seeds, map(_score, part), strict=True)) for part in (mine, default)
        ]
        gain = paired_interval(by_seed[0], by_seed[1])
        return replace(
            found,
            mAP=tuple(by_seed[0].values()),
            default=tuple(by_seed[1].values()),
            gain=gain.mean,
            gain_half=gain.half if gain.n > 1 else None,
            failures=tuple(result.failure for result in mine if result.failure),
            trained=trained,
        )

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._store.close()

    def _trial(self, losses: Mapping[str, str], seed: int, **settings: Any) -> Trial:
        losses = {**self._beside, **losses}
        settings = settings or self._tuning()
        return Trial(
            "",
            losses,
            {branch: self._spaces[branch] for branch in losses},
            task=self._task,
            seed=self._config.seed + seed,
            time_limit=self._config.cluster.time_limit,
            **settings,
        )

    def _tuning(self) -> dict[str, Any]:
        """Loss-weight scales and learning rate of the default loss whose mean is best on val."""
        if self._tuned is None:
            tuning = self._config.tuning
            scales = [{"cls": cls, "reg": reg} for cls, reg in tuning.scales]
            best = self._best([{"scale": scale, "lr_scale": 1.0} for scale in scales])
            rates = [{"scale": best["scale"], "lr_scale": rate} for rate in tuning.lr_scales]
            self._tuned = self._best([best, *rates]) if rates else best
        return self._tuned

    def _best(self, settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
        seeds = range(self._config.tuning.repeats)
        trials = [self._trial({}, seed, **setting) for setting in settings for seed in seeds]
        results, _ = self._train(trials, "tuning of the default")
        if all(result.mAP is None for result in results):
            raise ConfigError(_untrained(results[0]))
        scores = np.reshape([_score(result) for result in results], (-1, len(seeds)))
        return settings[int(scores.mean(axis=1).argmax())]

    def _train(self, trials: Sequence[Trial], of: str) -> tuple[list[TrialResult], int]:
        """The trials' results, in their order, and how many had to be trained."""
        trained: list[str] = []
        keyed, results = self._known(trials)
        if not keyed or any(trial.key not in results for trial in keyed):
            cluster = self._started()
            keyed, results = self._known(trials)  # of what trials start from now
            wanted = {trial.key: trial for trial in keyed}  # one of those that are the same
            queue = [trial for key, trial in wanted.items() if key not in results]
            if queue:
                self._say(f"{of}: {len(queue)} of {len(wanted)} trainings to do, the rest is known")
            while len(results) < len(wanted):
                while queue and cluster.free > 0:
                    cluster.submit(queue.pop(0))
                for result in cluster.wait():
                    results[result.key] = result
                    trained.append(result.key)
                    self._store.write(result)
        return [results[trial.key] for trial in keyed], len(trained)

    def _known(self, trials: Sequence[Trial]) -> tuple[list[Trial], dict[str, TrialResult]]:
        """The trials under the keys that their results are kept by, and those that are."""
        if self._context is None:
            return [], {}
        keyed = [replace(trial, key=self._key(trial)) for trial in trials]
        return keyed, self._store.read(trial.key for trial in keyed)

    def _started(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._make()
            prepared = self._cluster.prepare()
            detector = json.dumps(self._config.detector, sort_keys=True, default=str)
            self._context = hashlib.sha256(prepared + detector.encode()).hexdigest()
            if self._depends:
                self._store.keep_context(self._depends, self._context)
        return self._cluster

    def _key(self, trial: Trial) -> str:
        text = replace(trial, key="", time_limit=None).to_json()
        return "evaluate-" + hashlib.sha256((f"{self._context}{text}").encode()).hexdigest()[:24]


def _untrained(default: TrialResult) -> str:
    return f"the detector's default loss does not train: {default.failure}"


def _score(result: TrialResult) -> float:
    return result.mAP if result.mAP is not None else 0.0


class _Results:
    """Results by trial key, in one SQLite file that several evaluators may share."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT) WITHOUT ROWID"
        )
        self._database.execute(  # what numbers depend on, to what the keys of results begin with
            "CREATE TABLE IF NOT EXISTS contexts (depends TEXT PRIMARY KEY, context TEXT) "
            "WITHOUT ROWID"
        )

    def context(self, depends: str) -> str | None:
        row = self._database.execute("SELECT context FROM contexts WHERE depends = ?", (depends,))
        found = row.fetchone()
        return found[0] if found else None

    def keep_context(self, depends: str, context: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO contexts VALUES (?, ?)", (depends, context))

    def read(self, keys: Iterable[str]) -> dict[str, TrialResult]:
        found = {}
        for key in keys:
            row = self._database.execute("SELECT result FROM results WHERE key = ?", (key,))
            if text := row.fetchone():
                found[key] = TrialResult.from_json(text[0])
        return found

    def write(self, result: TrialResult) -> None:
        """Keep what a loss came to; a fault of the machine is no result of the loss's."""
        if result.mAP is not None:
            self._database.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?)", (result.key, result.to_json())
            )

    def close(self) -> None:
        self._database.close()
