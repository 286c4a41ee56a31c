"""What is proved of a loss is true of it everywhere, and the known losses can be proved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cse_autoloss.stable  # noqa: F401 - its rows, too
from cse_autoloss import Expression, load_space
from cse_autoloss.losses import ExpressionLoss, build_loss
from cse_autoloss.primitives import NUMPY, PRIMITIVES
from cse_autoloss.screening import prove
from cse_autoloss.screening.interval_arithmetic import INTERVALS, Interval
from cse_autoloss.screening.properties import FINITE_GRADIENTS, FINITE_VALUES, MONOTONICITY

ELEMENTWISE = [name for name, row in PRIMITIVES.items() if row.adjoint is not None]
TOLERANCE = 0.001
SPAN = torch.linspace(-80, 80, 6401)

# --- intervals ---

ends = st.floats(-120, 120, width=32) | st.sampled_from([0.0, 1.0, -1.0, 88.0, 1e-20, 1e20])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(ELEMENTWISE), st.lists(st.tuples(ends, ends), min_size=2, max_size=2))
def test_an_interval_holds_every_value_and_derivative(name: str, pairs) -> None:
    row = PRIMITIVES[name]
    pairs = [sorted(np.float64(np.float32(end)) for end in pair) for pair in pairs[: row.arity]]
    boxes = [Interval(*pair) for pair in pairs]
    shares = np.linspace(0, 1, 9)
    grid = np.meshgrid(*[low + (high - low) * shares for low, high in pairs])
    for dtype in (np.float64, np.float32):
        # (Rounding to float32 may step over an end by a last place that the interval has.)
        points = [np.clip(axis.astype(dtype), *pair) for axis, pair in zip(grid, pairs)]
        with np.errstate(all="ignore"):
            found = row.array(INTERVALS, *boxes)
            exact = row.array(NUMPY, *points)
            assert_holds(found, exact, f"{name}{pairs}")
            for slope in row.adjoint:
                if slope is not None:
                    bound = slope(INTERVALS, found, boxes, Interval(1.0, 1.0))
                    one = np.ones_like(points[0])
                    assert_holds(bound, slope(NUMPY, exact, points, one), f"slope of {name}{pairs}")


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if PRIMITIVES[name].arity == 1])
def test_nothing_is_promised_of_a_function_of_what_may_be_no_number(name: str) -> None:
    unknown = Interval(-1.0, 1.0) / Interval(-1.0, 1.0)
    assert not PRIMITIVES[name].array(INTERVALS, unknown).finite


def assert_holds(interval: Interval, values: np.ndarray, what: str) -> None:
    if np.isinf(interval.lo):
        return  # promises nothing
    assert np.isfinite(values).all(), what
    assert (interval.lo <= values).all() and (values <= interval.hi).all(), what


# --- proofs ---


def slopes_of(loss: ExpressionLoss, pred: Tensor, target: Tensor, **ious: Tensor) -> Tensor:
    """The gradient by the prediction, once the loss is found finite."""
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, target, reduction_override="sum", **ious)
    value.backward()
    return leaf.grad


def check_one_stage(loss: ExpressionLoss, proved: set[str]) -> None:
    for positive in (True, False):
        target = torch.full((len(SPAN),), 0 if positive else 1)
        for iou in (1.0, 1e-7, 0.3, 0.9) if positive else (1.0,):
            ious = torch.full((len(SPAN) if positive else 0,), iou)
            each = loss(SPAN[:, None], target, pos_ious=ious, reduction_override="none")
            assert FINITE_VALUES not in proved or each.isfinite().all()
            slope = slopes_of(loss, SPAN[:, None], target, pos_ious=ious)[:, 0]
            assert FINITE_GRADIENTS not in proved or slope.isfinite().all()
            if MONOTONICITY in proved and iou == 1:
                slope = slope if positive else -slope
                assert slope.max() <= 1.01 * TOLERANCE * slope.abs().max()


def check_two_stage(loss: ExpressionLoss, proved: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 5):
        spread = torch.rand(4000, 1, generator=generator) * 80
        pred = (torch.rand(4000, classes, generator=generator) * 2 - 1) * spread
        pred[: len(SPAN[::2])] = 0
        pred[: len(SPAN[::2]), 0] = SPAN[::2]
        target = torch.zeros(4000, dtype=torch.long)
        for iou in (1.0, 1e-7, 0.4):
            ious = torch.full((4000,), iou)
            each = loss(pred, target, pos_ious=ious, reduction_override="none")
            assert FINITE_VALUES not in proved or each.isfinite().all()
            slope = slopes_of(loss, pred, target, pos_ious=ious)
            assert FINITE_GRADIENTS not in proved or slope.isfinite().all()
            if MONOTONICITY in proved and iou == 1:
                slope[:, 1:] *= -1
                assert slope.max() <= 1.01 * TOLERANCE * slope.abs().max()


def check_boxes(loss: ExpressionLoss, proved: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(4000, generator=generator)

    side = rand(math.log(2), math.log(1000)).exp()
    size = torch.stack([rand(-1.38, 1.38), rand(-1.38, 1.38)], 1).exp() * side[:, None]
    size[:400] = size[:400, :1]  # of the target's shape
    away = torch.stack([rand(-1, 1), rand(-1, 1)], 1) * (size + side[:, None])
    away[:800] = 0
    target = torch.stack([-side, -side, side, side], 1) / 2
    pred = torch.cat([away - size / 2, away + size / 2], 1)
    each = loss(pred, target, reduction_override="none")
    assert FINITE_VALUES not in proved or each.isfinite().all()
    slope = slopes_of(loss, pred, target)
    assert FINITE_GRADIENTS not in proved or slope.isfinite().all()
    if MONOTONICITY not in proved:
        return
    slid = -(away.sign() * (slope[:, :2] + slope[:, 2:]))  # towards the target in x, in y
    grown = (size < side[:, None]).float() * 2 - 1
    sized = (grown * (slope[:, 2:] - slope[:, :2])).sum(1)[:400]
    scale = side[:, None]
    unit = (slope * scale).abs().max()
    assert (slid * scale).max() <= 0.01 * unit and (sized * side[:400]).max() <= 0.01 * unit


CHECKS = {"one_stage_cls": check_one_stage, "two_stage_cls": check_two_stage, "reg": check_boxes}


def proved(expression: Expression, space: str) -> set[str]:
    findings = prove(expression, load_space(space))
    return {name for name, finding in findings.items() if finding.status == "proved"}


LEAVES = {
    "one_stage_cls": ("X", "Sig(X)", "Q", "PY", "NY", "1", "2"),
    "two_stage_cls": ("X", "Softmax(X)", "Log(Softmax(X))", "Z", "1", "2"),
    "reg": ("U", "I", "E", "Div(I,U)", "Div(U,E)", "1"),
}


@st.composite
def elementwise(draw: st.DrawFn, space: str, depth: int = 3) -> str:
    """Text of a random formula that a proof can follow."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(LEAVES[space]))
    names = [name for name in load_space(space).operators if name in ELEMENTWISE]
    operator = draw(st.sampled_from(names))
    args = [draw(elementwise(space, depth - 1)) for _ in range(PRIMITIVES[operator].arity)]
    return f"{operator}({','.join(args)})"


