"""What stands in every exported file about its formula."""

from __future__ import annotations

from cse_autoloss.losses import BoxLoss, build_loss
from cse_autoloss.space import load_space
from cse_autoloss.trial import Found


def notes(found: Found, branch: str) -> list[str]:
    """What somebody should know who trains with a found loss elsewhere: whether its value depends
    on the size of boxes, what it is given, how strong it was when it was measured."""
    space = load_space(found.spaces[branch])
    loss = build_loss(found.losses[branch], space)
    if not isinstance(loss, BoxLoss):
        unit = "free of scale: it sees logits, and no size of boxes"
    elif loss.scale_free:
        unit = (
            "free of scale: boxes in pixels, in shares of the image or in strides are all the same"
        )
    else:
        unit = (
            "not free of scale: boxes in pixels of the images that the detector sees; it has "
            "numbers of squared pixels in it"
        )
    weight, strength = found.loss_weights.get(branch), found.strength.get(branch)
    measured = [f"loss weight {weight:g}"] if weight is not None else []
    if strength is not None:
        measured.append(
            f"a gradient {strength:g} times as strong as the default loss's at the start"
        )
    return [unit, *([f"measured with {' and '.join(measured)}"] if measured else [])]
