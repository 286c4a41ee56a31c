"""How strongly what runs found asks for a score, by the IoU of a positive's box: docs/pull.png.

    python scripts/plot_pull.py "30 heads" "make search"    # beginnings of names of comparisons

Of each comparison in docs/claims the loss that is ahead on val, and the known ones, dashed: the
negative derivative by its class's logit where all logits are 0, scaled to a mean of 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from table_claims import COMPARISONS, FOLDER, read_comparisons

from cse_autoloss.drawing import save, sweeps
from cse_autoloss.space import load_space

SPACE = "two_stage_cls"
KNOWN = ("CrossEntropy", "CSE-Autoloss-A")


def winners(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name of each comparison, with the classification loss of what it found."""
    for run, losses in read_comparisons(FOLDER / COMPARISONS).items():
        found = {name: rows for name, rows in losses.items() if name.startswith("found")}
        if found and run.startswith(tuple(names)):
            best = max(found, key=lambda name: fmean(row["val"] for row in found[name]))
            yield f"{run}, {best.removeprefix('found ')}", found[best][0]["losses"]["cls"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--figure", type=Path, default=FOLDER.parent / "pull.png")
    options = parser.parse_args()
    space = load_space(SPACE)
    by_iou = sweeps(space)[-1]
    lines = [(title, space.expression(text), "-") for title, text in winners(options.names)]
    lines += [(name, space.losses[name].expression, "--") for name in KNOWN]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for title, loss, style in lines:
        pull = -by_iou.curve(loss)[1]
        axes.plot(by_iou.values, pull / pull.abs().mean(), style, label=title)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="IoU of a positive's box", ylabel="pull on its score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save(figure, options.figure)


if __name__ == "__main__":
    main()
