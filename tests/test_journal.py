"""The journal keeps what was finished, whole steps only, for one driver at a time."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from cse_autoloss import run_folder
from cse_autoloss.journal import CandidateState, Journal, Survivor
from cse_autoloss.pins import changes
from cse_autoloss.status import read_comparison, read_status
from cse_autoloss.trial import ConfigError, Trial, TrialResult


def add(journal, losses=None, fitness=None, origin="mutation"):
    losses = losses or {"reg": "Sub(1,Div(I,U))"}
    number = journal.add_candidate(losses, losses, origin, "full", 1, {"reg": (1, 2)}, 0.3, 0.01)
    if fitness is not None:
        journal.move(number, CandidateState.SCORED)
        journal.set_fitness(number, fitness, 1)
    return number


def test_a_trial_and_its_result_come_back_as_they_were(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": {"seed": 3}})
    trial = Trial(
        *("full-1-0", {"reg": "Sub(1,Div(I,U))"}, {"reg": "reg"}),
        evaluate=("val", "test"),
        scale={"reg": 2.0},
        time_limit=9.0,
    )
    metrics, provenance = {"val/mAP": 0.25}, {"torch": "2.13"}
    result = TrialResult(
        *("full-1-0", 0.25, metrics, ((10, 1.5),), {"reg": 0.7}, 12.5, 20, None, provenance)
    )
    with journal.step():
        journal.start_trial("full", trial, add(journal))
    assert [row.trial for row in journal.trials(finished=False)] == [trial]
    with journal.step():
        journal.finish_trial(result, seconds=13.0, at=20.0)
    journal.close()
    again = Journal.resume(tmp_path / "run")
    (row,) = again.trials("full", finished=True)
    assert (row.trial, row.result, row.seconds) == (trial, result, 13.0)
    candidate = again.candidate(1)
    assert (candidate.parents, candidate.predicted) == ({"reg": [1, 2]}, 0.3)


def test_survivors_come_back_with_their_features_until_they_are_chosen(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    features = np.linspace(-3, 3, 7, dtype=np.float16)
    survivor = Survivor(5, "reg", "Sub(1,Div(I,U))", "ab", 1, "crossover", (2, 3), features)
    hashes = np.array([1, 2**63 + 5], np.uint64)
    with journal.step():
        journal.add_survivors([survivor])
        journal.add_seen("reg", 1, hashes)
        journal.add_seen("reg", 2, hashes + np.uint64(7))
    (read,) = journal.survivors(chosen=False)
    assert (read.id, read.parents, read.operator) == (5, (2, 3), "crossover")
    assert (read.features == features).all()
    assert set(journal.seen("reg")) == set(hashes) | set(hashes + np.uint64(7))
    assert len(journal.seen("cls")) == 0
    with journal.step():
        journal.choose_survivors([5])
    assert not journal.survivors(chosen=False) and journal.last_survivor == 5


def test_a_damaged_journal_is_not_resumed_even_where_it_can_be_read(tmp_path):
    """As it may be in the copy of a folder whose run went on."""
    journal = Journal.create(tmp_path / "run", {})
    with journal.step():
        for place in range(100):
            add(journal, {"reg": "x" * 100}, place / 100)
    journal.close()
    data = bytearray((tmp_path / "run" / "journal.sqlite").read_bytes())
    pages = [page for page in range(0, len(data), 4096) if data[page] == 13]  # leaves of tables
    for page in (page for page in pages if int.from_bytes(data[page + 3 : page + 5]) > 5):
        cells = slice(page + 8, page + 12)  # the first two change places
        data[cells] = data[page + 10 : page + 12] + data[page + 8 : page + 10]
    (tmp_path / "run" / "journal.sqlite").write_bytes(data)
    damaged = Journal.read(tmp_path / "run")
    assert len(damaged.candidates()) > 0
    damaged.close()
    with pytest.raises(ConfigError, match="damaged .*copied while the run went on"):
        Journal.resume(tmp_path / "run")


def test_a_step_that_fails_leaves_nothing_behind(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    with pytest.raises(ZeroDivisionError), journal.step():
        journal["round"] = 5
        add(journal)
        1 / 0
    assert journal["round"] is None and journal.candidates() == []


# --- one driver at a time, and anybody may look ---


def test_a_second_driver_is_refused_and_a_reader_is_not(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": 1})
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is working on this run"):
        Journal.resume(tmp_path / "run")
    assert Journal.read(tmp_path / "run")["config"] == 1
    journal.close()
    Journal.resume(tmp_path / "run").close()


def test_a_driver_whose_lock_was_deleted_stops_when_another_has_begun(tmp_path):
    first = Journal.create(tmp_path / "run", {})
    (tmp_path / "run" / "driver.lock").unlink()
    second = Journal.resume(tmp_path / "run")
    with second.step():
        second["round"] = 2
    with pytest.raises(ConfigError, match="was deleted, moved or taken over"), first.step():
        first["round"] = 3
    assert second["round"] == 2


def test_a_driver_whose_folder_is_deleted_stops(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="was deleted, moved or taken over"), journal.step():
        journal["round"] = 1


def test_where_files_cannot_be_locked_a_file_that_one_process_makes_takes_the_lock_s_place(
    tmp_path, monkeypatch
):
    def flock(file, flags):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    journal = Journal.create(tmp_path / "run", {})
    with pytest.raises(ConfigError, match="this file system has no locks"):
        Journal.resume(tmp_path / "run")
    journal.close()
    Journal.resume(tmp_path / "run").close()


@pytest.mark.skipif(os.getuid() != 0 and not os.access("/proc", os.R_OK), reason="needs /proc")
def test_on_a_network_file_system_the_journal_has_no_write_ahead_log(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "network_file_system", lambda folder: "nfs4")
    journal = Journal.create(tmp_path / "run", {})
    with journal.step():
        journal["round"] = 1
        assert not (tmp_path / "run" / "journal.sqlite-wal").exists()
    assert Journal.read(tmp_path / "run")["round"] == 1


def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount(tmp_path, monkeypatch):
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: mounts)
    assert run_folder.network_file_system(tmp_path / "run") == "nfs4"
    assert run_folder.network_file_system(tmp_path.parent) is None


@pytest.mark.parametrize("log", [False, True])
def test_a_run_on_a_medium_that_cannot_be_written_is_read(tmp_path, monkeypatch, log):
    """Also one whose driver was killed: what it wrote last stands in the log beside the journal."""
    journal = Journal.create(tmp_path / "run", {"config": 1})
    with journal.step():
        journal["round"] = 7
    if log:
        shutil.copytree(tmp_path / "run", tmp_path / "medium")
    journal.close()
    if not log:
        shutil.copytree(tmp_path / "run", tmp_path / "medium")
    connect = sqlite3.connect

    def read_only(path, **options):  # root may write anywhere: refuse as the medium would
        if "medium" in str(path) and "immutable" not in str(path):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, **options)

    monkeypatch.setattr("sqlite3.connect", read_only)
    before = sorted(path.name for path in (tmp_path / "medium").iterdir())
    assert Journal.read(tmp_path / "medium")["round"] == 7
    assert sorted(path.name for path in (tmp_path / "medium").iterdir()) == before


# --- what is there already ---


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
    (tmp_path / "empty").mkdir()
    Journal.create(tmp_path / "empty", {}).close()


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (99, "a newer")])
def test_a_journal_of_another_format_is_refused(tmp_path, version, age):
    Journal.create(tmp_path / "run", {}).close()
    database = sqlite3.connect(tmp_path / "run" / "journal.sqlite")
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    for opened in (Journal.read, Journal.resume):
        with pytest.raises(ConfigError, match=f"written by {age} version .*format {version}; this"):
            opened(tmp_path / "run")


@pytest.mark.parametrize("made", ["", "PRAGMA user_version = 2", "CREATE TABLE meta (key TEXT)"])
def test_a_database_without_a_runs_tables_is_refused(tmp_path, made):
    database = sqlite3.connect(tmp_path / "journal.sqlite")
    database.execute(made)
    database.commit()
    database.close()
    for opened in (Journal.read, Journal.resume):
        with pytest.raises(ConfigError, match="journal.sqlite is no journal of a run: it is empty"):
            opened(tmp_path)


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "journal.sqlite").write_text("not a database, but long enough to be looked at" * 40)
    with pytest.raises(ConfigError, match="its journal cannot be read: file is not a database"):
        Journal.read(tmp_path)


@pytest.mark.parametrize("moment", ["connect", "fill", "rename"])
def test_a_driver_that_ends_while_it_makes_the_folder_leaves_none_behind(tmp_path, moment):
    program = textwrap.dedent("""
        import os, pathlib, sys
        from cse_autoloss import journal, run_folder
        end = lambda *args, **options: os._exit(9)
        match sys.argv[2]:
            case "connect":
                run_folder.connect = end
            case "fill":
                journal.json.dumps = end
            case "rename":
                pathlib.Path.rename = end
        journal.Journal.create(sys.argv[1], {"config": 1})
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run"), moment])
    assert done.returncode == 9 and not (tmp_path / "run").exists()
    Journal.create(tmp_path / "run", {}).close()


