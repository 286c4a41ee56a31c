"""Paths of boxes onto their targets: from beside, from another size, from another shape.

Boxes are (centre x, centre y, width, height), in units of the target's width and height where a
path says nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cse_autoloss import inputs
from cse_autoloss.inputs import EXTRAS, IOU_EPSILON
from cse_autoloss.screening.blocks import Block
from cse_autoloss.screening.probe_settings import ProbeSettings
from cse_autoloss.space import SearchSpace

_DIAGONAL = "diagonal translation"
_AXIS = "share of the path"
#: (positions,) in [0, 1] to (positions, 4) boxes; 1 is the target.
_Path = Callable[[np.ndarray], np.ndarray]


def box_blocks(settings: ProbeSettings, space: SearchSpace) -> Iterator[Block]:
    """The blocks of a regression space, the cheapest first."""
    steps, glance = settings.integer("steps", 3, 1000), settings.integer("glance", 3, 1000)
    areas = settings.numbers("areas", 1e-2, 1e9)
    aspects = settings.numbers("aspects", 1e-2, 1e2)
    distance = settings.number("distance", 1.01, 100)
    scales = settings.numbers("scales", 1e-2, 1e2)
    stretches = settings.numbers("stretches", 1e-2, 1e2)
    wrong = settings.interval("wrong", 0, 1)
    paths = dict(_paths(distance, scales, stretches))
    middle = areas[len(areas) // 2]
    glances = {
        name: path
        for name, path in paths.items()
        if name in (_DIAGONAL, f"scale from {scales[0]:g}")
    }
    flatness = settings.tolerance("flatness")
    yield _block("glance", space, glance, [(middle, aspects[0])], glances, wrong, flatness)
    # A loss in squared pixels, such as U - I, moves large boxes only.
    yield _block(
        "all areas",
        space,
        glance,
        [(area, aspects[0]) for area in areas],
        glances,
        wrong,
        settings.tolerance("balance"),
        together=True,
    )
    for area in areas:
        yield _block(
            f"paths to {area:g} square pixels",
            space,
            steps,
            [(area, aspect) for aspect in aspects],
            paths,
            wrong,
            flatness,
        )
    yield _each_alone(space, areas, aspects, paths[_DIAGONAL])


def _paths(
    distance: float, scales: list[float], stretches: list[float]
) -> Iterator[tuple[str, _Path]]:
    def path(x: float = 0, y: float = 0, width: float = 1, height: float = 1) -> _Path:
        """Centre straight to the target's, width and height at constant rates to the target's."""
        return lambda t: np.stack(
            [x * (1 - t), y * (1 - t), width ** (1 - t), height ** (1 - t)], -1
        )

    def corner(size: float) -> _Path:
        """One corner stays on the target's, the opposite one goes straight to its own."""
        return lambda t: np.stack(
            [(size - 1) / 2 * (1 - t), (size - 1) / 2 * (1 - t), *[1 + (size - 1) * (1 - t)] * 2],
            -1,
        )

    def two_legs(scale: float) -> _Path:
        """First to the same centre, with a size of its own; then to the target's size."""
        return lambda t: np.stack(
            [
                distance * (1 + scale) / 2 * np.clip(1 - 2 * t, 0, None),
                0 * t,
                *[scale ** np.clip(2 - 2 * t, None, 1)] * 2,
            ],
            -1,
        )

    yield _DIAGONAL, path(distance, distance)
    yield "horizontal translation", path(x=distance)
    yield "vertical translation", path(y=-distance)
    for scale in scales:
        yield f"scale from {scale:g}", path(width=scale, height=scale)
        yield f"scale from {scale:g} at a corner", corner(scale)
        yield f"translation at scale {scale:g}, then scale", two_legs(scale)
    for stretch in stretches:
        yield f"aspect from {stretch:g}", path(width=stretch, height=1 / stretch)


def box_variables(
    names: Iterable[str], boxes: Tensor, targets: Tensor, image_sizes: Tensor | None = None
) -> dict[str, Tensor]:
    """Variables of boxes, bounded as the losses are trained with them.

    Args:
        boxes, targets: (P, 4) as (centre x, centre y, width, height) in pixels.
        image_sizes: (P, 2); the usual ones where absent.
    """
    corners = [
        torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)
        for box in (boxes, targets)
    ]
    if image_sizes is None:
        image_sizes = boxes.new_full((len(boxes), 2), EXTRAS["image_sizes"].usual)
    given = dict(zip(("pred", "target"), corners)) | {"stable": True, "image_sizes": image_sizes}
    return inputs.variables("boxes", names, given)


