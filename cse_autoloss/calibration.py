"""What the ranker predicted of candidates before they trained, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cse_autoloss.drawing import save
from cse_autoloss.journal import Candidate, Journal
from cse_autoloss.rankers.base import FLOOR

FEWEST = 3  # candidates, under which nothing is said
SURPRISES = 3  # of each kind


def predicted_candidates(journal: Journal) -> list[Candidate]:
    """Candidates that have both a prediction, made before they first trained, and a fitness."""
    return [
        candidate
        for candidate in journal.trained()
        if candidate.predicted is not None and candidate.fitness is not None
    ]


def calibration_lines(candidates: Sequence[Candidate]) -> list[str]:
    """The report's section on the predictions, in Markdown: how they rank, and the greatest
    surprises. Empty where there are too few."""
    if len(candidates) < FEWEST:
        return []
    predicted, fitness = _columns(candidates)
    sound = fitness > fitness.max() - FLOOR
    lines = ["## Predicted and measured", ""]
    for name, some in (("all", sound | True), (f"those within {FLOOR:g} of the best", sound)):
        if some.sum() >= FEWEST and np.ptp(predicted[some]) and np.ptp(fitness[some]):
            rank = spearmanr(predicted[some], fitness[some])[0]
            lines.append(f"* {name}: {some.sum()} candidates, rank correlation {rank:.2f}")
    surprise = fitness - predicted
    order = np.argsort(surprise)
    for name, places in (
        ("better than predicted", order[::-1][:SURPRISES]),
        ("worse than predicted", order[:SURPRISES]),
    ):
        shown = ", ".join(
            f"#{candidates[i].id} {fitness[i]:.3f} (predicted {predicted[i]:.3f} ± "
            f"{candidates[i].deviation or 0:.3f})"
            for i in places
            if (surprise[i] > 0) == (name == "better than predicted") and surprise[i]
        )
        lines += [f"* {name}: {shown}"] if shown else []
    return [
        *lines,
        "",
        "The rank correlation is of those that the search chose to train, which were predicted to "
        "be good. How far a poor candidate is below the others is not predicted.",
        "",
        "![predicted against measured](predicted.png)",
        "",
    ]


def draw_calibration(candidates: Sequence[Candidate], path: Path) -> Path:
    """Draw mAP as predicted, with its deviation, against mAP as measured."""
    from matplotlib.figure import Figure

    predicted, fitness = _columns(candidates)
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        predicted,
        fitness,
        xerr=[candidate.deviation or 0 for candidate in candidates],
        fmt="o",
        markersize=4,
        linewidth=0.7,
        color="tab:blue",
    )
    ends = [min(predicted.min(), fitness.min()), max(predicted.max(), fitness.max())]
    axes.plot(ends, ends, linestyle="--", color="tab:gray", linewidth=0.8)
    axes.set(xlabel="mAP as predicted (bar: one standard deviation)", ylabel="mAP as measured")
    save(figure, path, dpi=120)
    return path


def _columns(candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
    predicted = np.array([candidate.predicted for candidate in candidates], float)
    return predicted, np.array([candidate.fitness for candidate in candidates], float)
