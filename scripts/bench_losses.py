"""Forward and backward of searched losses against MMDetection's hand-written ones, in one run.

    python scripts/bench_losses.py [--device cpu] [--threads 1] [--seconds 2] [--compile] [--json
    FILE]

Each row times both losses in turn, many short rounds, and prints the median of the rounds' ratios:
what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import detectors  # noqa: F401 - before mmcv and mmdet: patches them

# isort: split
import torch
from mmdet.models.losses import CrossEntropyLoss, FocalLoss, GIoULoss

from cse_autoloss.losses import build_loss
from cse_autoloss.screening.sampling import sample
from cse_autoloss.space import load_space

Step = Callable[[], None]


def boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 4) boxes of 8 to 200 pixels a side in a 1000 pixel image."""
    corner = torch.rand(count, 2, generator=generator) * 800
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 192], 1)


def step(loss: torch.nn.Module, leaf: torch.Tensor, *args: object, **kwargs: object) -> Step:
    """One forward and backward pass; the gradient is dropped as an optimizer would drop it."""

    def run() -> None:
        loss(leaf, *args, **kwargs).backward()
        leaf.grad = None

    return run


def rows(device: str, compiled: bool) -> list[tuple[str, str, str, Step, Step]]:
    """(searched loss, hand-written loss, size, a step of the one, a step of the other)."""
    generator = torch.Generator().manual_seed(0)

    def searched(expression: str, space: str) -> torch.nn.Module:
        loss = build_loss(expression, space).to(device)
        return torch.compile(loss) if compiled else loss

    table = []
    for count, classes in ((512, 81), (2048, 1231)):
        logits = torch.randn(count, classes, generator=generator).to(device).requires_grad_()
        labels = torch.full((count,), classes - 1)
        labels[: count // 4] = torch.randint(classes - 1, (count // 4,), generator=generator)
        ious = torch.rand(count // 4, generator=generator).to(device)
        labels, weight = labels.to(device), torch.ones(count, device=device)
        table.append(
            (
                "CSE-Autoloss-A cls",
                "CrossEntropyLoss",
                f"{count} x {classes}",
                step(
                    searched("CSE-Autoloss-A", "two_stage_cls"),
                    logits,
                    labels,
                    weight,
                    avg_factor=count,
                    pos_ious=ious,
                ),
                step(CrossEntropyLoss().to(device), logits, labels, weight, avg_factor=count),
            )
        )
    for name in ("CSE-Autoloss-A", "CSE-Autoloss-B"):
        for count in (512, 20_000):
            target = boxes(count, generator)
            pred = (
                (target + torch.randn(count, 4, generator=generator) * 4)
                .to(device)
                .requires_grad_()
            )
            target, weight = target.to(device), torch.ones(count, 4, device=device)
            table.append(
                (
                    f"{name} reg",
                    "GIoULoss",
                    f"{count:,} boxes",
                    step(searched(name, "reg"), pred, target, weight, avg_factor=count),
                    step(GIoULoss().to(device), pred, target, weight, avg_factor=count),
                )
            )
    count, classes, positives = 20_000, 80, 400
    logits = (torch.randn(count, classes, generator=generator) - 4).to(device).requires_grad_()
    labels = torch.full((count,), classes)
    labels[torch.randperm(count, generator=generator)[:positives]] = torch.randint(
        classes, (positives,), generator=generator
    )
    labels, ious = labels.to(device), torch.rand(positives, generator=generator).to(device)
    table.append(
        (
            "CSE-Autoloss-B cls",
            "FocalLoss",
            f"{count:,} x {classes}",
            step(
                searched("CSE-Autoloss-B", "one_stage_cls"),
                logits,
                labels,
                avg_factor=positives,
                pos_ious=ious,
            ),
            step(FocalLoss().to(device), logits, labels, avg_factor=positives),
        )
    )
    return table


def seconds(run: Step, repeats: int, device: str) -> float:
    """Seconds of one step, the mean of a round of ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def compare(ours: Step, theirs: Step, budget: float, device: str) -> tuple[float, float, float]:
    """Median seconds of a step of ours and of theirs, and the median ratio of neighbouring
    rounds."""
    for _ in range(3):
        ours(), theirs()
    repeats = max(1, int(0.02 / seconds(theirs, 2, device)))
    pairs, end = [], time.perf_counter() + budget
    while len(pairs) < 9 or time.perf_counter() < end:
        pairs.append((seconds(ours, repeats, device), seconds(theirs, repeats, device)))
    medians = (statistics.median(column) for column in zip(*pairs))
    return *medians, statistics.median(a / b for a, b in pairs)


def survivors(count: int, seed: int = 0) -> None:
    """CPU time of a step of random two-stage survivors of the screening, as multiples of
    CrossEntropyLoss's, by their kernels and by torch's graph."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 81, generator=generator).requires_grad_()
    labels = torch.full((512,), 80)
    labels[:128] = torch.randint(80, (128,), generator=generator)
    ious, weight = torch.rand(128, generator=generator), torch.ones(512)
    found = sample(load_space("two_stage_cls"), 400_000, seed).survivors
    by_kernel, by_graph = [], []
    for text in random.Random(seed).sample(found, min(count, len(found))):
        ours, plain = (build_loss(text, "two_stage_cls") for _ in range(2))
        plain._kernel = None
        steps = [
            step(CrossEntropyLoss(), logits, labels, weight, avg_factor=512),
            *(
                step(loss, logits, labels, weight, avg_factor=512, pos_ious=ious)
                for loss in (ours, plain)
            ),
        ]
        for run in steps:
            run()
        rounds = [[cpu_seconds(run, 4) for run in steps] for _ in range(5)]
        by_kernel.append(statistics.median(mine / hand for hand, mine, _ in rounds))
        by_graph.append(statistics.median(graph / hand for hand, _, graph in rounds))
    for name, ratios in (("kernel", by_kernel), ("graph", by_graph)):
        print(
            f"{name}: median {statistics.median(ratios):.2f}, most {max(ratios):.2f} of "
            f"{len(ratios)}"
        )


def cpu_seconds(run: Step, repeats: int) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        action="append",
        help="may be repeated; default: cpu, and cuda where there is one",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row (default 2)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the searched losses with torch.compile"
    )
    parser.add_argument(
        "--survivors", type=int, metavar="N", help="time N random two-stage survivors instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.survivors:
        return survivors(args.survivors)
    results = []
    for device in args.device or ["cpu"] + ["cuda"] * torch.cuda.is_available():
        where = (
            torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} thread(s)"
        )
        print(
            f"\n{where}, torch {torch.__version__}{', compiled' if args.compile else ''}\n\n"
            "| searched loss | against | size | searched, ms | hand-written, ms | ratio "
            "|\n|---|---|---|---|---|---|"
        )
        for name, other, size, ours, theirs in rows(device, args.compile):
            mine, hand, ratio = compare(ours, theirs, args.seconds, device)
            print(
                f"| {name} | {other} | {size} | {mine * 1e3:.3f} | {hand * 1e3:.3f} | {ratio:.2f} "
                "|",
                flush=True,
            )
            results.append(
                {
                    "device": where,
                    "loss": name,
                    "against": other,
                    "size": size,
                    "searched_s": mine,
                    "hand_written_s": hand,
                    "ratio": ratio,
                    "compiled": args.compile,
                }
            )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
