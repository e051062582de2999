"""The order of the house: imports run downward, and names say what things are."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vitopt"
FLOORS = [{"files", "errors", "distillation", "energy"}, {"recipe"},
          {"layouts", "augmentation", "architecture", "corruption", "hub"}, {"streams"}, {"model", "data"},
          {"metrics", "batches", "devices"}, {"pruning", "store", "checkpoints"}, {"inspection", "teaching"},
          {"runs", "training"}, {"report", "sensitivity"}, {"__init__", "__main__"}]


def modules():
    """The files of each module of vitopt; a package is one module."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py")}
    return found | {path.parent.name: list(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}


def imported(paths):
    """Modules of vitopt that a module imports."""
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitopt":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_every_module_imports_only_what_stands_below_it():
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert modules().keys() == height.keys()
    for name, paths in modules().items():
        for other in set(imported(paths)) - {name}:
            assert height[other] < height[name], f"{name} imports {other}"


def test_each_foreign_library_has_one_door():
    doors = {"torch_pruning": "pruning", "codecarbon": "energy", "fvcore": "metrics", "webdataset": "streams",
             "datasets": "hub"}
    for library, door in doors.items():
        users = {name for name, paths in modules().items() for path in paths
                 if f"import {library}" in (text := path.read_text()) or f"from {library}" in text}
        assert users == {door}


def test_ci_runs_the_readmes_own_test_command():
    command = "pip install -e '.[test]' && pytest"
    root = PACKAGE.parent
    assert f"\n{command}\n" in (root / "README.md").read_text() and command in (root / ".ci" / "run").read_text()
