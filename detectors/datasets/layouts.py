"""What lies in a user's folder: its files, what their names say of splits, and the annotated sets
(:class:`Part`) that readers make of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cse_autoloss.trial import ConfigError
from detectors.datasets.findings import Findings

SPLITS = ("train", "val", "test", "tiny")
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .png .bmp .dib .tif .tiff .webp .ppm .pgm .pbm .jp2 .gif".split()
)
_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "minival", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    "tiny": "tiny",
}
OUTRIGHT = "detector.data: {train: {ann_file: FILE, img_prefix: FOLDER}, val: ...}"
_Key = TypeVar("_Key", bound=Hashable)
_DEEPEST = 6  # folders below a data set's own


@dataclass
class Part:
    """One annotated set as a reader found it, in COCO's terms.

    Attributes:
        split: which split it is, or None where nothing says so.
        file: what messages name: an annotation file, or a folder of them.
        images, annotations, categories: as in a COCO annotation file.
        folders: where its images may lie, the likeliest first; ``file_name`` is relative to one.
        around: where else, in any folder.
        read: the annotation files.
        digest: of what was read.
        as_is: whether ``file`` is a COCO file that says just this.
        paths: image id to the image's absolute path; filled in by :func:`images.locate`.
        prefix: the folder that all file names are relative to, or None where there is no such one.
    """

    split: str | None
    file: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    digest: str
    folders: tuple[Path, ...] = ()
    around: Listing | None = None
    read: list[Path] = field(default_factory=list)
    as_is: bool = False
    paths: dict[Any, str] = field(default_factory=dict)
    prefix: str | None = None

    @property
    def label(self) -> str:
        """What findings name: the file, and the split where the file has several."""
        split = "" if self.split is None or self.file.suffix == ".json" else f" ({self.split})"
        return f"{self.file}{split}"


@dataclass(frozen=True)
class Listing:
    """A folder's files, hidden ones left out, links followed; listed when first asked for."""

    root: Path

    @cached_property
    def files(self) -> list[Path]:
        found: list[Path] = []
        seen: set[str] = set()
        for top, folders, names in os.walk(self.root, followlinks=True):
            here = Path(top)
            real = os.path.realpath(top)  # a link may lead in a circle
            deep = len(here.relative_to(self.root).parts)
            if real in seen or deep > _DEEPEST:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
            found += [here / name for name in sorted(names) if not name.startswith(".")]
        return found

    def having(self, *suffixes: str) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in suffixes]

    @cached_property
    def images(self) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    @cached_property
    def images_by_stem(self) -> dict[str, list[Path]]:
        return _grouped((path.stem, path) for path in self.images)

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        return _grouped((path.name, path) for path in self.files)

    def ending(self, name: str, split: str | None) -> list[Path]:
        """Files that a name relative to any folder could mean, links to one counted once.

        A split's own folders come before those of no split; other splits' are left out. Of several
        files those below a folder ``images`` are taken.
        """
        parts = Path(name).parts
        folders = {
            path: path.parents[len(parts) - 1]
            for path in self.by_name.get(Path(name).name, [])
            if path.relative_to(self.root).parts[-len(parts) :] == parts
        }
        for wanted in dict.fromkeys((split, None)):
            found = [path for path, folder in folders.items() if self.split(folder) == wanted]
            if len(found) > 1:
                pictures = [p for p in found if "images" in p.relative_to(self.root).parts]
                found = list({os.path.realpath(p): p for p in pictures or found}.values())
            if found:
                return found
        return []

    def split(self, path: Path) -> str | None:
        """The split that a path's last word on it says, below the data set's folder.

        Of a file that holds one image, or its labels, its folder is to be asked: such a file's name
        says what is seen (``test_bench_6.jpg``).
        """
        words = map(split_word, reversed(path.relative_to(self.root).parts))
        return next(filter(None, words), None)

    def describe(self) -> str:
        """What there is, in words, for a refusal."""
        if not self.files:
            return "nothing"
        counts = Counter(path.suffix.lower() or path.name for path in self.files)
        words = []
        for suffix, count in counts.most_common(6):
            names = [
                str(path.relative_to(self.root))
                for path in self.files
                if (path.suffix.lower() or path.name) == suffix
            ]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            words.append(f"{count:,} {suffix} ({shown})")
        return "; ".join(words)


def split_word(name: str) -> str | None:
    """The split that a name speaks of: ``instances_train2017`` of train, ``valid`` of val."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _WORDS:
            return _WORDS[word]
    return None


def _grouped(files: Iterable[tuple[_Key, Path]]) -> dict[_Key, list[Path]]:
    found: dict[_Key, list[Path]] = {}
    for key, path in files:
        found.setdefault(key, []).append(path)
    return found


def by_split(
    files: Iterable[tuple[str | None, Path]], listing: Listing, findings: Findings
) -> dict[str | None, list[Path]]:
    """Split to its files; those of no split are left out where others are train's."""
    found = _grouped(files)
    for path in found.pop(None, []) if "train" in found else []:
        findings.left_out(
            "no split",
            listing.root,
            f"{path.relative_to(listing.root)}: not read: its path says no split, others' do",
        )
    return found


def one_each(files: Mapping[str | None, list[Path]], listing: Listing) -> dict[str | None, Path]:
    """Split to its file.

    Raises:
        ConfigError: two files are of one split.
    """
    for split, paths in files.items():
        if len(paths) > 1:
            what = f"the {split} split" if split else "a set that is no split"
            both = " and ".join(str(path.relative_to(listing.root)) for path in paths[:2])
            raise ConfigError(
                f"{listing.root}: both {both} could be {what}; name the files: {OUTRIGHT}"
            )
    return {split: paths[0] for split, paths in files.items()}
