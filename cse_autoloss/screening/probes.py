"""The probes of a search space: the sweeps that its losses are judged on.

What is swept is declared in the space's YAML under ``probes``; docs/screening.md says what each key
means.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cse_autoloss.screening.blocks import Block, Tolerances
from cse_autoloss.screening.box_probes import box_blocks
from cse_autoloss.screening.logit_probes import logit_blocks
from cse_autoloss.screening.probe_settings import ProbeSettings
from cse_autoloss.space import SearchSpace


@dataclass(frozen=True)
class Probes:
    """All that a space's candidates are judged on.

    Attributes:
        blocks: in the order in which they are judged, the cheapest first.
        tolerances: how far the properties may be missed on them.
    """

    blocks: tuple[Block, ...]
    tolerances: Tolerances

    @classmethod
    @functools.lru_cache(maxsize=32)  # boxes take 40 times as long to make as to judge a loss by
    def of(cls, space: SearchSpace) -> Probes:
        """Read the ``probes`` section of a space.

        Raises:
            SpaceError: one line that names the file, the key, and what would be right.
        """
        settings = ProbeSettings(space)
        boxes = space.inputs == "boxes"
        blocks = tuple((box_blocks if boxes else logit_blocks)(settings, space))
        tolerances = Tolerances(
            monotonicity=settings.tolerance("monotonicity"),
            rebound=settings.tolerance("rebound"),
            convergence=settings.tolerance("convergence"),
            fading=None if boxes else settings.tolerance("fading"),
        )
        settings.check_all_read()
        return cls(blocks, tolerances)
