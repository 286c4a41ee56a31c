"""Which random losses optimise, and does verification know? Makes the labelled set and its
confusion table.

    python scripts/label_losses.py make --space reg     # draws, trains: docs/labelled/reg.csv
    python scripts/label_losses.py extend --space reg   # adds what is accepted by now
    python scripts/label_losses.py table                # the confusion, with today's tolerances
    python scripts/label_losses.py detector             # a sample on the tiny detector
    python scripts/label_losses.py heads                # more, on a detector's head: heads.csv

Candidates are drawn at random and filtered by nothing but "uses the prediction" and "is no
duplicate". Each is trained from three seeds: first the predictions themselves, by the batched
descent of ``cse_autoloss.simulation``; who gets anywhere is then trained as it would be in a
detector, by torch's autograd through ``build_loss``. Classification trains a linear layer on noisy
features, mostly background, and is measured on samples that it has not seen; regression moves boxes
of 8 to 512 pixels, some of which are beside their targets. A loss is good if the mean of the three
measures reaches what is asked for below.

The file has the first ``--random`` candidates whatever they are, and of the others those that are
good or accepted, so that rare kinds can be looked at; ``sampled`` tells them apart, and the table
weighs them accordingly.
"""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
import torch

from cse_autoloss import Expression, SearchSpace, load_space
from cse_autoloss.inputs import EXTRAS
from cse_autoloss.losses import build_loss
from cse_autoloss.screening import ACCEPTED, DUPLICATE, PROPERTIES, Screener
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.predictions import BoxBatch
from cse_autoloss.screening.properties import (
    CONVERGENCE,
    MONOTONICITY,
    NOT_FLAT,
    USES_PREDICTION,
)
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import space_names
from cse_autoloss.trial import Trial, load_trainer
from cse_autoloss.variation import Population, grow, mutate

FOLDER = Path(__file__).parent.parent / "docs" / "labelled"
SEEDS = (1, 2, 3)
STEPS = 80
# Of the descent on predictions; untrained predictions score 0.3 to 0.5
WORTH_TRAINING = {
    "cls": 0.7,
    "reg": 0.6,
}
# balanced accuracy on new samples, chance is 0.25 to 0.5; mean IoU, at the start 0.4
GOOD = {
    "cls": 0.85,
    "reg": 0.7,
}
CLASSES, FEATURES = 3, 16

torch.set_num_threads(1)


def train(expression: Expression, space: SearchSpace, seed: int) -> float:
    """Accuracy or mean IoU after training with a loss; 0 if it or its gradient becomes infinite or
    undefined."""
    loss = build_loss(expression, space)
    return (train_boxes if space.branch == "reg" else train_classifier)(loss, space, seed)


def train_classifier(loss: torch.nn.Module, space: SearchSpace, seed: int) -> float:
    rng = np.random.default_rng(seed)
    prototypes = rng.normal(size=(CLASSES + 1, FEATURES))

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = np.where(rng.random(count) < 0.6, CLASSES, rng.integers(CLASSES, size=count))
        features = prototypes[labels] + rng.normal(0, 0.5, (count, FEATURES))
        return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)

    (features, labels), (new, new_labels) = draw(96), draw(192)
    extras = {
        name: torch.tensor(EXTRAS[name].draw(rng, (labels < CLASSES).numpy(), CLASSES))
        for name in sorted(loss.needs)
    }
    one_stage = space.inputs == "one_stage"
    weight = torch.zeros(FEATURES + 1, CLASSES + (not one_stage), requires_grad=True)
    features, new = (torch.cat([f, torch.ones(len(f), 1)], 1) for f in (features, new))

    def evaluate() -> torch.Tensor:
        return loss(features @ weight, labels, **extras)

    if not descend(weight, evaluate, 0.1):
        return 0.0
    with torch.no_grad():
        logits = new @ weight
        # What a detector does with scores: a class above a half, else background.
        scores = torch.sigmoid(logits) if one_stage else logits.softmax(-1)[:, :CLASSES]
        best, found = scores.max(-1)
        # One-stage scores aim at IoUs from 0.5 to 1
        found = torch.where(best > (0.375 if one_stage else 0.5), found, CLASSES)
        right = found == new_labels
        return float(
            np.mean([right[new_labels == label].float().mean() for label in range(CLASSES + 1)])
        )


