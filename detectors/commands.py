"""Commands of ``cse-search`` that belong to the detectors' side."""
from __future__ import annotations

from pathlib import Path

import click

from detectors.datasets import shapes


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which data set; same seed, same bytes.")
def data(folder: Path, seed: int) -> None:
    """Write the embedded data set, in COCO format with boxes and masks, to FOLDER."""
    try:
        shapes.write(folder, seed)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for split, count in shapes.SPLITS.items():
        click.echo(f"{folder / 'annotations' / f'instances_{split}2017.json'}: {count} images in {folder / f'{split}2017'}")
