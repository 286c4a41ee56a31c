"""The tabular benchmark of loss search: losses that were trained once, so that what learns from
trainings can be tried without any.

docs/lossbench holds, for each detector, its losses and a row for every training; docs/lossbench.md
says how they were made. ``load`` reads the rows, ``table`` puts them side by side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cse_autoloss.errors import UserError
from cse_autoloss.intervals import pooled_deviation

FOLDER = Path(__file__).parent / "benchmark"  # docs/lossbench leads there
TASKS = {"head": "heads.jsonl", "full": "full.jsonl"}
# Detector, task, steps, digests of the warm-up and the config
Origin = tuple[str, str, int, str, str]


@dataclass(frozen=True)
class Loss:
    """A loss of the benchmark.

    Attributes:
        name: ``default``, a known loss's, or ``sampled-`` and a number.
        losses: branch to expression text; an absent branch keeps the detector's default.
    """

    name: str
    losses: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        loss, losses: its name and its expressions.
        detector: the config.
        task: ``head`` or ``full``, as in :class:`cse_autoloss.trial.Trial`.
        seed, steps: of the training.
        val, test: COCO AP in [0, 1] on each split; None where the training failed.
        failure: why, or None.
        cpu_seconds: of the training and both measurements.
        scale: branch to strength, as in ``Trial``.
        weights, config, data: digests of the warm-up, the config and the data.
        versions: of the packages that the numbers depend on.
        views: of heads: ``"<split>/mAP <view>"`` to mAP on images as they are, and in each flip;
            ``val`` and ``test`` are the means.
        device: what it trained on.
        precision: of a head's matrix products; empty for whole detectors, and in older rows.
    """

    loss: str
    losses: Mapping[str, str]
    detector: str
    task: str
    seed: int
    steps: int
    val: float | None
    test: float | None
    failure: str | None
    cpu_seconds: float
    scale: Mapping[str, float]
    weights: str
    config: str
    data: str
    versions: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    precision: str = ""

    @property
    def origin(self) -> Origin:
        """What it was measured with; rows of two origins are not compared."""
        return self.detector, self.task, self.steps, self.weights, self.config

    @property
    def key(self) -> tuple[str, int, Origin]:
        """What no two rows share."""
        return self.loss, self.seed, self.origin

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Table:
    """Trainings side by side: a row a loss, a column a seed, NaN where there is no training.

    Attributes:
        names, losses: of the rows.
        seeds: of the columns.
        val, test: (losses, seeds) mAP; 0 for a training that failed.
    """

    names: tuple[str, ...]
    losses: tuple[Mapping[str, str], ...]
    seeds: tuple[int, ...]
    val: np.ndarray
    test: np.ndarray


def load(detector: str, task: str = "head", folder: Path = FOLDER) -> list[Row]:
    """The trainings of a detector.

    Args:
        task: ``head`` or ``full``.

    Raises:
        UserError: there are none; names what there is.
    """
    path = folder / detector / TASKS[task]
    if not path.is_file():
        there = sorted(str(found.parent.name) for found in folder.glob(f"*/{TASKS[task]}"))
        raise UserError(
            f"lossbench: no {task} trainings of {detector!r} under {folder}; "
            f"there are those of {', '.join(there) or 'none'}"
        )
    return read_rows(path)


def of_one_origin(rows: Sequence[Row]) -> list[Row]:
    """Those of the origin that most are of."""
    ((origin, _),) = Counter(row.origin for row in rows).most_common(1)
    return [row for row in rows if row.origin == origin]


def table(rows: Iterable[Row]) -> Table:
    """Rows of one origin, side by side.

    Raises:
        UserError: they are of several; choose by ``row.origin``.
    """
    rows = list(rows)
    origins = {row.origin for row in rows}
    if len(origins) > 1:
        raise UserError(f"lossbench: rows of {len(origins)} instruments in one table: {origins}")
    losses = {row.loss: row.losses for row in rows}
    names, seeds = list(losses), sorted({row.seed for row in rows})
    val, test = (np.full((len(names), len(seeds)), np.nan) for _ in range(2))
    for row in rows:
        place = names.index(row.loss), seeds.index(row.seed)
        val[place], test[place] = row.val or 0.0, row.test or 0.0
    return Table(tuple(names), tuple(losses.values()), tuple(seeds), val, test)


@dataclass(frozen=True)
class Reliability:
    """How well one training tells losses apart.

    Attributes:
        losses, seeds: how many.
        between, within: standard deviations of mAP: of losses' true means; of one training about
            its loss's mean, what a seed does to all losses apart.
        reliability: between-loss variance over total, of one training; the intraclass correlation
            ICC(3,1) of Shrout and Fleiss (1979). What two seeds' scores correlate with, expected.
    """

    losses: int
    seeds: int
    between: float
    within: float
    reliability: float


def reliability(scores: np.ndarray) -> Reliability:
    """From (losses, seeds) mAP without gaps: two-way analysis of variance, losses and seeds.

    Raises:
        ValueError: fewer than two losses or seeds.
    """
    losses, seeds = scores.shape
    if losses < 2 or seeds < 2:
        raise ValueError(f"reliability takes two losses and seeds, found {losses} and {seeds}")
    means = scores.mean(axis=1, keepdims=True)
    rest = scores - means - scores.mean(axis=0, keepdims=True) + scores.mean()
    noise = float((rest**2).sum() / ((losses - 1) * (seeds - 1)))
    signal = max(0.0, float(means.var(ddof=1)) - noise / seeds)
    total = signal + noise
    return Reliability(*(losses, seeds, signal**0.5, noise**0.5), signal / total if total else 0.0)


@dataclass(frozen=True)
class Agreement:
    """How well cheap trainings foretell dear ones.

    Attributes:
        losses: that both have trained.
        spearman: rank correlation of the means; NaN where one side's are all the same.
        pairs, right: pairs of losses that the dear ones tell apart, and the share of them that the
            cheap ones put in the same order; NaN without any.
    """

    losses: int
    spearman: float
    pairs: int
    right: float


def agreement(scores: np.ndarray, truth: np.ndarray) -> Agreement:
    """Of the same losses, (losses, seeds) mAP of each; NaN where there is no training.

    Two losses are told apart where their means differ by more than two standard errors, with the
    truth's deviation within losses pooled over them.
    """
    noise = pooled_deviation([row[~np.isnan(row)].tolist() for row in truth])
    if noise is None:
        raise ValueError("no loss of the truth has two trainings")
    means, trainings = np.nanmean(truth, axis=1), (~np.isnan(truth)).sum(axis=1)
    cheap = np.nanmean(scores, axis=1)
    first, second = np.triu_indices(len(means), 1)
    apart = means[first] - means[second]
    error = noise * np.sqrt(1 / trainings[first] + 1 / trainings[second])
    told = np.abs(apart) > 2 * error
    same = np.sign(cheap[first] - cheap[second])[told] == np.sign(apart)[told]
    varied = np.ptp(cheap) > 0 and np.ptp(means) > 0
    rank = float(stats.spearmanr(cheap, means).statistic) if varied else np.nan
    return Agreement(len(means), rank, int(told.sum()), float(same.mean()) if len(same) else np.nan)


def read_losses(path: Path) -> list[Loss]:
    """A file of losses, one a line."""
    return [Loss(**line) for line in _lines(path)]


def read_rows(path: Path) -> list[Row]:
    """A file of trainings, one a line; none where there is no file."""
    return [Row(**line) for line in _lines(path)] if path.is_file() else []


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
