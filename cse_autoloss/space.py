"""SearchSpace: what may be searched, read from YAML.

A space is a name ("reg") or a path to a YAML file of the same form as those in ``search_spaces/``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import search_spaces
from cse_autoloss.errors import UserError, hint
from cse_autoloss.expression import Expression, ExpressionError
from cse_autoloss.inputs import INPUTS
from cse_autoloss.language import Language
from cse_autoloss.literals import text_of
from cse_autoloss.named import NamedError, import_named
from cse_autoloss.primitives import PRIMITIVES
from cse_autoloss.yaml_io import YamlError, read_yaml

FOLDER = Path(search_spaces.__file__).parent


class SpaceError(UserError):
    """A search space's YAML is wrong: the file, the key, and what would be right."""


@dataclass(frozen=True)
class KnownLoss:
    """A loss of the library: its name, its expression and where it comes from.

    ``reference``: what tests hold its values and gradients against. ``released``: its numbers in
    float32 are those of the released code, to the last epsilon.
    """

    name: str
    expression: Expression
    source: str
    reference: str = "its definition"
    released: bool = False


@dataclass(frozen=True, eq=False)
class SearchSpace(Language):
    """A language and what is known of it. :func:`load_space` gives one object for one name, so a
    space equals itself alone.

    Attributes:
        origin: the name or path that it was loaded by; loads it again anywhere.
        branch: ``"cls"`` or ``"reg"``.
        inputs: how variables are computed from predictions and targets (a key of
            ``inputs.INPUTS``).
        losses: the known losses, by name.
        probes: the points that candidates are judged on, and tolerances (read by
            ``screening.probes``).
        plugins: modules imported before the operators are looked up; they register rows of their
            own.
    """

    branch: str
    inputs: str
    origin: str = ""
    losses: Mapping[str, KnownLoss] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are the space loaded again by its origin, with its plug-ins
        imported."""
        return load_space, (self.origin,)

    def expression(self, text: str) -> Expression:
        """A known loss by its name (case does not count), or else the expression that the text is.

        Raises:
            ExpressionError: if the text is neither.
        """
        for loss in self.losses.values():
            if loss.name.casefold() == text.strip().casefold():
                return loss.expression
        try:
            return Expression.parse(text, self)
        except ExpressionError as error:
            names = {name.casefold(): name for name in self.losses}
            near = difflib.get_close_matches(text.strip().casefold()[:60], names, n=1, cutoff=0.7)
            if near and "(" not in text:
                raise ExpressionError(
                    f"no loss {text.strip()[:60]!r} in space {self.name}; "
                    f"did you mean {names[near[0]]!r}?"
                ) from None
            if "(" not in text and (others := _spaces_with(text.strip().casefold())):
                raise ExpressionError(
                    f"{text.strip()[:60]} is no loss of space {self.name}; it is one of "
                    f"{', '.join(others)}"
                ) from None
            raise error


@functools.cache
def load_space(name: str) -> SearchSpace:
    """Load a space by name or path.

    Raises:
        SpaceError: if there is no such space, or its YAML is wrong.
    """
    path = _find(name, Path())
    return _build(_read(path), path, str(path.resolve()) if path.parent != FOLDER else name)


def space_names() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _spaces_with(name: str) -> list[str]:
    """Packaged spaces that know a loss by that name, case-folded."""
    return [
        space
        for space in space_names()
        if any(loss.casefold() == name for loss in load_space(space).losses)
    ]


def _find(name: str, folder: Path) -> Path:
    """The file of a space, by its name or its path (from ``folder``, where it is relative)."""
    path = folder / name if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(space_names())
        raise SpaceError(
            f"no search space {name!r}: give one of {known}, or the path of a YAML file"
        )
    return path


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """The keys of a space's file, put on top of those of its ``base``: lists and mappings are added
    to the base's, all else takes its place."""
    try:
        data = read_yaml(path)
    except YamlError as error:
        raise SpaceError(str(error)) from None
    if not isinstance(data, dict):
        raise SpaceError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    if "base" not in data:
        return data
    base = data.pop("base")
    if not isinstance(base, str):
        raise SpaceError(f"{path}: base: expected a space's name or path, found {str(base)[:80]}")
    if path.resolve() in above:
        raise SpaceError(f"{path}: base: the file is its own base")
    try:
        below = _read(_find(base, path.parent), (*above, path.resolve()))
    except SpaceError as error:
        raise SpaceError(f"{path}: base: {error}") from None
    return _merged(below, data)


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        added = {
            key: _merged(below[key], value) if key in below else value
            for key, value in above.items()
        }
        return {**below, **added}
    if isinstance(below, list) and isinstance(above, list):
        return [*below, *(entry for entry in above if entry not in below)]
    return above


def _is_constant(value: Any) -> bool:
    if type(value) is int:
        return value > 0
    return type(value) is float and text_of(value) == str(value)


