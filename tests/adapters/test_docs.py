"""The examples of docs/adapters.md run as they stand."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
EXAMPLES = {
    section.partition("\n")[0]: found[1]
    for section in PAGE.read_text().split("\n## ")
    if (found := re.search(r"```python\n(.*?)```", section, re.S))
}


@pytest.mark.parametrize("library", ["transformers", "torchvision"])
def test_the_example_trains(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXAMPLES[library]],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 5
