"""A trainer that does what a trial's seed says, to see how the cluster takes it. It trains
nothing."""

import os
import time
from pathlib import Path

import torch

from cse_autoloss.trial import TrialResult


class MisbehavingTrainer:
    RAISES, DIES, DIES_ONCE, HANGS, SECOND_DIES_ONCE = 1, 2, 3, 4, 5

    def __init__(self, options, prepared):
        assert prepared == b"weights"
        self._folder = Path(options["folder"])

    @staticmethod
    def prepare(options):
        return b"weights"

    def train(self, trial, progress=None):
        with open(self._folder / trial.key, "a") as log:
            log.write("x")
        if trial.seed == self.RAISES:
            raise RuntimeError("the loss\nis no loss")
        if trial.seed == self.HANGS:
            time.sleep(600)
        if (
            trial.seed == self.DIES
            or trial.seed == self.DIES_ONCE
            and (self._folder / trial.key).stat().st_size == 1
        ):
            os._exit(1)
        if trial.seed == self.SECOND_DIES_ONCE and torch.distributed.get_rank() == 1:
            died = self._folder / f"{trial.key}-died"
            if not died.exists():
                died.touch()
                os._exit(1)
        time.sleep(0.2)
        return TrialResult(
            trial.key,
            mAP=0.5,
            seconds=0.2,
            provenance={"process": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")},
        )


class BrokenTrainer(MisbehavingTrainer):
    def __init__(self, options, prepared):
        raise FileNotFoundError("no annotations at /data/coco")
