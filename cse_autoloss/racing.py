"""Seeds as rungs: losses earn trainings one by one, while it is open which is the best.

Top-two Thompson sampling (Russo, COLT 2016): a truth is drawn from what is believed; half the time
its best loss trains once more, else the best of another truth in which a different loss wins. So
trainings go to the leader and to whoever may still overtake it, and no number of seeds is fixed
beforehand. docs/strategies.md compares it with sequential halving, doubling against the incumbent,
and a fixed confirmation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from cse_autoloss.rankers.base import Belief

TRUTHS = 2000  # drawn to tell how likely a change of the leader is
HOPELESS = 4  # deviations below the leader: such a loss is not in the race


@dataclass(frozen=True)
class Decision:
    """What the race does next.

    Attributes:
        loss: index of the loss that trains next, or None where the race is over.
        leader: index of the best by what is believed now.
        open: probability that another loss is better than the leader by more than the margin.
        reason: why the race is over, in words, or None.
    """

    loss: int | None
    leader: int
    open: float
    reason: str | None = None


@dataclass(frozen=True)
class Race:
    """The rules.

    Attributes:
        margin: a lead of another loss that would not be worth a training, in mAP.
        risk: the race is over once another loss leads by more with a smaller probability.
        most: trainings of one loss, at most.
        share: of trainings that go to the race while there are losses that have not trained yet.
    """

    margin: float = 0.001
    risk: float = 0.05
    most: int = 10
    share: float = 0.33

    def __post_init__(self) -> None:
        for name in ("margin", "risk", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} should be in [0, 1], found {getattr(self, name)}")
        if self.most < 1:
            raise ValueError(f"most should be at least 1, found {self.most}")

    def rivals(self, belief: Belief) -> list[int]:
        """The losses that cannot be told from the leader: each is better by more than the margin
        with a probability of ``risk`` or more. The likeliest first."""
        leader = int(np.argmax(belief.mean))
        spread = belief.covariance.diagonal() + belief.covariance[leader, leader]
        deviation = np.sqrt(np.maximum(spread - 2 * belief.covariance[leader], 1e-18))
        chance = ndtr((belief.mean - belief.mean[leader] - self.margin) / deviation)
        return [i for i in np.argsort(-chance).tolist() if i != leader and chance[i] >= self.risk]

    def decide(
        self,
        belief: Belief,
        trainings: np.ndarray | Sequence[int],
        noise: float,
        rng: np.random.Generator,
        running: np.ndarray | Sequence[int] | None = None,
    ) -> Decision:
        """Which loss trains next.

        Args:
            belief: of the losses in the race (m of them, at least one), by finished trainings.
            trainings: (m,) finished trainings of each.
            noise: standard deviation of one training's mAP about its loss's mean.
            running: (m,) trainings under way; they count as what they will make certain.
        """
        leader = int(np.argmax(belief.mean))
        if len(belief.mean) == 1:
            return Decision(None, leader, 0.0, "one loss is left")
        able = np.flatnonzero(belief.mean + HOPELESS * belief.deviation >= belief.mean[leader])
        contest, first = belief.take(able), int(np.searchsorted(able, leader))
        truths = contest.draw(TRUTHS, rng)
        still_open = float((truths.max(axis=1) > truths[:, first] + self.margin).mean())
        if still_open < self.risk:
            return Decision(
                None,
                leader,
                still_open,
                f"no loss can still win: with a probability of {1 - still_open:.2f} none is better "
                f"than the leader by more than {self.margin:g} mAP",
            )
        under_way = np.zeros(len(able)) if running is None else np.asarray(running, float)[able]
        chances = np.bincount(
            after(contest, under_way, noise).draw(TRUTHS, rng).argmax(axis=1), minlength=len(able)
        )
        chances[np.asarray(trainings)[able] + under_way >= self.most] = 0
        if not chances.any():
            return Decision(
                None,
                leader,
                still_open,
                f"each loss that may win has trained {self.most} times; with a probability of "
                f"{still_open:.2f} another is better than the leader by more than "
                f"{self.margin:g} mAP",
            )
        chosen = rng.choice(len(able), p=chances / chances.sum())
        others = np.where(np.arange(len(able)) == chosen, 0, chances)
        if others.any() and rng.random() < 0.5:
            chosen = rng.choice(len(able), p=others / others.sum())
        return Decision(int(able[chosen]), leader, still_open)


def after(belief: Belief, running: np.ndarray, noise: float) -> Belief:
    """The belief as certain as it will be when the running trainings (m,) have finished, its mean
    left as it is (Desautels et al., JMLR 2014)."""
    some = np.flatnonzero(running)
    known = belief.covariance[:, some]
    gain = np.linalg.solve(
        belief.covariance[np.ix_(some, some)] + np.diag(noise**2 / running[some]), known.T
    )
    return Belief(belief.mean, belief.covariance - known @ gain)
