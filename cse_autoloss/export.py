"""A found loss, handed back: as an MMDetection config that trains, and as plain PyTorch modules
without dependencies."""

from __future__ import annotations

from pathlib import Path

from cse_autoloss.config import parse_config
from cse_autoloss.files import write_whole
from cse_autoloss.journal import Candidate, Journal, TrialRow, found_label
from cse_autoloss.notes import notes
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder
from cse_autoloss.standalone import CLASS_NAMES, standalone_module
from cse_autoloss.status import read_comparison
from cse_autoloss.trial import ConfigError, Found, TrialResult, load_trainer

TORCH = "torch"  # the target that is the losses alone


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
    row, result = _measured(journal, candidate)
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
        "steps": result.steps,
        "mAP on fresh seeds": {"val": list(compared[0].val), "test": list(compared[0].test)}
        if compared
        else None,
        **result.provenance,
    }
    # Texts of a journal become code here: only as what they are parsed as.
    losses = {
        branch: str(load_space(journal["spaces"][branch]).expression(text))
        for branch, text in candidate.losses.items()
    }
    return Found(
        losses,
        {branch: journal["spaces"][branch] for branch in candidate.losses},
        result.loss_weights,
        provenance,
        str(journal.prepared_path.resolve()) if journal["prepared digest"] else None,
        row.trial.lr_scale,
        result.steps if row.trial.task == "full" else None,
        {branch: row.trial.scale.get(branch, 1.0) for branch in candidate.losses},
    )


def _measured(journal: Journal, candidate: Candidate) -> tuple[TrialRow, TrialResult]:
    """The first training of a candidate at the last stage that it took part in, of those that did
    not fail."""
    ladder = Ladder.of(parse_config(journal["config"]).stages)
    for stage in (*reversed(ladder.closing), ladder.fitness):
        for row in journal.trials_of(candidate.id, stage):
            if row.result and row.result.mAP is not None:
                return row, row.result
    raise ConfigError(f"{found_label(candidate)}: none of its trainings has come to anything")


def export_run(
    journal: Journal,
    output: Path,
    rank: int = 1,
    base: str | None = None,
    target: str | None = None,
    check: bool = True,
) -> list[Path]:
    """Write the config to ``output`` and each loss as a plain PyTorch file beside it
    (``<name>_cls.py``, ``<name>_reg.py``).

    Args:
        base: the user's own config to put the losses into.
        target: one of the trainer's (its first one where None), or ``"torch"``: the PyTorch files
            alone, for which nothing that the run names is imported.

    Returns:
        The paths written.

    Raises:
        ConfigError: if there is no such rank, the base config's heads cannot take the losses, or
            ``check`` finds that the written config does not train.
    """
    config = parse_config(journal["config"])
    if output.suffix != ".py" or output.is_dir():
        better = output / "best.py" if output.is_dir() else output.with_suffix(".py")
        raise ConfigError(f"--output {output}: names the file to write, such as {better}")
    if base is not None and target == TORCH:
        raise ConfigError(f"--config {base}: --target {TORCH} writes PyTorch modules and no config")
    loss = found(journal, rank)
    texts: dict[str, str] = {}
    if target != TORCH:
        _ = journal.prepared  # what the config starts from is there, and is what the run made
        trainer = load_trainer(config.detector["trainer"])
        if target not in (None, *trainer.targets):
            raise ConfigError(
                f"--target {target}: expected one of {', '.join((*trainer.targets, TORCH))}"
            )
        texts = trainer.export(
            config.detector, loss, base, target or trainer.targets[0], output.stem, check
        )
    files = {output.with_name(name): text for name, text in texts.items()}
    for branch, expression in loss.losses.items():
        space = load_space(loss.spaces[branch])
        files[output.with_name(f"{output.stem}_{branch}.py")] = standalone_module(
            space.expression(expression),
            space,
            CLASS_NAMES[branch],
            loss.loss_weights[branch],
            notes=notes(loss, branch),
        )
    for path, content in files.items():
        write_whole(path, content)
    return list(files)
