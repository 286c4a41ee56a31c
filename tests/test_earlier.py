"""What was measured before a run, and what its ranker makes of it."""

from dataclasses import replace

import formula
import numpy as np
import pytest
from scipy.stats import spearmanr

from cse_autoloss import earlier, load_space
from cse_autoloss.breeder import InlineBreeder
from cse_autoloss.config import parse_config
from cse_autoloss.earlier import as_measured, read_earlier
from cse_autoloss.errors import UserError
from cse_autoloss.journal import Journal
from cse_autoloss.lossbench import FOLDER, TASKS, read_rows
from cse_autoloss.rankers import Measured, load_ranker, telling
from cse_autoloss.search import Search
from cse_autoloss.simulated import SimulatedCluster

TWO_STAGE = {"cls": "two_stage_cls", "reg": "reg"}
CONFIG = {
    "search": {"known": 2, "offspring": 800, "candidates": 4, "ranker": "model"},
    "stages": {"full": {"seeds": 2}, "final": {"best": 1, "seeds": 1}},
}


def spaces(names=TWO_STAGE):
    return {branch: load_space(name) for branch, name in names.items()}


def worlds(own: int, seed: int = 0):
    """(measured, candidates' features, their mAP): a run, and eighty losses that were trained
    before it, whose mAP is the same function of the features and other noise, 0.2 lower."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(own + 80 + 300, 3)) @ rng.normal(size=(3, 40))
    truth = 0.48 - 0.006 * (features[:, :2] ** 2).mean(1)
    seen = truth + 0.002 * rng.normal(size=len(truth))
    before = slice(own, own + 80)
    earlier = Measured(features[before], seen[before] - 0.2, np.ones(80, int))
    measured = Measured(features[:own], seen[:own], np.ones(own, int), earlier=[earlier])
    return measured, features[own + 80 :], truth[own + 80 :]


def predicted(measured, features):
    return load_ranker("model").rank(features, measured, np.random.default_rng(1)).mean


@pytest.mark.parametrize("own", [0, 6])
def test_the_model_knows_from_earlier_trainings_what_its_own_few_cannot_tell(own):
    measured, features, truth = worlds(own)
    sound = truth > truth.max() - 0.03
    found = predicted(measured, features)
    assert spearmanr(found[sound], truth[sound])[0] > 0.8
    alone = predicted(replace(measured, earlier=()), features)
    assert alone is None or spearmanr(alone[sound], truth[sound])[0] < 0.7


def test_earlier_trainings_say_nothing_of_the_level():
    measured, features, truth = worlds(6)
    found = predicted(measured, features)
    sound = truth > truth.max() - 0.03
    assert abs(np.median((found - truth)[sound])) < 0.004  # where its own trainings are
    (earlier,) = measured.earlier
    higher = replace(measured, earlier=[replace(earlier, scores=earlier.scores + 0.15)])
    assert np.allclose(predicted(higher, features), found, atol=1e-4)


def test_earlier_trainings_that_say_the_opposite_are_outvoted_by_the_runs_own():
    measured, features, truth = worlds(80)
    (earlier,) = measured.earlier
    opposite = replace(measured, earlier=[replace(earlier, scores=-earlier.scores)])
    sound = truth > truth.max() - 0.03
    assert spearmanr(predicted(opposite, features)[sound], truth[sound])[0] > 0.6


@pytest.mark.parametrize("own", [0, 6])
@pytest.mark.parametrize("name", ["model", "shuffled"])
def test_beliefs_are_of_the_runs_own_losses_alone(name, own):
    measured, _, _ = worlds(own)
    belief = load_ranker(name).belief(measured)
    assert belief.mean.shape == (own,) and belief.covariance.shape == (own, own)


def test_of_many_losses_the_best_half_and_a_draw_of_the_others_are_learned_from():
    scores = np.random.default_rng(0).permutation(100) / 100
    places = telling(scores, 20, np.random.default_rng(1))
    assert len(set(places)) == 20
    assert sorted(scores[places[:10]]) == sorted(scores)[-10:]
    assert scores[places[10:]].max() < 0.9 and scores[places[10:]].min() < 0.6
    assert sorted(telling(scores, 200, np.random.default_rng(1))) == list(range(100))


# --- where they come from ---


def test_the_benchmark_is_a_source_for_detectors_of_its_kind():
    kept, *others = read_earlier(["lossbench"], spaces())
    assert kept["name"].startswith("lossbench/") and others, "each warm-up is a source"
    kept = max([kept, *others], key=lambda source: len(source["trained"]))
    assert kept["name"] == "lossbench/faster_rcnn_proxy (1)" and len(kept["trained"]) > 60
    (measured,) = as_measured([kept], spaces())
    assert len(measured) == len(kept["trained"])
    assert np.isfinite(measured.features).all(axis=1).sum() > 60 and measured.noise < 0.005
    # A loss of two branches says nothing to a search in one.
    one = read_earlier(["lossbench"], spaces({"reg": "reg"}))
    assert one and all(set(losses) == {"reg"} for s in one for losses, _ in s["trained"])
    assert max(len(source["trained"]) for source in one) < len(kept["trained"])


def test_of_the_benchmark_only_trainings_on_the_runs_own_data_are_a_source():
    data = read_rows(FOLDER / "faster_rcnn_proxy" / TASKS["head"])[0].data
    assert read_earlier(["lossbench"], spaces(), data) == read_earlier(["lossbench"], spaces())
    assert read_earlier(["lossbench"], spaces(), "other data") == []


def test_a_detector_with_trainings_of_its_own_in_the_benchmark_reads_no_others(
    tmp_path, monkeypatch
):
    rows = read_rows(FOLDER / "faster_rcnn_proxy" / TASKS["head"])
    for name, some in (("faster_rcnn_proxy", rows), ("mask_rcnn_proxy", rows[:40])):
        (tmp_path / name).mkdir()
        lines = (replace(row, detector=name).to_json() + "\n" for row in some)
        (tmp_path / name / TASKS["head"]).write_text("".join(lines))
    monkeypatch.setattr(earlier, "FOLDER", tmp_path)

    def names(detector):
        found = read_earlier(["lossbench"], spaces(), rows[0].data, detector)
        return {source["name"].split()[0] for source in found}

    mine, related = "lossbench/mask_rcnn_proxy", "lossbench/faster_rcnn_proxy"
    assert names("mask_rcnn_proxy") == {mine} and names("faster_rcnn_proxy") == {related}
    assert names("cascade_rcnn_proxy") == {mine, related}


def search(folder, trials=8, **settings):
    search = {**CONFIG["search"], **settings}
    config = parse_config({**CONFIG, "search": search, "budget": {"trials": trials}})
    known = read_earlier(config.search.earlier, spaces())
    meta = {"config": config.model_dump(mode="json"), "spaces": TWO_STAGE, "earlier": known}
    journal = Journal.create(folder, meta)
    cluster = SimulatedCluster(lambda trial: formula.result(trial, formula.mAP(trial)), 2)
    Search(config, TWO_STAGE, journal, cluster, InlineBreeder.of(config, TWO_STAGE, journal)).run()
    return journal


def test_a_run_begins_with_what_another_measured(tmp_path):
    first = search(tmp_path / "first")
    second = search(tmp_path / "second", earlier=[str(tmp_path / "first")])
    ((losses, scores), *_) = second["earlier"][0]["trained"]
    assert len(second["earlier"][0]["trained"]) == len(first.measured()) and scores
    # Predicted, though nothing of its own has trained enough for that.
    early = [c for c in second.candidates() if c.round == 1]
    assert early and all(candidate.predicted is not None for candidate in early)
    assert all(c.predicted is None for c in first.candidates() if c.round == 1)


def test_known_losses_alone_are_compared_by_a_run_that_begins_with_something(tmp_path):
    journal = search(tmp_path / "run", trials=0, earlier=["lossbench"])
    assert journal["earlier"] and journal["compared"] and not journal.trials("full")
    assert {row.label for row in journal.trials("final")} == {"default", "CSE-Autoloss-A"}


def test_a_source_that_has_nothing_is_refused_in_one_line(tmp_path):
    search(tmp_path / "run").close()
    for source, names, message in (
        (tmp_path / "none", TWO_STAGE, "search.earlier: .*none: no run here"),
        (tmp_path / "run", {"cls": "one_stage_cls"}, "run trained no loss of one_stage_cls, which"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_earlier([str(source)], spaces(names))
        assert "\n" not in str(caught.value)
    for names in ({"cls": "one_stage_cls"}, {"cls": "one_stage_cls", "reg": "reg"}):
        found = read_earlier(["lossbench"], spaces(names))
        assert not any("rcnn" in source["name"] for source in found)
