"""The order of the house: imports run downward, and names say what things are."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vitopt"
FLOORS = [{"recipe", "distillation", "energy"}, {"model", "data"}, {"metrics", "pruning"}, {"training", "runs"},
          {"report"}, {"__init__", "__main__"}]


def imported(path):
    """Modules of vitopt that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitopt":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_every_module_imports_only_what_stands_below_it():
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    modules = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert modules.keys() == height.keys()
    for name, path in modules.items():
        for other in imported(path):
            assert height[other] < height[name], f"{name} imports {other}"


def test_each_foreign_library_has_one_door():
    doors = {"torch_pruning": "pruning", "codecarbon": "energy", "fvcore": "metrics"}
    for library, door in doors.items():
        users = [path.stem for path in PACKAGE.glob("*.py") if f"import {library}" in (text := path.read_text())
                 or f"from {library}" in text]
        assert users == [door]


def test_ci_runs_the_readmes_own_test_command():
    command = "pip install -e '.[test]' && pytest"
    root = PACKAGE.parent
    assert f"\n{command}\n" in (root / "README.md").read_text() and command in (root / ".ci" / "run").read_text()
