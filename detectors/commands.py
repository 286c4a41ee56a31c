"""Commands of ``cse-search`` that belong to the detectors' side."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

import click
from click.core import ParameterSource

from cse_autoloss.cli.output import Output
from cse_autoloss.files import write_whole
from cse_autoloss.trial import ConfigError


class _Options(click.Command):
    """A command whose ``--cfg-options`` takes any number of KEY=VALUE, as mmdet's scripts do."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for arg in args:
            if arg in ("--cfg-options", "--cfg_options"):
                taking = True
            elif taking and "=" in arg and not arg.startswith("-"):
                spread += ["--cfg-options", arg]
            else:
                taking = False
                spread.append(arg)
        return super().parse_args(context, spread)


@click.command(cls=_Options)
@click.argument("config", required=False)
@click.option(
    "--trial",
    metavar="RUN:KEY",
    help="In place of CONFIG: a finished trial of a run, to be trained again exactly as it was.",
)
@click.option(
    "--loss-cls",
    "--loss_cls",
    metavar="NAME|EXPR",
    help="Classification loss; 'default' is mmdet's own.",
)
@click.option(
    "--loss-reg",
    "--loss_reg",
    metavar="NAME|EXPR",
    help="Regression loss; 'default' is mmdet's own.",
)
@click.option(
    "--data",
    help="embedded, config, or a data set's path; where absent, a proxy's, or the config's own as "
    "mmdet reads it.",
)
@click.option(
    "--cfg-options",
    "--cfg_options",
    "changes",
    multiple=True,
    metavar="KEY=VALUE...",
    help="Changes of the config, made last, as in mmdet.",
)
@click.option(
    "--work-dir",
    "--work_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="For logs and checkpoints; work_dirs/CONFIG where absent.",
)
@click.option(
    "--resume-from",
    "--resume_from",
    type=click.Path(path_type=Path),
    help="A checkpoint to go on from.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--launcher",
    type=click.Choice(["none", "pytorch"]),
    help="pytorch: one of the processes that torchrun has started; found out where absent.",
)
@click.option(
    "--no-validate", "--no_validate", is_flag=True, help="Do not measure mAP during the training."
)
@click.option(
    "--trust", is_flag=True, help="Repeat a --trial of a run that was not made here, code and all."
)
def train(
    config: str | None,
    trial: str | None,
    loss_cls: str | None,
    loss_reg: str | None,
    data: str | None,
    changes: tuple[str, ...],
    work_dir: Path | None,
    resume_from: Path | None,
    seed: int,
    launcher: str | None,
    no_validate: bool,
    trust: bool,
) -> None:
    """Train the detector CONFIG, a name (faster_rcnn_r50, atss_proxy) or an mmdet config's path,
    with any losses; or repeat a --trial of a run."""
    if (config is None) == (trial is None):
        raise click.UsageError("give CONFIG or --trial RUN:KEY, one of the two")
    if trial is not None:
        given = click.get_current_context().get_parameter_source
        for name in ("loss_cls", "loss_reg", "data", "changes", "work_dir", "resume_from", "seed"):
            if given(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(
                    "--trial repeats a training as it was; it takes no other option"
                )
        _repeat(trial, trust)
        return
    from detectors.train import Training
    from detectors.train import train as start

    losses = {
        branch: text for branch, text in (("cls", loss_cls), ("reg", loss_reg)) if text is not None
    }
    launcher = launcher or ("pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none")
    folder = start(
        Training(
            config,
            losses,
            data,
            dict(_change(text) for text in changes),
            work_dir,
            resume_from,
            seed,
            launcher,
            not no_validate,
        )
    )
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"logs and checkpoints are in {folder}")


def _repeat(name: str, trust: bool) -> None:
    from cse_autoloss.repeat import repeat

    folder, colon, key = name.rpartition(":")
    if not colon:
        raise ConfigError(f"--trial {name}: expected RUN:KEY, such as runs/mine:full-12-0")
    done = repeat(folder, key, trust=trust)
    then, now = done.recorded, done.now
    for metric in sorted({*then.metrics, *now.metrics}):
        click.echo(
            f"{metric}: {then.metrics.get(metric)} in the run, {now.metrics.get(metric)} now"
        )
    for result, when in ((then, "in the run"), (now, "now")):
        if result.failure:
            click.echo(f"failed {when}: {result.failure}")
    if done.same:
        click.echo(f"{key}: repeated to the digit, its curve and loss weights too")
        return
    for what, (before, after) in done.changed.items():
        click.echo(f"{what}: {before} in the run, {after} now")
    raise click.ClickException(f"{key}: its numbers are not those of the run")


@click.command(cls=_Options)
@click.argument("config")
@click.option("--data", help="What it will be searched on, as --data of run.")
@click.option(
    "-o",
    "--output",
    type=Output(),
    required=True,
    help="The config to write (.py).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    help="That a trial may take here.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="A GPU if there is one.")
@click.option(
    "--cfg-options",
    "--cfg_options",
    "changes",
    multiple=True,
    metavar="KEY=VALUE...",
    help="Changes of the config, made first.",
)
def proxy(
    config: str,
    data: str | None,
    output: Path,
    seconds: float,
    device: str | None,
    changes: tuple[str, ...],
) -> None:
    """Make a trial out of CONFIG, any mmdet config: images and steps for the time that a trial may
    take here, start weights, and a table of what was measured."""
    from detectors.config_files import read_config
    from detectors.proxy import make

    read = read_config(config, "CONFIG")
    read.merge_from_dict(dict(_change(text) for text in changes))
    options = {"data": data, "device": device}
    made = make(read, options, seconds, lambda line: click.echo(line, err=True))
    write_whole(output, made.text().encode())
    for name, value in made.rows():
        click.echo(f"{name:20} {value}")
    for note in made.notes:
        click.echo(note)
    setting = quote(f"detector.config={output}")
    click.echo(f"wrote {output}: cse-search run --preset standard --set {setting}")


@click.command()
@click.argument(
    "first", metavar="WORK_DIR_A", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.argument(
    "second", metavar="WORK_DIR_B", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "-o",
    "--output",
    type=Output(),
    default=Path("compare.png"),
    show_default=True,
    help="The picture: .png, .svg, .pdf.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="How many of the val split are shown.",
)
@click.option(
    "--score",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Detections below it are not drawn.",
)
def compare(first: Path, second: Path, output: Path, images: int, score: float) -> None:
    """Two trainings side by side: curves, and the detections of their last checkpoints beside the
    ground truth."""
    from detectors.compare import compare as draw

    for run in draw(first, second, output, images, score):
        losses, measured = run.curves.loss, run.curves.mAP
        best = (
            f"best mAP {max(value for _, value in measured):.3f}"
            if measured
            else "mAP was not measured"
        )
        click.echo(
            f"{run.folder}: last loss {losses[-1][1]:.3f}, {best}"
            if losses
            else f"{run.folder}: nothing logged"
        )
    click.echo(f"{output} written")


def _change(text: str) -> tuple[str, object]:
    """A ``KEY=VALUE`` as mmdet's ``--cfg-options`` reads it: numbers, true, false, none, lists,
    tuples; else text."""
    from mmcv import DictAction

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--cfg-options {text}: expected KEY=VALUE, such as optimizer.lr=0.01")
    return key, DictAction._parse_iterable(value)
