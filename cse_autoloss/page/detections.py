"""What the default loss and the best found one detect in the same images, for the page.

The trainings of the comparison's first seed tell their boxes (``TrialResult.detections``). Of
their images a few are chosen by a rule that the page states, so that nobody has picked them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cse_autoloss.config import parse_config
from cse_autoloss.journal import DEFAULT, FOUND, Journal
from cse_autoloss.stages import Ladder
from cse_autoloss.status import read_comparison
from cse_autoloss.trial import HasPictures

KEPT = "detections"  # the journal's key
EACH = 2  # images of each kind: gained most, lost most, drawn at random
OVERLAP = 0.5  # IoU from which on a box is an object's

Box = Sequence[float]
Seen = Mapping[str, Sequence[Box]]  # "objects" and "found", of one image


def keep_detections(journal: Journal, trainer: object, detector: Mapping[str, Any]) -> None:
    """Choose images and write them down, unless that is done, or the trainer shows none.

    Args:
        trainer: the run's class.
        detector: its options.
    """
    pair = _pair(journal)
    if pair is None or not isinstance(trainer, HasPictures):
        return
    labels, (default, winner) = pair
    if (journal[KEPT] or {}).get("labels") == labels:
        return
    chosen = choose(default, winner)
    pictures = trainer.pictures(detector, "test", [name for name, _ in chosen])
    kept = [
        {
            "name": name,
            "kind": kind,
            "width": pictures[name].width,
            "height": pictures[name].height,
            "jpeg": base64.b64encode(pictures[name].jpeg).decode(),
            "objects": default[name]["objects"],
            "found": [of[name]["found"] for of in (default, winner)],
        }
        for name, kind in chosen
        if name in pictures
    ]
    objects = sum(len(seen["objects"]) for seen in default.values())
    with journal.step():
        journal[KEPT] = {
            "labels": labels,
            "images": len(default),
            "objects": objects,
            "shown": kept,
        }


def read_detections(journal: Journal) -> dict[str, Any] | None:
    """What the page draws; numbers, text and JPEG alone, whatever stands in the journal."""
    kept = journal[KEPT]
    if not kept:
        return None
    return {
        "labels": [str(label) for label in kept["labels"]],
        "images": int(kept["images"]),
        "objects": int(kept["objects"]),
        "overlap": OVERLAP,
        "each": EACH,
        "shown": [_drawn(shown) for shown in kept["shown"]],
    }


def _drawn(shown: Mapping[str, Any]) -> dict[str, Any]:
    jpeg = base64.b64encode(base64.b64decode(shown["jpeg"], validate=True)).decode()
    objects = [[float(value) for value in box] for box in shown["objects"]]
    found = [[[float(value) for value in box] for box in boxes] for boxes in shown["found"]]
    return {
        "name": str(shown["name"]).replace("\\", "/").rpartition("/")[2],
        "kind": str(shown["kind"]),
        "width": int(shown["width"]),
        "height": int(shown["height"]),
        "image": f"data:image/jpeg;base64,{jpeg}",
        "objects": objects,
        "found": [
            [[*box, right] for box, right in zip(boxes, hits(objects, boxes), strict=True)]
            for boxes in found
        ],
    }


def _pair(
    journal: Journal,
) -> tuple[list[str], tuple[Mapping[str, Seen], Mapping[str, Seen]]] | None:
    """The labels of the default and of the best found loss, and what both detect; None where they
    do not tell."""
    stage = Ladder.of(parse_config(journal["config"]).stages).comparison
    found = [row.label for row in read_comparison(journal) if row.label.startswith(FOUND)]
    told = {
        row.label: row.result.detections
        for row in journal.trials(stage, finished=True)
        if row.result and row.result.detections
    }
    if not found or not {DEFAULT, found[0]} <= told.keys():
        return None
    both = told[DEFAULT], told[found[0]]
    return ([DEFAULT, found[0]], both) if both[0].keys() == both[1].keys() else None


def choose(default: Mapping[str, Seen], winner: Mapping[str, Seen]) -> list[tuple[str, str]]:
    """Names of images and why they are shown: ``"gained"`` and ``"lost"`` most by the winner, and
    ``"drawn"`` at random from the others.

    An image's score is the F1 of its boxes: of those that are an object's, of those that are there.
    """
    names = [name for name, seen in default.items() if seen["objects"]]
    gain = {name: f1(winner[name]) - f1(default[name]) for name in names}
    order = sorted(names, key=lambda name: -gain[name])  # stable: the first of equal ones
    chosen = [(name, "gained") for name in order[:EACH] if gain[name] > 0]
    chosen += [(name, "lost") for name in order[: -EACH - 1 : -1] if gain[name] < 0]
    rest = [name for name in names if name not in dict(chosen)]
    drawn = np.random.default_rng(0).permutation(len(rest))[:EACH]
    return chosen + [(rest[place], "drawn") for place in drawn.tolist()]


def f1(seen: Seen) -> float:
    """Twice the boxes that are an object's over all boxes and objects of an image."""
    right = sum(hits(seen["objects"], seen["found"]))
    total = len(seen["objects"]) + len(seen["found"])
    return 2 * right / total if total else 1.0


def hits(objects: Sequence[Box], found: Sequence[Box]) -> list[bool]:
    """Whether each box is an object's: surest first, each takes the object of its class that it
    overlaps most, if no other has, with an IoU of at least ``OVERLAP``."""
    free, right = list(objects), [False] * len(found)
    for place in sorted(range(len(found)), key=lambda place: -found[place][5]):
        box = found[place]
        same = [thing for thing in free if thing[4] == box[4] and _iou(thing, box) >= OVERLAP]
        if same:
            free.remove(max(same, key=lambda thing: _iou(thing, box)))
            right[place] = True
    return right


def _iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)
