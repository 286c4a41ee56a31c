"""What the search decides, on a cluster in virtual time with a detector whose mAP is a formula."""

import hashlib
import statistics

import pytest

from cse_autoloss.config import parse_config
from cse_autoloss.journal import KNOWN, Fate, Journal
from cse_autoloss.search import Search, SearchError
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.trial import TrialResult

SPACES = {"cls": "two_stage_cls", "reg": "reg"}
CONFIG = {
    "detector": {"trainer": "none:None"},
    "search": {
        "branch": "both",
        "known": 2,
        "population": 5,
        "tournament": 2,
        "offspring": 1500,
        "simulations": 4,
        "promoted": 2,
    },
    "budget": {"trials": 9},
    "tuning": {"scales": [[1, 1], [2, 1]], "lr_scales": [0.5]},
    "confirm": {"candidates": 3, "seeds": 2},
    "final": {"candidates": 2, "seeds": 3},
}


def luck(*parts):
    """A number in [0, 1) that the parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def formula(trial):
    losses = sorted(trial.losses.items())
    if trial.key.startswith("tune"):
        return 0.2 + 0.02 * trial.scale.get("cls", 1) + (0.03 if trial.lr_scale == 0.5 else 0)
    return 0.2 + 0.1 * luck(losses, trial.task) + 0.05 * luck(trial.seed, losses)


def detector(fail=lambda trial: None, stop=None):
    """A trainer: mAP by the formula, or a failure's reason; Ctrl-C after ``stop`` trainings."""
    done = []

    def train(trial):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(trial.key)
        if reason := fail(trial):
            return TrialResult.failed(trial, reason)
        splits = ("tiny",) if trial.task == "tiny" else trial.evaluate
        metrics = {f"{split}/mAP": formula(trial) - 0.07 * (split == "test") for split in splits}
        first = metrics[f"{splits[0]}/mAP"]
        return TrialResult(trial.key, first, metrics, loss_weights={"cls": 1, "reg": 1}, steps=1)

    return train


def search(folder, changes=None, journal=None, size=2, fail=lambda trial: None, stop=None):
    config = parse_config({**CONFIG, **(changes or {})})
    meta = {"config": config.model_dump(mode="json"), "spaces": SPACES}
    journal = journal or Journal.create(folder, meta)
    cluster = SimulatedCluster(detector(fail, stop), size)
    Search(config, SPACES, journal, cluster).run()
    return journal


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return search(tmp_path_factory.mktemp("search") / "run")


def trials(journal, kind):
    return [row.trial for row in journal.trials(kind)]


def test_the_budget_is_spent_and_not_overdrawn(done):
    assert len(trials(done, "full")) == 9
    assert done.count(Fate.TRAINED) == 9 and not done.trials(finished=False)
    assert sum(c.origin.startswith(KNOWN) for c in done.candidates()) == 2


def test_everything_after_the_tuning_is_trained_with_what_the_tuning_found(done):
    assert done["tuned"] == {"scale": {"cls": 2.0, "reg": 1.0}, "lr_scale": 0.5}
    for kind in ("tiny", "full", "confirm", "final"):
        used = {(t.scale["cls"], t.scale["reg"], t.lr_scale) for t in trials(done, kind)}
        assert used == {(2.0, 1.0, 0.5)}, kind
    assert trials(done, "tune")[-1].scale == {"cls": 2.0, "reg": 1.0}, "rates: with the best scale"


def test_the_best_of_a_round_go_on(done):
    waited = [c for c in done.candidates() if c.simulated is not None and c.fate != Fate.SIMULATED]
    batches = [waited[i : i + 4] for i in range(0, len(waited) - 3, 4)]
    assert batches
    for batch in batches:
        ranked = sorted(batch, key=lambda c: -c.simulated)
        assert [c.fate == Fate.DROPPED for c in ranked] == [False, False, True, True]


def test_seeds_of_search_confirmation_and_comparison_are_apart(done):
    kinds = ("tune", "tiny", "full", "confirm", "final")
    seeds = {kind: {t.seed for t in trials(done, kind)} for kind in kinds}
    assert seeds["tune"] == seeds["tiny"] == seeds["full"] == {0}
    assert len(seeds["confirm"]) == 2 and len(seeds["final"]) == 3
    assert (
        seeds["confirm"].isdisjoint(seeds["final"]) and 0 not in seeds["confirm"] | seeds["final"]
    )


def test_only_the_comparison_looks_at_test_and_fitness_is_val(done):
    for kind in ("tune", "full", "confirm"):
        assert {t.evaluate for t in trials(done, kind)} == {("val",)}
    assert {t.evaluate for t in trials(done, "final")} == {("val", "test")}
    for c in done.candidates(Fate.TRAINED):
        (row,) = [row for row in done.trials("full") if row.candidate == c.id]
        assert c.fitness == row.result.metrics["val/mAP"]


def test_the_fittest_are_confirmed_and_the_best_confirmed_compared(done):
    found = [c for c in done.candidates(Fate.TRAINED) if not c.origin.startswith(KNOWN)]
    fittest = sorted(found, key=lambda c: -c.fitness)[:3]
    rows = done.trials("confirm")
    assert {row.candidate for row in rows} == {c.id for c in fittest}
    means = {
        c.id: statistics.mean(row.result.mAP for row in rows if row.candidate == c.id)
        for c in fittest
    }
    best = sorted(means, key=lambda i: -means[i])[:2]
    assert {row.candidate for row in done.trials("final") if row.candidate} == set(best)


def test_no_loss_is_trained_twice_under_two_forms(done):
    kept = [c for c in done.candidates() if c.fate != Fate.EQUIVALENT]
    trained = [tuple(sorted(c.fingerprint.items())) for c in kept]
    assert len(trained) == len(set(trained))


def test_a_run_stopped_anywhere_ends_as_one_that_was_not(tmp_path):
    whole = search(tmp_path / "whole", size=1)
    keys = [row.trial.key for row in whole.trials()]
    assert len(keys) == len(set(keys))
    for stop in (1, 5, 12, 17, 22):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / f"cut{stop}", size=1, stop=stop)
        journal = search(None, journal=Journal.resume(tmp_path / f"cut{stop}"), size=1)
        assert [row.trial for row in journal.trials()] == [row.trial for row in whole.trials()]
        assert journal["evolution"] == whole["evolution"] and journal["funnel"] == whole["funnel"]
        assert [(c.losses, c.fate, c.fitness) for c in journal.candidates()] == [
            (c.losses, c.fate, c.fitness) for c in whole.candidates()
        ]
        journal.close()


def test_a_default_that_does_not_train_ends_the_run(tmp_path):
    with pytest.raises(SearchError, match="does not train: diverged"):
        search(tmp_path / "run", fail=lambda t: "diverged" if t.key.startswith("tune") else None)


def test_candidates_that_fail_are_counted_and_no_members(tmp_path):
    def fail(trial):
        return "diverged" if trial.key.startswith("full") and trial.key[-1] in "13579" else None

    journal = search(tmp_path / "run", fail=fail)
    assert journal.count(Fate.FAILED) > 0
    assert journal.count(Fate.TRAINED, Fate.FAILED) == 9


def test_minutes_end_the_search_but_not_before_a_loss_was_found(tmp_path):
    journal = search(tmp_path / "run", {"budget": {"trials": 50, "minutes": 1e-9}})
    assert 1 <= len(journal.found()) <= 3 and len(trials(journal, "full")) < 10
    assert {row.kind for row in journal.trials()} == {"tune", "tiny", "full", "confirm", "final"}
