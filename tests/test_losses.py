"""Losses built from expressions equal the released ones, in value and gradient, and behave as
MMDetection's do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import loss_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cse_autoloss import ExpressionError, load_space
from cse_autoloss.losses import build_loss
from cse_autoloss.stable import stabilized

SPACES = ("two_stage_cls", "one_stage_cls", "reg")
KNOWN = [(space, name) for space in SPACES for name in load_space(space).losses]
CLASSIFICATION = [pair for pair in KNOWN if pair[0] != "reg"]
BOXES = [pair for pair in KNOWN if pair[0] == "reg"]
RELEASED_REG = ["CSE-Autoloss-A", "CSE-Autoloss-B"]
RELEASED_CLS = [("two_stage_cls", "CSE-Autoloss-A"), ("one_stage_cls", "CSE-Autoloss-B")]


def batch(
    space: str, seed: int = 0, count: int = 40, classes: int = 7, spread: float = 3.0
) -> dict[str, Tensor]:
    """Arguments of a loss: predictions, targets and, for classification, IoUs of the positives."""
    generator = torch.Generator().manual_seed(seed)
    if space == "reg":
        corner = torch.rand(count, 2, generator=generator) * 100
        target = torch.cat(
            [corner, corner + 10 + torch.rand(count, 2, generator=generator) * 90], 1
        )
        return {
            "pred": target + torch.randn(count, 4, generator=generator) * spread,
            "target": target,
        }
    columns = classes + (space == "two_stage_cls")
    target = torch.randint(classes + 1, (count,), generator=generator)
    return {
        "pred": torch.randn(count, columns, generator=generator) * spread,
        "target": target,
        "pos_ious": torch.rand(int((target < classes).sum()), generator=generator),
    }


def expected(
    space: str, text: str, pred: Tensor, target: Tensor, pos_ious: Tensor | None = None
) -> Tensor:
    """The reference's loss of each element, in float64, as a graph on ``pred``."""
    if space == "reg":
        released = any(
            str(load_space("reg").losses[name].expression) == text for name in RELEASED_REG
        )
        return reference.boxes(text, pred.double(), target.double(), released)
    return getattr(reference, space.removesuffix("_cls"))(
        text, pred.double(), target, pos_ious.double()
    )


def both(
    loss: torch.nn.Module, space: str, text: str, weight: Tensor | None = None, **arguments: Tensor
) -> tuple[float, float]:
    """Relative differences of the summed loss's value and of its gradient, to the largest in the
    reference."""
    pred = arguments.pop("pred")
    leaf, twin = pred.clone().requires_grad_(), pred.double().requires_grad_()
    value = loss(leaf, weight=weight, reduction_override="sum", **arguments)
    value.backward()
    elements = expected(space, text, twin, **arguments)
    if weight is not None:
        elements = elements * (weight if weight.dim() == elements.dim() else weight[:, None])
    elements.sum().backward()
    return ((value.double() - elements.sum()).abs() / elements.abs().sum()).item(), difference(
        leaf.grad, twin.grad
    )


def difference(found: Tensor, right: Tensor) -> float:
    """The largest absolute difference relative to the largest value."""
    scale = right.abs().max().item()
    return (
        ((found.double() - right).abs().max().item() / scale) if scale else found.abs().max().item()
    )


@pytest.mark.parametrize("space, name", KNOWN)
def test_known_losses_equal_a_float64_evaluation_of_their_formula(space: str, name: str) -> None:
    text = str(load_space(space).losses[name].expression)
    for seed in range(5):
        value, gradient = both(build_loss(name, space), space, text, **batch(space, seed))
        assert value < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("space, name", KNOWN)
def test_each_element_of_the_unreduced_loss_is_the_formulas(space: str, name: str) -> None:
    arguments = batch(space, spread=1.0)
    found = build_loss(name, space)(**arguments, reduction_override="none")
    right = expected(space, str(load_space(space).losses[name].expression), **arguments)
    assert found.shape == right.shape
    assert difference(found, right) < 1e-5


