"""Strategies keep nothing: what they make follows from who has trained and from the generator."""

import numpy as np
import pytest

from cse_autoloss import Expression, load_space
from cse_autoloss.config import SearchSection
from cse_autoloss.errors import UserError
from cse_autoloss.strategies import Member, load_strategy
from cse_autoloss.strategies.evolution import FITTED, Evolution, tournament
from cse_autoloss.strategies.random_search import RandomSearch

REG = load_space("reg")
FORMULAS = ("Sub(1,Div(I,U))", "Neg(Log(Div(I,U)))", "Sub(1,Div(I,E))")


def members(*fitness):
    return [
        Member(number, {"reg": FORMULAS[number % 3]}, value) for number, value in enumerate(fitness)
    ]


def ask(strategy, population, count=300, seed=0):
    return strategy.ask(population, "reg", REG, count, np.random.default_rng(seed))


def texts(offspring):
    return [str(expression) for expression in offspring.population.expressions()]


@pytest.mark.parametrize("name", ["evolution", "random"])
def test_the_same_generator_makes_the_same_offspring_of_the_space(name):
    strategy = load_strategy(name, SearchSection())
    population = strategy.population(members(0.3, 0.2))
    first, again, other = (ask(strategy, population, seed=seed) for seed in (1, 1, 2))
    assert texts(first) == texts(again) != texts(other)
    assert len(texts(first)) == 300
    assert all(Expression.parse(text, REG) for text in texts(first))


def test_offspring_resemble_their_parents_and_say_who_they_are():
    strategy = Evolution(SearchSection(mutation=0.5, crossover=0.4))
    offspring = ask(strategy, members(0.3, 0.3), 500)
    assert np.mean(["Div(I,U)" in text for text in texts(offspring)]) > 0.2
    kinds = [offspring.origin(row) for row in range(500)]
    counted = [sum(kind == name for kind, _ in kinds) for name in offspring.operators]
    assert counted == [50, 250, 200, 0]
    assert all(parents == () for kind, parents in kinds if kind == "growth")
    assert {parents for kind, parents in kinds if kind == "mutation"} == {(0,), (1,)}
    assert {parents for kind, parents in kinds if kind == "crossover"} == {
        (0,),
        (1,),
        (0, 1),
        (1, 0),
    }


def test_a_leader_s_numbers_are_changed_and_nothing_else():
    plus = load_space("reg_plus")
    losses = ("Sub(1,Pow(Div(I,U),3))", "Div(U,I)", "Sub(1,Div(I,Add(E,0.5)))", "Neg(Div(I,U))")
    population = [Member(n, {"reg": text}, 0.1 * n) for n, text in enumerate(losses)]
    offspring = Evolution(SearchSection()).ask(
        population, "reg", plus, 300, np.random.default_rng(0)
    )
    fitted = [
        (expression, parents)
        for row, expression in enumerate(offspring.population.expressions())
        for kind, parents in [offspring.origin(row)]
        if kind == "fitting"
    ]
    assert len(fitted) == FITTED and len(offspring.population) == 300

    def shape(expression):
        return ["number" if name[0].isdigit() else name for name in expression.program]

    assert {parents for _, parents in fitted} == {(0,), (2,)}, "who has a number"
    for expression, (parent,) in fitted:
        original = Expression.parse(losses[parent], plus)
        assert shape(expression) == shape(original) and expression != original
    numbers = {name for e, (parent,) in fitted if parent == 2 for name in e.program if "." in name}
    assert len(numbers) > 10 and all(0.05 < float(number) < 5 for number in numbers)
    kinds = {
        Evolution(SearchSection())
        .ask(members(0.3), "reg", REG, 300, np.random.default_rng(0))
        .origin(row)[0]
        for row in range(300)
    }
    assert "fitting" not in kinds, "a space without real constants"


def test_pairs_that_share_a_loss_are_one_leader_of_it():
    plus = load_space("reg_plus")
    losses = ["Sub(1,Div(I,Add(E,0.5)))", "Sub(1,Pow(Div(I,U),3))", *["Sub(2,Div(I,U))"] * 4]
    population = [Member(n, {"reg": text}, 0.1 * n) for n, text in enumerate(losses)]
    offspring = Evolution(SearchSection()).ask(
        population, "reg", plus, 300, np.random.default_rng(0)
    )
    origins = [offspring.origin(row) for row in range(300)]
    assert {parents for kind, parents in origins if kind == "fitting"} == {(5,), (1,), (0,)}


def test_without_members_all_offspring_are_grown():
    offspring = ask(Evolution(SearchSection(mutation=0.5, crossover=0.5)), [])
    assert len(texts(offspring)) == 300
    assert {offspring.origin(row) for row in range(300)} == {("growth", ())}


def test_members_without_a_loss_in_the_branch_have_no_offspring_there():
    population = [Member(1, {"cls": "Neg(Dot(Y,Log(Softmax(X))))"}, 0.9)]
    offspring = ask(Evolution(SearchSection()), population)
    assert {offspring.origin(row)[0] for row in range(300)} == {"growth"}


def test_the_population_keeps_its_best_or_its_youngest():
    trained = members(0.1, 0.4, 0.2, 0.3)
    best = Evolution(SearchSection(population=2, survival="best")).population(trained)
    young = Evolution(SearchSection(population=2, survival="age")).population(trained)
    assert [member.fitness for member in best] == [0.4, 0.3]
    assert [member.fitness for member in young] == [0.2, 0.3]
    everybody = Evolution(SearchSection(population=9)).population(trained)
    assert [member.fitness for member in everybody] == [0.1, 0.4, 0.2, 0.3]


def test_the_fitter_lend_their_losses_more_often():
    partners = Evolution(SearchSection(tournament=3)).partners(
        members(0.1, 0.2, 0.3), 300, np.random.default_rng(0)
    )
    counts = [sum(member.id == number for member in partners) for number in range(3)]
    assert counts[0] < counts[1] < counts[2]


def test_a_random_search_builds_on_nobody():
    strategy = RandomSearch(SearchSection())
    assert strategy.population(members(0.3)) == ()
    assert strategy.partners((), 5, np.random.default_rng(0)) == ()


def test_a_tournament_of_many_is_won_by_the_fittest_and_of_one_by_anybody():
    fitness = np.array([0.1, 0.3, 0.2])
    assert (tournament(np.random.default_rng(0), fitness, 50, 40) == 1).all()
    assert set(tournament(np.random.default_rng(0), fitness, 50, 1)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evolutoin", "no strategy 'evolutoin'; strategies are evolution, random, or one of your"),
        ("nowhere:Thing", "cannot import 'nowhere'"),
        ("json:Thing", "'json:Thing' should lead to a class"),
    ],
)
def test_a_strategy_that_is_not_there_is_refused(name, message):
    with pytest.raises(UserError, match=f"search.strategy: {message}"):
        load_strategy(name, SearchSection())
