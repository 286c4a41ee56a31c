"""The picture of a run: the mAP of each training in the order of the search, and the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cse_autoloss.config import parse_config
from cse_autoloss.drawing import save
from cse_autoloss.journal import Journal
from cse_autoloss.stages import Ladder
from cse_autoloss.status import Compared, Status
from cse_autoloss.text import printable


def draw_progress(journal: Journal, status: Status, path: Path) -> Path:
    """Draw the mAP of each proxy training in the order of the search, the default's and the final
    comparison beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    search, comparison = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    _draw_search(search, journal, status)
    _draw_comparison(comparison, status.comparison)
    save(figure, path, dpi=120)
    return path


def _draw_search(axes: Any, journal: Journal, status: Status) -> None:
    stage = Ladder.of(parse_config(journal["config"]).stages).fitness
    given = {candidate.id for candidate in journal.trained() if candidate.known}
    measured = [
        (row.candidate, row.result.mAP)
        for row in journal.trials(stage, finished=True)
        if row.result and row.result.mAP is not None
    ]
    for known, label, color in (
        (True, "known losses", "tab:gray"),
        (False, "found by the search", "tab:blue"),
    ):
        points = [
            (i, mAP)
            for i, (candidate, mAP) in enumerate(measured, 1)
            if (candidate in given) == known
        ]
        if points:
            axes.scatter(*zip(*points), s=18, color=color, label=label)
    best = list(itertools.accumulate((mAP for _, mAP in measured), max))
    numbers = range(1, len(measured) + 1)
    axes.step(numbers, best, where="post", color="tab:blue", alpha=0.5, label="best so far")
    if status.baseline:
        axes.axhline(
            status.baseline["mAP"], color="tab:red", linestyle="--", label="default, tuned"
        )
    axes.set(xlabel=f"training at stage {stage}", ylabel="mAP on val", title="The search")
    axes.legend(fontsize=8)


def _draw_comparison(axes: Any, rows: Sequence[Compared]) -> None:
    for place, row in enumerate(rows):
        for split, color, shift in (("val", "tab:blue", -0.1), ("test", "tab:orange", 0.1)):
            values = getattr(row, split)
            axes.plot(
                [place + shift] * len(values),
                values,
                "o",
                color=color,
                markersize=5,
                label=None if place else split,
            )
            if values:
                axes.hlines(
                    sum(values) / len(values),
                    place + shift - 0.09,
                    place + shift + 0.09,
                    color=color,
                )
    axes.set_xticks(
        range(len(rows)),
        [printable(row.label).replace("$", r"\$") for row in rows],
        rotation=20,
        fontsize=8,
    )
    axes.set(title="Fresh seeds (bar: mean)")
    if rows:
        axes.legend(fontsize=8)
