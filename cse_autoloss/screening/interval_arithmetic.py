"""Interval arithmetic that the operator table runs on: :data:`INTERVALS` beside NumPy and torch.

An :class:`Interval` holds arrays of bounds. They are float32 numbers, rounded outwards: between
them lie both the exact result and that of any float32 arithmetic that rounds sums, products,
quotients and roots to the nearest and other functions to within four units in the last place. What
may be infinite or no number at all is (-inf, inf).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

_ULPS = 4 * 2.0**-23  # relative error of a float32 exp, log, tanh, ...
_TINY = 2.0**-149  # the least float32


def _down(x: np.ndarray) -> np.ndarray:
    """The largest float32 numbers that are not above x (as float64)."""
    y = x.astype(np.float32)
    return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y).astype(np.float64)


def _up(x: np.ndarray) -> np.ndarray:
    return -_down(-x)


class Interval:
    """``lo <= x <= hi``, elementwise; float64 arrays of float32 numbers."""

    __slots__ = ("hi", "lo")
    __array_ufunc__ = None  # NumPy numbers leave operations to this class

    def __init__(self, lo: Any, hi: Any) -> None:
        with np.errstate(all="ignore"):
            lo, hi = _down(np.asarray(lo, np.float64)), _up(np.asarray(hi, np.float64))
            lost = ~(np.isfinite(lo) & np.isfinite(hi))
        self.lo, self.hi = np.where(lost, -np.inf, lo), np.where(lost, np.inf, hi)

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.lo)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Any) -> Interval:
        other = interval(other)
        return Interval(_sum(self.lo, other.lo, -np.inf), _sum(self.hi, other.hi, np.inf))

    def __sub__(self, other: Any) -> Interval:
        return self + -interval(other)

    def __rsub__(self, other: Any) -> Interval:
        return interval(other) + -self

    def __mul__(self, other: Any) -> Interval:
        if other is self:
            ends = np.stack([self.lo * self.lo, self.hi * self.hi])
            return Interval(np.where((self.lo < 0) & (self.hi > 0), 0, ends.min(0)), ends.max(0))
        other = interval(other)
        return _hull(*(a * b for a in (self.lo, self.hi) for b in (other.lo, other.hi)))

    def __truediv__(self, other: Any) -> Interval:
        other = interval(other)
        quotients = [
            _quotient(a, b, to)
            for to in (-np.inf, np.inf)
            for a in (self.lo, self.hi)
            for b in (other.lo, other.hi)
        ]
        result = _hull(*quotients)
        crosses = (other.lo <= 0) & (other.hi >= 0)
        return Interval(np.where(crosses, -np.inf, result.lo), np.where(crosses, np.inf, result.hi))

    def __rtruediv__(self, other: Any) -> Interval:
        return interval(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, exponent: Any) -> Interval:
        return _power(self, exponent)

    # Comparisons are between 0 and 1: (1, 1) where it holds for all, (0, 0) where for none.

    def __gt__(self, other: Any) -> Interval:
        other = interval(other)
        return _truth(self.lo > other.hi, self.hi > other.lo)

    def __ge__(self, other: Any) -> Interval:
        other = interval(other)
        return _truth(self.lo >= other.hi, self.hi >= other.lo)

    def __lt__(self, other: Any) -> Interval:
        return interval(other) > self

    def __le__(self, other: Any) -> Interval:
        return interval(other) >= self

    def __eq__(self, other: Any) -> Interval:  # type: ignore[override]
        other = interval(other)
        same = (self.lo == self.hi) & (other.lo == other.hi) & (self.lo == other.lo)
        return _truth(same, (self.lo <= other.hi) & (self.hi >= other.lo))

    __hash__ = None


def interval(x: Any) -> Interval:
    """A number as an interval: it, and the float32 numbers beside it."""
    return x if isinstance(x, Interval) else Interval(x, x)


def where(condition: Any, a: Any, b: Any) -> Interval:
    """``a`` where the condition surely holds, ``b`` where it surely does not, else both."""
    condition, a, b = interval(condition), interval(a), interval(b)
    surely, never = condition.lo > 0, condition.hi <= 0
    return Interval(
        np.where(surely, a.lo, np.where(never, b.lo, np.minimum(a.lo, b.lo))),
        np.where(surely, a.hi, np.where(never, b.hi, np.maximum(a.hi, b.hi))),
    )


def maximum(a: Any, b: Any) -> Interval:
    a, b = interval(a), interval(b)
    return Interval(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi))


def minimum(a: Any, b: Any) -> Interval:
    return -maximum(-interval(a), -interval(b))


def _truth(surely: np.ndarray, perhaps: np.ndarray) -> Interval:
    return Interval(surely.astype(np.float64), perhaps.astype(np.float64))


def _sum(a: np.ndarray, b: np.ndarray, towards: float) -> np.ndarray:
    """A sum in float64, one step towards an infinity where that is where rounding came from."""
    with np.errstate(all="ignore"):
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part)
        return np.where(error * np.sign(towards) > 0, np.nextafter(total, towards), total)


def _quotient(a: np.ndarray, b: np.ndarray, towards: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        ratio = a / b
        exact = (ratio.astype(np.float32) == ratio) & (ratio * b == a)
        return np.where(exact, ratio, np.nextafter(ratio, towards))


def _hull(*ends: np.ndarray) -> Interval:
    """The least interval with all of these numbers; all numbers if one of them is none."""
    with np.errstate(all="ignore"):
        return Interval(np.minimum.reduce(ends), np.maximum.reduce(ends))


def _widened(lo: Any, hi: Any, low: float = -np.inf, high: float = np.inf) -> Interval:
    """Bounds of a function that float32 arithmetic computes to within a few units in the last
    place and never outside of [low, high]."""
    lo, hi = lo - _ULPS * np.abs(lo) - _TINY, hi + _ULPS * np.abs(hi) + _TINY
    return Interval(np.maximum(lo, low), np.minimum(hi, high))


def _rising(
    function: Callable[[np.ndarray], np.ndarray], low: float = -np.inf, high: float = np.inf
) -> Callable[[Any], Interval]:
    def apply(x: Any) -> Interval:
        x = interval(x)
        with np.errstate(all="ignore"):
            return _kept(_widened(function(x.lo), function(x.hi), low, high), x)

    return apply


def _kept(result: Interval, *args: Interval) -> Interval:
    """The result where the arguments are numbers: what is none has none for a sigmoid, too."""
    known = functools.reduce(np.logical_and, [arg.finite for arg in args])
    return Interval(np.where(known, result.lo, -np.inf), np.where(known, result.hi, np.inf))


def _sqrt(x: Any) -> Interval:
    x = interval(x)
    with np.errstate(all="ignore"):
        ends = []
        for square, towards in ((x.lo, -np.inf), (x.hi, np.inf)):
            root = np.sqrt(square)
            exact = (root.astype(np.float32) == root) & (root * root == square)
            ends.append(np.where(exact, root, np.nextafter(root, towards)))
        return Interval(*ends)


def _abs(x: Any) -> Interval:
    x = interval(x)
    return Interval(
        np.maximum(0.0, np.maximum(x.lo, -x.hi)), np.maximum(np.abs(x.lo), np.abs(x.hi))
    )


def _wave(function: Callable[[np.ndarray], np.ndarray], crest: float) -> Callable[[Any], Interval]:
    """Sine or cosine, which is 1 at ``crest`` and every 2 pi further."""

    def apply(x: Any) -> Interval:
        x = interval(x)
        with np.errstate(all="ignore"):
            slack = 1e-6 * (1 + np.maximum(np.abs(x.lo), np.abs(x.hi)))
            low, high = x.lo - slack, x.hi + slack

            def reaches(place: float) -> np.ndarray:
                return place + 2 * math.pi * np.ceil((low - place) / (2 * math.pi)) <= high

            ends = np.stack([function(low), function(high)])
            bottom = np.where(reaches(crest + math.pi), -1.0, ends.min(0))
            top = np.where(reaches(crest), 1.0, ends.max(0))
            return _kept(_widened(bottom - slack, top + slack, -1.0, 1.0), x)

    return apply


def _power(a: Any, b: Any) -> Interval:
    a, b = interval(a), interval(b)
    with np.errstate(all="ignore"):
        corners = np.stack([np.power(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)])
        lo, hi = corners.min(0), corners.max(0)
        whole = (b.lo == b.hi) & (b.lo == np.round(b.lo)) & (b.lo >= 0)
        crosses = (a.lo < 0) & (a.hi > 0)
        lo = np.where(whole & crosses, np.minimum(lo, 0.0), lo)
        lost = ((a.lo < 0) & ~whole) | ((a.lo <= 0) & (a.hi >= 0) & (b.lo < 0)) | np.isnan(lo + hi)
        result = _widened(lo, hi)
        positive = np.where(a.lo >= 0, np.maximum(result.lo, 0.0), result.lo)
        bounds = Interval(np.where(lost, -np.inf, positive), np.where(lost, np.inf, result.hi))
        return _kept(bounds, a, b)


def _sign(x: Any) -> Interval:
    x = interval(x)
    return _kept(Interval(np.sign(x.lo), np.sign(x.hi)), x)


def _no_classes(x: Any) -> Interval:
    raise TypeError("intervals have no class axis")


#: The functions of the operator table's array modules, on intervals.
INTERVALS = SimpleNamespace(
    name="intervals",
    exp=_rising(np.exp, 0.0),
    log=_rising(np.log),
    sqrt=_sqrt,
    abs=_abs,
    sign=_sign,
    sin=_wave(np.sin, math.pi / 2),
    cos=_wave(np.cos, 0.0),
    tanh=_rising(np.tanh, -1.0, 1.0),
    arctan=_rising(np.arctan),
    log1p=_rising(np.log1p),
    erf=_rising(lambda x: torch.erf(torch.from_numpy(np.asarray(x))).numpy(), -1.0, 1.0),
    sigmoid=_rising(lambda x: 1 / (1 + np.exp(-x)), 0.0, 1.0),
    where=where,
    maximum=maximum,
    minimum=minimum,
    power=_power,
    relu=lambda x: maximum(x, 0.0),
    at_most=minimum,
    positive=lambda x: interval(x) > 0.0,
    below=lambda x, limit: interval(x) <= limit,
    sum=_no_classes,
    max=_no_classes,
)
