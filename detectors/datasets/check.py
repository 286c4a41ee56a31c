"""What can be wrong with annotated sets as a whole: boxes against their images, masks, classes,
splits that nothing can be trained or measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from detectors.datasets.coco import is_number
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import Part
from detectors.datasets.splits import LEAST_SIDE, is_trained_on

_MANY = 0.2  # of a file's boxes: so many that reach out of their images are no slips of the hand


def boxes(part: Part, findings: Findings) -> None:
    """Leave out boxes without area and outside of their images; recognise corners and shares in
    width's place."""
    if not part.annotations:
        return
    sizes = {image["id"]: (image["width"], image["height"]) for image in part.images}
    box = np.array([a["bbox"] for a in part.annotations], float)
    size = np.array([sizes[a["image_id"]] for a in part.annotations], float)
    low, high = box[:, :2], box[:, :2] + box[:, 2:]
    flat = (box[:, 2:] <= 0).any(1)
    outside = ((high <= 0) | (low >= size)).any(1)
    reach = ((low < -1) | (high > size + 1)).any(1)
    first = part.annotations[int(reach.argmax())] if reach.any() else part.annotations[0]
    shown = f"annotation {first['id']}: {[round(x, 2) for x in first['bbox']]}"
    count = f"{int(reach.sum()):,} of {len(box):,} boxes reach out of their images"
    corners = (box[:, 2:] > low).all() and (low >= -1).all() and (box[:, 2:] <= size + 1).all()
    of_coco = part.file.suffix == ".json"  # the others' boxes cannot be taken for each other
    if of_coco and reach.mean() >= _MANY and corners:
        findings.error(
            "corners",
            part.label,
            f"{count} and all would lie in them as x1 y1 x2 y2 ({shown}); "
            "a bbox is [x, y, width, height]",
        )
        return
    if of_coco and box.max() <= 1.0 and size.min() > 2:
        findings.error(
            "shares",
            part.label,
            f"boxes are shares of the image, 0 to 1 ({shown}); a bbox is [x, y, width, height] in "
            "pixels",
        )
        return
    if reach.any():
        findings.note("reach", part.label, f"{count} by more than a pixel, the first is {shown}")
    if (thin := (box[:, 2:] < 1).any(1) & ~outside & ~flat).any():
        findings.note(
            "thin",
            part.label,
            f"{int(thin.sum()):,} of {len(box):,} boxes are thinner than a pixel: mmdet does not "
            "train on such, and measures them",
        )
    larger = np.array([a["area"] for a in part.annotations]) > 1.1 * box[:, 2:].prod(1) + 2
    if (larger := larger & ~flat & ~outside).any():
        findings.note(
            "area",
            part.label,
            f"{int(larger.sum()):,} of {len(box):,} areas are larger than their boxes; mAP_s, "
            "mAP_m and mAP_l go by them",
        )
    for mask, what in (
        (flat, "a box without area"),
        (outside & ~flat, "a box outside of its image"),
    ):
        for place in np.flatnonzero(mask):
            annotation = part.annotations[place]
            where = f"annotation {annotation['id']}"
            findings.left_out(what, part.label, f"{where}: {what}, {annotation['bbox']}")
    if (gone := flat | outside).any():
        part.annotations = [a for a, out in zip(part.annotations, gone, strict=True) if not out]
        part.as_is = False


