"""Any candidate may be next: what a search without a model does."""

from __future__ import annotations

import numpy as np

from cse_autoloss.rankers.base import FLOOR, Belief, Measured, Ranking


class Shuffled:
    """A random order. Predicts nothing; of what has trained it believes what the trainings say,
    drawn towards the losses' common mean as far as one training's noise demands (James-Stein)."""

    def rank(self, features: np.ndarray, measured: Measured, rng: np.random.Generator) -> Ranking:
        return Ranking(rng.permutation(len(features)))

    def belief(self, measured: Measured) -> Belief:
        if not len(measured):
            return Belief(np.zeros(0), np.zeros((0, 0)))
        scores = np.maximum(measured.scores, measured.scores.max() - FLOOR)
        error = measured.noise**2 / measured.trainings
        # Of the losses' spread, what the trainings' noise does not explain; never nothing.
        spread = max(scores.var() - error.mean(), error.min())
        kept = spread / (spread + error)
        return Belief(scores.mean() + kept * (scores - scores.mean()), np.diag(kept * error))