def _along(
    names: Sequence[str], path: _Path, position: np.ndarray, width: float, height: float
) -> np.ndarray:
    """(names, positions) variables on the way to a target of a width and height in pixels."""
    unit, target = np.array([width, height] * 2), np.array([0, 0, width, height])
    boxes = torch.from_numpy(path(position) * unit)
    found = box_variables(names, boxes, torch.from_numpy(target).expand_as(boxes))
    return np.stack([found[name].numpy() for name in names])


def _with_areas(space: SearchSpace) -> list[str]:
    """The space's variables, and the areas, which tell where a box stands."""
    return list(dict.fromkeys(["U", "I", "E", *space.variables]))


def _block(
    name: str,
    space: SearchSpace,
    steps: int,
    targets: list[tuple[float, float]],
    paths: Mapping[str, _Path],
    wrong: tuple[float, float],
    flatness: float,
    together: bool = False,
) -> Block:
    """The paths to each target. ``together``: slopes are compared between targets, too; the losses'
    least values are not."""
    position, nudge = np.linspace(0, 1, steps), 1e-6
    names = _with_areas(space)
    values, slopes, texts = [], [], []
    for area, aspect in targets:
        size = math.sqrt(area * aspect), math.sqrt(area / aspect)
        for text, path in paths.items():
            here, before = (_along(names, path, t, *size) for t in (position, position - nudge))
            values.append(here)
            # From behind: the path ends on the target, where areas have a kink
            slopes.append((here - before) / nudge)
            texts.append(f"{text}, target of {area:g} square pixels, aspect {aspect:g}")
    value, slope = (np.stack(part, 1).reshape(len(names), -1) for part in (values, slopes))
    scale = np.maximum(np.abs(value), 1)
    scale[:3] = value[:3].max(axis=0)
    slope[np.abs(slope) < 1e-9 * scale / nudge] = 0  # rounding
    union, overlap = value[:2]
    iou, rising = overlap / union, slope[1] * union - slope[0] * overlap > 0
    settled = np.tile((position == 1) & (not together), len(texts))
    shape = (1, len(texts), steps) if together else (len(targets), len(paths), steps)
    return Block(
        name=name,
        shape=shape,
        values=_columns(names, value, space.variables),
        tangents=_columns(names, slope, space.predicted),
        weights=None,
        held=True,
        aims=False,
        free=iou < wrong[0],
        settled=settled,
        wrong=(iou >= wrong[0]) & (iou <= wrong[1]) & rising,
        flatness=flatness,
        sweeps=tuple(texts),
        axis=_AXIS,
        positions=np.tile(position, len(texts)),
    )


def _columns(names: Sequence[str], rows: np.ndarray, kept: Iterable[str]) -> dict[str, np.ndarray]:
    """(points, 1) float32 of each variable that is kept, from (names, points)."""
    return {name: row[:, None].astype(np.float32) for name, row in zip(names, rows) if name in kept}


def _each_alone(space: SearchSpace, areas: list[float], aspects: list[float], path: _Path) -> Block:
    """The gradient by each variable alone must be finite, too: along a path it may be hidden by one
    that stands still, where torch multiplies infinity by 0. Only not by an intersection that is
    empty: what bounds it stops any gradient.
    """
    position = np.array([0, 0.75, 1])  # disjoint, overlapping, there
    bound = 2 * IOU_EPSILON
    names, moving = _with_areas(space), [n for n in space.variables if n in space.predicted]
    values, slopes, texts = [], [], []
    for area in areas:
        for aspect in aspects:
            size = math.sqrt(area * aspect), math.sqrt(area / aspect)
            here = _along(names, path, position, *size)
            for alone in moving:
                slope = np.array([[name == alone] for name in names]) * np.ones(len(position))
                slope[1] = np.where(here[1] > bound * here[0], slope[1], 0)
                values.append(here)
                slopes.append(slope)
                texts.append(f"{alone} alone, target of {area:g} square pixels, aspect {aspect:g}")
    value, slope = (np.concatenate(part, 1) for part in (values, slopes))
    nowhere = np.zeros(value.shape[1], bool)
    return Block(
        name="each variable alone",
        shape=(len(areas) * len(aspects), len(moving), len(position)),
        values=_columns(names, value, space.variables),
        tangents=_columns(names, slope, space.predicted),
        weights=None,
        held=False,
        aims=False,
        free=nowhere,
        settled=nowhere,
        wrong=nowhere,
        flatness=0,
        sweeps=tuple(texts),
        axis=_AXIS,
        positions=np.tile(position, len(texts)),
    )
