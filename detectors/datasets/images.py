"""Images of a data set: found under the names that annotations give them, opened once, and held
against what the annotations say of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from cse_autoloss.cache import cache_dir, digest
from cse_autoloss.files import write_whole
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import OUTRIGHT, Listing, Part

_VERSION = "1"  # of what is looked at; facts of another are not used
_ORIENTATION = 0x0112  # EXIF's tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap an image's sides
_ALIKE = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP"})  # OpenCV reads all that Pillow reads
_END = 16 * 1024  # bytes; an image that has changed has another size, beginning or end
_BAR_FROM = 200  # images to open; fewer are done before a bar is seen


@dataclass(frozen=True)
class Facts:
    """What opening an image told.

    Attributes:
        width, height: pixels, as mmdet will see it: turned by its EXIF orientation.
        turned: whether that orientation swaps its sides.
        problem: why it cannot be read, or None.
    """

    width: int
    height: int
    turned: bool = False
    problem: str | None = None


def locate(part: Part, listing: Listing | None, findings: Findings) -> None:
    """Fill in the part's ``paths`` and ``prefix``.

    A name is looked for in the part's folders, backslashes read as slashes, then in all folders
    around. If not one image is found so, the names are another machine's: then by their last part
    in the listing.
    """
    missing = [i for i in part.images if not _found(part, i, _named(part, i), findings)]
    guessed = bool(missing) and not part.paths and listing is not None
    if guessed:
        missing = _by_last_part(part, missing, listing, findings)
    if missing:
        path = Path(*part.folders[:1], missing[0]["file_name"])
        many = f"{len(missing):,} of {len(part.images):,} images are not there"
        findings.error(
            "no image", part.label, f"{path}: no such image (id {missing[0]['id']!r}); {many}"
        )
    _shared(part, findings.error if guessed else findings.note)
    prefixes = {part.paths.get(i["id"], "").removesuffix(i["file_name"]) for i in part.images}
    if len(prefixes) == 1 and (prefix := prefixes.pop()).endswith(os.sep):
        part.prefix = prefix


def _shared(part: Part, report: Callable[[str, str, str], None]) -> None:
    first: dict[str, dict] = {}
    for image in part.images:
        path = part.paths.get(image["id"])
        if path and (same := first.setdefault(path, image)) is not image:
            report(
                "one file",
                part.label,
                f"images {same['id']!r} and {image['id']!r} ({same['file_name']} and "
                f"{image['file_name']}) are both {path}; each should have a file of its own",
            )


def _named(part: Part, image: dict) -> list[Path]:
    name = image["file_name"]
    slashed = name.replace("\\", "/")
    for folder in part.folders or (Path(),):
        for spelt in dict.fromkeys((name, slashed)):
            if os.path.isfile(path := os.path.join(folder, spelt)):
                return [Path(path)]
    return part.around.ending(slashed, part.split) if part.around else []


def _found(part: Part, image: dict, found: list[Path], findings: Findings) -> bool:
    """Whether any file is there for an image; it is the image's path if it is the only one."""
    if len(found) == 1:
        part.paths[image["id"]] = os.path.abspath(found[0])
    elif found:
        findings.error(
            "several",
            part.label,
            f"image {image['id']!r}: both {found[0]} and {found[1]} could be {image['file_name']}; "
            f"put the folder into file_name, or name it: {OUTRIGHT}",
        )
    return bool(found)


def _by_last_part(
    part: Part, missing: list[dict], listing: Listing, findings: Findings
) -> list[dict]:
    still = []
    for image in missing:
        name = image["file_name"].replace("\\", "/").rsplit("/", 1)[-1]
        found = listing.ending(name, part.split) or listing.by_name.get(name, [])
        if not _found(part, image, found, findings):
            still.append(image)
    if part.paths:
        findings.note(
            "names",
            part.label,
            f"images named as {missing[0]['file_name']} are found by the last part of their names",
        )
    return still


def look(paths: Iterable[str], root: Path) -> dict[str, Facts]:
    """Facts of images, decoded in parallel with a progress bar on a terminal; kept in the user's
    cache, by size and time of change.

    Args:
        root: the data set's folder; facts of one are kept together.
    """
    paths = list(dict.fromkeys(paths))
    facts = known(paths, root)
    new = [path for path in paths if path not in facts]
    if new:
        facts |= _in_parallel(_decode, new)
        kept = {path: (_stamp(path), astuple(facts[path])) for path in paths}
        write_whole(_cache(root), json.dumps(kept).encode())
    return facts


def sizes(paths: Iterable[str], root: Path) -> dict[str, Facts]:
    """Facts of images as far as their headers tell, or a :func:`look` before; nothing is kept."""
    paths = list(dict.fromkeys(paths))
    facts = known(paths, root)
    return facts | _in_parallel(_header, [path for path in paths if path not in facts])


