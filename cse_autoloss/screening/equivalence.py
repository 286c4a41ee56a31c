"""Which candidates are one loss: the same formula (a hash), or the same gradients (a
fingerprint)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

from cse_autoloss.expression import Expression
from cse_autoloss.screening.features import gradient_field
from cse_autoloss.screening.predictions import draw_batch
from cse_autoloss.space import SearchSpace


class Seen:
    """A set of 64-bit hashes: an open-addressing table in one array, looked up and filled many at a
    time."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self._bits = max(4, (2 * capacity - 1).bit_length())
        self._table = np.zeros(1 << self._bits, np.uint64)  # 0 is an empty slot
        self._owner = np.empty(1 << self._bits, np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Put hashes in; (n,) bool: which of them were not in yet (of equal ones, the first)."""
        if 2 * (self._count + len(hashes)) > len(self._table):
            kept = self._table[self._table != 0]
            self._allocate(2 * (self._count + len(hashes)))
            self.add(kept)
        hashes = np.maximum(hashes, np.uint64(1))
        fresh = np.zeros(len(hashes), bool)
        waiting, slot = (
            np.arange(len(hashes), dtype=np.int32),
            (hashes >> np.uint64(64 - self._bits)).view(np.int64),
        )
        while len(waiting):
            mine = hashes.take(waiting)
            held = self._table.take(slot)
            free = np.flatnonzero(held == 0)
            claimants, claimed = waiting.take(free), slot.take(free)
            # The last assignment stays: the first claimant gets the slot
            self._owner[claimed[::-1]] = claimants[::-1]
            winners = self._owner.take(claimed)
            fresh[winners] = True
            self._table[claimed] = hashes.take(winners)
            held[free] = self._table.take(claimed)
            further = np.flatnonzero(held != mine)
            waiting, slot = waiting.take(further), (slot.take(further) + 1) & (len(self._table) - 1)
        self._count += int(np.count_nonzero(fresh))
        return fresh

    def to_json(self) -> str:
        """The set as text (base64 of the sorted hashes)."""
        return base64.b64encode(
            np.sort(self._table[self._table != 0]).astype("<u8").tobytes()
        ).decode("ascii")

    @classmethod
    def from_json(cls, text: str) -> Seen:
        """The set that ``to_json`` wrote.

        Raises:
            ValueError: if the text is not such a set.
        """
        data = base64.b64decode(text, validate=True)
        if len(data) % 8:
            raise ValueError("seen candidates: the text was cut short")
        hashes = np.frombuffer(data, "<u8").astype(np.uint64)
        seen = cls(len(hashes))
        seen.add(hashes)
        return seen


#: Unit gradients whose projections agree to this are one direction. Float64 rounding is many orders
#: finer, so that two forms of one loss fall on two sides of a grid line with a probability of
#: about 1e-8; no neighbours need be looked at.
RESOLUTION = 1e-4
_PROJECTIONS = 16
_SAMPLES = 48


def fingerprint(expressions: Sequence[Expression], space: SearchSpace) -> list[str]:
    """The direction of each loss's gradient on a fixed batch of predictions, as 16 hex digits.

    Equal for losses whose gradients differ by a positive factor only (AutoLoss-Zero, CVPR 2022, has
    the idea): a loss plus a constant, times a constant, or written in another way. Gradients are
    computed in float64, projected on fixed random vectors and rounded. A loss without a finite,
    nonzero gradient has a fingerprint of its own.
    """
    batch = draw_batch(space, np.random.default_rng(20210503), _SAMPLES)
    gradient = gradient_field(expressions, space, batch).reshape(
        len(expressions), batch.initial.size
    )
    with np.errstate(all="ignore"):
        gradient /= np.abs(gradient).max(axis=1, keepdims=True)  # a square of it could overflow
        gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
    known = np.isfinite(gradient).all(axis=1)
    projections = np.random.default_rng(38).normal(size=(gradient.shape[1], _PROJECTIONS))
    rounded = np.floor(np.where(known[:, None], gradient, 0) @ projections / RESOLUTION).astype(
        "<i8"
    )
    return [
        hashlib.blake2b(
            row.tobytes() if fine else f"no gradient: {expression}".encode(), digest_size=8
        ).hexdigest()
        for row, fine, expression in zip(rounded, known, expressions)
    ]
