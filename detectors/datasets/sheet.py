"""A contact sheet: images of a data set with their boxes drawn on them, as mmdet sees both."""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
from PIL import Image, ImageDraw, ImageFont

from cse_autoloss.trial import ConfigError
from detectors.datasets.dataset import DataSet

_SIDE = 240  # pixels of an image on the sheet, its longer side
_GAP = 6
_LINE = 16  # height of a caption


def draw(data: DataSet, path: Path, images: int = 20, seed: int = 0) -> Path:
    """Draw images of train and val: each class's first, then any; crowds in grey.

    Args:
        images: how many at most.
        seed: of the choice.

    Returns:
        The path.
    """
    chosen = _choice(data, images, seed)
    colors = [_color(place, len(data.classes)) for place in range(len(data.classes))]
    drawn = [_drawn(data, *entry, colors) for entry in chosen]
    columns = min(5, len(chosen))
    width = _SIDE + _GAP
    height = max(picture.height for picture in drawn) + _LINE + _GAP
    bottom = -(-len(chosen) // columns) * height
    lines = -(-len(data.classes) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, bottom + (lines + 1) * _LINE), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for place, ((split, image, _), picture) in enumerate(zip(chosen, drawn, strict=True)):
        left, top = place % columns * width + _GAP, place // columns * height + _GAP
        sheet.paste(picture, (left, top + _LINE))
        caption = f"{split}: {Path(image['file_name']).name}"
        pen.text((left, top), _cut(pen, caption, font), "black", font)
    for place, (name, color) in enumerate(zip(data.classes, colors, strict=True)):
        left, top = place % columns * width + _GAP, bottom + place // columns * _LINE + _GAP
        pen.rectangle([left, top, left + 10, top + 10], fill=color)
        pen.text((left + 14, top - 2), _cut(pen, name, font), "black", font)
    try:
        sheet.save(path)
    except ValueError as error:  # of the file's name
        raise ConfigError(f"--sheet {path}: {error}; FILE.png would do") from None
    return path


def _choice(
    data: DataSet, count: int, seed: int
) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    found = []
    for split in ("train", "val"):
        content = json.loads(Path(data.splits[split].ann_file).read_text(encoding="utf-8-sig"))
        order = [category["id"] for category in content["categories"]]
        of_image: dict[Any, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            label = order.index(annotation["category_id"])
            of_image.setdefault(annotation["image_id"], []).append({**annotation, "class": label})
        found += [(split, i, of_image.get(i["id"], [])) for i in content["images"]]
    random.Random(seed).shuffle(found)
    first, seen = [], set()
    for entry in found:
        classes = {annotation["class"] for annotation in entry[2]}
        if classes - seen and len(first) < count:
            first.append(entry)
            seen |= classes
    rest = [entry for entry in found if not any(entry is other for other in first)]
    return first + rest[: count - len(first)]


def _drawn(
    data: DataSet,
    split: str,
    image: Mapping[str, Any],
    objects: list[dict[str, Any]],
    colors: list[tuple[int, int, int]],
) -> Image.Image:
    pixels = cv2.imread(str(Path(data.splits[split].img_prefix, image["file_name"])))
    scale = _SIDE / max(pixels.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    drawn = Image.fromarray(
        cv2.cvtColor(cv2.resize(pixels, size, interpolation=how), cv2.COLOR_BGR2RGB)
    )
    pen = ImageDraw.Draw(drawn)
    for annotation in objects:
        x, y, width, height = (value * scale for value in annotation["bbox"])
        color = (150, 150, 150) if annotation.get("iscrowd") else colors[annotation["class"]]
        pen.rectangle([x, y, x + width, y + height], outline=color, width=2)
    return drawn


def _color(place: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(place / max(1, count), 0.95, 0.95 - 0.3 * (place % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def _cut(pen: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    while pen.textlength(text, font) > _SIDE:
        text = text[:-4] + "..."
    return text
