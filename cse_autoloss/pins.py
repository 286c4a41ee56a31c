"""What a run's numbers depend on, so that a resumed run can tell what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cse_autoloss.config import RESUMABLE, Config
from cse_autoloss.space import load_space
from cse_autoloss.stages import Ladder

Pins = dict[str, str]


def pins(config: Config, checked: Mapping[str, Any], versions: Mapping[str, str]) -> Pins:
    """Name to a digest, or a version.

    Args:
        checked: what ``run.check`` returned: the trainer's digests, and the spaces.
        versions: of the packages.
    """
    data = config.model_dump(mode="json")
    fixed = {key: value for key, value in data.items() if key not in RESUMABLE}
    fixed["stages"] = {stage: data["stages"][stage] for stage in Ladder.of(config.stages).search}
    found = {"configuration": _digest(fixed)}
    for branch, origin in sorted(checked["spaces"].items()):
        space = load_space(origin)
        losses = {name: str(loss.expression) for name, loss in space.losses.items()}
        found[f"{branch} space"] = _digest(
            [space.operators, dict(space.variables), space.constants, losses, dict(space.probes)]
        )
    return {**found, **checked.get("digests", {}), **versions}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, in words."""
    return [
        f"{name} ({before.get(name, 'absent')}, now {now.get(name, 'absent')})"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
