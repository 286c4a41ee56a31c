"""What the search decides, on a cluster in virtual time with a detector whose mAP is a formula."""

import math
import re
import statistics
from dataclasses import replace

import formula
import numpy as np
import pytest

from cse_autoloss import load_space, verify
from cse_autoloss.breeder import InlineBreeder
from cse_autoloss.config import parse_config
from cse_autoloss.display import comparison_cells
from cse_autoloss.errors import SearchError
from cse_autoloss.export import ranking
from cse_autoloss.journal import CandidateState, Journal, found_label
from cse_autoloss.proposals import Proposals
from cse_autoloss.rankers import Belief, Ranking
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.search import Search
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.simulation import Outcome
from cse_autoloss.status import read_comparison, read_status
from cse_autoloss.trial import TrialResult

SPACES = {"cls": "two_stage_cls", "reg": "reg"}
CONFIG = {
    "search": {
        "branch": "both",
        "known": 2,
        "population": 5,
        "tournament": 2,
        "offspring": 800,
        "candidates": 4,
    },
    "budget": {"trials": 9},
    "tuning": {"scales": [[1, 1], [2, 1]], "lr_scales": [0.5]},
    "stages": {
        "tiny": {"task": "tiny", "batch": 4, "keep": 2},
        "full": {},
        "confirm": {"best": 3, "seeds": 2},
        "final": {"best": 2, "seeds": 3},
    },
}
STAGES = ("tune", "tiny", "full", "confirm", "final")
UNSCREENED = CONFIG["search"] | {"screened": False}  # where it does not matter what trains


def detector(fail=lambda trial: None, stop=None, returned=None, mAP=formula.mAP):
    """A trainer: mAP by a formula, or a failure's reason, or for one key what it is said to have
    returned; Ctrl-C after ``stop`` trainings."""
    done = []

    def train(trial):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(trial.key)
        if returned is not None and trial.key == "full-1-0":
            return returned
        if reason := fail(trial):
            return TrialResult.failed(trial, reason)
        return formula.result(trial, mAP(trial))

    return train


def search(
    folder,
    changes=None,
    journal=None,
    size=2,
    seconds=lambda trial: 1.0,
    look=lambda journal: None,
    **faults,
):
    config = parse_config({**CONFIG, **(changes or {})})
    spaces = {**SPACES, **config.search.spaces}
    meta = {"config": config.model_dump(mode="json"), "spaces": spaces}
    journal = journal or Journal.create(folder, meta)
    cluster = SimulatedCluster(detector(**faults), size, seconds)
    breeder = InlineBreeder.of(config, spaces, journal)
    Search(config, spaces, journal, cluster, breeder, lambda: look(journal)).run()
    journal.seconds = cluster.now
    return journal


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return search(tmp_path_factory.mktemp("search") / "run")


def trials(journal, stage):
    return [row.trial for row in journal.trials(stage)]


def found(journal):
    return [candidate for candidate in journal.trained() if not candidate.known]


# --- the ladder ---


def test_the_budget_is_spent_and_not_overdrawn(done):
    assert len(trials(done, "full")) == 9
    assert len(done.trained()) == 9 and not done.trials(finished=False)
    assert sum(candidate.known for candidate in done.trained()) == 2


def test_everything_after_the_tuning_is_trained_with_what_the_tuning_found(done):
    assert done["tuned"] == {"scale": {"cls": 2.0, "reg": 1.0}, "lr_scale": 0.5}
    for stage in STAGES[1:]:
        used = {(t.scale["cls"], t.scale["reg"], t.lr_scale) for t in trials(done, stage)}
        assert used == {(2.0, 1.0, 0.5)}, stage
    assert trials(done, "tune")[-1].scale == {"cls": 2.0, "reg": 1.0}, "rates: with the best scale"


