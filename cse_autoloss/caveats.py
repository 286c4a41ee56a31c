"""What a comparison cannot tell, said where it is printed: a default that has failed or hardly
learned, and differences that seeds alone could make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cse_autoloss.intervals import half_width, mean_interval
from cse_autoloss.journal import DEFAULT
from cse_autoloss.status import Compared

WEAK = 0.05  # mAP on test: a detector below it has learned too little for its loss to matter
_MOST_SEEDS = 200  # more are no advice


def caveats(rows: Sequence[Compared]) -> list[str]:
    """Sentences, each with what would help; none where there is nothing to warn of.

    A difference is a loss's mean gain on test over the default losses, seed by seed. Seeds alone
    could make it where its 95% interval holds 0; nothing is said of one seed, which has none.
    """
    found = []
    base = next((row for row in rows if row.label == DEFAULT), None)
    default = base.test if base else ()
    if base and base.failures:
        found.append(
            f"{len(base.failures)} of the default losses' trainings failed, and count as mAP 0: "
            "the gains over them are too high."
        )
    if default and np.mean(default) < WEAK:
        found.append(
            f"The default losses reach mAP {np.mean(default):.3f} on test, below {WEAK:g}: a "
            "detector that has hardly learned says little of its loss. What helps: more steps "
            "(detector.steps), a longer warm-up (detector.warmup_steps), larger images, or a "
            "proxy whose anchors fit the objects."
        )
    gains = [(row, mean_interval(row.gain)) for row in rows if len(row.gain) > 1]
    if not gains or any(abs(gain.mean) > gain.half for _, gain in gains):
        return found
    best, gain = max(gains, key=lambda entry: abs(entry[1].mean))
    found.append(
        f"The largest difference from the default on test, {gain.text(sign=True)} ({best.label}), "
        f"is one that seeds alone could make. What helps: {_seeds(best.gain)}, more images in val "
        "and test, or more steps."
    )
    return found


def _seeds(gain: Sequence[float]) -> str:
    """How many seeds would make half of the mean gain's 95% interval smaller than the gain."""
    mean, deviation = abs(np.mean(gain)), float(np.std(gain, ddof=1))
    for n in range(len(gain) + 1, _MOST_SEEDS + 1):
        if half_width(deviation, n) < mean:
            return f"more seeds (about {n} would tell a difference of this size)"
    return "more seeds"
