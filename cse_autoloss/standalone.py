"""A loss as one Python file that needs nothing but PyTorch.

The file carries the sources of the functions that it uses: the operator table's
(:mod:`cse_autoloss.primitives`), those from predictions to variables
(:mod:`cse_autoloss.inputs`) and from a formula's values to a loss (:mod:`cse_autoloss.variables`).
There is one definition of everything.
"""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cse_autoloss import inputs, variables
from cse_autoloss.canonical import canonical
from cse_autoloss.expression import Expression
from cse_autoloss.inputs import ALPHA, EXTRAS, Input
from cse_autoloss.literals import is_number
from cse_autoloss.primitives import Primitive
from cse_autoloss.space import SearchSpace
from cse_autoloss.stable import is_released, stabilized

#: How Python writes these functions of torch.
_INFIX = {
    torch.add: "({} + {})",
    torch.sub: "({} - {})",
    torch.mul: "({} * {})",
    torch.neg: "(-{})",
}
_LINE = 100  # a longer statement is cut in two

#: Branch to what its loss's class is called in an exported file.
CLASS_NAMES = {"cls": "ClassificationLoss", "reg": "RegressionLoss"}
_PARTS = {
    "two_stage": variables.two_stage_loss,
    "one_stage": variables.one_stage_loss,
    "boxes": variables.box_loss,
}
#: Extras that a loss of the kind takes whether it needs them or not: its callers hand them over.
_CALLED_WITH = {"two_stage": ("pos_ious",), "one_stage": ("pos_ious",), "boxes": ()}
_CONSTANTS = ("MIN_IOU", "AREA_EPSILON", "IOU_EPSILON")
_OWNED = "class_frequency"  # an extra that is the data's, and which a loss may be made with
_OWN_FREQUENCY = """\
        if class_frequency is not None:
            class_frequency = torch.as_tensor(class_frequency, dtype=torch.float32)
        self.register_buffer("class_frequency", class_frequency, persistent=False)
"""
_ARGUMENTS = {
    "two_stage": "pred: (N, C+1) logits, background last; target: (N,) labels in 0..C, negative "
    "ones are ignored; weight: (N,) or None.",
    "one_stage": "pred: (N, C) logits; target: (N,) labels, 0..C-1 for a class, C for background, "
    "negative ones are ignored; weight: (N,), (N, C) or None.",
    "boxes": "pred, target: (P, 4) boxes x1 y1 x2 y2 in pixels; weight: (P,) or (P, 4) or None.",
}


