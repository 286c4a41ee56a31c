"""Data sets by name: read in whatever layout they have, checked, their four splits found.

``embedded`` is the project's own (:mod:`detectors.datasets.shapes`), drawn into the user's cache on
its first use. Any other is the user's: a path, whose layout is recognised; ``coco:``, ``voc:`` or
``yolo:`` before a path that holds several; a mapping that names each split's files; or ``config``,
what an mmdet config names. Annotations that differ from the user's files (another format, another
split, something left out) are kept as COCO files in the user's cache; a user's folder is never
written to.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cse_autoloss.cache import cache_dir, digest
from cse_autoloss.files import write_whole
from cse_autoloss.trial import ConfigError
from detectors.datasets import check, coco, images, named, shapes, splits, voc, yolo
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import SPLITS, Listing, Part

# Counts the ways in which annotations have been derived; cached ones of another way are not used.
_DERIVATION = "1"
_READERS: dict[str, Callable[[Listing, Findings], list[Part]]] = {
    "coco": coco.parts,
    "yolo": yolo.parts,
    "voc": voc.parts,
}
_READ = (
    "COCO's annotation files (annotations/instances_train2017.json, train/_annotations.coco.json, "
    "result.json), YOLO's labels with a data.yaml that names the classes, VOC's xml files"
)

Name = str | Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """One split: a COCO annotation file, the folder of its images, how many there are, and how many
    objects that are no crowds."""

    ann_file: str
    img_prefix: str
    images: int
    objects: int


@dataclass(frozen=True)
class DataSet:
    """A data set that has been checked.

    Attributes:
        name: as the user named it.
        classes: names, in the order of their category ids.
        splits: ``train``, ``val``, ``test``, ``tiny``.
        digest: of all annotations and images.
        findings: what is left out, and what is worth knowing.
        census: how many images and annotation files its folder has, and how many of them are used;
            empty where no folder was named, or no images were opened.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    digest: str
    findings: Findings
    census: str = ""

    @functools.cached_property
    def class_frequency(self) -> list[float]:
        """Objects of each class in the train split, crowds left out, over their mean."""
        content = json.loads(Path(self.splits["train"].ann_file).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        counts = Counter(
            names[object_["category_id"]]
            for object_ in content["annotations"]
            if not object_.get("iscrowd")
        )
        mean = max(sum(counts[name] for name in self.classes), 1) / len(self.classes)
        return [counts[name] / mean for name in self.classes]


def absolute(name: Name) -> Name:
    """A data set's name with its paths made absolute; what is none stays, to be refused by name."""
    if isinstance(name, Mapping):
        return {
            split: {key: _absolute(value) for key, value in entry.items()}
            if isinstance(entry, Mapping)
            else _absolute(entry)
            for split, entry in name.items()
        }
    kind, path = _kind_and_path(name)
    if name in ("embedded", "config"):
        return name
    return f"{kind}:{_absolute(path)}" if kind else _absolute(path)


def find(
    name: Name,
    seed: int = 0,
    *,
    config: Any = None,
    masks: bool = False,
    open_images: bool = True,
) -> DataSet:
    """The data set of that name, checked.

    Args:
        name: ``embedded``, a path, ``coco:/path``, ``voc:/path``, ``yolo:/path``, ``config``, or a
            mapping of split to ``{"ann_file": ..., "img_prefix": ...}``.
        seed: of the embedded data set, and of splits that are drawn.
        config: the mmdet config whose data ``config`` is.
        masks: whether each object needs a mask.
        open_images: open every image. Without, only those are opened whose size nobody tells: for
            processes that are started after another has checked.

    Raises:
        ConfigError: one line that names the file and what would be right.
    """
    findings = Findings()
    data = examine(name, findings, seed, config=config, masks=masks, open_images=open_images)
    findings.raise_first()
    assert data is not None  # without an error there is one
    return data


def examine(
    name: Name,
    findings: Findings,
    seed: int = 0,
    *,
    config: Any = None,
    masks: bool = False,
    open_images: bool = True,
) -> DataSet | None:
    """As :func:`find`, all errors in the findings; None if there is any.

    Raises:
        ConfigError: there is nothing to check.
    """
    try:
        parts, listing = _read(name, findings, seed, config)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    open_images = open_images and name != "embedded"
    for part in parts:
        images.locate(part, listing, findings)
    if not _look(parts, listing.root, open_images, findings):
        return None
    parts.sort(key=lambda part: SPLITS.index(part.split) if part.split else 0)
    check.same_classes(parts, findings)
    for part in parts:
        check.boxes(part, findings)
        if masks:
            check.masks(part, findings)
    if not findings.errors:  # a test split without annotations counts as none
        check.usable([p for p in parts if p.split != "test" or p.annotations], findings)
    if findings.errors:
        return None
    checksum = digest(_DERIVATION, *(part.digest for part in parts))
    found = splits.complete(parts, seed, findings)
    drawn = len(parts) == 1 or "val" not in {part.split for part in parts}
    if drawn:
        checksum = digest(checksum, str(seed))
    check.usable([part for part in found.values() if part not in parts], findings)
    splits.leaks(found, findings)
    if findings.errors:
        return None
    written = {split: _written(part, checksum) for split, part in found.items()}
    classes = tuple(category["name"] for category in found["train"].categories)
    if name != "embedded":  # whose images are drawn from what its annotations are
        paths = (path for part in parts for path in part.paths.values())
        checksum = digest(checksum, images.contents(paths))
    of_folder = isinstance(name, str) and name != "config" and open_images
    census = _census(parts, found.values(), listing) if of_folder else ""
    return DataSet(_text(name), classes, written, checksum, findings, census)


def _read(name: Name, findings: Findings, seed: int, config: Any) -> tuple[list[Part], Listing]:
    if name == "embedded":
        listing = Listing(_embedded(seed))
        return coco.parts(listing, findings), listing
    if name == "config":
        return named.of_config(config, findings)
    if isinstance(name, Mapping):
        return named.files(name, findings)
    return _folder(name, findings)


def _embedded(seed: int) -> Path:
    folder = cache_dir() / "data" / f"shapes-v{shapes.VERSION}.{shapes.LAYOUT}-seed{seed}"
    if not folder.is_dir():
        try:
            shapes.write(folder, seed)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first: its bytes are ours
                raise
    return folder


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path.strip():
        return path
    return str(Path(path).expanduser().absolute())


def _kind_and_path(name: str) -> tuple[str, str]:
    kind, colon, path = name.partition(":")
    return (kind, path) if colon and kind in _READERS else ("", name)


def _folder(name: str, findings: Findings) -> tuple[list[Part], Listing]:
    kind, path = _kind_and_path(name)
    folder = Path(path).expanduser().absolute() if path.strip() else None
    if folder is None or not folder.exists():
        raise ConfigError(
            f"detector.data: {folder or repr(name)} is no folder; data is 'embedded', 'config', "
            f"or a folder with {_READ}"
        )
    listing = Listing(folder if folder.is_dir() else folder.parent)
    if folder.suffix == ".json" and folder.is_file():
        return named.files({"all": str(folder)}, findings)
    if folder.is_file():
        parts = yolo.parts(listing, findings, yaml=folder)
        holds = "it is no data.yaml with names"
    else:
        readers = [_READERS[kind]] if kind else _READERS.values()
        parts = next((found for read in readers if (found := read(listing, findings))), [])
        holds = f"it holds {listing.describe()}"
    if not parts:
        form = f"{kind.upper()} data" if kind else "data set"
        raise ConfigError(
            f"detector.data: {folder}: no {form} that can be read; {holds}; what can be read: "
            f"{_READ}"
        )
    return parts, listing


def _look(parts: Sequence[Part], root: Path, open_all: bool, findings: Findings) -> bool:
    paths = {p.paths[i["id"]]: i for p in parts for i in p.images if i["id"] in p.paths}
    if open_all:
        facts = images.look(paths, root)
    else:
        unsaid = [p for p, i in paths.items() if not (i.get("width") and i.get("height"))]
        facts = images.known(paths, root) | images.sizes(unsaid, root)
    for part in parts:
        images.compare(part, facts, findings)
    return not findings.errors


def _census(parts: Iterable[Part], splits_: Iterable[Part], listing: Listing) -> str:
    used = {path for part in splits_ for path in part.paths.values()}
    read = {os.path.abspath(path) for part in parts for path in part.read}
    suffixes = sorted({os.path.splitext(path)[1].lower() for path in read})
    images_, files = (
        len(among | set(map(os.path.abspath, there)))
        for among, there in ((used, listing.images), (read, listing.having(*suffixes)))
    )
    kinds = " and ".join(suffixes)
    return f"of {images_:,} images {len(used):,} are used, of {files:,} {kinds} files {len(read):,}"


def _written(part: Part, checksum: str) -> Split:
    """The split as files: the user's own where it says just that, else one in the user's cache."""
    counts = len(part.images), sum(not a["iscrowd"] for a in part.annotations)
    if part.as_is and part.prefix:
        return Split(str(part.file), part.prefix, *counts)
    where = digest(checksum, *part.paths.values())
    path = cache_dir() / "annotations" / where / f"instances_{part.split}.json"
    if not path.is_file():
        named_absolutely = [{**i, "file_name": part.paths[i["id"]]} for i in part.images]
        content = {
            "images": named_absolutely,
            "annotations": part.annotations,
            "categories": part.categories,
        }
        write_whole(path, json.dumps(content).encode())
    return Split(str(path), "", *counts)


def _text(name: Name) -> str:
    return name if isinstance(name, str) else json.dumps(name)
