"""A Gaussian process from what a loss does (its gradient field) to the mAP it trains to.

Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), is the source of the model;
Desautels et al., Parallelizing Exploration-Exploitation Tradeoffs (JMLR 2014), of the order: upper
confidence bounds, whose deviations know which candidates stand before. What was measured, and what
did not help, is in docs/model.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern

from cse_autoloss.rankers.base import Belief, Measured, Ranking
from cse_autoloss.rankers.shuffled import Shuffled

LEAST = 3  # trained losses, earlier ones too, without which there is nothing to learn from
CONTENDERS = 1000  # candidates with the highest bounds; only they are ordered together
FEW = 250  # losses that hyperparameters are fitted to
REACH = 8  # deviations of one training: a loss further below the best counts as that far below
RESTARTS = 2  # of the fit, from other hyperparameters
PLACES = 100  # at the front of the order that go by bounds; the others stand by their mean
APART = 0.25  # from a loss to itself in earlier trainings, in median distances between losses


@dataclass(frozen=True)
class Model:
    """Ranks by upper confidence bounds of a Gaussian process with a Matérn 3/2 kernel.

    Attributes:
        explore: share of the places that go to a candidate drawn at random, to stay honest.
        optimism: deviations above its mean that a candidate is taken for.
    """

    explore: float = 0.1
    optimism: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore should be in [0, 1], found {self.explore}")
        if not 0 <= self.optimism <= 100:
            raise ValueError(f"optimism should be in [0, 100], found {self.optimism}")

    def rank(self, features: np.ndarray, measured: Measured, rng: np.random.Generator) -> Ranking:
        process = self._fit(measured)
        known = np.flatnonzero(np.isfinite(features).all(axis=1))
        if process is None or not len(known):
            return Shuffled().rank(features, measured, rng)
        mean, deviation = np.full((2, len(features)), np.nan)
        mean[known], deviation[known] = process.predict(features[known])
        by_mean = np.argsort(-mean, kind="stable")  # NaN, of which nothing is known, comes last
        bound = mean + self.optimism * deviation
        contenders = known[np.argsort(-bound[known], kind="stable")[:CONTENDERS]]
        best = self._by_bound(process.belief(features[contenders]), measured.noise)
        chosen: dict[int, None] = {}  # in order
        for _ in range(min(PLACES, len(contenders))):
            anybody = rng.random() < self.explore
            chosen.setdefault(int(rng.choice(known)) if anybody else int(contenders[next(best)]))
        chosen.update(dict.fromkeys(by_mean.tolist()))
        return Ranking(np.array(list(chosen)), mean, deviation)

    def _by_bound(self, belief: Belief, noise: float) -> Iterator[int]:
        """Losses by mean and deviation, best first; each takes off the deviations of those that are
        like it what its training will."""
        covariance = belief.covariance.copy()
        waiting = np.ones(len(belief.mean), bool)
        while waiting.any():
            deviation = np.sqrt(np.maximum(covariance.diagonal(), 0))
            bound = np.where(waiting, belief.mean + self.optimism * deviation, -np.inf)
            first = int(bound.argmax())
            yield first
            waiting[first] = False
            column = covariance[:, first]
            covariance -= np.outer(column, column) / (covariance[first, first] + noise**2)

    def belief(self, measured: Measured) -> Belief:
        belief = Shuffled().belief(measured)
        known = np.flatnonzero(np.isfinite(measured.features).all(axis=1))
        process = self._fit(measured) if len(known) else None
        if process is None:
            return belief
        learned = process.belief(measured.features[known])
        belief.mean[known] = learned.mean
        belief.covariance[np.ix_(known, known)] = learned.covariance
        return belief

    def _fit(self, measured: Measured) -> _Process | None:
        """The process of what is known, or None where too little is."""
        reach = REACH * measured.noise
        parts = [_usable(part, reach) for part in (measured, *measured.earlier)]
        rows, scores, error = (np.concatenate(values) for values in zip(*parts))
        if len(rows) < LEAST:
            return None
        # Few rows tell how smooth the process is as well as all do, in a fraction of the time.
        few = np.random.default_rng(0).permutation(len(rows))[:FEW]
        length = np.median(pdist(rows[few])) or 1.0
        # One column more: all sources of earlier trainings lie some way off the run's own.
        source = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        rows = np.column_stack([rows, APART * length * (source > 0)])
        smooth = Matern(length, (0.05 * length, 30 * length), 1.5)
        scores = scores - _levels(smooth, rows, scores, error, source)
        # A loss that is like none so far is poor as likely as not, however good those so far are.
        centre, scale = scores.max() - reach / 2, max(scores.std(), measured.noise / 10)
        kernel = ConstantKernel(3.0, (1e-2, 1e3)) * smooth
        targets, error = (scores - centre) / scale, error / scale**2
        # The likelihood has more than one peak: a steep one of short lengths, where few are near
        # each other, and a broad one of long lengths, which is often the higher.
        process = GaussianProcessRegressor(
            kernel, alpha=error[few], n_restarts_optimizer=RESTARTS, random_state=0
        )
        with warnings.catch_warnings():  # a hyperparameter at its bound is a fit all the same
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(rows[few], targets[few])
        if len(few) < len(rows):
            process = GaussianProcessRegressor(process.kernel_, alpha=error, optimizer=None)
            process.fit(rows, targets)
        return _Process(process, centre, scale)


def _usable(measured: Measured, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, mAPs and their variances of the losses that have a gradient."""
    usable = np.isfinite(measured.features).all(axis=1)
    scores = measured.scores[usable]
    # How bad a bad loss is says nothing about which good one is better, and would drown it.
    floor = scores.max(initial=-np.inf) - reach
    error = measured.noise**2 / measured.trainings[usable]
    return np.asarray(measured.features[usable], float), np.maximum(scores, floor), error


def _levels(
    correlation: Kernel, rows: np.ndarray, scores: np.ndarray, error: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """By how much each loss's source stands above the first, as its losses let one think: each
    source's level by generalised least squares."""
    present = np.unique(source)
    if len(present) == 1:
        return np.zeros(len(scores))
    members = (source[:, None] == present).astype(float)
    means = np.linalg.lstsq(members, scores)[0]
    spread = max((scores - members @ means).var(), error.min())
    covariance = correlation(rows) + np.diag(error / spread)
    solved = np.linalg.solve(covariance, members)
    levels = np.linalg.solve(members.T @ solved, solved.T @ scores)
    return members @ (levels - levels[0])


@dataclass(frozen=True)
class _Process:
    """A fitted process of standardised mAPs, in mAP; losses as the run itself trains them."""

    process: GaussianProcessRegressor
    centre: float
    scale: float

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = self.process.predict(_own(features), return_std=True)
        return self.centre + self.scale * mean, self.scale * deviation

    def belief(self, features: np.ndarray) -> Belief:
        mean, covariance = self.process.predict(_own(features), return_cov=True)
        return Belief(self.centre + self.scale * mean, self.scale**2 * covariance)


def _own(features: np.ndarray) -> np.ndarray:
    return np.pad(features.astype(float), ((0, 0), (0, 1)))
