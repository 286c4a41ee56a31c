"""What is said beside a comparison that cannot tell much."""

from dataclasses import replace

import pytest

from cse_autoloss.caveats import caveats
from cse_autoloss.status import Compared


def row(label, test, default):
    gain = tuple(a - b for a, b in zip(test, default, strict=True)) if label != "default" else ()
    return Compared(label, {}, tuple(test), tuple(test), gain, ())


def rows(default, other):
    return [row("default", default, default), row("found #7", other, default)]


def test_a_default_that_has_hardly_learned_is_named_with_what_would_help():
    (said,) = caveats(rows([0.01, 0.012, 0.011], [0.04, 0.041, 0.042]))
    assert "mAP 0.011 on test, below 0.05" in said and "detector.steps" in said


def test_a_default_that_failed_with_a_seed_makes_gains_too_high():
    failed = replace(row("default", [0.3, 0.0], [0.3, 0.0]), failures=("loss is NaN",))
    said, _ = caveats([failed, row("found #7", [0.31, 0.3], [0.3, 0.0])])
    assert said.startswith("1 of the default losses' trainings failed")
    assert "gains over them are too high" in said


def test_a_difference_that_seeds_alone_could_make_is_named():
    (said,) = caveats(rows([0.30, 0.34, 0.32], [0.33, 0.33, 0.34]))
    assert "+0.013 ± 0.052 (found #7)" in said and "more seeds" in said
    (said,) = caveats([*rows([0.30, 0.32], [0.31, 0.34]), row("B", [0.31, 0.32], [0.30, 0.32])])
    assert "(found #7)" in said  # of several the largest


def test_a_gain_in_every_seed_is_no_luck_however_far_the_seeds_are_apart():
    default = [0.48, 0.50, 0.52, 0.49, 0.51]
    steady = [a + b for a, b in zip(default, (0.01, 0.011, 0.009, 0.011, 0.01), strict=True)]
    assert caveats(rows(default, steady)) == []


def test_how_many_seeds_would_tell_is_estimated_from_the_paired_differences():
    seeds = [0.30, 0.32, 0.34, 0.36]
    (said,) = caveats(rows(seeds, [seed + shift for seed, shift in zip(seeds, (0, 0.01) * 2)]))
    assert "+0.005 ± 0.009 (found #7)" in said
    assert "about 8 would tell" in said  # t with 7 degrees of freedom, 2.36 * 0.0058 / 8**0.5
    (said,) = caveats(rows(seeds, [seed + shift for seed, shift in zip(seeds, (0.02, -0.01) * 2)]))
    assert "about 49 would tell" in said


@pytest.mark.parametrize(
    "table", [[], rows([0.3], [0.4]), rows([0.3, 0.31, 0.3], [0.4, 0.41, 0.42])]
)
def test_nothing_is_said_where_there_is_nothing_to_warn_of(table):
    assert caveats(table) == []
