"""What the search asks of a strategy: offspring for one branch, and partners for what survives.

A strategy is told everything that it builds on, and draws from the generator that it is given: it
keeps nothing, so a resumed run repeats itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cse_autoloss.config import SearchSection
from cse_autoloss.named import load_class
from cse_autoloss.space import SearchSpace
from cse_autoloss.trial import ConfigError
from cse_autoloss.variation import Population

#: The strategies that come with the package: a run's ``search.strategy`` is one of these names, or
#: ``"package.module:Class"``.
STRATEGIES = {
    "evolution": "cse_autoloss.strategies.evolution:Evolution",
    "random": "cse_autoloss.strategies.random_search:RandomSearch",
}


FITTING = "fitting"  # the operator by which a loss has other numbers than its parent; nothing else


@dataclass(frozen=True)
class Member:
    """A trained candidate: its losses (branch to expression text) and its fitness, mAP on val (of
    one training, their mean, or a ranker's estimate)."""

    id: int
    losses: Mapping[str, str]
    fitness: float


@dataclass(frozen=True, eq=False)
class Offspring:
    """New expressions and where they come from.

    Attributes:
        population: n of them.
        operators: names of what made them.
        made_by: (n,) index in ``operators``.
        parents: (n, 2) ids of the members they were made from, -1 for none.
    """

    population: Population
    operators: tuple[str, ...]
    made_by: np.ndarray
    parents: np.ndarray

    def origin(self, row: int) -> tuple[str, tuple[int, ...]]:
        """(operator, parents' ids) of an expression."""
        parents = dict.fromkeys(int(parent) for parent in self.parents[row] if parent >= 0)
        return self.operators[self.made_by[row]], tuple(parents)


class Strategy(Protocol):
    """Makes offspring. Built from the run's ``search`` section."""

    def __init__(self, settings: SearchSection) -> None: ...

    def population(self, trained: Sequence[Member]) -> Sequence[Member]:
        """Who of all trained candidates (oldest first) has offspring."""

    def ask(
        self,
        population: Sequence[Member],
        branch: str,
        space: SearchSpace,
        count: int,
        rng: np.random.Generator,
    ) -> Offspring:
        """``count`` expressions for one branch."""

    def partners(
        self, population: Sequence[Member], count: int, rng: np.random.Generator
    ) -> Sequence[Member]:
        """Members that lend their other branch's loss to what is new in one alone; none where
        there are no members, or where the default is to stand there."""


def load_strategy(name: str, settings: SearchSection) -> Strategy:
    """The strategy of that name (one of ``STRATEGIES``, or ``"package.module:Class"``).

    Raises:
        ConfigError: if there is no such strategy.
    """
    if ":" not in STRATEGIES.get(name, name):
        raise ConfigError(
            f"search.strategy: no strategy {name!r}; strategies are {', '.join(STRATEGIES)}, or "
            "one of your own as 'package.module:Class'"
        )
    strategy = load_class(STRATEGIES.get(name, name), "search.strategy")
    try:
        return strategy(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.strategy: cannot load {name!r}: {error}") from error