def test_the_default_is_tuned_by_the_mean_over_as_many_seeds_as_are_asked_for(tmp_path):
    """The first seed is kind to the worse scale."""

    def mAP(trial):
        kind = 0.05 * (trial.seed == 0 and trial.scale["cls"] == 1)
        return 0.3 + 0.02 * (trial.scale["cls"] == 2) + kind

    stages = {"full": {}, "final": {"best": 1, "seeds": 1}}
    for seeds, scale in ((1, 1.0), (3, 2.0)):
        tuning = {"scales": [[1, 1], [2, 1]], "lr_scales": [1], "seeds": seeds}
        changes = {"tuning": tuning, "stages": stages, "budget": {"trials": 0}}
        journal = search(tmp_path / f"{seeds}", changes, mAP=mAP)
        assert journal["tuned"]["scale"]["cls"] == scale
        assert journal.counts()["tune"] == (3 * seeds, 0)
        status = read_status(journal)
        assert status.references == seeds
        assert status.baseline["mAP"] == pytest.approx(0.35 if seeds == 1 else 0.32)
    changes["tuning"] = {"scales": [[2, 1]], "seeds": 3}
    assert search(tmp_path / "single", changes, mAP=mAP).counts()["tune"] == (1, 0), "no choice"


def test_the_best_of_a_batch_go_on(done):
    tried = [c for c in done.candidates() if done.scores(c.id, "tiny")]
    batches = [tried[i : i + 4] for i in range(0, len(tried) - 3, 4)]
    assert batches
    for batch in batches:
        ranked = sorted(batch, key=lambda c: -done.scores(c.id, "tiny")[0])
        dropped = [c.state == CandidateState.DROPPED for c in ranked]
        assert dropped == [False, False, True, True]


def test_seeds_of_search_confirmation_and_comparison_are_apart(done):
    seeds = {stage: {t.seed for t in trials(done, stage)} for stage in STAGES}
    assert seeds["tune"] == seeds["tiny"] == seeds["full"] == {0}
    assert len(seeds["confirm"]) == 2 and len(seeds["final"]) == 3
    assert (
        seeds["confirm"].isdisjoint(seeds["final"]) and 0 not in seeds["confirm"] | seeds["final"]
    )