def test_a_full_disk_while_the_folder_is_made_is_one_line_and_leaves_none_behind(
    tmp_path, monkeypatch
):
    def full(path):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(run_folder, "connect", full)
    with pytest.raises(ConfigError, match="run: cannot be made: database or disk is full"):
        Journal.create(tmp_path / "run", {})
    assert list(tmp_path.iterdir()) == []


def test_what_trials_start_from_is_the_same_after_a_resume_or_refused(tmp_path):
    journal = Journal.create(tmp_path / "run", {})
    assert journal.prepared is None
    journal.prepared = b"weights"
    assert journal.prepared == b"weights"
    journal.prepared_path.write_bytes(b"")
    with pytest.raises(ConfigError, match="is not what this run's trainings started from"):
        journal.prepared


def test_what_changed_since_a_run_began_is_named():
    before = {"reg space": "aa", "data": "bb", "torch": "2.13"}
    assert changes(before, before) == []
    assert changes(before, {**before, "data": "cc", "torch": "2.12"}) == [
        "data (bb, now cc)",
        "torch (2.13, now 2.12)",
    ]
    assert changes({**before, "pinned once": "cc"}, before) == []  # by an earlier version


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


# --- what is read from it ---


def test_the_pace_is_that_of_drivers_at_work(tmp_path):
    """A pause between two drivers counts neither as training nor as searching."""
    journal = Journal.create(tmp_path / "run", {"config": {"budget": {"trials": 10}}})
    assert read_status(journal).trials_per_hour is None
    for place, at in enumerate((20, 40, 60, 80)):
        trial = Trial(f"full-{place}-0")
        with journal.step():
            journal.start_trial("full", trial, add(journal))
            journal.finish_trial(TrialResult(trial.key, 0.3), seconds=15 + place, at=at)
    status = read_status(journal)
    assert status.trials_per_hour == pytest.approx(180)
    assert status.seconds_left == pytest.approx(6 * 20)
    assert journal.durations("full", last=2) == [18, 17]
    assert journal.durations("full", "tune", last=9) == [18, 17, 16, 15]