@pytest.mark.parametrize("space", CHECKS)
def test_whatever_is_proved_is_true_where_it_is_sampled_densely(space: str) -> None:
    language = load_space(space)
    count = 0

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(elementwise(space))
    def check(text: str) -> None:
        nonlocal count
        text = f"Dot(Y,{text})" if space == "two_stage_cls" else text
        expression = Expression.parse(text, language)
        if expression.passes_gradient(language.predicted) and (held := proved(expression, space)):
            count += 1
            CHECKS[space](build_loss(expression, language), held)

    check()
    assert count >= 10


ALL = {FINITE_VALUES, FINITE_GRADIENTS, MONOTONICITY}
UNDECIDED = {  # the Brier score looks at every class; the released formulas repeat their variables
    ("two_stage_cls", "Brier"): set(),
    ("one_stage_cls", "CSE-Autoloss-B"): {FINITE_VALUES, FINITE_GRADIENTS},
    ("reg", "CSE-Autoloss-A"): {FINITE_VALUES, FINITE_GRADIENTS},
    ("reg", "CSE-Autoloss-B"): {FINITE_VALUES, FINITE_GRADIENTS},
}


@pytest.mark.parametrize("space", CHECKS)
def test_known_losses_are_proved(space: str) -> None:
    for name, loss in load_space(space).losses.items():
        held = proved(loss.expression, space)
        assert held >= UNDECIDED.get((space, name), ALL), name
        CHECKS[space](build_loss(name, space), held)


def _fifth(area: str) -> str:
    return f"Mul({area},Mul(Mul({area},{area}),Mul({area},{area})))"


@pytest.mark.parametrize(
    "space, text, property",
    [
        ("one_stage_cls", "Mul(PY,Log(Sig(X)))", MONOTONICITY),
        ("one_stage_cls", "Mul(Sub(NY,PY),Mul(Exp(Mul(X,X)),Exp(Mul(X,X))))", FINITE_VALUES),
        ("one_stage_cls", "Mul(Sub(NY,PY),Sqrt(Sub(1,Tanh(X))))", FINITE_GRADIENTS),
        ("two_stage_cls", "Dot(Y,Log(Softmax(X)))", MONOTONICITY),
        ("two_stage_cls", "Neg(Dot(Y,Sqrt(Sub(1,Softmax(X)))))", FINITE_GRADIENTS),
        ("reg", "Div(I,U)", MONOTONICITY),
        ("reg", "Sqrt(Sub(1,Div(I,U)))", FINITE_GRADIENTS),
        ("reg", "Div(1,Sub(U,I))", FINITE_VALUES),
        # Ratios that are harmless but of powers of areas that float32 cannot hold
        (
            "reg",
            f"Add(Sub(1,Div(I,U)),Div(Sub({_fifth('E')},{_fifth('U')}),{_fifth('E')}))",
            FINITE_VALUES,
        ),
        # ... and a probability as small as only many classes make it
        (
            "two_stage_cls",
            "Mul(Exp(Add(3,Add(3,2))),Dot(Y,Exp(Div(Neg(Log(Softmax(X))),2))))",
            FINITE_VALUES,
        ),
    ],
)
def test_what_is_false_is_not_proved(space: str, text: str, property: str) -> None:
    assert property not in proved(Expression.parse(text, load_space(space)), space)


def test_a_rise_beyond_the_probes_is_refuted_with_where() -> None:
    space = load_space("one_stage_cls")
    # Sound within the probes' logits (-8 to 8); from 14 on the loss of a positive rises.
    far = "Relu(Sub(X,Mul(2,Add(2,Add(2,3)))))"
    text = f"Add(Neg(Mul(PY,Log(Sig(X)))),Add(Mul(NY,Softplus(X)),Mul(PY,{far})))"
    finding = prove(Expression.parse(text, space), space)[MONOTONICITY]
    assert finding.status == "refuted" and finding.counterexample["X"] > 14