@st.composite
def expressions(draw: st.DrawFn, space: str, depth: int = 4) -> str:
    """Text of a random expression of the space."""
    language = load_space(space)
    leaves = [*language.variables, *map(str, language.constants)]
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(leaves))
    operator = draw(st.sampled_from(language.operators))
    arity = 2 if operator in ("Add", "Sub", "Mul", "Div", "Dot") else 1
    return f"{operator}({','.join(draw(expressions(space, depth - 1)) for _ in range(arity))})"


def check_random_expression(space: str, text: str, seed: int) -> None:
    arguments = batch(space, seed, count=12, classes=4)
    loss = build_loss(text, space)
    exact, single = (
        arguments["pred"].to(dtype, copy=True).requires_grad_()
        for dtype in (torch.float64, torch.float32)
    )
    right = expected(space, text, **{**arguments, "pred": exact})
    (right.sum() + 0 * exact.sum()).backward()
    if not (
        right.abs().max() < 1e30 and exact.grad.isfinite().all() and exact.grad.abs().max() < 1e30
    ):
        return  # more than float32 holds
    if 0 < exact.grad.abs().max() < 1e-15:
        return  # made of numbers that float32 holds only a few bits of
    # The released code computes in float32. Where that, or an input moved by its last bit, leads
    # far from the float64 result, the formula is ill-conditioned at this point, and what the engine
    # owes is an error of that order.
    moved = (
        arguments["pred"].double() * (1 + 1e-7 * torch.sin(1e4 * arguments["pred"].double()))
    ).requires_grad_()
    beside = expected(space, text, **{**arguments, "pred": moved})
    (beside.sum() + 0 * moved.sum()).backward()
    plain = getattr(reference, "boxes" if space == "reg" else space.removesuffix("_cls"))(
        text, single, *[arguments[name] for name in ("target", "pos_ious") if name in arguments]
    )
    (plain.sum() + 0 * single.sum()).backward()
    leaf = arguments.pop("pred").detach().clone().requires_grad_()
    total = loss(leaf, **arguments, reduction_override="sum")
    total.backward()
    if not (plain.isfinite().all() and single.grad.isfinite().all()):
        return
    value = (total.double() - right.sum()).abs().item() / max(right.abs().sum().item(), 1e-30)
    slope = difference(leaf.grad, exact.grad)
    owed = max(
        1e-5,
        *(30 * difference(found, exact.grad) for found in (single.grad, moved.grad)),
        *(30 * difference(found, right) for found in (plain, beside)),
    )
    assert value <= owed, f"value of {text}: {total} for {right.sum()}"
    assert slope <= owed, f"gradient of {text}: off by {slope}, owed {owed}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(expressions("two_stage_cls"), st.integers(0, 9))
