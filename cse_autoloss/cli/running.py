"""Commands on runs: run, resume, status, report, export."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console

from cse_autoloss.cli.output import Output
from cse_autoloss.config import RESUMABLE, preset_names, read_config
from cse_autoloss.journal import Journal
from cse_autoloss.run_folder import unreadable
from cse_autoloss.trust import ADVICE, reading

RUN = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
TRUST = click.option(
    "--trust", is_flag=True, help="Import what RUN names although it was not made here."
)


@contextmanager
def opened(folder: Path, trust: bool = False) -> Iterator[tuple[Journal, bool]]:
    """A run's journal, to look at, and whether code that it names may be imported."""
    journal = Journal.read(folder)
    try:
        with reading(journal, trust) as own:
            yield journal, own
    except sqlite3.DatabaseError as error:
        raise unreadable(folder, error) from error
    finally:
        journal.close()


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--preset", help=f"A configuration that comes with the package: {', '.join(preset_names())}."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key: search.population=50. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run's folder; runs/NAME-DATE-TIME where absent.",
)
@click.option(
    "--data",
    help="A data set's path, embedded, or config (what the detector's config names). Short for "
    "--set detector.data=...",
)
@click.option("--address", help="A Ray cluster to join. Short for --set cluster.address=...")
@click.option("--seed", type=int, help="Short for --set seed=...")
@click.option("--from-scratch", is_flag=True, help="Leave the known losses out of the population.")
def run(
    config: Path | None,
    preset: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    data: str | None,
    address: str | None,
    seed: int | None,
    from_scratch: bool,
) -> None:
    """Search a loss: with a run's YAML file CONFIG, or a --preset."""
    if (config is None) == (preset is None):
        raise click.UsageError(
            f"give a run's YAML file or --preset {'|'.join(preset_names())}, one of the two"
        )
    shorts = {
        "detector.data": data,
        "cluster.address": address,
        "seed": seed,
        "search.from_scratch": from_scratch or None,
    }
    settings += tuple(
        f"{key}={json.dumps(value)}" for key, value in shorts.items() if value is not None
    )
    parsed = read_config(config, preset, settings)
    name = preset or (config.stem if config else "run")
    folder = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else out
    if folder == Path():
        raise click.BadParameter("an empty path", param_hint="--out")
    from cse_autoloss.display import RunConsole
    from cse_autoloss.run import start

    _drive(folder, lambda: start(parsed, folder, RunConsole()))


@click.command()
@RUN
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help=f"Change a key of {', '.join(RESUMABLE)}: budget.trials=500. Repeatable.",
)
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Go on although a space, the data, the detector or a package has changed since.",
)
@TRUST
def resume(folder: Path, settings: tuple[str, ...], accept_changes: bool, trust: bool) -> None:
    """Go on with RUN after it was stopped or killed; or after it finished, with more to do."""
    from cse_autoloss.display import RunConsole
    from cse_autoloss.run import resume as resume_run

    _drive(folder, lambda: resume_run(folder, RunConsole(), settings, accept_changes, trust))


def _drive(folder: Path, action: Callable[[], None]) -> None:
    from cse_autoloss.run import Stopped, stopping

    try:
        with stopping():
            action()
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except sqlite3.DatabaseError as error:
        raise unreadable(folder, error) from error


@click.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def status(folder: Path, as_json: bool) -> None:
    """How RUN stands; also while it goes on."""
    from cse_autoloss.caveats import caveats
    from cse_autoloss.display import comparison_table, panel
    from cse_autoloss.status import read_status

    with opened(folder) as (journal, _):
        now = read_status(journal)
    if as_json:
        click.echo(json.dumps(now.to_dict()))
        return
    console = Console()
    console.print(panel(now))
    if now.comparison:
        console.print(comparison_table(now.comparison))
        for caveat in caveats(now.comparison):
            console.print(caveat, highlight=False, soft_wrap=True, markup=False)


@click.command()
@RUN
@click.option("--out", type=Output(dir_okay=True), help="Folder; RUN itself where absent.")
@TRUST
def report(folder: Path, out: Path | None, trust: bool) -> None:
    """Write RUN's report: a page with its tables, the found formulas, and pictures."""
    from cse_autoloss.report import CONFIG, write_report

    with opened(folder, trust) as (journal, own):
        paths = write_report(journal, own, out)
        for path in paths:
            click.echo(f"wrote {path}")
        names = {path.name for path in paths}
        if not own:
            click.echo(f"not {CONFIG}: {folder} was not made here; {ADVICE}", err=True)
        elif CONFIG not in names and any(name.startswith("best_") for name in names):
            click.echo(f"not {CONFIG}: report.md says why", err=True)


@click.command()
@click.argument(
    "folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Any that is free, at 0.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
def watch(folders: tuple[Path, ...], port: int, opens: bool) -> None:
    """Serve the pages of RUNs on this machine, side by side, while the runs go on."""
    from cse_autoloss.page.watch import WatchServer

    with ExitStack() as runs, WatchServer(folders, port) as server:
        for folder in folders:
            runs.enter_context(opened(folder))  # refuses what is no run
        click.echo(
            f"{server.url}\n(on another machine: ssh -L {server.server_address[1]}:"
            f"127.0.0.1:{server.server_address[1]} HOST; Ctrl-C ends it)"
        )
        if opens:
            click.launch(server.url)
        server.serve_forever()


@click.command()
@RUN
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="1 is the best that the run found.",
)
@click.option(
    "-o",
    "--output",
    type=Output(dir_okay=True),
    required=True,
    help="The config to write (.py).",
)
@click.option(
    "--config",
    "base",
    type=click.Path(exists=True, dir_okay=False),
    help="Your own MMDetection config to put the loss into.",
)
@click.option(
    "--target",
    help="What to write for: mmdet2 (the default) or mmdet3, or torch: the PyTorch modules alone.",
)
@TRUST
@click.option(
    "--no-check", is_flag=True, help="Write the config without a forward pass that tries it."
)
def export(
    folder: Path,
    rank: int,
    output: Path,
    base: str | None,
    target: str | None,
    trust: bool,
    no_check: bool,
) -> None:
    """Write a found loss as an MMDetection config, and as a plain PyTorch module beside it."""
    from cse_autoloss.export import export_run

    with opened(folder, trust) as (journal, _):
        for path in export_run(journal, output, rank, base, target, not no_check):
            click.echo(f"wrote {path}")
