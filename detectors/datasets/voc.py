"""Data in PASCAL VOC's format: xml files, with ImageSets or without.

Boxes are read as mmdet reads them (``mmdet/datasets/xml_style.py``): pixels count from 1, so 1 is
taken from each coordinate. A *difficult* object becomes a crowd: like in VOC's own evaluation, it
is neither trained on nor counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cse_autoloss.cache import digest
from cse_autoloss.trial import ConfigError
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import IMAGE_SUFFIXES, Listing, Part, by_split

_SETS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


def parts(listing: Listing, findings: Findings) -> list[Part]:
    """The splits of a folder: by ImageSets/Main where there is one (of all years, VOCdevkit), else
    by the folders that the xml files lie in (train/, valid/), else one set.

    Classes are the names in the annotations of all splits, sorted, as VOC's own twenty are.

    Raises:
        ConfigError: ImageSets/Main lists no image.
    """
    xmls = listing.having(".xml")
    annotated = [path for path in xmls if _is_annotation(path)]
    if not annotated:
        return []
    sets = sorted({p.parent for p in listing.having(".txt") if p.parent.parts[-2:] == _MAIN})
    chosen: dict[str | None, list[Path]] = {}
    if sets:
        for folder in sets:
            files_of = {path.stem: path for path in xmls if folder.parents[1] in path.parents}
            for split, files in _lists(folder, files_of, findings).items():
                chosen.setdefault(split, []).extend(files)
        if not chosen:
            raise ConfigError(
                f"{sets[0]}: train.txt, val.txt or trainval.txt should list images, one name a line"
            )
    else:
        splits = ((listing.split(path.parent), path) for path in annotated)
        chosen = by_split(splits, listing, findings)
    return from_files(chosen, listing, findings)


_MAIN = ("ImageSets", "Main")


def from_files(
    chosen: dict[str | None, list[Path]], listing: Listing, findings: Findings
) -> list[Part]:
    """Splits as lists of xml files, in COCO's terms."""
    found = {
        split: [image for path in files if (image := _image(path, listing, findings))]
        for split, files in chosen.items()
    }
    classes = sorted({o[0] for images in found.values() for i in images for o in i["objects"]})
    return [_part(split, images, classes, chosen[split]) for split, images in found.items()]


def _lists(folder: Path, files_of: Mapping[str, Path], findings: Findings) -> dict[str, list[Path]]:
    names = {
        split: [n for word in words for n in names_in(folder / f"{word}.txt", files_of)]
        for split, words in _SETS.items()
    }
    if not names["train"]:  # val is then taken from it
        names["train"] = [] if names["val"] else names_in(folder / "trainval.txt", files_of)
    files: dict[str, list[Path]] = {}
    for split, listed in names.items():
        for name in listed:
            if name in files_of:
                files.setdefault(split, []).append(files_of[name])
            elif split == "test":  # VOC2012's is published without annotations
                findings.note("unannotated", folder, f"test image {name} has no xml file; not read")
            else:
                path = folder.parents[1] / "Annotations" / f"{name}.xml"
                findings.error("no xml", path, f"no such file; {folder / split}.txt names it")
    return files


def names_in(path: Path, known: Container[str]) -> list[str]:
    """Names of a list as VOC writes it, one a line with a flag behind it; or file names, or paths.

    Args:
        known: the names that there are: ``img 1`` is one of them, or ``img`` with a flag.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [Path(line.split("\t")[0].strip()).name for line in lines if line.strip()]
    return [name if name in known else _stem(name) for name in names]


def _stem(name: str) -> str:
    first, _, rest = name.rpartition(" ")
    if first and rest in ("1", "-1", "0"):
        name = first.strip()
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES | {".xml"} else name


def _is_annotation(path: Path) -> bool:
    """Whether the root is <annotation>, told by the beginning: a broken file is one, too."""
    with path.open("rb") as file:
        start = file.read(2000).replace(b"\0", b"")  # of UTF-16
    return re.search(rb"<annotation[\s>]", start) is not None


def _image(path: Path, listing: Listing, findings: Findings) -> dict[str, Any] | None:
    try:
        root = _root(path.read_bytes())
        width, height = (
            int(_number(root, f"size/{key}")) if (root.findtext(f"size/{key}") or "").strip() else 0
            for key in ("width", "height")
        )
        objects = [_object(element) for element in root.iter("object")]
    except (ElementTree.ParseError, TypeError, ValueError, LookupError) as error:
        findings.error(
            type(error).__name__,
            path.parent,
            f"{path.name}: not a VOC annotation with a name and bndbox for each object: {error}",
        )
        return None
    filename = (root.findtext("filename") or "").strip()
    found = _images_of(path, Path(filename.replace("\\", "/")).name, listing)
    if not found:
        names = f"{path.stem} with an image's suffix" + (f", or {filename}" if filename else "")
        findings.error("no image", path.parent, f"{path.name}: no such image: {names}")
        return None
    if len(found) > 1:
        both = " and ".join(str(image.relative_to(listing.root)) for image in found[:2])
        findings.error(
            "images",
            path.parent,
            f"{path.name}: both {both} could be its image; name one in <filename>",
        )
        return None
    known = {"width": width, "height": height} if width > 0 and height > 0 else {}
    return {"file_name": str(found[0].absolute()), **known, "objects": objects}


def _root(data: bytes) -> ElementTree.Element:
    """Of any encoding that the file declares: expat alone knows none of several bytes (gb2312)."""
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w-]+)[^>]*\?>", data)
    if declared is None:
        return ElementTree.fromstring(data)
    return ElementTree.fromstring(data[declared.end() :].decode(declared[1].decode()))


def _images_of(path: Path, filename: str, listing: Listing) -> list[Path]:
    """Images of the xml file's stem, else of its <filename>; of several, the likeliest."""
    by_stem = listing.images_by_stem
    found = [i for i in by_stem.get(path.stem, []) if not i.parent.name.startswith("Segmentation")]
    found = found or [i for i in by_stem.get(Path(filename).stem, []) if i.name == filename]
    beside = path.parent.parent / "JPEGImages"
    shared = [len(set(path.parts) & set(image.parts)) for image in found]
    nearest = [i for i, count in zip(found, shared, strict=True) if count == max(shared)]
    for likelier in (
        [image for image in found if image.parent == beside],
        [image for image in found if image.name == filename],
        nearest,
    ):
        found = [image for image in found if image in likelier] or found
    return found


def _object(element: ElementTree.Element) -> tuple[str, list[float], int]:
    left, top, right, bottom = (
        _number(element, f"bndbox/{key}") - 1 for key in ("xmin", "ymin", "xmax", "ymax")
    )
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object without name")
    difficult = (element.findtext("difficult") or "0").strip() or "0"
    if difficult not in ("0", "1"):
        raise ValueError(f"difficult should be 0 or 1, found {difficult!r}")
    return name, [left, top, right - left, bottom - top], int(difficult)


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"an object without {path}")
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{path} should be a finite number, found {text!r}")
    return number


def _part(
    split: str | None, images: list[dict[str, Any]], classes: list[str], files: list[Path]
) -> Part:
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
    content = (
        [
            {"id": n, **{key: value for key, value in image.items() if key != "objects"}}
            for n, image in enumerate(images, 1)
        ],
        [{"id": n, **annotation} for n, annotation in enumerate(annotations, 1)],
        [{"id": n, "name": name} for n, name in enumerate(classes, 1)],
    )
    checksum = digest(json.dumps(content))
    return Part(split, files[0].parent, *content, digest=checksum, read=files)
