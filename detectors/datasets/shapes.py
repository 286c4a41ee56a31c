"""The embedded data set: shapes on textured backgrounds, drawn from a seed, in COCO format with
boxes and polygon masks.

It is small enough to be made in seconds and hard enough that detectors differ on it: class
frequencies have a long tail (Zipf: the rarest class is six times as rare as the most common one),
sizes run from 8 pixels to over half of the image, shapes are rotated, textured, low in contrast and
occlude each other, and every second image holds distractors that are no object: outlines of the
very same shapes, and shapes of no class (pentagon, half disc, parallelogram).

All drawing is integer arithmetic on a 2x supersampled canvas and NumPy arithmetic seeded for each
image alone, so the same seed gives the same bytes, and an image does not depend on how many others
are drawn.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("disc", "square", "triangle", "cross", "star", "crescent")
SPLITS = {"train": 800, "val": 240, "test": 400, "tiny": len(CLASSES)}
IMAGE_SIZE = 128  # pixels, both sides
VERSION = 3  # of the drawing: a change of the bytes that a seed gives is a new version
LAYOUT = 2  # of the folder: names of splits and files

_SCALE = 2  # supersampling: the canvas on which shapes are drawn has 2 x 2 samples a pixel
_MIN_SIZE, _MAX_SIZE = 8, 84  # pixels, longer side of an object's box
_MIN_VISIBLE = 0.5  # of an object's area, once everything in front of it is drawn


@dataclass(frozen=True)
class _Object:
    label: int  # index into CLASSES, or -1 for a distractor
    mask: np.ndarray  # (256, 256) bool, on the supersampled canvas, whole shape


def write(folder: str | Path, seed: int = 0, splits: dict[str, int] | None = None) -> Path:
    """Write the data set as ``folder/annotations/instances_<split>2017.json`` and
    ``folder/<split>2017/*.png``.

    The folder appears complete or not at all: everything is written beside it first and then
    renamed.

    Args:
        folder: where to; must not exist, or be empty.
        seed: which data set; the same seed gives the same bytes.
        splits: split to number of images; :data:`SPLITS` unless given. In ``tiny``, image i shows
            category i.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are private to the user; a data set need not be
        (scratch / "annotations").mkdir()
        for split, count in (splits or SPLITS).items():
            _write_split(scratch, split, count, seed)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def draw(seed: int, split: str, index: int) -> tuple[np.ndarray, list[dict]]:
    """One image and its annotations.

    Args:
        seed: of the data set.
        split: a name in :data:`SPLITS`.
        index: of the image in its split; in ``tiny`` also the category that it shows.

    Returns:
        (128, 128, 3) uint8 image, BGR, and a list of COCO annotations (``category_id`` from 1;
        ``bbox`` and ``segmentation`` in pixels, of the visible part; without ``id`` and
        ``image_id``).
    """
    rng = np.random.default_rng([seed, VERSION, list(SPLITS).index(split), index])
    side = IMAGE_SIZE * _SCALE
    image = _texture(rng, rng.uniform(40, 215, 3), contrast=rng.uniform(8, 40))
    objects: list[_Object] = []
    if split == "tiny":
        wanted = [index % len(CLASSES)] * 2
    else:
        frequency = 1.0 / np.arange(1, len(CLASSES) + 1)
        wanted = list(
            rng.choice(len(CLASSES), size=rng.integers(1, 7), p=frequency / frequency.sum())
        )
        wanted += [-1] * int(rng.integers(0, 4) * (rng.random() < 0.5))
        rng.shuffle(wanted)
    # The tiny split asks for learning, not for acuity
    smallest = _MIN_SIZE if split != "tiny" else 24
    for label in wanted:
        placed = _place(rng, int(label), objects, smallest)
        if placed is None:
            continue
        objects.append(placed)
        alpha = _shrink(placed.mask)[..., None]
        backdrop = (image * alpha).sum((0, 1)) / alpha.sum()
        colour = _colour(rng, placed.label)
        while np.abs(colour - backdrop).max() < 40:  # low contrast is wanted, no contrast is not
            colour = rng.uniform(10, 245, 3)
        image = (1 - alpha) * image + alpha * _texture(rng, colour, contrast=rng.uniform(0, 25))
    image = image + 4 * rng.standard_normal(image.shape, np.float32)

    annotations = []
    front = np.zeros((side, side), bool)
    for thing in reversed(objects):
        visible = thing.mask & ~front
        front |= thing.mask
        if thing.label >= 0:
            annotations.append(_annotation(thing.label, visible))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), annotations[::-1]


def _colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """(3,) BGR. Most objects have roughly their class's hue, and distractors anyone's: colour is a
    hint, no proof."""
    hue = label if label >= 0 else rng.integers(len(CLASSES))
    if rng.random() < 0.25:
        return rng.uniform(10, 245, 3)
    angle = 2 * np.pi * (hue / len(CLASSES) + np.array([0, 1 / 3, 2 / 3])) + rng.normal(0, 0.4)
    return np.clip(rng.uniform(90, 165) + 75 * np.cos(angle) + rng.normal(0, 15, 3), 10, 245)


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    (folder / f"{split}2017").mkdir()
    images, annotations = [], []
    for index in range(count):
        pixels, found = draw(seed, split, index)
        name = f"{index:06d}.png"
        ok, png = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        if not ok:
            raise OSError(f"{folder / name}: OpenCV could not encode the image")
        (folder / f"{split}2017" / name).write_bytes(png.tobytes())
        images.append(
            {"id": index + 1, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    content = {
        "info": {
            "description": "cse_autoloss shapes",
            "version": str(VERSION),
            "seed": seed,
            "split": split,
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
        ],
    }
    text = json.dumps(content, separators=(",", ":"))
    (folder / "annotations" / f"instances_{split}2017.json").write_text(text)


def _place(
    rng: np.random.Generator, label: int, objects: list[_Object], smallest: int
) -> _Object | None:
    """An object that leaves at least half of each one behind it visible, or None if no place for it
    was found."""
    hidden = np.zeros((IMAGE_SIZE * _SCALE,) * 2, bool)
    left = []
    for thing in reversed(objects):
        left.append((thing.mask & ~hidden, np.count_nonzero(thing.mask)))
        hidden |= thing.mask
    for _ in range(20):
        # Every scale, large ones a little more
        size = smallest * (_MAX_SIZE / smallest) ** (rng.random() ** 0.7)
        mask = _shape(rng, label, size)
        if all(np.count_nonzero(visible & ~mask) >= _MIN_VISIBLE * area for visible, area in left):
            return _Object(label, mask)
    return None


def _shape(rng: np.random.Generator, label: int, size: float) -> np.ndarray:
    """(256, 256) bool: a shape of this class, turned at random, the longer side of its box ``size``
    pixels long."""
    outline = label < 0 and rng.random() < 0.5
    if outline:
        points = _OUTLINES[rng.choice(list(_OUTLINES))]
    elif label < 0:
        points = _OTHERS[rng.integers(len(_OTHERS))]
    else:
        points = _OUTLINES[CLASSES[label]]
    angle = rng.uniform(0, 2 * np.pi)
    points = points * np.array([1.0, rng.uniform(0.75, 1.0)])
    points = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    low, high = points.min(0), points.max(0)
    points = (points - low) * (size / (high - low).max())
    room = IMAGE_SIZE - points.max(0)
    corners = np.rint((points + rng.uniform(0, 1, 2) * room) * _SCALE).astype(np.int32)
    canvas = np.zeros((IMAGE_SIZE * _SCALE,) * 2, np.uint8)
    if outline:
        cv2.polylines(canvas, [corners], True, 1, thickness=max(2, int(size * _SCALE * 0.08)))
    else:
        cv2.fillPoly(canvas, [corners], 1)
    return canvas.astype(bool)


def _annotation(label: int, visible: np.ndarray) -> dict:
    contours, _ = cv2.findContours(
        visible.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    outlines = [cv2.approxPolyDP(contour, 1.0, True) for contour in contours]
    # Slivers left by occlusion go
    kept = [index for index, outline in enumerate(outlines) if len(outline) >= 3]
    filled = np.zeros(visible.shape, np.uint8)
    cv2.drawContours(filled, [contours[index] for index in kept], -1, 1, cv2.FILLED)
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    x, y = columns[0] / _SCALE, rows[0] / _SCALE
    width, height = (columns[-1] + 1) / _SCALE - x, (rows[-1] + 1) / _SCALE - y
    return {
        "category_id": label + 1,
        "bbox": [float(x), float(y), float(width), float(height)],
        "area": np.count_nonzero(filled) / _SCALE**2,  # of the polygons, which know no holes
        # findContours follows the samples' centres: half a sample more is a centre's place in
        # pixels.
        "segmentation": [
            ((outlines[index].reshape(-1, 2) + 0.5) / _SCALE).reshape(-1).tolist() for index in kept
        ],
        "iscrowd": 0,
    }


def _shrink(mask: np.ndarray) -> np.ndarray:
    """(128, 128) share of each pixel that the mask covers."""
    rows = mask.view(np.uint8).reshape(IMAGE_SIZE, _SCALE, -1).sum(1, dtype=np.uint8)
    return sum(rows[:, column::_SCALE] for column in range(_SCALE)).astype(np.float32) / _SCALE**2


def _texture(rng: np.random.Generator, colour: np.ndarray, contrast: float) -> np.ndarray:
    """(128, 128, 3) float32: the colour, with noise of three grain sizes, and stripes or a slope of
    brightness."""
    grid = np.arange(IMAGE_SIZE)
    field = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for grain in (4, 16, 32):
        coarse = rng.standard_normal((IMAGE_SIZE // grain + 1,) * 2, np.float32)
        low, share = grid // grain, ((grid % grain) / grain).astype(np.float32)
        rows = coarse[low] * (1 - share[:, None]) + coarse[low + 1] * share[:, None]
        field += rows[:, low] * (1 - share) + rows[:, low + 1] * share
    angle = rng.uniform(0, np.pi)
    along = (np.cos(angle) * grid[:, None] + np.sin(angle) * grid[None, :]).astype(np.float32)
    if rng.random() < 0.4:
        field += np.where(along % (width := rng.uniform(6, 24)) < width / 2, 1, -1)
    else:
        field += along / IMAGE_SIZE * rng.uniform(-2, 2)
    return colour.astype(np.float32) + field[..., None] * np.float32(contrast / 2)


def _circle(start: float, stop: float, count: int, radius: float = 1.0) -> np.ndarray:
    angles = np.linspace(start, stop, count)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _star() -> np.ndarray:
    points = _circle(0, 2 * np.pi, 11)[:-1]
    points[1::2] *= 0.42
    return points


def _crescent() -> np.ndarray:
    inner = _circle(np.pi * 0.62, -np.pi * 0.62, 20, 0.78) + [0.42, 0]
    inner[:, 0] = 0.84 - inner[:, 0]
    return np.concatenate([_circle(np.pi * 0.35, np.pi * 1.65, 32), inner[::-1]])


_OUTLINES: dict[str, np.ndarray] = {
    "disc": _circle(0, 2 * np.pi, 48)[:-1],
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "triangle": _circle(0, 2 * np.pi, 4)[:-1],
    "star": _star(),
    "cross": np.array(
        [
            [-1, -3],
            [1, -3],
            [1, -1],
            [3, -1],
            [3, 1],
            [1, 1],
            [1, 3],
            [-1, 3],
            [-1, 1],
            [-3, 1],
            [-3, -1],
            [-1, -1],
        ]
    )
    / 3.0,
    "crescent": _crescent(),
}
_OTHERS = (
    _circle(0, 2 * np.pi, 6)[:-1],  # pentagon
    _circle(0, np.pi, 24),  # half disc
    np.array([[-1.5, -0.7], [0.7, -0.7], [1.5, 0.7], [-0.7, 0.7]]),  # parallelogram
)
