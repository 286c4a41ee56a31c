"""Real constants in expressions: ``0.25`` where a language has literals.

A literal is a number from 0.001 to 9999 with at most four significant digits. So each has one text,
and one code among a population's tokens: constants are grown, mutated, hashed and evaluated in the
same array calls as everything else. No training could tell a fifth digit.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np

DIGITS = 4
LOWEST, HIGHEST = Fraction(1, 1000), 9999
FIRST_CODE = 256  # codes below are a language's words
_MANTISSAS = 9 * 10 ** (DIGITS - 1)  # 1000 to 9999
_DECADES = 7
CODES = FIRST_CODE + _MANTISSAS * _DECADES  # one more than the largest code


def is_number(name: str) -> bool:
    """Whether a token is a constant or a literal."""
    return name[0].isdigit()


def text_of(number: float | Fraction) -> str | None:
    """The text of a number, rounded to four digits; None if it is out of range."""
    if not LOWEST <= number <= HIGHEST:
        return None
    exact = (
        Decimal(number.numerator) / number.denominator if isinstance(number, Fraction) else number
    )
    rounded = Decimal(f"{exact:.{DIGITS - 1}e}")
    return f"{rounded.normalize():f}" if rounded <= HIGHEST else None


def normal_form(text: str) -> str:
    """The one text of a literal: ``0.250`` is ``0.25``.

    Raises:
        ValueError: with what is right, if it has more digits than a literal has, or is out of
            range.
    """
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text[:40]!r} is no number") from None
    if not LOWEST <= Fraction(number) <= HIGHEST:
        raise ValueError(f"{text[:40]!r} is out of range: {float(LOWEST):g} to {HIGHEST}")
    found = text_of(Fraction(number))
    if found is None or Decimal(found) != number:
        raise ValueError(
            f"{text[:40]!r} has more than {DIGITS} significant digits; nearest is {found or '9999'}"
        )
    return found


def codes_of(numbers: np.ndarray) -> np.ndarray:
    """Codes of numbers, rounded to four digits and moved into the range. Shape (n,)."""
    numbers = np.clip(numbers, float(LOWEST), HIGHEST)
    decade = np.clip(np.floor(np.log10(numbers) + 1e-12) + 3, 0, _DECADES - 1).astype(np.int64)
    mantissa = np.rint(numbers * 10.0 ** (6 - decade)).astype(np.int64)
    over = (mantissa > 9999) & (decade < _DECADES - 1)  # 9.9996 is 10
    decade, mantissa = decade + over, np.where(over, 1000, mantissa)
    return FIRST_CODE + decade * _MANTISSAS + np.clip(mantissa, 1000, 9999) - 1000


def values_of(codes: np.ndarray) -> np.ndarray:
    """The numbers that codes stand for. Shape (n,)."""
    decade, mantissa = np.divmod(np.asarray(codes, np.int64) - FIRST_CODE, _MANTISSAS)
    return (mantissa + 1000) / 10.0 ** (6 - decade)