def test_only_the_comparison_looks_at_test_and_fitness_is_val(done):
    for stage in ("tune", "full", "confirm"):
        assert {t.evaluate for t in trials(done, stage)} == {("val",)}
    assert {t.evaluate for t in trials(done, "final")} == {("val", "test")}
    for candidate in done.trained():
        (row,) = done.trials_of(candidate.id, "full")
        assert candidate.fitness == row.result.metrics["val/mAP"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_the_comparison_does_not_measure_has_no_mAP(tmp_path, split):
    stages = CONFIG["stages"] | {"final": {"best": 1, "seeds": 2, "splits": [split]}}
    journal = search(tmp_path / split, {"stages": stages, "budget": {"trials": 0}})
    for row in read_comparison(journal):
        assert len(row.val) == (2 if split == "val" else 0), row
        assert len(row.test) == (2 if split == "test" else 0), row
        n, *shown = comparison_cells(row)
        assert n == "2" and "none yet" not in shown and "0.000" not in " ".join(shown), shown


def test_the_fittest_are_confirmed_and_the_best_confirmed_compared(done):
    fittest = sorted(found(done), key=lambda c: -c.fitness)[:3]
    rows = done.trials("confirm")
    assert {row.candidate for row in rows} == {c.id for c in fittest}
    means = {
        c.id: statistics.mean(row.result.mAP for row in rows if row.candidate == c.id)
        for c in fittest
    }
    best = sorted(means, key=lambda number: -means[number])[:2]
    assert {row.candidate for row in done.trials("final") if row.candidate} == set(best)
    assert {row.label for row in done.trials("final")} > {"default", "CSE-Autoloss-A"}


def test_a_resumed_run_tries_again_after_the_search_what_the_machine_failed_and_no_loss(tmp_path):
    reasons = {"confirm": "the machine failed it 3 times: no disk", "final": "diverged at step 3"}

    def fail(trial):
        stage = trial.key.partition("-")[0]
        return reasons.get(stage) if trial.seed % 1000 == 1 else None

    journal = search(tmp_path / "run", {"search": UNSCREENED}, fail=fail)
    assert journal.counts()["confirm"] == (6, 3) and journal.failed_by_machine("confirm") == 3
    journal.close()
    journal = search(None, {"search": UNSCREENED}, journal=Journal.resume(tmp_path / "run"))
    assert journal.counts()["confirm"] == (6, 0)
    failed = [row for row in journal.trials("final") if row.result.failure]
    assert failed and all(row.trial.seed % 1000 == 1 for row in failed)


def test_a_resumed_search_tries_again_what_the_machine_failed_and_no_loss(tmp_path):
    """A disk that is full for an hour, say, is no reason to give up what met it."""

    def fail(trial):
        stage, number, *_ = trial.key.split("-")
        if stage in ("tiny", "full") and int(number) % 2:
            return "the machine failed it 3 times: no disk" if int(number) % 3 else "diverged"
        return None

    changes = {"search": UNSCREENED}
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", changes, fail=fail, stop=25)
    journal = Journal.resume(tmp_path / "run")
    met = [c for c in journal.candidates() if "the machine" in (c.reason or "")]
    own = [c for c in journal.candidates() if "diverged" in (c.reason or "")]
    assert own and {c.stage for c in met} == {"tiny", "full"}
    search(None, changes, journal)
    assert len(trials(journal, "full")) == 9
    for candidate in met:
        (row,) = journal.trials_of(candidate.id, candidate.stage)
        assert row.result.failure is None
    assert [journal.candidate(c.id).reason for c in own] == [c.reason for c in own]


def test_the_comparison_goes_by_the_confirmation_not_by_the_search(tmp_path):
    """Here the fitter a loss was in the search, the worse it is when it is confirmed."""

    def mAP(trial):
        score = 0.2 * formula.luck(sorted(trial.losses.items()))
        return 0.5 - score if trial.key.startswith("confirm") else 0.2 + score

    changes = {"stages": {**CONFIG["stages"], "final": {"best": 1, "seeds": 1}}}
    journal = search(tmp_path / "run", changes, mAP=mAP)
    least = min(journal.best()[:3], key=lambda candidate: candidate.fitness)
    assert {row.candidate for row in journal.trials("final")} == {None, least.id}
    assert ranking(journal)[0].id == least.id


def test_a_ladder_may_have_one_stage_and_shares_of_a_task(tmp_path):
    stages = {"head": {"task": "head", "share": 0.5}, "final": {"best": 1, "seeds": 1}}
    journal = search(tmp_path / "run", {"stages": stages, "budget": {"trials": 4}})
    assert {(t.task, t.share) for t in trials(journal, "head")} == {("head", 0.5)}
    assert {t.task for t in trials(journal, "tune")} == {"full"}, "tuned for what is compared"
    (reference,) = trials(journal, "default")
    assert (reference.task, reference.share, reference.scale["cls"]) == ("head", 0.5, 2.0)
    (row,) = journal.trials("default")
    assert read_status(journal).baseline["mAP"] == row.result.mAP, "like is compared with like"
    assert set(journal.counts()) == {"tune", "default", "head", "final"}


def test_known_losses_are_trained_first_unless_the_search_starts_from_scratch(tmp_path, done):
    assert [c.known for c in done.candidates()[:3]] == [True, True, False]
    assert {row.candidate for row in done.trials("full")} >= {1, 2}
    changes = {"search": {**CONFIG["search"], "from_scratch": True}, "budget": {"trials": 2}}
    assert not any(c.known for c in search(tmp_path / "run", changes).candidates())


def test_without_trainings_allowed_known_losses_are_compared(tmp_path):
    others = {"GIoU": {"reg": "GIoU"}}
    journal = search(tmp_path / "run", {"budget": {"trials": 0}, "others": others})
    assert set(journal.counts()) == {"tune", "final"}
    assert {row.label for row in journal.trials("final")} == {"default", "CSE-Autoloss-A", "GIoU"}


# --- candidates ---


def test_no_loss_is_trained_twice_under_two_forms(done):
    pairs = [tuple(sorted(c.fingerprint.items())) for c in done.candidates()]
    assert len(pairs) == len(set(pairs)) and () not in pairs
    for branch, name in SPACES.items():
        space = load_space(name)
        known = set(fingerprint([loss.expression for loss in space.losses.values()], space))
        own = [s.fingerprint for s in done.survivors() if s.branch == branch]
        assert len(own) == len(set(own)) and known.isdisjoint(own), "new gradients, each once"
        for candidate in done.candidates():
            if branch in candidate.losses:
                expression = space.expression(candidate.losses[branch])
                assert fingerprint([expression], space) == [candidate.fingerprint[branch]]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run whose offspring depend on the round's number alone."""
    settings = {**CONFIG["search"], "strategy": "random", "offspring": 6000}
    folder = tmp_path_factory.mktemp("grown") / "run"
    return search(folder, {"search": settings, "budget": {"trials": 4}})


def test_a_strategy_without_memory_grows_all_from_nothing(grown):
    assert {candidate.origin for candidate in found(grown)} == {"growth"}


def test_without_screening_whatever_variation_makes_trains(tmp_path):
    """Plain evolution: unsound losses train, too, no loss trains twice, and a run goes on."""
    settings = {**CONFIG["search"], "screened": False, "candidates": 8}
    changes = {"search": settings, "budget": {"trials": 40}, "stages": PLAIN}
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        search(folder, changes, stop=20)
    journal = search(None, changes, Journal.resume(folder))
    made = found(journal)
    assert len(made) >= 30 and len({str(c.fingerprint) for c in made}) == len(made)
    assert {"growth", "mutation", "crossover"} <= {
        operator for candidate in made for operator in candidate.origin.split(" + ")
    }
    spaces = {branch: load_space(name) for branch, name in SPACES.items()}
    unsound = [
        candidate
        for candidate in made
        if any(
            not verify(spaces[branch].expression(text), spaces[branch]).accepted
            for branch, text in candidate.losses.items()
        )
    ]
    assert len(unsound) > len(made) / 2
    for counts in read_status(journal).funnel.values():
        assert counts["verified"] == 0 < counts["distinct"]


PLAIN = {"full": {}, "final": {"best": 1, "seeds": 1}}


def test_what_was_screened_is_not_screened_again_by_a_driver_that_was_not_there(grown):
    for branch, counts in grown["funnel"].items():
        assert len(grown.seen(branch)) == len(set(grown.seen(branch))) == counts["unique"]
    again = last_round_again(grown)
    assert {b: sifted.counts["unique"] for b, sifted in again.branches.items()} == {
        "cls": 0,
        "reg": 0,
    }
    assert not again.survivors


def test_survivors_that_were_not_chosen_are_kept_and_can_be_chosen_later(grown):
    kept = grown.survivors(chosen=False)
    assert kept and {s.features.shape for s in kept if s.branch == "reg"} == {(384,)}
    proposals = last_round_again(grown).proposals
    assert proposals and all(proposal.survivors for proposal in proposals)
    assert {number for p in proposals for number in p.survivors} <= {s.id for s in kept}
    before = [candidate.fingerprint for candidate in grown.candidates()]
    assert all(proposal.fingerprint not in before for proposal in proposals)


def last_round_again(journal):
    breeder = InlineBreeder.of(parse_config(journal["config"]), SPACES, journal)
    breeder.begin(journal["round"], 4)
    return breeder.take()


def test_what_a_run_with_a_ranker_trains_first_is_what_the_ranker_puts_first(tmp_path):
    settings = with_ranker("ByFeatures")
    journal = search(tmp_path / "run", {"search": settings, "budget": {"trials": 5}})
    chosen = [c for c in journal.candidates() if c.round == journal["round"]]
    predicted = [c.predicted for c in chosen]
    assert predicted == sorted(predicted, reverse=True) and len(set(predicted)) > 1


class ByFeatures:
    def rank(self, features, measured, rng):
        total = features.sum(axis=1)
        return Ranking((-total).argsort(kind="stable"), total)

    def belief(self, measured):
        return Belief(measured.scores, 0 * np.eye(len(measured)))


RACE = {"head": {"task": "head", "seeds": 4}, "final": {"best": 1, "seeds": 1}}


def test_losses_earn_trainings_one_by_one(tmp_path):
    """The leaders train again, on the next seed; the others do not."""

    def mAP(trial):  # what losses differ by is about a training's noise
        losses = sorted(trial.losses.items())
        return 0.3 + 0.012 * formula.luck(losses) + 0.01 * formula.luck(trial.seed, losses)

    changes, seen = {"stages": RACE, "budget": {"trials": 24}}, []

    def look(journal):
        seen.append((read_status(journal), len(journal.trained())))

    journal = search(tmp_path / "run", changes, mAP=mAP, look=look)
    assert journal.counts()["head"] == (24, 0)
    for status, journal_has in seen:  # who trains once more has trained
        assert status.trained == journal_has
    trained = {c.id: journal.by_seed(c.id, "head") for c in journal.trained()}
    assert all(list(seeds) == list(range(len(seeds))) for seeds in trained.values())
    assert 1 < max(map(len, trained.values())) <= 4
    for candidate in journal.trained():
        assert candidate.fitness == pytest.approx(np.mean(list(trained[candidate.id].values())))
        assert candidate.trainings == len(trained[candidate.id])
    again = [candidate.id for candidate in found(journal) if candidate.trainings > 1]
    ranks = [candidate.id for candidate in journal.best()]
    assert np.mean([ranks.index(n) for n in again]) < (len(ranks) - 1) / 2


class Certain:
    """Knows that nothing comes near what has trained."""

    def rank(self, features, measured, rng):
        ones = np.ones(len(features))
        return Ranking(np.arange(len(features)), 0.1 * ones, 0.001 * ones)

    def belief(self, measured):
        return Belief(measured.scores, 1e-9 * np.eye(len(measured)))


class Contrary(Certain):
    """Believes the opposite of what was measured."""

    def belief(self, measured):
        return Belief(1 - measured.scores, 1e-9 * np.eye(len(measured)))


def with_ranker(name):
    return {**CONFIG["search"], "ranker": f"test_search_decisions:{name}"}


def test_the_search_ends_when_no_loss_can_still_win_and_says_so(tmp_path):
    changes = {"search": with_ranker("Certain"), "stages": RACE, "budget": {"trials": 500}}
    journal = search(tmp_path / "run", changes)
    status = read_status(journal)
    assert status.phase == "finished" and 40 <= status.trials[0] < 100, "not by a few trainings"
    assert "no loss can still win" in status.stopped
    assert (
        "could train next is ahead of the best that has trained, known losses too" in status.stopped
    )


def test_what_comes_after_the_search_is_for_those_that_the_ranker_believes_in(tmp_path):
    journal = search(tmp_path / "run", {"search": with_ranker("Contrary")})
    worst = sorted(found(journal), key=lambda candidate: candidate.fitness)[:3]
    confirmed = {row.candidate for row in journal.trials("confirm")}
    assert confirmed == {candidate.id for candidate in worst}


ONE_STAGE = {"head": {"task": "head"}, "final": {"best": 1, "seeds": 1}}


def test_a_structure_that_does_well_gets_its_numbers(tmp_path):
    """Losses 1 - IoU^c are good, and better the nearer c is to 0.8; nothing else is."""

    def number(losses):
        found = re.fullmatch(r"Sub\([\d.]+,Pow\(Div\(I,U\),([\d.]+)\)\)", losses.get("reg", ""))
        return float(found[1]) if found else None

    def mAP(trial):
        c = number(trial.losses)
        return 0.1 if c is None else 0.4 - 0.05 * abs(math.log(c / 0.8))

    def best(fitting, seed):
        settings = {"branch": "reg", "spaces": {"reg": str(tmp_path / "powers.yaml")}}
        settings |= {"known": 20, "fitting": fitting, "offspring": 300}
        changes = {"search": CONFIG["search"] | settings, "seed": seed}
        changes |= {"budget": {"trials": 30}, "stages": ONE_STAGE}
        journal = search(tmp_path / f"{fitting}-{seed}", changes, mAP=mAP)
        fitted = [c for c in found(journal) if c.origin == "fitting"]
        assert len(fitted) >= fitting * len(found(journal)) - 2 and (fitting or not fitted)
        return max(candidate.fitness for candidate in journal.trained())

    (tmp_path / "powers.yaml").write_text(
        "name: powers\nbase: reg_plus\nlosses:\n"
        "  - {name: Power, expression: 'Sub(1,Pow(Div(I,U),3))', "
        "source: a structure that does well}\n"
    )
    with_it, without = (np.mean([best(n, seed) for seed in range(2)]) for n in (0.5, 0))
    assert with_it > 0.36 and with_it > without + 0.02


def test_parents_and_operators_are_written_down(done):
    by_id = {c.id: c for c in done.candidates()}
    assert {c.origin for c in found(done)} & {"mutation", "crossover", "growth", "pairing"}
    for candidate in done.candidates():
        for branch, parents in candidate.parents.items():
            assert all(by_id[parent].id < candidate.id for parent in parents)
            if candidate.origin == "pairing":
                (parent,) = parents
                assert candidate.losses[branch] == by_id[parent].losses[branch]


def test_what_is_new_in_one_branch_stands_beside_a_parent_s_loss_in_the_other(done):
    by_id = {c.id: c for c in done.candidates()}
    assert any(
        len(parents) == 1 and by_id[parents[0]].losses.get(branch) == candidate.losses[branch]
        for candidate in found(done)
        for branch, parents in candidate.parents.items()
    )


def test_what_does_not_optimise_predictions_is_no_candidate(grown, tmp_path, monkeypatch):
    def nothing_does(expressions, space, seed):
        return [Outcome(False, 0.0, "accuracy 0", True) for _ in expressions]

    monkeypatch.setattr("cse_autoloss.branch.simulate_predictions", nothing_does)
    meta = {"config": grown["config"], "spaces": SPACES}
    journal = Journal.create(tmp_path / "run", meta)
    breeder = InlineBreeder.of(parse_config(grown["config"]), SPACES, journal)
    breeder.begin(1, 4)
    made = breeder.take()
    assert not made.survivors and not made.proposals
    for sifted in made.branches.values():
        verified = sifted.counts["verified"]
        assert sifted.counts["optimised"] == 0 < verified == sifted.reasons["simulation"]


@pytest.mark.parametrize("after", [0, 3])
def test_rounds_without_a_survivor_end_the_search_and_what_was_found_is_compared(
    after, tmp_path, monkeypatch
):
    next_round = Proposals.next_round

    def dry(self, number, *rest):
        made = next_round(self, number, *rest)
        return made if number <= after else replace(made, proposals=[], repeats=[])

    monkeypatch.setattr(Proposals, "next_round", dry)
    monkeypatch.setattr("cse_autoloss.candidates.MAX_EMPTY_ROUNDS", 5)
    if not after:
        with pytest.raises(SearchError, match="5 rounds of 800 offspring left no survivor; raise"):
            search(tmp_path / "run")
        return
    journal = search(tmp_path / "run", {"budget": {"trials": 500}})
    status = read_status(journal)
    assert status.phase == "finished" and "left no survivor" in status.stopped
    found_ones = [row for row in read_comparison(journal) if row.label.startswith("found")]
    assert len(found_ones) == 2 and all(len(row.test) == 3 for row in found_ones)


# --- stopping and going on ---


def test_a_run_stopped_anywhere_ends_as_one_that_was_not(tmp_path):
    few = {"budget": {"trials": 6}}
    whole = search(tmp_path / "whole", few, size=1)
    keys = [row.trial.key for row in whole.trials()]
    assert len(keys) == len(set(keys))
    for stop in (1, 5, 9, 11, 14, len(keys) - 8):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / f"cut{stop}", few, size=1, stop=stop)
        journal = search(None, few, Journal.resume(tmp_path / f"cut{stop}"), size=1)
        assert [row.trial for row in journal.trials()] == [row.trial for row in whole.trials()]
        assert journal["funnel"] == whole["funnel"] and journal["round"] == whole["round"]
        assert journal.candidates() == whole.candidates()
        kept, expected = journal.survivors(), whole.survivors()
        assert [(s.id, s.text, s.parents) for s in kept] == [
            (s.id, s.text, s.parents) for s in expected
        ]
        journal.close()


