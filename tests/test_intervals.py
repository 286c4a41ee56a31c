"""Intervals: what a few seeds can say."""

import math

import numpy as np
import pytest
from scipy import stats

from cse_autoloss.intervals import (
    LossAndSeed,
    mean_interval,
    mean_over_groups,
    paired_interval,
    pooled_deviation,
    seed_effects,
)


def test_the_interval_is_students():
    values = [0.48, 0.49, 0.485, 0.478]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.n == 4 and interval.text() == "0.483 ± 0.009"
    assert mean_interval([0.01, 0.012, 0.011]).above_zero
    assert not mean_interval([0.01, -0.012, 0.011]).above_zero


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for level in (0.8, 0.95):
        intervals = [mean_interval(rng.normal(size=3), level) for _ in range(2000)]
        held = np.mean([interval.low < 0 < interval.high for interval in intervals])
        assert held == pytest.approx(level, abs=0.03)


def test_one_seed_says_nothing_about_its_error_and_none_nothing():
    one = mean_interval([0.5])
    assert one.mean == 0.5 and math.isinf(one.half) and one.text() == "0.500"
    assert not one.above_zero and math.isnan(mean_interval([]).mean)


def test_a_gain_is_paired_by_seed_and_seeds_of_one_side_alone_do_not_count():
    gain = paired_interval({1: 0.50, 2: 0.40, 3: 0.9}, {1: 0.49, 2: 0.39, 7: 0.1})
    assert gain.mean == pytest.approx(0.01) and gain.half < 1e-9 and gain.n == 2
    assert gain.text(sign=True) == "+0.010 ± 0.000"


def test_seeds_of_one_warm_up_are_not_counted_as_independent():
    rng = np.random.default_rng(1)
    groups = [luck + 0.001 * rng.normal(size=5) for luck in 0.05 * rng.normal(size=3)]
    grouped, all_alike = mean_over_groups(groups), mean_interval(np.concatenate(groups))
    assert grouped.mean == pytest.approx(all_alike.mean)
    assert grouped.n == 3 and grouped.half > 2 * all_alike.half


def test_the_deviation_within_losses_is_pooled_over_them():
    rng = np.random.default_rng(2)
    groups = [mean + 0.004 * rng.normal(size=3) for mean in rng.uniform(0, 1, 500)]
    assert pooled_deviation([*groups, [0.3]]) == pytest.approx(0.004, rel=0.1)
    assert pooled_deviation([[0.3], []]) is None


def test_what_a_seed_does_to_all_losses_is_found_and_one_loss_alone_shows_little():
    rng = np.random.default_rng(3)
    means = 0.48 + 0.02 * rng.normal(size=30)
    scores = [
        {7: mean + 0.005, 9: mean - 0.005} if i % 2 else {7: mean} for i, mean in enumerate(means)
    ]
    assert seed_effects(scores) == pytest.approx({7: 0.0042, 9: -0.0042}, abs=0.0005)
    assert abs(seed_effects(scores[:2])[7]) < 0.0015
    assert seed_effects([]) == {} and seed_effects([{1: 0.4}, {2: 0.5}]) == {1: 0, 2: 0}


def test_with_two_losses_the_fit_is_the_paired_interval():
    first, second = {0: 0.47, 1: 0.49, 2: 0.468}, {0: 0.465, 1: 0.478, 2: 0.466}
    fit, paired = LossAndSeed({"a": first, "b": second}), paired_interval(first, second)
    gain = fit.gain("a", "b")
    assert (gain.mean, gain.half, gain.n) == pytest.approx((paired.mean, paired.half, 3))
    assert fit.freedom == 2


def test_many_losses_tell_the_noise_and_what_they_say_holds():
    rng = np.random.default_rng(4)
    held, widths = [], []
    for _ in range(300):
        luck = 0.01 * rng.normal(size=3)
        scores = {
            f"{loss}": {
                seed: 0.001 * loss + luck[seed] + 0.002 * rng.normal()
                for seed in range(3 if loss < 5 else 2)
            }
            for loss in range(20)
        }
        gain = LossAndSeed(scores).gain("7", "0")
        held.append(gain.low < 0.007 < gain.high)
        widths.append(gain.half)
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)
    assert np.mean(widths) < 0.0045  # two seeds alone: 0.018


def test_losses_that_no_seeds_link_are_not_compared():
    scores = {"a": {0: 0.5, 1: 0.51, 2: 0.49}, "b": {0: 0.52, 1: 0.53, 2: 0.52}, "far": {7: 0.6}}
    gain = LossAndSeed(scores).gain("far", "a")
    assert math.isnan(gain.mean) and math.isinf(gain.half) and gain.n == 1
    assert LossAndSeed(scores).gain("b", "a").half < 0.02
    linked = LossAndSeed({**scores, "link": {1: 0.5, 7: 0.58}}).gain("far", "a")
    assert linked.mean == pytest.approx(0.6 - 0.58 + 0.5 - 0.51, abs=0.01)  # by way of the link
    assert LossAndSeed(scores).gain("a", "a").mean == 0


def test_one_seed_of_each_loss_says_nothing_about_the_noise():
    fit = LossAndSeed({"a": {0: 0.5}, "b": {0: 0.4}})
    gain = fit.gain("a", "b")
    assert gain.mean == pytest.approx(0.1) and math.isinf(gain.half) and math.isnan(fit.noise)
