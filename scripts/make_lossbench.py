"""The table of docs/lossbench: losses, and what heads trained with them reach.

    python scripts/make_lossbench.py sample faster_rcnn_proxy --known more.json
    python scripts/make_lossbench.py train faster_rcnn_proxy --seeds 0 1
    python scripts/make_lossbench.py train faster_rcnn_proxy --task full --steps 1000 \
        --batch-size 8 --losses default Poly-1 sampled-007 --seeds 0 1 2

``sample`` writes the losses down: the known ones, pairs of these, and what evolution from them and
screening let through, half of it near the default in gradient, half wherever it came out. ``train``
trains each with each seed, on one thread of each process, and appends a row as it is done; it goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from trainings import Instrument, Wanted, measure

from cse_autoloss.canonical import canonical
from cse_autoloss.config import SearchSection
from cse_autoloss.lossbench import FOLDER, TASKS, Loss, read_losses, read_rows
from cse_autoloss.screening import Screener
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.features import branch_features
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.strategies.base import Member
from cse_autoloss.strategies.evolution import Evolution

OFFSPRING, ROUNDS = 8000, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample", help="write the losses down")
    sampling.add_argument("--count", type=int, default=400)
    sampling.add_argument("--known", type=Path, help="JSON: space to name to expression")
    training = commands.add_parser("train", help="train what has no row yet")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    training.add_argument("--task", choices=("head", "full"), default="head")
    training.add_argument("--steps", type=int, help="the config's unless given")
    training.add_argument("--batch-size", type=int, help="of full trainings")
    training.add_argument("--losses", nargs="+", help="names; all, known ones first, unless given")
    training.add_argument("--data-seed", type=int, default=0, help="another draws another warm-up")
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    training.add_argument("--processes", type=int, default=1, help="that train side by side")
    for command in (sampling, training):
        command.add_argument("detector")
        command.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    {"sample": sample, "train": train}[options.command](options)


def sample(options: argparse.Namespace) -> None:
    """Write the losses of a detector."""
    cls = "two_stage_cls" if "rcnn" in options.detector else "one_stage_cls"
    spaces = {"cls": load_space(cls), "reg": load_space("reg")}
    more = json.loads(options.known.read_text()) if options.known else {}
    known = {branch: _known(space, more.get(space.name, {})) for branch, space in spaces.items()}
    rng = np.random.default_rng(0)
    sampled = {branch: _survivors(space, known[branch], rng) for branch, space in spaces.items()}
    pairs = list(itertools.product(known["cls"].items(), known["reg"].items()))
    of_one_paper = [i for i, (cls, reg) in enumerate(pairs) if reg[0] == f"reg {cls[0]}"]
    joined = [
        Loss(f"{name} + {other}", {"cls": text, "reg": second})
        for (name, text), (other, second) in (
            pairs[i] for i in [*of_one_paper, *rng.permutation(len(pairs))[:12]]
        )
    ]
    known_cls, known_reg = (
        [Loss(name, {branch: text}) for name, text in known[branch].items()]
        for branch in ("cls", "reg")
    )
    branches = itertools.cycle([("cls",), ("cls",), ("reg",), ("cls",), ("cls", "reg")])
    fresh = [
        Loss(f"sampled-{number:03d}", {branch: next(sampled[branch]) for branch in drawn})
        for number, drawn in zip(range(options.count), branches, strict=False)
    ]
    losses = [Loss("default", {}), *known_cls, *_in_turn(fresh, [*known_reg, *joined])]
    path = options.folder / options.detector / "losses.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(loss.to_json() + "\n" for loss in losses))
    print(f"{path}: {len(losses)} losses")


def _in_turn(many: Sequence[Loss], few: Sequence[Loss]) -> Iterator[Loss]:
    """Three of the many, one of the few: a table that is cut off somewhere has some of each."""
    rest = iter(few)
    for start in range(0, len(many), 3):
        yield from many[start : start + 3]
        yield from itertools.islice(rest, 1)
    yield from rest


def _known(space: SearchSpace, more: Mapping[str, str]) -> dict[str, str]:
    """Name to text, each loss once."""
    named = {**{name: name for name in space.losses}, **more}
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in named.items():
        expression = space.expression(text)
        (print_,) = fingerprint([expression], space)
        if print_ not in seen:
            seen.add(print_)
            found[f"{space.branch} {name}" if space.branch == "reg" else name] = str(expression)
    return found


def _survivors(
    space: SearchSpace, known: Mapping[str, str], rng: np.random.Generator
) -> Iterator[str]:
    """What a search would train: offspring of known losses that pass screening and simulation."""
    strategy = Evolution(SearchSection())
    parents = strategy.population(
        [Member(place, {space.branch: text}, 0.3) for place, text in enumerate(known.values())]
    )
    screener, expressions = Screener(space), {}
    seen = set(fingerprint([space.expression(text) for text in known.values()], space))
    for _ in range(ROUNDS):
        offspring = strategy.ask(parents, space.branch, space, OFFSPRING, rng)
        survivors = screener.screen(offspring.population).survivors
        outcomes = simulate_predictions(survivors, space, seed=0)
        passed = [canonical(e, space) for e, o in zip(survivors, outcomes, strict=True) if o.passed]
        for print_, expression in zip(fingerprint(passed, space), passed, strict=True):
            if print_ not in seen:
                expressions.setdefault(print_, expression)
        print(f"{space.name}: {len(expressions)} distinct survivors", flush=True)
    found = list(expressions.values())
    default = space.expression(next(iter(known.values())))
    fields = np.nan_to_num(branch_features([default, *found], space), nan=1e3)
    near = list(np.argsort(np.linalg.norm(fields[1:] - fields[0], axis=1))[: len(found) // 3])
    near = [near[i] for i in rng.permutation(len(near))]
    anywhere = list(rng.permutation(len(found)))
    given: set[int] = set()
    for source in itertools.cycle([near, anywhere]):
        while source:
            i = source.pop()
            if i not in given:
                given.add(i)
                yield str(found[i])
                break
        if not (near or anywhere):
            return


def train(options: argparse.Namespace) -> None:
    """Append a row for each loss and seed that has none."""
    config = {"config": options.detector, "data_seed": options.data_seed}
    config |= {"device": options.device}
    if options.task == "full":
        config |= {"steps": options.steps, "batch_size": options.batch_size}
    elif options.steps:
        config |= {"head_steps": options.steps}
    config = {key: value for key, value in config.items() if value is not None}
    instrument = Instrument.of(config, options.task)
    folder = options.folder / options.detector
    path = folder / TASKS[options.task]
    losses = {loss.name: loss for loss in read_losses(folder / "losses.jsonl")}
    there = {row.key for row in read_rows(path)}
    wanted = _order([losses[name] for name in options.losses or losses], options.seeds)
    left = (one for one in wanted if (one.loss.name, one.seed, instrument.origin) not in there)
    measure(instrument, left, path, options.processes)


def _order(losses: Sequence[Loss], seeds: Sequence[int]) -> Iterator[Wanted]:
    """Some losses with every seed before the next, so that a cut anywhere leaves a whole table."""
    for loss in losses:
        for seed in seeds:
            yield Wanted(loss, seed)


if __name__ == "__main__":
    main()
