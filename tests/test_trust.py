"""A run folder that somebody sent runs no code when it is looked at; names lead to code in one
place alone."""

import io
import os
import shutil

import pytest
from rich.console import Console
from test_search_decisions import search

from cse_autoloss import run
from cse_autoloss.display import comparison_table, plain_line
from cse_autoloss.errors import UserError
from cse_autoloss.export import export_run
from cse_autoloss.expression import ExpressionError
from cse_autoloss.journal import Journal
from cse_autoloss.named import ForeignCode, import_named, load_class, nothing_imported
from cse_autoloss.report import write_report
from cse_autoloss.space import load_space
from cse_autoloss.status import Compared, read_status
from cse_autoloss.trial import ConfigError, load_trainer
from cse_autoloss.trust import made_here, reading, sign

LABEL = "[/x] \x1b[2J $a$ |<b>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small finished run whose configuration names a trainer of its own, unsigned."""
    changes = {
        "detector": {"trainer": "stranger:Trainer", "config": "/sent/config.py"},
        "budget": {"trials": 4},
        "others": {LABEL.replace("\x1b", ""): {"reg": "IoU"}},
    }
    journal = search(tmp_path_factory.mktemp("sent") / "run", changes)
    with journal.step():
        for key, value in {
            "created": 0.0,
            "versions": {"torch\nimport os": "1\x1b[2J"},
            "images": {"val": 1},
            "classes": ["thing"],
            "detector": "sent.py on <script>",
        }.items():
            journal[key] = value
    journal.close()
    return journal.folder


@pytest.fixture
def sent(made, tmp_path, monkeypatch):
    """A copy of it, beside a module with the trainer's name that leaves a mark when it is
    imported."""
    folder = tmp_path / "sent" / "run"
    shutil.copytree(made, folder)
    (folder.parent / "stranger.py").write_text("open('RAN', 'w').close()\nclass Trainer: pass\n")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


def ran(folder):
    return (folder.parent / "RAN").exists()


def test_a_run_that_was_sent_is_reported_without_its_code(sent):
    picture = sent / "progress.png"
    picture.symlink_to(sent.parent / "mine.png")
    (sent.parent / "mine.png").write_text("mine")
    journal = Journal.read(sent)
    with reading(journal) as own:
        assert not own and read_status(journal).phase == "finished"
        written = write_report(journal, own)
        assert export_run(journal, sent / "alone.py", target="torch")
    assert not ran(sent)
    assert {"best_cls.py", "report.md", "report.html"} <= {path.name for path in written}
    assert not (sent / "best.py").exists()
    assert (sent.parent / "mine.png").read_text() == "mine" and not picture.is_symlink()
    page = (sent / "report.md").read_text()
    assert "\x1b" not in page and "<script>" not in page and "torch\\\\nimport os" in page


@pytest.mark.parametrize("name", ["driver.lock", "journal.sqlite"])
def test_a_driver_writes_through_no_link(sent, name):
    mine = sent.parent / "mine"
    mine.write_bytes((sent / name).read_bytes() if (sent / name).exists() else b"mine")
    before = mine.read_bytes()
    (sent / name).unlink(missing_ok=True)
    (sent / name).symlink_to(mine)
    with pytest.raises(ConfigError, match="link|cannot be written to"):
        Journal.resume(sent)
    assert mine.read_bytes() == before


def test_its_code_is_named_and_not_run_until_it_is_trusted(sent):
    journal = Journal.read(sent)
    with (
        reading(journal),
        pytest.raises(ForeignCode, match="stranger would be imported; .*--trust"),
    ):
        export_run(journal, sent / "best.py")
    with pytest.raises(ConfigError) as caught:
        run.resume(sent, Console(file=io.StringIO()))
    assert not ran(sent)
    for part in (
        "not made here",
        "stranger:Trainer",
        "/sent/config.py",
        "reg space reg",
        "--trust",
    ):
        assert part in str(caught.value)
    with reading(journal, trust=True), pytest.raises(ConfigError, match="is no trainer: it lacks"):
        export_run(journal, sent / "best.py")
    assert ran(sent)


def test_a_run_is_its_makers_until_somebody_changes_what_it_names(sent, tmp_path, monkeypatch):
    journal = Journal.resume(sent)
    with journal.step():
        sign(journal)
    assert made_here(journal)
    assert (tmp_path / "config" / "cse_autoloss" / "run_key").stat().st_mode & 0o777 == 0o600
    journal.close()
    moved = sent.rename(sent.with_name("moved"))
    assert made_here(Journal.read(moved))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    assert not made_here(Journal.read(moved))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    journal = Journal.resume(moved)
    with journal.step():
        journal["config"] = {**journal["config"], "detector": {"trainer": "other:Trainer"}}
    assert not made_here(journal)
    journal.close()


def test_text_in_a_journal_becomes_code_only_as_the_expression_that_it_is(sent):
    journal = Journal.resume(sent)
    with journal.step():
        journal._database.execute(
            "UPDATE candidates SET losses = ?", ('{"reg": "U\\nimport os", "cls": "X"}',)
        )
    with pytest.raises(ExpressionError):
        export_run(journal, sent / "best.py", target="torch")
    journal.close()


def test_labels_and_failures_cannot_speak_to_the_terminal(sent):
    out = io.StringIO()
    row = Compared(LABEL, {}, (0.1,), (0.1,), (), (LABEL,))
    console = Console(file=out, force_terminal=True, color_system=None, width=200)
    console.print(comparison_table([row]))
    console.print(plain_line(read_status(Journal.read(sent))), markup=False)
    assert "[/x] \\x1b[2J" in out.getvalue() and "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":", "is not of the form 'package.module:Class'"),
        ("module", "is not of the form"),
        ("a b:C", "is not of the form"),
        (".relative:C", "is not of the form"),
        ("os:C.d", "is not of the form"),
        ("nowhere_at_all:C", "cannot import 'nowhere_at_all': ModuleNotFoundError"),
        ("raising:C", "cannot import 'raising': ZeroDivisionError: division by zero"),
        ("leaving:C", "cannot import 'leaving': SystemExit: 0"),
        ("os:makedirs", "should lead to a class; makedirs there is a function"),
        ("os:Nothing", "should lead to a class; Nothing there is nothing"),
        ("pathlib:Path", "is no trainer: it lacks targets, "),
    ],
)
def test_a_name_that_leads_to_no_trainer_is_one_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "raising.py").write_text("1 / 0")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_trainer(name)
    assert str(caught.value).startswith("detector.trainer: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_modules_are_found_in_the_current_folder_after_all_others(tmp_path, monkeypatch):
    (tmp_path / "lying_here.py").write_text("class Thing: pass")
    (tmp_path / "json.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    assert load_class("lying_here:Thing", "search.ranker").__name__ == "Thing"
    assert import_named("json", "search.ranker").dumps([]) == "[]"


def test_spaces_with_plugins_of_a_run_that_was_sent_are_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text("open('RAN', 'w').close()")
    (tmp_path / "mine.yaml").write_text("base: reg\nname: mine\nplugins: [plugged]\n")
    monkeypatch.chdir(tmp_path)
    with nothing_imported("it was sent"), pytest.raises(UserError, match="plugged would be"):
        load_space(str(tmp_path / "mine.yaml"))
    assert not os.path.exists("RAN")
    assert load_space(str(tmp_path / "mine.yaml")).name == "mine" and os.path.exists("RAN")
