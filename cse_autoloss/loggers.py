"""A run, told to what people look at: TensorBoard, MLflow, or a class of their own.

    log: [tensorboard]     # in the run's YAML; also mlflow, or "package.module:Class"

A logger is told of each training once it stands in the journal, which stays the truth: a logger
that fails is left out from then on, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cse_autoloss.journal import Journal, TrialRow
from cse_autoloss.named import load_class
from cse_autoloss.trial import ConfigError

NAMES = ("tensorboard", "mlflow")


class RunLogger(Protocol):
    """What a run is told to.

    Args:
        folder: the run's.
        config: the run's configuration, as plain data.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None: ...

    def training(self, number: int, row: TrialRow, best: float | None) -> None:
        """A training has ended.

        Args:
            number: of all that have, from 1.
            row: stage, candidate, losses and result.
            best: the best mAP on val so far at that stage, or None before the first.
        """

    def close(self) -> None: ...


def load_logger(name: str) -> type[RunLogger]:
    """The logger of a name, or the class named ``"package.module:Class"``.

    Raises:
        ConfigError: if there is none, or what it needs is not installed.
    """
    known: dict[str, type[RunLogger]] = {"tensorboard": TensorBoardLogger, "mlflow": MLflowLogger}
    if name in known:
        needs = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}[name]
        try:
            importlib.import_module(needs)
        except ImportError as error:
            raise ConfigError(f"log: {name} is not installed: pip install {name}") from error
        return known[name]
    if ":" not in name:
        raise ConfigError(
            f"log: {name!r} is neither {' nor '.join(NAMES)} nor of the form 'package.module:Class'"
        )
    return load_class(name, "log")


@contextlib.contextmanager
def logging(
    journal: Journal, names: Sequence[str], config: Mapping[str, Any]
) -> Iterator[Callable[[], None]]:
    """Tell loggers of what this driver trains; yields what is to be called again and again."""
    loggers = {name: load_logger(name)(journal.folder, config) for name in names}
    told = journal["driven"] or 0.0
    number = sum(done for done, _ in journal.counts().values())
    best = journal.bests()

    def tell() -> None:
        nonlocal told, number
        if not loggers:
            return
        for row in journal.ended_since(told):
            number += 1
            mAP = row.result.mAP if row.result else None
            if mAP is not None:
                best[row.stage] = max(best.get(row.stage, mAP), mAP)
            for name, logger in list(loggers.items()):
                try:
                    logger.training(number, row, best.get(row.stage))
                except Exception as error:  # whatever it is, no training is worth less for it
                    warnings.warn(f"log: {name} failed and is left out: {error}", stacklevel=2)
                    del loggers[name]
        told = journal["driven"] or 0.0

    try:
        yield tell
    finally:
        with contextlib.suppress(ConfigError):  # the journal's folder may be what is gone
            tell()
        for logger in loggers.values():
            with contextlib.suppress(Exception):
                logger.close()


def _metrics(row: TrialRow, best: float | None) -> dict[str, float]:
    """Name to value of what a training measured."""
    if row.result is None or row.result.mAP is None:
        return {f"{row.stage}/failed": 1.0}
    measured = {f"{row.stage}/{name}": value for name, value in row.result.metrics.items()}
    return measured | ({} if best is None else {f"{row.stage}/best": best})


class TensorBoardLogger:
    """Scalars by training, and the losses as text, under ``tensorboard`` in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        lines = "\n".join(f"    {key}: {value}" for key, value in _flat(config).items())
        self._writer.add_text("configuration", lines)

    def training(self, number: int, row: TrialRow, best: float | None) -> None:
        for name, value in _metrics(row, best).items():
            self._writer.add_scalar(name, value, number)
        losses = "\n\n".join(f"{branch}: `{text}`" for branch, text in row.trial.losses.items())
        self._writer.add_text(f"{row.stage}/losses", f"{row.trial.key}\n\n{losses}", number)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflowLogger:
    """One MLflow run for a search, in the experiment ``cse_autoloss``; where it is kept is MLflow's
    to say (``MLFLOW_TRACKING_URI``)."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name("cse_autoloss")
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment("cse_autoloss")
        )
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        for key, value in _flat(config).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def training(self, number: int, row: TrialRow, best: float | None) -> None:
        for name, value in _metrics(row, best).items():
            self._client.log_metric(self._run, name, value, step=number)
        self._client.log_dict(
            self._run, dict(row.trial.losses), f"losses/{number:05}-{row.stage}.json"
        )

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
