"""A full-size detector's training step with searched and with default losses: time, memory, the
losses' share.

    python scripts/bench_detectors.py                                   # Faster R-CNN R50 and ATSS
    R50 at 640 pixels python scripts/bench_detectors.py --detectors fcos_r50 --size 800 --images 4
    --steps 50 --data coco:/path

On a GPU where there is one. Losses take turns, each with a model of its own, on the same images,
which are loaded before. The first steps of a turn are not counted. The losses' own time is that of
their modules alone, forward and backward, run again on what the head gave them in the last step;
what else a searched loss asks of the head (decoded boxes, IoUs) is in the step. Weights are new:
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import detectors  # noqa: F401 - before mmcv and mmdet: patches them

# isort: split
import torch
from mmcv.parallel import MMDataParallel
from mmcv.runner import build_optimizer
from mmdet.apis import set_random_seed
from mmdet.datasets import build_dataloader, build_dataset
from mmdet.models import build_detector
from torch import nn

from cse_autoloss.report import table
from detectors import config_files, configure
from detectors.images import quiet
from detectors.train import Training, read

UNCOUNTED = 3  # steps at the start of a turn
TURNS = 2
REPLAYS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    full = [name for name in config_files.config_names() if not name.endswith("_proxy")]
    parser.add_argument(
        "--detectors", nargs="+", choices=full, default=["faster_rcnn_r50", "atss_r50"]
    )
    parser.add_argument("--size", type=int, default=640, help="pixels of a square image's side")
    parser.add_argument("--images", type=int, default=2, help="a step")
    parser.add_argument("--steps", type=int, default=20, help="counted, of each turn")
    parser.add_argument("--data", default="embedded")
    options = parser.parse_args()
    rows = []
    for name in options.detectors:
        turns: dict[str, list[dict[str, float]]] = {}
        for _, losses in itertools.product(range(TURNS), ("default", "searched")):
            turns.setdefault(losses, []).append(turn(name, losses, options))
        default = statistics.median(turn["step"] for turn in turns["default"])
        for losses, measured in turns.items():
            step, own, memory = (
                statistics.median(turn[key] for turn in measured)
                for key in ("step", "losses", "memory")
            )
            rows.append(
                (
                    name if losses == "default" else "",
                    losses,
                    f"{1000 * step:,.1f}",
                    f"{step / default:.3f}",
                    f"{1000 * own:,.2f}",
                    f"{own / step:.2%}",
                    f"{memory / 2**30:.2f}",
                )
            )
    threads = f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.images} images of {options.size} pixels a step; torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else threads}\n"
    )
    memory = (
        "peak GiB on the GPU" if torch.cuda.is_available() else "peak GiB of the process so far"
    )
    print(
        "\n".join(
            table(
                (
                    "detector",
                    "losses",
                    "ms a step",
                    "to default",
                    "losses alone, ms",
                    "share",
                    memory,
                ),
                rows,
            )
        )
    )


def turn(name: str, losses: str, options: argparse.Namespace) -> dict[str, float]:
    """A new model trained some steps: median seconds of a step and of the losses alone, peak
    bytes."""
    config = read(
        Training(name, {"cls": losses, "reg": losses} if losses == "default" else {}, options.data)
    )
    config.model.backbone.init_cfg = None
    config.model.backbone.norm_eval = False  # the statistics of new weights are to be learnt
    for step in config.data.train.pipeline:
        if step["type"] == "Resize":
            step.update(img_scale=(options.size, options.size))
    set_random_seed(0)
    model = build_detector(config.model)
    with quiet():
        model.init_weights()
    on_gpu = torch.cuda.is_available()
    wrapped = MMDataParallel(
        model.cuda() if on_gpu else model, device_ids=[0] if on_gpu else None
    ).train()
    optimizer = build_optimizer(model, {**config.optimizer, "lr": 1e-4})
    with quiet():
        dataset = build_dataset(config.data.train)
    loader = build_dataloader(dataset, options.images, 0, dist=False, seed=0)
    batches = list(itertools.islice(loader, UNCOUNTED + options.steps))
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def keep(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        calls.append((module, args, kwargs))

    for head in heads(model):
        for key in configure.LOSS_KEYS.values():
            getattr(head, key).register_forward_hook(keep, with_kwargs=True)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for batch in batches:
        calls.clear()
        times.append(seconds(lambda batch=batch: train_step(wrapped, optimizer, batch)))
    memory = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    again = [seconds(lambda: replay(calls)) for _ in range(REPLAYS)]
    return {
        "step": statistics.median(times[UNCOUNTED:]),
        "losses": statistics.median(again),
        "memory": float(memory),
    }


def train_step(
    model: MMDataParallel, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> None:
    outputs = model.train_step(batch, optimizer)
    optimizer.zero_grad()
    outputs["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 35)
    optimizer.step()


def replay(calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]) -> None:
    """The losses of a step, forward and backward, up to their predictions."""
    for module, (prediction, *rest), kwargs in calls:
        prediction = prediction.detach().requires_grad_()
        module.forward(prediction, *rest, **kwargs).sum().backward()


def heads(model: nn.Module) -> list[nn.Module]:
    found = model.roi_head.bbox_head if hasattr(model, "roi_head") else model.bbox_head
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def seconds(action: Callable[[], None]) -> float:
    """Of the action, with all that it starts on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
