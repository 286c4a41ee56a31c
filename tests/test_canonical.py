"""The canonical form: one name for a loss, the same values, in the same language."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_losses import KNOWN, SPACES, batch, expected, expressions

from cse_autoloss import Expression, load_space
from cse_autoloss.canonical import canonical, known_name, named, same_loss
from cse_autoloss.expression import ExpressionError
from cse_autoloss.losses import build_loss

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg")


@st.composite
def formulas(draw: st.DrawFn, space: str, depth: int = 4) -> str:
    """Random expressions with more arithmetic than :func:`expressions` has."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(expressions(space, min(depth, 2)))
    operator = draw(st.sampled_from(ARITHMETIC))
    arguments = [draw(formulas(space, depth - 1)) for _ in range(1 + (operator != "Neg"))]
    return f"{operator}({','.join(arguments)})"


def check(space: str, text: str) -> None:
    language = load_space(space)
    expression = Expression.parse(text, language)
    form = canonical(expression, language)
    assert Expression.parse(str(form), language) == form, "it is an expression of the space"
    assert canonical(form, language) == form, "it is its own canonical form"
    arguments = batch(space, count=12, classes=4)
    right, found = (expected(space, str(e), **arguments) for e in (expression, form))
    moved = expected(space, text, **{**arguments, "pred": arguments["pred"].double() * (1 + 1e-12)})
    assume(right.isfinite().all() and right.abs().max() < 1e15 and moved.isfinite().all())
    # What cancels out leaves the rounding of what it is made of: e^U - (U + e^U) has no digit of U.
    parts = {Expression(expression.program[expression.subtree(i)]) for i in range(expression.size)}
    largest = max(expected(space, str(part), **arguments).abs().max().item() for part in parts)
    scale = right.abs().max().clamp(min=1e-9).item()
    owed = max(1e-9, 1e4 * (moved - right).abs().max().item() / scale, 1e-13 * largest / scale)
    assume(owed < 1e-3)  # a cosine of 1e20 has no value worth keeping
    assert (found - right).abs().max() <= owed * scale, f"{text} became {form}"


@pytest.mark.parametrize("space", SPACES)
def test_it_keeps_the_values_and_stays_in_the_language(space: str) -> None:
    settings(max_examples=250, deadline=None, derandomize=True)(
        given(formulas(space))(lambda text: check(space, text))
    )()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(formulas("reg"), st.randoms(use_true_random=False))
def test_commuting_arguments_does_not_change_it(text: str, rng) -> None:
    space = load_space("reg")
    expression = Expression.parse(text, space)

    def node(primitive, args):
        if primitive.commutative and rng.random() < 0.5:
            args = args[::-1]
        return f"{primitive.name}({','.join(args)})"

    assert same_loss(expression, Expression.parse(expression.fold(str, node), space), space)


@pytest.mark.parametrize(
    "space, one, other",
    [
        ("reg", "Add(U,Add(I,E))", "Add(Add(E,U),I)"),
        ("reg", "Mul(U,Mul(I,E))", "Mul(Mul(E,U),I)"),
        ("reg", "Sub(1,Div(I,U))", "Add(Neg(Div(I,U)),1)"),
        ("reg", "Neg(Sub(U,I))", "Sub(I,U)"),
        ("reg", "Add(U,U)", "Mul(2,U)"),
        ("reg", "Add(1,Add(2,U))", "Add(U,3)"),
        ("reg", "Sub(U,Sub(I,I))", "U"),
        ("reg", "Div(Mul(3,U),3)", "U"),
        ("reg", "Mul(Sub(1,U),Sub(I,1))", "Neg(Mul(Sub(U,1),Sub(I,1)))"),
        ("reg", "Sqrt(Add(1,3))", "2"),
        (
            "two_stage_cls",
            "Neg(Dot(Mul(Y,Add(1,Sin(Z))),Log(Softmax(X))))",
            "Dot(Mul(Log(Softmax(X)),Add(Sin(Z),1)),Neg(Y))",
        ),
    ],
)
def test_one_loss_has_one_form(space: str, one: str, other: str) -> None:
    language = load_space(space)
    assert same_loss(Expression.parse(one, language), Expression.parse(other, language), language)


@pytest.mark.parametrize(
    "space, one, other",
    [
        ("reg", "Div(U,U)", "1"),  # 0 at 0
        ("reg", "Div(1,Neg(I))", "Neg(Div(1,I))"),  # 1e20 and -1e20 at 0
        ("reg", "Div(Div(1,I),I)", "Div(1,Mul(I,I))"),
        ("two_stage_cls", "Sub(1,Sub(X,X))", "1"),  # a one for each class, and one
        ("reg", "Mul(2,Add(U,I))", "Sub(U,I)"),
    ],
)
def test_losses_that_differ_keep_two_forms(space: str, one: str, other: str) -> None:
    language = load_space(space)
    assert not same_loss(
        Expression.parse(one, language), Expression.parse(other, language), language
    )


@pytest.mark.parametrize("space, name", KNOWN)
def test_a_known_loss_is_recognised_in_its_canonical_form(space: str, name: str) -> None:
    language = load_space(space)
    assert known_name(canonical(language.losses[name].expression, language), language) == name


@pytest.mark.parametrize(
    "space, text",
    [("reg", "Mul(" * 6 + "Div(I,U)" + ",Div(I,U))" * 6), ("reg_plus", "Pow(Square(Div(I,U)),4)")],
)
def test_a_high_power_of_a_ratio_overflows_no_more_than_the_ratio(space: str, text: str) -> None:
    language = load_space(space)
    expression = Expression.parse(text, language)
    pred, target = torch.tensor([[0, 0, 2000, 1500.0]]), torch.tensor([[0, 0, 2000, 1400.0]])
    values = [
        build_loss(form, language)(pred, target)
        for form in (expression, canonical(expression, language))
    ]
    torch.testing.assert_close(values[1], values[0])


def test_losses_that_are_all_known_have_a_name_together() -> None:
    spaces = {"cls": load_space("two_stage_cls"), "reg": load_space("reg")}
    known = {"cls": "Dot(Neg(Y),Log(Softmax(X)))", "reg": "Sub(1,Div(I,U))"}
    assert named(known, spaces) == "CrossEntropy with LinearIoU"
    assert named({**known, "reg": "Sub(2,Div(I,U))"}, spaces) is None and named({}, spaces) is None


def test_a_known_loss_of_another_space_is_said_to_be_that() -> None:
    with pytest.raises(ExpressionError, match="GIoU is no loss of space two_stage_cls; .* reg, "):
        load_space("two_stage_cls").expression("GIoU")


def test_large_numbers_stay_small_expressions() -> None:
    space = load_space("reg")
    power = "U"
    for _ in range(60):
        power = f"Mul(3,{power})"
    form = canonical(Expression.parse(power, space), space)
    assert form.size <= 250
    value = expected("reg", str(form), **batch("reg"))
    torch.testing.assert_close(value, expected("reg", power, **batch("reg")), rtol=1e-12, atol=0)
