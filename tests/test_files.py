"""Files appear whole, for everybody whom the umask lets, and are never written through a link; text
from elsewhere cannot move a terminal's cursor or end a line."""

import os

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cse_autoloss.cli import cli
from cse_autoloss.files import write_whole
from cse_autoloss.text import markdown, printable


def test_a_file_is_replaced_whole_and_a_link_is_not_followed(tmp_path):
    target, link = tmp_path / "bashrc", tmp_path / "run" / "report.md"
    write_whole(link, "first")
    link.unlink()
    target.write_text("mine")
    link.symlink_to(target)
    write_whole(link, "second")
    assert target.read_text() == "mine"
    assert link.read_text() == "second" and not link.is_symlink()
    assert os.listdir(link.parent) == ["report.md"]


def test_a_file_can_be_shared_as_the_umask_says_unless_it_is_private(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "shared", b"")
        write_whole(tmp_path / "private", b"", private=True)
    finally:
        os.umask(before)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_draft(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "taken", "text")
    assert caught.value.filename == str(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("proxy mine.py", "--output"),
        ("export RUN", "--output"),
        ("report RUN", "--out"),
        ("show U --space reg", "--plot"),
        ("verify U --space reg", "--plot"),
        ("screen --space reg", "--output"),
        ("data check embedded", "--sheet"),
        ("compare . .", "--output"),
    ],
)
@pytest.mark.parametrize(
    ("path", "reason"), [("", "an empty path"), ("run.yaml/best.py", "run.yaml is no folder")]
)
def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(
    command, option, path, reason, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("")
    if command.split()[0] in ("proxy", "data", "compare"):
        pytest.importorskip("mmdet")
    result = CliRunner().invoke(cli, [*command.split(), option, path])
    assert result.exit_code == 2 and reason in result.output


@given(st.text())
def test_printable_text_is_one_line_that_a_terminal_only_shows(text):
    line = printable(text)
    assert line.splitlines() in ([line], []) and "\x1b" not in line
    assert printable(line) == line


def test_what_was_harmful_can_still_be_read():
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed"
    assert printable("Grüße, 日本") == "Grüße, 日本"
    assert printable("x" * 100, 10) == "x" * 9 + "…"
    assert markdown("a|b <i> [c](d)\n# e") == "a\\|b \\<i\\> \\[c\\](d)\\\\n\\# e"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise a crash of the machine may leave an empty file of that name."""
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, c=call: (done.append(n), c(*a))[1])
    write_whole(tmp_path / "file", b"x")
    assert done == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == b"x"