def test_any_two_stage_expression_equals_the_reference(text: str, seed: int) -> None:
    check_random_expression("two_stage_cls", text, seed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(expressions("one_stage_cls"), st.integers(0, 9))
def test_any_one_stage_expression_equals_the_reference(text: str, seed: int) -> None:
    check_random_expression("one_stage_cls", text, seed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(expressions("reg"), st.integers(0, 9))
def test_any_box_expression_equals_the_reference(text: str, seed: int) -> None:
    check_random_expression("reg", text, seed)


@pytest.mark.parametrize(
    "text",
    [
        "Dot(Sub(Y,Softmax(X)),Sub(Y,Softmax(X)))",  # every column counts
        "Neg(Add(Mul(Y,Log(Sig(X))),Mul(Sub(1,Y),Log(Sub(1,Sig(X))))))",
        "Serfc(Mul(X,Y))",  # one number in the others
        "Log(Dot(Softmax(Mul(X,Y)),Add(2,Y)))",  # a softmax of one number and the label's
        "Dot(Softmax(Add(Softmax(Mul(2,X)),Y)),Add(Y,Z))",
        "Sub(Mul(Z,Log(Softmax(Sub(X,Y)))),Dot(1,Tanh(X)))",
        "Mul(Y,Log(Softmax(Mul(Y,X))))",
        "Add(Dot(Y,X),Dot(Sig(X),Dot(Y,Serf(X))))",
    ],
)
@pytest.mark.parametrize("stable", [False, True])
def test_two_stage_formulas_in_which_every_class_counts_have_a_kernel(
    text: str, stable: bool
) -> None:
    for seed in range(3):
        arguments = batch("two_stage_cls", seed, spread=1.5)
        loss = build_loss(text, "two_stage_cls", stable=stable)
        assert loss._kernel is not None
        value, gradient = both(loss, "two_stage_cls", text, torch.rand(40), **{**arguments})
        assert value < 1e-5 and gradient < 1e-5


# --- MMDetection's way with weights, reductions and factors ---


def reduced(
    elements: Tensor, weight: Tensor | None, avg_factor: float | None, reduction: str
) -> Tensor:
    """MMDetection's weight_reduce_loss, for comparison."""
    if weight is not None:
        elements = elements * (weight if weight.dim() == elements.dim() else weight[:, None])
    if reduction == "none":
        return elements
    if reduction == "sum":
        return elements.sum()
    return (
        elements.mean()
        if avg_factor is None
        else elements.sum() / (avg_factor + torch.finfo(torch.float32).eps)
    )


@pytest.mark.parametrize("space, name", [*RELEASED_CLS, ("reg", "GIoU")])
@pytest.mark.parametrize(
    "reduction, avg_factor",
    [("mean", None), ("mean", 7.0), ("sum", None), ("none", None), ("none", 7.0)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_weights_and_factors_are_mmdetections(
    space, name, reduction, avg_factor, weighted
) -> None:
    arguments = batch(space, spread=1.0)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(3)) if weighted else None
    leaf, twin = (
        arguments["pred"].clone().requires_grad_(),
        arguments["pred"].double().requires_grad_(),
    )
    found = build_loss(name, space, loss_weight=2.5)(
        **{**arguments, "pred": leaf},
        weight=weight,
        avg_factor=avg_factor,
        reduction_override=reduction,
    )
    elements = expected(
        space, str(load_space(space).losses[name].expression), **{**arguments, "pred": twin}
    )
    right = 2.5 * reduced(elements, weight, avg_factor, reduction)
    assert found.shape == right.shape and difference(found.detach(), right.detach()) < 1e-5
    found.sum().backward()
    right.sum().backward()
    assert difference(leaf.grad, twin.grad) < 1e-5


@pytest.mark.parametrize(("space", "name"), [*RELEASED_CLS, ("reg", "GIoU")])
def test_an_avg_factor_may_be_a_tensor(space: str, name: str) -> None:
    arguments = batch(space)
    loss = build_loss(name, space)
    torch.testing.assert_close(
        loss(**arguments, avg_factor=torch.tensor(7.0)), loss(**arguments, avg_factor=7.0)
    )
    weight = torch.ones(len(arguments["target"]), requires_grad=True)  # takes torch's graph
    for more in ({}, {"weight": weight}):
        of_one = loss(**arguments, **more, avg_factor=torch.tensor([7.0]))
        assert of_one.shape == ()


@pytest.mark.parametrize(
    ("space", "text"), [*RELEASED_CLS, ("two_stage_cls", "Serfc(Mul(X,Y))"), ("reg", "GIoU")]
)
def test_an_avg_factor_in_double_precision_is_a_number_as_any(space: str, text: str) -> None:
    arguments, loss = batch(space), build_loss(text, space)
    arguments["pred"].requires_grad_()
    found, right = (
        loss(**arguments, avg_factor=torch.tensor(7.0, dtype=dtype))
        for dtype in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, arguments["pred"]) for value in (found, right))
    )


def test_a_box_weight_row_counts_as_its_mean() -> None:
    arguments, weight = batch("reg"), torch.rand(40, 4)
    for reduction in ("mean", "none"):
        loss = build_loss("GIoU", "reg", reduction=reduction)
        torch.testing.assert_close(
            loss(**arguments, weight=weight), loss(**arguments, weight=weight.mean(-1))
        )


def test_one_stage_weights_may_be_given_for_each_element() -> None:
    arguments, weight = batch("one_stage_cls"), torch.rand(40, 7)
    loss = build_loss("CSE-Autoloss-B", "one_stage_cls")
    each = loss(**arguments, reduction_override="none") * weight
    for shape in (weight, weight.reshape(-1)):
        torch.testing.assert_close(
            loss(**arguments, weight=shape, avg_factor=5.0), each.sum() / 5.0
        )


@pytest.mark.parametrize("alpha", [0.25, 0.6, None])
def test_alpha_weighs_labels_against_the_rest(alpha: float | None) -> None:
    arguments = batch("one_stage_cls", spread=1.0)
    text = str(load_space("one_stage_cls").losses["Focal"].expression)
    right = reference.one_stage(
        text,
        arguments["pred"].double(),
        arguments["target"],
        arguments["pos_ious"].double(),
        0.5 if alpha is None else alpha,
    ).sum() * (2 if alpha is None else 1)
    found = build_loss("Focal", "one_stage_cls", alpha=alpha)(**arguments, reduction_override="sum")
    assert found.item() == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize("space, name", KNOWN)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_costs_nothing_and_stays_in_the_graph(
    space: str, name: str, reduction: str
) -> None:
    arguments = {key: value[:0] for key, value in batch(space).items()}
    leaf = arguments["pred"].clone().requires_grad_()
    loss = build_loss(name, space)(**{**arguments, "pred": leaf}, reduction_override=reduction)
    assert loss.sum().item() == 0 and loss.requires_grad
    loss.sum().backward()
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("space, name", CLASSIFICATION)
def test_a_batch_without_positives_is_a_batch_of_negatives(space: str, name: str) -> None:
    arguments = batch(space)
    arguments["target"] = torch.full((40,), 7)
    for ious in (torch.zeros(0), None):
        value, gradient = both(
            build_loss(name, space),
            space,
            str(load_space(space).losses[name].expression),
            **{**arguments, "pos_ious": torch.zeros(0)},
        )
        assert value < 1e-5 and gradient < 1e-5
        torch.testing.assert_close(
            build_loss(name, space)(arguments["pred"], arguments["target"], pos_ious=ious),
            build_loss(name, space)(**{**arguments, "pos_ious": torch.zeros(0)}),
        )


@pytest.mark.parametrize("space, name", CLASSIFICATION)
def test_without_ious_each_positive_counts_as_iou_1(space: str, name: str) -> None:
    arguments = batch(space)
    loss = build_loss(name, space)
    torch.testing.assert_close(
        loss(arguments["pred"], arguments["target"]),
        loss(**{**arguments, "pos_ious": torch.ones_like(arguments["pos_ious"])}),
    )
    assert loss.needs_ious == ({"Q", "Z"} & loss.expression.variables != set())


@pytest.mark.parametrize("space, name", BOXES)
def test_a_perfect_box_and_its_ties_have_torchs_gradient(space: str, name: str) -> None:
    target = batch("reg")["target"]
    pred = target.clone()
    pred[::2, 0] -= 3  # the other sides tie
    text = str(load_space(space).losses[name].expression)
    value, gradient = both(build_loss(name, space), space, text, pred=pred, target=target)
    assert value < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("space, name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_computed_in_float32(
    space: str, name: str, dtype: torch.dtype
) -> None:
    arguments = batch(space, spread=1.0)
    low = arguments["pred"].to(dtype)
    results = []
    for pred in (low, low.float()):
        leaf = pred.clone().requires_grad_()
        loss = build_loss(name, space)(**{**arguments, "pred": leaf})
        loss.backward()
        assert loss.dtype == torch.float32 and leaf.grad.dtype == pred.dtype
        results.append((loss.detach(), leaf.grad.to(dtype)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_what_a_loss_adds_to_half_precision_predictions_is_in_float32_too() -> None:
    low = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).half()
    target = torch.arange(40) % 7
    frequency = [0.123456, 1.23456, 2.34567, 0.034567, 0.5, 1.5]
    loss = build_loss("LogitAdjusted", "two_stage_cls_plus", class_frequency=frequency)
    torch.testing.assert_close(loss(low, target), loss(low.float(), target), rtol=1e-6, atol=0)
    constant = build_loss("Detach(Sig(X))", "one_stage_cls_plus")
    large = torch.full((40, 60), 60.0).half()  # float16 has no sum of these
    assert constant(large, target, reduction_override="none").isfinite().all()


# --- what a module of a training has to do ---


@pytest.mark.parametrize("space, name", KNOWN)
def test_a_loss_copies_pickles_and_moves(space: str, name: str) -> None:
    arguments = batch(space)
    loss = build_loss(name, space, loss_weight=3.0)
    saved = io.BytesIO()
    torch.save(loss.state_dict(), saved)
    saved.seek(0)
    loss.load_state_dict(torch.load(saved, weights_only=True))
    # Pickled and read back here alone, as spawn and Ray do with a module that they hand to another
    # process.
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.to("cpu").train()):
        assert torch.equal(other(**arguments), loss(**arguments)) and other.loss_weight == 3.0


@pytest.mark.parametrize("space, name", KNOWN)
def test_a_second_backward_pass_adds_the_same_gradient(space: str, name: str) -> None:
    arguments = batch(space)
    leaf = arguments["pred"].clone().requires_grad_()
    loss = build_loss(name, space)(**{**arguments, "pred": leaf})
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * first)
    (elsewhere,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(elsewhere, first)
    with pytest.raises(RuntimeError):
        loss.backward()


SOME = [*RELEASED_CLS, ("one_stage_cls", "Focal"), ("reg", "GIoU")]


@pytest.mark.parametrize("space, name", SOME)
def test_a_second_derivative_is_that_of_torchs_graph(space: str, name: str) -> None:
    arguments = batch(space)
    found = []
    for reduction in ("sum", "none"):  # the kernel, the graph
        leaf = arguments["pred"].clone().requires_grad_()
        loss = build_loss(name, space)(
            **{**arguments, "pred": leaf}, reduction_override=reduction
        ).sum()
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        slope.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max().item())


