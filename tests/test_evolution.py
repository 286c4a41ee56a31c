"""The population: ask and tell on an explicit state that can be written down and read back."""

import numpy as np
import pytest

from cse_autoloss import Expression, load_space
from cse_autoloss.config import SearchSection
from cse_autoloss.evolution import Member, State, ask, partner, tell, tournament

REG = load_space("reg")


def member(fitness, text="Sub(1,Div(I,U))"):
    return Member({"reg": text}, fitness)


def texts(population):
    return [str(population.expression(i)) for i in range(len(population))]


def test_the_same_state_asks_for_the_same_offspring_also_after_it_was_written_down():
    settings = SearchSection(branch="reg")
    state = tell(State.initial(3), member(0.3), settings)
    first, after = ask(state, 200, "reg", REG, settings)
    second, _ = ask(State.from_json(state.to_json()), 200, "reg", REG, settings)
    assert texts(first) == texts(second)
    third, _ = ask(after, 200, "reg", REG, settings)
    assert texts(first) != texts(third), "the state goes on"


def test_offspring_are_expressions_of_the_space_and_resemble_their_parents():
    settings = SearchSection(branch="reg", mutation=0.5, crossover=0.5)
    state = State.initial(0)
    for text in ("Sub(1,Div(I,U))", "Neg(Log(Div(I,U)))"):
        state = tell(state, member(0.3, text), settings)
    offspring, _ = ask(state, 500, "reg", REG, settings)
    assert len(offspring) == 500
    read = [Expression.parse(text, REG) for text in texts(offspring)]
    assert np.mean(["Div(I,U)" in str(e) for e in read]) > 0.2


def test_without_members_all_offspring_are_grown():
    settings = SearchSection(branch="reg", mutation=0.5, crossover=0.5)
    offspring, _ = ask(State.initial(0), 50, "reg", REG, settings)
    assert len(offspring) == 50
    assert partner(State.initial(0), settings)[0] is None


@pytest.mark.parametrize(
    ("survival", "left"), [("best", [0.2, 0.3, 0.4]), ("age", [0.3, 0.1, 0.4])]
)
def test_the_population_keeps_its_best_or_its_youngest(survival, left):
    settings = SearchSection(survival=survival, population=3)
    state = State.initial(0)
    for fitness in (0.2, 0.3, 0.1, 0.4):
        state = tell(state, member(fitness), settings)
    assert [m.fitness for m in state.members] == left


def test_a_tournament_prefers_the_fit_the_more_the_larger_it_is():
    fitness, rng = np.arange(10.0), np.random.default_rng(0)
    means = [fitness[tournament(rng, fitness, 4000, size)].mean() for size in (1, 2, 8)]
    assert means[0] == pytest.approx(4.5, abs=0.15) and means == sorted(means) and means[2] > 8
