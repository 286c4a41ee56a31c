"""Configs of mmdet's kind: read, changed, written; nothing here knows what is in them."""

from __future__ import annotations

import copy
import difflib
import keyword
import pprint
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcv import Config

from cse_autoloss.trial import ConfigError

CONFIGS = Path(__file__).parent / "configs"
_ALMOST = 0.8  # similarity of a misspelt key and the one that is meant, as difflib counts it


def config_text(config: Config) -> str:
    """A config as Python in which every value is written as what it is: text from a data set or a
    path stays text, whatever stands in it.

    Raises:
        ConfigError: for a key that is no name.
    """
    lines = []
    for key, value in config._cfg_dict.to_dict().items():
        if not key.isidentifier():
            raise ConfigError(f"the config's key {key!r} is no Python name")
        lines.append(f"{key} = {pprint.pformat(value, width=100, sort_dicts=False)}\n")
    return "".join(lines)


def config_names() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def read_config(name: str, option: str = "detector.config") -> Config:
    """A config that comes with the package, by name, or any mmdet 2.x config, by path.

    Args:
        option: where the user gave the name; messages begin with it.

    Raises:
        ConfigError: there is no such config, it does not read, it has no model, or it is one of
            MMDetection 3.
    """
    path = CONFIGS / f"{name}.py" if name in config_names() else Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(Path(name).stem, config_names(), n=1)
        right = (
            f"did you mean {near[0]!r}?"
            if near
            else f"names are {', '.join(config_names())}; or give a path"
        )
        raise ConfigError(f"{option}: no config {name!r}; {right}")
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is a program: anything can come out of it
        raise ConfigError(f"{option}: {path} does not read: {reason(error)}") from error
    if is_mmdet3(config):
        raise ConfigError(
            f"{option}: {path} is a config of MMDetection 3, and this is for 2.x; export --target "
            "mmdet3 puts a found loss into it"
        )
    if not isinstance(config.get("model"), dict):
        raise ConfigError(
            f"{option}: {path} has no model; give a config that inherits one (_base_)"
        )
    return config


def reason(error: BaseException) -> str:
    """An exception in one line: its type and message, or those of the one that it came from where
    it has no message of its own."""
    while not str(error) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def change(config: Config, changes: Mapping[str, Any], option: str) -> None:
    """Change a config in place, as mmdet's ``--cfg-options`` does.

    Args:
        changes: dotted key to value.
        option: where the user gave them; messages begin with it.

    Raises:
        ConfigError: one line: a key is none, or leads nowhere; or is new, in a place where nothing
            checks keys, and almost that of a neighbour; or a dict's value is none.
    """
    for path, value in _leaves(changes):
        names = path.split(".")
        if not all(names) or not names[0].isidentifier() or keyword.iskeyword(names[0]):
            raise ConfigError(f"{option}.{path}: is no key; one is such as optimizer.lr")
        before, near, checked = _there(config, path)
        if near and not checked:
            raise ConfigError(f"{option}.{path}: the config has no such key; did you mean {near}?")
        nothing = value is None and path in ("model", "data")  # a part of a model may be None
        if isinstance(before, dict) and (nothing or isinstance(value, (str, bool, int, float))):
            raise ConfigError(
                f"{option}.{path}: should be a dict with keys such as "
                f"{', '.join(list(before)[:3])}, found {value!r}"
            )
    try:
        # mmcv takes each _delete_ out of what it merges
        config.merge_from_dict(copy.deepcopy(dict(changes)))
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{option}: {' '.join(str(error).split())}") from error


def neighbours(config: Config, changes: Mapping[str, Any]) -> list[str]:
    """Dotted keys of a config, those that new ones among the changes are almost."""
    found = (_there(config, path)[1] for path, _ in _leaves(changes))
    return [near for near in found if near]


def _leaves(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that changes set."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value and "_delete_" not in value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _there(config: Config, path: str) -> tuple[Any, str | None, bool]:
    """What a config has at a dotted key; where nothing, the key beside it that it is almost, and
    whether what is built of that part of the config takes no key that it does not know."""
    part: Any = config._cfg_dict
    names = path.split(".")
    for depth, name in enumerate(names):
        if isinstance(part, (list, tuple)) and name.isdigit() and int(name) < len(part):
            part = part[int(name)]
        elif isinstance(part, dict) and name in part:
            part = part[name]
        elif isinstance(part, dict):
            near = difflib.get_close_matches(name, list(part), n=1, cutoff=_ALMOST)
            takes_any = "type" not in part or str(part["type"]).endswith("Sampler")
            return None, ".".join([*names[:depth], near[0]]) if near else None, not takes_any
        else:
            return None, None, True
    return part, None, True


def is_mmdet3(config: Mapping[str, Any]) -> bool:
    """Whether a config is written for MMDetection 3, whose data and training have other keys."""
    model = config.get("model") or {}
    theirs = ("train_dataloader", "optim_wrapper", "param_scheduler", "default_scope")
    return "data_preprocessor" in model or any(key in config for key in theirs)


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """A config's mappings, the outer before the inner."""
    if isinstance(config, dict):
        yield config
    if isinstance(config, (dict, list, tuple)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from parts(value)


def add_import(config: dict[str, Any], module: str) -> None:
    """Let a config import a module, beside what it imports; changed in place."""
    imports = dict(config.get("custom_imports") or dict(allow_failed_imports=False))
    names = imports.get("imports") or []
    names = [names] if isinstance(names, str) else list(names)
    imports["imports"] = list(dict.fromkeys([*names, module]))
    config["custom_imports"] = imports


def scale_learning_rate(config: Config, factor: float) -> None:
    """Multiply the learning rate, and the peak of a schedule that has one; changed in place."""
    config.optimizer.lr *= factor
    if "max_lr" in config.lr_config:
        config.lr_config.max_lr *= factor