def masks(part: Part, findings: Findings) -> None:
    """Report objects without a mask that a mask head could learn from."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in part.images}
    for annotation in part.annotations:
        if annotation["iscrowd"]:
            continue
        wrong = _wrong_mask(annotation.get("segmentation"), sizes[annotation["image_id"]])
        if wrong:
            findings.error(
                f"mask {wrong[:12]}",
                part.label,
                f"annotation {annotation['id']}: {wrong}; the detector has a mask head: annotate "
                "masks, or take a detector without one",
            )


def _wrong_mask(mask: Any, size: list[int]) -> str | None:
    if not mask:
        return "no segmentation"
    if isinstance(mask, dict):
        if mask.get("size") != size:
            return f"segmentation of size {mask.get('size')}, and the image's is {size}"
        counts = mask.get("counts")
        if isinstance(counts, str) and counts:
            return None
        if isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts):
            if sum(counts) == size[0] * size[1]:
                return None
            return (
                f"segmentation's counts add up to {sum(counts)}, not to its {size[0] * size[1]} "
                "pixels"
            )
        return "segmentation's counts should be text or a list of run lengths"
    if not isinstance(mask, list) or not all(isinstance(p, list) for p in mask):
        return "segmentation should be a list of polygons or an RLE"
    if any(len(p) < 6 or len(p) % 2 or not all(map(is_number, p)) for p in mask):
        return "segmentation's polygons should each be x, y of three points or more"
    return None


def same_classes(parts: Sequence[Part], findings: Findings) -> None:
    """Give all parts the categories of the first (train's), matched by name; drop a root category
    that has no object and is others' supercategory, as Roboflow writes one."""
    used: set[str] = set()
    for part in parts:
        names = {category["id"]: category["name"] for category in part.categories}
        used |= {names[annotation["category_id"]] for annotation in part.annotations}
    first = parts[0]
    named = [(c["name"], c.get("supercategory")) for c in first.categories]
    above = {name for own, name in named if isinstance(name, str) and name != own}
    kept = []
    for category in first.categories:
        if category["name"] in above - used:
            findings.note(
                "root class",
                first.label,
                f"class {category['name']!r} is left out: it is the others' supercategory and has "
                "no object",
            )
        else:
            kept.append({"id": category["id"], "name": category["name"]})
    ids = {category["name"]: category["id"] for category in kept}
    for part in parts:
        names = {category["id"]: category["name"] for category in part.categories}
        strange = sorted({names[a["category_id"]] for a in part.annotations} - ids.keys())
        for name in strange:
            findings.error(
                "classes",
                part.label,
                f"class {name!r} has objects here and is none of {first.file.name}'s classes "
                f"({', '.join(map(repr, list(ids)[:8]))}{', ...' if len(ids) > 8 else ''})",
            )
        if strange:
            continue
        own = {c["name"]: c["id"] for c in part.categories}
        if any(own.get(name, identity) != identity for name, identity in ids.items()):
            findings.note(
                "class ids", part.label, "its classes have other ids; they are matched by name"
            )
        if [(c["id"], c["name"]) for c in part.categories] != [(c["id"], c["name"]) for c in kept]:
            part.annotations = [
                {**a, "category_id": ids[names[a["category_id"]]]} for a in part.annotations
            ]
            part.as_is = False
        part.categories = kept


def usable(parts: Sequence[Part], findings: Findings) -> None:
    """Report sets that nothing can be trained or measured on, and classes that train lacks."""
    for part in parts:
        split = part.split
        objects = [a for a in part.annotations if not a["iscrowd"]]
        if not objects:
            why = ", all are crowds or to be ignored" if part.annotations else ""
            where = f"the {split} split" if split else "it"
            findings.error(
                f"no object in {split}",
                part.label,
                f"no annotated object in {where}{why}; there should be at least one box that has "
                "an area and is not a crowd",
            )
            continue
        if split not in ("train", None):
            continue
        small = {image["id"] for image in part.images if not is_trained_on(image)}
        if small:
            report = findings.error if len(small) == len(part.images) else findings.left_out
            report(
                "small",
                part.label,
                f"{len(small):,} of {len(part.images):,} images have a side under "
                f"{LEAST_SIDE} pixels, and mmdet does not train on such; enlarge them",
            )
            if all(a["image_id"] in small for a in objects) and len(small) < len(part.images):
                findings.error(
                    "small objects", part.label, "all objects of train are in such small images"
                )
        counts = Counter(a["category_id"] for a in objects)
        lacking = [c["name"] for c in part.categories if c["id"] not in counts]
        if lacking:
            findings.note(
                "lacking",
                part.label,
                f"no object in train of {len(lacking)} of {len(part.categories)} classes: "
                f"{', '.join(lacking[:8])}{', ...' if len(lacking) > 8 else ''}",
            )
