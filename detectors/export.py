"""Found losses as MMDetection configs that train on their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mmcv import Config

from cse_autoloss.notes import notes
from cse_autoloss.space import load_space
from cse_autoloss.text import printable
from cse_autoloss.trial import Found
from detectors import config_data, config_files, configure
from detectors.datasets import DataSet


def searched_losses(
    found: Found, class_frequency: Callable[[], list[float]]
) -> dict[str, dict[str, Any]]:
    """Branch to the config of its found loss.

    Args:
        class_frequency: makes what losses of that need have from the run's data; others do not ask.
    """
    losses = {
        branch: {
            "type": "SearchedLoss",
            "expression": expression,
            "space": found.spaces[branch],
            "loss_weight": found.loss_weights[branch],
        }
        for branch, expression in found.losses.items()
    }
    configure.give_frequencies(losses, class_frequency)
    return losses


def proxy_config(config: Config, data: DataSet, found: Found) -> str:
    """The config that the search trained: found losses, the weights of all losses, learning rate,
    schedule and the weights that its trials started from, as text.

    Args:
        config: the detector's; changed in place.
        data: train, val and test splits are written into the config.
    """
    config.pop("proxy", None)
    configure.set_losses(config.model, searched_losses(found, lambda: data.class_frequency))
    configure.set_loss_weights(config.model, found.loss_weights)
    config_files.scale_learning_rate(config, found.lr_scale)
    config_data.set_data(config, data)
    steps = config.runner.max_iters = found.steps or config.runner.max_iters
    config.evaluation = dict(interval=steps, metric="bbox")
    config.checkpoint_config = dict(interval=steps, by_epoch=False)
    config.load_from = found.prepared
    config.custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
    return header(found) + config_files.config_text(config)


def user_config(config: Config, losses: Mapping[str, Mapping[str, Any]], found: Found) -> str:
    """A user's own config with the found losses in its heads, as text; all else is as it was.

    Args:
        config: the user's; changed in place.
        losses: those of :func:`searched_losses`.

    Raises:
        ConfigError: its heads cannot take the losses; says why.
    """
    configure.set_losses(config.model, losses)
    config_files.add_import(config, "detectors")
    return header(found) + config_files.config_text(config)


def snippet(expression: str, space: str, loss_weight: float) -> str:
    """The lines of a config that use a loss, and what it asks of the head."""
    language = load_space(space)
    sigmoid = ", use_sigmoid=True" if language.inputs == "one_stage" else ""
    needed = configure.needs({"space": space, "expression": expression}) - {"class_frequency"}
    asked = ""
    if language.inputs == "boxes":
        asked = "# in R-CNNs and RetinaNet beside reg_decoded_bbox=True: the loss is on boxes\n"
    elif needed:
        asked = (
            f"# in an IoU-aware head (IoUAware...), which hands over {', '.join(sorted(needed))}\n"
        )
    return (
        f"custom_imports = dict(imports=['detectors'], allow_failed_imports=False)\n\n"
        f"{asked}{configure.LOSS_KEYS[language.branch]}=dict(\n    type='SearchedLoss',\n"
        f"    expression={expression!r},\n"
        f"    space={language.origin!r}{sigmoid}, loss_weight={loss_weight})"
    )


def header(found: Found) -> str:
    """Comment lines that say where the losses come from."""
    lines = [
        "Written by cse-search export. Trains with mmdet's tools/train.py or with: cse-search "
        "train THIS_FILE",
        "",
        *(
            line
            for branch, text in found.losses.items()
            for line in (f"{branch}: {text}", *(f"    {note}" for note in notes(found, branch)))
        ),
        "",
        *(f"{key}: {json.dumps(value)}" for key, value in _flat(found.provenance)),
    ]
    return "".join(f"# {printable(line)}".rstrip() + "\n" for line in lines)


def _flat(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in provenance.items() if value is not None]
