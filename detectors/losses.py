"""``SearchedLoss`` in mmdet's registry: an expression as the loss of a head; and what a head hands
over to a loss.

loss_cls=dict(type="SearchedLoss", expression="Neg(Dot(Y,Log(Softmax(X))))", space="two_stage_cls",
loss_weight=1.0)

A loss says what it needs: the names in its ``needs``, or else, of a loss that somebody wrote by
hand, the arguments that its ``forward`` has. A head gives that and computes nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mmdet.models import LOSSES
from torch import Tensor, nn

from cse_autoloss.losses import arguments, build_loss, needs

__all__ = ["handing_over", "needs", "wants_pos_ious"]

LOSSES.register_module(name="SearchedLoss", module=build_loss)


def wants_pos_ious(loss: nn.Module) -> bool:
    """Whether the loss has a ``pos_ious`` argument: whether it is one of ours, which takes labels,
    in heads that hand other targets to mmdet's."""
    return "pos_ious" in arguments(type(loss))


@contextlib.contextmanager
def handing_over(loss: nn.Module, **inputs: Callable[[Tensor, Tensor], Any]) -> Iterator[None]:
    """Within, each call of the loss gets what it needs of ``inputs``, each computed from the call's
    prediction and target. An argument that the caller gives goes before, as does what is handed
    over within.

    For heads of mmdet whose methods call their loss in the middle.
    """
    needed = {name: make for name, make in inputs.items() if needs(loss, name)}

    def add(_loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {name: make(*args[:2]) for name, make in needed.items() if name not in kwargs}
        return args, {**kwargs, **given}

    hook = loss.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
