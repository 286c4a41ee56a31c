"""The journal keeps what was finished, whole steps only, for one driver at a time."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from cse_autoloss.journal import Fate, Journal
from cse_autoloss.status import read_comparison, read_status
from cse_autoloss.trial import ConfigError, Trial, TrialResult


def test_a_trial_and_its_result_come_back_as_they_were(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": {"seed": 3}})
    trial = Trial(
        "proxy-1",
        {"reg": "Sub(1,Div(I,U))"},
        {"reg": "reg"},
        evaluate=("val", "test"),
        scale={"reg": 2.0},
        time_limit=9.0,
    )
    result = TrialResult(
        "proxy-1",
        0.25,
        {"val/mAP": 0.25},
        ((10, 1.5),),
        {"reg": 0.7},
        12.5,
        20,
        None,
        {"torch": "2.13"},
    )
    with journal.step():
        journal.start_trial(
            "full",
            trial,
            journal.add_candidate(trial.losses, {"reg": "ab"}, "offspring", 1, Fate.TRAINING),
        )
    assert [row.trial for row in journal.trials(finished=False)] == [trial]
    with journal.step():
        journal.finish_trial(result)
    journal.close()
    (row,) = Journal.resume(tmp_path / "run").trials("full", finished=True)
    assert (row.trial, row.result) == (trial, result)


def test_a_step_that_fails_leaves_nothing_behind(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    with pytest.raises(ZeroDivisionError), journal.step():
        journal["round"] = 5
        journal.add_candidate({}, {}, "offspring", 1, Fate.SURVIVED)
        1 / 0
    assert journal["round"] is None and journal.candidates() == []


def test_a_second_driver_is_refused_and_a_reader_is_not(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": 1})
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is working on this run"):
        Journal.resume(tmp_path / "run")
    assert Journal.read(tmp_path / "run")["config"] == 1
    journal.close()
    Journal.resume(tmp_path / "run").close()


def test_a_folder_in_use_is_not_written_over(tmp_path):
    Journal.create(tmp_path / "run", {}).close()
    with pytest.raises(ConfigError, match="holds a run already"):
        Journal.create(tmp_path / "run", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        Journal.create(tmp_path / "other", {})
    with pytest.raises(ConfigError, match="no run here"):
        Journal.read(tmp_path / "nowhere")


def test_a_driver_killed_between_two_steps_loses_neither_the_first_nor_half_of_the_second(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from cse_autoloss.journal import Journal
        journal = Journal.create(sys.argv[1], {})
        with journal.step():
            journal["round"] = 1
        with journal.step():
            journal["round"] = 2
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")])
    assert done.returncode == -signal.SIGKILL
    assert Journal.resume(tmp_path / "run")["round"] == 1


def test_a_pause_between_two_drivers_counts_neither_as_training_nor_as_searching(
    tmp_path, monkeypatch
):
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    journal = Journal.create(tmp_path / "run", {"config": {}, "driver started": 1000.0})

    def start(key):
        with journal.step():
            journal.start_trial(
                "full", Trial(key), journal.add_candidate({}, {}, "offspring", 1, Fate.TRAINING)
            )

    def finish(key, seconds):
        clock[0] += seconds
        with journal.step():
            journal.finish_trial(TrialResult(key, 0.3))

    start("proxy-1")
    finish("proxy-1", 20)
    assert read_status(journal).trials_per_hour == pytest.approx(180)
    start("proxy-2")
    clock[0] += 36_000  # killed, and resumed ten hours later
    with journal.step():
        journal["driver started"] = clock[0]
        journal.restart_trial("proxy-2")
    assert read_status(journal).trials_per_hour is None
    finish("proxy-2", 30)
    assert read_status(journal).trials_per_hour == pytest.approx(120)
    assert journal.durations("full", last=10) == pytest.approx([30, 20])
    assert journal.durations("full", last=1) == pytest.approx([30])


def test_found_losses_are_ranked_by_their_confirmation_in_which_a_failure_counts_nothing(tmp_path):
    journal = Journal.create(tmp_path / "run", {})

    def confirm(candidate, seed, mAP):
        trial = Trial(f"confirm-{candidate}-{seed}", seed=seed)
        journal.start_trial("confirm", trial, candidate)
        if mAP is not None:
            journal.finish_trial(
                TrialResult(trial.key, mAP or None, failure=None if mAP else "diverged at step 3")
            )

    with journal.step():
        lucky, steady, fragile, unconfirmed = (
            journal.add_candidate(
                {"reg": text}, {"reg": text}, "offspring", 1, Fate.TRAINED, fitness=fitness
            )
            for text, fitness in (("U", 0.4), ("I", 0.3), ("E", 0.35), ("1", 0.2))
        )
        for candidate, values in (
            (lucky, (0.2, 0.22)),
            (steady, (0.3, 0.32)),
            (fragile, (0.36, 0.0)),
        ):
            for seed, value in enumerate(values):
                confirm(candidate, seed, value)
        confirm(steady, 2, None)  # still running: it says nothing yet
    assert [candidate.id for candidate in journal.found()] == [steady, lucky, fragile, unconfirmed]
    assert [candidate.confirmed for candidate in journal.found()] == pytest.approx(
        [0.31, 0.21, 0.18, None]
    )


def test_a_gain_is_over_the_default_with_the_same_seed(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    test = {"default": {5: 0.30, 6: 0.34, 7: None}, "found #1": {5: 0.31, 6: None, 7: 0.36}}
    with journal.step():
        for label, seeds in test.items():
            for seed, value in seeds.items():
                trial = Trial(f"final-{label}-{seed}", seed=seed, evaluate=("val", "test"))
                journal.start_trial("final", trial, label=label)
                metrics = {"val/mAP": 0.5, "test/mAP": value} if value else {}
                journal.finish_trial(
                    TrialResult(
                        trial.key, value and 0.5, metrics, failure=None if value else "diverged"
                    )
                )
    default, found = read_comparison(journal)
    assert (default.test, default.gain) == ((0.30, 0.34), ())
    assert (found.test, found.failures) == (
        (0.31, 0.36),
        ("diverged",),
    ) and found.gain == pytest.approx((0.01,))
