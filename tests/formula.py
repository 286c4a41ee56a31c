"""A trainer that computes mAP from a formula, at once: what a run does with a detector, without
one."""

import hashlib
import json
import os
import time
from pathlib import Path

from plain_trainer import PlainTrainer

from cse_autoloss.trial import TrialResult


def luck(*parts):
    """A number in [0, 1) that the parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def mAP(trial):
    losses = sorted(trial.losses.items())
    if trial.key.startswith("tune"):
        return 0.2 + 0.02 * trial.scale.get("cls", 1) + (0.03 if trial.lr_scale == 0.5 else 0)
    return 0.2 + 0.1 * luck(losses, trial.task) + 0.05 * luck(trial.seed, losses)


def result(trial, score):
    splits = ("tiny",) if trial.task == "tiny" else trial.evaluate
    metrics = {f"{split}/mAP": score - 0.07 * (split == "test") for split in splits}
    weights = dict.fromkeys(("cls", "reg"), 1.0)
    mAP = metrics[f"{splits[0]}/mAP"]
    seen = detections(trial) if trial.detections else {}
    return TrialResult(
        trial.key, mAP, metrics, (), weights, 0.01, 1, provenance={}, detections=seen
    )


def detections(trial):
    """Ten images of an object each, which the losses find or do not find, by luck."""
    losses = sorted(trial.losses.items())
    return {
        f"folder/{place}.jpg": {
            "objects": [[10, 10, 50, 60, 0]],
            "found": [[11, 10, 50, 61, 0, 0.9]]
            if luck(losses, place) < 0.5
            else [[60, 10, 90, 61, 0, 0.4]],
        }
        for place in range(10)
    }


class FormulaTrainer(PlainTrainer):
    """Options: ``log``, a file that gets a line for each training; ``seconds`` of each;
    ``version``, which stands for what a run's numbers depend on."""

    @staticmethod
    def check(options):
        return {
            "classes": ["thing"],
            "images": {"train": 1, "val": 1},
            "digests": {"data": os.environ.get("FORMULA_DATA", "one")},
        }

    @staticmethod
    def export(options, found, *args):
        return {"best.py": json.dumps(dict(found.losses))}

    def __init__(self, options, prepared):
        assert prepared == b"weights"
        self._log, self._seconds = Path(options["log"]), options.get("seconds", 0.0)

    def train(self, trial, progress=None):
        time.sleep(self._seconds)
        with open(self._log, "a") as log:
            log.write(f"{trial.key}\n")
        return result(trial, mAP(trial))
