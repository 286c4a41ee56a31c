"""Errors that are a user's to mend: the command line prints their one line, and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What a user gave is wrong: what, where, and what would be right."""


class SearchError(RuntimeError):
    """Work that was begun cannot go on: what happened, and what to change."""


def hint(word: str, known: Iterable[str], kind: str, cutoff: float = 0.6) -> str:
    """How a message on an unknown word ends: with the known one that it is almost, or with all.

    Args:
        kind: what the known ones are, in the plural.
        cutoff: similarity from which on a word is almost another, as difflib counts it.
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"{kind} are {', '.join(known)}"
