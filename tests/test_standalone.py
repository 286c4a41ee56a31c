"""An exported loss is one file that runs with PyTorch alone and computes what the engine
computes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from test_losses import KNOWN, batch, expressions, gradient_at_confident_logits

from cse_autoloss import load_space
from cse_autoloss.losses import build_loss
from cse_autoloss.standalone import standalone_module


def load(text: str, folder: Path, name: str = "exported") -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agree(text: str, space: str, folder: Path, weighted: bool = False) -> None:
    """The exported module gives the engine's value and gradient."""
    language = load_space(space)
    exported = load(
        standalone_module(language.expression(text), language, "Found", loss_weight=2.0), folder
    ).Found()
    arguments = batch(space, count=20)
    if weighted:
        arguments["weight"] = torch.rand(20, generator=torch.Generator().manual_seed(1))
    results = []
    for loss in (exported, build_loss(text, space, loss_weight=2.0)):
        leaf = arguments["pred"].clone().requires_grad_()
        value = loss(**{**arguments, "pred": leaf}, avg_factor=7.0)
        value.backward()
        results += [value.detach(), leaf.grad]
    if all(result.isfinite().all() and result.abs().max() < 1e6 for result in results):
        torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            results[1], results[3], rtol=1e-4, atol=1e-5 * max(1.0, results[3].abs().max().item())
        )


@pytest.mark.parametrize("space, name", KNOWN)
def test_an_exported_known_loss_computes_the_same(space: str, name: str, tmp_path: Path) -> None:
    agree(name, space, tmp_path, weighted=True)


@pytest.mark.parametrize(
    "space, text, classes",
    [
        ("two_stage_cls_plus", "Neg(Dot(Mul(Y,F),Log(Softmax(X))))", 4),
        ("one_stage_cls_plus", "Neg(Add(Mul(F,Log(Sig(X))),Mul(NY,Log(Sub(1,Sig(X))))))", 3),
    ],
)
def test_an_exported_loss_has_class_frequencies_of_its_own_or_of_the_call(
    space: str, text: str, classes: int, tmp_path: Path
) -> None:
    language, frequency = load_space(space), [0.5, 2.0, 1.5]
    kind = load(standalone_module(language.expression(text), language, "Found"), tmp_path).Found
    pred = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20) % 4
    expected = build_loss(text, space, class_frequency=frequency)(pred, target)
    owned = kind(class_frequency=frequency)
    torch.testing.assert_close(owned(pred, target), expected)
    torch.testing.assert_close(torch.jit.script(owned)(pred, target), expected)
    called = kind()(pred, target, class_frequency=torch.tensor(frequency))
    torch.testing.assert_close(called, expected)
    assert not owned.state_dict(), "checkpoints of a detector stay loadable"
    with pytest.raises(AssertionError, match=r"^this loss needs class_frequency: \(C,\) objects"):
        kind()(pred, target)
    with pytest.raises(ValueError, match="class_frequency: expected a number for each class"):
        kind(class_frequency=[1.0, 1.0])(pred, target)


@pytest.mark.parametrize("space, name", KNOWN)
def test_an_exported_loss_takes_mmdetections_arguments_in_their_order(
    space: str, name: str, tmp_path: Path
) -> None:
    language = load_space(space)
    exported = load(standalone_module(language.expression(name), language), tmp_path).SearchedLoss()
    arguments, weight = batch(space), torch.rand(40)
    ious = {key: arguments.pop(key) for key in ("pos_ious",) if key in arguments}
    for loss in (build_loss(name, space), exported):
        assert torch.equal(
            loss(*arguments.values(), weight, 7.0, "mean", **ious),
            loss(**arguments, **ious, weight=weight, avg_factor=7.0, reduction_override="mean"),
        )
        with pytest.raises(AssertionError, match="median"):
            loss(**arguments, reduction_override="median")


@pytest.mark.parametrize("space, name", KNOWN)
def test_an_exported_loss_is_scripted_by_torch(space: str, name: str, tmp_path: Path) -> None:
    language = load_space(space)
    exported = load(standalone_module(language.expression(name), language), tmp_path).SearchedLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(exported)
    arguments = batch(space)
    for options in ({}, {"avg_factor": 7.0}, {"avg_factor": torch.tensor(7.0)}):
        torch.testing.assert_close(
            scripted(**arguments, **options), exported(**arguments, **options)
        )


@pytest.mark.parametrize("space, name", [pair for pair in KNOWN if pair[0] != "reg"])
def test_an_exported_loss_is_as_stable_as_the_engines(
    space: str, name: str, tmp_path: Path
) -> None:
    language = load_space(space)
    for stable in (None, True, False):
        text = standalone_module(language.expression(name), language, stable=stable)
        exported = load(text, tmp_path, f"exported_{stable}").SearchedLoss()
        torch.testing.assert_close(
            gradient_at_confident_logits(exported, space),
            gradient_at_confident_logits(build_loss(name, space, stable=stable), space),
        )


@pytest.mark.parametrize("space", ["two_stage_cls", "one_stage_cls", "reg"])
def test_any_exported_expression_computes_the_same(
    space: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("exported")

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(expressions(space))
    def check(text: str) -> None:
        agree(text, space, folder)

    check()


def test_an_exported_loss_imports_nothing_of_ours(tmp_path: Path) -> None:
    space = load_space("one_stage_cls")
    (tmp_path / "found.py").write_text(standalone_module(space.expression("CSE-Autoloss-B"), space))
    code = (
        "import sys, torch, found;"
        "loss = found.SearchedLoss()(torch.zeros(3, 2), torch.tensor([0, 2, 1]), "
        "pos_ious=torch.ones(2));"
        "print(loss.item() > 0, [m for m in sys.modules if m.startswith(('cse_autoloss', 'mmdet', "
        "'mmcv', 'sympy'))])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True []"


def test_a_class_name_must_be_an_identifier() -> None:
    space = load_space("reg")
    with pytest.raises(ValueError, match="class name 'my loss'"):
        standalone_module(space.expression("GIoU"), space, "my loss")
