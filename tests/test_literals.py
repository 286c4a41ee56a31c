"""Real constants: one text, one code and one value each, in every form of an expression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cse_autoloss import Expression, ExpressionError, literals, load_space, verify
from cse_autoloss.canonical import canonical, known_name, same_loss
from cse_autoloss.losses import build_loss
from cse_autoloss.screening import DUPLICATE, Screener
from cse_autoloss.variation import Population, grow, mutate

REG = load_space("reg_plus")
codes = st.integers(literals.FIRST_CODE, literals.CODES - 1)


@settings(max_examples=300, deadline=None)
@given(codes)
def test_a_literal_is_one_text_one_code_and_one_value(code: int) -> None:
    text = REG.token(code)
    assert literals.normal_form(text) == text
    value = float(literals.values_of(np.array(code)))
    assert float(text) == pytest.approx(value, rel=1e-12)
    if text not in REG.codes:  # 1, 2 and their like are words of the space
        assert REG.code(text) == code
    assert Expression.parse(f"Mul({text},U)", REG).program == ("Mul", text, "U")


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 9999))
def test_a_number_becomes_the_nearest_literal(number: float) -> None:
    code = int(literals.codes_of(np.array(number)))
    assert float(literals.values_of(np.array(code))) == pytest.approx(number, rel=5.01e-4)
    assert float(literals.text_of(number)) == pytest.approx(number, rel=5.01e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0.12345", "column 5: '0.12345' has more than 4 significant digits; nearest is 0.1234"),
        ("0.0001", "column 5: '0.0001' is out of range: 0.001 to 9999"),
        ("10000", "column 5: '10000' is out of range"),
        ("0", "column 5: '0' is out of range"),
        ("1e5", "column 6: expected"),
    ],
)
def test_what_is_no_literal_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as error:
        Expression.parse(f"Mul({text},U)", REG)
    assert message in str(error.value)


def test_the_spaces_of_the_paper_have_none() -> None:
    with pytest.raises(ExpressionError, match="'0.5' is no constant of space reg"):
        Expression.parse("Mul(0.5,U)", load_space("reg"))


def test_texts_of_one_number_are_one_expression() -> None:
    one, other = (Expression.parse(f"Pow(Div(I,U),{n})", REG) for n in ("0.250", "0.25"))
    assert one == other and str(one) == "Pow(Div(I,U),0.25)"
    assert Expression.parse("Mul(2.0,U)", REG) == Expression.parse("Mul(2,U)", REG)


def test_every_form_says_the_same() -> None:
    text = "Sub(1,Pow(Div(I,Add(U,Mul(0.125,Sub(E,U)))),0.7))"
    expression = Expression.parse(text, REG)
    assert verify(expression, REG).accepted
    pred = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0, 10, 5]], dtype=torch.float64)
    value = build_loss(text, REG)(pred, target).item()
    assert value == pytest.approx(1 - (50 / 100) ** 0.7, rel=1e-6)
    formula = expression.to_sympy()
    areas = {symbol: 50 if symbol.name == "I" else 100 for symbol in formula.free_symbols}
    assert float(formula.subs(areas)) == pytest.approx(value, rel=1e-6)
    assert "0.125" in expression.to_latex() and "0.7" in expression.to_latex()


@pytest.mark.parametrize(
    "one, other",
    [
        ("Mul(0.5,Mul(0.5,U))", "Mul(0.25,U)"),
        ("Div(U,2)", "Mul(0.5,U)"),
        ("Add(0.5,Sub(U,0.25))", "Add(U,0.25)"),
        ("Mul(U,U)", "Square(U)"),
        ("Pow(U,3)", "Mul(U,Square(U))"),
        ("Detach(WT)", "WT"),
    ],
)
def test_the_canonical_form_computes_with_them(one: str, other: str) -> None:
    first, second = (Expression.parse(text, REG) for text in (one, other))
    assert same_loss(first, second, REG)
    form = canonical(first, REG)
    assert canonical(form, REG) == form and Expression.parse(str(form), REG) == form


def test_a_known_loss_is_known_in_the_larger_space() -> None:
    giou = load_space("reg").losses["GIoU"].expression
    assert known_name(canonical(giou, REG), REG) == "GIoU"


def test_a_population_carries_them_and_screening_tells_them_apart() -> None:
    texts = [f"Mul({n},Sub(1,Div(I,U)))" for n in ("0.25", "0.251", "2", "2.5", "0.25")]
    expressions = [Expression.parse(text, REG) for text in texts]
    population = Population.from_expressions(expressions, REG)
    assert population.expressions() == expressions
    report = Screener(REG).screen(population)
    assert (report.codes == DUPLICATE).tolist() == [False] * 4 + [True]
    assert [str(e) for e in report.survivors] == texts[:4]


def test_mutation_scales_them() -> None:
    rng = np.random.default_rng(0)
    parent = Expression.parse("Pow(Sub(1,Div(I,U)),1.5)", REG)
    population = Population.from_expressions([parent] * 4000, REG)
    children = {e.program for e in mutate(rng, population, REG).expressions()}
    scaled = [p[-1] for p in children if p[:-1] == parent.program[:-1] and p[-1] != "1.5"]
    near = [float(number) for number in scaled if literals.is_number(number)]
    assert len(near) > 100 and 1.3 < np.median(near) < 1.7
    for expression in mutate(rng, grow(rng, 500, REG), REG).expressions():
        assert Expression.parse(str(expression), REG) == expression


def test_constants_can_be_read_and_replaced() -> None:
    expression = Expression.parse("Add(Mul(0.5,Sub(1,Div(I,U))),Pow(Div(E,U),2))", REG)
    assert expression.constants == (0.5, 1, 2)
    fitted = expression.with_constants([0.61803, 1, 1.75], REG)
    assert str(fitted) == "Add(Mul(0.618,Sub(1,Div(I,U))),Pow(Div(E,U),1.75))"
    with pytest.raises(ExpressionError, match="0 is no literal"):
        expression.with_constants([0, 1, 2], REG)
    with pytest.raises(ValueError, match="2 values for 3 constants"):
        expression.with_constants([1, 2], REG)
    with pytest.raises(ExpressionError, match="space reg has no real constants"):
        expression.with_constants([1, 2, 3], load_space("reg"))
