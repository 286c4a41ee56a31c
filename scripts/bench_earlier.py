"""What earlier trainings are worth to a ranker: a finished run's losses, predicted again in the
order in which they trained.

    python scripts/bench_earlier.py RUN [RUN...] [--earlier lossbench]

Each loss that a run found is predicted from what the run had measured before the loss's round; from
the earlier trainings alone; and from both. What the run trained was chosen by a model that knew the
first alone. Prints a line a run: rank correlations of predicted with measured mAP, of all losses
and of those within 0.03 of the best.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cse_autoloss.config import parse_config
from cse_autoloss.earlier import BENCHMARK, as_measured, read_earlier
from cse_autoloss.journal import Journal
from cse_autoloss.rankers import Measured, load_ranker
from cse_autoloss.report import table
from cse_autoloss.screening.features import features
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder

GOOD = 0.03  # mAP below the best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--earlier", nargs="+", default=[BENCHMARK])
    options = parser.parse_args()
    head = ["run", "losses", "own trainings", "earlier ones alone", "both"]
    print("\n".join(table(head, [line(run, options.earlier) for run in options.runs])))


def line(run: Path, sources: Sequence[str]) -> list[str]:
    """All and good losses' correlations, from each of the three."""
    journal = Journal.read(run)
    config = parse_config(journal["config"])
    spaces = {branch: load_space(journal["spaces"][branch]) for branch in config.search.branches}
    earlier = as_measured(read_earlier(sources, spaces), spaces)
    stage = Ladder.of(config.stages).fitness
    trained = [c for c in journal.candidates() if journal.by_seed(c.id, stage)]
    own = Measured.of(
        features([candidate.losses for candidate in trained], spaces),
        [journal.by_seed(candidate.id, stage) for candidate in trained],
    )
    places, predicted = [], []
    for place, candidate in enumerate(trained):
        if candidate.known or not np.isfinite(own.features[place]).all():
            continue
        before = np.array([c.known or c.round < candidate.round for c in trained])
        known = Measured(own.features[before], own.scores[before], own.trainings[before], own.noise)
        nothing = Measured(own.features[:0], own.scores[:0], own.trainings[:0], own.noise, earlier)
        both = Measured(known.features, known.scores, known.trainings, own.noise, earlier)
        places.append(place)
        predicted.append([_mean(what, own.features[place]) for what in (known, nothing, both)])
    if not places:
        return [run.name, "0", "", "", ""]
    scores = own.scores[places]
    good = scores > scores.max() - GOOD
    cells = [
        f"{spearmanr(column, scores)[0]:.2f}, {spearmanr(column[good], scores[good])[0]:.2f}"
        for column in np.array(predicted).T
    ]
    return [run.name, f"{len(scores)}, {good.sum()}", *cells]


def _mean(known: Measured, row: np.ndarray) -> float:
    """mAP as the model sees it; NaN where it knows too little."""
    ranking = load_ranker("model").rank(row[None], known, np.random.default_rng(0))
    return float("nan") if ranking.mean is None else float(ranking.mean[0])


if __name__ == "__main__":
    main()
