"""A run from start to end: check everything, search, and write down what came of it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from cse_autoloss.breeder import ProcessBreeder
from cse_autoloss.caveats import caveats
from cse_autoloss.cluster import Cluster, ClusterError
from cse_autoloss.comparison import compared, read_others
from cse_autoloss.config import Config, change_config, parse_config
from cse_autoloss.display import comparison_table, duration, watching
from cse_autoloss.earlier import read_earlier, told
from cse_autoloss.errors import SearchError
from cse_autoloss.inputs import EXTRAS, needs
from cse_autoloss.journal import Journal
from cse_autoloss.loggers import load_logger, logging
from cse_autoloss.page.detections import keep_detections
from cse_autoloss.pins import changes, pins
from cse_autoloss.rankers import load_ranker
from cse_autoloss.ray_session import check_machine
from cse_autoloss.report import write_report
from cse_autoloss.run_folder import network_file_system
from cse_autoloss.search import Search
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.status import read_status
from cse_autoloss.strategies import load_strategy
from cse_autoloss.text import printable
from cse_autoloss.trial import ConfigError, Trainer, load_trainer
from cse_autoloss.trust import check_trust, sign

PACKAGES = ("cse-autoloss", "torch", "numpy", "ray")


def check(config: Config, searched: bool = True) -> dict[str, Any]:
    """Everything that can be wrong before anything starts; formulas before data.

    Args:
        searched: whether losses with any variable of their spaces will train, so that all of these
            have to be there.

    Returns:
        What the trainer says of its options, with ``spaces`` as the run will use them.

    Raises:
        ConfigError, SpaceError, ClusterError: one line that names the key and what would be right.
    """
    check_machine(config.cluster)
    own = trainer_of(config).spaces(config.detector)
    spaces = _origins(config, own)
    read_others(config, spaces)
    checked = trainer_of(config).check(config.detector)
    if config.detector.get("device") == "cuda" and not config.cluster.num_gpus:
        raise ConfigError(
            "detector.device: cuda, and workers see no GPU with cluster.num_gpus=0; "
            "--set cluster.num_gpus=1 gives each one"
        )
    for branch in {*config.search.branches, *config.search.spaces} - own.keys():
        raise ConfigError(
            f"search.branch: {checked.get('refused', {}).get(branch, branch)}; the others can be: "
            f"search.branch={' or '.join(own)}"
        )
    for name, stage in config.stages.items() if searched else ():
        if reason := checked.get("untrainable", {}).get(stage.task):
            raise ConfigError(f"stages.{name}.task: {stage.task}: {reason}")
    for branch, origin in spaces.items():
        space, usual = load_space(origin), load_space(own[branch])
        if space.inputs != usual.inputs:
            raise ConfigError(
                f"search.spaces.{branch}: {origin} is written for {space.inputs} inputs; this "
                f"detector's losses need {usual.inputs}, as {usual.name} has"
            )
        if searched and branch in checked.get("hands", ()):
            _check_variables(space, checked["hands"][branch])
    load_strategy(config.search.strategy, config.search)
    load_ranker(config.search.ranker, config.search.ranker_settings)
    for logger in config.log:
        load_logger(logger)
    return {**checked, "spaces": spaces}


def _check_variables(space: SearchSpace, hands: Mapping[str, Collection[str]]) -> None:
    """Whether each head hands over what the space's variables take; ``hands`` says what it does."""
    for variable in space.variables:
        for missing in sorted(needs(space.inputs, [variable])):
            if EXTRAS[missing].optional:
                continue
            for head in (head for head, names in hands.items() if missing not in names):
                raise ConfigError(
                    f"search.spaces.{space.branch}: {space.origin} has the variable {variable}, "
                    f"which takes {missing} ({EXTRAS[missing].meaning}), and this detector's head "
                    f"{head} does not hand that over; a space without {variable} would do"
                )


