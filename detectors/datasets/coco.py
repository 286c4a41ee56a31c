"""Data sets in COCO format, by name: checked, their classes read from their annotations, their four
splits found.

``embedded`` is the project's own (:mod:`detectors.datasets.shapes`), drawn into the user's cache on
its first use. ``coco:/path`` is a folder of the user's with the usual files::

    annotations/instances_train2017.json   train2017/
    annotations/instances_val2017.json     val2017/
    annotations/instances_test2017.json    test2017/     (may be absent)

``voc:/path`` is a folder in PASCAL VOC's format (:mod:`detectors.datasets.voc`), taken as the COCO
files that it becomes.

Splits that a folder does not have are derived from those that it has. Without an annotated test
split, val is halved (every second image, by image id): one half is the fitness, the other the test
that the search never sees. ``tiny``, one image of each category, is taken from train. Derived
annotations are kept in the user's cache; a user's folder is never written to.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cse_autoloss.trial import ConfigError
from detectors.cache import cache_dir, digest, write_atomically
from detectors.datasets import shapes, voc

_SPLITS = ("train", "val", "test", "tiny")
_DERIVATION = "1"  # counts the ways in which this module has derived splits; cached ones of another way are not used


@dataclass(frozen=True)
class Split:
    """One split: a COCO annotation file, the folder of its images, and how many there are."""

    ann_file: str
    img_prefix: str
    images: int


@dataclass(frozen=True)
class DataSet:
    """A data set that has been checked.

    Attributes:
        name: as the user named it.
        classes: names, in the order of their category ids.
        splits: ``train``, ``val``, ``test``, ``tiny``.
        digest: of all annotations.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    digest: str


def find(name: str, seed: int = 0) -> DataSet:
    """The data set of that name, checked.

    Args:
        name: ``embedded``, ``coco:/path`` or ``voc:/path``.
        seed: of the embedded data set; ignored by others.

    Raises:
        ConfigError: one line that names the file and what would be right.
    """
    if name == "embedded":
        return _read(name, _embedded(seed))
    kind, colon, path = name.partition(":")
    if kind not in ("coco", "voc") or not path:
        raise ConfigError(
            f"detector.data: {name!r} is neither 'embedded' nor of the form 'coco:/path' or 'voc:/path'"
        )
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        right = (
            "ImageSets/, Annotations/ and JPEGImages/"
            if kind == "voc"
            else "annotations/, train2017/ and val2017/"
        )
        raise ConfigError(f"detector.data: {folder} is no folder; it should hold {right}")
    return _read(name, voc.as_coco(folder) if kind == "voc" else folder)


def _embedded(seed: int) -> Path:
    folder = cache_dir() / "data" / f"shapes-v{shapes.VERSION}.{shapes.LAYOUT}-seed{seed}"
    if not folder.is_dir():
        try:
            shapes.write(folder, seed)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first: its bytes are ours
                raise
    return folder


def _read(name: str, folder: Path) -> DataSet:
    files = [path for path in (_ann_file(folder, split) for split in _SPLITS) if path.is_file()]
    checksum = digest(_DERIVATION, *(path.name + digest(path.read_bytes()) for path in files))
    contents = {split: _content(folder, split) for split in _SPLITS}
    for split in ("train", "val"):
        if contents[split] is None:
            raise ConfigError(
                f"{_ann_file(folder, split)}: no such file; a COCO-format folder has one"
            )
    categories = contents["train"]["categories"]
    for split, content in contents.items():
        if content is not None and content["categories"] != categories:
            raise ConfigError(
                f"{_ann_file(folder, split)}: its categories differ from train's "
                f"({_difference(categories, content['categories'])}); ids and names must be the same in every split"
            )
    if contents["test"] is None:
        contents["val"], contents["test"] = (_part(contents["val"], start) for start in (0, 1))
    if contents["tiny"] is None:
        contents["tiny"] = _one_image_each(contents["train"])
    splits = {}
    for split, content in contents.items():
        if not any(not annotation["iscrowd"] for annotation in content["annotations"]):
            raise ConfigError(
                f"{content.get('file', _ann_file(folder, split))}: no annotated object in the {split} split; "
                "it should have at least one box that has an area and is not a crowd"
            )
        ann_file = content.get("file")
        if ann_file is None:
            path = cache_dir() / "annotations" / checksum / f"instances_{split}.json"
            if not path.is_file():
                write_atomically(path, json.dumps({key: content[key] for key in _LISTS}).encode())
            ann_file = str(path)
        splits[split] = Split(ann_file, content["folder"], len(content["images"]))
    return DataSet(name, tuple(category["name"] for category in categories), splits, checksum)


_LISTS = ("images", "annotations", "categories")  # of a COCO annotation file


