"""What fits a structure's numbers better in the same time: trainings of heads, or gradients?

    python scripts/bench_fitting.py "Neg(Dot(Mul(Y,Pow(Z,0.5)),Log(Softmax(X))))"

Two ways, from the same numbers and with the same CPU time:

* ``trainings``: as a search does, the leader's numbers are multiplied by others near 1 and a head
  is trained with them, one seed each; the best on val leads.
* ``gradients``: while a head trains, its last few steps are unrolled, and the numbers descend by
  the gradient of what the head then scores on other images: EvoMAL's way (Raymond et al., 2023).
  mAP has no gradient; in its place stands ``--surrogate``: a smooth average precision over COCO's
  ten IoU thresholds (Smooth-AP, Brown et al., 2020, of the drawn RoIs), or cross-entropy.

Then heads are trained with what either found, what they began with, and the default, with seeds
that neither used: points of mAP over the default, paired by seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from trainings import SCALE

import detectors  # noqa: F401 - patches mmcv, before anything imports it
from cse_autoloss.expression import Expression
from cse_autoloss.intervals import mean_interval
from cse_autoloss.literals import is_number
from cse_autoloss.losses import TwoStageLoss
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.report import table
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.trial import Trial
from cse_autoloss.variation import SCALING
from detectors.head_stage import HeadStage
from detectors.training import DetectorTrainer

DETECTOR, SPACE = "faster_rcnn_proxy", "two_stage_cls_plus"
UNROLLED, RATE = 5, 0.02  # steps; Adam's, of the numbers' logarithms
BETAS = (0.9, 0.999)  # AdamW's own
HELD_OUT = 5  # one image of so many is for the outer loss
THRESHOLDS = torch.arange(0.5, 1.0, 0.05)
SPLITS = ("val", "test")
SMOOTH = 0.02  # of a difference of scores, in Smooth-AP's sigmoid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formulas", nargs="+", help=f"in {SPACE}, with the numbers to begin with")
    parser.add_argument("--seconds", type=float, default=180, help="CPU time of each way")
    parser.add_argument("--seeds", type=int, default=5, help="of the comparison")
    parser.add_argument("--surrogate", nargs="+", choices=SURROGATES, default=list(SURROGATES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    space, config = load_space(SPACE), {"config": DETECTOR}
    trainer = DetectorTrainer(config, DetectorTrainer.prepare(config))
    train(trainer, {}, seed=0)  # what is made once is not timed
    for text in options.formulas:
        start = space.expression(text)
        found = {"as begun": start, "trainings": by_trainings(trainer, start, space, options)}
        for name in options.surrogate:
            found[f"gradients, {name}"] = by_gradients(trainer, start, space, name, options)
        compare(trainer, found, options.seeds)


def by_trainings(
    trainer: DetectorTrainer, start: Expression, space: SearchSpace, options: argparse.Namespace
) -> Expression:
    """What leads after the time, each tried with one training of a head."""
    rng, leader, best = np.random.default_rng(0), start, -math.inf
    candidate, begun, tried = start, time.process_time(), 0
    while time.process_time() - begun < options.seconds:
        mAP = train(trainer, {"cls": str(candidate)}, seed=0, splits=("val",))["val"]
        tried += 1
        if mAP > best:
            leader, best = candidate, mAP
        numbers = np.array(leader.constants) * np.exp(rng.normal(0, SCALING, len(leader.constants)))
        candidate = leader.with_constants(numbers, space)
    print(f"trainings: {tried} in {time.process_time() - begun:.0f} s: {leader}", flush=True)
    return leader


def by_gradients(
    trainer: DetectorTrainer,
    start: Expression,
    space: SearchSpace,
    surrogate: str,
    options: argparse.Namespace,
) -> Expression:
    """What the numbers came to after the time, heads beginning anew where their steps end."""
    loss = Adjustable(start, space)
    optimizer = torch.optim.Adam([loss.logarithms], RATE)
    begun, windows, heads = time.process_time(), 0, 0
    while time.process_time() - begun < options.seconds:
        for outer in Unrolling(trainer, loss, SURROGATES[surrogate](), seed=heads):
            optimizer.zero_grad()
            outer.backward()
            if torch.isfinite(loss.logarithms.grad).all():
                optimizer.step()
            windows += 1
            if time.process_time() - begun >= options.seconds:
                break
        heads += 1
    fitted = loss.fitted()
    print(
        f"gradients, {surrogate}: {windows} in {time.process_time() - begun:.0f} s, {heads} heads: "
        f"{fitted}",
        flush=True,
    )
    return fitted


class Adjustable(TwoStageLoss):
    """A loss whose numbers are parameters: their logarithms, as all are positive."""

    def __init__(self, expression: Expression, space: SearchSpace) -> None:
        super().__init__(expression, space)
        self._texts = list(dict.fromkeys(filter(is_number, expression.program)))
        numbers = torch.tensor([float(text) for text in self._texts])
        self.logarithms = nn.Parameter(numbers.log())

    def fitted(self) -> Expression:
        numbers = dict(zip(self._texts, self.logarithms.exp().tolist(), strict=True))
        values = [numbers[name] for name in self.expression.program if is_number(name)]
        return self.expression.with_constants(values, self.space)

    def _by_kernel(self, *_: object) -> bool:
        return False

    def _evaluate(self, variables: Mapping[str, Tensor], pred: Tensor) -> Tensor:
        numbers = dict(zip(self._texts, self.logarithms.exp(), strict=True))
        values: list[Tensor] = []
        for name, places in self._steps:
            arguments = [values[place] for place in places]
            if name == "Pow":  # the operator's own takes its exponent for a constant
                values.append(torch.pow(arguments[0].clamp(min=1e-6), arguments[1]))
            elif places:
                values.append(PRIMITIVES[name].torch(*arguments))
            else:
                values.append(variables[name] if name in variables else numbers[name])
        return values[-1]


class SmoothAP(nn.Module):
    """1 minus the mean over classes and IoU thresholds of a smooth AP of RoIs by their scores."""

    needs = frozenset({"pos_ious"})

    def forward(self, pred: Tensor, target: Tensor, pos_ious: Tensor, **_: object) -> Tensor:
        scores, classes = pred.softmax(-1), pred.shape[1] - 1
        ious = torch.zeros(len(pred)).masked_scatter(target < classes, pos_ious)
        values = []
        for of_class in range(classes):
            mine, score = target == of_class, scores[:, of_class]
            if not mine.any():
                continue
            above = torch.sigmoid((score - score[mine][:, None]) / SMOOTH)  # a row a positive
            for threshold in THRESHOLDS:
                right = mine & (ious >= threshold)
                if right.any():
                    rows = above[right[mine]]
                    ranks = 0.5 + rows.sum(1)
                    values.append(((0.5 + rows[:, right].sum(1)) / ranks).mean())
        return 1 - torch.stack(values).mean()


class CrossEntropy(nn.Module):
    needs = frozenset({"pos_ious"})  # to be called as the others are

    def forward(self, pred: Tensor, target: Tensor, **_: object) -> Tensor:
        return nn.functional.cross_entropy(pred, target)


SURROGATES = {"smooth-ap": SmoothAP, "cross-entropy": CrossEntropy}


class Unrolling:
    """One training of a head, in windows of a few steps; of each, the outer loss after it, with a
    graph that leads to the loss's numbers."""

    def __init__(
        self, trainer: DetectorTrainer, loss: Adjustable, outer: nn.Module, seed: int
    ) -> None:
        config, _ = trainer._with_losses(Trial("default", scale=SCALE[DETECTOR]))
        self._model = trainer._model(config, seed)
        stage = trainer._head_stage()
        self._total = _Total(stage.trainable(self._model))
        self._head, self._default = self._total.of.head, self._total.of.head.loss_cls
        self._loss, self._outer = loss, outer
        self._steps, self._batch = trainer.setup.head.steps, trainer.setup.head.batch_size
        self._rate, self._decay = config.optimizer["lr"], config.optimizer["weight_decay"]
        self._clip = config.optimizer_config["grad_clip"]["max_norm"]
        self._batches, self._held = (self._images(stage, seed, of_outer) for of_outer in (0, 1))
        self._strength = _Strength(self, next(self._batches))

    def _images(self, stage: HeadStage, seed: int, held: int) -> Iterator[np.ndarray]:
        """Batches of the images that are held out, or of the others."""
        batches = stage.batches(self._batch, seed)
        flips = len(stage._features("train").info["chances"])
        while True:
            images: list[int] = []
            while len(images) < self._batch:
                images += [
                    image
                    for image in next(batches)
                    if (image // flips % HELD_OUT == 0) == bool(held)
                ]
            yield np.array(images[: self._batch])

    def weights(self) -> dict[str, Tensor]:
        """The head's first ones, by the names that ``functional_call`` has for them."""
        return {f"of.head.{name}": p.detach() for name, p in self._head.named_parameters()}

    def loss_of(
        self, weights: Mapping[str, Tensor], images: np.ndarray, cls: nn.Module, regress: bool
    ) -> Tensor:
        self._head.loss_cls = cls
        losses = functional_call(self._total, dict(weights), (images,))
        return losses["loss_cls"] + losses["loss_bbox"] if regress else losses["loss_cls"]

    def __iter__(self) -> Iterator[Tensor]:
        weights = self.weights()
        moments = [{name: torch.zeros_like(p) for name, p in weights.items()} for _ in BETAS]
        for step in range(self._steps):
            if step % UNROLLED == 0:
                weights, *moments = (
                    {name: value.detach() for name, value in some.items()}
                    for some in (weights, *moments)
                )
                weights = {name: value.requires_grad_() for name, value in weights.items()}
                strong = _Strong(self._loss, self._strength())
            total = self.loss_of(weights, next(self._batches), strong, regress=True)
            weights = self._updated(weights, moments, total, step)
            if step % UNROLLED == UNROLLED - 1:
                yield self.loss_of(weights, next(self._held), self._outer, regress=False)

    def _updated(
        self,
        weights: dict[str, Tensor],
        moments: list[dict[str, Tensor]],
        total: Tensor,
        step: int,
    ) -> dict[str, Tensor]:
        """A step of AdamW with mmcv's one-cycle rate, in torch's graph."""
        gradients = torch.autograd.grad(total, list(weights.values()), create_graph=True)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        share = (self._clip / (norm.detach() + 1e-6)).clamp(max=1)
        rate, updated = self._rate * one_cycle(step / self._steps), {}
        for (name, value), gradient in zip(weights.items(), gradients, strict=True):
            gradient = gradient * share
            for of, beta, power in zip(moments, BETAS, (1, 2), strict=True):
                of[name] = beta * of[name] + (1 - beta) * gradient**power
            first, second = (
                of[name] / (1 - beta ** (step + 1)) for of, beta in zip(moments, BETAS, strict=True)
            )
            updated[name] = value * (1 - rate * self._decay) - rate * first / (
                (second + 1e-16).sqrt() + 1e-8
            )
        return updated


class _Total(nn.Module):
    """A head's losses by name, for ``functional_call``."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, images: np.ndarray) -> dict[str, Tensor]:
        model, features = self.of._of
        return features.losses(model, images)


class _Strong(nn.Module):
    """A loss times a factor."""

    needs = frozenset({"pos_ious"})

    def __init__(self, loss: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self._of = (loss, factor)  # no part of the head

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        loss, factor = self._of
        return loss(*args, **kwargs) * factor


class _Strength:
    """What makes a loss's gradient as strong as trials have it, whatever its numbers: on one batch,
    at the head's first logits."""

    def __init__(self, unrolling: Unrolling, images: np.ndarray) -> None:
        self._loss = unrolling._loss
        called: list[Any] = []
        default = unrolling._default

        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            called.extend(([a.detach() if isinstance(a, Tensor) else a for a in args], kwargs))

        recorded = CrossEntropy()
        hook = recorded.register_forward_pre_hook(keep, with_kwargs=True)
        unrolling.loss_of(unrolling.weights(), images, recorded, regress=False)
        hook.remove()
        self._called = called
        (pred, target), kwargs = called
        logits = pred.clone().requires_grad_()
        value = default(logits, target, kwargs["weight"], avg_factor=kwargs["avg_factor"])
        self._wanted = torch.autograd.grad(value, logits)[0].norm(dim=1).sum()

    def __call__(self) -> Tensor:
        (pred, target), kwargs = self._called
        logits = pred.clone().requires_grad_()
        value = self._loss(logits, target, **kwargs)
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        return self._wanted / gradient.norm(dim=1).sum()


def one_cycle(done: float) -> float:
    """mmcv's rate as a share of its largest: up from a 25th in a fifth of the steps, then down."""
    from mmcv.runner.hooks.lr_updater import annealing_cos  # not before mmcv is patched

    return (
        annealing_cos(1 / 25, 1, done / 0.2)
        if done < 0.2
        else annealing_cos(1, 4e-6, (done - 0.2) / 0.8)
    )


def train(
    trainer: DetectorTrainer, losses: Mapping[str, str], seed: int, splits: tuple[str, ...] = SPLITS
) -> dict[str, float]:
    """Split to mAP, 0 if the training failed."""
    trial = Trial(
        "fitting",
        losses,
        {"cls": SPACE} if losses else {},
        task="head",
        evaluate=splits,
        seed=seed,
        scale=SCALE[DETECTOR],
    )
    metrics = trainer.train(trial).metrics
    return {split: metrics.get(f"{split}/mAP", 0.0) for split in splits}


def compare(trainer: DetectorTrainer, found: Mapping[str, Expression], seeds: int) -> None:
    fresh = range(100, 100 + seeds)
    default = [train(trainer, {}, seed) for seed in fresh]
    rows = []
    for way, formula in found.items():
        measured = [train(trainer, {"cls": str(formula)}, seed) for seed in fresh]
        gains = [
            mean_interval(
                [100 * (a[split] - b[split]) for a, b in zip(measured, default, strict=True)]
            ).text(2, sign=True)
            for split in SPLITS
        ]
        rows.append([way, f"`{formula}`", *gains])
    head = ["way", "formula", "val, over default", "test, over default"]
    print(*table(head, rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
