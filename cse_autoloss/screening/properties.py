"""Convergence-property verification: is this the shape of a loss?

The properties, in the order in which they are checked, cheapest first. All are judged along sweeps,
which run towards the label or target (see ``blocks``); CSE-Autoloss (ICLR 2021), section 3.3, has
monotonicity and convergence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cse_autoloss.screening.blocks import Block, Tolerances

USES_PREDICTION = "uses-prediction"  # a variable that depends on the prediction occurs
FINITE_VALUES = "finite-values"
FINITE_GRADIENTS = "finite-gradients"
MONOTONICITY = "monotonicity"  # it falls until the prediction is right, and hardly rises again
CONVERGENCE = "convergence"  # it is least there, or all but; in classification its gradient fades
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
    values: np.ndarray,
    slopes: np.ndarray,
    block: Block,
    tolerances: Tolerances,
    detached: np.ndarray | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Property by property, where candidates miss it.

    Args:
        values, slopes: (points, trees) loss and its derivative along the sweep.
        detached: (trees,) where some of the loss lets no gradient through, or None for nowhere.
            There, what descent goes down is the integral of the slopes: it stands for the values.

    Yields:
        (property, (points, trees) bool)
    """
    yield FINITE_VALUES, ~np.isfinite(values)
    yield FINITE_GRADIENTS, ~np.isfinite(slopes)
    groups, sweeps, steps = block.shape
    if detached is not None and detached.any():
        values = values.copy()
        values[:, detached] = _integral(slopes[:, detached], block)
    lines = values.reshape(groups * sweeps, steps, -1)
    span = np.ptp(lines, axis=1, keepdims=True)
    rounding = NEGLIGIBLE * np.abs(lines).max(axis=1, keepdims=True)
    rebound = np.maximum(tolerances.rebound * span, rounding)
    if block.aims:
        yield CONVERGENCE, _off_one_basin(lines, rebound).reshape(values.shape)
    if not block.held:
        return

    def by_group(array: np.ndarray) -> np.ndarray:
        return array.reshape(groups, sweeps * steps, -1)

    inclines = slopes.reshape(lines.shape)
    steepest = np.abs(inclines).max(axis=1, keepdims=True)
    rising = inclines > np.maximum(tolerances.monotonicity * steepest, rounding)
    rising &= ~block.free.reshape(groups * sweeps, steps, 1)
    rising |= _climb(lines) > rebound
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
    rounding = NEGLIGIBLE * np.where(wrong, np.abs(grouped), 0).max(axis=1, keepdims=True)
    flat = (steep < block.flatness * steepest) | (steepest <= rounding)
    yield NOT_FLAT, (flat & wrong).reshape(slopes.shape)


def _integral(slopes: np.ndarray, block: Block) -> np.ndarray:
    """Of slopes along each sweep, 0 at its end. Shape (points, trees)."""
    steps = block.shape[2]
    positions = block.positions.reshape(-1, steps, 1)
    lines = slopes.reshape(len(positions), steps, -1)
    parts = (lines[:, 1:] + lines[:, :-1]) / 2 * np.diff(positions, axis=1)
    left = np.cumsum(parts[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([-left, np.zeros_like(left[:, :1])], axis=1).reshape(slopes.shape)


def _climb(lines: np.ndarray) -> np.ndarray:
    """How far a loss lies above its least on the way so far. Shape (sweeps, steps, trees)."""
    return lines - np.minimum.accumulate(lines, axis=1)


def _off_one_basin(lines: np.ndarray, rebound: np.ndarray) -> np.ndarray:
    """Where a loss has risen on its way to its least value, or falls again behind it."""
    before = np.arange(lines.shape[1])[None, :, None] <= lines.argmin(axis=1)[:, None]
    behind = _climb(lines[:, ::-1])[:, ::-1]
    return np.where(before, _climb(lines), behind) > rebound


def first_failures(
    values: np.ndarray,
    slopes: np.ndarray,
    block: Block,
    tolerances: Tolerances,
    detached: np.ndarray | None = None,
) -> np.ndarray:
    """(trees,) index in ``PROPERTIES`` of the first property that each candidate misses, or -1."""
    failed = np.full(values.shape[1], -1, np.int8)
    with np.errstate(all="ignore"):
        for name, where in violations(values, slopes, block, tolerances, detached):
            failed[(failed < 0) & where.any(axis=0)] = PROPERTIES.index(name)
    return failed
