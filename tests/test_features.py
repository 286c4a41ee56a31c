"""Features: what a loss does to predictions, as numbers."""

from dataclasses import replace

import numpy as np
import pytest

from cse_autoloss.screening.features import branch_features, features
from cse_autoloss.screening.predictions import LogitBatch
from cse_autoloss.space import load_space

CLS, REG, ONE = (load_space(name) for name in ("two_stage_cls", "reg", "one_stage_cls"))
CE = "Neg(Dot(Y,Log(Softmax(X))))"
FOCAL = "Neg(Dot(Mul(Y,Mul(Sub(1,Softmax(X)),Sub(1,Softmax(X)))),Log(Softmax(X))))"


def rows(space, *texts, batch=None):
    return branch_features([space.expression(text) for text in texts], space, batch)


@pytest.mark.parametrize(
    ("space", "one", "other"),
    [
        (CLS, CE, f"Add(3,Mul(2,{CE}))"),
        (REG, "LinearIoU", "Div(Sub(U,I),U)"),
        (ONE, "Focal", f"Mul(3,{load_space('one_stage_cls').losses['Focal'].expression})"),
    ],
)
def test_a_loss_written_in_another_way_or_scaled_has_the_same_features(space, one, other):
    first, second = rows(space, one, other)
    assert np.isfinite(first).all() and np.abs(first).max() > 0.1
    assert np.allclose(first, second, atol=1e-5)


def test_close_losses_have_close_features():
    cross_entropy, smoothed, focal, absolute = rows(
        CLS, CE, f"Add({CE},Div(Sub(1,Dot(Y,Softmax(X))),3))", FOCAL, "Sub(1,Dot(Y,Softmax(X)))"
    )
    near, far, farther = (
        np.linalg.norm(cross_entropy - other) for other in (smoothed, focal, absolute)
    )
    assert 0 < near < far < farther


def test_each_loss_is_as_strong_as_any_other_and_a_detectors_own_predictions_can_be_the_batch():
    batch = LogitBatch.draw(np.random.default_rng(5), 40, one_stage=False)
    compressed = rows(CLS, CE, FOCAL, batch=batch).reshape(2, 40, 4)
    assert np.allclose(np.linalg.norm(np.sinh(compressed) / 3, axis=2).mean(1), 1, atol=1e-5)


def test_a_loss_without_a_finite_gradient_has_no_features():
    infinite, constant, sound = rows(CLS, "Dot(Y,Sqrt(Sub(X,X)))", "Dot(Y,Z)", CE)
    assert np.isnan(infinite).all() and np.isnan(constant).all() and np.isfinite(sound).all()


def test_company_changes_nothing():
    alone = rows(CLS, CE)
    assert (rows(CLS, *[FOCAL] * 600, CE)[-1] == alone[0]).all()


def test_a_pair_has_both_branches_and_a_default_branch_that_of_the_first_known_loss():
    pairs = [{"cls": FOCAL, "reg": "Sub(1,Div(I,U))"}, {"cls": FOCAL}, {"reg": "Sub(1,Div(I,U))"}]
    table = features(pairs, {"cls": CLS, "reg": REG})
    d = rows(CLS, FOCAL).shape[1]
    assert (table[0, :d] == rows(CLS, FOCAL)[0]).all()
    assert (table[0, d:] == rows(REG, "Sub(1,Div(I,U))")[0]).all()
    assert (table[1, :d] == table[0, :d]).all() and (table[2, d:] == table[0, d:]).all()
    assert (table[1, d:] == rows(REG, "IoU")[0]).all()
    assert (table[2, :d] == rows(CLS, CE)[0]).all()
    assert features(pairs[:2], {"cls": CLS}).shape == (2, d)
    assert features([], {"cls": CLS, "reg": REG}).shape == (0, table.shape[1])
    unknowing = {"cls": CLS, "reg": replace(REG, losses={})}
    assert not features(pairs[1:2], unknowing)[0, d:].any()
