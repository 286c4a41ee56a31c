"""What each input of the richer spaces is worth on a head: a loss that uses it, beside the same
loss without it.

    python scripts/table_inputs.py --measure --seeds 0 1 2 --processes 2
    python scripts/table_inputs.py                    # the table of what has been trained

Faster R-CNN's proxy, one branch at a time, the other branch's loss the default. Trainings that
docs/lossbench has are not done again; the others are appended to docs/inputs as they are done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import table_known
from table_known import Known, missing, points
from trainings import Instrument, measure

from cse_autoloss.intervals import LossAndSeed
from cse_autoloss.lossbench import TASKS, Row, of_one_origin, read_rows
from cse_autoloss.report import table
from cse_autoloss.space import load_space

DETECTOR = "faster_rcnn_proxy"
PATH = Path(__file__).resolve().parents[1] / "docs" / "inputs" / DETECTOR / TASKS["head"]
CROSS_ENTROPY, IOU = "CrossEntropy", "Sub(1,Div(I,U))"


def _weighted(weight: str) -> str:
    return f"Neg(Dot(Mul(Y,{weight}),Log(Softmax(X))))"


# Branch, what is used of which inputs, the loss, and the loss that it would be without them
LOSSES = [
    ("cls", "Z: IoU after regression", "times 1 + Z", _weighted("Add(1,Z)"), CROSS_ENTROPY),
    ("cls", "R: IoU before regression", "times 1 + R", _weighted("Add(1,R)"), CROSS_ENTROPY),
    ("cls", "R", "times 2 - R", _weighted("Sub(2,R)"), CROSS_ENTROPY),
    ("cls", "A: the object's share", "times A^(1/4)", _weighted("Pow(A,0.25)"), CROSS_ENTROPY),
    ("cls", "A", "over A^(1/4)", _weighted("Div(1,Pow(A,0.25))"), CROSS_ENTROPY),
    ("cls", "K: rank in its image", "times 1 + K", _weighted("Add(1,K)"), CROSS_ENTROPY),
    ("cls", "K", "times 2 - K", _weighted("Sub(2,K)"), CROSS_ENTROPY),
    ("cls", "F: class frequency", "class-balanced", "ClassBalanced", CROSS_ENTROPY),
    ("cls", "F", "logit-adjusted", "LogitAdjusted", CROSS_ENTROPY),
    ("reg", "DX, DY, EW, EH: centres", "DIoU", "DIoU", IOU),
    ("reg", "and WP, HP, WT, HT: aspects", "CIoU", "CIoU", IOU),
    ("reg", "the same: sides", "EIoU", "EIoU", IOU),
    ("reg", "D: the image's diagonal", "MPDIoU", "MPDIoU", IOU),
    ("reg", "A: the target's share", "times A^(1/4)", f"Mul({IOU},Pow(A,0.25))", IOU),
    ("reg", "A", "over A^(1/4)", f"Div({IOU},Pow(A,0.25))", IOU),
]
SPACES = {"cls": "two_stage_cls_plus", "reg": "reg_plus_image"}


def known(branch: str, text: str) -> Known:
    """A loss by its name or formula."""
    space = load_space(SPACES[branch])
    named = {loss.name: str(loss.expression) for loss in space.losses.values()}
    return Known(text, branch, space.origin, named.get(text, text))


def wanted() -> list[Known]:
    every = [(branch, text) for branch, _, _, *texts in LOSSES for text in texts]
    return [known(branch, text) for branch, text in dict.fromkeys(every)]


def trainings() -> list[Row]:
    return [*table_known.trainings(DETECTOR), *read_rows(PATH)]


def train(seeds: list[int], processes: int) -> None:
    instrument = Instrument.of({"config": DETECTOR, "data_seed": 0, "device": "cpu"}, "head")
    there = [row for row in trainings() if row.origin == instrument.origin]
    measure(instrument, missing(wanted(), seeds, there), PATH, processes)


def page() -> list[str]:
    """The Markdown table, of the warm-up that most of these losses trained on."""
    rows = [row for row in trainings() if any(loss.is_of(row) for loss in wanted())]
    rows = of_one_origin(rows)
    fits = [LossAndSeed(points(wanted(), rows, split)) for split in ("val", "test")]
    lines = []
    for branch, inputs, text, *pair in LOSSES:
        loss, base = (known(branch, one) for one in pair)
        base_name = "cross-entropy" if base.name == CROSS_ENTROPY else "1 - IoU"
        there = all(loss in fit and base in fit for fit in fits)
        gains = [fit.gain(loss, base) for fit in fits] if there else []
        cells = [gain.text(2, sign=True) for gain in gains]
        lines.append(
            [inputs, f"{text}, over {base_name}", str(gains[0].n) if there else "0", *cells]
        )
    return table(["input", "loss", "seeds", "gain on val", "gain on test"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="train what is missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="that train side by side")
    options = parser.parse_args()
    if options.measure:
        train(options.seeds, options.processes)
    print("\n".join(page()))


if __name__ == "__main__":
    main()
