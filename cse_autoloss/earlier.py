"""What was measured before a run, which its ranker begins with: other runs, and the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cse_autoloss.config import parse_config
from cse_autoloss.errors import UserError
from cse_autoloss.journal import Journal
from cse_autoloss.lossbench import FOLDER, TASKS, Origin, read_rows
from cse_autoloss.rankers import Measured, telling
from cse_autoloss.screening.features import features
from cse_autoloss.space import SearchSpace
from cse_autoloss.stages import Ladder
from cse_autoloss.trial import ConfigError

BENCHMARK = "lossbench"  # a source's name: the tabular benchmark
MOST = 500  # losses of one source that a ranker learns from, which bounds its time

#: A loss, branch to expression text, and its mAP by seed.
Trained = tuple[Mapping[str, str], Mapping[int, float]]


def read_earlier(
    sources: Sequence[str],
    spaces: Mapping[str, SearchSpace],
    data: str | None = None,
    detector: str | None = None,
) -> list[dict[str, Any]]:
    """Trainings of losses that a run could train itself, to be kept in its journal.

    Args:
        sources: folders of runs, and ``lossbench``.
        spaces: branch to its search space, for the branches that the run searches.
        data: digest of the run's data. What is good on one data set need not be on another, so of
            the benchmark only trainings on the same data are read; where None, all.
        detector: of the benchmark only this one's trainings are read, where it has some on this
            data; else those of all detectors.

    Returns:
        For each source that has any: its ``name``, and ``trained``, as ``Trained``.

    Raises:
        ConfigError: a folder holds no run, or one that has nothing to say of these spaces.
    """
    found: list[dict[str, Any]] = []
    for source in sources:
        if source == BENCHMARK:
            folders = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
            of = {name: _benchmark(name, data) for name in folders}
            own = of.get(detector or "", {})
            chosen = [own] if own else of.values()
            parts = {source: trained for some in chosen for source, trained in some.items()}
        else:
            parts = {source: _run(source)}
        for name, trained in parts.items():
            kept = [entry for entry in trained if _can_be_written(entry[0], spaces)]
            # Of another kind of detector, losses of boxes alone could be: no hint for a pair.
            missing = [
                space.name
                for branch, space in spaces.items()
                if not any(branch in losses for losses, _ in kept)
            ]
            if not missing:
                scores = [float(np.mean(list(by_seed.values()))) for _, by_seed in kept]
                places = telling(scores, MOST, np.random.default_rng(0))
                found.append({"name": name, "trained": [kept[place] for place in places]})
            elif source != BENCHMARK:
                raise ConfigError(
                    f"search.earlier: {source} trained no loss of {' or '.join(missing)}, which "
                    "this run searches"
                )
    return found


def told(kept: Sequence[Mapping[str, Any]]) -> str:
    """What ``read_earlier`` found, in a sentence."""
    sources = ", ".join(f"{len(source['trained'])} of {source['name']}" for source in kept)
    return f"The ranker begins with losses that trained before: {sources}"


def as_measured(
    kept: Sequence[Mapping[str, Any]], spaces: Mapping[str, SearchSpace]
) -> list[Measured]:
    """What ``read_earlier`` found, for a ranker."""
    return [
        Measured.of(
            features([losses for losses, _ in source["trained"]], spaces),
            [{int(seed): mAP for seed, mAP in scores.items()} for _, scores in source["trained"]],
        )
        for source in kept
    ]


def _benchmark(detector: str, data: str | None) -> dict[str, list[Trained]]:
    """A detector's losses: each warm-up, config and number of steps is a source of its own."""
    sources: dict[Origin, dict[str, tuple[Mapping[str, str], dict[int, float]]]] = {}
    for row in read_rows(FOLDER / detector / TASKS["head"]):
        if data not in (None, row.data):
            continue
        entry = sources.setdefault(row.origin, {}).setdefault(row.loss, (row.losses, {}))
        entry[1][row.seed] = row.val or 0.0
    return {
        f"{BENCHMARK}/{detector} ({number})": list(trained.values())
        for number, trained in enumerate(sources.values(), 1)
    }


def _run(folder: str) -> list[Trained]:
    try:
        journal = Journal.read(folder)
        stage = Ladder.of(parse_config(journal["config"]).stages).fitness
    except ConfigError as error:
        raise ConfigError(f"search.earlier: {error}") from None
    trained = [(c.losses, journal.by_seed(c.id, stage)) for c in journal.candidates()]
    journal.close()
    return [(losses, scores) for losses, scores in trained if scores]


def _can_be_written(losses: Mapping[str, str], spaces: Mapping[str, SearchSpace]) -> bool:
    """Whether a run could train these losses; the default's are other functions elsewhere."""
    try:
        return bool(losses) and all(
            spaces[branch].expression(text) for branch, text in losses.items()
        )
    except (KeyError, UserError):
        return False