def train_boxes(loss: torch.nn.Module, space: SearchSpace, seed: int) -> float:
    batch = BoxBatch.draw(np.random.default_rng(seed), 32)
    size = torch.tensor(batch.targets, dtype=torch.float32)
    targets = torch.cat([-size / 2, size / 2], 1)
    parameters = torch.tensor(batch.initial, dtype=torch.float32, requires_grad=True)

    def boxes() -> torch.Tensor:
        centre, half = parameters[:, :2] * size, parameters[:, 2:].exp() * size / 2
        return torch.cat([centre - half, centre + half], 1)

    if not descend(parameters, lambda: loss(boxes(), targets), 0.03):
        return 0.0
    return float(batch.scores(parameters.detach().double().numpy()))


def descend(
    parameters: torch.Tensor, evaluate: Callable[[], torch.Tensor], step_size: float
) -> bool:
    """Gradient descent with normalised steps that fall to 0; False if the loss or its gradient is
    not finite."""
    for step in range(STEPS):
        value = evaluate()
        (gradient,) = torch.autograd.grad(value, parameters)
        if not bool(value.isfinite() & gradient.isfinite().all()):
            return False
        gradient = gradient / gradient.abs().max().clamp(min=1e-38)
        length = gradient.square().mean().sqrt().clamp(min=1e-38)
        with torch.no_grad():
            parameters -= step_size * (1 - step / STEPS) * gradient / length
    return True


def label(expressions: list[Expression], space: SearchSpace) -> np.ndarray:
    """Mean final measure of each loss over the seeds."""
    scores = np.mean(
        [
            [
                outcome.score if outcome.finite else 0
                for outcome in simulate_predictions(expressions, space, seed)
            ]
            for seed in SEEDS
        ],
        axis=0,
    )
    for index in np.flatnonzero(scores >= WORTH_TRAINING[space.branch]):
        scores[index] = np.mean([train(expressions[index], space, seed) for seed in SEEDS])
    return scores


@click.group()
def main() -> None:
    """Make the labelled set, or tabulate it."""


def _drawn(space: SearchSpace, draw: int) -> tuple[list[Expression], np.ndarray]:
    """Candidates that use the prediction, no two the same, and which of them are accepted."""
    report = Screener(space).screen(grow(np.random.default_rng(20261123), draw, space))
    rows = np.flatnonzero(
        (report.codes != DUPLICATE) & (report.codes != PROPERTIES.index(USES_PREDICTION))
    )
    return report.population.take(rows).expressions(), report.codes[rows] == ACCEPTED


def _write(name: str, rows: list[list[object]]) -> None:
    with open(FOLDER / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["expression", "score", "good", "sampled", "drawn"], *rows])


_SPACE = click.option("--space", "name", required=True, type=click.Choice(space_names()))
_DRAW = click.option(
    "--draw",
    default=15_000,
    show_default=True,
    help="Random trees; duplicates and those without the prediction go.",
)


@main.command()
@_SPACE
@_DRAW
@click.option(
    "--random",
    "kept",
    default=250,
    show_default=True,
    help="Candidates that are kept whatever they are.",
)
def make(name: str, draw: int, kept: int) -> None:
    """Draw, train and write a set."""
    space = load_space(name)
    expressions, accepted = _drawn(space, draw)
    scores = label(expressions, space)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for index, (expression, score) in enumerate(zip(expressions, scores)):
        good = bool(score >= GOOD[space.branch])
        if index < kept or good or accepted[index]:
            sampled = "random" if index < kept else "rare"
            rows.append([expression, f"{score:.3f}", int(good), sampled, len(expressions)])
    _write(name, rows)
    known = ", ".join(
        f"{score:.3f}"
        for score in label([loss.expression for loss in space.losses.values()], space)
    )
    good = np.mean(scores >= GOOD[space.branch])
    click.echo(
        f"{name}: {len(expressions)} candidates, {good:.3%} good; known losses score {known}"
    )


