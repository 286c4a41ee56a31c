"""A found loss, handed back: as an MMDetection config that trains, and as plain PyTorch modules
without dependencies."""

from __future__ import annotations

import os
from pathlib import Path

from cse_autoloss.config import parse_config
from cse_autoloss.journal import Candidate, Journal, TrialRow, found_label
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.standalone import CLASS_NAMES, standalone_module
from cse_autoloss.status import read_comparison
from cse_autoloss.trial import ConfigError, Found, load_trainer


def ranking(journal: Journal, count: int = -1) -> list[Candidate]:
    """Found candidates, best first: those of the comparison by their mean on val there, in which a
    failed training counts as 0, then as the stages before ranked them."""
    return journal.best(Ladder.of(parse_config(journal["config"]).stages).closing, count)


def found(journal: Journal, rank: int = 1) -> Found:
    """The found loss of a rank (from 1), with everything that is known of how it was measured.

    Raises:
        ConfigError: if the run has found fewer.
    """
    candidates = ranking(journal, rank)
    if rank > len(candidates):
        raise ConfigError(
            f"--rank {rank}: {journal.folder} has found {len(candidates)} trained losses so far"
        )
    candidate = candidates[rank - 1]
    row = _measured(journal, candidate)
    compared = [
        entry for entry in read_comparison(journal) if entry.label == found_label(candidate)
    ]
    provenance = {
        "run": str(journal.folder),
        "candidate": candidate.id,
        "rank": rank,
        "mAP on val": candidate.fitness,
        "stage": row.stage,
        "seed": row.trial.seed,
        "steps": row.result.steps,
        "mAP on fresh seeds": {"val": list(compared[0].val), "test": list(compared[0].test)}
        if compared
        else None,
        **row.result.provenance,
    }
    return Found(
        candidate.losses,
        {branch: journal["spaces"][branch] for branch in candidate.losses},
        row.result.loss_weights,
        provenance,
        str(journal.prepared_path.resolve()) if journal.prepared else None,
        row.trial.lr_scale,
    )


def _measured(journal: Journal, candidate: Candidate) -> TrialRow:
    """The first training of a candidate at the last stage that it took part in, of those that did
    not fail."""
    ladder = Ladder.of(parse_config(journal["config"]).stages)
    for stage in (*reversed(ladder.closing), ladder.fitness):
        for row in journal.trials_of(candidate.id, stage):
            if row.result and row.result.mAP is not None:
                return row
    raise ConfigError(f"{found_label(candidate)}: none of its trainings has come to anything")


def export_run(
    journal: Journal,
    output: Path,
    rank: int = 1,
    base: str | None = None,
    target: str = "mmdet2",
    check: bool = True,
) -> list[Path]:
    """Write the config to ``output`` and each loss as a plain PyTorch file beside it
    (``<name>_cls.py``, ``<name>_reg.py``).

    Returns:
        The paths written.

    Raises:
        ConfigError: if there is no such rank, the base config's heads cannot take the losses, or
            ``check`` finds that the written config does not train.
    """
    config = parse_config(journal["config"])
    loss = found(journal, rank)
    texts = load_trainer(config.detector["trainer"]).export(
        config.detector, loss, base, target, output.stem, check
    )
    files = {output.with_name(name): text for name, text in texts.items()}
    for branch, expression in loss.losses.items():
        space = load_space(loss.spaces[branch])
        files[output.with_name(f"{output.stem}_{branch}.py")] = standalone_module(
            space.expression(expression), space, CLASS_NAMES[branch], loss.loss_weights[branch]
        )
    for path, content in files.items():
        write_text(path, content)
    return list(files)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