def test_trainings_in_flight_are_judged_when_they_come_back_after_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", stop=9, size=4)
    journal = Journal.resume(tmp_path / "run")
    assert journal.trials(finished=False)
    search(None, journal=journal, size=4)
    assert not journal.trials(finished=False) and not journal.count(CandidateState.TRAINING)


def test_minutes_end_the_search_but_not_before_a_loss_was_found(tmp_path):
    journal = search(tmp_path / "run", {"budget": {"trials": 50, "minutes": 1e-9}})
    assert 1 <= len(found(journal)) <= 3 and len(trials(journal, "full")) < 10
    assert all(row.trial.seed == 2000 for row in journal.trials("final")), "each loss once"
    assert set(journal.counts()) == {"tune", "tiny", "full", "final"}


@pytest.mark.parametrize("slower", [1, 3])
def test_minutes_hold_with_the_comparison_in_them_also_on_a_machine_that_slows_down(
    tmp_path, slower
):
    """Trainings of 10 s that take 30 s in the end: 8 minutes on two workers."""
    tuned = 0

    def seconds(trial):
        nonlocal tuned
        tuned += 1
        return (4 if trial.task == "tiny" else 10) * (slower if tuned > 20 else 1)

    changes = {"budget": {"trials": 10_000, "minutes": 8}}
    changes |= {"search": UNSCREENED}
    journal = search(tmp_path / "run", changes, seconds=seconds)
    assert 480 - 60 * slower < journal.seconds < 480 + 10 * slower
    assert len(trials(journal, "final")) == 12
    assert len(trials(journal, "confirm")) == 6


