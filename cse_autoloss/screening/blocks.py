"""What a loss is looked at on: sweeps in the space of predictions, evaluated a block at a time.

A sweep is a line (or path) that runs towards a label or target. At each of its points a candidate's
value and its derivative along the sweep are looked at, so a loss that is good for anything never
rises along one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerances:
    """How far a property may be missed. All are shares, so a loss may be multiplied by any positive
    number.

    Attributes:
        monotonicity: how steeply a loss may rise where it must not, as a share of its steepest
            slope on the same sweep.
        rebound: how far a loss may rise where it may, as a share of its range on the same sweep.
        convergence: how far above the group's least value the loss may be at the label or target,
            as a share of its range.
        fading: slope at the label that is allowed, as a share of the steepest; None for boxes.
    """

    monotonicity: float
    rebound: float
    convergence: float
    fading: float | None


@dataclass(frozen=True)
class Block:
    """Sweeps that are evaluated together: the same classes and number of steps.

    Points are numbered group by group (one label, or one target box), sweep by sweep, step by step.

    Attributes:
        name: what is swept.
        shape: (groups, sweeps of each, steps of each).
        values: (points, columns) of each variable, float32; boxes have one column.
        tangents: likewise for those that depend on the prediction: derivative by the sweep's
            position.
        weights: (points, columns) weight of each element of the loss, or None for 1.
        held: whether the properties are demanded; if not, only that everything is finite.
        aims: where they are not: whether there must be one best score, wherever it lies.
        free: (points,) where a loss may rise again: the prediction is right (a score's aim may be
            short of 1), or a box hardly overlaps its target.
        settled: (points,) where the prediction is at its label or target.
        wrong: (points,) where it is plainly wrong, and a gradient must be there.
        flatness: how much of one, as a share of the steepest slope at such points of the group.
        sweeps: (groups * sweeps,) description of each.
        axis: what the position along a sweep is.
        positions: (points,)
    """

    name: str
    shape: tuple[int, int, int]
    values: Mapping[str, np.ndarray]
    tangents: Mapping[str, np.ndarray]
    weights: np.ndarray | None
    held: bool
    aims: bool
    free: np.ndarray
    settled: np.ndarray
    wrong: np.ndarray
    flatness: float
    sweeps: tuple[str, ...]
    axis: str
    positions: np.ndarray

    @property
    def columns(self) -> int:
        return next(iter(self.tangents.values())).shape[-1]