@main.command()
@_SPACE
@_DRAW
def extend(name: str, draw: int) -> None:
    """Train what was drawn, is accepted by now, and does not stand in the set yet; and add it."""
    space, rows = load_space(name), _read(name)
    there = {row["expression"] for row in rows}
    expressions, accepted = _drawn(space, draw)
    new = [
        expression
        for expression, taken in zip(expressions, accepted)
        if taken and str(expression) not in there
    ]
    added: list[list[object]] = [
        [expression, f"{score:.3f}", int(score >= GOOD[space.branch]), "rare", rows[0]["drawn"]]
        for expression, score in zip(new, label(new, space) if new else ())
    ]
    _write(name, [*(list(row.values()) for row in rows), *added])
    click.echo(f"{name}: {len(added)} more, {sum(int(row[2] == 1) for row in added)} of them good")


@main.command()
@click.option(
    "--each",
    default=1,
    show_default=True,
    help="Losses of each kind (good or not, accepted or not) and space.",
)
def detector(each: int) -> None:
    """Train a tiny detector with a sample of the two-stage sets, and write its mAP to
    detector.csv."""
    options = {
        "trainer": "detectors.training:DetectorTrainer",
        "config": "faster_rcnn_proxy",
        "data": "embedded",
    }
    trainer = load_trainer(options["trainer"])
    worker = trainer(options, trainer.prepare(options))
    with open(FOLDER / "detector.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["space", "expression", "score", "good", "accepted", "mAP", "failure"])
        for name in ("two_stage_cls", "reg"):
            space = load_space(name)
            for row, verdict in _sample(name, space, each):
                branch = {space.branch: row["expression"]}
                trial = Trial("label", branch, {space.branch: name}, task="tiny", time_limit=300)
                result = worker.train(trial)
                writer.writerow(
                    [
                        name,
                        row["expression"],
                        row["score"],
                        row["good"],
                        int(verdict),
                        result.mAP,
                        result.failure,
                    ]
                )
                file.flush()


# Space to the detector whose head is trained
HEADS = {
    "two_stage_cls": "faster_rcnn_proxy",
    "reg": "faster_rcnn_proxy",
    "one_stage_cls": "atss_proxy",
}
SHARE = 0.25  # of the steps of a head's training
TRAINS = 0.8  # of the default loss's mAP: what a loss reaches that trains a head


@main.command()
@click.option("--space", "names", multiple=True, default=HEADS)
@click.option("--each", default=12, show_default=True, help="Losses of each kind and space.")
def heads(names: tuple[str, ...], each: int) -> None:
    """Train a detector's head with the default loss, with some of each kind of the set (good or
    not, accepted or not), and with mutants of known losses, accepted and rejected; write their mAP
    to heads.csv. What stands there already is not trained again."""
    path = FOLDER / "heads.csv"
    there = (
        {(row["space"], row["expression"]) for row in _read("heads")} if path.exists() else set()
    )
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not there:
            writer.writerow(["space", "expression", "mAP", "failure"])
        for name in names:
            space = load_space(name)
            options = {"config": HEADS[name], "data": "embedded", "device": "cpu"}
            trainer = load_trainer("detectors.training:DetectorTrainer")
            worker = trainer(options, trainer.prepare(options))
            for text in ["", *_mutants(space, each), *_of_each_kind(name, space, each)]:
                if (name, text) in there:
                    continue
                losses = {space.branch: text} if text else {}
                trial = Trial("label", losses, {space.branch: name}, task="head", share=SHARE)
                result = worker.train(trial)
                writer.writerow([name, text, result.mAP, result.failure])
                file.flush()


def _of_each_kind(name: str, space: SearchSpace, each: int) -> Iterator[str]:
    screener, left = Screener(space), Counter()
    for row in _read(name):
        verdict = screener.verify(Expression.parse(row["expression"], space))
        left[row["good"], verdict.accepted] += 1
        if left[row["good"], verdict.accepted] <= each:
            yield row["expression"]


def _mutants(space: SearchSpace, each: int) -> list[str]:
    """Known losses with one change each, as a search makes them: new, finite, some accepted and
    some that are no loss by one of the other properties."""
    known = [loss.expression for loss in space.losses.values()]
    rng = np.random.default_rng(20261123)
    pool = Population.from_expressions(known, space).take(rng.integers(len(known), size=40 * each))
    mutants = Screener(space).screen(mutate(rng, pool, space))
    late = [PROPERTIES.index(name) for name in (MONOTONICITY, CONVERGENCE, NOT_FLAT)]
    chosen: list[str] = []
    prints = set(fingerprint(known, space))
    for codes in ([ACCEPTED], late):
        rows = np.flatnonzero(np.isin(mutants.codes, codes))
        expressions = mutants.population.take(rows).expressions()
        new = dict(zip(fingerprint(expressions, space), expressions))
        kept = [str(expression) for gradients, expression in new.items() if gradients not in prints]
        chosen += kept[:each]
    return chosen


def _sample(name: str, space: SearchSpace, each: int) -> Iterator[tuple[dict[str, str], bool]]:
    """A known loss, and the first few of each kind; each with its verdict."""
    screener, left = (
        Screener(space),
        {(good, accepted): each for good in "01" for accepted in (False, True)},
    )
    known = next(iter(space.losses.values()))
    yield {"expression": str(known.expression), "score": "", "good": "1"}, True
    for row in _read(name):
        kind = (row["good"], screener.verify(Expression.parse(row["expression"], space)).accepted)
        if left[kind]:
            left[kind] -= 1
            yield row, kind[1]


def _read(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@main.command()
@click.option(
    "--space",
    "names",
    multiple=True,
    default=[name for name in space_names() if (FOLDER / f"{name}.csv").exists()],
)
def table(names: tuple[str, ...]) -> None:
    """Print the confusion tables: of all that were drawn, of which the file has every good and
    every accepted one; and of those that heads were trained with."""
    click.echo(
        "| space | candidates | good | good, accepted | good, rejected | bad, accepted | bad, "
        "rejected "
        "| good fell to |\n|---|---|---|---|---|---|---|---|"
    )
    for name in names:
        space = load_space(name)
        screener = Screener(space)
        rows = _read(name)
        verdicts = [screener.verify(Expression.parse(row["expression"], space)) for row in rows]
        good = np.array([row["good"] == "1" for row in rows])
        accepted = np.array([verdict.accepted for verdict in verdicts])
        drawn = int(rows[0]["drawn"])
        fell = [
            verdict.failed
            for verdict, is_good in zip(verdicts, good)
            if is_good and not verdict.accepted
        ]
        counts = ", ".join(f"{prop} {fell.count(prop)}" for prop in PROPERTIES if prop in fell)
        bad_accepted = int((accepted & ~good).sum())
        click.echo(
            f"| {name} | {drawn} | {good.sum()} | {(good & accepted).sum()} | "
            f"{(good & ~accepted).sum()} "
            f"| {bad_accepted} | {drawn - good.sum() - bad_accepted} | {counts} |"
        )
    if (FOLDER / "heads.csv").exists():
        _heads_table(names)


def _heads_table(names: tuple[str, ...]) -> None:
    """Of each kind that heads were trained with, how many train one, and their mean mAP, beside the
    default's."""
    click.echo(
        "\n| space | kind | accepted: number, train a head, mean mAP | rejected | the default |\n"
        "|---|---|---|---|---|"
    )
    rows = _read("heads")
    for name in names:
        space, own = load_space(name), [row for row in rows if row["space"] == name]
        default = next((float(row["mAP"]) for row in own if not row["expression"]), None)
        if default is None:
            continue
        screener = Screener(space)
        labels = {row["expression"]: row["good"] for row in _read(name)}
        kinds = {
            "1": "random, good on features",
            "0": "random, bad",
            None: "mutants of known losses",
        }
        cells: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for row in own:
            if row["expression"]:
                accepted = screener.verify(Expression.parse(row["expression"], space)).accepted
                kind = kinds[labels.get(row["expression"])]
                cells[kind, accepted].append(float(row["mAP"] or 0))
        for kind in kinds.values():
            texts = [
                f"{len(mAPs)}, {sum(mAP >= TRAINS * default for mAP in mAPs)}, {np.mean(mAPs):.3f}"
                if (mAPs := cells[kind, accepted])
                else "-"
                for accepted in (True, False)
            ]
            click.echo(f"| {name} | {kind} | {' | '.join(texts)} | {default:.3f} |")


if __name__ == "__main__":
    main()