# --- what fails ---


def test_a_default_that_does_not_train_ends_the_run(tmp_path):
    with pytest.raises(SearchError, match="does not train: diverged"):
        search(tmp_path / "run", fail=lambda t: "diverged" if t.key.startswith("tune") else None)


def test_another_losss_failure_beside_the_default_is_not_the_defaults(tmp_path):
    """Trainings of an earlier comparison that were under way come back while the default trains."""

    def fail(trial):
        return "diverged" if trial.losses and trial.key.startswith("final") else None

    stages = {"head": {"task": "head"}, "final": {"best": 1, "seeds": 3}}
    changes = {"stages": stages, "search": UNSCREENED}
    with pytest.raises(KeyboardInterrupt):  # while the comparison trains
        search(tmp_path / "run", changes | {"budget": {"trials": 0}}, stop=4)
    journal = search(
        None, changes | {"budget": {"trials": 3}}, Journal.resume(tmp_path / "run"), fail=fail
    )
    assert journal["compared"] and journal.counts()["default"] == (1, 0)


def test_a_default_that_does_not_train_at_the_searchs_stage_ends_the_run_which_tries_it_again(
    tmp_path,
) -> None:
    """Tuned as whole detectors train, the default may still fail with heads: a full cache, say."""
    changes = {"stages": {"head": {"task": "head"}, "final": {"best": 2, "seeds": 3}}}
    journal = Journal.create(tmp_path / "run", {"config": {}, "spaces": SPACES})
    with pytest.raises(SearchError, match="does not train at stage head, seed 0: no space left"):
        search(tmp_path, changes, journal, fail=lambda t: {"head": "no space left"}.get(t.task))
    search(tmp_path, changes, journal)
    assert journal["compared"] and all(row.result.failure is None for row in journal.trials())


