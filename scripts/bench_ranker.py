"""What a ranker is worth, on the losses that finished runs of one detector have trained.

    python scripts/bench_ranker.py predict RUN [RUN...]    # does it foretell mAP?
    python scripts/bench_ranker.py choose RUN [RUN...]     # does it find the good ones soon?

``predict``: each loss that a run found is predicted from the losses of the rounds before its own,
as all their trainings measured them, later ones too; from earlier trainings alone (``--earlier``,
the benchmark's of that detector unless given); from both. A line a run: rank correlations of
predicted with measured mAP, of all losses and of those within 0.03 of the best. What was trained
was chosen by a model that knew less.

``choose``: searches are replayed on pools of 60 of the runs' losses, four known ones first, four
trainings a round. A training is the mean of a loss's trainings and fresh noise. Regret in
thousandths of mAP of the best loss that has trained, and the share of poor ones among the first 16
that were chosen, over ``--repetitions`` pools.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cse_autoloss.config import parse_config
from cse_autoloss.earlier import BENCHMARK, as_measured, read_earlier
from cse_autoloss.intervals import mean_interval
from cse_autoloss.journal import Candidate, Journal
from cse_autoloss.rankers import Measured, load_ranker
from cse_autoloss.rankers.base import FLOOR
from cse_autoloss.rankers.model import Model
from cse_autoloss.report import table
from cse_autoloss.screening.features import features
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.stages import Ladder

GOOD = 0.03  # mAP below the best
POOL, BATCH, LOOKS, NOISE = 60, 4, (8, 12, 16, 24), 0.0025
Spaces = dict[str, SearchSpace]
#: From what is known and the waiting losses' features, the next ones' places.
Rule = Callable[[Measured, np.ndarray, np.random.Generator], Sequence[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("predict", "choose"))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--earlier", nargs="+", default=[BENCHMARK])
    parser.add_argument("--repetitions", type=int, default=40)
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.runs]
    spaces = runs[0][0]
    with contextlib.closing(Journal.read(options.runs[0])) as journal:
        detector = parse_config(journal["config"]).detector.get("config")
    earlier = as_measured(read_earlier(options.earlier, spaces, detector=detector), spaces)
    if options.what == "predict":
        head = ["run", "losses", "own trainings", "earlier ones alone", "both"]
        rows = [
            [folder.name, *predict(trained, own, earlier)]
            for folder, (_, trained, own) in zip(options.runs, runs, strict=True)
        ]
    else:
        head = ["rule", "begins with", *(f"{look} trainings" for look in LOOKS), "poor"]
        rows = list(choose(runs, earlier, options.repetitions))
    print("\n".join(table(head, rows)))


def read_run(folder: Path) -> tuple[Spaces, list[Candidate], Measured]:
    """A run's spaces, and the losses that have trained, with what that came to."""
    journal = Journal.read(folder)
    config = parse_config(journal["config"])
    spaces = {branch: load_space(journal["spaces"][branch]) for branch in config.search.branches}
    stage = Ladder.of(config.stages).fitness
    trained = [c for c in journal.candidates() if journal.by_seed(c.id, stage)]
    rows = features([candidate.losses for candidate in trained], spaces)
    return spaces, trained, Measured.of(rows, [journal.by_seed(c.id, stage) for c in trained])


def predict(
    trained: Sequence[Candidate], own: Measured, earlier: Sequence[Measured]
) -> Iterator[str]:
    """How many losses, all and good, and the correlations of both from each of the three."""
    places, predicted = [], []
    for place, candidate in enumerate(trained):
        if candidate.known or not np.isfinite(own.features[place]).all():
            continue
        before = np.array([c.known or c.round < candidate.round for c in trained])
        known, nothing = _part(own, before), _part(own, before & False)
        sources = (known, replace(nothing, earlier=earlier), replace(known, earlier=earlier))
        places.append(place)
        predicted.append([_mean(source, own.features[place]) for source in sources])
    scores = own.scores[places]
    good = scores > scores.max(initial=0) - GOOD
    yield f"{len(scores)}, {good.sum()}"
    for column in np.array(predicted).reshape(-1, 3).T:
        ranks = (spearmanr(column[some], scores[some])[0] for some in (good | True, good))
        yield ", ".join(f"{rank:.2f}" for rank in ranks)


