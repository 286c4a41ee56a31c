"""Whether a run was made by this user on this machine: only then may what it names be imported.

A run's configuration names code: a trainer, plug-ins of a search space, an MMDetection config,
which is a Python program. That is the user's own as long as the run is. So a run is signed where it
is made, with a key that only its user can read; a run folder that somebody sent has no such
signature, and one whose configuration was changed has a wrong one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cse_autoloss.files import write_whole
from cse_autoloss.journal import Journal
from cse_autoloss.named import add_search_path, nothing_imported
from cse_autoloss.text import printable
from cse_autoloss.trial import ConfigError

SIGNED = ("config", "spaces", "import path")  # what can lead to code
SIGNATURE = "made here"
ADVICE = "if you trust whoever made it, say --trust"


def sign(journal: Journal) -> None:
    """Say that this user made the run as it stands, or trusts it. Within a journal's step."""
    key = _key(make=True)
    journal[SIGNATURE] = _signature(journal, key) if key else None


def made_here(journal: Journal) -> bool:
    """Whether the run was signed by this user as it stands."""
    key, signature = _key(make=False), journal[SIGNATURE]
    if key is None or not isinstance(signature, str):
        return False
    return hmac.compare_digest(signature.encode(), _signature(journal, key).encode())


def check_trust(journal: Journal, trust: bool) -> None:
    """Before code is run that a run names.

    Raises:
        ConfigError: what that code is, if the run was not made here and is not to be trusted.
    """
    if not (trust or made_here(journal)):
        raise ConfigError(
            f"{journal.folder}: was not made here, and going on with it would run code that it "
            f"names: {named_code(journal)}; {ADVICE}"
        )
    if isinstance(journal["import path"], str):
        add_search_path(journal["import path"])


@contextmanager
def reading(journal: Journal, trust: bool = False) -> Iterator[bool]:
    """Read a run: code that it names is imported only if it was made here, or is trusted. Yields
    whether that is so."""
    if trust or made_here(journal):
        yield True
        return
    with nothing_imported(f"{printable(journal.folder)} was not made here: {ADVICE}"):
        yield False


def named_code(journal: Journal) -> str:
    """What the run's configuration names that is, or leads to, code; one line."""
    config = journal["config"]
    names = {f"detector.{key}": value for key, value in config.get("detector", {}).items()}
    names |= {f"{branch} space": origin for branch, origin in journal["spaces"].items()}
    search = config.get("search", {})
    names |= {f"search.{key}": search.get(key) for key in ("strategy", "ranker")}
    names |= {"log": ", ".join(map(str, config["log"]))} if config.get("log") else {}
    return "; ".join(f"{key} {printable(value, 120)}" for key, value in names.items())


def _signature(journal: Journal, key: bytes) -> str:
    text = json.dumps([journal[name] for name in SIGNED], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    """This user's key; None where there is none, or no place for one."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(base) / "cse_autoloss" / "run_key"
    try:
        if make and not path.exists():
            write_whole(path, secrets.token_bytes(32), private=True)
        data = path.read_bytes()
    except OSError:
        return None
    return data if len(data) == 32 else None
