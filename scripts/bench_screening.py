"""Screening against the usual way: DEAP trees, compiled one by one, evaluated with torch autograd.

    python scripts/bench_screening.py [--space NAME] [--candidates N] [--json FILE]

Both ways draw trees by the same law (ramped half-and-half), skip duplicates and trees without the
prediction, and judge the same properties with the same tolerances on the same probes, block by
block, stopping at the first that falls. First the verdicts of both are compared on the same trees.
One thread, no GPU; rates are candidates per second of CPU time, so other work on the machine
matters little, and each is the median of several runs.
"""

from __future__ import annotations

import json
import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import cProfile
import pstats
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from deap import gp

from cse_autoloss import Expression, SearchSpace, load_space
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.screening import PROPERTIES, Screener
from cse_autoloss.screening.graph import Arrays, Columns, Forest, Graph
from cse_autoloss.screening.properties import violations
from cse_autoloss.screening.screener import BATCH_SIZE
from cse_autoloss.space import space_names
from cse_autoloss.variation import grow

torch.set_num_threads(1)
DEPTHS = (2, 6)
REPEATS = 5


class Deap:
    """The usual way, one candidate at a time."""

    def __init__(self, space: SearchSpace) -> None:
        self.space, self.probes = space, Screener(space).probes
        self.primitives = gp.PrimitiveSet("loss", len(space.variables))
        self.primitives.renameArguments(
            **{f"ARG{i}": name for i, name in enumerate(space.variables)}
        )
        for name in space.operators:
            self.primitives.addPrimitive(PRIMITIVES[name].torch, PRIMITIVES[name].arity, name)
        for constant in space.constants:
            name = f"c{constant}".replace(".", "_")
            self.primitives.addTerminal(torch.full((1, 1), float(constant)), name)
        self.inputs = [
            {
                name: torch.tensor(block.values[name], requires_grad=name in space.predicted)
                for name in space.variables
            }
            for block in self.probes.blocks
        ]
        self.tangents = [
            {name: torch.tensor(array) for name, array in block.tangents.items()}
            for block in self.probes.blocks
        ]
        self.weights = [
            None if block.weights is None else torch.tensor(block.weights, dtype=torch.float32)
            for block in self.probes.blocks
        ]

    def grow(self, depths: tuple[int, int]) -> gp.PrimitiveTree:
        return gp.PrimitiveTree(gp.genHalfAndHalf(self.primitives, *depths))

    def expression(self, tree: gp.PrimitiveTree) -> Expression:
        return Expression(
            tuple(
                node.value.lstrip("c").replace("_", ".")
                if isinstance(node, gp.Terminal)
                else node.name
                for node in tree
            )
        )

    def verdict(self, tree: gp.PrimitiveTree) -> str | None:
        """The property that falls, or None."""
        if not any(
            node.value in self.space.predicted for node in tree if isinstance(node, gp.Terminal)
        ):
            return PROPERTIES[0]
        function = gp.compile(tree, self.primitives)
        tolerances = self.probes.tolerances
        detached = np.array([any(node.name in self.space.detaching for node in tree)])
        for index, block in enumerate(self.probes.blocks):
            values, slopes = self.losses(function, index)
            with np.errstate(all="ignore"):
                for name, where in violations(values, slopes, block, tolerances, detached):
                    if where.any():
                        return name
        return None

    def losses(
        self, function: Callable[..., torch.Tensor], index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs, tangents = self.inputs[index], self.tangents[index]
        loss = function(**inputs)
        if self.weights[index] is not None:
            loss = loss * self.weights[index]
        loss = loss.sum(-1).expand(len(self.probes.blocks[index].positions))
        if not loss.requires_grad:  # all of it is detached
            return loss.numpy()[:, None], np.zeros((len(loss), 1), np.float32)
        gradients = torch.autograd.grad(
            loss.sum(), [inputs[name] for name in tangents], allow_unused=True
        )
        # What stands still stops an infinite gradient.
        slopes = sum(
            torch.where(tangent == 0, 0, gradient * tangent).sum(-1)
            for gradient, tangent in zip(gradients, tangents.values())
            if gradient is not None
        )
        return loss.detach().numpy()[:, None], slopes.numpy()[:, None]

    def run(self, count: int, depths: tuple[int, int]) -> int:
        seen: set[str] = set()
        nodes = 0
        for _ in range(count):
            tree = self.grow(depths)
            nodes += len(tree)
            if (text := str(tree)) not in seen:
                seen.add(text)
                self.verdict(tree)
        return nodes


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def one_rate(
    space: SearchSpace,
    count: int,
    batch_size: int = BATCH_SIZE,
    depths: tuple[int, int] = DEPTHS,
    seed: int = 0,
) -> float:
    """Candidates per CPU second, grown and screened, with a fresh memory of what was seen."""
    screener = Screener(space, batch_size)
    # Warms buffers
    screener.screen(
        grow(np.random.default_rng(1000 + seed), min(count, batch_size), space, *depths)
    )
    rng = np.random.default_rng(seed)

    def run() -> None:
        for start in range(0, count, batch_size):
            screener.screen(grow(rng, min(batch_size, count - start), space, *depths))

    return count / cpu_seconds(run)


def rate(
    space: SearchSpace, count: int, batch_size: int = BATCH_SIZE, depths: tuple[int, int] = DEPTHS
) -> float:
    return statistics.median(
        one_rate(space, count, batch_size, depths, seed) for seed in range(REPEATS)
    )


def compare(space: SearchSpace, count: int, deap_count: int) -> dict[str, float]:
    """Both ways in turns, so that whatever else the machine does meets both."""
    random.seed(0)
    deap = Deap(space)
    trees = [deap.grow(DEPTHS) for _ in range(deap_count)]
    screener = Screener(space)
    same = [(deap.verdict(tree), screener.verify(deap.expression(tree)).failed) for tree in trees]
    theirs, ours = [], []
    for seed in range(REPEATS):
        theirs.append(deap_count / cpu_seconds(lambda: deap.run(deap_count, DEPTHS)))
        ours.append(one_rate(space, count, seed=seed))
    population = grow(np.random.default_rng(0), 20_000, space, *DEPTHS)
    return {
        "deap_per_second": statistics.median(theirs),
        "per_second": statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs)),
        "lowest_ratio": min(a / b for a, b in zip(ours, theirs)),
        "same_property": float(np.mean([a == b for a, b in same])),
        "same_fate": float(np.mean([(a is None) == (b is None) for a, b in same])),
        "mean_nodes_deap": deap.run(2000, DEPTHS) / 2000,
        "mean_nodes": float(population.lengths.mean()),
    }


