"""The tabular benchmark: its rows read back, stand side by side, and say how far to trust them."""

import json

import numpy as np
import pytest

from cse_autoloss import lossbench
from cse_autoloss.errors import UserError
from cse_autoloss.expression import ExpressionError
from cse_autoloss.lossbench import Row, agreement, load, of_one_origin, reliability, table
from cse_autoloss.space import load_space

DETECTORS = sorted(path.parent.name for path in lossbench.FOLDER.glob("*/heads.jsonl"))


def row(loss, seed, val=0.4, **changes):
    same = dict(detector="d", task="head", steps=10, failure=None, cpu_seconds=1.0, scale={})
    origin = dict(weights="w", config="c", data="e")
    return Row(loss, {"cls": loss}, **{**same, **origin, **changes}, seed=seed, val=val, test=val)


def test_rows_come_back_from_their_file_and_what_is_not_there_is_named(tmp_path):
    rows = [row("a", 0), row("a", 1, None, failure="diverged at step 3")]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "heads.jsonl").write_text("".join(one.to_json() + "\n" for one in rows))
    assert load("d", folder=tmp_path) == rows
    with pytest.raises(UserError, match="no full trainings of 'd' under .*; there are .* none"):
        load("d", "full", tmp_path)
    with pytest.raises(UserError, match="no head trainings of 'e' under .*; there are those of d"):
        load("e", folder=tmp_path)


def test_a_table_has_a_row_a_loss_a_column_a_seed_and_a_gap_where_nothing_was_trained():
    made = table([row("a", 0, 0.4), row("a", 2, 0.5), row("b", 2, None)])
    assert made.names == ("a", "b") and made.seeds == (0, 2)
    assert np.array_equal(made.val, [[0.4, 0.5], [np.nan, 0.0]], equal_nan=True)
    for other in (dict(weights="other"), dict(config="other"), dict(steps=20)):
        with pytest.raises(UserError, match="rows of 2 instruments in one table"):
            table([row("a", 0), row("a", 0, **other)])
        assert row("a", 0).key != row("a", 0, **other).key, "another training"
        most = [row("a", 0), row("a", 1)]
        assert of_one_origin([row("b", 0, **other), *most]) == most


def test_reliability_is_the_share_of_the_losses_in_the_variance_whatever_seeds_do_to_all():
    rng = np.random.default_rng(0)
    losses, seeds, noise = rng.normal(0, 3, (4000, 1)), [[0, 5, -5]], rng.normal(0, 2, (4000, 3))
    found = reliability(losses + seeds + noise)
    assert found.between == pytest.approx(3, rel=0.03) and found.within == pytest.approx(
        2, rel=0.03
    )
    assert found.reliability == pytest.approx(9 / 13, abs=0.02)
    correlation = np.corrcoef((losses + noise).T)[0, 1]
    assert found.reliability == pytest.approx(correlation, abs=0.03)
    assert reliability(noise).reliability < 0.05
    with pytest.raises(ValueError, match="takes two losses and seeds, found 3 and 1"):
        reliability(noise[:3, :1])


def test_agreement_counts_the_pairs_that_the_truth_tells_apart():
    truth = np.array([[0.10, 0.12], [0.50, 0.52], [0.51, 0.53], [0.90, 0.92]])
    found = agreement(truth[[0, 2, 1, 3]], truth)
    assert found.pairs == 5, "the two in the middle are not told apart"
    assert found.right == 1.0 and found.spearman == pytest.approx(0.8)
    backwards = agreement(-truth, truth)
    assert backwards.right == 0.0 and backwards.spearman == pytest.approx(-1)
    with pytest.raises(ValueError, match="no loss of the truth has two trainings"):
        agreement(truth, truth[:, :1])


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_benchmark_holds_sound_rows(detector):
    rows = load(detector)
    stage = "two" if "rcnn" in detector else "one"
    spaces = {"cls": f"{stage}_stage_cls_plus", "reg": "reg_plus"}
    loaded = {branch: load_space(name) for branch, name in spaces.items()}
    texts = {(branch, text) for one in rows for branch, text in one.losses.items()}
    for branch, text in texts:
        try:
            loaded[branch].expression(text)
        except ExpressionError as error:
            pytest.fail(f"{branch} {text}: {error}")
    assert len({one.key for one in rows}) == len(rows), "no training stands there twice"
    for one in rows:
        assert (one.val is None) == (one.failure is not None)
        assert one.failure or 0 <= one.val <= 1 and 0 <= one.test <= 1 and one.cpu_seconds > 0
    assert any(one.loss == "default" for one in rows)
    written = lossbench.FOLDER / detector / "losses.jsonl"
    named = {"default"} | {
        f"reg {loss.name}" if branch == "reg" else loss.name
        for branch, space in loaded.items()
        for loss in space.losses.values()
    }
    if written.is_file():
        named |= {json.loads(line)["name"] for line in written.read_text().splitlines()}
    assert {one.loss for one in rows} <= named


def test_the_benchmark_is_small():
    files = [path for path in lossbench.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
