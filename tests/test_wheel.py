"""The wheel holds all that the package reads, and runs from a folder that is not the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cse_autoloss", "search_spaces", "detectors")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the wheel's content; built of a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for package in PACKAGES:
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=unread)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(copy / done.stdout.split()[-1]) as archive:
        archive.extractall(folder)
    return folder


def test_every_file_of_the_packages_is_in_it(wheel):
    for package in PACKAGES:
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        names = {path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts}
        assert names == {p.relative_to(wheel) for p in (wheel / package).rglob("*") if p.is_file()}


def test_it_runs_from_another_folder_with_plug_ins_of_that_folder(wheel, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "mine.yaml").write_text("base: reg\nname: mine\nplugins: [mine]\n")
    looked_up = """
import cse_autoloss
from cse_autoloss.config import preset_names
from cse_autoloss.named import load_class
from cse_autoloss.page.page import TEMPLATE
from cse_autoloss.space import load_space

print(cse_autoloss.__file__, TEMPLATE.is_file(), *preset_names())
print(load_class("mine:Mine", "key").__name__, load_space("mine.yaml").name)
"""
    verify = "from cse_autoloss.cli import main\nmain()"

    def run(script, *arguments):
        """As a console script: it imports from its own folder, not from the current one."""
        (wheel / "bin").mkdir(exist_ok=True)
        (wheel / "bin" / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, wheel / "bin" / "script.py", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(wheel)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run(looked_up).split() == [
        *(str(wheel / "cse_autoloss" / "__init__.py"), "True"),
        *("plain_evolution", "quickstart", "standard", "Mine", "mine"),
    ]
    assert "accepted" in run(verify, "verify", "Sub(1,Div(I,U))", "--space", "mine.yaml")
