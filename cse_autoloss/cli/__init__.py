"""The command line: ``cse-search``. Commands are imported when they are called, so ``--help`` is quick.

The detectors' own commands (``train``, ``compare``, ``data``) live on their side and are reached by name.
"""
from __future__ import annotations

import importlib
import sys

import click

COMMANDS = {
    "run": "cse_autoloss.cli.running:run",
    "resume": "cse_autoloss.cli.running:resume",
    "status": "cse_autoloss.cli.running:status",
    "report": "cse_autoloss.cli.running:report",
    "export": "cse_autoloss.cli.running:export",
    "verify": "cse_autoloss.cli.screening:verify",
    "screen": "cse_autoloss.cli.screening:screen",
    "show": "cse_autoloss.cli.language:show",
    "losses": "cse_autoloss.cli.language:losses",
    "data": "detectors.commands:data",
    "train": "detectors.commands:train",
    "compare": "detectors.commands:compare",
}


class LazyGroup(click.Group):
    """A group whose commands are named in :data:`COMMANDS`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cse-autoloss")
def cli() -> None:
    """Search loss functions for object detectors."""


def main() -> None:
    """Entry point: what a user did wrong is one line on standard error and exit status 2."""
    from cse_autoloss.expression import ExpressionError
    from cse_autoloss.space import SpaceError
    from cse_autoloss.trial import ConfigError

    try:
        cli(prog_name="cse-search")
    except (ConfigError, ExpressionError, SpaceError) as error:
        click.echo(f"cse-search: {error}", err=True)
        sys.exit(2)