def standalone_module(
    expression: Expression,
    space: SearchSpace,
    class_name: str = "SearchedLoss",
    loss_weight: float = 1.0,
    alpha: float | None = ALPHA,
    stable: bool | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The source text of a Python file with the loss as a ``torch.nn.Module`` called
    ``class_name``.

    Its ``forward`` is that of :func:`cse_autoloss.losses.build_loss`'s modules, its values are
    theirs, computed in torch's own graph. ``alpha`` and ``stable`` are their options; ``alpha``
    counts for one-stage classification only. ``notes`` are lines of the file's docstring.

    Raises:
        ValueError: if ``class_name`` is no identifier, or an operator's torch function has no
            source that can be carried.
    """
    if not class_name.isidentifier():
        raise ValueError(f"class name {class_name!r}: expected a Python identifier")
    if stable is None:
        stable = not is_released(expression, space)
    computed = stabilized(expression) if stable else expression
    body, functions = _statements(computed, space)
    rows = inputs.needed(space.inputs, computed.variables)
    names = {*inputs.needs(space.inputs, computed.variables), *_CALLED_WITH[space.inputs]}
    needs = [extra for extra in EXTRAS.values() if extra.name in names]
    weigh = _PARTS[space.inputs]
    helpers = {name: None for row in rows for name in _helpers(row.compute)}
    computes = [row.compute for row in rows if row.compute]
    carried: dict[Callable[..., Any], None] = dict.fromkeys(
        [*helpers, *computes, weigh, variables.reduced, *functions]
    )
    one_stage = space.inputs == "one_stage"
    extras = "".join(f"\n        {extra.name}: Tensor | None = None," for extra in needs)
    said = [_ARGUMENTS[space.inputs]]
    for extra in needs:
        where = f"; for all calls, {class_name}({_OWNED}=[...])" if extra.name == _OWNED else ""
        said.append(f"{extra.name}: {extra.meaning}{where}")
    arguments = "\n    ".join(textwrap.fill(line, 90, subsequent_indent="    ") for line in said)
    formula = textwrap.fill(str(canonical(expression, space)), 96, break_long_words=True)
    own_lines = "        self.alpha = alpha\n" if one_stage else ""
    own_arguments = f", alpha={alpha!r}" if one_stage else ""
    if _OWNED in names:
        own_lines += _OWN_FREQUENCY
        own_arguments += f", {_OWNED}=None"
    own_alpha = "self.alpha" if one_stage else "None"
    known = "".join(f"* {note}\n" for note in notes)
    text = f'''\
"""{class_name}: a loss for object detectors that was found by search. Needs PyTorch alone.

{textwrap.indent(formula, "    ")}
{chr(10) + known if known else ""}"""
import math  # noqa: F401

import torch
from torch import Tensor, nn


{chr(10).join(f"{_source(function)}{chr(10)}{chr(10)}" for function in carried)}
class {class_name}(nn.Module):
    """{arguments}
    """

    def __init__(self, loss_weight={loss_weight!r}, reduction="mean"{own_arguments}):
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = reduction
{own_lines}
    def forward(
        self,
        pred,
        target,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,{extras}
    ):
        reduction = self.reduction if reduction_override is None else reduction_override
        if reduction not in ("none", "mean", "sum"):
            raise AssertionError(f"reduction: expected none, mean or sum, found {{reduction}}")
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor cannot be used with reduction="sum"')
{textwrap.indent(chr(10).join([*_variables(rows, space, stable), body]), "        ")}
        loss = {weigh.__name__}(value, pred, target, {own_alpha}, weight)
        return reduced(loss, avg_factor, reduction) * self.loss_weight
'''
    return text


def _variables(rows: tuple[Input, ...], space: SearchSpace, stable: bool) -> Iterator[str]:
    """Statements that set the variables."""
    for boxes in ("pred", "target") if space.inputs == "boxes" else ("pred",):
        yield f"{boxes} = {boxes} if {boxes}.dtype == torch.float64 else {boxes}.float()"
    for row in rows:
        for name in row.takes:
            if name == _OWNED:
                yield f"{name} = self.{name} if {name} is None else {name}"
            if name in EXTRAS and not EXTRAS[name].optional:
                yield f'assert {name} is not None, "this loss needs {name}: {EXTRAS[name].meaning}"'
            if name == _OWNED:
                classes = "pred.shape[1]" + (" - 1" if space.inputs == "two_stage" else "")
                yield f"if {name}.shape[0] != {classes}:"
                yield f'    raise ValueError("{name}: expected a number for each class")'
        arguments = ", ".join(str(stable) if name == "stable" else name for name in row.takes)
        yield f"{row.name} = {f'{row.compute.__name__}({arguments})' if row.compute else arguments}"


def _helpers(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """The functions of the table of inputs that a function of it calls, each after those that it
    calls itself."""
    for name in function.__code__.co_names if function else ():
        called = getattr(inputs, name, None)
        if inspect.isfunction(called) and called.__module__ == inputs.__name__:
            yield from _helpers(called)
            yield called


def _source(function: Callable[..., Any]) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function)).rstrip()
        for name in _CONSTANTS:  # torch.jit.script knows no constants of a module
            source = source.replace(name, repr(getattr(inputs, name)))
    except (OSError, TypeError):
        source = ""
    if not source.startswith("def "):
        raise ValueError(
            f"{function!r} has no source that an exported loss could carry: write it with 'def' "
            "in a file"
        )
    return source


def _statements(expression: Expression, space: SearchSpace) -> tuple[str, list[Callable[..., Any]]]:
    """Python statements that set ``value``, and the functions that they call."""
    like = "pred"
    # How often a subexpression stands in the program, a repeated one's parts counted once
    uses: Counter[tuple[str, ...]] = Counter()
    seen: set[tuple[str, ...]] = set()

    def count(primitive: Primitive, args: list[tuple[str, ...]]) -> tuple[str, ...]:
        program = (primitive.name, *(name for arg in args for name in arg))
        if program not in seen:
            uses.update(args)
            seen.add(program)
        return program

    expression.fold(lambda name: (name,), count)
    lines: list[str] = []
    functions: dict[str, Callable[..., Any]] = {}
    names: dict[str, str] = {}

    def node(
        primitive: Primitive, args: list[tuple[tuple[str, ...], str]]
    ) -> tuple[tuple[str, ...], str]:
        program = (primitive.name, *(name for arg, _ in args for name in arg))
        texts = [text for _, text in args]
        infix = _INFIX.get(primitive.torch)
        # A Python number is fine beside a tensor in infix notation, and nowhere else.
        constants = [is_number(arg[0]) for arg, _ in args]
        if not infix or all(constants):
            texts = [
                _tensor(text, like) if constant else text
                for text, constant in zip(texts, constants)
            ]
        if infix:
            text = infix.format(*texts)
        else:
            text = f"{_call(primitive, functions)}({', '.join(texts)})"
        if uses[program] > 1 or len(text) > _LINE:
            if text not in names:
                names[text] = f"t{len(names) + 1}"
                lines.append(f"{names[text]} = {text}")
            text = names[text]
        return program, text

    program, text = expression.fold(
        lambda name: ((name,), f"{float(name)}" if is_number(name) else name), node
    )
    if is_number(program[0]):
        text = _tensor(text, like)
    if not expression.passes_gradient(space.predicted):
        text += " + 0 * pred.sum()"  # backward() must find a graph
    if text.startswith("(") and text.endswith(")") and _encloses(text):
        text = text[1:-1]
    return "\n".join([*lines, f"value = {text}"]), list(functions.values())


def _tensor(number: str, like: str) -> str:
    """A number as a tensor without axes, in words that ``torch.jit.script`` knows, too."""
    return f"torch.tensor({number}, dtype={like}.dtype, device={like}.device)"


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position == len(text) - 1
    return False


def _call(primitive: Primitive, functions: dict[str, Callable[..., Any]]) -> str:
    """How the file calls an operator: by torch's name, or by that of a function that it carries."""
    function = primitive.torch
    for module, prefix in ((torch, "torch"), (torch.nn.functional, "nn.functional")):
        if getattr(module, function.__name__, None) is function:
            return f"{prefix}.{function.__name__}"
    if functions.setdefault(function.__name__, function) is not function:
        raise ValueError(
            f"operator {primitive.name}: another operator's torch function is called "
            f"{function.__name__}, too"
        )
    return function.__name__
