"""``SearchedLoss`` in mmdet's registry: an expression as the loss of a head.

loss_cls=dict(type="SearchedLoss", expression="Neg(Dot(Y,Log(Softmax(X))))", space="two_stage_cls",
loss_weight=1.0)
"""

import inspect

from mmdet.models import LOSSES
from torch import nn

from cse_autoloss.losses import build_loss

LOSSES.register_module(name="SearchedLoss", module=build_loss)


def wants_pos_ious(loss: nn.Module) -> bool:
    """Whether the loss has a ``pos_ious`` argument."""
    return "pos_ious" in inspect.signature(loss.forward).parameters
