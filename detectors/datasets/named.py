"""Data whose files are named outright: by a mapping of split to files, or by an mmdet config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cse_autoloss.cache import digest
from cse_autoloss.trial import ConfigError
from detectors.datasets import coco, voc
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import SPLITS, Listing, Part

_RIGHT = "{train: {ann_file: FILE.json, img_prefix: FOLDER}, val: {...}, test: {...}}"
_INHERITED = "data/coco/"  # where mmdet's own configs have COCO
_KEYS = ("ann_file", "img_prefix")


def files(mapping: Mapping[str, Any], findings: Findings) -> tuple[list[Part], Listing]:
    """COCO files by split (``train``, ``val``, ``test``; ``all`` for one set without splits), each
    with the folder of its images, or alone where its images lie near it.

    Raises:
        ConfigError: one line that names the split and what would be right.
    """
    parts = []
    roots = []
    for split, given in mapping.items():
        if split not in (*SPLITS, "all"):
            raise ConfigError(f"detector.data.{split}: no split; {_RIGHT}")
        if split == "all" and len(mapping) > 1:
            raise ConfigError(f"detector.data.all: one set without splits stands alone; {_RIGHT}")
        entry = {"ann_file": given} if isinstance(given, str) else given
        if not isinstance(entry, Mapping) or not isinstance(entry.get("ann_file"), str):
            raise ConfigError(f"detector.data.{split}: should name an annotation file; {_RIGHT}")
        if strange := sorted(entry.keys() - set(_KEYS)):
            raise ConfigError(f"detector.data.{split}.{strange[0]}: unknown key; {_RIGHT}")
        path = _path(entry["ann_file"])
        beside = path.parent
        root = beside.parent if beside.name.lower() in ("annotations", "labels") else beside
        roots.append(root)
        if prefix := entry.get("img_prefix"):
            folders, around = (_path(str(prefix)),), None
            if not folders[0].is_dir():
                raise ConfigError(f"detector.data.{split}.img_prefix: {folders[0]} is no folder")
        else:
            folders, around = (beside,), Listing(root)
        own = split if split in SPLITS else None
        parts.append(coco.read(path, own, folders, findings, around=around))
    if not parts:
        raise ConfigError(f"detector.data: an empty mapping; {_RIGHT}")
    return parts, Listing(Path(os.path.commonpath(roots)))


def of_config(config: Any, findings: Findings) -> tuple[list[Part], Listing]:
    """What an mmdet config's ``data`` names, split by split; sets of one split are put together.

    Raises:
        ConfigError: one line that names what cannot be read.
    """
    if config is None or not config.get("data"):
        raise ConfigError("detector.data: 'config', and the config names no data")
    parts = []
    roots = []
    asked: dict[str, str] = {}
    known: dict[str, None] = {}
    for split in SPLITS[:3]:
        pieces = []
        for entry in unwrapped(config.data.get(split)):
            name = entry.get("ann_file")
            if parts and str(name).startswith(_INHERITED) and not Path(str(name)).is_file():
                text = (
                    f"data.{split} is what mmdet's own config names, {name}, and not there: not "
                    "read"
                )
                findings.note(f"inherited {split}", "", text)
                continue
            classes = check_classes(entry.get("classes"), split)
            asked = dict.fromkeys(classes or (), split) | asked
            for piece in _of_dataset(entry, split, findings):
                known |= dict.fromkeys(category["name"] for category in piece.categories)
                pieces.append(_only(piece, classes) if classes else piece)
                roots.append(piece.file if piece.file.is_dir() else piece.file.parent)
        if pieces:
            parts.append(_together(pieces))
    if not parts:
        raise ConfigError("detector.data: 'config', and its data names no train, val or test")
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(
            f"data.{asked[unknown[0]]}.classes: no class is named "
            f"{' or '.join(map(repr, unknown[:8]))}; there are "
            f"{', '.join(map(repr, list(known)[:8]))}{', ...' if len(known) > 8 else ''}"
        )
    first: dict[str, Part] = {}
    for part in list(parts):  # mmdet's own configs name val's files for test, too
        same = first.setdefault(part.digest, part)
        if same is not part:
            findings.note("same files", part.file, f"{part.split} is {same.split}'s files, too")
            parts.remove(part)
    return parts, Listing(Path(os.path.commonpath(roots)))


def unwrapped(entry: Any) -> Iterator[Mapping[str, Any]]:
    """The data sets of an entry of a config's ``data``, out of lists and wrappers
    (ConcatDataset, RepeatDataset, ClassBalancedDataset, MultiImageMixDataset)."""
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from unwrapped(part)
    elif isinstance(entry, Mapping):
        inner = entry.get("dataset") or entry.get("datasets")
        if inner:
            yield from unwrapped(inner)
        elif entry:
            yield entry


def check_classes(classes: Any, split: str) -> tuple[str, ...] | None:
    """A config's ``classes``: the names, or None where it has none, or COCO's 80, which stand in
    any config that says nothing of its own.

    Raises:
        ConfigError: it is text that is no file, where a tuple was meant.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ConfigError(
                f"data.{split}.classes: {classes!r} is text, and no file of names; a tuple of one "
                f"has a comma: ({classes!r},)"
            )
        lines = Path(classes).read_text(encoding="utf-8-sig").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    from mmdet.datasets import CocoDataset  # slow to import

    return None if tuple(classes) == CocoDataset.CLASSES else tuple(classes)


