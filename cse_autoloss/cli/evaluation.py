"""The command on formulas of any origin: evaluate."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cse_autoloss.config import Config, preset_names, read_config
from cse_autoloss.evaluate import TASKS, Evaluation, Evaluator
from cse_autoloss.expression import ExpressionError
from cse_autoloss.intervals import mean_interval
from cse_autoloss.text import printable
from cse_autoloss.trial import ConfigError


@click.command()
@click.argument("expressions", nargs=-1, metavar="[EXPR]...")
@click.option(
    "-f",
    "--file",
    "source",
    type=click.File(encoding="utf-8-sig"),  # a byte order mark or none
    help="Read more, one a line; - is standard input. Empty lines and # comments are passed over.",
)
@click.option("--branch", type=click.Choice(["cls", "reg"]), default="cls", show_default=True)
@click.option("--space", help="Their search space: a name or a YAML file; else the detector's own.")
@click.option(
    "--stage",
    type=click.Choice(TASKS),
    default="head",
    show_default=True,
    help="What is trained; none: verified and simulated alone.",
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option(
    "--with",
    "beside",
    metavar="BRANCH=EXPR",
    help="A loss of the other branch that formula and default have in common: reg=GIoU.",
)
@click.option("--force", is_flag=True, help="Train also what verification or simulation rejects.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A run's YAML file.")
@click.option("--preset", help=f"One of {', '.join(preset_names())}; the default is quickstart.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--data", help="Short for --set detector.data=...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as they come.")
def evaluate(
    expressions: tuple[str, ...],
    source: TextIO | None,
    branch: str,
    space: str | None,
    stage: str,
    seeds: int,
    beside: str | None,
    force: bool,
    config_file: Path | None,
    preset: str | None,
    settings: tuple[str, ...],
    data: str | None,
    as_json: bool,
) -> None:
    """Judge formulas: their verdict, a simulation, and mAP beside the tuned default's.

    EXPR is an expression or the name of a known loss. What was measured once is kept: the same
    formula on the same detector, data and seeds is not trained again. Exit status 1 if a formula
    was rejected.
    """
    from cse_autoloss.pins import pins
    from cse_autoloss.run import absolute, check, spaces_of, trainer_of, versions

    try:
        texts = [*expressions, *(line.strip() for line in source or ())]
    except UnicodeDecodeError as error:
        assert source is not None
        raise ConfigError(
            f"--file {source.name}: should be text in UTF-8, a formula a line; {error.reason}"
        ) from None
    texts = [text for text in texts if text and not text.startswith("#")]
    if not texts:
        raise click.UsageError("give expressions, or a file of them with --file")
    if config_file is not None and preset is not None:
        raise click.UsageError("give --config or --preset, one of the two")
    shorts = [f"detector.data={data}"] if data is not None else []
    shorts += [f"search.spaces.{branch}={space}"] if space is not None else []
    preset = None if config_file else preset or "quickstart"
    config = absolute(read_config(config_file, preset, [*settings, *shorts]))
    other, _, text = (beside or "").partition("=")
    asked = (config, spaces_of(config), branch, stage, seeds, {other: text} if beside else None)
    _read(texts, *asked)
    checked = check(config, searched=False)
    if reason := checked.get("untrainable", {}).get(stage):
        raise ConfigError(f"--stage {stage}: {reason}")
    configured = config.model_dump(mode="json", include={"seed", "detector", "tuning"})
    rejected = False
    depends = {"configuration": configured, **pins(checked, versions(trainer_of(config)))}
    with Evaluator(*asked, depends=depends, say=_say) as evaluator:
        for formula in texts:
            evaluation = evaluator(formula, force)
            rejected |= not (evaluation.accepted and evaluation.optimises)
            if as_json:
                click.echo(json.dumps(evaluation.to_dict()))
            else:
                _show(evaluation)
    sys.exit(1 if rejected else 0)


def _read(
    texts: Sequence[str],
    config: Config,
    spaces: Mapping[str, str],
    branch: str,
    stage: str,
    seeds: int,
    beside: Mapping[str, str] | None,
) -> None:
    """Read all formulas, before any data.

    Raises:
        UserError: one line that names the one that cannot be read.
    """
    if branch not in spaces:
        raise ConfigError(
            f"--branch {branch}: this detector's {branch} loss cannot be another; the others can "
            f"be: {', '.join(spaces)}"
        )
    try:
        evaluator = Evaluator(config, spaces, branch, stage, seeds, beside)
    except ExpressionError as error:
        ((name, text),) = (beside or {}).items()
        raise ExpressionError(f"--with {name}={printable(text, 80)}: {error}") from None
    with evaluator:
        for number, text in enumerate(texts, 1):
            try:
                evaluator.expression(text)
            except ExpressionError as error:
                raise ExpressionError(f"formula {number}, {printable(text, 80)}: {error}") from None


def _say(line: str) -> None:
    """To whoever looks on; a program that calls this has the standard error for errors alone."""
    if sys.stderr.isatty():
        click.echo(line, err=True)


def _show(evaluation: Evaluation) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("formula", escape(evaluation.expression))
    table.add_row("verdict", escape(evaluation.verdict))
    for name, values in (evaluation.counterexample or {}).items():
        table.add_row("", escape(f"{name} = {', '.join(f'{value:.4g}' for value in values)}"))
    table.add_row("simulation", escape(evaluation.simulation))
    if evaluation.mAP:
        n = len(evaluation.mAP)
        table.add_row(
            f"mAP ({evaluation.task})", f"{mean_interval(evaluation.mAP).text()}  n = {n}"
        )
        table.add_row("tuned default", f"{mean_interval(evaluation.default).text()}  n = {n}")
        half = "" if evaluation.gain_half is None else f" ± {evaluation.gain_half:.3f}"
        table.add_row("gain", f"{evaluation.gain:+.3f}{half}  (same seeds, 95% interval)")
        table.add_row("trained", f"{evaluation.trained}; the rest was known")
    for failure in evaluation.failures:
        table.add_row("failed", escape(failure))
    Console(width=140, highlight=False).print(table)
