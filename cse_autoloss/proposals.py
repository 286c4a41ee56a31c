"""A round of proposals: offspring, screened, simulated on predictions, in canonical form, with new
gradients, in the order in which they should train.

    strategy.ask -> screen -> simulate -> canonical form -> new gradients -> pair -> ranker.rank

What survives and is not chosen stays in the pool, with its features, for later rounds. A round
reads what it builds on from the journal and writes nothing: the search writes it down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtr

from cse_autoloss.canonical import canonical
from cse_autoloss.config import Config
from cse_autoloss.earlier import as_measured
from cse_autoloss.expression import Expression
from cse_autoloss.journal import Candidate, CandidateState, Journal, Survivor
from cse_autoloss.racing import Race
from cse_autoloss.rankers import Belief, Measured, Ranking, load_ranker, telling
from cse_autoloss.screening import Screener
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.features import branch_features, with_defaults
from cse_autoloss.screening.screener import ACCEPTED, BATCH_SIZE, DUPLICATE, ScreenReport
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.strategies import FITTING, Member, Offspring, load_strategy

EVIDENCE = 40  # losses that have trained, at least, before the search may end early
RACERS = 100  # the best of those that have trained, who can earn another training
MEASURED = 1000  # trained candidates that a ranker learns from
OFFERED = 6000  # kept survivors of a branch that are ranked in a round, which bounds its time

#: An expression, what made it, and its parents' ids.
_Made = tuple[Expression, tuple[str, tuple[int, ...]]]
#: One branch's counts, reasons, hashes, survivors and rejected expressions (see ``Round``).
_Part = tuple[Counter, Counter, np.ndarray, list[Survivor], list[tuple[str, str]]]


@dataclass(frozen=True)
class Proposal:
    """A candidate to be.

    Attributes:
        losses, fingerprint: by branch.
        origin: what made it, in words.
        parents: branch to the ids of the candidates that its loss comes from.
        survivors: ids of the kept survivors that it uses.
        predicted, deviation: mAP by the ranker, or None where it does not predict.
    """

    losses: Mapping[str, str]
    fingerprint: Mapping[str, str]
    origin: str
    parents: Mapping[str, Sequence[int]]
    survivors: tuple[int, ...]
    predicted: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, eq=False)
class Round:
    """All that a round came to, to be written down in one step.

    Attributes:
        estimates: trained candidate to the fitness that the ranker believes it has.
        repeats: candidates that have earned another training.
        counts: branch to the counts of ``journal.FUNNEL``.
        reasons: branch to how many fell to which property, or to the simulation.
        seen: branch to the (n,) hashes of what was screened.
        survivors: the new ones, in all branches.
        proposals: in the order in which they should train.
        rejected: branch to (text, reason), where the run keeps these.
        stopped: why no further training is worth its time, or None.
        standing: of the found losses that have trained: ``leader``'s id, its ``mAP`` and
            ``deviation`` by what is believed, ``noise`` of one training, ids of the ``rivals`` that
            cannot be told from it, whether one of these may train again (``raced``), and how many
            have ``trained``. None before the first.
    """

    number: int
    estimates: Mapping[int, float]
    repeats: Sequence[int]
    counts: Mapping[str, Mapping[str, int]]
    reasons: Mapping[str, Mapping[str, int]]
    seen: Mapping[str, np.ndarray]
    survivors: Sequence[Survivor]
    proposals: Sequence[Proposal]
    rejected: Mapping[str, Sequence[tuple[str, str]]]
    stopped: str | None = None
    standing: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class _Known:
    """What trainings have said so far.

    Attributes:
        candidates: that have trained at the search's last stage.
        measured, belief: of these, in their order.
        population: those that have offspring.
    """

    candidates: Sequence[Candidate]
    measured: Measured
    belief: Belief
    population: Sequence[Member]

    @property
    def estimates(self) -> dict[int, float]:
        return {c.id: float(mean) for c, mean in zip(self.candidates, self.belief.mean)}


class Proposals:
    """Makes the rounds of one run, one after the other.

    Args:
        spaces: branch to the origin of its search space, for the branches that are searched.
        journal: read for what is known; a round builds on what stands there when it begins.
    """

    def __init__(self, config: Config, spaces: Mapping[str, str], journal: Journal) -> None:
        self._config, self._journal = config, journal
        self._spaces = {branch: load_space(spaces[branch]) for branch in config.search.branches}
        self._ladder = Ladder.of(config.stages)
        rules: dict[str, Any] = {str(key): value for key, value in config.search.race.items()}
        self._race_rules = Race(**rules)
        self._strategy = load_strategy(config.search.strategy, config.search)
        self._ranker = load_ranker(config.search.ranker, config.search.ranker_settings)
        self._screeners = {
            branch: Screener(space, config.search.batch_size or BATCH_SIZE)
            for branch, space in self._spaces.items()
        }
        self._known: dict[str, set[str]] = {
            branch: set(fingerprint([loss.expression for loss in space.losses.values()], space))
            for branch, space in self._spaces.items()
        }
        self._earlier = as_measured(journal["earlier"] or [], self._spaces)
        for branch, screener in self._screeners.items():
            screener.seen.add(journal.seen(branch))
        for branch, gradients in journal.survivor_fingerprints():
            self._known[branch].add(gradients)
        self._pool = {survivor.id: survivor for survivor in journal.survivors(chosen=False)}
        self._last_id = journal.last_survivor
        self._features: dict[tuple[str, str], np.ndarray] = {}  # of losses of candidates

    def next_round(self, number: int, count: int) -> Round:
        """The round of this number: ``count`` trainings at most, of new candidates and of those
        that have earned another; with 0, only what is believed now."""
        rng = np.random.default_rng((self._config.seed, number))
        known = self._known_so_far(rng)
        standing = self._standing(known)
        if not count:
            return Round(number, known.estimates, (), {}, {}, {}, (), (), {}, standing=standing)
        branches = list(self._spaces)
        search = self._config.search
        make, size = (
            (self._screen, search.offspring) if search.screened else (self._take_all, count)
        )
        parts = []
        for branch, space in self._spaces.items():
            offspring = self._strategy.ask(known.population, branch, space, size, rng)
            parts.append(make(branch, offspring, number))
        counts, reasons, seen, fresh, rejected = (dict(zip(branches, part)) for part in zip(*parts))
        new = [survivor for survivors in fresh.values() for survivor in survivors]
        self._pool |= {survivor.id: survivor for survivor in new}
        offers = self._offers(known.population, number, rng)
        ranking = self._ranker.rank(self._features_of_offers(offers), known.measured, rng)
        repeats, over = self._race(known, count, rng)
        proposals = self._choose(offers, ranking, number, count - len(repeats))
        stopped = over and self._hopeless(known, ranking)
        for proposal in proposals:
            for used in proposal.survivors:
                del self._pool[used]
        return Round(
            *(number, known.estimates, repeats, counts, reasons, seen, new, proposals, rejected),
            f"{over}, and {stopped}" if stopped else None,
            standing,
        )

    def _known_so_far(self, rng: np.random.Generator) -> _Known:
        """What trainings have said; a failure says mAP 0, and has no offspring."""
        scored = self._journal.measured()
        places = telling([mAP for _, mAP in scored], MEASURED, rng)
        candidates = [self._journal.candidate(n) for n in sorted(scored[p][0] for p in places)]
        measured = Measured.of(
            self._features_of([candidate.losses for candidate in candidates]),
            [self._journal.by_seed(c.id, self._ladder.fitness) for c in candidates],
            self._earlier,
        )
        belief = self._ranker.belief(measured)
        members = [
            Member(candidate.id, candidate.losses, float(mean))
            for candidate, mean in zip(candidates, belief.mean)
            if candidate.fitness is not None
        ]
        return _Known(candidates, measured, belief, self._strategy.population(members))

    @staticmethod
    def _racing(known: _Known) -> list[int]:
        """Places of the best found losses, best first, by what is believed."""
        return [
            int(place)
            for place in np.argsort(-known.belief.mean, kind="stable")
            if known.candidates[place].fitness is not None and not known.candidates[place].known
        ][:RACERS]

    def _standing(self, known: _Known) -> dict[str, Any] | None:
        racing = self._racing(known)
        if not racing:
            return None
        belief = known.belief.take(np.array(racing))
        ids = [known.candidates[place].id for place in racing]
        rivals = self._race_rules.rivals(belief)
        trainings = known.measured.trainings[racing]
        return {
            "leader": ids[0],
            "mAP": float(belief.mean[0]),
            "deviation": float(belief.deviation[0]),
            "noise": known.measured.noise,
            "rivals": [ids[rival] for rival in rivals],
            "raced": bool(
                (trainings[[0, *rivals]] < self._ladder.stages[self._ladder.fitness].seeds).any()
            ),
            "trained": len(racing),
        }

    def _race(
        self, known: _Known, count: int, rng: np.random.Generator
    ) -> tuple[list[int], str | None]:
        """Which found candidates train again, of so many trainings; and why the race is over, if it
        is."""
        racing = self._racing(known)
        most = self._ladder.stages[self._ladder.fitness].seeds
        if most == 1 or not racing:
            return [], None
        race = replace(self._race_rules, most=most)
        belief = known.belief.take(np.array(racing))
        busy = [known.candidates[place].state != CandidateState.SCORED for place in racing]
        running = np.array(busy, float)
        trainings = known.measured.trainings[racing].tolist()
        chosen: list[int] = []
        over = None
        for _ in range(count):
            if rng.random() >= race.share:
                continue
            decision = race.decide(belief, trainings, known.measured.noise, rng, running.tolist())
            over = decision.reason or over
            if decision.loss is not None and not running[decision.loss]:
                running[decision.loss] = 1
                chosen.append(known.candidates[racing[decision.loss]].id)
        return chosen, over

    def _hopeless(self, known: _Known, ranking: Ranking) -> str | None:
        """Why no kept survivor is worth a training, by the rule of the race; None if one is, or
        nothing can be said."""
        if ranking.mean is None or ranking.deviation is None or not len(ranking.mean):
            return None
        if len(known.candidates) < EVIDENCE:
            return None
        race = self._race_rules
        # However sure the ranker is: of a loss that has not trained, no more is known than of one
        # that has trained once.
        deviation = np.maximum(ranking.deviation, known.measured.noise)
        ahead = (ranking.mean - known.belief.mean.max() - race.margin) / deviation
        chance = float(np.nanmax(ndtr(ahead), initial=0.0))
        if chance >= race.risk:
            return None
        return (
            f"none of {len(ranking.mean):,} candidates that could train next is ahead of it by "
            f"that with a probability of more than {chance:.2g}"
        )

    def _take_all(self, branch: str, offspring: Offspring, number: int) -> _Part:
        """As ``_screen``, of a search without screening."""
        made = [
            (offspring.population.expression(row), offspring.origin(row))
            for row in range(len(offspring.population))
        ]
        survivors = self._keep(branch, made, number)
        new = len(survivors)
        counts = Counter(generated=len(made), unique=new, verified=0, optimised=0, distinct=new)
        return counts, Counter(), np.zeros(0, np.uint64), survivors, []

    def _screen(self, branch: str, offspring: Offspring, number: int) -> _Part:
        """What a branch's offspring add to a round."""
        space = self._spaces[branch]
        report = self._screeners[branch].screen(offspring.population)
        verified = report.survivors
        outcomes = simulate_predictions(verified, space, seed=self._config.seed)
        origins = [offspring.origin(int(row)) for row in np.flatnonzero(report.codes == ACCEPTED)]
        passed = sorted(
            (
                (canonical(expression, space), origin)
                for expression, origin, outcome in zip(verified, origins, outcomes)
                if outcome.passed
            ),
            key=lambda entry: entry[0].size,
        )
        survivors = self._keep(branch, passed, number)
        counts = Counter(
            generated=report.generated,
            unique=report.unique,
            verified=len(verified),
            optimised=len(passed),
            distinct=len(survivors),
        )
        reasons = Counter(report.rejected) + Counter(simulation=len(verified) - len(passed))
        rejected = self._rejected(report, outcomes) if self._config.search.keep_rejected else []
        return counts, reasons, report.hashes[report.codes != DUPLICATE], survivors, rejected

    def _keep(self, branch: str, made: Sequence[_Made], number: int) -> list[Survivor]:
        """Survivors: the expressions whose gradients none had before, of equals the first."""
        space = self._spaces[branch]
        distinct: dict[str, _Made] = {}
        prints = fingerprint([expression for expression, _ in made], space)
        for gradients, entry in zip(prints, made):
            if gradients not in self._known[branch]:
                distinct.setdefault(gradients, entry)
        self._known[branch].update(distinct)
        rows = branch_features([expression for expression, _ in distinct.values()], space)
        survivors = [
            Survivor(
                *(self._last_id + place, branch, str(expression), gradients, number),
                *(operator, parents, features.astype(np.float16)),
            )
            for place, ((gradients, (expression, (operator, parents))), features) in enumerate(
                zip(distinct.items(), rows), 1
            )
        ]
        self._last_id += len(survivors)
        return survivors

    @staticmethod
    def _rejected(report: ScreenReport, outcomes: Sequence) -> list[tuple[str, str]]:
        return report.fates() + [
            (str(expression), f"simulation: {outcome.reason}")
            for expression, outcome in zip(report.survivors, outcomes)
            if not outcome.passed
        ]

    def _offers(
        self, population: Sequence[Member], number: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Candidates that could train next: new losses in one branch or in all, what is left from a
        parent; or two parents' crossed. None that was there before."""
        kept = {branch: self._offered(branch, number, rng) for branch in self._spaces}
        new = [{branch: survivor} for branch, some in kept.items() for survivor in some]
        most = max(map(len, kept.values()))
        if len(kept) > 1:
            new += [dict(zip(kept, pair)) for pair in zip(*kept.values())]
            new += [{}] * min(most, len(population) ** 2) * (len(population) > 1)
        # Each branch's parent is drawn anew.
        partners = {b: self._strategy.partners(population, len(new), rng) for b in kept}
        prints = {
            member.id: self._journal.candidate(member.id).fingerprint for member in population
        }
        there = {_identity(found) for found in self._journal.fingerprints()}
        offers = []
        for place, survivors in enumerate(new):
            parents = {
                branch: members[place]
                for branch, members in partners.items()
                if branch not in survivors and members and branch in members[place].losses
            }
            offer = self._offer(survivors, parents, prints)
            identity = _identity(offer.fingerprint)
            if offer.losses and identity not in there:
                there.add(identity)
                offers.append(offer)
        return offers

    def _offered(self, branch: str, number: int, rng: np.random.Generator) -> list[Survivor]:
        """A branch's kept survivors, the newest first: all of this round and a draw of the others,
        each round's shuffled."""
        kept = [survivor for survivor in self._pool.values() if survivor.branch == branch]
        shuffled = [kept[place] for place in rng.permutation(len(kept))]
        old = [survivor for survivor in shuffled if survivor.round < number]
        new = [survivor for survivor in shuffled if survivor.round == number]
        return new + sorted(old[:OFFERED], key=lambda survivor: -survivor.round)

    def _offer(
        self,
        survivors: Mapping[str, Survivor],
        parents: Mapping[str, Member],
        prints: Mapping[int, Mapping[str, str]],
    ) -> Proposal:
        losses, fingerprints, origins = {}, {}, {}
        for branch in self._spaces:
            if branch in survivors:
                survivor = survivors[branch]
                losses[branch], fingerprints[branch] = survivor.text, survivor.fingerprint
                origins[branch] = survivor.parents
            elif branch in parents:
                parent = parents[branch]
                losses[branch] = parent.losses[branch]
                fingerprints[branch] = prints[parent.id][branch]
                origins[branch] = (parent.id,)
        made_by = dict.fromkeys(survivor.operator for survivor in survivors.values())
        ids = tuple(survivor.id for survivor in survivors.values())
        return Proposal(losses, fingerprints, " + ".join(made_by) or "pairing", origins, ids)

    def _choose(
        self,
        offers: Sequence[Proposal],
        ranking: Ranking,
        number: int,
        count: int,
    ) -> list[Proposal]:
        """The first of the ranker's order, none of which share a survivor; and before them, in the
        share that the run has for these, the first that have a leader's loss with other numbers."""
        order = ranking.order
        if ranking.mean is None:  # nothing is known of any: the newest first, from better parents
            rounds = [
                min((self._pool[used].round for used in offer.survivors), default=number)
                for offer in offers
            ]
            order = order[np.argsort(-np.array(rounds, int)[order], kind="stable")]
        share = self._config.search.fitting * count
        reserved = math.floor(number * share) - math.floor((number - 1) * share)
        order = order[: len(offers)]
        fitted = [place for place in order if FITTING in offers[place].origin.split(" + ")]
        chosen: list[Proposal] = []
        used: set[int] = set()
        for place in dict.fromkeys([*fitted[:reserved], *order]):
            if len(chosen) == count:
                break
            offer = offers[place]
            if used.isdisjoint(offer.survivors):
                used.update(offer.survivors)
                predicted, deviation = (
                    None if values is None or np.isnan(values[place]) else float(values[place])
                    for values in (ranking.mean, ranking.deviation)
                )
                chosen.append(replace(offer, predicted=predicted, deviation=deviation))
        return chosen

    # --- features ---

    def _features_of_offers(self, offers: Sequence[Proposal]) -> np.ndarray:
        for offer in offers:
            for number in offer.survivors:
                survivor = self._pool[number]
                self._features[survivor.branch, survivor.text] = survivor.features
        return self._features_of([offer.losses for offer in offers])

    def _features_of(self, losses: Sequence[Mapping[str, str]]) -> np.ndarray:
        """(n, d) float32, as ``screening.features.features`` has them, from what is kept."""
        columns, losses = [], with_defaults(losses, self._spaces)
        for branch, space in self._spaces.items():
            texts = {entry[branch] for entry in losses if branch in entry}
            missing = sorted(text for text in texts if (branch, text) not in self._features)
            rows = branch_features([Expression.parse(text, space) for text in missing], space)
            for text, row in zip(missing, rows.astype(np.float16)):
                self._features[branch, text] = row
            width = rows.shape[1]
            table = np.zeros((len(losses), width), np.float32)
            for place, entry in enumerate(losses):
                if branch in entry:
                    table[place] = self._features[branch, entry[branch]]
            columns.append(table)
        return np.concatenate(columns, axis=1)


def _identity(prints: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(prints.items()))