@pytest.mark.parametrize("space, name", SOME)
def test_torch_func_differentiates_a_loss(space: str, name: str) -> None:
    arguments = batch(space)
    loss, pred = build_loss(name, space), arguments.pop("pred")
    leaf = pred.clone().requires_grad_()
    loss(leaf, **arguments).backward()
    torch.testing.assert_close(
        torch.func.grad(lambda pred: loss(pred, **arguments))(pred), leaf.grad
    )


@pytest.mark.parametrize("space, name", SOME)
def test_weights_factors_and_target_boxes_have_their_gradients(space: str, name: str) -> None:
    arguments = batch(space, spread=1.0)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(40, generator=generator).requires_grad_()
    factor = torch.tensor(7.0, requires_grad=True)
    wanted = [arguments["pred"].requires_grad_(), weight, factor]
    if space == "reg":
        wanted.append(arguments["target"].requires_grad_())
    loss = build_loss(name, space)
    found = torch.autograd.grad(loss(**arguments, weight=weight, avg_factor=factor), wanted)
    each = loss(**arguments, reduction_override="none").reshape(40, -1).sum(1)
    right = torch.autograd.grad((each * weight).sum() / factor, wanted)
    for one, other in zip(found, right):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space, name", SOME)
def test_weights_and_factors_in_half_precision_count_in_float32(space: str, name: str) -> None:
    arguments = batch(space, spread=1.0)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1)).half()
    factor = torch.tensor(60_000.0).half()
    gradients = []
    for low in (True, False):
        leaf = arguments["pred"].clone().requires_grad_()
        build_loss(name, space)(
            **{**arguments, "pred": leaf},
            weight=weight if low else weight.float(),
            avg_factor=factor if low else factor.float(),
        ).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("space, name", SOME)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_weight_may_stand_in_a_column(space: str, name: str, reduction: str) -> None:
    arguments, weight = batch(space), torch.rand(40)
    loss = build_loss(name, space, reduction=reduction)
    torch.testing.assert_close(
        loss(**arguments, weight=weight[:, None]), loss(**arguments, weight=weight)
    )


