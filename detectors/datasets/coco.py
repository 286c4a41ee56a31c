"""COCO annotation files under any usual name, and what is wrong with their entries."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cse_autoloss.cache import digest
from cse_autoloss.trial import ConfigError
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import SPLITS, Listing, Part, by_split, one_each, split_word

_LISTS = ("images", "annotations", "categories")
_OTHER_TASKS = re.compile(
    r"(?:^|[_.-])(captions?|keypoints?|panoptic|stuff|image_info|predictions?)(?=$|[_.-])", re.I
)
_MOST_FILES = 30  # .json files that are looked into; more are labels of single images


def parts(listing: Listing, findings: Findings) -> list[Part]:
    """The COCO files of a folder, each with the split that its name, or its folder's, tells.

    Raises:
        ConfigError: two files are of one split, or a file does not read.
    """
    usual = {split: listing.root / "annotations" / _usual_name(split) for split in SPLITS}
    if usual["train"].is_file() and usual["val"].is_file():
        files = {split: path for split, path in usual.items() if path.is_file()}
        return [
            read(path, split, (listing.root / f"{split}2017", listing.root), findings)
            for split, path in files.items()
        ]
    found = {path: _content(path) for path in _candidates(listing, findings)}
    of_coco = {path: content for path, content in found.items() if isinstance(content, dict)}
    for path, content in found.items():  # a broken file of no split may be anything
        if isinstance(content, ConfigError) and (listing.split(path) or not of_coco):
            raise content
    splits = ((listing.split(path), path) for path in of_coco)
    chosen = one_each(by_split(splits, listing, findings), listing)
    return [
        read(path, split, _folders(listing, path), findings, of_coco[path], listing)
        for split, path in chosen.items()
    ]


def read(
    path: Path,
    split: str | None,
    folders: tuple[Path, ...],
    findings: Findings,
    content: dict[str, Any] | None = None,
    around: Listing | None = None,
) -> Part:
    """One annotation file, its entries checked and mended.

    Args:
        folders: where its images may lie.
        content: of the file, where it has been read already.
        around: where else, in any folder.

    Raises:
        ConfigError: it is not there, no JSON, or has not the three lists.
    """
    if content is None:
        read_content = _content(path)
        if read_content is None:
            read_content = ConfigError(
                f"{path}: no lists 'images', 'annotations' and 'categories', which a COCO "
                "annotation file has"
            )
        if isinstance(read_content, ConfigError):
            raise read_content
        content = read_content
    images = _images(path, content["images"], findings)
    categories = checked_categories(path, content["categories"], findings)
    annotations = _annotations(path, content["annotations"], content, findings)
    data = path.read_bytes()
    return Part(
        split,
        path,
        images,
        annotations,
        categories,
        path.name + digest(data),
        folders,
        around,
        [path],
        as_is=not data.startswith(codecs.BOM_UTF8)  # pycocotools does not read it
        and images == content["images"]
        and annotations == content["annotations"]
        and [(c["id"], c["name"]) for c in categories]
        == [(c.get("id"), c.get("name")) for c in content["categories"]],
    )


def _usual_name(split: str) -> str:
    return f"instances_{split}2017.json"


def _candidates(listing: Listing, findings: Findings) -> list[Path]:
    """Files to look into: of one split those called instances, where there are such."""
    files = []
    for path in listing.having(".json"):
        if task := _OTHER_TASKS.search(path.name):
            _skip(path, f"its name is that of another task, {task[1]}", listing, findings)
        else:
            files.append(path)
    instances = [path for path in files if path.name.lower().startswith("instances")]
    if len(files) > _MOST_FILES:
        files = [p for p in files if split_word(p.stem) or re.search("coco|annotations", p.name)]
    first = {listing.split(path): path for path in instances}
    kept = []
    for path in dict.fromkeys([*instances, *files]):
        if path in instances or (same := first.get(listing.split(path))) is None:
            kept.append(path)
        else:
            _skip(path, f"{same.name} is of the same split", listing, findings)
    return kept[:_MOST_FILES]


def _skip(path: Path, why: str, listing: Listing, findings: Findings) -> None:
    name = path.relative_to(listing.root)
    findings.note(f"skipped {why}", listing.root, f"{name}: not read: {why}")


def _folders(listing: Listing, path: Path) -> tuple[Path, ...]:
    named = path.stem.removeprefix("instances_")
    first = [listing.root / named, listing.root / "images" / named, path.parent, listing.root]
    return tuple(dict.fromkeys(filter(Path.is_dir, first)))


def _content(path: Path) -> dict[str, Any] | ConfigError | None:
    """What the file holds; None if it is JSON of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        return ConfigError(f"{path}: {error.strerror}; a COCO annotation file should be there")
    except (ValueError, RecursionError) as error:
        return ConfigError(f"{path}: not JSON: {error}")
    if not isinstance(content, dict) or not any(key in content for key in _LISTS[:2]):
        return None
    content.setdefault("annotations", [])  # a test split's images come without
    for key in _LISTS:
        if not isinstance(content.get(key), list):
            return ConfigError(
                f"{path}: no list '{key}'; a COCO annotation file has images, annotations and "
                "categories"
            )
    if not content["images"]:
        return ConfigError(f"{path}: no images; there should be at least one")
    if not content["categories"]:
        return ConfigError(
            f"{path}: no categories; there should be one for each class, with id and name"
        )
    return content


