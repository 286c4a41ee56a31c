"""The command line: ``cse-search``. Commands are imported when they are called, so ``--help`` is
quick.

The detectors' own commands (``train``, ``compare``, ``data``) live on their side and are reached by
name.
"""

from __future__ import annotations

import importlib
import sys

import click

from cse_autoloss.errors import SearchError, UserError
from cse_autoloss.text import printable

COMMANDS = {
    "run": ("cse_autoloss.cli.running:run", "Search a loss."),
    "resume": ("cse_autoloss.cli.running:resume", "Go on with a run that was stopped or killed."),
    "status": ("cse_autoloss.cli.running:status", "How a run stands; also while it goes on."),
    "report": ("cse_autoloss.cli.running:report", "Write a run's report and pictures."),
    "watch": ("cse_autoloss.cli.running:watch", "Runs in a browser, while they go on."),
    "export": (
        "cse_autoloss.cli.running:export",
        "Write a found loss as an MMDetection config and a PyTorch module.",
    ),
    "train": ("detectors.commands:train", "Train a detector with any losses."),
    "proxy": ("detectors.commands:proxy", "Make a search's trial out of any mmdet config."),
    "compare": ("detectors.commands:compare", "Two trainings side by side: curves and detections."),
    "evaluate": (
        "cse_autoloss.cli.evaluation:evaluate",
        "Judge formulas of any origin: verdict, simulation, mAP beside the default's.",
    ),
    "verify": ("cse_autoloss.cli.screening:verify", "Check one loss's convergence properties."),
    "screen": ("cse_autoloss.cli.screening:screen", "Generate and screen many random losses."),
    "show": ("cse_autoloss.cli.language:show", "A loss as text, formula, code or picture."),
    "losses": ("cse_autoloss.cli.language:losses", "The known losses, with formulas and sources."),
    "data": ("detectors.data_commands:data", "Check a data set; write the embedded one."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in :data:`COMMANDS`, with what ``--help`` says of each."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not module.startswith("detectors."):
                raise
            missing = str(error.name).partition(".")[0]
            raise UserError(
                f"{name}: needs MMDetection, and no module {missing!r} is installed; 'make setup' "
                "in a checkout installs all of it (docs/install.md)"
            ) from None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cse-autoloss")
def cli() -> None:
    """Search loss functions for object detectors."""


def main() -> None:
    """Entry point: what a user did wrong is one line on standard error and exit status 2; what
    else ends a command, such as a cluster that does not start, one with exit status 1."""
    try:
        cli(prog_name="cse-search")
    except (UserError, SearchError) as error:
        click.echo(f"cse-search: {printable(error, 2000)}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:  # a disk that is full, a folder that may not be read
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"cse-search: {printable(f'{where}{error.strerror or error}', 2000)}", err=True)
        sys.exit(1)
