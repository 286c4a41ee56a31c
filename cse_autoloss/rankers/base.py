"""What the search asks of a ranker: thousands of candidates in, the order in which they train out.

A ranker sees candidates as rows of numbers (``screening/features.py``) and knows neither
expressions nor detectors, so it can be tested, and replayed on tables, without either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cse_autoloss.intervals import pooled_deviation, seed_effects
from cse_autoloss.named import load_class
from cse_autoloss.trial import ConfigError

#: The rankers that come with the package: a run's ``search.ranker`` is one of these names, or
#: ``"package.module:Class"``.
RANKERS = {
    "model": "cse_autoloss.rankers.model:Model",
    "shuffled": "cse_autoloss.rankers.shuffled:Shuffled",
}
NOISE = 0.004  # of one training, where no loss has trained twice (docs/model.md)
PRIOR = 4  # repeated trainings that outweigh it
FLOOR = 0.05  # a loss that far below the best is out of the race, however far it is


@dataclass(frozen=True)
class Measured:
    """What trainings have said so far.

    Attributes:
        features: (m, d) a row for each loss that has been trained.
        scores: (m,) mean mAP over its trainings, in [0, 1].
        trainings: (m,) how many trainings each mean is of.
        noise: standard deviation of one training's mAP about its loss's mean.
        earlier: what was measured before the run, one for each source: another warm-up, detector or
            data set, so that its mAPs may stand at another level, and its order is a hint.
    """

    features: np.ndarray
    scores: np.ndarray
    trainings: np.ndarray
    noise: float = NOISE
    earlier: Sequence[Measured] = ()

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        scores: Sequence[Mapping[int, float]],
        earlier: Sequence[Measured] = (),
    ) -> Measured:
        """From each loss's mAP by seed; a training that failed is 0.

        A seed that is kind to all losses is no merit of those that trained with it: what the
        losses show of such effects is taken off. The noise is pooled over the losses that trained
        more than once, with ``NOISE`` for as much as ``PRIOR`` repeats.
        """
        best = max((max(row.values()) for row in scores), default=0.0)
        sound = [row for row in scores if min(row.values()) > best - FLOOR]
        luck = seed_effects(sound)
        fair = [[score - luck.get(seed, 0.0) for seed, score in row.items()] for row in scores]
        sound_fair = [row for row in fair if min(row) > best - FLOOR]
        freedom = sum(len(row) - 1 for row in sound_fair)
        pooled = pooled_deviation(sound_fair) or 0.0
        return cls(
            features,
            np.array([np.mean(row) for row in fair]),
            np.array([len(row) for row in fair], int),
            float(np.sqrt((freedom * pooled**2 + PRIOR * NOISE**2) / (freedom + PRIOR))),
            earlier,
        )


def telling(scores: Sequence[float], most: int, rng: np.random.Generator) -> list[int]:
    """Places of at most so many losses that a ranker learns from: the best half of these, and a
    draw of the others. Best first."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    best, rest = order[: most // 2], order[most // 2 :]
    drawn = rng.choice(len(rest), min(len(rest), most - len(best)), replace=False)
    return best + [rest[place] for place in sorted(drawn)]


@dataclass(frozen=True)
class Ranking:
    """Candidates in the order in which they should train.

    Attributes:
        order: (n,) indices of the candidates, the one to train first at the front.
        mean: (n,) predicted mAP of each candidate (not in the order's order), or None where the
            ranker does not predict.
        deviation: (n,) standard deviation of the prediction, or None.
    """

    order: np.ndarray
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None


@dataclass(frozen=True)
class Belief:
    """What is likely of trained losses: their mAPs as means over many trainings.

    Attributes:
        mean: (m,) the best guess: what parents and winners are chosen by, in place of one lucky
            training.
        covariance: (m, m) of the guesses' errors.
    """

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def deviation(self) -> np.ndarray:
        return np.sqrt(np.diag(self.covariance))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, m): plausible truths, each the mAPs of all losses together."""
        # Rounding leaves some variances below 0: a thousandth of a deviation more mends that.
        more = 1e-6 * self.covariance.diagonal().mean() + 1e-18 if len(self.mean) else 0.0
        root = np.linalg.cholesky(self.covariance + more * np.eye(len(self.mean)))
        return self.mean + rng.normal(size=(count, len(self.mean))) @ root.T

    def take(self, losses: np.ndarray) -> Belief:
        """What is likely of some of the losses, given by their indices."""
        return Belief(self.mean[losses], self.covariance[np.ix_(losses, losses)])


class Ranker(Protocol):
    """Orders candidates. Built from the run's ``search.ranker_settings``, as keyword arguments."""

    def rank(self, features: np.ndarray, measured: Measured, rng: np.random.Generator) -> Ranking:
        """Order candidates that have not been trained.

        Args:
            features: (n, d) a row for each candidate; a row may hold NaN (a loss without a finite
                gradient). n may be 0.
            measured: what is known; may be empty.
            rng: the only source of chance, so that a resumed run repeats itself.
        """

    def belief(self, measured: Measured) -> Belief:
        """What is likely of the losses that have trained."""


def load_ranker(name: str, settings: Mapping[str, Any] | None = None) -> Ranker:
    """The ranker of that name (one of ``RANKERS``, or ``"package.module:Class"``), with settings.

    Raises:
        UserError: if there is no such ranker, or it does not take these settings.
    """
    if ":" not in RANKERS.get(name, name):
        raise ConfigError(
            f"search.ranker: no ranker {name!r}; rankers are {', '.join(RANKERS)}, or one of your "
            "own as 'package.module:Class'"
        )
    ranker = load_class(RANKERS.get(name, name), "search.ranker")
    try:
        return ranker(**(settings or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.ranker_settings: {name}: {error}") from error
