"""What a comparison cannot tell, said where it is printed: a default that has hardly learned, and
differences that seeds alone could make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cse_autoloss.intervals import pooled_deviation
from cse_autoloss.journal import DEFAULT
from cse_autoloss.status import Compared

WEAK = 0.05  # mAP on test: a detector below it has learned too little for its loss to matter
_MOST_SEEDS = 200  # more are no advice


def caveats(rows: Sequence[Compared]) -> list[str]:
    """Sentences, each with what would help; none where there is nothing to warn of.

    The differences are each loss's mean gain on test over the default losses, seed by seed; the
    spread is the standard deviation of one training's mAP about its loss's mean, pooled over all.
    """
    found = []
    default = next((row.test for row in rows if row.label == DEFAULT), ())
    if default and np.mean(default) < WEAK:
        found.append(
            f"The default losses reach mAP {np.mean(default):.3f} on test, below {WEAK:g}: a "
            "detector that has hardly learned says little of its loss. What helps: more steps "
            "(detector.steps), a longer warm-up (detector.warmup_steps), larger images, or a "
            "proxy whose anchors fit the objects."
        )
    spread = pooled_deviation([row.test for row in rows])
    others = [row for row in rows if row.gain and row.label != DEFAULT]
    if spread is None or not others:
        return found
    best = max(others, key=lambda row: abs(np.mean(row.gain)))
    difference = float(np.mean(best.gain))
    if spread > abs(difference):
        found.append(
            f"One training's mAP on test is spread over seeds by {spread:.3f} (standard "
            f"deviation), more than the largest difference from the default, {difference:+.3f} "
            f"({best.label}): seeds alone could make it. What helps: {_seeds(best.gain)}, more "
            "images in val and test, or more steps."
        )
    return found


def _seeds(gain: Sequence[float]) -> str:
    """How many seeds would make half of the mean gain's 95% interval as small as the gain."""
    mean, deviation = abs(np.mean(gain)), np.std(gain, ddof=1) if len(gain) > 1 else math.nan
    needed = math.ceil((1.96 * deviation / mean) ** 2) if mean and deviation > 0 else 0
    if len(gain) < needed <= _MOST_SEEDS:
        return f"more seeds (about {needed} would tell a difference of this size)"
    return "more seeds"
