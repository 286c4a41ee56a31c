"""What all adapters ask of a loss."""

from typing import Any

from cse_autoloss.inputs import EXTRAS
from cse_autoloss.losses import ExpressionLoss, build_loss
from cse_autoloss.space import load_space


def fitting_loss(
    branch: str, expression: str | None, space: str | None, inputs: str, model: str, **options: Any
) -> ExpressionLoss | None:
    """A loss that an adapter can call, which hands over the IoUs of positives and nothing else.

    Args:
        branch: ``"cls"`` or ``"reg"``.
        expression: its text, or a known loss's name; None: the model keeps its loss.
        space: name or path of its space; None: the usual one of ``inputs``.
        inputs: what the model turns predictions and targets into.
        model: what the model is called in messages.
        **options: those of :func:`cse_autoloss.losses.build_loss`.

    Raises:
        ValueError: the space is of other inputs, or the loss needs more than is handed over.
        ExpressionError, SpaceError: as :func:`cse_autoloss.losses.build_loss`.
    """
    if expression is None:
        return None
    usual = "reg" if inputs == "boxes" else f"{inputs}_cls"
    written_in = load_space(space or usual)
    if written_in.inputs != inputs:
        raise ValueError(
            f"{branch}_space: {written_in.name} is written for {written_in.inputs} inputs; {model} "
            f"needs {inputs}, as {usual} has"
        )
    loss = build_loss(expression, written_in, **options)
    for missing in sorted(loss.needs - {"pos_ious"}):
        raise ValueError(
            f"{branch}: this loss needs {missing}, {EXTRAS[missing].meaning}, which {model} does "
            "not hand over"
        )
    return loss