def _images(path: Path, images: list[Any], findings: Findings) -> list[dict[str, Any]]:
    kept = []
    for image in images:
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            findings.error(
                "image id", path, f"image {_shown(image)}: 'id' should be a number or text"
            )
            continue
        place = f"image {image['id']}"
        name = image.get("file_name")
        if not isinstance(name, str) or not name.strip():
            findings.error(
                "file_name",
                path,
                f"{place}: file_name should be the image's path, found {_shown(name)}",
            )
            continue
        sizes = {key: image.get(key) for key in ("width", "height")}
        wrong = [key for key, size in sizes.items() if not (size is None or is_number(size))]
        for key in wrong:
            findings.error(
                "size",
                path,
                f"{place} ({name}): {key} should be a number of pixels, found {_shown(sizes[key])}",
            )
        if not wrong:
            whole = {key: int(size) for key, size in sizes.items() if size and size > 0}
            same = whole == sizes and not any(isinstance(size, float) for size in sizes.values())
            kept.append(image if same else {**_without(image, sizes), **whole})
    _check_ids(path, "image", [image["id"] for image in kept], findings)
    return kept


def checked_categories(
    path: Path, categories: list[Any], findings: Findings
) -> list[dict[str, Any]]:
    """Those with an id and a name of their own, others reported; names stripped, sorted by id:
    mmdet numbers classes in the file's order, which must be one order for all files."""
    kept = []
    for category in categories:
        name = category.get("name") if isinstance(category, dict) else None
        name = str(name).strip() if type(name) in (str, int) else ""
        if not name or not _is_id(category.get("id")):
            findings.error(
                "category", path, f"category {_shown(category)}: should have an id and a name"
            )
            continue
        if name != category["name"]:
            findings.note("class name", path, f"class {category['name']!r} is read as {name!r}")
        kept.append({**category, "name": name})
    if not _check_ids(path, "category", [category["id"] for category in kept], findings):
        return kept
    for name, count in Counter(category["name"] for category in kept).items():
        if count > 1:
            findings.error(
                "class names",
                path,
                f"{count} categories are named {name!r}; each should have a name of its own",
            )
    return sorted(kept, key=lambda category: category["id"])


def _annotations(
    path: Path, annotations: list[Any], content: dict[str, Any], findings: Findings
) -> list[dict[str, Any]]:
    """With ``area`` and ``iscrowd``, which pycocotools asks for, and ids that it can tell from
    "no match" (0)."""
    image_ids, category_ids = (
        {x["id"] for x in content[key] if isinstance(x, dict) and _is_id(x.get("id"))}
        for key in ("images", "categories")
    )
    kept = []
    for place, annotation in enumerate(annotations):
        checked = _annotation(path, place, annotation, image_ids, category_ids, findings)
        if checked is not None:
            kept.append(checked)
    ids = [annotation.get("id") for annotation in kept]
    if not all(type(i) is int and i > 0 for i in ids) or len(set(ids)) < len(ids):
        kept = [{**annotation, "id": number} for number, annotation in enumerate(kept, 1)]
    return kept


def _annotation(
    path: Path,
    place: int,
    annotation: Any,
    image_ids: set[Any],
    category_ids: set[Any],
    findings: Findings,
) -> dict[str, Any] | None:
    """None for one that is wrong, or has no area."""
    if not isinstance(annotation, dict):
        findings.error("annotation", path, f"annotation {_shown(annotation)}: should be an object")
        return None
    where = f"annotation {annotation.get('id', f'number {place + 1}')}"
    for key, ids in (("image_id", image_ids), ("category_id", category_ids)):
        value = annotation.get(key)
        if not _is_id(value) or value not in ids:
            what = "no image" if key == "image_id" else "no category"
            near = _other_type(value, ids)
            findings.error(key, path, f"{where}: {key} {value!r} is the id of {what}{near}")
            return None
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        found = _shown(box)
        findings.error(
            "bbox",
            path,
            f"{where}: bbox should be [x, y, width, height] in pixels, finite numbers, found "
            f"{found}",
        )
        return None
    crowd, ignored = (annotation.get(key) for key in ("iscrowd", "ignore"))
    for key, flag in (("iscrowd", crowd), ("ignore", ignored)):
        if flag not in (None, 0, 1):
            findings.error(key, path, f"{where}: {key} should be 0 or 1, found {_shown(flag)}")
            return None
    if ignored and not crowd:
        findings.left_out(
            "ignored",
            path,
            f"{where}: has 'ignore': 1; treated as a crowd, not trained on or counted",
        )
    area = annotation.get("area")
    if area is not None and not is_number(area):
        findings.error("area", path, f"{where}: area should be a number, found {_shown(area)}")
        return None
    if not area or area <= 0:
        area = box[2] * box[3]
    return {**annotation, "area": area, "iscrowd": int(bool(crowd or ignored))}


def _check_ids(path: Path, kind: str, ids: list[Any], findings: Findings) -> bool:
    if not ids:
        return True
    kinds = Counter(isinstance(identity, str) for identity in ids)
    if len(kinds) > 1:
        rare = kinds.most_common()[-1][0]
        odd = next(identity for identity in ids if isinstance(identity, str) == rare)
        findings.error(
            f"{kind} ids",
            path,
            f"{kind} id {odd!r}: ids should be all numbers or all text, and others here are not "
            "as this",
        )
        return False
    identity, count = Counter(ids).most_common(1)[0]
    if count > 1:
        findings.error(
            f"{kind} ids",
            path,
            f"{count} {kind} entries have the id {identity!r}; ids should be unique",
        )
        return False
    return True


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (is_number(value) and value == int(value))


def is_number(value: Any) -> bool:
    """A number that can be computed with: finite, of 63 bits."""
    return type(value) in (int, float) and abs(value) < 2**63


def _other_type(value: Any, ids: set[Any]) -> str:
    same = next((i for i in ids if str(i) == str(value)), None)
    return f"; there is {same!r}, and text is no number" if same is not None else ""


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _without(entry: dict[str, Any], keys: Any) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}
