"""Any candidate may be next: what a search without a model does."""

from __future__ import annotations

import numpy as np

from cse_autoloss.rankers.base import Measured, Ranking


class Shuffled:
    """A random order. Learns nothing and predicts nothing."""

    def rank(self, features: np.ndarray, measured: Measured, rng: np.random.Generator) -> Ranking:
        return Ranking(rng.permutation(len(features)))

    def estimate(self, measured: Measured) -> np.ndarray:
        return np.array(measured.scores, float)
