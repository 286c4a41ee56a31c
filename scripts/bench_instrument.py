"""How well a task's trainings tell losses apart, and at what price.

    python scripts/make_lossbench.py sample fcos_proxy --count 30
    python scripts/make_lossbench.py train fcos_proxy --seeds 0 1
    python scripts/bench_instrument.py fcos_proxy faster_rcnn_proxy

Reads the rows that make_lossbench.py wrote, of whichever detector, data, task and steps, and prints
a line for each instrument: CPU seconds of a training, the default's mAP, and over the sound losses,
those not far below the default, the correlation of seed 0 with seed 1, the deviation between losses
and within one, the reliability of one training and how much of it a CPU second buys. Where the
detector has full trainings, too, a second table says how well heads foretell them.
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from cse_autoloss.errors import UserError
from cse_autoloss.lossbench import FOLDER, Row, Table, agreement, load, reliability, table
from cse_autoloss.report import table as markdown

SOUND = 0.02  # mAP: what is no further below the default
RESAMPLED = 1000
_origin = operator.attrgetter("origin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("detectors", nargs="+")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    options = parser.parse_args()
    lines, agreements = [], []
    for detector in options.detectors:
        tables = list(_tables(detector, options.folder))
        lines += [_line(*one, options.split) for one in tables]
        agreements += _agreements(tables, options.split)
    head = ["detector", "task, steps", "warm-up", "CPU s", "default", "sound losses"]
    head += ["seed 0 with 1", "between / within", "reliability (95%)", "per CPU s"]
    print("\n".join(markdown(head, lines)))
    if agreements:
        head = [
            "detector",
            "losses",
            "trainings each",
            "Spearman",
            "pairs told apart",
            "right sign",
        ]
        print("\n" + "\n".join(markdown(head, agreements)))


def _tables(detector: str, folder: Path) -> Iterator[tuple[list[Row], Table]]:
    """A detector's rows by instrument: task, steps, warm-up, config."""
    for task in ("head", "full"):
        try:
            rows = load(detector, task, folder)
        except UserError:
            if task == "head":
                raise
            continue
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
    low, high = _interval(sound)
    return [
        *line,
        f"{np.corrcoef(sound[:, 0], sound[:, 1])[0, 1]:.2f}",
        f"{found.between:.4f} / {found.within:.4f}",
        f"{found.reliability:.2f} ({low:.2f} to {high:.2f})",
        f"{found.reliability / seconds:.3f}",
    ]


def _interval(scores: np.ndarray) -> tuple[float, float]:
    """A 95% bootstrap interval of the reliability, over losses."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(scores), size=(RESAMPLED, len(scores)))
    values = [reliability(scores[one]).reliability for one in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _agreements(tables: Sequence[tuple[list[Row], Table]], split: str) -> Iterator[list[str]]:
    heads = [one for one in tables if one[0][0].task == "head"]
    for rows, full in tables:
        for head_rows, head in heads:
            both = [name for name in full.names if name in head.names]
            cheap, dear = (
                np.array([getattr(of, split)[of.names.index(name)] for name in both])
                for of in (head, full)
            )
            same = rows[0].task == "full" and head_rows[0].weights == rows[0].weights
            if same and len(both) > 2 and (~np.isnan(dear)).sum(axis=1).max() > 1:
                found = agreement(cheap, dear)
                yield [
                    *(rows[0].detector, str(found.losses)),
                    f"{cheap.shape[1]} heads of {head_rows[0].steps}, {dear.shape[1]} full",
                    f"{found.spearman:.2f}",
                    *(str(found.pairs), f"{found.right:.0%}"),
                ]


if __name__ == "__main__":
    main()
