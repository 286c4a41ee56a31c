"""The text form: what parses means what it says and comes back as it was; what does not, is refused
in a line."""

from __future__ import annotations

import functools
import random
import sys

import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_losses import KNOWN, SPACES, expressions

from cse_autoloss import Expression, ExpressionError, load_space
from cse_autoloss.expression import MAX_DEPTH, MAX_SIZE
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.space import SpaceError

SPACE = load_space("two_stage_cls")
FRAGMENTS = st.sampled_from(
    [
        *PRIMITIVES,
        "X",
        "Y",
        "Z",
        "Q",
        "1",
        "3",
        "7",
        "(",
        ")",
        ",",
        " ",
        "\n",
        "__import__('os')",
        "é",
        "\0",
    ]
)


def round_trips_or_is_refused(text: str, space: str) -> None:
    try:
        expression = Expression.parse(text, load_space(space))
    except ExpressionError as error:
        assert 0 < len(str(error)) < 400 and str(error).count("\n") <= 2
        return
    assert str(expression) == "".join(text.split())
    assert Expression.parse(str(expression), load_space(space)) == expression


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=200), st.sampled_from(SPACES))
@example("", "reg")
@example("١", "reg")
@example("X\u2028", "two_stage_cls")
def test_any_text_parses_and_round_trips_or_is_refused(text: str, space: str) -> None:
    round_trips_or_is_refused(text, space)


@settings(max_examples=400, deadline=None)
@given(st.lists(FRAGMENTS, max_size=40).map("".join), st.sampled_from(SPACES))
def test_any_text_made_of_the_languages_parts_parses_or_is_refused(text: str, space: str) -> None:
    round_trips_or_is_refused(text, space)


@settings(max_examples=200, deadline=None)
@given(
    expressions("two_stage_cls"),
    st.integers(0, 10**6),
    st.sampled_from(["", ")", "(", ",", "1", "X", "Neg", "£"]),
)
def test_a_damaged_expression_parses_or_is_refused(text: str, where: int, patch: str) -> None:
    where %= len(text)
    round_trips_or_is_refused(text[:where] + patch + text[where + 1 :], "two_stage_cls")


@settings(max_examples=200, deadline=None)
@given(expressions("one_stage_cls"), st.randoms(use_true_random=False))
def test_whitespace_does_not_count(text: str, rng: random.Random) -> None:
    space = load_space("one_stage_cls")
    spread = "".join(
        letter + rng.choice(["", " ", "\n", "\t"]) if letter in "()," else letter for letter in text
    )
    assert Expression.parse(spread, space) == Expression.parse(text, space)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Neg(Loog(X))", "column 5: unknown operator 'Loog'; did you mean 'Log'?"),
        ("Neg(X", "column 6: the text ends, but Neg of column 1 needs ')'"),
        ("Add(X)", "column 6: expected ',' (and 1 more for Add, opened at column 1), found ')'"),
        ("Neg(X,Y)", "column 6: expected ')' to close Neg of column 1, found ','"),
        ("Neg(X))", "column 7: ')' after the expression has ended"),
        ("Neg X", "column 1: operator Neg needs its arguments in brackets"),
        ("Add(X,7)", "column 7: '7' is no constant of space two_stage_cls (it has 1, 2, 3)"),
        ("Neg(PY)", "column 5: unknown name 'PY'; did you mean 'Y'?"),
        ("", "an empty text is no expression"),
        ("   ", "an empty text is no expression"),
    ],
)
def test_an_error_says_where_and_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression.parse(text, SPACE)
    assert str(caught.value) == message


def test_an_operator_outside_the_space_is_named_as_such() -> None:
    with pytest.raises(ExpressionError, match="operator Dot is not in space reg"):
        Expression.parse("Dot(U,I)", load_space("reg"))


@pytest.mark.parametrize(
    "text",
    [
        "Neg(" * 100_000 + "X" + ")" * 100_000,
        "Neg(" * 100_000,
        "X" * 10**6,
        "(" * 10**6,
        "Neg(" * (MAX_DEPTH + 1) + "X" + ")" * (MAX_DEPTH + 1),
        "Add(X," * 5_000,
    ],
)
def test_what_is_too_large_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression.parse(text, SPACE)
    assert len(str(caught.value)) < 200


