"""What is said beside a comparison that cannot tell much."""

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


def test_a_difference_that_is_smaller_than_the_spread_over_seeds_is_named():
    (said,) = caveats(rows([0.30, 0.34, 0.32], [0.33, 0.33, 0.34]))
    assert "+0.013 (found #7)" in said and "more seeds" in said
    seeds = [0.30, 0.32, 0.34, 0.36]
    (said,) = caveats(rows(seeds, [seed + shift for seed, shift in zip(seeds, (0, 0.01) * 2)]))
    assert "+0.005 (found #7)" in said and "about 6 would tell" in said


def test_how_many_seeds_would_tell_is_estimated_from_the_paired_differences():
    default = [0.30, 0.32, 0.34, 0.36]
    other = [a + b for a, b in zip(default, (0.02, -0.01, 0.02, -0.01), strict=True)]
    (said,) = caveats(rows(default, other))
    assert "about 47 would tell" in said  # (1.96 * 0.01732 / 0.005) ** 2 = 46.1


@pytest.mark.parametrize(
    "table", [[], rows([0.3], [0.4]), rows([0.3, 0.31, 0.3], [0.4, 0.41, 0.42])]
)
def test_nothing_is_said_where_there_is_nothing_to_warn_of(table):
    assert caveats(table) == []
