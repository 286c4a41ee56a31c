"""cse-search show and losses: a loss in every form that people need."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from cse_autoloss import Expression, load_space
from cse_autoloss.canonical import same_loss
from cse_autoloss.cli import language
from cse_autoloss.drawing import sweeps, text_tree
from cse_autoloss.errors import UserError

RELEASED = "Neg(Dot(Mul(Y,Add(1,Sin(Z))),Log(Softmax(X))))"

# Its snippet is the trainer's, whose module imports it.
needs_mmdet = pytest.mark.skipif(find_spec("mmdet") is None, reason="no MMDetection here")


def run(command, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_loss_has_one_text_whichever_way_it_is_named() -> None:
    texts = {
        run(language.show, text, "--format", "text")
        for text in ("CSE-Autoloss-A", "cse-autoloss-a", RELEASED)
    }
    assert len(texts) == 1
    space = load_space("two_stage_cls")
    assert same_loss(
        Expression.parse(texts.pop().strip(), space), Expression.parse(RELEASED, space), space
    )


@pytest.mark.parametrize(
    "form, part",
    [
        ("sympy", "-dot("),
        ("latex", r"\operatorname{dot}"),
        ("torch", "class SearchedLoss(nn.Module)"),
        pytest.param("mmdet", "type='SearchedLoss'", marks=needs_mmdet),
    ],
)
def test_every_format_prints(form: str, part: str) -> None:
    assert part in run(language.show, "CSE-Autoloss-A", "--format", form)


@needs_mmdet
def test_a_config_snippet_is_python_and_builds_the_loss() -> None:
    from cse_autoloss.losses import build_loss

    imports, snippet = run(
        language.show, "CSE-Autoloss-B", "--space", "one_stage_cls", "--format", "mmdet"
    ).split("\n\n")
    assert imports.startswith("custom_imports = dict(imports=['detectors']")
    import ast

    call = ast.parse(snippet).body[0].value
    config = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert config.pop("type") == "SearchedLoss"
    assert build_loss(**config).use_sigmoid is True


@needs_mmdet
@pytest.mark.parametrize(
    ("name", "space", "asked"),
    [
        ("GIoU", "reg", "reg_decoded_bbox=True"),
        ("CSE-Autoloss-A", "two_stage_cls", "IoU-aware head"),
        ("CrossEntropy", "two_stage_cls", None),
    ],
)
def test_a_config_snippet_says_what_its_loss_asks_of_the_head(name, space, asked) -> None:
    snippet = run(language.show, name, "--space", space, "--format", "mmdet")
    assert asked in snippet if asked else "#" not in snippet


def test_json_has_what_a_program_wants() -> None:
    shown = json.loads(run(language.show, RELEASED, "--json"))
    assert (
        shown["name"] == "CSE-Autoloss-A"
        and shown["space"] == "two_stage_cls"
        and shown["size"] == 11
    )
    assert {"text", "sympy", "latex"} <= shown.keys()


def test_all_known_losses_are_listed_with_formula_and_source() -> None:
    listed = json.loads(run(language.losses, "--json"))
    for space in ("two_stage_cls", "one_stage_cls", "reg"):
        assert {loss["name"] for loss in listed if loss["space"] == space} == set(
            load_space(space).losses
        )
        beyond = load_space(f"{space}_plus").losses.keys() - load_space(space).losses.keys()
        assert {loss["name"] for loss in listed if loss["space"] == f"{space}_plus"} == beyond
    assert all(loss["sympy"] and loss["source"] and loss["reference"] for loss in listed)
    assert {loss["name"] for loss in listed if loss["keeps_released_numbers"]} == {
        "CSE-Autoloss-A",
        "CSE-Autoloss-B",
    }
    listed = run(language.losses, "--space", "reg")
    assert "  GIoU: GIoU loss (CVPR 2019)" in listed and "Focal" not in listed
    assert "\n      -I/U + 1 + (E - U)/E\n" in listed, "as published, on one line"


def test_eulers_number_is_no_variable_of_boxes() -> None:
    formula = run(language.show, "Mul(Exp(1),Sub(E,U))", "--space", "reg", "--format", "sympy")
    assert formula == "exp(1)*(E - U)\n"


@pytest.mark.parametrize("space", ["two_stage_cls", "one_stage_cls", "reg"])
def test_a_picture_is_drawn(space: str, tmp_path: Path) -> None:
    name = next(reversed(load_space(space).losses))
    run(language.show, name, "--space", space, "--plot", str(tmp_path / "loss.svg"))
    drawn = (tmp_path / "loss.svg").read_text()
    assert drawn.startswith("<?xml") and len(drawn) > 10_000


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--plot .*loss.xyz"):
        run(language.show, "GIoU", "--space", "reg", "--plot", str(tmp_path / "loss.xyz"))


def test_drawn_slopes_are_those_of_the_drawn_values() -> None:
    for space in map(load_space, ("two_stage_cls", "one_stage_cls", "reg")):
        for way in (way for way in sweeps(space) if way.moved is way.values):
            for loss in space.losses.values():
                values, slopes = way.curve(loss.expression)
                steps = way.values.detach().diff()
                middle = (values[2:] - values[:-2]) / (steps[1:] + steps[:-1])
                error = (middle - slopes[1:-1]).abs()[20:]
                assert error.max() < 0.02 * slopes[20:].abs().max(), (
                    space.name,
                    loss.name,
                    way.title,
                )


@pytest.mark.parametrize(
    "space, weighted, plain",
    [
        ("two_stage_cls", "Neg(Dot(Mul(Y,Z),Log(Softmax(X))))", "Neg(Dot(Y,Log(Softmax(X))))"),
        ("one_stage_cls", "Neg(Mul(Q,Log(Sig(X))))", "Neg(Mul(PY,Log(Sig(X))))"),
    ],
)
def test_a_drawing_by_the_iou_shows_how_much_a_box_asks_of_its_score(
    space: str, weighted: str, plain: str
) -> None:
    by_iou = sweeps(load_space(space))[-1]
    slopes = [
        by_iou.curve(load_space(space).expression(text))[1].numpy() for text in (weighted, plain)
    ]
    assert slopes[0] == pytest.approx(by_iou.values.numpy() * slopes[1]) and slopes[1].max() < -0.4


def test_a_tree_in_text_has_a_line_for_each_node() -> None:
    expression = Expression.parse("Add(1,Neg(Div(I,U)))", load_space("reg"))
    assert text_tree(expression) == "Add\n├─ 1\n└─ Neg\n   └─ Div\n      ├─ I\n      └─ U"


def test_detectors_commands_without_a_detection_library_say_what_is_missing() -> None:
    script = "import sys; sys.modules['mmcv'] = None; from cse_autoloss.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "train"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "train: needs MMDetection, and no module 'mmcv' is installed; 'make" in done.stderr
