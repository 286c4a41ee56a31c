"""Commands on candidates: verify, screen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from cse_autoloss.cli.output import Output
from cse_autoloss.errors import UserError
from cse_autoloss.expression import Expression
from cse_autoloss.screening import BATCH_SIZE, PROPERTIES, Finding, Screener, Verdict, prove
from cse_autoloss.screening.proof import SAMPLED
from cse_autoloss.screening.sampling import sample
from cse_autoloss.space import load_space, space_names
from cse_autoloss.variation import MAX_GROWN_DEPTH

SPACE = click.option(
    "--space", required=True, help=f"{', '.join(space_names())}, or a space's YAML file."
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")


@click.command()
@click.argument("expression", metavar="EXPR")
@SPACE
@click.option(
    "--plot",
    "picture",
    type=Output(),
    help="Draw the loss and its slope along the sweep where it fails, or along many, into FILE "
    "(.png, .svg, .pdf).",
)
@JSON
def verify(expression: str, space: str, picture: Path | None, as_json: bool) -> None:
    """Check one loss's convergence properties. EXPR is an expression or the name of a known loss.

    Of an accepted loss, each property is proved for a whole range of predictions, or sampled: it
    holds at all probes. Exit status 1 says that the loss is rejected.
    """
    language = load_space(space)
    loss = language.expression(expression)
    screener = Screener(language, batch_size=1)
    verdict = screener.verify(loss)
    findings = prove(loss, language) if verdict.accepted else {}
    if picture:
        _plot(loss, verdict, screener, picture)
        click.echo(f"{picture} written", err=True)
    if as_json:
        click.echo(
            json.dumps(
                _plain(
                    {
                        "expression": str(loss),
                        "space": language.origin,
                        "accepted": verdict.accepted,
                        "failed": verdict.failed,
                        "detail": verdict.detail,
                        "counterexample": verdict.counterexample and vars(verdict.counterexample),
                        "proof": {name: vars(finding) for name, finding in findings.items()},
                    }
                )
            )
        )
    elif verdict.accepted:
        click.echo(f"accepted: {verdict.detail}")
        for line in _known(findings):
            click.echo(line)
    else:
        click.echo(f"rejected: {verdict.failed}: {verdict.detail}")
        for line in _table(verdict):
            click.echo(line)
    if not verdict.accepted:
        raise SystemExit(1)


def _known(findings: Mapping[str, Finding]) -> Iterator[str]:
    """A line for each property that predictions have a part in, and what has been proved of it."""
    for name in PROPERTIES[1:]:
        finding = findings.get(name)
        if finding is None or finding.status == SAMPLED:
            yield f"  {name:<18}{SAMPLED}"
        elif finding.counterexample is None:
            yield f"  {name:<18}{finding.status} for {finding.over}"
        else:
            place = ", ".join(f"{key} = {x:.6g}" for key, x in finding.counterexample.items())
            yield f"  {name:<18}{finding.status} beyond the probes, at {place}"


def _plain(data: Any) -> Any:
    """JSON has no infinity and no nan: they become text."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return data if not isinstance(data, float) or math.isfinite(data) else str(data)


def _table(verdict: Verdict) -> Iterator[str]:
    """The values around the point where the property is missed."""
    example = verdict.counterexample
    if example is None:
        return
    yield f"{'':2}{example.axis:>18} {'loss':>14} {'slope':>14}"
    for i in range(max(0, example.at - 2), min(len(example.positions), example.at + 3)):
        yield (
            f"{'>' if i == example.at else '':2}{example.positions[i]:18.4g} "
            f"{example.values[i]:14.6g} "
            f"{example.slopes[i]:14.6g}"
        )
    yield "  there: " + ", ".join(
        f"{name} = {' '.join(f'{number:.6g}' for number in numbers)}"
        for name, numbers in example.variables.items()
    )


def _plot(loss: Expression, verdict: Verdict, screener: Screener, path: Path) -> None:
    """The sweep where the loss fails; or, if it does not, all sweeps of the largest block."""
    from matplotlib.figure import Figure

    from cse_autoloss.drawing import save

    lines = [verdict.counterexample] if verdict.counterexample else screener.traces(loss)
    if not lines:
        raise click.ClickException(f"--plot {path}: there is nothing to draw: {verdict.detail}")
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for line in lines:
        upper.plot(line.positions, line.values, marker=".", linewidth=0.8)
        lower.plot(line.positions, line.slopes, marker=".", linewidth=0.8)
        if not verdict.accepted:
            for axes in (upper, lower):
                axes.axvline(line.positions[line.at], color="tab:red", linestyle="--")
    upper.set_ylabel("loss")
    lower.set_ylabel("slope")
    lower.set_xlabel(lines[0].axis)
    what = (
        f"rejected: {verdict.failed}\n{lines[0].sweep}"
        if verdict.failed
        else f"accepted; {len(lines)} sweeps"
    )
    upper.set_title(f"{str(loss)[:100]}\n{what}", fontsize=9)
    try:
        save(figure, path)
    except (OSError, UserError) as error:
        raise UserError(f"--plot {path}: {error}") from None


@click.command()
@SPACE
@click.option(
    "--n",
    "count",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Random candidates.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--depths",
    type=(int, int),
    default=(2, 6),
    show_default=True,
    help="Lowest and highest depth limit of a tree.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=BATCH_SIZE,
    show_default=True,
    help="Candidates that share a graph; bounds memory, changes no result.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes, through Ray; without it, this one."
)
@click.option(
    "--output",
    type=Output(),
    help="File for the survivors' texts, one a line; survivors-SPACE-SEED.txt where absent.",
)
@JSON
def screen(
    space: str,
    count: int,
    seed: int,
    depths: tuple[int, int],
    batch_size: int,
    workers: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Generate and screen many random losses. For a seed the result is the same with any number of
    workers."""
    language = load_space(space)
    output = output or Path(f"survivors-{language.name}-{seed}.txt")
    if not output.parent.is_dir():
        raise click.BadParameter(f"no folder {output.parent}", param_hint="--output")
    if not 0 <= depths[0] <= depths[1] <= MAX_GROWN_DEPTH:
        raise click.BadParameter(
            f"expected 0 <= LOWEST <= HIGHEST <= {MAX_GROWN_DEPTH}, found {depths[0]} {depths[1]}",
            param_hint="--depths",
        )
    result = sample(language, count, seed, depths, batch_size, workers)
    output.write_text("".join(f"{text}\n" for text in result.survivors), encoding="utf-8")
    rate = result.generated / result.seconds
    if as_json:
        click.echo(
            json.dumps(
                {
                    "space": language.origin,
                    "seed": seed,
                    "candidates_per_second": rate,
                    "generated": result.generated,
                    "unique": result.unique,
                    "rejected": result.rejected,
                    "survivors": len(result.survivors),
                    "output": str(output),
                }
            )
        )
        return
    click.echo(
        f"{result.generated:,} candidates in {result.seconds:.1f} s: {rate:,.0f} a second; "
        f"{result.unique:,} unique"
    )
    for name, number in result.rejected.items():
        click.echo(f"  {name:16} rejects {number / result.unique:8.3%}")
    click.echo(
        f"{len(result.survivors):,} survivors ({len(result.survivors) / result.unique:.3%}), "
        f"written to {output}"
    )
