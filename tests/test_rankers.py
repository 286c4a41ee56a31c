"""Rankers: who trains next."""

import numpy as np
import pytest

from cse_autoloss.rankers import Measured, Ranking, load_ranker
from cse_autoloss.trial import ConfigError

NOTHING = Measured(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int))


class Backwards:
    """A ranker as a user would write one."""

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def rank(self, features, measured, rng):
        return Ranking(np.arange(len(features))[::-1])


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
        ("no_such_module:Thing", {}, "cannot load 'no_such_module:Thing'"),
        ("test_rankers:Backwards", {"skipp": 1}, "skipp"),
    ],
)
def test_a_wrong_ranker_or_setting_is_refused_in_one_line(name, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_ranker(name, settings)
    assert "\n" not in str(caught.value)
