"""Trees grown from nothing, round after round: what evolution has to be better than."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cse_autoloss.config import SearchSection
from cse_autoloss.space import SearchSpace
from cse_autoloss.strategies.base import Member, Offspring
from cse_autoloss.variation import grow


class RandomSearch:
    """Learns nothing; a loss that is new in one branch stands beside the default of the other."""

    def __init__(self, settings: SearchSection) -> None:
        pass

    def population(self, trained: Sequence[Member]) -> Sequence[Member]:
        return ()

    def ask(
        self,
        population: Sequence[Member],
        branch: str,
        space: SearchSpace,
        count: int,
        rng: np.random.Generator,
    ) -> Offspring:
        made_by, parents = np.zeros(count, np.int8), np.full((count, 2), -1)
        return Offspring(grow(rng, count, space), ("growth",), made_by, parents)

    def partners(
        self, population: Sequence[Member], count: int, rng: np.random.Generator
    ) -> Sequence[Member]:
        return ()
