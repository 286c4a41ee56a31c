"""A run from start to end: check everything, search, and write down what came of it."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from cse_autoloss.cluster import Cluster, ClusterError
from cse_autoloss.config import Config, change_config, parse_config
from cse_autoloss.display import comparison_table, duration, watching
from cse_autoloss.journal import Journal
from cse_autoloss.report import write_report
from cse_autoloss.search import Search, compared_besides
from cse_autoloss.space import load_space
from cse_autoloss.status import read_status
from cse_autoloss.trial import ConfigError, load_trainer

PACKAGES = ("cse-autoloss", "torch", "numpy", "ray", "mmdet", "mmcv-full", "pycocotools")


def check(config: Config) -> dict[str, Any]:
    """Everything that can be wrong before anything starts.

    Returns:
        What the trainer says of its options, with ``spaces`` as the run will use them.

    Raises:
        ConfigError, SpaceError: one line that names the key and what would be right.
    """
    name = config.detector.get("trainer")
    if not isinstance(name, str):
        raise ConfigError(
            "detector.trainer: missing; the class that trains, such as detectors.training:DetectorTrainer"
        )
    checked = load_trainer(name).check(config.detector)
    spaces = {**checked["spaces"], **config.search.spaces}
    for branch, origin in spaces.items():
        space, own = load_space(origin), load_space(checked["spaces"][branch])
        if space.inputs != own.inputs:
            raise ConfigError(
                f"search.spaces.{branch}: {origin} is written for {space.inputs} inputs; this detector's "
                f"losses need {own.inputs}, as {own.name} has"
            )
        spaces[branch] = space.origin
    compared_besides(config, spaces)
    return {**checked, "spaces": spaces}


def start(config: Config, folder: Path, console: Console) -> None:
    """Start a run in a new folder and see it through."""
    checked = check(config)
    journal = Journal.create(
        folder,
        {
            "config": config.model_dump(mode="json"),
            "spaces": checked["spaces"],
            "classes": checked["classes"],
            "images": checked["images"],
            "created": time.time(),
            "versions": versions(),
        },
    )
    images = ", ".join(f"{count} {split}" for split, count in checked["images"].items())
    console.print(
        f"run {folder}: {len(checked['classes'])} classes; images: {images}",
        highlight=False,
        soft_wrap=True,
    )
    for note in checked.get("notes", ()):
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    try:
        _drive(journal, console)
    except ClusterError:
        if not Journal.read(
            folder
        ).trials():  # a run that never began leaves nothing in the way of the next try
            shutil.rmtree(folder)
        raise


def resume(folder: Path, console: Console, settings: Sequence[str] = ()) -> None:
    """Go on with a run that was stopped or killed, or, with ``settings`` such as
    ``budget.trials=500``, that had finished."""
    journal = Journal.resume(folder)
    before = parse_config(journal["config"])
    config = change_config(before, settings)
    check(config)
    for label, losses in compared_besides(config, journal["spaces"]).items():
        if any(
            row.label == label and row.trial.losses != losses for row in journal.trials("final")
        ):
            raise ConfigError(
                f"final.others.{label}: this run has compared other losses by that name; choose another"
            )
    with journal.step():
        journal["config"] = config.model_dump(mode="json")
        if config.budget != before.budget:
            journal["searched"] = False
        if config != before:
            journal["compared"] = False
    done = journal.trials(finished=True)
    console.print(
        f"resuming {folder}: {len(done)} trainings are done and stay done",
        highlight=False,
        soft_wrap=True,
    )
    _drive(journal, console)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _drive(journal: Journal, console: Console) -> None:
    started = time.monotonic()
    config = parse_config(journal["config"])
    try:
        if read_status(journal).phase != "finished":
            with journal.step():
                journal["driver started"] = time.time()
            with (
                Cluster(config.cluster, config.detector) as cluster,
                watching(journal, console) as watch,
            ):
                Search(config, journal["spaces"], journal, cluster, watch).run()
        status = read_status(journal)
        console.print(comparison_table(status.comparison))
        for path in write_report(journal):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        console.print(
            f"done in {duration(time.monotonic() - started)}", highlight=False, soft_wrap=True
        )
    except KeyboardInterrupt:
        console.print(
            f"stopped; nothing finished is lost: cse-search resume {journal.folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise
    finally:
        journal.close()