def with_probes(space: SearchSpace, **keys: int) -> SearchSpace:
    return replace(space, probes={**space.probes, **keys})


def sweeps(space: SearchSpace, count: int) -> Iterator[tuple[str, object, float]]:
    for depth in (3, 4, 6, 8, 10):
        nodes = grow(np.random.default_rng(0), 20_000, space, 2, depth).lengths.mean()
        yield (
            "tree size",
            f"{nodes:.1f} nodes (depth 2 to {depth})",
            rate(space, count, depths=(2, depth)),
        )
    for glance, steps in ((4, 9), (8, 17), (16, 33), (32, 65)):
        probed = with_probes(space, glance=glance, steps=steps)
        points = [len(block.positions) for block in Screener(probed).probes.blocks]
        yield "probes", f"{points[0]} points at a glance, {sum(points)} in all", rate(probed, count)
    for batch_size in (1024, 4096, 8192, 16384, 32768, 65536):
        yield "batch size", batch_size, rate(space, count, batch_size)


PARTS = {
    ("variation", "grow"): "drawing trees",
    ("screener", "uses_prediction"): "which use the prediction",
    ("graph", "hashes"): "hashing those that do not",
    ("equivalence", "add"): "what was seen",
    ("graph", "of"): "sorting by column, hashing, building graphs",
    ("graph", "evaluate"): "values and derivatives",
    ("properties", "reduce"): "losses of samples",
    ("properties", "first_failures"): "properties",
}


def profile(space: SearchSpace, count: int) -> dict[str, float]:
    """Share of the time that each part of drawing and screening takes."""
    screener = Screener(space)
    rng = np.random.default_rng(0)
    screener.screen(grow(rng, BATCH_SIZE, space))
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    for _ in range(0, count, BATCH_SIZE):
        screener.screen(grow(rng, BATCH_SIZE, space))
    profiler.disable()
    shares = dict.fromkeys(PARTS.values(), 0.0)
    stats = pstats.Stats(profiler)
    for (file, _, function), (_, _, _, seconds, _) in stats.stats.items():
        if part := PARTS.get((Path(file).stem, function)):
            shares[part] += seconds / stats.total_tt
    return {**shares, "the rest": 1 - sum(shares.values())}


