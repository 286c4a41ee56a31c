"""Data in PASCAL VOC's format, written once into the user's cache as the COCO files that everything
else reads.

``voc:/path`` is a folder of a year, or one that holds several (``VOCdevkit``), each with the usual
files::

    Annotations/*.xml   JPEGImages/*   ImageSets/Main/train.txt, val.txt, test.txt (may be absent)

Boxes are read as mmdet reads them (``mmdet/datasets/xml_style.py``): pixels count from 1, so 1 is
taken from each coordinate. A *difficult* object becomes a crowd: like in VOC's own evaluation, it
is neither trained on nor counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cse_autoloss.trial import ConfigError
from detectors.cache import cache_dir, digest, write_atomically

_SPLITS = ("train", "val", "test")
_VERSION = "1"  # of this conversion


def as_coco(folder: Path) -> Path:
    """The COCO-format folder, in the user's cache, with the same images (by absolute path), splits
    and objects.

    Classes are the names in the annotations of all splits, sorted, as VOC's own twenty are.

    Raises:
        ConfigError: one line that names the file and what would be right.
    """
    years = [
        year
        for year in (folder, *sorted(folder.glob("*")))
        if (year / "ImageSets" / "Main").is_dir()
    ]
    if not years:
        raise ConfigError(
            f"detector.data: {folder} holds no ImageSets/Main, nor does a folder in it (VOC2007, VOC2012)"
        )
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in _SPLITS}
    for year in years:
        files = {path.stem: path for path in (year / "JPEGImages").glob("*")}
        for split in _SPLITS:
            found[split] += [_image(year, name, files) for name in _names(year, split)]
    for split in ("train", "val"):
        if not found[split]:
            raise ConfigError(
                f"{years[0] / 'ImageSets' / 'Main' / f'{split}.txt'}: no image; there should be at least one"
            )
    if not found["test"]:
        del found["test"]
    classes = sorted(
        {name for images in found.values() for image in images for name, *_ in image["objects"]}
    )
    texts = {split: json.dumps(_coco(images, classes)) for split, images in found.items()}
    target = cache_dir() / "voc" / digest(_VERSION, *texts.values())
    for split, text in texts.items():
        path = target / "annotations" / f"instances_{split}2017.json"
        if not path.is_file():
            write_atomically(path, text.encode())
    return target


def _names(year: Path, split: str) -> list[str]:
    path = year / "ImageSets" / "Main" / f"{split}.txt"
    names = (
        [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        if path.is_file()
        else []
    )
    if split == "test":  # VOC2012's is published without annotations
        names = [name for name in names if (year / "Annotations" / f"{name}.xml").is_file()]
    return names


def _image(year: Path, name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    path = year / "Annotations" / f"{name}.xml"
    if name not in files:
        raise ConfigError(
            f"{year / 'JPEGImages' / name}.jpg: no such image; ImageSets/Main names it"
        )
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; ImageSets/Main names it")
    try:
        root = ElementTree.parse(path).getroot()
        size = {key: int(root.findtext(f"size/{key}")) for key in ("width", "height")}
        objects = [_object(element) for element in root.iter("object")]
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a VOC annotation with a size, and a name and bndbox for each object: {error}"
        ) from None
    return {"file_name": str(files[name].absolute()), **size, "objects": objects}


def _object(element: ElementTree.Element) -> tuple[str, list[float], int]:
    left, top, right, bottom = (
        float(element.findtext(f"bndbox/{key}")) - 1 for key in ("xmin", "ymin", "xmax", "ymax")
    )
    name = element.findtext("name")
    if not name:
        raise ValueError("an object without name")
    return name, [left, top, right - left, bottom - top], int(element.findtext("difficult") or 0)


def _coco(images: list[dict[str, Any]], classes: list[str]) -> dict[str, list[dict[str, Any]]]:
    annotations = [
        dict(
            image_id=image_id,
            category_id=1 + classes.index(name),
            bbox=box,
            area=box[2] * box[3],
            iscrowd=difficult,
        )
        for image_id, image in enumerate(images, 1)
        for name, box, difficult in image["objects"]
    ]
    return {
        "images": [
            {"id": number, **{key: image[key] for key in ("file_name", "width", "height")}}
            for number, image in enumerate(images, 1)
        ],
        "annotations": [
            {"id": number, **annotation} for number, annotation in enumerate(annotations, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
    }
