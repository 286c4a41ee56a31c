"""What a run's numbers depend on, so that a resumed run can tell what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cse_autoloss.space import load_space

Pins = dict[str, str]


def pins(checked: Mapping[str, Any], versions: Mapping[str, str]) -> Pins:
    """Name to a digest, or a version. A run's configuration is none of these: the journal has it.

    Args:
        checked: what ``run.check`` returned: the trainer's digests, and the spaces.
        versions: of the packages.
    """
    found = {}
    for branch, origin in sorted(checked["spaces"].items()):
        space = load_space(origin)
        losses = {name: str(loss.expression) for name, loss in space.losses.items()}
        found[f"{branch} space"] = _digest(
            [space.operators, dict(space.variables), space.constants, losses, dict(space.probes)]
        )
    return {**found, **checked.get("digests", {}), **versions}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs of that which is pinned now, in words."""
    return [
        f"{name} ({before.get(name, 'absent')}, now {value})"
        for name, value in now.items()
        if before.get(name) != value
    ]


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