def _ann_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def _content(folder: Path, split: str) -> dict[str, Any] | None:
    """What the annotation file says, mended, with ``folder`` (its images') and, if nothing was
    mended, ``file``."""
    path = _ann_file(folder, split)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    for key in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ConfigError(
                f"{path}: no list '{key}'; a COCO annotation file has images, annotations and categories"
            )
    if not content["images"]:
        raise ConfigError(f"{path}: no images; the {split} split should have at least one")
    if not content["categories"]:
        raise ConfigError(
            f"{path}: no categories; there should be one for each class, with id and name"
        )
    _check_images(path, content["images"], folder / f"{split}2017")
    categories = _check_categories(path, content["categories"])
    annotations = _check_annotations(path, content["annotations"], content["images"], categories)
    mended = {
        "images": content["images"],
        "annotations": annotations,
        "categories": categories,
        "folder": f"{folder / f'{split}2017'}{os.sep}",
    }
    same = annotations == content["annotations"] and [c["id"] for c in content["categories"]] == [
        c["id"] for c in categories
    ]
    return {**mended, "file": str(path)} if same else mended


def _check_images(path: Path, images: list[Any], folder: Path) -> None:
    for image in images:
        for key in ("id", "file_name", "width", "height"):
            if not isinstance(image, dict) or key not in image:
                raise ConfigError(f"{path}: images: {str(image)[:80]} has no '{key}'")
        if not (folder / image["file_name"]).is_file():
            raise ConfigError(f"{folder / image['file_name']}: no such image; {path.name} names it")
    _check_unique(path, "images", images)


def _check_categories(path: Path, categories: list[Any]) -> list[dict[str, Any]]:
    """Sorted by id: mmdet numbers classes in the file's order, which must be one order for all
    files."""
    for category in categories:
        if (
            not isinstance(category, dict)
            or "id" not in category
            or not isinstance(category.get("name"), str)
        ):
            raise ConfigError(
                f"{path}: categories: {str(category)[:80]} should have an id and a name"
            )
    _check_unique(path, "categories", categories)
    name, count = Counter(category["name"] for category in categories).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{path}: categories: {count} are named {name!r}; each should have its own name"
        )
    return [{"id": c["id"], "name": c["name"]} for c in sorted(categories, key=lambda c: c["id"])]


def _check_annotations(
    path: Path,
    annotations: list[Any],
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """With ``area`` and ``iscrowd``, which pycocotools asks for, and without boxes that have no
    area."""
    image_ids, category_ids = (
        {image["id"] for image in images},
        {category["id"] for category in categories},
    )
    kept = []
    for annotation in annotations:
        if not isinstance(annotation, dict) or "id" not in annotation:
            raise ConfigError(f"{path}: annotations: {str(annotation)[:80]} has no 'id'")
        place = f"{path}: annotation {annotation['id']}"
        if annotation.get("image_id") not in image_ids:
            raise ConfigError(
                f"{place}: image_id {annotation.get('image_id')!r} is the id of no image"
            )
        if annotation.get("category_id") not in category_ids:
            raise ConfigError(
                f"{place}: category_id {annotation.get('category_id')!r} is the id of no category"
            )
        box = annotation.get("bbox")
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(isinstance(x, (int, float)) for x in box)
        ):
            raise ConfigError(
                f"{place}: bbox should be [x, y, width, height] in pixels, found {str(box)[:60]}"
            )
        if box[2] > 0 and box[3] > 0:
            area = annotation.get("area") or box[2] * box[3]
            kept.append({**annotation, "area": area, "iscrowd": annotation.get("iscrowd", 0)})
    _check_unique(path, "annotations", annotations)
    if len(kept) < len(annotations):
        warnings.warn(
            f"{path}: {len(annotations) - len(kept)} boxes without area are left out", stacklevel=2
        )
    return kept


def _check_unique(path: Path, kind: str, entries: list[dict[str, Any]]) -> None:
    identity, count = (
        Counter(entry["id"] for entry in entries).most_common(1)[0] if entries else (None, 0)
    )
    if count > 1:
        raise ConfigError(f"{path}: {kind}: {count} have the id {identity!r}; ids should be unique")


def _difference(train: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    expected, found = ({(c["id"], c["name"]) for c in categories} for categories in (train, other))
    words = [
        f"only in train: {sorted(expected - found)[:3]}",
        f"only here: {sorted(found - expected)[:3]}",
    ]
    return "; ".join(word for word in words if not word.endswith("[]"))


def _part(content: dict[str, Any], start: int) -> dict[str, Any]:
    return _keep(
        content,
        {
            image["id"]
            for image in sorted(content["images"], key=lambda image: image["id"])[start::2]
        },
    )


def _one_image_each(content: dict[str, Any]) -> dict[str, Any]:
    """For each category one image of its own: that with the fewest objects, whose object is the
    largest."""
    crowd = Counter(annotation["image_id"] for annotation in content["annotations"])
    chosen: set[Any] = set()
    for category in content["categories"]:
        found = [
            a
            for a in content["annotations"]
            if a["category_id"] == category["id"] and not a["iscrowd"]
        ]
        found = [a for a in found if a["image_id"] not in chosen] or found
        if found:
            best = min(found, key=lambda a: (crowd[a["image_id"]], -a["area"], a["image_id"]))
            chosen.add(best["image_id"])
    return _keep(content, chosen)


def _keep(content: dict[str, Any], image_ids: set[Any]) -> dict[str, Any]:
    return {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in image_ids],
        "categories": content["categories"],
        "folder": content["folder"],
    }
