"""A trainer that does what a trial's seed says, to see how the cluster takes it. It trains
nothing."""

import os
import signal
import time
from pathlib import Path

from plain_trainer import PlainTrainer

from cse_autoloss.trial import TrialResult


class MisbehavingTrainer(PlainTrainer):
    RAISES, DIES, DIES_ONCE, HANGS, SECOND_DIES_ONCE, CRASHES = 1, 2, 3, 4, 5, 6
    MEMORY_ONCE, GPU_BREAKS_ONCE, NOT_A_NUMBER, NO_TEXT, OTHERS_RESULT, SLEEPS = 7, 8, 9, 10, 11, 12

    def __init__(self, options, prepared):
        assert prepared == b"weights"
        self._folder = Path(options["folder"])
        self._broken = False

    def train(self, trial, progress=None):
        with open(self._folder / trial.key, "a") as log:
            log.write("x")
        first = (self._folder / trial.key).stat().st_size == 1
        match trial.seed:
            case self.RAISES:
                raise RuntimeError("the loss\nis no loss")
            case self.HANGS:
                time.sleep(600)
            case self.DIES:
                os._exit(1)
            case self.DIES_ONCE if first:
                os._exit(1)
            case self.CRASHES:
                os.kill(os.getpid(), signal.SIGSEGV)
            case self.MEMORY_ONCE if first:
                raise MemoryError("cannot allocate 1 TB")
            case self.GPU_BREAKS_ONCE if first:
                self._broken = True
            case self.SECOND_DIES_ONCE if _rank() == 1:
                died = self._folder / f"{trial.key}-died"
                if not died.exists():
                    died.touch()
                    os._exit(1)
            case self.NOT_A_NUMBER:
                return TrialResult(trial.key, float("nan"), {"val/mAP": float("nan")})
            case self.NO_TEXT:
                return TrialResult(trial.key, "0.3", {"val/mAP": "0.3"})
            case self.OTHERS_RESULT:
                return TrialResult("good-1", 0.9, {"val/mAP": 0.9})
        if self._broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        time.sleep(trial.lr_scale if trial.seed == self.SLEEPS else 0.2)
        return TrialResult(
            trial.key,
            mAP=0.5,
            metrics={"val/mAP": 0.5},
            seconds=0.2,
            provenance={
                "process": os.getpid(),
                "nice": os.nice(0),
                "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            },
        )


def _rank():
    from torch import distributed  # workers start at once without it

    return distributed.get_rank()


class BrokenTrainer(MisbehavingTrainer):
    def __init__(self, options, prepared):
        raise FileNotFoundError("no annotations at /data/coco")


class SlowTrainer(MisbehavingTrainer):
    """The first worker to start never gets done with it."""

    def __init__(self, options, prepared):
        super().__init__(options, prepared)
        try:
            (self._folder / "one-hangs").touch(exist_ok=False)
        except FileExistsError:
            return
        time.sleep(600)


class EndlessPreparation(MisbehavingTrainer):
    @staticmethod
    def prepare(options):
        time.sleep(600)


class DyingPreparation(MisbehavingTrainer):
    """Its preparation is killed the first time."""

    @staticmethod
    def prepare(options):
        try:
            (Path(options["folder"]) / "killed").touch(exist_ok=False)
        except FileExistsError:
            return b"weights"
        os.kill(os.getpid(), signal.SIGKILL)