def known(paths: Iterable[str], root: Path) -> dict[str, Facts]:
    """Facts that the cache has of images that have not changed."""
    try:
        cached = json.loads(_cache(root).read_text())
    except (OSError, ValueError):
        return {}
    return {
        path: Facts(*cached[path][1])
        for path in paths
        if path in cached and cached[path][0] == _stamp(path)
    }


def _cache(root: Path) -> Path:
    return cache_dir() / "images" / f"{digest(_VERSION, str(root))}.json"


def _in_parallel(action: Callable[[str], Facts], paths: list[str]) -> dict[str, Facts]:
    console = Console(stderr=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        facts = track(
            pool.map(action, paths),
            "opening images",
            len(paths),
            console=console,
            transient=True,
            disable=not console.is_terminal or len(paths) < _BAR_FROM,
        )
        return dict(zip(paths, facts, strict=True))


def contents(paths: Iterable[str]) -> str:
    """A digest of images as they are, wherever they lie: of each its size and both its ends."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return digest(*pool.map(_ends, paths))


def _ends(path: str) -> str:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(_END)
        file.seek(max(_END, size - _END))
        return digest(str(size), first, file.read())


def compare(part: Part, facts: Mapping[str, Facts], findings: Findings) -> None:
    """Report images that cannot be read and sizes that are not theirs; fill in missing sizes."""
    boxes: dict[object, list[list[float]]] = {}
    for annotation in part.annotations:
        boxes.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    for place, image in enumerate(part.images):
        path = part.paths.get(image["id"], "")
        fact = facts.get(path)
        if fact is None:
            continue
        if fact.problem:
            findings.error("unreadable", path, fact.problem)
            continue
        real, said = (fact.width, fact.height), (image.get("width"), image.get("height"))
        if said == real:
            continue
        if None in said:
            part.images[place] = {**image, "width": real[0], "height": real[1]}
            part.as_is = False
            continue
        where = f"image {image['file_name']}"
        is_size = f"{real[0]} x {real[1]} pixels"
        if fact.turned and said == real[::-1]:
            findings.error(
                "exif",
                part.label,
                f"{where}: is {is_size} as it is read, turned by its EXIF orientation, and "
                f"{said[0]} x {said[1]} here; if the boxes are drawn on the turned image, mend "
                "width and height, else remove the tag (exiftool -Orientation= FILE)",
            )
        elif _harmless(said, real, boxes.get(image["id"], [])):
            findings.note(
                "size",
                part.label,
                f"{where}: is {is_size}, not {said[0]} x {said[1]}; its own is taken",
            )
            part.images[place] = {**image, "width": real[0], "height": real[1]}
            part.as_is = False
        else:
            findings.error(
                "size",
                part.label,
                f"{where}: is {is_size} and {said[0]} x {said[1]} here, so boxes would lie "
                "elsewhere; give the image that was annotated, or its boxes and size in this "
                "one's pixels",
            )


def _harmless(said: tuple[int, int], real: tuple[int, int], boxes: list[list[float]]) -> bool:
    """A size that is off by a hair, or with its sides swapped, where all boxes fit the image."""
    near = all(abs(a - b) <= max(1, 0.02 * b) for a, b in zip(said, real, strict=True))
    fits = all(x + w <= real[0] + 1 and y + h <= real[1] + 1 for x, y, w, h in boxes)
    return fits and (near or said == real[::-1])


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _header(path: str) -> Facts:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
            as_stored = turned and image.format != "TIFF"  # whose size Pillow has turned
            return Facts(*(image.size[::-1] if as_stored else image.size), turned)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return _decode(path)


def _decode(path: str) -> Facts:
    """By Pillow, which says of a file that ends too soon what OpenCV fills with grey; by OpenCV,
    as mmcv reads, where the two could differ."""
    try:
        with Image.open(path) as image:
            turned_by = image.getexif().get(_ORIENTATION, 1)
            size = image.size
            alike = image.format in _ALIKE and turned_by == 1
            if image.format == "JPEG":  # the whole stream is decoded, at an eighth of the size
                image.draft("L", (max(1, size[0] // 8), max(1, size[1] // 8)))
            image.load()
        if alike:
            return Facts(*size)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        turned_by = 1  # OpenCV knows formats that Pillow does not, and larger images
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        return Facts(0, 0, problem=f"the image does not read: {error}")
    data = np.fromfile(path, np.uint8)
    if not data.size:
        return Facts(0, 0, problem="the image is empty, 0 bytes")
    try:
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error:
        decoded = None
    if decoded is None:
        return Facts(0, 0, problem="the image does not read: no format that OpenCV knows")
    return Facts(decoded.shape[1], decoded.shape[0], turned_by in _SIDEWAYS)
