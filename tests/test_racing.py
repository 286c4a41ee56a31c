"""Racing: losses earn trainings one by one, while it is open which is the best."""

import numpy as np
import pytest

from cse_autoloss.racing import Race, after
from cse_autoloss.rankers import Belief, Measured, load_ranker

NOISE, SPREAD = 0.0033, 0.0062  # of one training, and between sound losses, as measured


def believe(means, deviation=0.002):
    return Belief(np.array(means), deviation**2 * np.eye(len(means)))


def run_race(truth, budget, rng, race=Race()):
    """Each loss trains once, then the race decides; (winner, trainings, the last decision)."""
    scores = [{0: value + NOISE * rng.normal()} for value in truth]
    nothing = np.zeros((len(truth), 0))
    while True:
        measured = Measured.of(nothing, scores)
        decision = race.decide(
            load_ranker("shuffled").belief(measured), measured.trainings, measured.noise, rng
        )
        if decision.loss is None or measured.trainings.sum() >= budget:
            return decision.leader, measured.trainings, decision
        row = scores[decision.loss]
        row[len(row)] = truth[decision.loss] + NOISE * rng.normal()


def test_a_clear_leader_ends_the_race_with_a_reason():
    decision = Race().decide(
        believe([0.50, 0.48, 0.47]), [3, 3, 3], NOISE, np.random.default_rng(0)
    )
    assert decision.loss is None and decision.leader == 0 and decision.open < 0.01
    assert "no loss can still win" in decision.reason


def test_a_lead_that_is_not_worth_a_training_does_not_keep_the_race_open():
    belief = believe([0.4800, 0.4799], deviation=0.0004)
    assert Race(margin=0.003).decide(belief, [9, 9], NOISE, np.random.default_rng(0)).loss is None
    assert Race(margin=0).decide(belief, [9, 9], NOISE, np.random.default_rng(0)).loss is not None


def test_rivals_are_those_that_may_be_better_by_more_than_the_margin_the_likeliest_first():
    belief = believe([0.470, 0.480, 0.479, 0.4795])
    assert Race().rivals(belief) == [3, 2]
    assert Race(margin=0.01).rivals(belief) == [] and Race(risk=0.0).rivals(belief) == [3, 2, 0]
    together = Belief(np.array([0.48, 0.479]), 0.005**2 * np.array([[1, 0.999], [0.999, 1]]))
    assert Race().rivals(together) == []


def test_losses_that_rise_and_fall_together_are_not_raced_against_each_other():
    together = Belief(np.array([0.48, 0.479]), 0.005**2 * np.array([[1, 0.999], [0.999, 1]]))
    assert Race().decide(together, [1, 1], NOISE, np.random.default_rng(0)).loss is None
    assert (
        Race().decide(believe([0.48, 0.479], 0.005), [1, 1], NOISE, np.random.default_rng(0)).reason
        is None
    )


def test_trainings_go_to_the_leader_and_to_whoever_may_overtake_it():
    rng, belief = np.random.default_rng(0), believe([0.480, 0.479, 0.440])
    chosen = [Race().decide(belief, [1, 1, 1], NOISE, rng).loss for _ in range(100)]
    assert min(chosen.count(0), chosen.count(1)) > 30 and chosen.count(2) == 0


def test_no_loss_trains_more_often_than_allowed_and_then_the_race_says_so():
    rng, belief, race = np.random.default_rng(0), believe([0.480, 0.479, 0.40]), Race(most=4)
    assert {race.decide(belief, [4, 2, 1], NOISE, rng).loss for _ in range(20)} == {1}
    assert {race.decide(belief, [4, 2, 1], NOISE, rng, [0, 1, 0]).loss for _ in range(20)} == {1}
    over = race.decide(belief, [4, 3, 1], NOISE, rng, running=[0, 1, 0])
    assert over.loss is None and "has trained 4 times" in over.reason


def test_a_running_training_counts_as_what_it_will_make_certain():
    belief = believe([0.48, 0.478, 0.478], 0.004)
    certain = after(belief, np.array([0.0, 8.0, 0.0]), NOISE)
    assert certain.deviation[0] == belief.deviation[0] and (certain.mean == belief.mean).all()
    assert certain.deviation[1] == pytest.approx((0.004**-2 + 8 * NOISE**-2) ** -0.5)
    rng = np.random.default_rng(0)
    chosen = [
        Race().decide(belief, [1, 1, 1], NOISE, rng, running=[8, 8, 0]).loss for _ in range(100)
    ]
    assert chosen.count(2) > 2 * chosen.count(1)


def test_the_race_halves_what_is_lost_by_believing_one_training():
    raced, once = [], []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        truth = 0.48 + SPREAD * rng.normal(size=20)
        winner, trainings, _ = run_race(truth, 40, rng)
        assert trainings.sum() <= 40
        raced.append(truth.max() - truth[winner])
        lucky = (truth + NOISE * rng.normal(size=20)).argmax()
        once.append(truth.max() - truth[lucky])
    assert np.mean(raced) < 0.5 * np.mean(once)


def test_the_race_ends_early_where_one_loss_stands_out():
    truth = np.array([0.50, *np.linspace(0.44, 0.485, 19)])
    winner, trainings, decision = run_race(truth, 200, np.random.default_rng(1))
    assert winner == 0 and trainings.sum() < 40 and "no loss can still win" in decision.reason


def test_a_loss_alone_has_won():
    decision = Race().decide(believe([0.4]), [1], NOISE, np.random.default_rng(0))
    assert (decision.loss, decision.leader, decision.reason) == (None, 0, "one loss is left")
