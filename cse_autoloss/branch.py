"""One branch's side of a round: offspring in, survivors out.

screen -> simulate on predictions -> canonical form -> new gradients
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cse_autoloss.canonical import canonical
from cse_autoloss.config import Config
from cse_autoloss.expression import Expression
from cse_autoloss.journal import Journal, Survivor
from cse_autoloss.screening import Screener
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.features import branch_features
from cse_autoloss.screening.screener import ACCEPTED, BATCH_SIZE, DUPLICATE, ScreenReport
from cse_autoloss.simulation import Outcome, simulate_predictions
from cse_autoloss.space import load_space
from cse_autoloss.strategies import Offspring

#: An expression, what made it, and its parents' ids.
_Made = tuple[Expression, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class Sifted:
    """What became of a branch's offspring in a round.

    Attributes:
        counts: of ``journal.FUNNEL``.
        reasons: how many fell to which property, or to the simulation.
        seen: (n,) uint64 hashes of what was screened.
        survivors: those with gradients that none had before.
        rejected: (text, reason), where the run keeps these.
    """

    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    seen: np.ndarray
    survivors: Sequence[Survivor]
    rejected: Sequence[tuple[str, str]] = ()


class Branch:
    """What a run searches in one branch, and what has been there.

    Args:
        name: of the branch.
        origin: of its search space.
        journal: read for what has been screened, and what has survived.

    Attributes:
        space: what is searched.
    """

    def __init__(self, name: str, origin: str, config: Config, journal: Journal) -> None:
        self.space = load_space(origin)
        self._name, self._seed, self._search = name, config.seed, config.search
        self._screener = Screener(self.space, config.search.batch_size or BATCH_SIZE)
        self._screener.seen.add(journal.seen(name))
        known = [loss.expression for loss in self.space.losses.values()]
        self._fingerprints = set(fingerprint(known, self.space))
        self._fingerprints |= {
            gradients for branch, gradients in journal.survivor_fingerprints() if branch == name
        }

    def sift(self, offspring: Offspring, round_number: int, first_id: int) -> Sifted:
        """Judge a round's offspring.

        Args:
            first_id: of the survivors; the others' follow it.
        """
        if not self._search.screened:
            rows = range(len(offspring.population))
            made = [(offspring.population.expression(row), offspring.origin(row)) for row in rows]
            survivors = self._new(made, round_number, first_id)
            new = len(survivors)
            counts = Counter(generated=len(made), unique=new, verified=0, optimised=0, distinct=new)
            return Sifted(counts, Counter(), np.zeros(0, np.uint64), survivors)
        report = self._screener.screen(offspring.population)
        verified = report.survivors
        outcomes = simulate_predictions(verified, self.space, seed=self._seed)
        origins = [offspring.origin(int(row)) for row in np.flatnonzero(report.codes == ACCEPTED)]
        passed = sorted(
            (
                (canonical(expression, self.space), origin)
                for expression, origin, outcome in zip(verified, origins, outcomes)
                if outcome.passed
            ),
            key=lambda entry: entry[0].size,
        )
        survivors = self._new(passed, round_number, first_id)
        return Sifted(
            counts=Counter(
                generated=report.generated,
                unique=report.unique,
                verified=len(verified),
                optimised=len(passed),
                distinct=len(survivors),
            ),
            reasons=Counter(report.rejected) + Counter(simulation=len(verified) - len(passed)),
            seen=report.hashes[report.codes != DUPLICATE],
            survivors=survivors,
            rejected=_rejected(report, outcomes) if self._search.keep_rejected else (),
        )

    def _new(self, made: Sequence[_Made], round_number: int, first_id: int) -> list[Survivor]:
        """The expressions whose gradients none had before, of equals the first."""
        distinct: dict[str, _Made] = {}
        prints = fingerprint([expression for expression, _ in made], self.space)
        for gradients, entry in zip(prints, made):
            if gradients not in self._fingerprints:
                distinct.setdefault(gradients, entry)
        self._fingerprints.update(distinct)
        rows = branch_features([expression for expression, _ in distinct.values()], self.space)
        return [
            Survivor(
                id=number,
                branch=self._name,
                text=str(expression),
                fingerprint=gradients,
                round=round_number,
                operator=operator,
                parents=parents,
                features=row.astype(np.float16),
            )
            for number, ((gradients, (expression, (operator, parents))), row) in enumerate(
                zip(distinct.items(), rows), first_id
            )
        ]


def _rejected(report: ScreenReport, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    return report.fates() + [
        (str(expression), f"simulation: {outcome.reason}")
        for expression, outcome in zip(report.survivors, outcomes)
        if not outcome.passed
    ]
