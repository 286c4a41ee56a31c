"""The documentation leads where it says: links, anchors, commands and their options."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from cse_autoloss.cli import COMMANDS, cli
from cse_autoloss.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCED = re.compile(r"^```.*?^```", re.S | re.M)


def ids(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """As GitHub and mkdocs make them of headings."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCED.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = re.sub(r"`[^`]*`", "", FENCED.sub("", page.read_text("utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_file_of_ours_that_a_page_names_is_there(page):
    named = r"(?<![\w./-])(?:tests|scripts|cse_autoloss|detectors|search_spaces|docs)/[\w./*-]*\w"
    for path in re.findall(named, page.read_text("utf-8")):
        assert list(ROOT.glob(path)), path


def commands(page):
    """(command, words after it) of each ``cse-search ...`` of a page, lines joined at ``\\``."""
    text = re.sub(r"\\\n\s*", "", page.read_text("utf-8"))
    return [
        (name, words)
        for name, words in re.findall(r"cse-search[ \t]+([a-z]+)\b([^\n`|]*)", text)
        if name in COMMANDS
    ]


def params(name, words):
    """The parameters of a command, or of the one of its commands that comes next."""
    command = cli.get_command(click.Context(cli), name)
    if isinstance(command, click.Group):
        below = command.get_command(click.Context(command), (words.split() or [""])[0])
        command = below or command
    return {option for param in command.params for option in param.opts + param.secondary_opts}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_option_of_a_command_is_there(page):
    for name, words in commands(page):
        if COMMANDS[name][0].startswith("detectors.") and find_spec("mmdet") is None:
            continue
        words = re.sub(r"#.*|[\"'][^\"']*[\"']", "", words)
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", words):
            assert option in params(name, words) | {"--help"}, f"cse-search {name}: no {option}"
        for preset in re.findall(r"--preset (\w+)", words):
            assert (PRESETS / f"{preset}.yaml").is_file(), preset


def test_commands_are_found_in_the_readme_and_its_make_targets_are_there():
    found = commands(ROOT / "README.md")
    assert len(found) > 10 and {"run", "evaluate", "data", "export"} <= {name for name, _ in found}
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for page in PAGES[:2]:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text("utf-8"), re.M):
            assert target in rules


def test_the_operator_and_the_space_of_the_page_on_losses_are_taken(tmp_path):
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    operator, space = re.findall(r"^```(?:python|yaml)\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "my_operators.py").write_text(operator)
    (tmp_path / "my_boxes.yaml").write_text(space)
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbase: my_boxes.yaml\nplugins: [my_operators]\noperators: [Cube]\n"
    )
    code = "from cse_autoloss import load_space; load_space('mine.yaml').expression('Cube(I)')"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
