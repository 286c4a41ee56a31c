"""Files appear whole, for everybody whom the umask lets, and are never written through a link; text
from elsewhere cannot move a terminal's cursor or end a line."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(OSError):
        write_whole(tmp_path / "taken", "text")
    assert os.listdir(tmp_path) == ["taken"]


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
