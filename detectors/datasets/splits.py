"""Splits that a data set lacks, taken from those that it has; nothing is seen in two of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cse_autoloss.trial import ConfigError
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import SPLITS, Part

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}  # of a set that comes without splits
LEAST_SIDE = 32  # pixels; mmdet does not train on images with a shorter one


def complete(parts: list[Part], seed: int, findings: Findings) -> dict[str, Part]:
    """``train``, ``val``, ``test`` and ``tiny``, from any of them or from one set without splits.

    * Without an annotated test split, val is halved: every second source image, by image id.
    * Without val, or without any splits, they are drawn by the seed.
    * ``tiny`` is one image of each category, from train.

    Images that are made of one source (Roboflow's ``x.rf.HASH.jpg``) stay together.

    Raises:
        ConfigError: there is no train split, or there are too few images.
    """
    found: dict[str | None, Part] = {part.split: part for part in parts}
    if "test" in found and len(found) > 1 and not found["test"].annotations:
        findings.note(
            "no test", found["test"].label, "no annotations; val is halved for a test split"
        )
        del found["test"]
    if len(found) == 1 and (only := next(iter(found.values()))).split != "tiny":
        findings.note(
            "drawn",
            only.label,
            f"one set: train, val and test are drawn from it (seed {seed}: "
            f"{', '.join(f'{share:.0%}' for share in SHARES.values())})",
        )
        found = dict(_draw(only, SHARES, seed))
    if "train" not in found:
        names = ", ".join(split or "a set of no split" for split in found)
        raise ConfigError(f"{parts[0].file}: no train split; found {names} alone")
    if "val" not in found:
        findings.note(
            "drawn", found["train"].label, f"no val split: it is drawn from train (seed {seed})"
        )
        shares = {"train": 0.8, "val": 0.2}
        found |= _draw(found["train"], shares, seed)
    if "test" not in found:
        found["val"], found["test"] = _halves(found["val"])
    if "tiny" not in found:
        found["tiny"] = _one_image_each(found["train"])
    return {split: replace(found[split], split=split) for split in SPLITS}


def source(name: str) -> str:
    """What an image was made of: Roboflow's augmented copies have one name before ``.rf.``."""
    return Path(name.replace("\\", "/")).name.split(".rf.")[0]


def leaks(splits: dict[str, Part], findings: Findings) -> None:
    """Note images of val and test that are in train, or are made of one that is."""
    train = splits["train"]
    paths = set(train.paths.values())
    sources = {source(i["file_name"]) for i in train.images if ".rf." in i["file_name"]}
    for split in ("val", "test"):
        part = splits[split]
        same = sum(path in paths for path in part.paths.values())
        copies = (
            sum(source(image["file_name"]) in sources for image in part.images) if sources else 0
        )
        if same:
            findings.note(
                "leak",
                part.label,
                f"{same:,} of {len(part.images):,} images of {split} are images of train, too",
            )
        elif copies:
            findings.note(
                "leak",
                part.label,
                f"{copies:,} of {len(part.images):,} images of {split} are made of images that "
                "train has, too",
            )


def _draw(part: Part, shares: dict[str, float], seed: int) -> dict[str, Part]:
    groups = _groups(part)
    if len(groups) < len(shares):
        raise ConfigError(
            f"{part.label}: {len(groups)} images (copies of one counted once) cannot be split "
            f"into {', '.join(shares)}"
        )
    random.Random(seed).shuffle(groups)
    drawn: dict[str, Part] = {}
    start = 0
    for place, (split, share) in enumerate(shares.items()):
        left = len(shares) - place - 1  # each of the others needs one, too
        size = len(groups) - start if not left else max(1, round(share * len(groups)))
        size = min(size, len(groups) - start - left)
        drawn[split] = replace(_keep(part, groups[start : start + size]), split=split)
        start += size
    return drawn


def _halves(part: Part) -> tuple[Part, Part]:
    groups = _groups(part)
    if len(groups) < 2:
        raise ConfigError(
            f"{part.label}: one image cannot be halved into val and test; give at least two, or a "
            "test split"
        )
    return _keep(part, groups[0::2]), _keep(part, groups[1::2])


def _groups(part: Part) -> list[list[Any]]:
    """Image ids, those of one source together, in the order of ids."""
    groups: dict[str, list[Any]] = {}
    for image in sorted(part.images, key=lambda image: image["id"]):
        name = image["file_name"]
        key = source(name) if ".rf." in name else part.paths.get(image["id"], name)
        groups.setdefault(key, []).append(image["id"])
    return list(groups.values())


def _one_image_each(part: Part) -> Part:
    """For each category one image of its own: that with the fewest objects, whose object is the
    largest."""
    crowd = Counter(annotation["image_id"] for annotation in part.annotations)
    usable = {image["id"] for image in part.images if is_trained_on(image)}
    of_category: dict[Any, list[dict[str, Any]]] = {c["id"]: [] for c in part.categories}
    for annotation in part.annotations:
        if not annotation["iscrowd"] and annotation["image_id"] in usable:
            of_category[annotation["category_id"]].append(annotation)
    chosen: set[Any] = set()
    for found in of_category.values():
        found = [a for a in found if a["image_id"] not in chosen] or found
        if found:
            best = min(found, key=lambda a: (crowd[a["image_id"]], -a["area"], a["image_id"]))
            chosen.add(best["image_id"])
    return _keep(part, [[identity] for identity in chosen])


def is_trained_on(image: dict[str, Any]) -> bool:
    return min(image["width"], image["height"]) >= LEAST_SIDE


def _keep(part: Part, groups: Iterable[list[Any]]) -> Part:
    ids = {identity for group in groups for identity in group}
    return replace(
        part,
        images=[image for image in part.images if image["id"] in ids],
        annotations=[a for a in part.annotations if a["image_id"] in ids],
        paths={identity: part.paths[identity] for identity in ids},
        as_is=False,
    )