@pytest.mark.parametrize("space, name", [pair for pair in SOME if pair[0] != "reg"])
def test_rows_with_a_negative_label_are_ignored(space: str, name: str) -> None:
    arguments = batch(space)
    kept = torch.arange(40) % 3 != 0
    positive = arguments["target"] < 7
    less = {
        "pred": arguments["pred"][kept],
        "target": arguments["target"][kept],
        "pos_ious": arguments["pos_ious"][kept[positive]],
    }
    arguments["target"] = arguments["target"].where(kept, torch.tensor(-100))
    arguments["pos_ious"] = less["pos_ious"]
    loss = build_loss(name, space)
    gradients = []
    for rows in (arguments, less):
        leaf = rows["pred"].clone().requires_grad_()
        value = loss(**{**rows, "pred": leaf}, reduction_override="sum")
        value.backward()
        gradients.append((value.detach(), leaf.grad[kept] if len(leaf) == 40 else leaf.grad))
        assert len(leaf) < 40 or not leaf.grad[~kept].any()
    torch.testing.assert_close(*gradients)
    assert not loss(**arguments, reduction_override="none")[~kept].any()


@pytest.mark.parametrize(
    "space, name",
    [
        *RELEASED_CLS,
        ("two_stage_cls", "Brier"),
        ("one_stage_cls", "MAL"),
        ("reg", "CSE-Autoloss-B"),
        ("reg", "GIoU"),
    ],
)
def test_a_loss_compiles_without_graph_breaks(space: str, name: str) -> None:
    arguments = batch(space)
    loss = build_loss(name, space)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for module in (loss, compiled):
        leaf = arguments["pred"].clone().requires_grad_()
        value = module(**{**arguments, "pred": leaf}, avg_factor=7.0)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_loss_trains_under_ddp(tmp_path) -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 8)
            self.loss_cls = build_loss("CSE-Autoloss-A", "two_stage_cls")

        def forward(self, features: Tensor, target: Tensor, ious: Tensor) -> Tensor:
            return self.loss_cls(self.fc(features), target, pos_ious=ious)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        arguments, head = batch("two_stage_cls"), Head()
        features = torch.randn(40, 5)
        torch.nn.parallel.DistributedDataParallel(head)(
            features, arguments["target"], arguments["pos_ious"]
        ).backward()
        found = head.fc.weight.grad.clone()
        head.zero_grad()
        head(features, arguments["target"], arguments["pos_ious"]).backward()
        torch.testing.assert_close(found, head.fc.weight.grad)
    finally:
        torch.distributed.destroy_process_group()


