"""What the search asks of a ranker: thousands of candidates in, the order in which they train out.

A ranker sees candidates as rows of numbers (``screening/features.py``) and knows neither
expressions nor detectors, so it can be tested, and replayed on tables, without either.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cse_autoloss.trial import ConfigError

#: The rankers that come with the package: a run's ``search.ranker`` is one of these names, or
#: ``"package.module:Class"``.
RANKERS = {
    "model": "cse_autoloss.rankers.model:Model",
    "shuffled": "cse_autoloss.rankers.shuffled:Shuffled",
}


@dataclass(frozen=True)
class Measured:
    """What trainings have said so far.

    Attributes:
        features: (m, d) a row for each loss that has been trained.
        scores: (m,) mean mAP over its trainings, in [0, 1].
        trainings: (m,) how many trainings each mean is of.
    """

    features: np.ndarray
    scores: np.ndarray
    trainings: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


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

    def estimate(self, measured: Measured) -> np.ndarray:
        """(m,) the mAP that each trained loss would have as a mean over many trainings, by all that
        is known: what parents are chosen by, in place of one lucky training."""


def load_ranker(name: str, settings: Mapping[str, Any] | None = None) -> Ranker:
    """The ranker of that name (one of ``RANKERS``, or ``"package.module:Class"``), with settings.

    Raises:
        ConfigError: if there is no such ranker, or it does not take these settings.
    """
    module, colon, attribute = RANKERS.get(name, name).partition(":")
    if not colon:
        raise ConfigError(
            f"search.ranker: no ranker {name!r}; rankers are {', '.join(RANKERS)}, or one of your "
            "own as 'package.module:Class'"
        )
    try:
        ranker = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"search.ranker: cannot load {name!r}: {error}") from error
    try:
        return ranker(**(settings or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.ranker_settings: {name}: {error}") from error
