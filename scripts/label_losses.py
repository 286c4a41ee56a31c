"""Which random losses optimise, and does verification know? Makes the labelled set and its
confusion table.

    python scripts/label_losses.py make --space reg          # draws, trains, writes
    docs/labelled/reg.csv python scripts/label_losses.py table                     # the confusion
    table of the set, with today's tolerances python scripts/label_losses.py detector
      # a sample of it on the tiny detector: docs/labelled/detector.csv

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
from cse_autoloss.screening.predictions import BoxBatch
from cse_autoloss.screening.properties import USES_PREDICTION
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import space_names
from cse_autoloss.trial import Trial, load_trainer
from cse_autoloss.variation import grow

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


@main.command()
@click.option("--space", "name", required=True, type=click.Choice(space_names()))
@click.option(
    "--draw",
    default=15_000,
    show_default=True,
    help="Random trees; duplicates and those without the prediction go.",
)
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
    report = Screener(space).screen(grow(np.random.default_rng(20261123), draw, space))
    rows = np.flatnonzero(
        (report.codes != DUPLICATE) & (report.codes != PROPERTIES.index(USES_PREDICTION))
    )
    expressions, accepted = (
        report.population.take(rows).expressions(),
        report.codes[rows] == ACCEPTED,
    )
    scores = label(expressions, space)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["expression", "score", "good", "sampled", "drawn"])
        for index, (expression, score) in enumerate(zip(expressions, scores)):
            good = bool(score >= GOOD[space.branch])
            if index < kept or good or accepted[index]:
                writer.writerow(
                    [
                        expression,
                        f"{score:.3f}",
                        int(good),
                        "random" if index < kept else "rare",
                        len(expressions),
                    ]
                )
    known = ", ".join(
        f"{score:.3f}"
        for score in label([loss.expression for loss in space.losses.values()], space)
    )
    good = np.mean(scores >= GOOD[space.branch])
    click.echo(
        f"{name}: {len(expressions)} candidates, {good:.3%} good; known losses score {known}"
    )


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
@click.option("--space", "names", multiple=True, default=space_names())
def table(names: tuple[str, ...]) -> None:
    """Print the confusion table: all that were drawn, of which the file has every good and every
    accepted one."""
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


if __name__ == "__main__":
    main()
