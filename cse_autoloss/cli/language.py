"""Commands on the loss language: show, losses."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cse_autoloss.canonical import canonical, known_name
from cse_autoloss.cli.output import Output
from cse_autoloss.expression import Expression
from cse_autoloss.space import KnownLoss, SearchSpace, load_space, space_names
from cse_autoloss.trial import DEFAULT_TRAINER, load_trainer

FORMATS = ("text", "sympy", "latex", "torch", "mmdet")


@click.command()
@click.argument("expression", metavar="EXPR")
@click.option(
    "--space",
    default="two_stage_cls",
    show_default=True,
    help=f"The space that EXPR is written in: {', '.join(space_names())}, or a YAML file.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Print this form alone; by default text, LaTeX and tree.",
)
@click.option(
    "--plot",
    "picture",
    type=Output(),
    help="Draw the loss and its derivative beside the known losses, and its tree, into FILE (.png, "
    ".svg, .pdf).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(
    expression: str, space: str, form: str | None, picture: Path | None, as_json: bool
) -> None:
    """A loss as text, formula, code or picture. EXPR is an expression or the name of a known
    loss."""
    language = load_space(space)
    loss = language.expression(expression)
    if picture:
        from cse_autoloss.drawing import plot

        plot(loss, language, picture)
        click.echo(f"{picture} written", err=True)
    if as_json:
        shown = {name: _form(name, loss, language) for name in ([form] if form else FORMATS[:3])}
        formula = canonical(loss, language)
        click.echo(
            json.dumps(
                {
                    "expression": str(formula),
                    "name": known_name(loss, language),
                    "space": language.origin,
                    "size": formula.size,
                    "depth": formula.depth,
                    **shown,
                }
            )
        )
    elif form:
        click.echo(_form(form, loss, language))
    elif not picture:
        from cse_autoloss.drawing import text_tree

        name = known_name(loss, language)
        click.echo(
            "\n".join(
                [
                    *([name] if name else []),
                    _form("text", loss, language),
                    "",
                    _form("latex", loss, language),
                    "",
                    text_tree(canonical(loss, language)),
                ]
            )
        )


def _form(form: str, loss: Expression, space: SearchSpace) -> str:
    formula = canonical(loss, space)
    match form:
        case "sympy":
            return _sympy_text(formula)
        case "latex":
            return formula.to_latex()
        case "torch":
            from cse_autoloss.standalone import standalone_module

            return standalone_module(loss, space)
        case "mmdet":
            return load_trainer(DEFAULT_TRAINER).snippet(str(formula), space.origin)
    return str(formula)


def _sympy_text(formula: Expression, simplify: bool = True) -> str:
    """In sympy's notation, with Euler's number as exp(1): its own E is a variable of boxes."""
    from sympy.printing.str import StrPrinter

    class Printer(StrPrinter):
        def _print_Exp1(self, number: object) -> str:
            return "exp(1)"

    return Printer().doprint(formula.to_sympy(simplify))


@click.command()
@click.option("--space", help="Only this space; by default all that come with the package.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def losses(space: str | None, as_json: bool) -> None:
    """The known losses, and what tests hold their values and gradients against. Every command takes
    their names in place of an expression."""
    spaces = [load_space(name) for name in ([space] if space else space_names())]
    listed: dict[tuple[str, str], tuple[SearchSpace, KnownLoss]] = {}
    for language in spaces:  # a space that builds on another has its losses, too: they stand once
        for loss in language.losses.values():
            listed.setdefault((loss.name, str(loss.expression)), (language, loss))
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "space": language.origin,
                        "name": loss.name,
                        "expression": str(canonical(loss.expression, language)),
                        "released": str(loss.expression),
                        "sympy": _sympy_text(loss.expression),
                        "source": loss.source,
                        "reference": loss.reference,
                        "keeps_released_numbers": loss.released,
                    }
                    for language, loss in listed.values()
                ]
            )
        )
        return
    for language in spaces:
        own = [loss for owner, loss in listed.values() if owner is language]
        if own:
            click.secho(language.name, bold=True)
        used = frozenset[str]().union(*(loss.expression.variables for loss in own))
        for name, meaning in language.variables.items():
            if name in used:
                click.echo(f"  {name} = {meaning}")
        for loss in own:
            equal = f"; equal to {loss.reference}" if loss.reference else ""
            click.echo(f"  {click.style(loss.name, bold=True)}: {loss.source}{equal}")
            click.echo(f"      {_sympy_text(loss.expression, simplify=False)}")
