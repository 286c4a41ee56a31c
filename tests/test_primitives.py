"""Each row of the operator table says one thing in all its forms."""

from __future__ import annotations

import math
from dataclasses import replace

import loss_reference as reference
import numpy as np
import pytest
import sympy
import torch

import cse_autoloss.stable  # noqa: F401 - its rows, too
from cse_autoloss import load_space
from cse_autoloss.operator_check import check_operator
from cse_autoloss.primitives import NUMPY, PRIMITIVES, TORCH, Primitive, elementwise, register

RELEASED = (
    "Neg Exp Log Abs Sqrt Softmax Softplus Sig Sgdf Salf Serf Serfc Tanh Relu Sin Cos Add Sub Mul "
    "Div Dot"
).split()
ROWS = [PRIMITIVES[name] for name in (*reference.OPERATORS, "LogSoftmax", "LogSig")]
IDS = [row.name for row in ROWS]


def arguments(row: Primitive, dtype: type = np.float64) -> list[np.ndarray]:
    """(8, 5) arguments inside the operator's domain."""
    rng = np.random.default_rng(0)
    low = 0.05 if row.name in ("Log", "Sqrt", "Pow") else -4
    args = [rng.uniform(low, 4, (8, 5)).astype(dtype) for _ in range(row.arity)]
    if row.name == "Div":
        args[1] = np.sign(args[1]) * (abs(args[1]) + 0.2)
    return args


def test_the_released_operators_are_in_the_table_and_in_their_spaces() -> None:
    assert set(RELEASED) == set(load_space("two_stage_cls").operators) and len(RELEASED) == 21
    assert set(RELEASED) <= set(reference.OPERATORS) == set(PRIMITIVES) - {"LogSoftmax", "LogSig"}
    assert set(load_space("one_stage_cls").operators) == set(RELEASED) - {"Dot"}
    assert set(load_space("reg").operators) == set(
        "Add Sub Mul Div Neg Abs Exp Log Sqrt Softplus Sig Tanh Relu Sin Cos".split()
    )


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_each_row_says_one_thing_in_all_its_forms(row: Primitive) -> None:
    check_operator(row)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"array": lambda xp, x: x * x * 1.001}, "'array' on numpy arrays is .* torch's graph has"),
        (
            {"tangent": elementwise(lambda xp, v, x: x)},
            "'tangent' by argument 1 on numpy arrays is",
        ),
        ({"adjoint": (lambda xp, v, a, g: g,)}, "'adjoint' of argument 1 on numpy arrays is"),
        ({"torch": lambda x: (x * x).sum()}, r"'torch' makes \(\) of \(16, 5\)"),
        ({"torch": lambda x: x.squares()}, "AttributeError: 'Tensor' object has no attribute"),
        ({"range": lambda x: (0.0, 1.0)}, "bounds 0 to 1 on .* where its values lie from"),
        ({"array": lambda xp, x: x * x + xp.zeros}, "TypeError|AttributeError"),
        ({"array": lambda xp, x: np.float64(1) * x * x}, "makes float64 of float32"),
        ({"torch": lambda x: x * float("nan")}, "nothing is finite for arguments in"),
        ({"latex": "squared"}, "'latex' has no #1"),
        (
            {"array": lambda xp, x: x * xp.max(x), "torch": lambda x: x * x.amax(-1, keepdim=True)},
            "'tangent'|'classwise' is not set",
        ),
    ],
)
def test_a_plug_ins_row_that_contradicts_itself_is_refused_with_the_reason(
    change: dict, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"primitive 'Mine': .*({reason})"):
        register(replace(PRIMITIVES["Square"], **{"name": "Mine", "adjoint": None, **change}))
    assert "Mine" not in PRIMITIVES


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


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.classwise], ids=lambda row: row.name
)
def test_sympy_says_the_same(row: Primitive) -> None:
    symbols = sympy.symbols("a b", real=True)[: row.arity]
    formula = row.sympy(sympy, *symbols).doit()
    for point in zip(*(arg.ravel()[:5] for arg in arguments(row))):
        exact = float(formula.subs(dict(zip(symbols, map(float, point)))).evalf())
        assert row.array(NUMPY, *map(np.float64, point)) == pytest.approx(exact, rel=1e-12)


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
