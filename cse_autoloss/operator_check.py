"""Does a row of the operator table say one thing in all its forms? ``register`` asks before it
takes one from a plug-in.

A detector is trained with what torch's graph makes of a row's ``torch`` function, so arrays,
tangents and adjoints are held against that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cse_autoloss.primitives import NUMPY, TORCH, Primitive

_POINTS, _CLASSES = 16, 5
_LIMIT = 3.0  # arguments lie in [-_LIMIT, _LIMIT]
_TOLERANCE = 1e-7  # relative, in float64
_INTERVALS = 50


def check_operator(row: Primitive) -> None:
    """Try a row on random arguments.

    Raises:
        ValueError: one line that says which of its forms is wrong, and where.
    """
    rng = np.random.default_rng(0)
    args = [rng.uniform(-_LIMIT, _LIMIT, (_POINTS, _CLASSES)) for _ in range(row.arity)]
    args[0][::2] = np.abs(args[0][::2])  # half of them inside a logarithm's domain
    try:
        with np.errstate(all="ignore"):
            for what, found, right in _forms(row, args, rng):
                _compare(what, found, right)
            if not row.classwise:
                _check_bounds(row, rng)
        if missing := [f"#{i + 1}" for i in range(row.arity) if f"#{i + 1}" not in row.latex]:
            raise ValueError(f"'latex' has no {missing[0]}")
    except Exception as error:  # a plug-in's functions may raise anything
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"primitive {row.name!r}: {' '.join(reason.split())}") from error


Form = tuple[str, object, np.ndarray]  # what it is, what it gives, what it should give


def _forms(row: Primitive, args: list[np.ndarray], rng: np.random.Generator) -> Iterator[Form]:
    leaves = [torch.tensor(arg, requires_grad=True) for arg in args]
    value = row.torch(*leaves)
    shapes = [(_POINTS, _CLASSES), *([(_POINTS, 1)] if row.classwise else [])]
    if tuple(value.shape) not in shapes:
        raise ValueError(f"'torch' makes {tuple(value.shape)} of {shapes[0]}")
    right = value.detach().numpy()
    weights = rng.normal(size=right.shape)
    found = [None] * row.arity
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, torch.tensor(weights), allow_unused=True)
    inside = np.isfinite(right).all(axis=1, keepdims=True)  # a value, so a slope is owed, too
    gradients = [np.where(inside, 0.0 if grad is None else grad.numpy(), np.nan) for grad in found]
    if not np.all([np.isfinite(gradient).any() for gradient in gradients]):
        raise ValueError(f"nothing is finite for arguments in [{-_LIMIT:g}, {_LIMIT:g}]")
    for xp, convert in ((NUMPY, np.asarray), (TORCH, torch.tensor)):
        inputs, there = [convert(arg) for arg in args], f"on {xp.name} arrays"
        result = row.array(xp, *inputs)
        yield f"'array' {there}", result, right
        single = row.array(xp, *(convert(arg.astype(np.float32)) for arg in args))
        if single.dtype not in (np.dtype("float32"), torch.float32):
            raise ValueError(f"'array' {there} makes {single.dtype} of float32")
        for place, gradient in enumerate(gradients):
            direction = rng.normal(size=args[place].shape)
            tangents = [convert(direction) if i == place else 0.0 for i in range(row.arity)]
            slope = np.asarray(row.tangent(xp, result, inputs, tangents)) * weights
            # One number a point, because a row may mix the classes.
            yield (
                f"'tangent' by argument {place + 1} {there}",
                np.broadcast_to(slope, right.shape).sum(1),
                (gradient * direction).sum(1),
            )
            if row.adjoint is not None:
                adjoint = row.adjoint[place]
                part = 0.0 if adjoint is None else adjoint(xp, result, inputs, convert(weights))
                yield f"'adjoint' of argument {place + 1} {there}", part, gradient
    if row.commutative:
        yield "with its arguments exchanged, the value", row.array(NUMPY, *args[::-1]), right
    if not row.classwise:
        alone = [row.array(NUMPY, *(arg[:, i : i + 1] for arg in args)) for i in range(_CLASSES)]
        yield "for one class alone ('classwise' is not set), the value", np.hstack(alone), right


def _compare(what: str, found: object, right: np.ndarray) -> None:
    """Where the right value is finite, the found one is that."""
    found = np.broadcast_to(np.asarray(found, float), right.shape)
    wrong = np.isfinite(right) & ~(np.abs(found - right) <= _TOLERANCE * np.fmax(1, np.abs(right)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise ValueError(f"{what} is {found[at]:.6g}; torch's graph has {right[at]:.6g}")


def _check_bounds(row: Primitive, rng: np.random.Generator) -> None:
    """Values lie within finite bounds, and derivatives are finite there."""
    for _ in range(_INTERVALS):
        intervals = [tuple(np.sort(rng.uniform(-_LIMIT, _LIMIT, 2))) for _ in range(row.arity)]
        intervals[0] = (max(intervals[0][0], 0.0), max(intervals[0][1], 0.0))
        low, high = row.bounds(*intervals)
        if not np.isfinite([low, high]).all():
            continue
        points = [rng.uniform(*interval, (200, 1)) for interval in intervals]
        values = row.array(NUMPY, *points)
        slopes = row.tangent(NUMPY, values, points, [np.ones_like(points[0])] * row.arity)
        inside = (low - 1e-9 <= values) & (values <= high + 1e-9)
        if not (inside.all() and np.isfinite(slopes).all()):
            where = " x ".join(f"[{a:.3g}, {b:.3g}]" for a, b in intervals)
            raise ValueError(
                f"bounds {low:.4g} to {high:.4g} on {where}, where its values lie from "
                f"{values.min():.4g} to {values.max():.4g} and slopes up to "
                f"{np.abs(slopes).max():.4g}"
            )
