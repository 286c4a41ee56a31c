"""How well a task's trainings tell losses apart, and at what price.

    python scripts/make_lossbench.py sample fcos_proxy --count 30
    python scripts/make_lossbench.py train fcos_proxy --seeds 0 1
    python scripts/bench_instrument.py fcos_proxy faster_rcnn_proxy

Reads the rows that make_lossbench.py wrote, of whichever detector, data, task and steps, and prints
a line for each instrument: CPU seconds of a training, the default's mAP, and over the sound losses,
those not far below the default, the correlation of seed 0 with seed 1, the deviation between losses
and within one, the reliability of one training and how much of it a CPU second buys. Where the
detector has full trainings on the same warm-up, too, a second table says how well heads foretell
them: the heads' mAP on the split asked for, beside the whole detectors' on test.
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from cse_autoloss.errors import UserError
from cse_autoloss.lossbench import (
    FOLDER,
    TASKS,
    Row,
    Table,
    agreement,
    read_rows,
    reliability,
    table,
)
from cse_autoloss.report import table as markdown

SOUND = 0.02  # mAP: what is no further below the default
RESAMPLED = 1000
_origin = operator.attrgetter("origin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("detectors", nargs="+")
    parser.add_argument("--folder", type=Path, nargs="+", default=[FOLDER], help="read together")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    options = parser.parse_args()
    lines: list[list[str]] = []
    agreements: list[list[str]] = []
    for detector in options.detectors:
        tables = list(_tables(detector, options.folder))
        lines += [_line(*one, options.split) for one in tables]
        agreements += _agreements(tables, options.split)
    head = ["detector", "task, steps", "warm-up", "CPU s", "default", "sound losses"]
    head += ["seed 0 with 1", "between / within", "reliability (95%)", "per CPU s"]
    print("\n".join(markdown(head, lines)))
    if agreements:
        head = ["detector", "losses", "trainings each", "Spearman (95%)", "pairs told apart"]
        head += ["right sign"]
        print("\n" + "\n".join(markdown(head, agreements)))


def _tables(detector: str, folders: Sequence[Path]) -> Iterator[tuple[list[Row], Table]]:
    """A detector's rows by instrument: task, steps, warm-up, config."""
    for task in ("head", "full"):
        rows = [row for folder in folders for row in read_rows(folder / detector / TASKS[task])]
        if task == "head" and not rows:
            raise UserError(f"lossbench: no heads of {detector} in {', '.join(map(str, folders))}")
        for _, some in groupby(sorted(rows, key=_origin), key=_origin):
            found = list(some)
            yield found, table(found)


def _line(rows: Sequence[Row], trained: Table, split: str) -> list[str]:
    scores = getattr(trained, split)
    there = ~np.isnan(scores)
    scores = scores[:, there.sum(axis=0) > len(scores) / 2]  # not a seed that few have
    default = np.nanmean(getattr(trained, split)[trained.names.index("default")])
    scores = scores[~np.isnan(scores).any(axis=1)]
    sound = scores[scores.mean(axis=1) > default - SOUND]
    seconds = float(np.median([row.cpu_seconds for row in rows if not row.failure]))
    line = [
        *(rows[0].detector, f"{rows[0].task}, {rows[0].steps}", rows[0].weights[:6]),
        *(f"{seconds:.1f}", f"{default:.3f}", str(len(sound))),
    ]
    if min(sound.shape) < 2:
        return [*line, *[""] * 4]
    found = reliability(sound)
    low, high = _interval(lambda one: reliability(sound[one]).reliability, len(sound))
    return [
        *line,
        f"{np.corrcoef(sound[:, 0], sound[:, 1])[0, 1]:.2f}",
        f"{found.between:.4f} / {found.within:.4f}",
        f"{found.reliability:.2f} ({low:.2f} to {high:.2f})",
        f"{found.reliability / seconds:.3f}",
    ]


def _agreements(tables: Sequence[tuple[list[Row], Table]], split: str) -> Iterator[list[str]]:
    """Of each table of whole detectors, its losses with two seeds or more, beside each table of
    heads on its warm-up."""
    for rows, full in tables:
        for head_rows, head in tables:
            tasks = head_rows[0].task, rows[0].task
            if tasks != ("head", "full") or head_rows[0].weights != rows[0].weights:
                continue
            twice = (~np.isnan(full.test)).sum(axis=1) > 1
            both = [
                name
                for name, enough in zip(full.names, twice, strict=True)
                if enough and name in head.names
            ]
            cheap, dear = (
                of[[names.index(name) for name in both]]
                for of, names in ((getattr(head, split), head.names), (full.test, full.names))
            )
            if len(both) < 3:
                continue
            found = agreement(cheap, dear)
            low, high = _interval(lambda one: agreement(cheap[one], dear[one]).spearman, len(both))
            yield [
                *(rows[0].detector, str(found.losses)),
                f"{cheap.shape[1]} heads of {head_rows[0].steps}, {dear.shape[1]} full",
                f"{found.spearman:.2f} ({low:.2f} to {high:.2f})",
                *(str(found.pairs), f"{found.right:.0%}"),
            ]


def _interval(statistic: Callable[[np.ndarray], float], losses: int) -> tuple[float, float]:
    """A 95% bootstrap interval over losses, of what a statistic says of drawn ones."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(losses, size=(RESAMPLED, losses))
    low, high = np.nanquantile([statistic(one) for one in drawn], [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