def test_nothing_runs_in_a_run_whose_driver_is_gone(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": {"budget": {"trials": 10}}})
    journal.start_trial("full", Trial("full-0-0"), add(journal))
    assert [key for key, _ in read_status(Journal.read(tmp_path / "run")).running] == ["full-0-0"]
    journal.close()
    assert read_status(Journal.read(tmp_path / "run")).running == ()


def test_found_losses_are_ranked_by_the_last_stage_in_which_a_failure_counts_nothing(tmp_path):
    journal = Journal.create(tmp_path / "run", {})

    def confirm(candidate, seed, mAP):
        trial = Trial(f"confirm-{candidate}-{seed}", seed=seed)
        journal.start_trial("confirm", trial, candidate)
        if mAP is not None:
            failure = None if mAP else "diverged at step 3"
            journal.finish_trial(TrialResult(trial.key, mAP or None, failure=failure), at=1.0)

    with journal.step():
        lucky, steady, fragile, unconfirmed = (
            add(journal, {"reg": text}, fitness)
            for text, fitness in (("U", 0.4), ("I", 0.3), ("E", 0.35), ("1", 0.2))
        )
        add(journal, {"reg": "Div(I,U)"}, 0.9, origin="known: IoU")
        for candidate, values in (
            (lucky, (0.2, 0.22)),
            (steady, (0.3, 0.32)),
            (fragile, (0.36, 0.0)),
        ):
            for seed, value in enumerate(values):
                confirm(candidate, seed, value)
        confirm(steady, 2, None)  # still running: it says nothing yet
    ranked = journal.best(["confirm"])
    assert [candidate.id for candidate in ranked] == [steady, lucky, fragile, unconfirmed]
    assert [c.closing for c in ranked] == pytest.approx([0.31, 0.21, 0.18, None])
    assert [c.id for c in journal.best(count=2)] == [lucky, fragile], "by fitness alone"
    assert [c.id for c in journal.best(["confirm"], 1)] == [steady]


def test_a_gain_is_over_the_default_with_the_same_seed_and_a_failure_counts_as_nothing(tmp_path):
    journal = Journal.create(tmp_path / "run", {"config": {}})
    test = {"default": {5: 0.30, 6: 0.34, 7: 0.33}, "found #1": {5: 0.31, 6: None, 8: 0.36}}
    with journal.step():
        for label, seeds in test.items():
            for seed, value in seeds.items():
                trial = Trial(f"final-{label}-{seed}", seed=seed, evaluate=("val", "test"))
                journal.start_trial("final", trial, label=label)
                metrics = {"val/mAP": 0.5, "test/mAP": value} if value else {}
                failure = None if value else "diverged"
                result = TrialResult(trial.key, value and 0.5, metrics, failure=failure)
                journal.finish_trial(result, at=1.0)
    default, found = read_comparison(journal)
    assert (default.test, default.gain) == ((0.30, 0.34, 0.33), ())
    assert (found.test, found.failures) == ((0.31, 0.0, 0.36), ("diverged",))
    assert found.gain == pytest.approx((0.01, -0.34))
