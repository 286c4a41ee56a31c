"""Formulas of any origin, judged: on a cluster in virtual time with a detector whose mAP is a
formula."""

import json
from dataclasses import replace

import pytest

from cse_autoloss.config import parse_config
from cse_autoloss.evaluate import FIRST_SEED, Evaluator
from cse_autoloss.expression import ExpressionError
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.stages import SEEDS, Ladder, Stage
from cse_autoloss.trial import ConfigError, TrialResult

SPACES = {"cls": "two_stage_cls", "reg": "reg"}
CONFIG = parse_config(
    {
        "detector": {"trainer": "none:None"},
        "tuning": {"scales": [[1, 1], [2, 1]], "lr_scales": [0.5]},
    }
)
CROSS_ENTROPY = "Neg(Dot(Y,Log(Softmax(X))))"


class Detector:
    """0.3 with the default, 0.02 more with any loss; more with a scale of 2 and half the rate."""

    def __init__(self, fails=lambda trial: None):
        self.trained, self.fails = [], fails

    def __call__(self, trial):
        self.trained.append(trial)
        if reason := self.fails(trial):
            return TrialResult.failed(trial, reason)
        value = 0.3 + 0.02 * bool(trial.losses) + 0.001 * (trial.seed % 3)
        value += 0.01 * (trial.scale["cls"] == 2) + 0.01 * (trial.lr_scale == 0.5)
        return TrialResult(trial.key, value, {"val/mAP": value}, steps=1)


def evaluator(tmp_path, detector, **options):
    return Evaluator(
        CONFIG,
        SPACES,
        results=tmp_path / "results.sqlite",
        cluster=lambda: SimulatedCluster(detector),
        **options,
    )


def test_a_formula_is_measured_beside_the_tuned_default(tmp_path):
    detector = Detector()
    with evaluator(tmp_path, detector) as evaluate:
        found = evaluate(CROSS_ENTROPY)
    assert found.accepted and found.optimises and found.trained == 6
    assert found.gain == pytest.approx(0.02) and found.gain_half == pytest.approx(0, abs=1e-9)
    compared = [trial for trial in detector.trained if trial.seed >= 3000][-6:]
    assert {(t.scale["cls"], t.lr_scale, t.task) for t in compared} == {(2.0, 0.5, "head")}
    assert [sum(bool(t.losses) is side for t in compared) for side in (True, False)] == [3, 3]


def test_no_stage_of_a_run_has_the_seeds_of_an_evaluation():
    stages = {"full": Stage()} | {name: Stage(best=1, seeds=SEEDS) for name in "abcd"}
    ladder = Ladder.of(stages)
    blocks = [ladder.first_seed(name) for name in stages]
    assert blocks == [0, 1000, 2000, 4000, 5000] and FIRST_SEED == 3000


def test_a_learning_rate_that_tuning_tries_twice_trains_once(tmp_path):
    detector = Detector()
    tuning = {"scales": [[1, 1]], "lr_scales": [0.5, 1]}
    config = parse_config({"detector": {"trainer": "none:None"}, "tuning": tuning})
    results = tmp_path / "results.sqlite"
    with Evaluator(
        config, SPACES, results=results, cluster=lambda: SimulatedCluster(detector)
    ) as evaluate:
        assert evaluate(CROSS_ENTROPY).trained == 6
    assert len(detector.trained) == 2 + 6


def test_the_default_is_tuned_by_the_mean_over_as_many_seeds_as_are_asked_for(tmp_path):
    class Kind(Detector):  # the first seed is, to the worse scale
        def __call__(self, trial):
            result = super().__call__(trial)
            kind = trial.seed == 0 and trial.scale["cls"] == 1
            return replace(result, mAP=0.32) if kind else result

    for seeds, scale in ((1, 1), (3, 2)):
        tuning, detector = {"scales": [[1, 1], [2, 1]], "seeds": seeds}, Kind()
        config = parse_config({"detector": {"trainer": "none:None"}, "tuning": tuning})
        results = tmp_path / f"{seeds}.sqlite"
        with Evaluator(
            config, SPACES, results=results, cluster=lambda: SimulatedCluster(detector)
        ) as evaluate:
            evaluate(CROSS_ENTROPY)
        assert len(detector.trained) == 2 * seeds + 6
        assert detector.trained[-1].scale["cls"] == scale


