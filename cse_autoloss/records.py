"""What a run's journal holds, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cse_autoloss.trial import Trial, TrialResult

DEFAULT = "default"  # label of the trials of the detector's own losses
FOUND = "found"  # how the label begins of a candidate that the search did find
KNOWN = "known: "  # how the origin of a candidate begins that the search did not find itself
FUNNEL = ("generated", "unique", "verified", "optimised", "distinct")  # counted for each branch


class CandidateState:
    """Where a candidate stands at its stage."""

    WAITING = "waiting"
    TRAINING = "training"
    SCORED = "scored"
    DROPPED = "dropped"  # others of its batch were better, or it failed before the last stage
    FAILED = "failed"  # at the search's last stage


@dataclass(frozen=True, eq=False)
class Survivor:
    """A loss of one branch that passed the screening and is like none before.

    Attributes:
        parents: ids of the candidates that it was made from.
        features: (d,) float16, of its gradient field (``screening.features``).
    """

    id: int
    branch: str
    text: str
    fingerprint: str
    round: int
    operator: str
    parents: tuple[int, ...]
    features: np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A choice of losses on its way through the search.

    Attributes:
        parents: branch to the ids of the candidates that its loss comes from.
        predicted, deviation: mAP as the ranker saw it when it chose the candidate, or None.
        fitness: mean mAP on val at the search's last stage, over ``trainings`` of them in which a
            failure counts as 0.
        estimate: what the ranker believes of that, by all that is known; None before it was asked.
        closing: mean mAP at the last stage after the search that it took part in, or None.
    """

    id: int
    losses: Mapping[str, str]
    fingerprint: Mapping[str, str]
    origin: str
    parents: Mapping[str, Sequence[int]]
    round: int
    predicted: float | None
    deviation: float | None
    stage: str
    state: str
    reason: str | None
    fitness: float | None
    trainings: int
    estimate: float | None
    closing: float | None = None

    @property
    def known(self) -> bool:
        return self.origin.startswith(KNOWN)


def found_label(candidate: Candidate) -> str:
    """What a found candidate is called in tables."""
    return f"{FOUND} #{candidate.id}"


@dataclass(frozen=True)
class TrialRow:
    """A trial as it stands in the journal; ``result`` and ``seconds`` are None while it runs."""

    stage: str
    candidate: int | None
    label: str | None
    trial: Trial
    result: TrialResult | None
    started: float
    seconds: float | None
