"""Trees grow, mutate and cross in arrays, and stay expressions of their space."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cse_autoloss import Expression, load_space
from cse_autoloss.space import space_names
from cse_autoloss.variation import (
    OFFSPRING_MAX_DEPTH,
    OFFSPRING_MAX_SIZE,
    PAD,
    Population,
    crossover,
    grow,
    mutate,
)

spaces = pytest.mark.parametrize(
    "space", [load_space(name) for name in space_names()], ids=lambda space: space.name
)
seeds = st.integers(0, 2**32 - 1)


def assert_valid(population, space):
    for row, expression in enumerate(population.expressions()):
        assert Expression.parse(str(expression), space) == expression
        assert (
            expression.size == population.lengths[row]
            and expression.depth == population.depths[row]
        )
        assert (population.programs[row, expression.size :] == PAD).all()


@spaces
@settings(max_examples=10, deadline=None)
@given(seed=seeds, low=st.integers(0, 4), more=st.integers(0, 3))
def test_grown_trees_are_expressions_within_their_depths(space, seed, low, more):
    population = grow(np.random.default_rng(seed), 60, space, low, low + more)
    assert_valid(population, space)
    assert len(population) == 60
    assert population.depths.min() >= low and population.depths.max() <= low + more


@spaces
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_offspring_are_expressions_within_the_limits(space, seed):
    rng = np.random.default_rng(seed)
    known = Population.from_expressions([loss.expression for loss in space.losses.values()], space)
    parents = Population.concatenate([known, grow(rng, 40, space, 2, 9)])
    for offspring in (
        mutate(rng, parents, space),
        crossover(rng, parents, parents.take(rng.permutation(len(parents))), space),
    ):
        assert len(offspring) == len(parents)
        assert_valid(offspring, space)
        grew = [
            child != parent for child, parent in zip(offspring.expressions(), parents.expressions())
        ]
        assert all(
            size <= OFFSPRING_MAX_SIZE and depth <= OFFSPRING_MAX_DEPTH or not changed
            for size, depth, changed in zip(offspring.lengths, offspring.depths, grew)
        )


@spaces
def test_the_same_seed_gives_the_same_trees(space):
    def offspring():
        rng = np.random.default_rng(5)
        parents = grow(rng, 200, space)
        return crossover(rng, mutate(rng, parents, space), parents, space).expressions()

    assert offspring() == offspring()


@spaces
def test_a_population_keeps_what_is_put_into_it(space):
    expressions = [loss.expression for loss in space.losses.values()]
    population = Population.from_expressions(expressions, space)
    assert population.expressions() == expressions
    assert population.take(np.array([1, 0, 1])).expressions() == [expressions[i] for i in (1, 0, 1)]
    grown = grow(np.random.default_rng(0), 5, space)
    assert (
        Population.concatenate([population, grown]).expressions()
        == expressions + grown.expressions()
    )
    assert Population.concatenate([grown.slice(0, 0), grown]).expressions() == grown.expressions()


@spaces
def test_subtree_sizes_are_those_of_the_expression(space):
    population = grow(np.random.default_rng(1), 50, space)
    for row, expression in enumerate(population.expressions()):
        for start in range(expression.size):
            subtree = expression.subtree(start)
            assert population.sizes[row, start] == subtree.stop - subtree.start


def test_half_of_the_trees_are_full_and_all_depths_are_equally_likely():
    """The law of DEAP's genHalfAndHalf: in a full tree every branch ends at the depth limit."""
    space = load_space("reg")
    population = grow(np.random.default_rng(2), 4000, space, 3, 6)
    shares = np.bincount(population.depths, minlength=7)[3:] / len(population)
    # trees that were grown, not filled, often stay below their limit
    assert shares[3] < shares[0] and shares.min() > 0.15

    def full(expression):
        depths = expression.fold(
            lambda name: {0}, lambda primitive, args: {1 + depth for arg in args for depth in arg}
        )
        return len(depths) == 1

    binary = [
        expression
        for expression in population.expressions()
        if expression.size > expression.depth + 1
    ]
    assert 0.4 < np.mean([full(expression) for expression in binary]) < 0.8


@spaces
def test_mutation_changes_most_trees_and_crossover_mixes(space):
    rng = np.random.default_rng(3)
    parents = grow(rng, 500, space, 3, 6)
    mutants = mutate(rng, parents, space).expressions()
    assert np.mean([a != b for a, b in zip(mutants, parents.expressions())]) > 0.75
    leaf, tree = (
        Population.from_expressions([Expression.parse(text, space)] * 300, space)
        for text in (next(iter(space.variables)), "Neg(Neg(Neg(1)))")
    )
    children = {str(child) for child in crossover(rng, tree, leaf, space).expressions()}
    name = next(iter(space.variables))
    assert children == {name, f"Neg({name})", f"Neg(Neg({name}))", f"Neg(Neg(Neg({name})))"}
    # longer than any mother
    grown = {str(child) for child in crossover(rng, leaf, tree, space).expressions()}
    assert grown == {"1", "Neg(1)", "Neg(Neg(1))", "Neg(Neg(Neg(1)))"}


def test_impossible_arguments_are_refused():
    space, rng = load_space("reg"), np.random.default_rng(0)
    with pytest.raises(
        ValueError, match="depths: expected 0 <= min_depth <= max_depth <= 15, found 5 and 4"
    ):
        grow(rng, 3, space, 5, 4)
    with pytest.raises(ValueError, match="2 mothers and 3 fathers"):
        crossover(rng, grow(rng, 2, space), grow(rng, 3, space), space)