def _adopted(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with the trial that its trainer makes of a whole training, where it can."""
    detector = trainer_of(config).adopt(config.detector, say)
    return config.model_copy(update={"detector": detector})


def spaces_of(config: Config) -> dict[str, str]:
    """Branch to the origin of the space that its formulas are written in; reads no data."""
    return _origins(config, trainer_of(config).spaces(config.detector))


def _origins(config: Config, own: Mapping[str, str]) -> dict[str, str]:
    named = (*own.items(), *config.search.spaces.items())
    return {branch: load_space(origin).origin for branch, origin in named}


def trainer_of(config: Config) -> type[Trainer]:
    name = config.detector.get("trainer")
    if not isinstance(name, str):
        raise ConfigError(
            "detector.trainer: missing; the class that trains, such as "
            "detectors.training:DetectorTrainer"
        )
    return load_trainer(name)


def absolute(config: Config) -> Config:
    """With the paths in it made absolute: a run goes on from any folder, and on any node."""
    spaces = {branch: load_space(origin).origin for branch, origin in config.search.spaces.items()}
    search = config.search.model_copy(update={"spaces": spaces})
    detector = trainer_of(config).resolve(config.detector)
    return config.model_copy(update={"search": search, "detector": detector})


def start(config: Config, folder: Path, console: Console) -> None:
    """Start a run in a new folder and see it through."""
    check_machine(config.cluster)  # this and formulas before a proxy is made, which takes minutes
    config = absolute(config)
    read_others(config, spaces_of(config))
    config = _adopted(config, lambda line: _say(console, line))
    checked, trainer = check(config), trainer_of(config)
    searched = {branch: load_space(checked["spaces"][branch]) for branch in config.search.branches}
    data = checked.get("digests", {}).get("data", "unknown")
    detector = str(config.detector.get("config"))
    earlier = read_earlier(config.search.earlier, searched, data, detector)
    was_there = folder.exists()
    journal = Journal.create(
        folder,
        {
            "config": config.model_dump(mode="json"),
            "spaces": checked["spaces"],
            "classes": checked["classes"],
            "images": checked["images"],
            "created": time.time(),
            "detector": trainer.describe(config.detector),
            "import path": os.getcwd(),
            "versions": versions(trainer),
            "pins": pins(checked, versions(trainer)),
            "earlier": earlier,
        },
    )
    with journal.step():
        sign(journal)
    images = ", ".join(f"{count} {split}" for split, count in checked["images"].items())
    _say(console, f"run {folder}: {len(checked['classes'])} classes; images: {images}")
    for note in checked.get("notes", ()):
        _say(console, note)
    if earlier:
        _say(console, told(earlier))
    if kind := network_file_system(folder):
        _say(
            console,
            f"{folder} is on a network file system ({kind}): the journal is written there "
            "without a write-ahead log, which is slower",
        )
    try:
        _drive(journal, config, console)
    except ClusterError:
        if not Journal.read(folder).trials():  # what never began is in nobody's way
            shutil.rmtree(folder)
            if was_there:
                folder.mkdir()
        raise


def resume(
    folder: Path,
    console: Console,
    settings: Sequence[str] = (),
    accept_changes: bool = False,
    trust: bool = False,
) -> None:
    """Go on with a run that was stopped or killed, or, with ``settings`` such as
    ``budget.trials=500``, that had finished.

    Raises:
        ConfigError: if what its numbers depend on has changed since, unless ``accept_changes``; if
            it was made elsewhere, unless ``trust``.
    """
    journal = Journal.resume(folder)
    check_trust(journal, trust)
    before = parse_config(journal["config"])
    config = change_config(before, settings)
    checked = check(config)
    now = pins(checked, versions(trainer_of(config)))
    if different := changes(journal["pins"], now):
        if not accept_changes:
            raise ConfigError(
                f"{folder}: changed since this run began: {'; '.join(different)}. Its new "
                "trainings could not be compared with those it has; put it back, or go on all the "
                "same with --accept-changes"
            )
        with journal.step():
            journal["pins"] = now
            journal["accepted changes"] = [*(journal["accepted changes"] or []), *different]
    comparison = Ladder.of(config.stages).comparison
    for label, losses in compared(config, journal["spaces"]).items():
        if any(
            row.label == label and row.trial.losses != losses for row in journal.trials(comparison)
        ):
            raise ConfigError(
                f"others.{label}: this run has compared other losses by that name; choose another"
            )
    done = sum(finished for finished, _ in journal.counts().values())
    _say(console, f"resuming {folder}: {done} trainings are done and stay done")
    _drive(journal, config, console)


class Stopped(KeyboardInterrupt):
    """The process was told to end, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """While this lasts, SIGTERM and SIGHUP stop a run as Ctrl-C does; a second one changes
    nothing."""

    told: list[Stopped] = []

    def stop(number: int, _frame: object) -> None:
        for other in handlers:
            signal.signal(other, signal.SIG_IGN)
        told.append(Stopped(number))
        raise told[0]

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:  # nohup has SIGHUP ignored: that stands
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:  # Ray, while it waits, makes one of any signal
        raise told[0] if told else error from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, soft_wrap=True, markup=False)


def versions(trainer: type[Trainer]) -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **trainer.versions()}


def _drive(journal: Journal, config: Config, console: Console) -> None:
    started = time.monotonic()
    before, closing = parse_config(journal["config"]), Ladder.of(config.stages).closing
    try:
        done = journal["compared"] and not journal.failed_by_machine(*closing)
        if config != before or not done:
            with (
                Cluster(config.cluster, config.detector, [journal["import path"]]) as cluster,
                watching(journal, console) as show,
                logging(journal, config.log, config.model_dump(mode="json")) as tell,
            ):

                def on_progress() -> None:
                    show()
                    tell()

                with journal.step():  # not before there is a cluster that the settings fit
                    journal["config"] = config.model_dump(mode="json")
                    journal["driver began"] = journal["driven"] or 0.0
                    journal["compared"] = False
                    sign(journal)
                    if config.budget != before.budget:
                        journal["searched"], journal["stopped"] = False, None
                with contextlib.closing(ProcessBreeder(journal.folder)) as breeder:
                    spaces = journal["spaces"]
                    Search(config, spaces, journal, cluster, breeder, on_progress).run()
        try:
            keep_detections(journal, trainer_of(config), config.detector)
        except Exception as error:  # data that is gone by now, a trainer's own: no report is lost
            _say(console, f"no detections in the report: {type(error).__name__}: {error}")
        status = read_status(journal)
        console.print(comparison_table(status.comparison))
        for caveat in caveats(status.comparison):
            _say(console, caveat)
        for path in write_report(journal, own=True):
            _say(console, f"wrote {path}")
        _say(console, f"done in {duration(time.monotonic() - started)}")
    except (KeyboardInterrupt, SearchError) as error:
        if isinstance(error, KeyboardInterrupt) or journal.counts():  # else it is not kept
            command = f"cse-search resume {quote(str(journal.folder))}"
            _say(console, f"stopped; nothing finished is lost: {command}")
        raise
    finally:
        journal.close()