CONFIDENT = torch.tensor([[60.0, 0, 0], [0, 60, 0], [0, 0, 60]])


def gradient_at_confident_logits(loss: torch.nn.Module, space: str) -> Tensor:
    """By the logit 60 of a wrong class."""
    leaf = CONFIDENT.clone().requires_grad_()
    target = torch.tensor([1, 0, 3 - (space == "two_stage_cls")])
    loss(leaf, target, reduction_override="sum", pos_ious=torch.ones(2)).backward()
    return leaf.grad[0, 0]


@pytest.mark.parametrize(
    "space, name",
    [
        *RELEASED_CLS,
        *(("two_stage_cls", name) for name in ("CrossEntropy", "Focal", "Poly-1")),
        *(("one_stage_cls", name) for name in ("BCE", "Focal", "QualityFocal", "Varifocal")),
    ],
)
def test_losses_but_the_released_keep_a_gradient_for_confident_logits(
    space: str, name: str
) -> None:
    released = load_space(space).losses[name].released
    assert released == name.startswith("CSE-Autoloss")
    assert build_loss(name, space).stable is not released
    slopes = [
        gradient_at_confident_logits(build_loss(name, space, **options), space).abs()
        for options in ({}, {"stable": False}, {"stable": True})
    ]
    assert slopes[0] == slopes[1 if released else 2]
    assert slopes[1] < 0.05 < slopes[2]
    arguments = batch(space, spread=1.0)
    torch.testing.assert_close(
        build_loss(name, space, stable=True)(**arguments),
        build_loss(name, space, stable=False)(**arguments),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["MAL", "Neg(Mul(PY,Mul(Sqrt(Sub(1,Sig(X))),Log(Sig(X)))))"])
def test_a_root_of_a_probability_has_a_gradient_for_logits_of_any_size(name: str) -> None:
    for size in (20.0, 100.0, 1e4):
        logits = torch.tensor([[size, -size], [-size, size]]).requires_grad_()
        build_loss(name, "one_stage_cls")(logits, torch.tensor([0, 2])).backward()
        assert logits.grad.isfinite().all()


