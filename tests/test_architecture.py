"""What must never be, of docs/architecture.md, as far as imports tell."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cse_autoloss

ROOT = Path(cse_autoloss.__file__).parent.parent


def imported(tree, inside_functions):
    """Names of modules (and of what is taken from them) that a file imports."""
    nodes = ast.walk(tree) if inside_functions else _at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(tree):
    """Nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (checking or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield node
            yield from _at_import(node)


def modules(package):
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", ["cse_autoloss", "cse_autoloss/screening", "detectors"])
def test_the_page_of_the_house_names_every_file(package):
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    named = set(re.findall(r"\w+\.py", page.read_text(encoding="utf-8")))
    files = {path.name for path in (ROOT / package).glob("[!_]*.py")}
    assert files - named <= {"version.py"}


@pytest.mark.parametrize("package", ["cse_autoloss", "detectors"])
def test_no_modules_import_each_other_in_a_circle(package):
    trees = dict(modules(package))
    graph = {
        name: {other for other in imported(tree, False) if other in trees and other != name}
        for name, tree in trees.items()
    }
    for name, others in graph.items():  # a package's __init__ may take from its own modules
        graph[name] = {other for other in others if not name.startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_engine_never_imports_a_detection_library():
    for name, tree in modules("cse_autoloss"):
        if name.startswith("cse_autoloss.adapters"):
            continue
        roots = {other.partition(".")[0] for other in imported(tree, True)}
        assert not roots & {"mmdet", "mmcv", "mmengine", "detectors", "torchvision"}, name


def test_the_detectors_know_neither_the_search_nor_the_journal():
    inner = ("evolution", "journal", "search", "strategies", "rankers", "runner", "proposals")
    forbidden = tuple(f"cse_autoloss.{name}" for name in inner)
    for name, tree in modules("detectors"):
        taken = [other for other in imported(tree, True) if other.startswith(forbidden)]
        assert not taken, f"{name}: {taken}"


def test_ray_is_started_where_it_is_kept_to_this_machine_and_nowhere_else():
    for package in ("cse_autoloss", "detectors"):
        for name, tree in modules(package):
            used = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
            starts = any(ast.unparse(node) == "ray.init" for node in used if node.attr == "init")
            assert starts == (name == "cse_autoloss.ray_session"), name


def test_nothing_from_outside_is_evaluated_or_unpickled():
    calls = {"eval", "exec", "__import__"}
    for package in ("cse_autoloss", "detectors"):
        for name, tree in modules(package):
            used = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not used & calls, name
            assert not {"pickle", "dill", "marshal"} & set(imported(tree, True)), name
