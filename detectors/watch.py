"""A training under watch: its curve, and when it is given up. In several processes that train
together, all give up or none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from mmdet.core import reduce_mean
from torch import distributed


class GivenUp(Exception):
    """Why a trial has no mAP."""


class Watch:
    """Follows a training: records its curve, reports progress, gives up on divergence and when time
    is over.

    Args:
        steps: of the training.
        progress: called now and then with the step and ``steps``.
        limit: seconds by ``spent``, measuring included; None for no limit.
        spent: seconds so far; see :func:`stopwatch`.

    Attributes:
        curve: (step, loss), fifty points or so.
    """

    def __init__(
        self,
        steps: int,
        progress: Callable[[int, int], None] | None = None,
        limit: float | None = None,
        spent: Callable[[], float] = time.monotonic,
    ) -> None:
        self.curve: list[tuple[int, float]] = []
        self._steps = steps
        self._progress = progress
        self._limit = limit
        self._spent = spent
        self._every = max(1, steps // 50)

    def step(self, step: int, loss: float, gradient_norm: float) -> None:
        """To be called after each step.

        Raises:
            GivenUp: the loss or its gradient is not finite, or time is over.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise GivenUp(
                f"diverged at step {step}: loss {loss:g}, gradient norm {gradient_norm:g}"
            )
        if step % self._every == 0 or step == self._steps:
            self.curve.append((step, loss))
            if self._progress:
                self._progress(step, self._steps)
        self.check_time()

    def check_time(self) -> None:
        """
        Raises:
            GivenUp: time is over.
        """
        if self._limit and mean_of_processes(float(self._spent() > self._limit)):
            raise GivenUp(
                f"time limit reached after {self.curve[-1][0] if self.curve else 0} of "
                f"{self._steps} steps"
            )


def stopwatch(device: str) -> Callable[[], float]:
    """Seconds since now; on a CPU a thread's own at most, which others' work does not add to."""
    wall, own = time.monotonic(), time.process_time()

    def spent() -> float:
        seconds = time.monotonic() - wall
        if device != "cpu":
            return seconds
        return min(seconds, (time.process_time() - own) / torch.get_num_threads())

    return spent


def mean_of_processes(value: float) -> float:
    """Over the processes that train a trial together; the value itself where there is one."""
    on_gpu = distributed.is_initialized() and distributed.get_backend() == "nccl"
    return reduce_mean(
        torch.tensor(value, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    ).item()