def test_a_released_loss_is_known_by_its_formula_however_it_is_written() -> None:
    text = "Neg(Dot(Log(Softmax(X)),Mul(Add(Sin(Z),1),Y)))"
    assert build_loss(text, "two_stage_cls").stable is False


def test_boxes_that_share_an_edge_have_bounded_gradients() -> None:
    target = torch.tensor([[0.0, 0, 10, 10]])
    pred = torch.tensor([[10.0 - 1e-6, 0, 20, 10]])
    slopes = {}
    for stable in (False, True):
        leaf = pred.clone().requires_grad_()
        build_loss("IoU", "reg", stable=stable)(leaf, target).backward()
        slopes[stable] = leaf.grad.abs().max()
    assert slopes[True] < 1 < 1e5 < slopes[False]


def test_boxes_in_any_unit_have_one_iou_loss_and_a_released_loss_warns_of_it() -> None:
    arguments = batch("reg")
    small = {name: boxes / 1000 for name, boxes in arguments.items()}
    for name in ("IoU", "GIoU", "LinearIoU"):
        loss = build_loss(name, "reg")
        torch.testing.assert_close(loss(**small), loss(**arguments), rtol=1e-4, atol=0)
    loss = build_loss("CSE-Autoloss-A", "reg")
    with pytest.warns(UserWarning, match="depends on the size of boxes"):
        loss(**small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(**small)  # said once
        build_loss("CSE-Autoloss-A", "reg")(**arguments)
        build_loss("GIoU", "reg")(**small)


@pytest.mark.parametrize(
    "text, rewritten",
    [
        ("Log(Softmax(X))", "LogSoftmax(X)"),
        ("Log(Sig(Sub(X,1)))", "LogSig(Sub(X,1))"),
        ("Log(Sub(1,Sig(X)))", "LogSig(Neg(X))"),
        ("Log(Add(1,Neg(Sig(X))))", "LogSig(Neg(X))"),
        ("Log(Add(Neg(Sig(Tanh(X))),1))", "LogSig(Neg(Tanh(X)))"),
        ("Log(Add(Neg(Sig(X)),2))", "Log(Add(Neg(Sig(X)),2))"),
        ("Log(Sub(2,Sig(X)))", "Log(Sub(2,Sig(X)))"),
        ("Sqrt(Softmax(X))", "Sqrt(Add(Softmax(X),1e-20))"),
        ("Sqrt(Sub(1,Sig(X)))", "Sqrt(Add(Sub(1,Sig(X)),1e-20))"),
        ("Sqrt(Z)", "Sqrt(Z)"),
    ],
)
def test_stable_takes_logarithms_of_probabilities_at_once_and_no_root_of_0(
    text: str, rewritten: str
) -> None:
    assert str(stabilized(load_space("two_stage_cls").expression(text))) == rewritten


def test_a_formula_that_is_the_logits_detached_leaves_them_as_they_are() -> None:
    loss = build_loss("Add(Mul(NY,Detach(X)),Mul(PY,Neg(Log(Sig(X)))))", "one_stage_cls_plus")
    assert loss._kernel is not None
    logits, labels = torch.randn(4, 3), torch.tensor([0, 3, 1, 3])
    pred, other = (logits.clone().requires_grad_() for _ in range(2))
    by_kernel = loss(pred, labels)
    in_graph = loss(other, labels, torch.ones(4, requires_grad=True))
    by_kernel.backward()
    in_graph.backward()
    assert torch.equal(pred.detach(), logits)
    torch.testing.assert_close(by_kernel, in_graph)
    torch.testing.assert_close(pred.grad, other.grad)


def test_boxes_apart_have_the_graphs_gradient_where_a_slope_is_infinite() -> None:
    loss = build_loss("Add(Sqrt(I),Exp(2))", "reg", stable=False)
    boxes = torch.tensor([[0, 0, 10, 10.0], [0, 0, 10, 10]])
    aims = torch.tensor([[50, 50, 60, 60.0], [2, 2, 12, 12]])
    pred, other = (boxes.clone().requires_grad_() for _ in range(2))
    loss(pred, aims).backward()
    loss(other, aims, torch.ones(2, requires_grad=True)).backward()
    torch.testing.assert_close(pred.grad, other.grad, equal_nan=True)


@pytest.mark.parametrize("name", ["CrossEntropy", "Brier"])
def test_labels_may_be_of_any_integer_type(name: str) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    loss = build_loss(name, "two_stage_cls")
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.parametrize("text", ["Cos(Pow(0.1,X))", "Tanh(Pow(Exp(1),Mul(9999,X)))"])
def test_a_power_may_be_larger_than_any_number_and_is_still_a_loss(text: str) -> None:
    logits, labels = torch.randn(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 3])
    assert build_loss(text, "one_stage_cls_plus")(logits, labels).isfinite()


