"""YAML is read as plain data: what would be misread, would grow or would run something is refused
in one line."""

import time

import pytest

from cse_autoloss.config import read_config
from cse_autoloss.errors import UserError
from cse_autoloss.space import load_space
from cse_autoloss.yaml_io import MAX_BYTES, YamlError, parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsearch: {}\nseed: 2", "line 3: the key 'seed' stands twice"),
        ("search: {known: 1, known: 2}", "line 1: the key 'known' stands twice"),
        ("search: &all\n  search: *all", "line 1: an anchor that contains itself"),
        ("a: &a [*a]", "an anchor that contains itself"),
        (BOMB, "more than 100,000 entries"),
        ("seed: " + "9" * 5000, "a number of 5000 characters"),
        ("seed: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("[" * 3000, "nested deeper than"),
        ("[" * 60 + "]" * 60, "nested deeper than"),
        ("? [1]\n: 2", "expected text as a key"),
        ("~: 2", "expected text as a key"),
        ("a: 2026-13-45", "month must be"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: [", "found '<stream end>' in line 1, column 5: a: ["),
    ],
)
def test_what_is_no_plain_yaml_is_refused_at_once_in_one_line(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    started = time.monotonic()
    for read in (read_yaml, read_config, lambda path: load_space(str(path))):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: not YAML: ") and message in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - started < 20


def test_anchors_are_taken_where_they_only_save_writing():
    text = "a: &a {x: 1, y: [2, 3]}\nb: *a\nc: {<<: *a, x: 4}"
    assert parse_yaml(text) == {
        "a": {"x": 1, "y": [2, 3]},
        "b": {"x": 1, "y": [2, 3]},
        "c": {"x": 4, "y": [2, 3]},
    }


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(YamlError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(YamlError, match="larger than 4 MB"):
        read_yaml(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(YamlError, match="not YAML"):
        read_yaml(tmp_path / "latin.yaml")
