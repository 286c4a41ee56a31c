"""A run as one HTML file that needs nothing else: no network, no server, no other file.

The page is a template (``page.html``) with the run's data put into it as JSON. What is shown is
drawn by the template's script; what is known is gathered here.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cse_autoloss.canonical import known_name, named
from cse_autoloss.caveats import caveats
from cse_autoloss.config import parse_config
from cse_autoloss.export import ranking
from cse_autoloss.files import write_whole
from cse_autoloss.inputs import INPUTS
from cse_autoloss.intervals import mean_interval
from cse_autoloss.journal import FOUND, FUNNEL, Candidate, Journal, found_label
from cse_autoloss.page.detections import read_detections
from cse_autoloss.page.pictures import curves, examples, formula
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.status import Compared, Status, read_status

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*data*/null"  # of the data in the template
SHOWN = 3  # best losses with formula and curves
CANDIDATES = 5000  # in the page's table: the fittest


def write_page(journal: Journal, folder: Path) -> Path:
    """Write ``report.html`` into a folder."""
    path = folder / "report.html"
    write_whole(path, page(journal))
    return path


def page(journal: Journal, live: bool = False) -> str:
    """The page as text.

    Args:
        live: whether it should fetch itself anew while the run goes on.
    """
    data = json.dumps(gather(journal) | {"live": live}, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "</" could end it early; "<!--" could hide its end.
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, data.replace("<", "\\u003c"), 1)


def gather(journal: Journal) -> dict[str, Any]:
    """Everything the page shows, as plain data."""
    config, status = parse_config(journal["config"]), read_status(journal)
    spaces = {branch: load_space(origin) for branch, origin in journal["spaces"].items()}
    searched = {branch: spaces[branch] for branch in config.search.branches}
    ladder = Ladder.of(config.stages)
    candidates = journal.candidates()
    best = ranking(journal, SHOWN)
    fittest = sorted(candidates, key=lambda one: -(one.fitness or -1))[:CANDIDATES]
    shown = {one.id for one in fittest} | _ancestors(best, {one.id: one for one in candidates})
    return {
        "title": journal.folder.name,
        "phase": status.phase,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": _command(journal),
        "classes": journal["classes"] or [],
        "images": journal["images"] or {},
        "versions": journal["versions"] or {},
        "config": config.to_yaml(),
        "branches": list(searched),
        "stopped": status.stopped,
        "running": [[key, round(seconds)] for key, seconds in status.running],
        "story": list(status.story),
        "seconds_left": status.seconds_left,
        "baseline": status.baseline,
        "funnel": {
            branch: [[name, counts.get(name, 0)] for name in FUNNEL]
            for branch, counts in status.funnel.items()
        },
        "stages": [[name, *counts] for name, counts in status.stages.items()],
        "fitness_stage": ladder.fitness,
        "comparison": [_compared(row, spaces) for row in status.comparison],
        "caveats": caveats(status.comparison),
        "best": [
            {"label": found_label(one), "id": one.id, "losses": _losses(one.losses, spaces)}
            for one in best
        ],
        "variables": _variables(best, spaces),
        "curves": {
            branch: curves(space, _drawn(branch, best, status))
            for branch, space in searched.items()
        },
        "examples": {
            branch: examples(space, config.search.offspring, config.seed)
            for branch, space in searched.items()
        },
        "candidates": [_row(one, spaces) for one in candidates if one.id in shown],
        "hidden": len(candidates) - len(shown),
        "timeline": _timeline(journal, ladder.fitness),
        "detections": read_detections(journal),
    }


def _drawn(branch: str, best: Sequence[Candidate], status: Status) -> dict[str, str]:
    """Label to expression of the losses of a branch that curves are drawn of, beside the known."""
    drawn = {found_label(one): one.losses[branch] for one in best if branch in one.losses}
    compared = {row.label: row.losses[branch] for row in status.comparison if branch in row.losses}
    return drawn | compared


def _compared(row: Compared, spaces: Mapping[str, SearchSpace]) -> dict[str, Any]:
    return {
        "label": row.label,
        "known": named(row.losses, spaces) if row.label.startswith(FOUND) else None,
        "losses": _losses(row.losses, spaces),
        "val": _interval(row.val),
        "test": _interval(row.test),
        "gain": _interval(row.gain),
        "seeds": len(row.measured),
        "failures": list(row.failures),
    }


def _interval(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    interval = mean_interval(values)
    half = interval.half if math.isfinite(interval.half) else None
    return {"mean": interval.mean, "half": half, "values": list(values)}


def _losses(losses: Mapping[str, str], spaces: Mapping[str, SearchSpace]) -> dict[str, Any]:
    expressions = {branch: spaces[branch].expression(text) for branch, text in losses.items()}
    return {
        branch: {
            "text": losses[branch],
            "formula": formula(expression),
            "known": known_name(expression, spaces[branch]),
        }
        for branch, expression in expressions.items()
    }


def _variables(best: Sequence[Candidate], spaces: Mapping[str, SearchSpace]) -> dict[str, str]:
    """Names to meanings of the variables that the best losses have."""
    return {
        name: INPUTS[spaces[branch].inputs][name].meaning
        for one in best
        for branch, text in one.losses.items()
        for name in sorted(spaces[branch].expression(text).variables)
    }


def _row(candidate: Candidate, spaces: Mapping[str, SearchSpace]) -> dict[str, Any]:
    sizes = [spaces[branch].expression(text).size for branch, text in candidate.losses.items()]
    parents = sorted({number for ids in candidate.parents.values() for number in ids})
    return {
        "id": candidate.id,
        **candidate.losses,
        "size": sum(sizes),
        "origin": candidate.origin,
        "known": candidate.known,
        "parents": parents,
        "round": candidate.round,
        "stage": candidate.stage,
        "state": candidate.state,
        "reason": candidate.reason,
        "fitness": candidate.fitness,
        "trainings": candidate.trainings,
        "predicted": candidate.predicted,
        "deviation": candidate.deviation,
    }


def _ancestors(best: Sequence[Candidate], by_id: Mapping[int, Candidate]) -> set[int]:
    """Ids of these candidates and of all that they come from."""
    seen: set[int] = set()
    waiting = [one.id for one in best]
    while waiting:
        number = waiting.pop()
        if number not in seen and number in by_id:
            seen.add(number)
            waiting += [parent for ids in by_id[number].parents.values() for parent in ids]
    return seen


def _timeline(journal: Journal, stage: str) -> list[list[float | int | None]]:
    """[trainings so far, mAP, candidate] of each training at a stage, in the order of their end."""
    rows = [row for row in journal.trials(stage, finished=True) if row.result]
    return [
        [place, row.result.mAP, row.candidate] for place, row in enumerate(rows, 1) if row.result
    ]


def _command(journal: Journal) -> str:
    """What repeats the run: the configuration that the journal keeps, in a new folder."""
    return shlex.join(["cse-search", "run", f"{journal.folder.name}.yaml", "--out", "runs/again"])
