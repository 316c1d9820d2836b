"""The order of the house: short files, imports that run down, no file that lives off another's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".inc", ".cu", ".cuh"}
SOURCES = sorted(
    path
    for folder in ("layerlr", "csrc", "kernels")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES
)
TESTS = sorted(path for path in (ROOT / "tests").rglob("*") if path.suffix in SUFFIXES)
MODULES = [path for path in SOURCES if path.suffix == ".py" and "layerlr" in path.parts]

#: From the ground up: a module imports from its own room and from lower floors. A package is a
#: room, a module of ``layerlr`` itself too.
FLOORS = (
    "_C conditions devices directions",
    "layer_table",
    "layers rules",
    "dtensor plain_lr precision",
    "memory unknown_arguments",
    "codes",
    "backends",
    "checks estimators group_key hooks names numbers options sharded_plan",
    "advice",
    "group_plans state state_dicts",
    "plans",
    "compiled gradient_factors graphs statistics steppable stepping taken",
    "estimation",
    "optimizer",
    "base_lr wrapped_checks wrapped_state",
    "agreement optimizers param_groups wrapping",
    "describe integrations step_in_backward",
    "monitor selfcheck",
    "__init__",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not the source tree")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_of(path): path for path in MODULES}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Modules of layerlr that a file imports when it runs, within functions too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {n.name for n in node.names if n.name.startswith("layerlr.")}
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            if base[:1] == ["layerlr"]:
                inner = [".".join([*base, n.name]) for n in node.names]
                known = [n for n in inner if n in NAMES or n == "layerlr._C"]
                found |= set(known)
                if len(known) < len(inner) and len(base) > 1:
                    found.add(".".join(base))
    return found


def test_files_are_short():
    """300 lines in the product, 500 in the tests."""
    assert len(TESTS) > 60 and len(SOURCES) > 60
    limits = {**dict.fromkeys(SOURCES, 300), **dict.fromkeys(TESTS, 500)}
    lines = {path: len(path.read_text().splitlines()) for path in limits}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > limits[path]}


def test_imports_run_down():
    """Modules of one room may form no circle either."""
    graph = {name: imports(path) for name, path in NAMES.items()}
    assert sum(map(len, graph.values())) > 100
    for name, others in graph.items():
        for other in others:
            here, there = FLOOR[room(name)], FLOOR[room(other)]
            assert there < here or room(name) == room(other), f"{name} imports {other}"
    open_, done = set(), set()

    def visit(name, way):
        assert name not in open_, " > ".join((*way, name))
        if name in done or name not in graph:
            return
        open_.add(name)
        for other in graph[name]:
            visit(other, (*way, name))
        open_.remove(name)
        done.add(name)

    for name in graph:
        visit(name, ())


def test_includes_form_no_circle():
    files = {str(p.relative_to(ROOT / "csrc")): p for p in SOURCES if "csrc" in p.parts}
    graph = {n: re.findall(r'#include "(.+?)"', p.read_text()) for n, p in files.items()}
    assert sum(map(len, graph.values())) > 50

    for name in graph:
        before = set()
        todo = list(graph[name])
        while todo:
            other = todo.pop()
            assert other != name, f"{name} includes itself by way of others"
            if other not in before:
                before.add(other)
                todo += graph.get(other, ())


def private(tree: ast.AST) -> set[str]:
    """Private names that a module defines, itself or as members of its classes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {n for n in names if n.startswith("_") and not n.startswith("__")}


def test_nobody_lives_off_the_private_names_of_another_file():
    trees = {name: ast.parse(path.read_text()) for name, path in NAMES.items()}
    defined = {name: private(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        others = set().union(*(names for n, names in defined.items() if n != name))
        strange = others - defined[name]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in strange:
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                inherited = owner in ("self", "cls")
                assert inherited, f"{name} uses {owner}.{node.attr}"
            if isinstance(node, ast.ImportFrom) and name.startswith("layerlr"):
                ours = node.level or (node.module or "").startswith("layerlr")
                taken = {n.name for n in node.names} & strange if ours else set()
                assert taken <= {"_C"}, f"{name} imports {taken}"
