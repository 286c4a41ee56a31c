"""Text that came from somewhere else, on its way to a terminal, a page or a file of code."""

from __future__ import annotations

import unicodedata

_HARMFUL = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # control, direction, private, surrogate, line ends


def printable(text: object, longest: int | None = None) -> str:
    """One line in which nothing moves a cursor, sets a colour, turns the direction of writing or
    ends a line: each such character as Python escapes it.

    Args:
        longest: characters after which the rest is cut off.
    """
    line = "".join(
        letter
        if unicodedata.category(letter) not in _HARMFUL
        else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in str(text)
    )
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def markdown(text: object) -> str:
    """The same for a Markdown page, where it can be neither markup nor the end of a table's
    cell."""
    line = printable(text)
    for letter in "\\`*_[]<>|#":
        line = line.replace(letter, f"\\{letter}")
    return line
