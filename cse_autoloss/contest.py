"""The race among the found losses that have trained: who leads, who trains once more, and whether
anything that has not trained could still win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from cse_autoloss.journal import Candidate, CandidateState
from cse_autoloss.racing import Race
from cse_autoloss.rankers import Belief, Measured, Ranking

EVIDENCE = 40  # losses that have trained, at least, before the search may end early
RACERS = 100  # the best of those that have trained, who can earn another training


@dataclass(frozen=True, eq=False)
class Evidence:
    """What trainings have said so far.

    Attributes:
        candidates: that have trained at the search's last stage.
        measured, belief: of these, in their order.
    """

    candidates: Sequence[Candidate]
    measured: Measured
    belief: Belief

    @property
    def estimates(self) -> dict[int, float]:
        """Candidate to the fitness that it is believed to have."""
        return {c.id: float(mean) for c, mean in zip(self.candidates, self.belief.mean)}


class Contest:
    """The race as it stands by the evidence; the best found losses take part.

    Args:
        race: its rules.
    """

    def __init__(self, evidence: Evidence, race: Race) -> None:
        self._evidence, self._race = evidence, race
        places = [
            int(place)
            for place in np.argsort(-evidence.belief.mean, kind="stable")
            if evidence.candidates[place].fitness is not None
            and not evidence.candidates[place].known
        ][:RACERS]
        self._candidates = [evidence.candidates[place] for place in places]  # best first
        self._belief = evidence.belief.take(np.array(places, int))
        self._trainings = evidence.measured.trainings[places]
        self._noise = evidence.measured.noise

    def standing(self) -> dict[str, Any] | None:
        """As ``proposals.Round`` has it; None before a found loss has trained."""
        if not self._candidates:
            return None
        rivals = self._race.rivals(self._belief)
        return {
            "leader": self._candidates[0].id,
            "mAP": float(self._belief.mean[0]),
            "deviation": float(self._belief.deviation[0]),
            "noise": self._noise,
            "rivals": [self._candidates[rival].id for rival in rivals],
            "raced": bool((self._trainings[[0, *rivals]] < self._race.most).any()),
            "trained": len(self._candidates),
        }

    def repeats(self, count: int, rng: np.random.Generator) -> tuple[list[int], str | None]:
        """Which found candidates train again, of so many trainings; and why the race is over, if it
        is."""
        if self._race.most == 1 or not self._candidates:
            return [], None
        running = np.array([c.state != CandidateState.SCORED for c in self._candidates], float)
        chosen: list[int] = []
        over = None
        for _ in range(count):
            if rng.random() >= self._race.share:
                continue
            decision = self._race.decide(self._belief, self._trainings, self._noise, rng, running)
            over = decision.reason or over
            if decision.loss is not None and not running[decision.loss]:
                running[decision.loss] = 1
                chosen.append(self._candidates[decision.loss].id)
        return chosen, over

    def hopeless(self, ranking: Ranking) -> str | None:
        """Why no candidate of a ranking is worth a training, by the rule of the race; None if one
        is, or nothing can be said."""
        if ranking.mean is None or ranking.deviation is None or not len(ranking.mean):
            return None
        if len(self._evidence.candidates) < EVIDENCE:
            return None
        # However sure the ranker is: of a loss that has not trained, no more is known than of one
        # that has trained once.
        deviation = np.maximum(ranking.deviation, self._noise)
        ahead = ranking.mean - self._evidence.belief.mean.max() - self._race.margin
        chance = float(np.nanmax(ndtr(ahead / deviation), initial=0.0))
        if chance >= self._race.risk:
            return None
        return (
            f"none of {len(ranking.mean):,} candidates that could train next is ahead of the best "
            "that has trained, known losses too, by that with a probability of more than "
            f"{chance:.2g}"
        )