def test_a_tiny_set_on_which_nothing_trains_ends_the_run(tmp_path):
    def fail(trial):
        return "no image" if trial.task == "tiny" else None

    with pytest.raises(SearchError, match="50 trainings .* at stage tiny; the last one: no image"):
        search(tmp_path / "run", {"search": UNSCREENED}, fail=fail)


def test_candidates_that_fail_are_counted_and_no_parents(tmp_path):
    def fail(trial):
        odd = trial.key.startswith("full") and int(trial.key.split("-")[1]) % 2
        return "diverged" if odd else None

    journal = search(tmp_path / "run", fail=fail)
    failed = journal.candidates(CandidateState.FAILED)
    assert failed and len(failed) + len(journal.trained()) == 9
    parents = {n for c in journal.candidates() for ids in c.parents.values() for n in ids}
    assert parents.isdisjoint(c.id for c in failed)
    assert all(c.reason == "full: diverged" for c in failed)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (17, "no text, but int"),
        ("3.5", "no result: TypeError"),
        ("{}", "no result: "),
        (TrialResult("full-1-0", float("nan"), {"val/mAP": 0.1}), "mAP nan, which is no finite"),
        (TrialResult("full-1-0", float("inf"), {"val/mAP": 0.1}), "mAP inf, which is no finite"),
        (TrialResult("full-1-0", -0.5, {"val/mAP": 0.1}), "mAP -0.5; it should be in"),
        (TrialResult("full-1-0", 41.7, {"val/mAP": 0.1}), "mAP 41.7; it should be in"),
        (TrialResult("full-1-0", "0.3", {"val/mAP": 0.1}), "mAP '0.3', which is no finite"),
        (TrialResult("full-1-0", 0.3, {"val/mAP": float("nan")}), "metrics.val/mAP nan"),
        (TrialResult("full-1-0", 0.3), "no mAP on val"),
        (TrialResult("other", 0.3, {"val/mAP": 0.3}), "the result of another trial, 'other'"),
        (
            TrialResult(
                *("full-1-0", 0.3, {"val/mAP": 0.3}),
                detections={"a.jpg": {"objects": [[0, 0, 9, 9]], "found": []}},
            ),
            "detections.a.jpg: rows that are not 5 finite numbers",
        ),
        (TrialResult("full-1-0", 0.3, failure="diverged"), "mAP 0.3 with the failure 'diverged'"),
    ],
)
def test_what_is_no_result_is_a_failed_training_with_its_reason(tmp_path, returned, reason):
    journal = search(tmp_path / "run", {"budget": {"trials": 2}}, returned=returned)
    (row,) = journal.trials_of(1, "full")
    assert (
        row.result.failure.startswith("the trainer handed back ") and reason in row.result.failure
    )
    assert journal.candidate(1).state == CandidateState.FAILED
    assert read_status(journal).phase == "finished"


def test_a_loss_that_fails_with_a_fresh_seed_pays_for_it_everywhere(tmp_path):
    """One of the two finalists diverges with two of three seeds."""
    broken = {}

    def fail(trial):
        if trial.key.startswith("final-found") and not trial.key.endswith("-0"):
            label = trial.key.split("-")[1]
            return "diverged at step 3" if label == broken.setdefault("label", label) else None
        return None

    journal = search(tmp_path / "run", fail=fail)
    rows = {row.label: row for row in read_comparison(journal)}
    bad = rows[broken["label"]]
    assert len(bad.val) == len(bad.test) == len(bad.gain) == 3 and len(bad.failures) == 2
    assert list(bad.val).count(0.0) == 2 and sum(gain < -0.1 for gain in bad.gain) == 2
    assert found_label(ranking(journal)[0]) != broken["label"]
    assert read_comparison(journal)[-1].label == broken["label"]
