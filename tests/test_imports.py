"""Imports point down: a module imports its own layer and the layers below it, and no two modules import each other."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

LAYERS = """
    lawn.optim
    lawn.__init__
    lawn.errors
    lawn.files lawn.output lawn.packages lawn.child_signals lawn.plotting
    lawn.arguments lawn.config
    lawn.explain lawn.identity
    lawn.validation
    lawn.compose
    lawn.composition
    lawn.data
    lawn.models lawn.losses lawn.metrics
    lawn.optimizers
    lawn.diagnostics
    lawn.task
    lawn.data.__main__
    lawn.train
    experiments.__init__
    experiments.json_lines
    experiments.record
    experiments.records
    experiments.definitions
    experiments.planning
    experiments.execution
    experiments.references
    experiments.reporting
    experiments.spherical_motion
    experiments.selection
    experiments.serve
    experiments.__main__
    scripts run tests
"""
"""From the lowest layer to the highest, one a line. A module belongs to the longest name that it begins with."""


class Import(NamedTuple):
    importer: str
    imported: str
    place: str


def layers() -> dict[str, int]:
    return {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of lawn and experiments by name; a package is its `__init__`."""
    paths = sorted(path for package in ("lawn", "experiments") for path in (root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def find_imports(modules: dict[str, Path]) -> Iterator[Import]:
    """Every import of a module of this project, those inside functions too."""
    ours = {name.partition(".")[0] for name in layers()}
    for importer, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join([*importer.split(".")[: -node.level or None], *filter(None, [node.module])])
                source = package if node.level else str(node.module)
                names = [f"{source}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if name.partition(".")[0] in ours:
                    place = f"{path}:{node.lineno}"
                    yield Import(importer, find_module(name, modules), place)


def find_module(name: str, modules: dict[str, Path]) -> str:
    """The module that `from package import name` reads: the submodule of this name, or else the package's own."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if candidate in modules:
            return candidate
    return name


def find_layer(module: str) -> int | None:
    order = layers()
    while module and module not in order:
        module = module.rpartition(".")[0]
    return order.get(module)


def find_reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a module imports, directly or through others."""
    found: set[str] = set()
    pending = [start]
    while pending:
        new = graph.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def find_problems(root: Path) -> list[str]:
    modules = find_modules(root)
    problems = [f"{path}: {name} has no layer" for name, path in modules.items() if find_layer(name) is None]
    imports = list(find_imports(modules))
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in imports:
        graph.setdefault(importer, set()).add(imported)
    reachable = {name: find_reachable(graph, name) for name in graph}
    for importer, imported, place in imports:
        level, other = find_layer(importer), find_layer(imported)
        if other is None or (level is not None and other > level):
            problems.append(f"{place}: {importer} imports {imported} of a higher layer")
        elif importer in reachable.get(imported, ()):
            problems.append(f"{place}: {importer} imports {imported}, which imports it")
    return problems


def test_every_layer_has_a_module():
    modules = find_modules(ROOT)
    names = [name for name in layers() if name.startswith(("lawn", "experiments"))]
    assert [name for name in names if not any(f"{module}.".startswith(f"{name}.") for module in modules)] == []


def test_imports_point_down():
    problems = dict.fromkeys(find_problems(ROOT))
    assert not problems, "\n".join(problems)


def test_matplotlib_is_imported_in_one_place():
    """Which takes care of its backend."""
    for name, path in find_modules(ROOT).items():
        if name != "lawn.plotting":
            assert not re.search(r"^\s*(import|from) matplotlib", path.read_text(), flags=re.MULTILINE), name


def test_the_optimizers_import_nothing_but_torch():
    allowed = {*sys.stdlib_module_names, "lawn", "torch", "triton"}
    modules = find_modules(ROOT)
    lowest = {name: path for name, path in modules.items() if name == "lawn.__init__" or "lawn.optim." in name}
    for name, path in lowest.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {imported.partition(".")[0] for imported in names} <= allowed, f"{name}, line {node.lineno}"


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("lawn/errors.py", "from lawn.config import Config", "lawn.errors imports lawn.config of a higher layer"),
        ("lawn/errors.py", "def f():\n    import lawn.train", "lawn.errors imports lawn.train.__init__ of a higher"),
        ("lawn/task.py", "from experiments import records", "lawn.task imports experiments.records of a higher layer"),
        ("lawn/data/a.py", "from . import b", "lawn.data.a imports lawn.data.b, which imports it"),
        ("lawn/new.py", "", "lawn.new has no layer"),
    ],
)
def test_an_upward_import_is_reported_with_its_line(tmp_path, module, line, problem):
    files = {"lawn/config.py": "", "lawn/train/__init__.py": "", "experiments/records.py": ""}
    files |= {"lawn/data/b.py": "from lawn.data.a import x", module: line}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    problems = find_problems(tmp_path)
    assert any(problem in found for found in problems)
    assert all(found.startswith(f"{tmp_path}/") for found in problems)