def bandwidth(space: SearchSpace) -> tuple[float, float]:
    """Bytes a second that evaluation moves at a glance (arguments read, results written), and that
    a plain copy moves."""
    screener = Screener(space)
    population = grow(np.random.default_rng(0), BATCH_SIZE, space)
    columns = Columns.of(population, np.flatnonzero(screener.uses_prediction(population)))
    graph = Graph.of(Forest.of(columns, screener.language), np.arange(len(columns.rows)))
    block = screener.probes.blocks[0]
    points = len(block.positions) * block.columns
    rows = sum(
        (group.stop - group.start)
        * (1 + any(group.predicted) + len(group.predicted) + sum(group.predicted))
        for group in graph.groups
    )
    arrays = Arrays()
    seconds = statistics.median(
        cpu_seconds(lambda: graph.evaluate(block.values, block.tangents, arrays)) for _ in range(7)
    )
    source = np.ones(1 << 24, np.float32)
    target = np.empty_like(source)
    copy = statistics.median(cpu_seconds(lambda: np.copyto(target, source)) for _ in range(7))
    return 4 * points * rows / seconds, 2 * source.nbytes / copy


def peak_memory(space: SearchSpace, batch_size: int) -> float:
    """MiB of arrays at most while a million candidates are drawn and screened in batches."""
    screener, rng = Screener(space, batch_size), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(0, 1_000_000, batch_size):
        screener.screen(grow(rng, batch_size, space))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


@click.command()
@click.option(
    "--space",
    "names",
    multiple=True,
    default=space_names(),
    help="Repeatable; all spaces where absent.",
)
@click.option("--candidates", default=131_072, show_default=True, help="Screened in each run.")
@click.option(
    "--deap-candidates",
    default=3000,
    show_default=True,
    help="Judged by DEAP and torch in each run.",
)
@click.option(
    "--compare-only",
    is_flag=True,
    help="Leave out how the rate changes, the profile and the memory.",
)
@click.option("--json", "output", type=click.Path(), help="Write all numbers to this file, too.")
def main(
    names: tuple[str, ...],
    candidates: int,
    deap_candidates: int,
    compare_only: bool,
    output: str | None,
) -> None:
    results: dict[str, dict[str, object]] = {}
    print(
        "| space | DEAP + torch, per second | screening, per second | ratio (lowest) | same fate, "
        "same property "
        "| mean nodes |\n"
        "|---|---|---|---|---|---|"
    )
    for name in names:
        results[name] = row = compare(load_space(name), candidates, deap_candidates)
        print(
            f"| {name} | {row['deap_per_second']:,.0f} | {row['per_second']:,.0f} "
            f"| {row['ratio']:.0f} ({row['lowest_ratio']:.0f}) "
            f"| {row['same_fate']:.2%}, {row['same_property']:.2%} "
            f"| {row['mean_nodes_deap']:.1f}, {row['mean_nodes']:.1f} |",
            flush=True,
        )
    for name in () if compare_only else names:
        print(f"\n{name}\n\n| what varies | | candidates per second |\n|---|---|---|")
        results[name]["sweeps"] = rows = []
        for what, value, speed in sweeps(load_space(name), candidates):
            rows.append([what, value, speed])
            print(f"| {what} | {value} | {speed:,.0f} |", flush=True)
        print("\n| where the time goes | share |\n|---|---|")
        results[name]["profile"] = shares = profile(load_space(name), 8 * BATCH_SIZE)
        for part, share in shares.items():
            print(f"| {part} | {share:.0%} |", flush=True)
        moved, copied = bandwidth(load_space(name))
        results[name]["bytes_per_second"] = [moved, copied]
        print(
            f"\nevaluation moves {moved / 1e9:.1f} GB/s, a plain copy of 64 MiB {copied / 1e9:.1f} "
            "GB/s",
            flush=True,
        )
        results[name]["peak_mib"] = peak_memory(load_space(name), BATCH_SIZE)
        print(
            f"peak memory, a million candidates in batches of {BATCH_SIZE:,}: "
            f"{results[name]['peak_mib']:.0f} MiB",
            flush=True,
        )
    if output:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
