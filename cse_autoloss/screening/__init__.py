"""Screening: thousands of candidate losses judged at once, each with a reason."""

from __future__ import annotations

from collections.abc import Iterable

from cse_autoloss.expression import Expression
from cse_autoloss.screening.equivalence import Seen
from cse_autoloss.screening.proof import Finding, prove
from cse_autoloss.screening.properties import PROPERTIES
from cse_autoloss.screening.screener import (
    ACCEPTED,
    BATCH_SIZE,
    DUPLICATE,
    Screener,
    ScreenReport,
    Trace,
    Verdict,
)
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import Population

__all__ = [
    "ACCEPTED",
    "BATCH_SIZE",
    "DUPLICATE",
    "PROPERTIES",
    "Finding",
    "ScreenReport",
    "Screener",
    "Seen",
    "Trace",
    "Verdict",
    "prove",
    "screen",
    "verify",
]


def verify(expression: Expression, space: SearchSpace) -> Verdict:
    """Does an expression have the convergence properties of a loss? See
    ``properties.PROPERTIES``."""
    return Screener(space, batch_size=1).verify(expression)


def screen(
    candidates: Population | Iterable[Expression],
    space: SearchSpace,
    seen: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> ScreenReport:
    """Screen candidates once. Who screens again and again keeps a :class:`Screener`.

    Args:
        seen: what ``Screener.seen.to_json()`` of an earlier screening wrote; what is in it counts
            as a duplicate.
    """
    return Screener(space, batch_size, seen).screen(candidates)
