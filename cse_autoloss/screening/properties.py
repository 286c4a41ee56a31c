"""Convergence-property verification: is this the shape of a loss?

The properties, in the order in which they are checked, cheapest first. All are judged along sweeps,
which run towards the label or target (see ``probes``); CSE-Autoloss (ICLR 2021), section 3.3, has
monotonicity and convergence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cse_autoloss.screening.probes import Block, Tolerances

USES_PREDICTION = "uses-prediction"  # a variable that depends on the prediction occurs
FINITE_VALUES = "finite-values"
FINITE_GRADIENTS = "finite-gradients"
MONOTONICITY = "monotonicity"  # the loss never rises towards the label or target
CONVERGENCE = "convergence"  # it is least there and, for classification, its gradient fades
NOT_FLAT = "not-flat"  # there is a gradient wherever the prediction is plainly wrong

PROPERTIES = (USES_PREDICTION, FINITE_VALUES, FINITE_GRADIENTS, MONOTONICITY, CONVERGENCE, NOT_FLAT)

NEGLIGIBLE = 1e-6  # slope per unit of value under which float32 shows nothing but rounding


def reduce(values: np.ndarray, wide: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The loss of each sample from the values of an expression: (trees, points, columns) to
    (points, trees).

    A value with the class axis is summed over it; weights are those of the one-stage losses.
    """
    if values.shape[-1] == 1:
        return np.ascontiguousarray(values[..., 0].T)
    if weights is None:
        total = values[..., 0].copy()
        for column in range(1, values.shape[-1]):
            total += np.where(wide[:, None], values[..., column], 0)
    else:
        total = values[..., 0] * weights[:, 0]
        for column in range(1, values.shape[-1]):
            total += values[..., column] * weights[:, column]
    return np.ascontiguousarray(total.T)


def violations(
    values: np.ndarray, slopes: np.ndarray, block: Block, tolerances: Tolerances
) -> Iterator[tuple[str, np.ndarray]]:
    """Property by property, where candidates miss it.

    Args:
        values, slopes: (points, trees) loss and its derivative along the sweep.

    Yields:
        (property, (points, trees) bool)
    """
    yield FINITE_VALUES, ~np.isfinite(values)
    yield FINITE_GRADIENTS, ~np.isfinite(slopes)
    if not block.held:
        return
    groups, sweeps, steps = block.shape

    def by_group(array: np.ndarray) -> np.ndarray:
        return array.reshape(groups, sweeps * steps, -1)

    lines, inclines = (
        values.reshape(groups * sweeps, steps, -1),
        slopes.reshape(groups * sweeps, steps, -1),
    )
    rounding = NEGLIGIBLE * np.abs(lines).max(axis=1, keepdims=True)
    steepest = np.abs(inclines).max(axis=1, keepdims=True)
    rising = inclines > np.maximum(tolerances.monotonicity * steepest, rounding)
    yield MONOTONICITY, rising.reshape(slopes.shape)
    grouped, steep = by_group(values), np.abs(by_group(slopes))
    least, most = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)
    rounding = NEGLIGIBLE * np.maximum(np.abs(least), np.abs(most))
    high = grouped - least > tolerances.convergence * (most - least)
    if tolerances.fading is not None:
        high |= steep > np.maximum(tolerances.fading * steep.max(axis=1, keepdims=True), rounding)
    yield CONVERGENCE, high.reshape(slopes.shape) & block.settled[:, None]
    wrong = by_group(block.wrong)
    steepest = np.where(wrong, steep, 0).max(axis=1, keepdims=True)
    flat = (steep < block.flatness * steepest) | (steepest <= rounding)
    yield NOT_FLAT, (flat & wrong).reshape(slopes.shape)


def first_failures(
    values: np.ndarray, slopes: np.ndarray, block: Block, tolerances: Tolerances
) -> np.ndarray:
    """(trees,) index in ``PROPERTIES`` of the first property that each candidate misses, or -1."""
    failed = np.full(values.shape[1], -1, np.int8)
    with np.errstate(all="ignore"):
        for name, where in violations(values, slopes, block, tolerances):
            failed[(failed < 0) & where.any(axis=0)] = PROPERTIES.index(name)
    return failed