def test_the_stated_limits_are_the_limits() -> None:
    deepest = "Neg(" * MAX_DEPTH + "X" + ")" * MAX_DEPTH
    assert Expression.parse(deepest, SPACE).depth == MAX_DEPTH

    def balanced(leaves: int) -> str:
        return (
            "X" if leaves == 1 else f"Add({balanced(leaves // 2)},{balanced(leaves - leaves // 2)})"
        )

    assert Expression.parse(balanced(MAX_SIZE // 2), SPACE).size == MAX_SIZE - 1
    with pytest.raises(ExpressionError, match=f"at most {MAX_SIZE} nodes"):
        Expression.parse(balanced(MAX_SIZE // 2 + 1), SPACE)


def test_nothing_recurses_with_the_depth_of_a_tree() -> None:
    expression = Expression(("Neg",) * 20_000 + ("X",))
    limit = sys.getrecursionlimit()
    assert limit < 20_000 and expression.depth == 20_000 and len(str(expression)) == 5 * 20_000 + 1


@pytest.mark.parametrize("space, name", KNOWN)
def test_known_losses_are_found_by_name_whatever_its_case(space: str, name: str) -> None:
    language = load_space(space)
    assert (
        language.expression(name.upper())
        == language.expression(f" {name} ")
        == language.losses[name].expression
    )


def test_a_name_with_a_slip_is_suggested() -> None:
    with pytest.raises(ExpressionError, match="did you mean 'GIoU'"):
        load_space("reg").expression("GIuO")


def published(name: str) -> sympy.Expr:
    """The formulas as published, in the space's variables: w y is Q (or Z beside Y), 1 - y is
    NY."""
    x, y, z, q, ny, u, i, e = sympy.symbols("X Y Z Q NY U I E", real=True)
    curve = {
        name: functools.partial(PRIMITIVES[name].sympy, sympy) for name in ("Sig", "Serf", "Sgdf")
    }
    softmax, dot = (functools.partial(PRIMITIVES[name].sympy, sympy) for name in ("Softmax", "Dot"))
    return {
        "A cls": -dot((1 + sympy.sin(z)) * y, sympy.log(softmax(x))),
        "A reg": (1 - i / u) + (1 - (i + 2) / e),
        "B cls": -(
            q * (1 + curve["Serf"](curve["Sig"](ny))) * sympy.log(curve["Sig"](x))
            + (curve["Sgdf"](x) - q) * (curve["Sig"](x) - q) * sympy.log(1 - curve["Sig"](x))
        ),
        "B reg": (3 * e * u + 12 * e + 3 * i + 3 * u + 18)
        / (-3 * e * u + i * u + u**2 - 15 * e + 5 * i + 5 * u),
    }[name]


@pytest.mark.parametrize(
    "space, loss", [("two_stage_cls", "A"), ("reg", "A"), ("one_stage_cls", "B"), ("reg", "B")]
)
def test_released_losses_are_the_published_formulas(space: str, loss: str) -> None:
    language = load_space(space)
    formula = language.losses[f"CSE-Autoloss-{loss}"].expression.to_sympy()
    assert sympy.simplify(formula - published(f"{loss} {language.branch}"), doit=False) == 0


@settings(max_examples=60, deadline=None)
@given(expressions("reg"))
def test_latex_is_balanced_and_writes_no_double_signs(text: str) -> None:
    latex = Expression.parse(text, load_space("reg")).to_latex()
    assert latex.count("{") == latex.count("}") and latex.count(r"\left") == latex.count(r"\right")
    assert "+-" not in latex and "--" not in latex


def test_a_spaces_plug_in_brings_an_operator(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_operators.py").write_text(
        "import torch\nfrom cse_autoloss.primitives import Primitive, elementwise, register\n\n\n"
        "def cube(x):\n    return x * x * x\n\n\n"
        "register(Primitive('Cube', 1, lambda xp, x: x * x * x, elementwise(lambda xp, v, x: 3 * x "
        "* x), cube,\n"
        "                   lambda sp, x: x**3, r'\\left(#1\\right)^{3}', (2, 0)))\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbranch: reg\ninputs: boxes\nplugins: [my_operators]\nconstants: "
        "[1]\noperators: [Add, Sub, Div, Cube]\n"
        "variables: {U: union, I: intersection}\nlosses:\n"
        "  - {name: CubedIoU, expression: 'Sub(1,Cube(Div(I,U)))', source: me}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import torch

    from cse_autoloss.losses import build_loss

    try:
        loss = build_loss("CubedIoU", str(tmp_path / "mine.yaml"))
        boxes = torch.tensor([[0.0, 0, 10, 10]])
        assert loss(boxes, torch.tensor([[0.0, 0, 10, 5]])).item() == pytest.approx(0.875)
        space = load_space(str(tmp_path / "mine.yaml"))
        assert str(space.expression("CubedIoU").to_sympy()).replace(" ", "") in (
            "1-I**3/U**3",
            "-I**3/U**3+1",
        )
        with pytest.raises(SpaceError, match="cannot import 'not_there'"):
            (tmp_path / "broken.yaml").write_text(
                (tmp_path / "mine.yaml").read_text().replace("my_operators", "not_there")
            )
            load_space(str(tmp_path / "broken.yaml"))
    finally:
        PRIMITIVES.pop("Cube", None)


def test_a_space_that_builds_on_another_has_all_of_it_and_what_it_adds(tmp_path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(
        "name: more\nbase: reg\noperators: [Square]\nprobes: {steps: 9}\nlosses:\n"
        "  - {name: SquaredIoU, expression: 'Sub(1,Square(Div(I,U)))', source: me}\n"
    )
    more, reg = load_space(str(path)), load_space("reg")
    assert more.operators == (*reg.operators, "Square") and more.variables == reg.variables
    assert more.probes == {**reg.probes, "steps": 9}
    assert [*more.losses] == [*reg.losses, "SquaredIoU"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: regs", "broken.yaml: base: no search space 'regs'"),
        ("base: [reg]", "broken.yaml: base: expected a space's name or path"),
        ("base: broken.yaml", "broken.yaml: base: the file is its own base"),
        ("base: reg\nname: [reg]", "broken.yaml: name: expected a text"),
        ("base: reg\ninputs: {}", "broken.yaml: inputs: expected one of"),
        ("base: reg\noperators: [[Add]]", "broken.yaml: operators: unknown operator"),
        (
            "base: reg\nplugins: [leaves]",
            "broken.yaml: plugins: cannot import 'leaves': SystemExit",
        ),
        (
            "base: reg\nlosses: [{name: IoU, expression: U, source: me}]",
            "broken.yaml: losses: there are two by the name IoU",
        ),
        (
            "base: reg\nlosses: [{name: 1, expression: U, source: me}]",
            "broken.yaml: losses: each needs name, expression and source, all text",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_line(
    tmp_path, monkeypatch, text: str, message: str
) -> None:
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "broken.yaml").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpaceError) as error:
        load_space(str(tmp_path / "broken.yaml"))
    assert message in str(error.value) and "\n" not in str(error.value)