def test_a_blocked_batch_equals_a_whole_one() -> None:
    """More elements than one block of the one-stage kernel, positives at the blocks' edges."""
    arguments = batch("one_stage_cls", count=1500, classes=60, spread=2.0)
    arguments["target"][[0, 545, 546, 547, 1499]] = torch.tensor([0, 59, 0, 59, 59])
    arguments["pos_ious"] = torch.rand(int((arguments["target"] < 60).sum()))
    text = str(load_space("one_stage_cls").losses["CSE-Autoloss-B"].expression)
    for weight in (None, torch.rand(1500), torch.rand(1500, 60)):
        value, gradient = both(
            build_loss(text, "one_stage_cls"), "one_stage_cls", text, weight, **arguments
        )
        assert value < 1e-5 and gradient < 1e-5


# --- errors ---


def test_what_a_loss_cannot_be_is_said_when_it_is_built() -> None:
    with pytest.raises(ExpressionError, match="did you mean 'Log'"):
        build_loss("Neg(Loog(X))", "two_stage_cls")
    with pytest.raises(TypeError, match="no option 'aplha'; did you mean 'alpha'"):
        build_loss("Focal", "one_stage_cls", aplha=0.3)
    with pytest.raises(
        ValueError, match="reduction: expected one of none, mean, sum, found 'median'"
    ):
        build_loss("Focal", "one_stage_cls", reduction="median")
    with pytest.raises(ValueError, match="use_sigmoid: .* expected True"):
        build_loss("Focal", "one_stage_cls", use_sigmoid=False)
    with pytest.raises(ValueError, match="use_sigmoid: .* expected False"):
        build_loss("CrossEntropy", "two_stage_cls", use_sigmoid=True)
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\] or None, found 3"):
        build_loss("Focal", "one_stage_cls", alpha=3)


def test_arguments_that_do_not_fit_are_named() -> None:
    two, boxes = build_loss("CSE-Autoloss-A", "two_stage_cls"), build_loss("GIoU", "reg")
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])
    with pytest.raises(ValueError, match=r"pos_ious: expected shape \(2,\).*found \(4,\)"):
        two(logits, labels, pos_ious=torch.ones(4))
    with pytest.raises(ValueError, match=r"pred: expected logits of shape \(N, classes\)"):
        two(logits[0], labels)
    with pytest.raises(ValueError, match=r"target: expected labels of shape \(4,\)"):
        two(logits, labels[:2])
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\)"):
        two(logits, labels, weight=torch.ones(4, 3))
    with pytest.raises(ValueError, match="avg_factor cannot be used"):
        two(logits, labels, avg_factor=2.0, reduction_override="sum")
    with pytest.raises(AssertionError, match="reduction_override"):
        two(logits, labels, reduction_override="median")
    with pytest.raises(
        ValueError, match=r"target: expected boxes of shape \(3, 4\), found \(2, 4\)"
    ):
        boxes(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\) .*or \(3, 4\)"):
        boxes(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2))


@pytest.mark.parametrize("text", ["Relu(X)", "Mul(NY,Softplus(X))", "Focal"])
def test_double_precision_logits_have_double_precision_gradients(text):
    logits = torch.randn(
        5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    loss = build_loss(text, "one_stage_cls")(logits, torch.tensor([0, 1, 2, 3, 3]))
    loss.backward()
    assert logits.grad.dtype == loss.dtype == torch.float64