def test_what_was_measured_is_not_measured_again_whatever_its_form(tmp_path):
    with evaluator(tmp_path, Detector()) as evaluate:
        first = evaluate(CROSS_ENTROPY)
    again = Detector()
    with evaluator(tmp_path, again) as evaluate:
        second = evaluate("Dot(Neg(Y),Log(Softmax(X)))")
        third = evaluate("CrossEntropy")
    assert again.trained == [] and second.trained == third.trained == 0
    assert first.mAP == second.mAP == third.mAP and json.dumps(second.to_dict())
    with evaluator(tmp_path, again, seeds=4) as evaluate:
        assert evaluate(CROSS_ENTROPY).trained == 2, "the fourth seed's alone"


def test_no_worker_starts_for_what_is_known_unless_what_it_depends_on_has_changed(tmp_path):
    lines = []
    with evaluator(tmp_path, Detector(), depends={"torch": "1"}, say=lines.append) as evaluate:
        first = evaluate(CROSS_ENTROPY)
    assert lines[0] == "tuning of the default: 2 of 2 trainings to do, the rest is known"
    assert lines[-1] == "formula and default: 6 of 6 trainings to do, the rest is known"

    def started():
        raise RuntimeError("a cluster was started")

    def known(text, **depends):
        options = dict(results=tmp_path / "results.sqlite", cluster=started, depends=depends)
        with Evaluator(CONFIG, SPACES, **options) as evaluate:
            return evaluate(text)

    assert known("Dot(Neg(Y),Log(Softmax(X)))", torch="1").mAP == first.mAP
    for text, version in (("Poly-1", "1"), (CROSS_ENTROPY, "2")):
        with pytest.raises(RuntimeError, match="a cluster was started"):
            known(text, torch=version)


def test_a_fault_is_tried_again_the_next_time(tmp_path):
    with evaluator(tmp_path, Detector(lambda t: t.losses and "diverged")) as evaluate:
        found = evaluate(CROSS_ENTROPY)
    assert found.mAP == (0, 0, 0) and found.failures == ("diverged",) * 3 and found.gain < -0.3
    detector = Detector()
    with evaluator(tmp_path, detector) as evaluate:
        assert evaluate(CROSS_ENTROPY).trained == len(detector.trained) == 3


def test_a_default_that_fails_is_no_baseline(tmp_path):
    """Its mAP of 0 would make a find of any formula. The trainings that were done are kept."""
    full = Detector(lambda t: not t.losses and t.seed == 3001 and "the disk is full")
    with evaluator(tmp_path, full) as evaluate:
        with pytest.raises(ConfigError, match="default loss does not train: the disk is full"):
            evaluate(CROSS_ENTROPY)
    detector = Detector()
    with evaluator(tmp_path, detector) as evaluate:
        assert evaluate(CROSS_ENTROPY).gain == pytest.approx(0.02)
    assert [trial.seed for trial in detector.trained] == [3001]


def test_what_lacks_a_property_trains_only_when_forced(tmp_path):
    detector = Detector()
    with evaluator(tmp_path, detector) as evaluate:
        found = evaluate("Dot(Y,Log(Softmax(X)))")
        assert not found.accepted and found.counterexample and found.mAP == ()
        assert found.optimises is None and detector.trained == []
        assert len(evaluate("Dot(Y,Log(Softmax(X)))", force=True).mAP) == 3


def test_a_loss_of_the_other_branch_may_stand_beside_both(tmp_path):
    detector = Detector()
    with evaluator(tmp_path, detector, beside={"reg": "GIoU"}) as evaluate:
        evaluate(CROSS_ENTROPY)
    assert all("reg" in trial.losses for trial in detector.trained)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--task long: expected one of none, tiny, head, full"):
        evaluator(tmp_path, Detector(), task="long")
    with pytest.raises(ConfigError, match="--with cls=...: formulas of this branch"):
        evaluator(tmp_path, Detector(), beside={"cls": "CrossEntropy"})
    with pytest.raises(
        ConfigError, match="--with box=...: expected BRANCH=EXPR with the branch reg"
    ):
        evaluator(tmp_path, Detector(), beside={"box": "GIoU"})
    with evaluator(tmp_path, Detector()) as evaluate, pytest.raises(ExpressionError, match="Loog"):
        evaluate("Loog(X)")
    with evaluator(tmp_path, Detector(lambda t: "no memory")) as evaluate:
        with pytest.raises(ConfigError, match="default loss does not train: no memory"):
            evaluate(CROSS_ENTROPY)
