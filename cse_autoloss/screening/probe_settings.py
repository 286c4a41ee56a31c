"""The ``probes`` section of a search space, read key by key and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cse_autoloss.errors import hint
from cse_autoloss.space import SearchSpace, SpaceError


class ProbeSettings:
    """A space's section; each key is asked for once, with the values that it may have.

    Raises:
        SpaceError: by every method: one line that names the file, the key, and what would be right.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._origin, self._data = space.origin or space.name, space.probes
        self._asked: set[str] = set()

    def number(self, key: str, low: float, high: float) -> float:
        return self._one(key, f"a number from {low:g} to {high:g}", _number(low, high))

    def integer(self, key: str, low: int, high: int) -> int:
        return self._one(key, f"an integer from {low} to {high}", _integer(low, high))

    def numbers(self, key: str, low: float, high: float) -> list[float]:
        return self._many(key, f"numbers from {low:g} to {high:g}", _number(low, high))

    def integers(self, key: str, low: int, high: int) -> list[int]:
        return self._many(key, f"integers from {low} to {high}", _integer(low, high))

    def interval(self, key: str, low: float, high: float) -> tuple[float, float]:
        values = self.numbers(key, low, high)
        if len(values) != 2 or not values[0] < values[1]:
            raise self._error(key, f"expected [lowest, highest], found {values}")
        return values[0], values[1]

    def tolerance(self, name: str) -> float:
        """A share, of those that stand together under ``tolerances``."""
        return self.number(f"tolerances.{name}", 0, 1)

    def check_all_read(self) -> None:
        """Refuse a key that nobody asked for."""
        for key in _keys(self._data):
            if key not in self._asked:
                raise self._error(key, f"unknown key; {hint(key, sorted(self._asked), 'keys')}")

    def _one(self, key: str, right: str, fits: Callable[[Any], bool]) -> Any:
        value = self._get(key, right)
        if not fits(value):
            raise self._error(key, f"expected {right}, found {str(value)[:60]!r}")
        return value

    def _many(self, key: str, right: str, fits: Callable[[Any], bool]) -> Any:
        right = f"a list of one or more {right}"
        values = self._get(key, right)
        if not (isinstance(values, list) and values and all(map(fits, values))):
            raise self._error(key, f"expected {right}, found {str(values)[:60]!r}")
        return values

    def _get(self, key: str, right: str) -> Any:
        self._asked.add(key)
        data: Any = self._data
        for part in key.split("."):
            if not isinstance(data, Mapping) or part not in data:
                raise self._error(key, f"missing; expected {right}")
            data = data[part]
        return data

    def _error(self, key: str, message: str) -> SpaceError:
        return SpaceError(f"{self._origin}: probes.{key}: {message}")


def _keys(data: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted keys of all that is set."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    number = _number(low, high)
    return lambda value: isinstance(value, int) and number(value)
