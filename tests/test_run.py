"""Whole runs through Ray, from the command line, with a trainer that computes mAP from a
formula."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from formula import FormulaTrainer

from cse_autoloss.cli import main
from cse_autoloss.journal import Journal
from cse_autoloss.run import Stopped, stopping
from cse_autoloss.trial import ConfigError

COMMAND = [sys.executable, "-m", "cse_autoloss.cli"]
CONFIG = """
detector: {{trainer: "formula:FormulaTrainer", log: {folder}/log, seconds: 0.2}}
search: {{known: 2, population: 4, tournament: 2, offspring: 1500, candidates: 4}}
budget: {{trials: 12}}
tuning: {{scales: [[1, 1], [2, 1]]}}
stages:
  tiny: {{task: tiny, batch: 4, keep: 2}}
  full: {{}}
  confirm: {{best: 2, seeds: 2}}
  final: {{best: 1, seeds: 2}}
cluster: {{workers: 2, num_cpus: 0.1}}
"""


def cse_search(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process, for what needs no other: it starts in no time."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cse-search", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, told.out, told.err)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was killed with SIGKILL in its middle and resumed; what was finished by then."""
    folder = tmp_path_factory.mktemp("formula")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    driver = subprocess.Popen(
        [*COMMAND, "run", str(folder / "run.yaml"), "--out", str(folder / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 200
    while trained(folder / "run") < 4:
        assert driver.poll() is None and time.monotonic() < end, driver.stdout.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    journal = Journal.read(folder / "run")
    before = {row.trial.key: row for row in journal.trials(finished=True)}
    resumed = cse_search("resume", folder / "run")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return folder, before, resumed


def copy_journal(run, folder):
    journal, copy = Journal.read(run), sqlite3.connect(folder / "journal.sqlite")
    journal._database.backup(copy)
    copy.close()
    journal.close()


def trained(folder):
    try:
        return Journal.read(folder).counts().get("full", (0, 0))[0]
    except ConfigError:
        return 0


def test_killing_loses_no_finished_training_and_repeats_none(finished):
    folder, before, resumed = finished
    journal = Journal.read(folder / "run")
    after = {row.trial.key: row for row in journal.trials(finished=True)}
    assert before and {key: after[key] for key in before} == before
    assert f"{len(before)} trainings are done and stay done" in resumed.stdout
    log = (folder / "log").read_text().split()
    assert not {key for key in before if log.count(key) > 1}
    assert journal.counts()["full"] == (12, 0) and journal["compared"]


def test_the_table_says_how_many_seeds_and_how_sure(finished):
    folder, _, resumed = finished
    assert "95% interval" in resumed.stdout and "±" in resumed.stdout
    assert "CSE-Autoloss-A" in resumed.stdout
    page = (folder / "run" / "report.md").read_text()
    assert "| default | 2 | 0." in page and "tiny" in page


def test_status_is_the_same_for_programs(finished, command):
    status = json.loads(command("status", finished[0] / "run", "--json").stdout)
    assert status["phase"] == "finished" and status["trials"] == [12, 12]
    assert status["stages"]["confirm"] == [4, 0] and status["running"] == []


def test_a_report_can_be_written_elsewhere(finished, tmp_path, command):
    done = command("report", finished[0] / "run", "--out", tmp_path / "there")
    assert done.returncode == 0 and (tmp_path / "there" / "report.md").is_file(), done.stderr
    (tmp_path / "file").touch()
    refused = command("report", finished[0] / "run", "--out", tmp_path / "file" / "below")
    assert refused.returncode == 2 and "file is no folder" in refused.stderr


def test_a_report_without_the_start_weights_lacks_the_config_alone_and_says_so(
    finished, tmp_path, command
):
    copy_journal(finished[0] / "run", tmp_path)
    done = command("report", tmp_path, "--trust")
    assert done.returncode == 0 and "not best.py: report.md says why" in done.stderr, done.stderr
    assert (tmp_path / "report.html").is_file() and (tmp_path / "best_cls.py").is_file()
    assert "No best.py: " in (tmp_path / "report.md").read_text()


SPEAKER = """
import sys
from cse_autoloss.display import RunConsole
for _ in range(3):
    RunConsole().print("a line")
print("went on", file=sys.stderr)
sys.stderr.flush()
"""


def test_a_run_goes_on_where_nobody_hears_it():
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as broken:
        for to in (full, broken):
            told = subprocess.run(
                [sys.executable, "-c", SPEAKER], stdout=to, stderr=subprocess.PIPE, text=True
            )
            assert told.stderr.startswith("went on"), told.stderr


@pytest.mark.parametrize("name", ["status", "resume"])
def test_a_journal_that_is_broken_further_on_is_one_line(finished, tmp_path, command, name):
    copy_journal(finished[0] / "run", tmp_path)
    with open(tmp_path / "journal.sqlite", "r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 40 * 4096)
    done = command(name, tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "its journal cannot be read: " in done.stderr


def test_an_export_is_written_to_a_file_and_a_config_needs_a_target_that_writes_one(
    finished, tmp_path, command
):
    run = finished[0] / "run"
    refused = command("export", run, "--output", tmp_path)
    assert refused.returncode == 2 and f"such as {tmp_path}/best.py" in refused.stderr
    (tmp_path / "mine.py").touch()
    asked = ("--target", "torch", "--config", tmp_path / "mine.py")
    refused = command("export", run, "--output", tmp_path / "best.py", *asked)
    assert (
        refused.returncode == 2 and "torch writes PyTorch modules and no config" in refused.stderr
    )


def test_a_run_is_not_resumed_when_what_its_numbers_depend_on_has_changed(finished):
    run = finished[0] / "run"
    refused = cse_search("resume", run, "--set", "budget.trials=13", FORMULA_DATA="two")
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "data (one, now two)" in refused.stderr and "--accept-changes" in refused.stderr
    done = cse_search(
        "resume", run, "--set", "budget.trials=13", "--accept-changes", FORMULA_DATA="two"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    journal = Journal.read(run)
    assert journal.counts()["full"] == (13, 0)
    assert journal["accepted changes"] == ["data (one, now two)"]


def test_a_signal_is_known_again_that_a_library_has_made_a_keyboard_interrupt_of():
    with pytest.raises(Stopped) as caught, stopping():
        with contextlib.suppress(Stopped):
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt  # as Ray does in a wait
    assert caught.value.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt) as caught, stopping():
        raise KeyboardInterrupt
    assert not isinstance(caught.value, Stopped)


def test_a_signal_stops_a_run_which_goes_on_from_another_folder(tmp_path):
    config = CONFIG.format(folder=tmp_path).replace("formula:FormulaTrainer", "here:Trainer")
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "here.py").write_text("from formula import FormulaTrainer as Trainer\n")
    driver = subprocess.Popen(
        [*COMMAND, "run", "run.yaml", "--out", "my run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    end = time.monotonic() + 200
    while not (tmp_path / "log").exists():
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM
    assert "stopped; nothing finished is lost: cse-search resume 'my run'" in out
    assert "***" not in err and "Traceback" not in err, err
    resumed = cse_search("resume", tmp_path / "my run", "--set", "budget.trials=0")
    assert resumed.returncode == 0 and "CSE-Autoloss-A" in resumed.stdout, resumed.stderr
    stranger = str(tmp_path / "no keys here")
    refused = cse_search("resume", tmp_path / "my run", XDG_CONFIG_HOME=stranger)
    assert refused.returncode == 2 and "detector.trainer here:Trainer" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and "--trust" in refused.stderr


FAILING = """
from formula import FormulaTrainer

class Trainer(FormulaTrainer):
    def train(self, trial, progress=None):
        if not self._log.with_name("mended").exists():
            raise MemoryError("no memory")
        return super().train(trial)
"""


def test_a_run_that_the_machine_ended_says_how_to_go_on_and_does_once_it_is_mended(tmp_path):
    config = CONFIG.format(folder=tmp_path).replace("formula:FormulaTrainer", "failing:Trainer")
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "failing.py").write_text(FAILING)
    paths = {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    settings = ("--set", "cluster.retries=0", "--set", "budget.trials=0")
    run = tmp_path / "run"
    ended = cse_search("run", tmp_path / "run.yaml", "--out", run, *settings, **paths)
    assert ended.returncode == 1 and "the machine failed it 1 times" in ended.stderr
    assert f"nothing finished is lost: cse-search resume {run}" in ended.stdout
    (tmp_path / "mended").touch()
    resumed = cse_search("resume", run, **paths)
    assert resumed.returncode == 0 and "CSE-Autoloss-A" in resumed.stdout, resumed.stderr
    journal = Journal.read(run)
    assert journal.counts() == {"tune": (2, 0), "final": (4, 0)}


def test_sighup_stops_a_run_too_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with pytest.raises(Stopped), stopping():
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "others.mine.cls=Focl"], "others.mine.cls: no loss 'Focl'"),
        (["evaluate", "Focal", "Focl", "--config"], "formula 2, Focl: no loss 'Focl'"),
        (["evaluate", "Focal", "--with", "reg=GIou", "--config"], None),
        (["evaluate", "Focal", "--with", "reg=GIuo", "--config"], "--with reg=GIuo: no loss"),
        (["evaluate", "Focal", "--with", "rge=GIoU", "--config"], "--with rge=...: expected"),
    ],
)
def test_formulas_are_read_before_the_data(tmp_path, monkeypatch, command, arguments, message):
    def check(options):
        raise ConfigError("the data is read")

    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    monkeypatch.setattr(FormulaTrainer, "check", staticmethod(check))
    monkeypatch.setattr(FormulaTrainer, "adopt", check)
    (error,) = command(*arguments, tmp_path / "run.yaml").stderr.splitlines()
    assert (message or "the data is read") in error


def test_a_file_of_formulas_in_another_encoding_is_one_line(tmp_path, command):
    path = tmp_path / "formulas.txt"
    path.write_text("# Größe\nFocal\n", encoding="latin-1")
    (error,) = command("evaluate", "--file", path).stderr.splitlines()
    assert f"--file {path}: should be text in UTF-8" in error


@pytest.mark.parametrize("arguments", [["run"], ["evaluate", "Focal", "--config"]])
def test_a_cluster_that_cannot_be_is_one_line(tmp_path, command, arguments):
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    refused = command(*arguments, tmp_path / "run.yaml", "--set", "cluster.workers=999")
    (error,) = refused.stderr.splitlines()
    assert refused.returncode == 1 and error.startswith("cse-search: cluster: 999 workers")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out"),
        ("/proc/nowhere/run", "/proc/nowhere"),
        ("x" * 300, "File name too long"),
        ("a file", "is not empty"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, command, out, message):
    (tmp_path / "a file").write_text("")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    refused = command("run", "run.yaml", "--out", out)
    error = refused.stderr.strip()
    assert refused.returncode in (1, 2) and message in error
    assert "Traceback" not in error and len(error.splitlines()[-1]) < 700
