"""YAML as this project reads it: plain data, every key once, nothing that grows when it is read.

PyYAML's safe loader runs no code, but it takes a key given twice (the last counts), anchors that
contain themselves, a few lines that stand for a billion entries, and numbers of any length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cse_autoloss.errors import UserError

MAX_ENTRIES = 100_000  # of a document, aliases written out
MAX_BYTES = 4_000_000
MAX_DEPTH = 50
_LONGEST_NUMBER = 50  # characters


class YamlError(UserError):
    """Text that is not the YAML that is read here: what is wrong, and in which line."""


def read_yaml(path: Path) -> Any:
    """The data in a file.

    Raises:
        YamlError: begins with the path.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise YamlError(f"larger than {MAX_BYTES // 1_000_000} MB")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise YamlError(f"{path}: {error.strerror}") from None
    except (YamlError, UnicodeDecodeError) as error:
        raise YamlError(f"{path}: not YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The data in a text: mappings with text or numbers as keys, lists, and scalars.

    Raises:
        YamlError: one line.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root, {}, ())
        return loader.construct_document(root)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError(f"nested deeper than {MAX_DEPTH}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        reason = str(error).replace('in "<unicode string>", ', "in ")  # PyYAML's name for a text
        raise YamlError(" ".join(reason.split())[:300]) from None


class _Loader(yaml.SafeLoader):
    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node)
        if len(text) > _LONGEST_NUMBER:
            raise YamlError(f"{_line(node)}: a number of {len(text)} characters")
        integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _check(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """How many entries a node has, those of aliases counted each time they are used."""
    if node in above:
        raise YamlError(f"{_line(node)}: an anchor that contains itself")
    if len(above) > MAX_DEPTH:
        raise YamlError(f"{_line(node)}: nested deeper than {MAX_DEPTH}")
    if node not in sizes:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        size = 1 + sum(_check(part, sizes, (*above, node)) for part in parts)
        if size > MAX_ENTRIES:
            raise YamlError(f"{_line(node)}: more than {MAX_ENTRIES:,} entries")
        sizes[node] = size
    return sizes[node]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag.rpartition(":")[2] not in ("str", "int", "float", "bool", "merge"):
            raise YamlError(f"{_line(key)}: expected text as a key, found {str(key.value)[:80]!r}")
        if key.value in seen:
            raise YamlError(f"{_line(key)}: the key {key.value!r} stands twice"[:200])
        seen.add(key.value)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
