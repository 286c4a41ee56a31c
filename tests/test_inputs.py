"""The table of inputs: what predictions and targets become, held against the words that say so."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_standalone import load
from torch import Tensor

from cse_autoloss import Expression, load_space
from cse_autoloss.inputs import EXTRAS, INPUTS, needed, needs, variables
from cse_autoloss.losses import build_loss, standalone_module

ONE, TWO, REG = "one_stage_cls_plus", "two_stage_cls_plus", "reg_plus"


def samples(space: str) -> dict[str, Tensor]:
    """Six samples of four classes in two images, with everything that a head can hand over."""
    generator = torch.Generator().manual_seed(0)
    columns = 4 + (space == TWO)
    return {
        "pred": torch.randn(6, columns, generator=generator),
        "target": torch.tensor([1, 4, 3, 4, 0, 4]),
        "pos_ious": torch.tensor([0.5, 0.0, 0.9]),
        "pos_scores": torch.tensor([0.2, 0.4, 1.0]),
        "pos_areas": torch.tensor([0.1, 0.01, 0.001]),
        "roi_ious": torch.tensor([0.6, 0.1, 0.7, 0.0, 0.8, 0.3]),
        "class_frequency": torch.tensor([0.5, 1.0, 2.0, 0.1]),
        "image_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
    }


def boxes(count: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * 200
    target = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 90], 1)
    pred = target + torch.randn(count, 4, generator=generator) * 6
    sizes = torch.tensor([[640.0, 480.0]]).expand(count, 2)
    return {"pred": pred.double(), "target": target.double(), "image_sizes": sizes.double()}


def test_classification_variables_are_what_they_say() -> None:
    for space, kind, quality in ((TWO, "two_stage", "Z"), (ONE, "one_stage", "Q")):
        given = samples(space)
        found = variables(kind, INPUTS[kind], given)
        positive = [0, 2, 4]
        for name, row in found.items():
            assert row.shape == given["pred"].shape, name
        assert found["A"][positive, 0].tolist() == pytest.approx([0.1, 0.01, 0.001])
        assert found["A"][1].tolist() == [1.0] * len(found["A"][1])
        assert found["R"][:, 2].tolist() == pytest.approx([0.6, 0.1, 0.7, 1e-7, 0.8, 0.3])
        assert found["F"][3, :4].tolist() == pytest.approx([0.5, 1.0, 2.0, 0.1])
        label = found[quality][positive, given["target"][positive]]
        assert label.tolist() == pytest.approx([0.5, 1e-7, 0.9])
    assert found["S"].sum(1).tolist() == pytest.approx([0.2, 0, 0.4, 0, 1, 0])
    assert (found["PY"] + found["NY"] == 1).all() and found["PY"].sum() == 3


def test_the_rank_counts_within_the_image_and_lets_no_gradient_through() -> None:
    given = samples(ONE)
    pred = given["pred"].requires_grad_()
    rank = variables("one_stage", ["K"], given)["K"]
    assert not rank.requires_grad
    scores = pred.detach().amax(1)
    for image in (slice(0, 3), slice(3, 6)):
        right = (scores[image].argsort().argsort() + 1) / 3
        torch.testing.assert_close(rank[image, 0], right)


def test_box_variables_are_in_sizes_of_the_target() -> None:
    given = {"pred": [[2.0, 0, 6, 8]], "target": [[0.0, 0, 8, 2]], "image_sizes": [[30.0, 40.0]]}
    given = {name: torch.tensor(numbers) for name, numbers in given.items()}
    found = variables("boxes", INPUTS["boxes"], {**given, "stable": False})
    right = {
        "U": 16 + 32 - 8,
        "I": 8,
        "E": 64,
        "DX": 0,
        "DY": 3 / 4,
        "WP": 4 / 4,
        "HP": 8 / 4,
        "WT": 8 / 4,
        "HT": 2 / 4,
        "EW": 8 / 4,
        "EH": 8 / 4,
        "D": 50 / 4,
        "A": 16 / 1200,
    }
    assert {name: number.item() for name, number in found.items()} == pytest.approx(right)


C2 = "Add(Square(EW),Square(EH))"
RHO2 = "Add(Square(DX),Square(DY))"
V = "Square(Div(Sub(Atan(Div(WT,HT)),Atan(Div(WP,HP))),Mul(2,Atan(1))))"
IOU = "Div(I,U)"
DIOU = f"Add(Sub(1,{IOU}),Div({RHO2},{C2}))"
CIOU = f"Add({DIOU},Mul(Detach(Div({V},Add(Sub(1,{IOU}),{V}))),{V}))"
EIOU = f"Add({DIOU},Add(Square(Div(Sub(WP,WT),EW)),Square(Div(Sub(HP,HT),EH))))"  # the IJCAI one


def published(pred: Tensor, target: Tensor) -> dict[str, Tensor]:
    """DIoU, CIoU and EIoU losses from their papers' formulas."""
    low, high = torch.maximum(pred[:, :2], target[:, :2]), torch.minimum(pred[:, 2:], target[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    (w, h), (wt, ht) = ((b[:, 2:] - b[:, :2]).unbind(1) for b in (pred, target))
    iou = overlap / (w * h + wt * ht - overlap)
    cw, ch = (
        torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    ).unbind(1)
    rho = ((pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) ** 2).sum(1) / 4
    diou = 1 - iou + rho / (cw**2 + ch**2)
    v = 4 / math.pi**2 * (torch.atan(wt / ht) - torch.atan(w / h)) ** 2
    alpha = (v / (1 - iou + v)).detach()
    return {
        "diou": diou,
        "ciou": diou + alpha * v,
        "eiou": diou + (w - wt) ** 2 / cw**2 + (h - ht) ** 2 / ch**2,
    }


@pytest.mark.parametrize("name, text", [("diou", DIOU), ("ciou", CIOU), ("eiou", EIOU)])
def test_published_box_losses_can_be_written(name: str, text: str) -> None:
    given = boxes()
    pred, twin = given["pred"].clone().requires_grad_(), given["pred"].clone().requires_grad_()
    found = build_loss(text, REG)(pred, given["target"], reduction_override="none")
    right = published(twin, given["target"])[name]
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    found.sum().backward()
    right.sum().backward()
    torch.testing.assert_close(pred.grad, twin.grad, rtol=1e-7, atol=1e-9)


LOSSES = [
    (TWO, "Neg(Dot(Mul(Y,Mul(R,Pow(F,Neg(A)))),Mul(K,Log(Softmax(X)))))"),
    (ONE, "Neg(Add(Mul(PY,Mul(Max(A,Q),Log(Sig(X)))),Mul(NY,Mul(F,Mul(K,Log(Sub(1,Sig(X))))))))"),
    (REG, CIOU),
    (REG, "Add(Square(Min(DX,DY)),Atan(Detach(EW)))"),
]


@pytest.mark.parametrize("space, text", LOSSES)
def test_an_exported_loss_takes_what_the_module_takes(
    space: str, text: str, tmp_path: Path
) -> None:
    language = load_space(space)
    given = boxes() if space == REG else samples(space)
    pred, target = given.pop("pred").float(), given.pop("target")
    module = build_loss(text, space)
    extras = {name: given[name] for name in module.needs}
    source = standalone_module(language.expression(text), language)
    exported = load(source, tmp_path).SearchedLoss()
    torch.jit.script(exported)
    one, other = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    module(one, target, **extras).backward()
    exported(other, target, **extras).backward()
    assert one.grad.abs().max() > 0
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)
    assert module._kernel is None, "kernels know the released search's variables alone"


def test_a_loss_says_what_it_needs_and_is_refused_without_it() -> None:
    loss = build_loss("Neg(Dot(Mul(Y,F),Log(Softmax(X))))", TWO)
    assert loss.needs == {"class_frequency"} and not loss.needs_ious
    given = samples(TWO)
    with pytest.raises(
        ValueError, match=r"this loss needs class_frequency, \(C,\) objects of each"
    ):
        loss(given["pred"], given["target"])
    with pytest.raises(ValueError, match=r"class_frequency: expected shape \(4,\), found \(5,\)"):
        loss(given["pred"], given["target"], class_frequency=torch.ones(5))
    with pytest.raises(TypeError, match="unexpected argument 'frequency'; extras are pos_ious"):
        loss(given["pred"], given["target"], frequency=torch.ones(4))
    owned = build_loss("Neg(Dot(Mul(Y,F),Log(Softmax(X))))", TWO, class_frequency=[0.5, 1, 2, 0.1])
    called = loss(given["pred"], given["target"], class_frequency=given["class_frequency"])
    torch.testing.assert_close(owned(given["pred"], given["target"]), called)
    assert build_loss("CSE-Autoloss-A", TWO).needs == {"pos_ious"}
    assert build_loss("GIoU", REG).needs == set()


def test_a_variable_is_computed_with_what_it_takes_and_nothing_else() -> None:
    assert [row.name for row in needed("one_stage", ["NY"])] == ["PY", "NY"]
    assert [row.name for row in needed("boxes", ["I"])] == ["U", "I"]
    assert needs("one_stage", ["NY", "X", "2"]) == set()
    for kind, table in INPUTS.items():
        places = {name: place for place, name in enumerate(table)}
        for row in table.values():
            known = {"pred", "target", "stable", *EXTRAS, *table}
            assert known.issuperset(row.takes), (kind, row.name)
            assert all(places[other] < places[row.name] for other in row.takes if other in table)


def test_variables_come_in_the_order_of_the_table() -> None:
    """A formula's are a set: exported losses would differ from process to process."""
    for kind, table in INPUTS.items():
        for names in (list(table), list(table)[::-1]):
            assert [row.name for row in needed(kind, names)] == list(table)


def test_a_formula_may_be_detached_altogether() -> None:
    given = boxes()
    pred = given["pred"].requires_grad_()
    loss = build_loss("Detach(Sub(1,Div(I,U)))", REG)
    loss(pred, given["target"]).backward()
    assert (pred.grad == 0).all()
    half = build_loss("Sub(Detach(Square(Div(E,U))),Div(I,U))", REG)
    assert half._kernel is not None
    pred.grad = None
    half(pred, given["target"]).backward()
    found, pred.grad = pred.grad, None
    build_loss("Sub(1,Div(I,U))", REG)(pred, given["target"]).backward()
    torch.testing.assert_close(found, pred.grad)
    assert not Expression.parse("Detach(U)", load_space(REG)).passes_gradient({"U"})
