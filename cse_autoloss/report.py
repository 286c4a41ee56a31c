"""A run's report: one Markdown page with its tables and formulas, a picture, the best loss as
files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cse_autoloss.calibration import calibration_lines, draw_calibration, predicted_candidates
from cse_autoloss.caveats import caveats
from cse_autoloss.config import parse_config
from cse_autoloss.display import GAIN, SPREAD, comparison_cells, duration, stage_counts
from cse_autoloss.drawing import plot
from cse_autoloss.earlier import told
from cse_autoloss.export import TORCH, export_run, found
from cse_autoloss.files import write_whole
from cse_autoloss.journal import FUNNEL, CandidateState, Journal
from cse_autoloss.page import write_page
from cse_autoloss.progress import draw_progress
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.status import Status, read_status
from cse_autoloss.text import markdown, printable
from cse_autoloss.trial import ConfigError

CONFIG = "best.py"  # the best found loss, in a config of the trainer's
SHOWN = 10  # candidates in the report's table


def write_report(journal: Journal, own: bool, folder: Path | None = None) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``progress.png``, ``predicted.png`` where the ranker
    predicts, and, where something was found, ``best.py`` with its losses and their curves.

    Args:
        own: whether code that the run names may be imported. ``best.py`` needs it; without, the
            losses are written as PyTorch modules alone.
        folder: where to; the run's own unless given.

    Returns:
        The paths written.

    Raises:
        ConfigError: if nothing can be written there.
    """
    folder = folder or journal.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(journal, folder, own)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the report cannot be written: {error.strerror or error}; name another "
            "folder with --out"
        ) from error


def _write(journal: Journal, folder: Path, own: bool) -> list[Path]:
    status = read_status(journal)
    picture = draw_progress(journal, status, folder / "progress.png")
    exported, lacking = _exported(journal, folder / CONFIG, own) if status.best else ([], None)
    curves = {}
    for branch, text in (found(journal).losses if exported else {}).items():
        space = load_space(journal["spaces"][branch])
        curves[branch] = folder / f"best_{branch}.png"
        plot(space.expression(text), space, curves[branch])
    predicted = calibration_lines(predicted_candidates(journal))
    pictures = [picture, *curves.values()]
    if predicted:
        pictures.append(draw_calibration(predicted_candidates(journal), folder / "predicted.png"))
    page = folder / "report.md"
    write_whole(
        page, "\n".join(_page(journal, status, exported, lacking, curves, predicted)) + "\n"
    )
    return [write_page(journal, folder), page, *pictures, *exported]


