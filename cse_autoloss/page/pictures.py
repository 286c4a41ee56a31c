"""What the page draws of losses: formulas as MathML, curves as numbers, examples of what fell."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sympy.printing.mathml import mathml

from cse_autoloss.drawing import sweeps
from cse_autoloss.errors import UserError
from cse_autoloss.expression import Expression
from cse_autoloss.screening import Screener
from cse_autoloss.screening.screener import Trace
from cse_autoloss.space import SearchSpace
from cse_autoloss.variation import grow

POINTS = 61  # of a curve
EXAMPLES = 2_000  # random expressions that examples are taken from
LONGEST = 48  # characters of an example's expression
LARGEST = 40  # nodes of an expression that is written as a formula; a larger one stands as text


def formula(expression: Expression) -> str | None:
    """Presentation MathML, or None for an expression that is too large to be read as a formula."""
    if expression.size > LARGEST:
        return None
    body = mathml(expression.to_sympy(simplify=False), printer="presentation")
    return f'<math display="block">{body.replace("<mi>sigma</mi>", "<mi>σ</mi>")}</math>'


def curves(space: SearchSpace, losses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Values and slopes of losses and of the space's known ones along each of the space's sweeps.

    Each curve is scaled to a mean absolute slope of 1, as losses are compared: at equal strength.
    """
    drawn = {label: space.expression(text) for label, text in losses.items()}
    known = {name: loss.expression for name, loss in space.losses.items()}
    entries = [(label, expression, False) for label, expression in drawn.items()]
    entries += [
        (name, expression, True)
        for name, expression in known.items()
        if expression not in drawn.values()
    ]
    result = []
    for sweep in sweeps(space):
        places = np.linspace(0, len(sweep.values) - 1, POINTS).round().astype(int)
        lines = []
        for label, expression, is_known in entries:
            try:
                value, slope = (curve.numpy()[places] for curve in sweep.curve(expression))
            except (UserError, ValueError, RuntimeError):
                continue  # a loss that needs what the sweep does not have
            strength = float(np.abs(slope).mean()) or 1.0
            if not np.isfinite([*value, *slope]).all():
                continue
            lines.append(
                {
                    "label": label,
                    "known": is_known,
                    "value": _rounded((value - value.min()) / strength),
                    "slope": _rounded(slope / strength),
                }
            )
        axis = sweep.values.detach().to(torch.float64).numpy()[places]
        result.append(
            {
                "title": sweep.title,
                "label": sweep.label,
                "slope": sweep.slope,
                "x": _rounded(axis),
                "lines": lines,
            }
        )
    return result


@functools.lru_cache(maxsize=16)  # a page that is watched is made every few seconds
def examples(space: SearchSpace, count: int, seed: int) -> list[dict[str, Any]]:
    """For each property an expression that misses it, with its counterexample, short ones first.

    They are drawn anew from the space at random, as a round's fresh expressions are.
    """
    rng = np.random.default_rng(seed)
    population = grow(rng, min(count, EXAMPLES), space)
    screener = Screener(space)
    shortest: dict[str, str] = {}
    missed: dict[str, int] = {}
    for text, fate in screener.screen(population).fates():
        missed[fate] = missed.get(fate, 0) + 1
        if len(text) <= LONGEST and len(text) < len(shortest.get(fate, " " * 99)):
            shortest[fate] = text
    total = sum(missed.values())
    result = []
    for fate, text in shortest.items():
        verdict = screener.verify(space.expression(text))
        result.append(
            {
                "property": fate,
                "share": missed[fate] / total,
                "text": text,
                "detail": verdict.detail,
                "curve": _trace(verdict.counterexample),
            }
        )
    return sorted(result, key=lambda row: -row["share"])


def _trace(trace: Trace | None) -> dict[str, Any] | None:
    if trace is None or not np.isfinite(trace.values).all():
        return None
    x, y = (_rounded(np.array(values)) for values in (trace.positions, trace.values))
    return {"x": x, "y": y, "at": trace.at}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
