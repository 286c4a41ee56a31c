"""A round of proposals: what should train next, of offspring and of what earlier rounds have left.

    strategy.ask -> Branch.sift -> pair -> ranker.rank -> choose

What survives and is not chosen stays in the pool, with its features, for later rounds. A round
reads what it builds on from the journal and writes nothing: the search writes it down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cse_autoloss.branch import Branch, Sifted
from cse_autoloss.config import Config
from cse_autoloss.contest import Contest, Evidence
from cse_autoloss.earlier import as_measured
from cse_autoloss.journal import Journal, Survivor
from cse_autoloss.racing import Race
from cse_autoloss.rankers import Measured, Ranking, load_ranker, telling
from cse_autoloss.screening.features import KeptFeatures
from cse_autoloss.stages import Ladder
from cse_autoloss.strategies import FITTING, Member, load_strategy

MEASURED = 1000  # trained candidates that a ranker learns from
OFFERED = 6000  # kept survivors of a branch that are ranked in a round, which bounds its time


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
        branches: what became of each branch's offspring.
        proposals: in the order in which they should train.
        stopped: why no further training is worth its time, or None.
        standing: of the found losses that have trained: ``leader``'s id, its ``mAP`` and
            ``deviation`` by what is believed, ``noise`` of one training, ids of the ``rivals`` that
            cannot be told from it, whether one of these may train again (``raced``), and how many
            have ``trained``. None before the first.
    """

    number: int
    estimates: Mapping[int, float]
    repeats: Sequence[int] = ()
    branches: Mapping[str, Sifted] = field(default_factory=dict)
    proposals: Sequence[Proposal] = ()
    stopped: str | None = None
    standing: Mapping[str, Any] | None = None

    @property
    def survivors(self) -> list[Survivor]:
        """The new ones, in all branches."""
        return [survivor for sifted in self.branches.values() for survivor in sifted.survivors]


class Proposals:
    """Makes the rounds of one run, one after the other.

    Args:
        spaces: branch to the origin of its search space, for the branches that are searched.
        journal: read for what is known; a round builds on what stands there when it begins.
    """

    def __init__(self, config: Config, spaces: Mapping[str, str], journal: Journal) -> None:
        self._search, self._seed, self._journal = config.search, config.seed, journal
        ladder = Ladder.of(config.stages)
        self._fitness = ladder.fitness
        self._race = Race(**config.search.race, most=ladder.stages[ladder.fitness].seeds)
        self._strategy = load_strategy(config.search.strategy, config.search)
        self._ranker = load_ranker(config.search.ranker, config.search.ranker_settings)
        self._branches = {
            name: Branch(name, spaces[name], config, journal) for name in config.search.branches
        }
        searched = {name: branch.space for name, branch in self._branches.items()}
        self._earlier = as_measured(journal["earlier"] or [], searched)
        self._features = KeptFeatures(searched)
        self._pool: dict[int, Survivor] = {}
        self._keep(journal.survivors(chosen=False))
        self._last_id = journal.last_survivor

    def next_round(self, number: int, count: int) -> Round:
        """The round of this number: ``count`` trainings at most, of new candidates and of those
        that have earned another; with 0, only what is believed now."""
        rng = np.random.default_rng((self._seed, number))
        evidence = self._evidence(rng)
        contest = Contest(evidence, self._race)
        standing = contest.standing()
        if not count:
            return Round(number, evidence.estimates, standing=standing)
        population = self._population(evidence)
        size = self._search.offspring if self._search.screened else count
        sifted = {}
        for name, branch in self._branches.items():
            offspring = self._strategy.ask(population, name, branch.space, size, rng)
            sifted[name] = branch.sift(offspring, number, self._last_id + 1)
            self._keep(sifted[name].survivors)
            self._last_id += len(sifted[name].survivors)
        offers = self._offers(population, number, rng)
        features = self._features.of([offer.losses for offer in offers])
        ranking = self._ranker.rank(features, evidence.measured, rng)
        repeats, over = contest.repeats(count, rng)
        proposals = self._choose(offers, ranking, number, count - len(repeats))
        for proposal in proposals:
            for used in proposal.survivors:
                del self._pool[used]
        stopped = over and contest.hopeless(ranking)
        return Round(
            number=number,
            estimates=evidence.estimates,
            repeats=repeats,
            branches=sifted,
            proposals=proposals,
            stopped=f"{over}, and {stopped}" if stopped else None,
            standing=standing,
        )

    def _evidence(self, rng: np.random.Generator) -> Evidence:
        """What trainings have said; a failure says mAP 0."""
        scored = self._journal.measured()
        places = telling([mAP for _, mAP in scored], MEASURED, rng)
        candidates = [self._journal.candidate(n) for n in sorted(scored[p][0] for p in places)]
        measured = Measured.of(
            self._features.of([candidate.losses for candidate in candidates]),
            [self._journal.by_seed(candidate.id, self._fitness) for candidate in candidates],
            self._earlier,
        )
        return Evidence(candidates, measured, self._ranker.belief(measured))

    def _population(self, evidence: Evidence) -> Sequence[Member]:
        """Who has offspring; no failure has."""
        return self._strategy.population(
            [
                Member(candidate.id, candidate.losses, float(mean))
                for candidate, mean in zip(evidence.candidates, evidence.belief.mean)
                if candidate.fitness is not None
            ]
        )

    def _keep(self, survivors: Sequence[Survivor]) -> None:
        """Put survivors into the pool, from which proposals are made."""
        for survivor in survivors:
            self._pool[survivor.id] = survivor
            self._features.keep(survivor.branch, survivor.text, survivor.features)

    def _offers(
        self, population: Sequence[Member], number: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Candidates that could train next: new losses in one branch or in all, what is left from a
        parent; or two parents' crossed. None that was there before."""
        kept = {branch: self._offered(branch, number, rng) for branch in self._branches}
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
        for branch in self._branches:
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
        share = self._search.fitting * count
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


def _identity(prints: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(prints.items()))