def _part(measured: Measured, rows: np.ndarray) -> Measured:
    return replace(
        measured,
        features=measured.features[rows],
        scores=measured.scores[rows],
        trainings=measured.trainings[rows],
    )


def _mean(known: Measured, row: np.ndarray) -> float:
    """mAP as the model sees it; NaN where it knows too little."""
    ranking = load_ranker("model").rank(row[None], known, np.random.default_rng(0))
    return float("nan") if ranking.mean is None else float(ranking.mean[0])


def choose(
    runs: Sequence[tuple[Spaces, list[Candidate], Measured]],
    earlier: Sequence[Measured],
    repetitions: int,
) -> Iterator[list[str]]:
    """A row for each rule, without and with earlier trainings."""
    pool: dict[tuple[str, ...], list[tuple[bool, np.ndarray, float]]] = {}
    for spaces, trained, own in runs:
        for candidate, row, score in zip(trained, own.features, own.scores, strict=True):
            if np.isfinite(row).all():
                key = tuple(candidate.losses.get(branch, "") for branch in spaces)
                pool.setdefault(key, []).append((candidate.known, row, float(score)))
    known = np.array([entries[0][0] for entries in pool.values()])
    rows = np.array([entries[0][1] for entries in pool.values()])
    truth = np.array([np.mean([score for _, _, score in entries]) for entries in pool.values()])
    rules: dict[str, Rule] = {"random": _random, "Thompson sampling": _thompson}
    rules |= {f"mean + {optimism:g} deviations": _bounds(optimism) for optimism in (0, 0.5, 1)}
    for name, rule in rules.items():
        for title, before in (("nothing", ()), ("earlier trainings", earlier)):
            if name == "random" and before:
                continue
            found = np.array(
                [_replay(rule, known, rows, truth, before, seed) for seed in range(repetitions)]
            )
            yield [
                *(name, title),
                *(mean_interval((1000 * column).tolist()).text(1) for column in found.T[:-1]),
                f"{found[:, -1].mean():.0%}",
            ]


def _replay(
    rule: Rule,
    known: np.ndarray,
    rows: np.ndarray,
    truth: np.ndarray,
    earlier: Sequence[Measured],
    seed: int,
) -> list[float]:
    """Regret at each look, and the share of poor losses."""
    rng = np.random.default_rng(seed)
    done = rng.permutation(np.flatnonzero(known))[:BATCH].tolist()
    others = rng.permutation(np.flatnonzero(~known))[:POOL].tolist()
    best = truth[done + others].max()
    seen = truth + NOISE * rng.normal(size=len(truth))
    while len(done) < LOOKS[-1]:
        waiting = [place for place in others if place not in done]
        ones = np.ones(len(done), int)
        measured = Measured(rows[done], seen[done], ones, earlier=earlier)
        done += [waiting[place] for place in rule(measured, rows[waiting], rng)]
    regret = best - np.maximum.accumulate(truth[done])
    poor = truth[done[BATCH : BATCH + 16]] < best - FLOOR
    return [*(regret[look - 1] for look in LOOKS), float(poor.mean())]


def _random(measured: Measured, rows: np.ndarray, rng: np.random.Generator) -> Sequence[int]:
    return rng.permutation(len(rows))[:BATCH].tolist()


def _bounds(optimism: float) -> Rule:
    def rule(measured: Measured, rows: np.ndarray, rng: np.random.Generator) -> Sequence[int]:
        return Model(optimism=optimism).rank(rows, measured, rng).order[:BATCH].tolist()

    return rule


def _thompson(measured: Measured, rows: np.ndarray, rng: np.random.Generator) -> Sequence[int]:
    """Each is the best of another truth that fits what was measured; a tenth is anybody."""
    process = Model()._fit(measured)
    if process is None:
        return _random(measured, rows, rng)
    chosen: list[int] = []
    for draw in process.belief(rows).draw(BATCH, rng):
        order = rng.permutation(len(rows)) if rng.random() < Model.explore else np.argsort(-draw)
        chosen.append(next(place for place in order.tolist() if place not in chosen))
    return chosen


if __name__ == "__main__":
    main()