def _of_dataset(entry: Mapping[str, Any], split: str, findings: Findings) -> list[Part]:
    kind = str(entry.get("type", "CocoDataset"))
    root = Path(entry.get("data_root") or "")
    prefix = entry.get("img_prefix") or ""
    names = entry.get("ann_file")
    found = []
    for name in names if isinstance(names, (list, tuple)) else [names]:
        if not isinstance(name, str):
            raise ConfigError(f"data.{split}.ann_file: should name a file, found {name!r}")
        path = _path(str(root / name))
        if not path.is_file():
            raise ConfigError(f"{path}: no such file (data.{split}.ann_file of the config)")
        prefixes = prefix if isinstance(prefix, (list, tuple)) else [prefix] * 99
        folder = _path(str(root / prefixes[len(found)]))
        if path.suffix == ".json":
            part = coco.read(path, split, (folder,), findings)
        elif "VOC" in kind or "XML" in kind:
            part = _voc(path, folder, split, findings)
        else:
            raise ConfigError(
                f"data.{split}: a {kind} of {path.name} cannot be searched on; it should be a "
                "CocoDataset or a VOCDataset"
            )
        found.append(part)
    return found


def _voc(path: Path, folder: Path, split: str, findings: Findings) -> Part:
    annotations = folder / "Annotations"
    known = {file.stem for file in annotations.glob("*.xml")}
    files_ = [annotations / f"{name}.xml" for name in voc.names_in(path, known)]
    missing = [file for file in files_ if not file.is_file()]
    if missing or not files_:
        raise ConfigError(f"{missing[0] if missing else path}: no such file; {path} names it")
    return voc.from_files({split: files_}, Listing(folder), findings)[0]


def _only(part: Part, classes: tuple[str, ...]) -> Part:
    """With a config's classes alone, in the annotation file's order, as mmdet has them."""
    kept = [category for category in part.categories if category["name"] in classes]
    if len(kept) == len(part.categories):
        return part
    ids = {category["id"] for category in kept}
    annotations = [a for a in part.annotations if a["category_id"] in ids]
    only = digest(part.digest, *(category["name"] for category in kept))
    return replace(part, categories=kept, annotations=annotations, digest=only, as_is=False)


def _together(pieces: list[Part]) -> Part:
    """Sets of one split as one: classes matched by name, ids numbered anew."""
    if len(pieces) == 1:
        return pieces[0]
    names = list(dict.fromkeys(c["name"] for piece in pieces for c in piece.categories))
    whole = Part(
        pieces[0].split,
        pieces[0].file,
        [],
        [],
        [{"id": n, "name": name} for n, name in enumerate(names, 1)],
        digest(*(piece.digest for piece in pieces)),
    )
    for piece in pieces:
        category = {c["id"]: names.index(c["name"]) + 1 for c in piece.categories}
        number = {image["id"]: len(whole.images) + n for n, image in enumerate(piece.images, 1)}
        folder = piece.folders[0] if piece.folders else Path()
        for image in piece.images:
            name = str(folder / image["file_name"].replace("\\", "/"))
            whole.images.append({**image, "id": number[image["id"]], "file_name": name})
        for a in piece.annotations:
            own = {"image_id": number[a["image_id"]], "category_id": category[a["category_id"]]}
            whole.annotations.append({**a, **own, "id": len(whole.annotations) + 1})
    return whole


def _path(name: str) -> Path:
    return Path(name).expanduser().absolute()
