"""YOLO's labels: a txt file for each image, one object a line, and a data.yaml with the classes'
names (or classes.txt, obj.names, obj.data).

A line is ``class x y width height``, the box's centre and size as shares of the image's; or
``class x1 y1 x2 y2 x3 y3 ...``, a polygon (or a turned box's corners), whose box is taken and which
is kept as the object's mask.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cse_autoloss.cache import digest
from cse_autoloss.trial import ConfigError
from cse_autoloss.yaml_io import YamlError, parse_yaml
from detectors.datasets.coco import checked_categories
from detectors.datasets.findings import Findings
from detectors.datasets.images import sizes
from detectors.datasets.layouts import IMAGE_SUFFIXES, SPLITS, Listing, Part, by_split

_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NAMES = ("classes.txt", "obj.names", "names.txt", "labels.txt")


@dataclass(frozen=True)
class _Description:
    """data.yaml: class names, what each split's images are, whether keypoints follow each box."""

    file: Path
    names: tuple[str, ...]
    entries: Mapping[str, list[str]]
    root: str = ""
    keypoints: bool = False


def parts(listing: Listing, findings: Findings, yaml: Path | None = None) -> list[Part]:
    """The splits of a folder, as its data.yaml names them, else by the folders that images lie in.

    Args:
        yaml: the data.yaml, where the folder may hold several.

    Raises:
        ConfigError: a data.yaml that does not read, or whose folders are not there.
    """
    described = _read_yaml(yaml) if yaml else _description(listing)
    if described is None:
        return []
    images = _images(described, listing, findings)
    facts = sizes((str(p.absolute()) for files in images.values() for p in files), listing.root)
    numbered = [{"id": n, "name": name} for n, name in enumerate(described.names, 1)]
    categories = checked_categories(described.file, numbered, findings)
    found = []
    for split, files in images.items():
        part = Part(split, described.file, [], [], categories, digest="")
        for number, path in enumerate(files, 1):
            fact = facts[str(path.absolute())]
            image = {"id": number, "file_name": str(path.absolute())}
            part.images.append({**image, "width": fact.width, "height": fact.height})
            label = _label_of(path)
            if label is None:
                findings.note(
                    "no label", part.label, f"{path}: no label file; an image without objects"
                )
            elif not fact.problem:
                part.read.append(label)
                _read_labels(label, part, part.images[-1], described, findings)
        text = json.dumps([part.images, part.annotations, part.categories])
        part.digest = digest(text)
        found.append(part)
    for label in _without_image(images):
        findings.error(
            "no image",
            described.file,
            f"{label}: no such image; there should be images/x.jpg for "
            "labels/x.txt: give the image, or remove the label file",
        )
    if not any(part.annotations for part in found) and not findings.errors:
        raise ConfigError(
            f"{described.file}: no labels; for images/x.jpg there should be labels/x.txt"
        )
    return found


def _description(listing: Listing) -> _Description | None:
    found = []
    for path in listing.having(".yaml", ".yml"):
        described = _read_yaml(path)
        if described is not None:
            found.append(described)
    usual = [d for d in found if d.file.stem in ("data", "dataset")] or found
    if len(usual) > 1:
        both = " and ".join(str(d.file.relative_to(listing.root)) for d in usual[:2])
        raise ConfigError(f"{listing.root}: both {both} describe a data set; give one's path")
    if usual:
        return usual[0]
    for path in listing.having(".names", ".txt"):
        if path.suffix == ".names" or path.name in _NAMES:
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            names = tuple(line.strip() for line in lines if line.strip())
            lists = {
                split: [str(p) for p in listing.having(".txt") if p.stem in words]
                for split, words in _KEYS.items()
            }
            return _Description(path, names, {k: v for k, v in lists.items() if v})
    return None


def _read_yaml(path: Path) -> _Description | None:
    """None for YAML of another kind."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (YamlError, UnicodeDecodeError) as error:
        if path.stem == "data":
            raise ConfigError(f"{path}: not YAML: {error}") from None
        return None
    if not isinstance(content, dict) or "names" not in content:
        return None
    names = content["names"]
    if isinstance(names, dict):
        numbered = {str(number): name for number, name in names.items()}
        names = [numbered.get(str(number)) for number in range(len(numbered))]
        if None in names:
            raise ConfigError(f"{path}: names: class numbers should run from 0 without a gap")
    if not isinstance(names, list) or not all(isinstance(n, (str, int)) for n in names):
        raise ConfigError(f"{path}: names: should be a list of the classes' names")
    for name in names:
        if isinstance(name, bool):
            raise ConfigError(
                f"{path}: names: YAML reads a name as {name}; no, yes, on and off should be quoted"
            )
    count = content.get("nc", len(names))
    if count != len(names):
        raise ConfigError(f"{path}: nc is {count!r}, and there are {len(names)} names")
    entries = {}
    for split, keys in _KEYS.items():
        given = next((content[key] for key in keys if content.get(key)), None)
        if given is not None:
            entries[split] = [
                str(entry) for entry in (given if isinstance(given, list) else [given])
            ]
    root, keypoints = str(content.get("path") or ""), "kpt_shape" in content
    return _Description(path, tuple(map(str, names)), entries, root, keypoints)


def _images(
    described: _Description, listing: Listing, findings: Findings
) -> dict[str | None, list[Path]]:
    """Split to its images. Splits that are the same images are one set that is no split."""
    found: dict[str | None, list[Path]] = {}
    for split, entries in described.entries.items():
        files = [file for entry in entries for file in _entry(entry, described, listing)]
        if not files:
            files = [image for image in listing.images if listing.split(image.parent) == split]
        if files:
            found[split] = sorted(dict.fromkeys(files))
        elif split != "test":
            raise ConfigError(
                f"{described.file}: {split}: {entries[0]}: no such folder of images, nor one named "
                f"for {split}; {listing.root} holds {listing.describe()}"
            )
    if not found:
        splits = ((listing.split(image.parent), image) for image in listing.images)
        used = ((split, image) for split, image in splits if split in SPLITS or _label_of(image))
        found = by_split(used, listing, findings)
    if len(found) > 1 and len({tuple(files) for files in found.values()}) == 1:
        found = {None: next(iter(found.values()))}
    return found


def _entry(entry: str, described: _Description, listing: Listing) -> list[Path]:
    """Images of a folder, or of a list's file."""
    roots = [described.file.parent / described.root, described.file.parent, listing.root]
    for path in _places(entry, roots):
        if path.is_dir() and (files := Listing(path).images):
            return files
        if path.is_file() and path.suffix.lower() == ".txt":
            return _listed(path, roots)
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            return [path]
    return []


