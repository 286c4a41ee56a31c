"""Each row of the operator table says one thing in all its forms."""

from __future__ import annotations

import math

import loss_reference as reference
import numpy as np
import pytest
import sympy
import torch

import cse_autoloss.stable  # noqa: F401 - its rows, too
from cse_autoloss import load_space
from cse_autoloss.primitives import NUMPY, PRIMITIVES, TORCH, Primitive, register

ROWS = [PRIMITIVES[name] for name in (*reference.OPERATORS, "LogSoftmax", "LogSig")]
IDS = [row.name for row in ROWS]


def arguments(row: Primitive, dtype: type = np.float64) -> list[np.ndarray]:
    """(8, 5) arguments inside the operator's domain."""
    rng = np.random.default_rng(0)
    low = 0.05 if row.name in ("Log", "Sqrt") else -4
    args = [rng.uniform(low, 4, (8, 5)).astype(dtype) for _ in range(row.arity)]
    if row.name == "Div":
        args[1] = np.sign(args[1]) * (abs(args[1]) + 0.2)
    return args


def test_the_released_operators_are_in_the_table_and_in_their_spaces() -> None:
    assert (
        set(reference.OPERATORS) == set(load_space("two_stage_cls").operators)
        and len(reference.OPERATORS) == 21
    )
    assert set(load_space("one_stage_cls").operators) == set(reference.OPERATORS) - {"Dot"}
    assert set(load_space("reg").operators) == set(
        "Add Sub Mul Div Neg Abs Exp Log Sqrt Softplus Sig Tanh Relu Sin Cos".split()
    )


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in reference.OPERATORS], ids=lambda row: row.name
)
@pytest.mark.parametrize("form", ["numpy", "torch arrays", "torch graph"])
def test_every_form_has_the_released_value(row: Primitive, form: str) -> None:
    args = arguments(row)
    tensors = [torch.tensor(arg) for arg in args]
    found = {
        "numpy": lambda: row.array(NUMPY, *args),
        "torch arrays": lambda: row.array(TORCH, *tensors).numpy(),
        "torch graph": lambda: row.torch(*tensors).numpy(),
    }[form]()
    np.testing.assert_allclose(found, reference.OPERATORS[row.name](*tensors).numpy(), rtol=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("library", [NUMPY, TORCH], ids=["numpy", "torch"])
def test_the_tangent_is_the_directional_derivative(row: Primitive, library) -> None:
    args, directions = (
        arguments(row),
        [np.random.default_rng(1).normal(size=(8, 5)) for _ in range(row.arity)],
    )
    _, right = torch.func.jvp(
        row.torch, tuple(map(torch.tensor, args)), tuple(map(torch.tensor, directions))
    )
    convert = torch.tensor if library is TORCH else np.asarray
    args, directions = [convert(a) for a in args], [convert(d) for d in directions]
    found = row.tangent(library, row.array(library, *args), args, directions)
    np.testing.assert_allclose(np.asarray(found), right.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", [row for row in ROWS if row.adjoint], ids=lambda row: row.name)
def test_the_adjoint_is_the_gradient(row: Primitive) -> None:
    leaves = [torch.tensor(arg, requires_grad=True) for arg in arguments(row)]
    weights = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = torch.autograd.grad(row.torch(*leaves), leaves, weights)
    args = [leaf.detach() for leaf in leaves]
    for adjoint, gradient in zip(row.adjoint, right, strict=True):
        found = adjoint(TORCH, row.array(TORCH, *args), args, weights)
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.classwise], ids=lambda row: row.name
)
def test_sympy_says_the_same(row: Primitive) -> None:
    symbols = sympy.symbols("a b", real=True)[: row.arity]
    formula = row.sympy(sympy, *symbols).doit()
    for point in zip(*(arg.ravel()[:5] for arg in arguments(row))):
        exact = float(formula.subs(dict(zip(symbols, map(float, point)))).evalf())
        assert row.array(NUMPY, *map(np.float64, point)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.classwise], ids=lambda row: row.name
)
def test_values_lie_within_the_bounds(row: Primitive) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        intervals = [tuple(sorted(rng.uniform(-3, 3, 2))) for _ in range(row.arity)]
        low, high = row.bounds(*intervals)
        with np.errstate(all="ignore"):
            values = row.array(NUMPY, *(rng.uniform(*interval, 200) for interval in intervals))
        if math.isfinite(low):
            assert low - 1e-9 <= values.min() and values.max() <= high + 1e-9


@pytest.mark.parametrize("name", ["Sig", "Sgdf", "Salf", "Serf"])
def test_s_curves_have_slope_a_quarter_at_0(name: str) -> None:
    zero = np.zeros(1)
    row = PRIMITIVES[name]
    assert row.array(NUMPY, zero) == 0.5
    assert row.tangent(NUMPY, row.array(NUMPY, zero), [zero], [np.ones(1)]) == pytest.approx(
        0.25, rel=1e-12
    )


def test_a_sigmoid_keeps_its_small_values() -> None:
    with np.errstate(over="ignore"):
        small = PRIMITIVES["Sig"].array(NUMPY, np.float32([-20, -80, -200]))
    assert small[0] == pytest.approx(math.exp(-20), rel=1e-6) and small[1] > 0 and small[2] == 0


def test_a_row_that_cannot_be_is_refused() -> None:
    row = PRIMITIVES["Neg"]
    with pytest.raises(ValueError, match="'Neg' is registered already"):
        register(Primitive("Neg", 1, row.array, row.tangent, row.torch, row.sympy, "-#1", (0, 1)))
    with pytest.raises(ValueError, match="must be an ASCII identifier"):
        register(Primitive("N g", 1, row.array, row.tangent, row.torch, row.sympy, "-#1", (0, 1)))
    with pytest.raises(ValueError, match="arity must be 1 or 2"):
        register(Primitive("Three", 3, row.array, row.tangent, row.torch, row.sympy, "-#1", (0, 1)))
