"""Rankers: who trains next."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from cse_autoloss.errors import UserError
from cse_autoloss.rankers import Belief, Measured, Ranking, load_ranker

NOTHING = Measured(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int))


class Backwards:
    """A ranker as a user would write one."""

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def rank(self, features, measured, rng):
        return Ranking(np.arange(len(features))[::-1])

    def belief(self, measured):
        return Belief(measured.scores, np.zeros((len(measured), len(measured))))


def test_shuffled_orders_all_candidates_and_repeats_itself_with_the_generator():
    ranker = load_ranker("shuffled")
    first, again = (ranker.rank(np.zeros((50, 3)), NOTHING, np.random.default_rng(1)) for _ in "ab")
    assert sorted(first.order) == list(range(50))
    assert (first.order == again.order).all() and (first.order != np.arange(50)).any()


def test_a_ranker_of_ones_own_is_loaded_by_its_path_with_its_settings():
    ranker = load_ranker("test_rankers:Backwards", {"skip": 3})
    assert ranker.skip == 3
    assert list(ranker.rank(np.zeros((3, 1)), NOTHING, np.random.default_rng()).order) == [2, 1, 0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("shufled", {}, "no ranker 'shufled'; rankers are "),
        ("no_such_module:Thing", {}, "cannot import 'no_such_module'"),
        ("test_rankers:Backwards", {"skipp": 1}, "skipp"),
        ("model", {"explore": 1.5}, r"explore should be in \[0, 1\], found 1.5"),
        ("model", {"optimism": -1}, r"optimism should be in \[0, 100\], found -1"),
    ],
)
def test_a_wrong_ranker_or_setting_is_refused_in_one_line(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        load_ranker(name, settings)
    assert "\n" not in str(caught.value)


# --- the model ---


def a_world(measured: int, candidates: int, noise: float = 0.003, seed: int = 0):
    """Losses whose mAP is smooth in their features: (measured, candidates' features, their mAP)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(measured + candidates, 3)) @ rng.normal(size=(3, 40))
    truth = 0.48 - 0.01 * (features[:, :2] ** 2).mean(1)
    seen = truth[:measured] + noise * rng.normal(size=measured)
    return Measured(features[:measured], seen, np.ones(measured, int)), features[measured:], truth


def test_the_model_puts_better_losses_first_and_predicts_within_its_deviations():
    measured, features, truth = a_world(60, 400)
    truth = truth[60:]
    ranking = load_ranker("model", {"explore": 0}).rank(
        features, measured, np.random.default_rng(1)
    )
    assert sorted(ranking.order) == list(range(400))
    assert np.median(truth[ranking.order[:10]]) > np.quantile(truth, 0.75)
    sound = truth > truth.max() - 0.04
    assert spearmanr(ranking.mean[sound], truth[sound])[0] > 0.8
    surprise = (truth - ranking.mean)[sound] / np.hypot(ranking.deviation[sound], 1e-4)
    assert (np.abs(surprise) < 3).mean() > 0.95


def test_of_losses_that_are_alike_one_stands_at_the_front():
    """Three copies of each candidate: what one of them will tell is not asked twice."""
    measured, features, _ = a_world(40, 100)
    model = load_ranker("model", {"explore": 0, "optimism": 2})
    order = model.rank(np.tile(features, (3, 1)), measured, np.random.default_rng(0)).order
    assert len(set(order[:20] % 100)) > 12
    greedy = load_ranker("model", {"explore": 0, "optimism": 0})
    order = greedy.rank(np.tile(features, (3, 1)), measured, np.random.default_rng(0)).order
    assert len(set(order[:20] % 100)) < 10, "their means alone are alike"


def test_how_bad_a_bad_loss_is_does_not_move_the_good_ones():
    measured, features, _ = a_world(60, 50)
    worst = measured.scores.argsort()[:10]
    sunk = measured.scores.copy()
    measured.scores[worst], sunk[worst] = 0.2, 0.01
    model = load_ranker("model")
    one, other = (
        model.rank(
            features,
            Measured(measured.features, scores, measured.trainings),
            np.random.default_rng(1),
        )
        for scores in (measured.scores, sunk)
    )
    assert np.allclose(one.mean, other.mean)


def test_a_loss_without_features_goes_last_and_a_share_of_the_places_is_anybodys():
    measured, features, truth = a_world(60, 1000)
    features[7] = np.nan
    poor = {}
    for explore in (0.0, 1.0):
        ranking = load_ranker("model", {"explore": explore}).rank(
            features, measured, np.random.default_rng(3)
        )
        assert ranking.order[-1] == 7 and np.isnan(ranking.mean[7])
        poor[explore] = (truth[60:][ranking.order[:90]] < np.median(truth[60:])).mean()
    assert poor[0.0] < 0.3 < 0.4 < poor[1.0] < 0.6


@pytest.mark.parametrize("count", [0, 1, 2])
def test_with_next_to_nothing_measured_the_order_is_shuffled(count):
    measured, features, _ = a_world(count, 30)
    ranking = load_ranker("model").rank(features, measured, np.random.default_rng(3))
    assert sorted(ranking.order) == list(range(30)) and ranking.mean is None


def test_duplicates_equal_scores_and_failures_are_borne():
    measured, features, _ = a_world(40, 30)
    same = Measured(
        np.repeat(measured.features[:4], 10, axis=0),
        np.repeat([0.4, 0.4, 0.0, 0.1], 10),
        measured.trainings,
    )
    model = load_ranker("model")
    for known in (same, Measured(measured.features, np.full(40, 0.4), measured.trainings)):
        ranking = model.rank(features, known, np.random.default_rng(3))
        assert sorted(ranking.order) == list(range(30)) and np.isfinite(ranking.mean).all()
        assert np.isfinite(model.belief(known).draw(10, np.random.default_rng(0))).all()
    assert len(model.rank(features[:0], measured, np.random.default_rng(3)).order) == 0


@pytest.mark.parametrize("name", ["model", "shuffled"])
def test_beliefs_are_closer_to_the_truth_than_single_trainings(name):
    measured, _, truth = a_world(80, 1, noise=0.006)
    measured = replace(measured, noise=0.006)
    belief, truth = load_ranker(name).belief(measured), truth[:80]
    sound = truth > truth.max() - 0.03
    assert np.std((belief.mean - truth)[sound]) < 0.95 * np.std((measured.scores - truth)[sound])
    surprise = ((truth - belief.mean) / belief.deviation)[sound]
    assert (np.abs(surprise) < 2).mean() > 0.85


def test_a_loss_without_a_gradient_is_judged_by_its_trainings_and_takes_nothing_from_the_others():
    measured, _, _ = a_world(40, 1)
    features = measured.features.copy()
    features[3] = np.nan
    rest = np.arange(40) != 3
    belief = load_ranker("model").belief(replace(measured, features=features))
    trainings = load_ranker("shuffled").belief(measured)
    assert belief.mean[3] == trainings.mean[3] and belief.deviation[3] == trainings.deviation[3]
    of_the_rest = load_ranker("model").belief(
        replace(
            measured,
            features=features[rest],
            scores=measured.scores[rest],
            trainings=measured.trainings[rest],
        )
    )
    assert belief.mean[rest] == pytest.approx(of_the_rest.mean)
    assert np.isfinite(belief.draw(10, np.random.default_rng(0))).all()


def test_parents_are_chosen_by_what_is_likely_not_by_one_lucky_training():
    measured, _, truth = a_world(80, 1, noise=0.006)
    mean = load_ranker("model").belief(replace(measured, noise=0.006)).mean
    truth = truth[:80]
    sound = truth > truth.max() - 0.03
    assert (
        spearmanr(mean[sound], truth[sound])[0]
        > spearmanr(measured.scores[sound], truth[sound])[0] + 0.05
    )


def test_what_is_measured_counts_failures_and_takes_off_the_luck_of_a_seed():
    rng = np.random.default_rng(0)
    truth, luck = 0.48 + 0.005 * rng.normal(size=40), np.array([0.01, -0.01, 0])
    scores = [
        {seed: mean + luck[seed] + 0.002 * rng.normal() for seed in seeds}
        for mean, seeds in zip(truth, [(0, 1, 2), (0,), (1,), (0, 1)] * 10)
    ]
    scores[3] = {0: 0.5, 1: 0.0}  # one of two trainings failed
    measured = Measured.of(np.zeros((40, 0)), scores)
    assert measured.scores[3] < 0.3 and list(measured.trainings[:4]) == [3, 1, 1, 2]
    sound = np.arange(40) != 3
    assert np.std((measured.scores - truth)[sound]) < 0.003
    assert measured.noise == pytest.approx(0.0025, abs=0.0006)
    assert len(Measured.of(np.zeros((0, 5)), [])) == 0