def _listed(path: Path, roots: list[Path]) -> list[Path]:
    files = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not (name := line.strip()):
            continue
        file = next((p for p in _places(name, [path.parent, *roots]) if p.is_file()), None)
        if file is None:
            raise ConfigError(f"{path}: {name}: no such image")
        files.append(file)
    return files


def _places(name: str, roots: list[Path]) -> Iterator[Path]:
    """Where a name could lead: it is often another machine's path, whose end is right."""
    parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("..", "/")]
    for tail in (name, *(Path(*parts[start:]) for start in range(len(parts)))):
        yield from (Path(os.path.normpath(root / tail)) for root in roots)


def _label_of(image: Path) -> Path | None:
    """The label file that is there for an image."""
    places = (p for place in _label_places(image) for p in (place, place.with_suffix(".TXT")))
    return next((place for place in places if place.is_file()), None)


def _label_places(image: Path) -> Iterator[Path]:
    """labels/x.txt for images/x.jpg, as YOLO has it; or x.txt beside the image."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place].lower() in ("images", "jpegimages", "imgs"):
            yield Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
            break
    yield image.with_suffix(".txt")


def _without_image(images: Mapping[str | None, list[Path]]) -> list[Path]:
    """Files with a label in them, where those of the images' folders lie, that no image is for."""
    stems: dict[Path, set[str]] = {}
    for folder in {image.parent for files in images.values() for image in files}:
        there = {path.stem for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
        for label in _label_places(folder / "x.jpg"):
            stems.setdefault(label.parent, set()).update(there)
    return sorted(
        path
        for folder, there in stems.items()
        if folder.is_dir()
        for path in folder.iterdir()
        if path.suffix.lower() == ".txt" and path.stem not in there and _is_label(path)
    )


def _is_label(path: Path) -> bool:
    """Whether its first line is numbers enough for one; class names and lists lie there, too."""
    text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    try:
        return len([float(word) for word in _words(text.partition("\n")[0])]) >= 5
    except ValueError:
        return False


def _read_labels(
    path: Path, part: Part, image: dict[str, Any], described: _Description, findings: Findings
) -> None:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, points = _numbers(line, len(described.names), described.keypoints)
        except ValueError as error:
            findings.error(f"label {str(error)[:25]}", part.file, f"{path}, line {number}: {error}")
            continue
        width, height = image["width"], image["height"]
        if len(points) == 4:
            x, y, w, h = points
            box, polygon = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], []
        else:
            xs, ys = ([p * size for p in points[i::2]] for i, size in ((0, width), (1, height)))
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            polygon = [[value for pair in zip(xs, ys, strict=True) for value in pair]]
        part.annotations.append(
            {
                "id": len(part.annotations) + 1,
                "image_id": image["id"],
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                **({"segmentation": polygon} if polygon else {}),
            }
        )


def _words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _numbers(line: str, classes: int, keypoints: bool) -> tuple[int, list[float]]:
    """The class's number, and the box's four numbers or the polygon's points."""
    words = _words(line)
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"should be numbers, found {line[:60]!r}") from None
    if keypoints or len(values) == 6:  # 6: a detection's confidence behind the box
        values = values[:5]
    if len(values) < 5 or (len(values) > 5 and len(values) % 2 == 0):
        raise ValueError(
            f"should be 'class x y width height' or a polygon's points, found {len(values)} numbers"
        )
    label, points = values[0], values[1:]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"should be finite numbers, found {line[:60]!r}")
    if label != int(label) or not 0 <= label < classes:
        raise ValueError(
            f"class {words[0]} is none of the {classes} that are named, 0 to {classes - 1}"
        )
    if max(points) > 2 or min(points) < -1:
        raise ValueError(
            f"coordinates should be shares of the image, 0 to 1, found {max(points, key=abs):g}"
        )
    return int(label), points
