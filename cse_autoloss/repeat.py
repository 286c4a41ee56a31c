"""A trial of a run, trained once more outside the search: same losses, weights, learning rate,
seed, start and schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from cse_autoloss.config import parse_config
from cse_autoloss.journal import Journal
from cse_autoloss.trial import ConfigError, TrialResult, load_trainer
from cse_autoloss.trust import check_trust

_CHANCE = ("host", "seed")  # of a provenance: what differs without a training being another


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A trial's result as the run has it, and as it came out now."""

    key: str
    recorded: TrialResult
    now: TrialResult

    @property
    def same(self) -> bool:
        """Whether every metric, the loss weights and the whole curve are equal to the digit."""
        return all(
            getattr(self.recorded, name) == getattr(self.now, name)
            for name in ("mAP", "metrics", "curve", "loss_weights", "failure")
        )

    @property
    def changed(self) -> dict[str, tuple[object, object]]:
        """What the numbers depend on that is not what it was: name to then and now."""
        then, now = self.recorded.provenance, self.now.provenance
        return {
            name: (then[name], now.get(name))
            for name in then
            if name not in _CHANCE and then[name] != now.get(name)
        }


def repeat(
    folder: str | Path,
    key: str,
    progress: Callable[[int, int], None] | None = None,
    trust: bool = False,
) -> Repeated:
    """Train a finished trial of a run again, in this process.

    Args:
        folder: the run's.
        key: the trial's, as ``cse-search report`` and the journal have it, such as ``full-12-0``.

    Raises:
        ConfigError: no such run or trial, it was trained by several processes together, or the run
            was made elsewhere and is not to be trusted.
    """
    journal = Journal.read(folder)
    check_trust(journal, trust)
    rows = {row.trial.key: row for row in journal.trials(finished=True)}
    if key not in rows:
        raise ConfigError(
            f"--trial {folder}:{key}: the run has no finished trial {key!r}; it has "
            f"{len(rows)}: {', '.join(list(rows)[:4])}{', ...' if len(rows) > 4 else ''}"
        )
    row, config = rows[key], parse_config(journal["config"])
    if config.cluster.processes > 1:
        raise ConfigError(
            f"--trial {folder}:{key}: was trained by {config.cluster.processes} processes "
            "together, whose random draws one process does not have"
        )
    trainer = load_trainer(config.detector["trainer"])(config.detector, journal.prepared or b"")
    trial = dataclasses.replace(row.trial, time_limit=None)
    assert row.result is not None, "the trial is finished"
    return Repeated(key, row.result, trainer.train(trial, progress))