class _Keys:
    """The keys of a space's file, and how what is wrong with them is said."""

    def __init__(self, data: dict[Any, Any], path: Path) -> None:
        self.path, self._data = path, data

    def get(self, key: str, default: Any = None) -> Any:
        return self._data.get(key, default)

    def need(self, condition: bool, key: str, right: str) -> None:
        if not condition:
            found = str(self._data.get(key, "nothing"))[:80]
            raise SpaceError(f"{self.path}: {key}: expected {right}, found {found}")

    def check_names(self) -> None:
        """Refuse a key that a space does not have."""
        allowed = [f.name for f in fields(SearchSpace) if f.name not in ("origin", "predicted")]
        for key in self._data:
            if key not in allowed:
                right = hint(str(key), allowed, "keys")
                raise SpaceError(f"{self.path}: unknown key {str(key)!r}; {right}")


def _build(data: dict[Any, Any], path: Path, origin: str) -> SearchSpace:
    keys = _Keys(data, path)
    keys.check_names()
    keys.need(isinstance(keys.get("name"), str), "name", "a text")
    keys.need(keys.get("branch") in ("cls", "reg"), "branch", "cls or reg")
    keys.need(keys.get("inputs") in list(INPUTS), "inputs", f"one of {', '.join(INPUTS)}")
    keys.need(
        (keys.get("inputs") == "boxes") == (keys.get("branch") == "reg"),
        "inputs",
        "boxes for reg, another for cls",
    )
    variables = _variables(keys)
    table = INPUTS[keys.get("inputs")]
    predicted = frozenset(name for name in variables if table[name].predicted)
    keys.need(
        bool(predicted),
        "variables",
        f"at least one of {', '.join(row.name for row in table.values() if row.predicted)}",
    )
    constants, real = keys.get("constants", []), keys.get("real_constants", False)
    keys.need(
        isinstance(constants, list) and all(_is_constant(c) for c in constants),
        "constants",
        "a list of positive integers, or numbers with at most four digits",
    )
    keys.need(isinstance(real, bool), "real_constants", "true or false")
    plugins = _import_plugins(keys)
    operators = _operators(keys)
    probes = keys.get("probes", {})
    keys.need(isinstance(probes, dict), "probes", "a mapping")
    try:
        bare = SearchSpace(
            name=keys.get("name"),
            branch=keys.get("branch"),
            inputs=keys.get("inputs"),
            variables=MappingProxyType(variables),
            constants=tuple(constants),
            real_constants=real,
            operators=operators,
            predicted=predicted,
            origin=origin,
            probes=probes,
            plugins=plugins,
        )
    except ValueError as error:
        raise SpaceError(f"{path}: {error}") from error
    return replace(bare, losses=MappingProxyType(_losses(keys, bare)))


def _variables(keys: _Keys) -> dict[str, str]:
    """Name to meaning."""
    table, given = INPUTS[keys.get("inputs")], keys.get("variables", ())
    keys.need(
        isinstance(given, (list, dict)) and all(name in list(table) for name in given),
        "variables",
        f"a list with names of {', '.join(table)} (or a mapping from them to meanings)",
    )
    if isinstance(given, dict):
        return {name: str(meaning) for name, meaning in given.items()}
    return {name: table[name].meaning for name in given}


def _import_plugins(keys: _Keys) -> tuple[str, ...]:
    plugins = keys.get("plugins", [])
    keys.need(
        isinstance(plugins, list) and all(isinstance(p, str) for p in plugins),
        "plugins",
        "a list of module names",
    )
    for plugin in plugins:
        try:
            import_named(plugin, f"{keys.path}: plugins")
        except NamedError as error:
            raise SpaceError(str(error)) from error
    return tuple(plugins)


def _operators(keys: _Keys) -> tuple[str, ...]:
    operators = keys.get("operators", [])
    keys.need(
        isinstance(operators, list) and bool(operators), "operators", "a list of operator names"
    )
    for operator in operators:
        if operator not in list(PRIMITIVES):
            right = hint(str(operator), PRIMITIVES, "operators", cutoff=0.5)
            raise SpaceError(f"{keys.path}: operators: unknown operator {str(operator)!r}; {right}")
        if PRIMITIVES[operator].classwise and keys.get("branch") == "reg":
            raise SpaceError(
                f"{keys.path}: operators: {operator} looks along the class axis, which branch reg "
                "does not have"
            )
    return tuple(operators)


def _losses(keys: _Keys, space: SearchSpace) -> dict[str, KnownLoss]:
    """The known losses by name, written in the space."""
    entries = keys.get("losses", [])
    keys.need(isinstance(entries, list), "losses", "a list")
    needed, optional = {"name", "expression", "source"}, {"reference", "released"}
    losses: dict[str, KnownLoss] = {}
    for entry in entries:
        if not (
            isinstance(entry, dict)
            and needed <= set(entry) <= needed | optional
            and all(isinstance(value, str) for key, value in entry.items() if key != "released")
        ):
            raise SpaceError(
                f"{keys.path}: losses: each needs name, expression and source, all text (and may "
                f"have {' and '.join(sorted(optional))}), found {str(entry)[:80]}"
            )
        name = entry["name"]
        if name in losses:
            raise SpaceError(f"{keys.path}: losses: there are two by the name {name}")
        try:
            losses[name] = KnownLoss(
                name,
                Expression.parse(entry["expression"], space),
                entry["source"],
                entry.get("reference", KnownLoss.reference),
                entry.get("released", False) is True,
            )
        except ExpressionError as error:
            raise SpaceError(f"{keys.path}: losses: {name}: {error}") from error
    return losses
