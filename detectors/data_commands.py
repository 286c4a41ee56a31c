"""``cse-search data``: check a data set of one's own, write the embedded one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cse_autoloss.cli.output import Output
from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.datasets import shapes
from detectors.datasets.findings import ERROR, Findings


@click.group()
def data() -> None:
    """Check a data set; write the embedded one to a folder."""


@data.command()
@click.argument("folder", type=Output(dir_okay=True))
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Which data set; same seed, same bytes.",
)
def write(folder: Path, seed: int) -> None:
    """Write the embedded data set, in COCO format with boxes and masks, to FOLDER."""
    try:
        shapes.write(folder, seed)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for split, count in shapes.SPLITS.items():
        click.echo(
            f"{folder / 'annotations' / f'instances_{split}2017.json'}: {count} images in "
            f"{folder / f'{split}2017'}"
        )


@data.command()
@click.argument("name", metavar="PATH")
@click.option(
    "--config",
    "config_name",
    help="The detector's config, whose data 'config' is; masks are checked if it learns them.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of splits that are drawn.",
)
@click.option(
    "--sheet",
    type=Output(),
    metavar="FILE.png",
    help="Draw images with their boxes.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="How many on the sheet.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def check(
    name: str, config_name: str | None, seed: int, sheet: Path | None, images: int, as_json: bool
) -> None:
    """What a search or a training would take of the data set PATH, and what is wrong with it.

    PATH is what --data takes elsewhere: a folder, coco:/path, yolo:/path, voc:/path, or config.
    The exit status is 1 if there is an error.
    """
    config = masks = None
    if config_name is not None:
        from detectors import config_data, config_files

        config = config_files.read_config(config_name, "--config")
        masks = config_data.has_masks(config.get("model", {}))
    findings = Findings()
    found = None
    try:
        found = datasets.examine(name, findings, seed, config=config, masks=bool(masks))
    except ConfigError as error:
        findings.error("unreadable", "", str(error))
    if as_json:
        click.echo(json.dumps(_report(name, found, findings), indent=2))
    else:
        for line in _lines(found, findings):
            click.echo(line)
    if sheet is not None and found is not None:
        from detectors.datasets.sheet import draw

        click.echo(f"{draw(found, sheet, images, seed)} written", err=as_json)
    sys.exit(1 if findings.errors else 0)


def _lines(found: datasets.DataSet | None, findings: Findings) -> list[str]:
    lines = []
    if found is not None:
        lines = [f"{len(found.classes)} classes: {', '.join(found.classes)}"]
        lines += [
            f"{name}: {split.images:,} images, {split.objects:,} objects"
            for name, split in found.splits.items()
        ]
        lines += [found.census] if found.census else []
    lines += [finding.line for finding in findings]
    errors = len(findings.errors)
    return [*lines, f"{errors} to mend" if errors else "nothing to mend"]


def _report(name: str, found: datasets.DataSet | None, findings: Findings) -> dict[str, Any]:
    return {
        "name": name,
        "usable": not any(finding.severity == ERROR for finding in findings),
        "census": found.census if found else "",
        "classes": list(found.classes) if found else [],
        "splits": {key: asdict(split) for key, split in found.splits.items()} if found else {},
        "findings": [asdict(finding) for finding in findings],
    }
