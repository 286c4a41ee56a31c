"""The population: ask() for offspring, tell() a fitness. The state is explicit, immutable, and can
be written down.

Evolution works on the branches' expressions one by one (that is how they are screened) and on
members, which hold the losses of all searched branches together with their fitness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cse_autoloss.config import SearchSection
from cse_autoloss.expression import Expression
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population, crossover, grow, mutate


@dataclass(frozen=True)
class Member:
    """Losses (branch to expression text) and their fitness, mAP on val."""

    losses: Mapping[str, str]
    fitness: float


@dataclass(frozen=True)
class State:
    """All that evolution knows: the members, oldest first, and the random generator's state."""

    members: tuple[Member, ...]
    random: Mapping[str, Any]

    @classmethod
    def initial(cls, seed: int) -> State:
        return cls((), np.random.default_rng(seed).bit_generator.state)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> State:
        data = json.loads(text)
        return cls(tuple(Member(**member) for member in data["members"]), data["random"])


def generator(state: State) -> np.random.Generator:
    """A generator that goes on where the state's stopped; hand it back with ``replace(state,
    random=...)``."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state.random
    return rng


def ask(
    state: State, count: int, branch: str, space: SearchSpace, settings: SearchSection
) -> tuple[Population, State]:
    """``count`` offspring expressions for one branch: mutated, crossed, and freshly grown, in the
    settings' shares.

    Without members, all are grown.
    """
    rng = generator(state)
    parents = [member for member in state.members if branch in member.losses]
    mutated, crossed = (
        int(count * share) if parents else 0 for share in (settings.mutation, settings.crossover)
    )
    offspring = [grow(rng, count - mutated - crossed, space)]
    if parents:
        pool = Population.from_expressions(
            [Expression.parse(member.losses[branch], space) for member in parents], space
        )
        fitness = np.array([member.fitness for member in parents])

        def select(size: int) -> Population:
            return pool.take(tournament(rng, fitness, size, settings.tournament))

        offspring += [
            mutate(rng, select(mutated), space),
            crossover(rng, select(crossed), select(crossed), space),
        ]
    return Population.concatenate(offspring), replace(state, random=rng.bit_generator.state)


def partner(state: State, settings: SearchSection) -> tuple[Member | None, State]:
    """A member chosen by tournament, to lend its losses to offspring that are new in one branch
    only."""
    if not state.members:
        return None, state
    rng = generator(state)
    (winner,) = tournament(
        rng, np.array([member.fitness for member in state.members]), 1, settings.tournament
    )
    return state.members[winner], replace(state, random=rng.bit_generator.state)


def tell(state: State, member: Member, settings: SearchSection) -> State:
    """Take in a member that has been trained; the population keeps its best, or its youngest."""
    members = (*state.members, member)
    if len(members) > settings.population:
        leaves = (
            0
            if settings.survival == "age"
            else min(range(len(members)), key=lambda i: members[i].fitness)
        )
        members = members[:leaves] + members[leaves + 1 :]
    return replace(state, members=members)


def tournament(rng: np.random.Generator, fitness: np.ndarray, count: int, size: int) -> np.ndarray:
    """Indices of ``count`` winners, each the fittest of ``size`` drawn with replacement. Shape
    (count,)."""
    drawn = rng.integers(len(fitness), size=(count, size))
    return drawn[np.arange(count), fitness[drawn].argmax(axis=1)]
