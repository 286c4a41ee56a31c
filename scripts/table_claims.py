"""What found and known losses gain over the tuned default: docs/claims.md from the rows of
docs/claims and docs/lossbench, one a training. First whole trainings, then the comparisons that
runs ended with, on fresh seeds (kept by keep_comparison.py).

    python scripts/make_lossbench.py train faster_rcnn_proxy --folder docs/claims --task full \
        --steps 1000 --batch-size 8 --seeds 0 1 2 --data-seed 0  # and 1, 2: other draws
    python scripts/table_claims.py

A draw is a data set and the warm-up on it; every loss trains with the same seeds on every draw. A
gain is paired: less the tuned default's mAP with the same draw and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cse_autoloss.intervals import Interval, mean_interval, mean_over_groups, paired_interval
from cse_autoloss.lossbench import FOLDER as LOSSBENCH
from cse_autoloss.lossbench import Row, read_rows
from cse_autoloss.report import table

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "claims"
COMPARISONS = "comparisons.jsonl"  # in such a folder
DEFAULT = "default"


def gains(rows: Sequence[Row], loss: str, split: str) -> list[list[float]]:
    """Gains over the default, a list a draw; a training that failed counts as 0."""
    scores: dict[str, dict[tuple[str, int], float]] = {loss: {}, DEFAULT: {}}
    for row in rows:
        if row.loss in scores:
            scores[row.loss][row.weights, row.seed] = getattr(row, split) or 0.0
    shared = sorted(scores[loss].keys() & scores[DEFAULT].keys())
    draws = dict.fromkeys(draw for draw, _ in shared)
    return [[scores[loss][k] - scores[DEFAULT][k] for k in shared if k[0] == d] for d in draws]


def points(interval: Interval, sign: bool = False) -> str:
    """In points, per cent of mAP."""
    scaled = Interval(100 * interval.mean, 100 * interval.half, interval.n, interval.level)
    return scaled.text(digits=2 if sign else 1, sign=sign)


def page(rows: Sequence[Row]) -> list[str]:
    """The Markdown lines of one detector's table."""
    losses: Mapping[str, Mapping[str, str]] = {row.loss: row.losses for row in rows}
    lines = []
    for loss in losses:
        own = [row for row in rows if row.loss == loss]
        entry = [f"**{loss}**" if loss.startswith("found") else loss]
        entry += [str(len({row.weights for row in own})), str(len(own))]
        entry += [
            points(mean_interval([getattr(row, s) or 0.0 for row in own])) for s in ("val", "test")
        ]
        if loss == DEFAULT:
            entry += ["", "", ""]
        else:
            groups = gains(rows, loss, "test")
            pairs = [gain for group in groups for gain in group]
            ahead = f"{sum(gain > 0 for gain in pairs)} of {len(pairs)}"
            entry += [
                points(mean_interval(pairs), True),
                points(mean_over_groups(groups), True),
                ahead,
            ]
        lines.append(entry)
    header = ["losses", "draws", "trainings", "val", "test"]
    header += ["gain on test (over all pairs)", "gain on test (over draws)", "pairs ahead"]
    return table(header, lines)


def read_comparisons(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run to losses to their rows, one a seed; the default first."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        found.setdefault(row["run"], {DEFAULT: []}).setdefault(row["loss"], []).append(row)
    return found


def comparisons(path: Path) -> list[str]:
    """The Markdown lines of a table of the comparisons that runs ended with."""
    lines = []
    for run, losses in read_comparisons(path).items():
        for loss, rows in losses.items():
            entry, gained = [run, loss, str(len(rows))], []
            for split in ("val", "test"):
                mine, default = (
                    {row["seed"]: row[split] or 0.0 for row in some}
                    for some in (rows, losses[DEFAULT])
                )
                entry.append(points(mean_interval(list(mine.values()))))
                gain = points(paired_interval(mine, default), True)
                gained.append("" if loss == DEFAULT else gain)
            lines.append([*entry, *gained])
    header = ["run", "losses", "seeds", "val", "test", "gain on val", "gain on test"]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    for path in sorted(folder.glob("*/full.jsonl")):
        known = read_rows(LOSSBENCH / path.parent.name / path.name)
        rows = list({row.key: row for row in [*known, *read_rows(path)]}.values())
        steps = sorted({row.steps for row in rows})
        seconds = sum(row.cpu_seconds for row in rows)
        print(
            f"### {path.parent.name}, {', '.join(map(str, steps))} steps, {len(rows)} trainings, "
            f"{seconds / 3600:.1f} core-hours\n"
        )
        print("\n".join(page(rows)))
        for loss, losses in {row.loss: row.losses for row in rows}.items():
            texts = "; ".join(f"{branch} `{text}`" for branch, text in losses.items())
            print(f"* {loss}: {texts or 'what the detector has by itself, tuned'}")
        print()
    if (folder / COMPARISONS).exists():
        print("### Comparisons of runs\n")
        print("\n".join(comparisons(folder / COMPARISONS)))


if __name__ == "__main__":
    main()
