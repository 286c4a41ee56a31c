"""Evolution: the fittest (or youngest) trained candidates are mutated and crossed, beside fresh
growth.

Real et al., Regularized Evolution for Image Classifier Architecture Search (AAAI 2019), is where
``survival: age`` comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from cse_autoloss.config import SearchSection
from cse_autoloss.expression import Expression
from cse_autoloss.literals import is_number
from cse_autoloss.space import SearchSpace
from cse_autoloss.strategies.base import FITTING, Member, Offspring
from cse_autoloss.variation import Population, crossover, grow, mutate, rescale

OPERATORS = ("growth", "mutation", "crossover", FITTING)
LEADERS = 3  # whose numbers are changed
FITTED = 32  # offspring a round that are made so


class Evolution:
    """Works on the branches' expressions one by one (that is how they are screened), and on
    members, which hold the losses of all searched branches together with their fitness."""

    def __init__(self, settings: SearchSection) -> None:
        self._settings = settings

    def population(self, trained: Sequence[Member]) -> Sequence[Member]:
        """The best, or the youngest, as ``search.survival`` says; oldest first."""
        size = self._settings.population
        if self._settings.survival == "age":
            return tuple(trained[-size:])
        best = sorted(range(len(trained)), key=lambda place: (-trained[place].fitness, -place))
        return tuple(trained[place] for place in sorted(best[:size]))

    def ask(
        self,
        population: Sequence[Member],
        branch: str,
        space: SearchSpace,
        count: int,
        rng: np.random.Generator,
    ) -> Offspring:
        """Offspring that are mutated, crossed, and freshly grown, in the settings' shares, and
        leading losses with other numbers. Without members that have a loss in this branch, all are
        grown."""
        members = [member for member in population if branch in member.losses]
        mutated, crossed = (
            int(count * share) if members else 0
            for share in (self._settings.mutation, self._settings.crossover)
        )
        leaders = self._leaders(members, branch, space)
        fitted = min(FITTED, count - mutated - crossed) if leaders else 0
        grown = count - mutated - crossed - fitted
        parts, parents = [grow(rng, grown, space)], np.full((count, 2), -1)
        if members:
            ids = np.array([member.id for member in members])
            pool = Population.from_expressions(
                [Expression.parse(member.losses[branch], space) for member in members], space
            )
            chosen, mothers, fathers = (
                self._select(members, size, rng) for size in (mutated, crossed, crossed)
            )
            parts += [
                mutate(rng, pool.take(chosen), space),
                crossover(rng, pool.take(mothers), pool.take(fathers), space),
            ]
            parents[grown : grown + mutated, 0] = ids[chosen]
            parents[grown + mutated : count - fitted] = np.stack(
                [ids[mothers], ids[fathers]], axis=1
            )
        if fitted:
            turns = [leaders[place % len(leaders)] for place in range(fitted)]
            pool = Population.from_expressions(
                [Expression.parse(member.losses[branch], space) for member in turns], space
            )
            parts.append(rescale(rng, pool, space))
            parents[count - fitted :, 0] = [member.id for member in turns]
        kinds = np.arange(len(OPERATORS), dtype=np.int8)
        made_by = np.repeat(kinds, (grown, mutated, crossed, fitted))
        return Offspring(Population.concatenate(parts), OPERATORS, made_by, parents)

    def _leaders(self, members: Sequence[Member], branch: str, space: SearchSpace) -> list[Member]:
        """The fittest whose loss has a number that may be another, of those that share it the
        first."""
        fittest: dict[str, Member] = {}
        for member in sorted(members, key=lambda member: -member.fitness):
            fittest.setdefault(member.losses[branch], member)
        numbered = (
            member
            for member in fittest.values()
            if any(map(is_number, Expression.parse(member.losses[branch], space).program))
        )
        fitting = space.real_constants and self._settings.fitting > 0
        return list(itertools.islice(numbered, LEADERS)) if fitting else []

    def partners(
        self, population: Sequence[Member], count: int, rng: np.random.Generator
    ) -> Sequence[Member]:
        """By tournament."""
        if not population:
            return ()
        return [population[place] for place in self._select(population, count, rng)]

    def _select(
        self, members: Sequence[Member], count: int, rng: np.random.Generator
    ) -> np.ndarray:
        fitness = np.array([member.fitness for member in members])
        return tournament(rng, fitness, count, self._settings.tournament)


def tournament(rng: np.random.Generator, fitness: np.ndarray, count: int, size: int) -> np.ndarray:
    """Indices of ``count`` winners, each the fittest of ``size`` drawn with replacement. Shape
    (count,)."""
    drawn = rng.integers(len(fitness), size=(count, size))
    return drawn[np.arange(count), fitness[drawn].argmax(axis=1)]