def _exported(journal: Journal, path: Path, own: bool) -> tuple[list[Path], str | None]:
    """The best loss as files; and why its config is not among them, or None."""
    if not own:
        return export_run(journal, path, target=TORCH), None
    try:
        return export_run(journal, path), None
    except ConfigError as error:
        return export_run(journal, path, target=TORCH), str(error)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table."""
    header = list(header)
    return [
        f"| {' | '.join(printable(cell) for cell in row)} |"
        for row in (header, ["---"] * len(header), *rows)
    ] + [""]


def formula(losses: Mapping[str, str]) -> str:
    return (
        "<br>".join(
            f"{markdown(branch)}: `{printable(text).replace('`', '')}`"
            for branch, text in losses.items()
        )
        or "the detector's own"
    )


def _page(
    journal: Journal,
    status: Status,
    exported: list[Path],
    lacking: str | None,
    curves: Mapping[str, Path],
    predicted: list[str],
) -> list[str]:
    return [
        *_result(journal, status),
        *(_best(journal, exported, lacking, curves) if exported else []),
        *(_searched(journal, status) if status.trials[0] else []),
        *predicted,
        "## Provenance",
        "",
        *(f"* {markdown(name)}: {markdown(value)}" for name, value in _provenance(journal)),
        "",
    ]


def _result(journal: Journal, status: Status) -> list[str]:
    config = parse_config(journal["config"])
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(journal["created"]))
    lines = [
        f"# {markdown(journal.folder.name)}",
        "",
        f"Searched: {', '.join(config.search.branches)} of {markdown(journal['detector'])}, "
        f"seed {config.seed}; started {started}; {status.phase}.",
        "",
    ]
    if journal["earlier"]:
        lines += [f"{markdown(told(journal['earlier']))}.", ""]
    lines += [
        "## Result",
        "",
        f"mAP (COCO, IoU 0.50:0.95) over fresh seeds: {SPREAD}. "
        "Selection saw val only; test was never seen by the search.",
        "",
    ]
    lines += table(
        ("losses", "n", "val", "test", GAIN, "formula"),
        (
            (markdown(row.label), *comparison_cells(row), formula(row.losses))
            for row in status.comparison
        ),
    )
    for caveat in caveats(status.comparison):
        lines += [caveat, ""]
    if status.baseline:
        scale = status.baseline["scale"]
        lines += [
            "The default losses were tuned on val first: loss weights times "
            f"{scale.get('cls', 1):g} (cls) and "
            f"{scale.get('reg', 1):g} (reg), learning rate times {status.baseline['lr_scale']:g}. "
            "Every candidate starts with the gradient norm of these tuned losses.",
            "",
        ]
    return [*lines, "![mAP of each trained candidate](progress.png)", ""]


def _best(
    journal: Journal, exported: list[Path], lacking: str | None, curves: Mapping[str, Path]
) -> list[str]:
    best = found(journal)
    lines = ["## The best found loss", ""]
    for branch, text in best.losses.items():
        expression = load_space(journal["spaces"][branch]).expression(text)
        lines += [
            f"**{branch}**, loss weight {best.loss_weights[branch]:.4g}",
            "",
            "```",
            text,
            "```",
            "",
            f"$${expression.to_latex()}$$",
            "",
            f"![Curves of the {branch} loss beside the known ones, and its "
            f"tree]({curves[branch].name})",
            "",
        ]
    lines += ["Files: " + ", ".join(f"`{path.name}`" for path in exported), ""]
    return [*lines, f"No {CONFIG}: {markdown(lacking)}.", ""] if lacking else lines


def _searched(journal: Journal, status: Status) -> list[str]:
    config = parse_config(journal["config"])
    ladder = Ladder.of(config.stages)
    lines = ["## The funnel", ""]
    lines += table(
        ("branch", *FUNNEL),
        (
            (branch, *(f"{counts[name]:,}" for name in FUNNEL))
            for branch, counts in status.funnel.items()
        ),
    )
    for branch, counts in status.funnel.items():
        fell = sorted(counts["reasons"].items(), key=lambda entry: -entry[1])
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in fell)
        lines += [f"Where {branch} expressions fell: {reasons}", ""]
    lines += [f"Trainings: {stage_counts(status.stages)}.", ""]
    if status.stopped:
        lines += [f"The search ended early: {status.stopped}.", ""]
    lines += ["## Candidates", ""]
    found = journal.best(ladder.closing, SHOWN)
    known = [candidate for candidate in journal.trained() if candidate.known]
    means = {stage: journal.means(stage) for stage in ladder.closing}

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    lines += table(
        ("#", "origin", "round", "predicted", ladder.fitness, *ladder.closing, "formula"),
        (
            (
                *(c.id, markdown(c.origin), c.round, number(c.predicted), number(c.fitness)),
                *(number(means[stage].get(c.id)) for stage in ladder.closing),
                formula(c.losses),
            )
            for c in found + known
        ),
    )
    lines += [
        "Numbers are mAP on val, means where there is more than one training; each stage after the "
        f"search ({', '.join(ladder.closing)}) has seeds of its own.",
        "",
    ]
    if failed := journal.candidates(CandidateState.FAILED)[:SHOWN]:
        lines += [
            "Failed trainings:",
            "",
            *(f"* #{c.id}: {markdown(c.reason)}" for c in failed),
            "",
        ]
    return lines


def _provenance(journal: Journal) -> Iterable[tuple[str, Any]]:
    yield from journal["versions"].items()
    yield "images", ", ".join(f"{count} {split}" for split, count in journal["images"].items())
    results = [row.result for row in journal.trials(finished=True) if row.result]
    results = [result for result in results if result.mAP is not None]
    if results:
        yield from results[-1].provenance.items()
        yield (
            "trainings",
            f"{len(results)}, {duration(sum(result.seconds for result in results))} of worker time",
        )
