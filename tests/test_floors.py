"""A file imports only from floors below it, or its own room; no circles, not even hidden ones."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_rece"
FLOORS = {
    "version": 0, "errors": 0, "files": 0.5,
    "ops": 1, "data": 1, "metrics": 1, "card": 1,
    "losses": 2, "embeddings": 2,
    "head": 3,
    "models": 4,
    "training": 5,
    "hub": 6, "pipeline": 6, "serving": 6,
    "cli": 7,
    "__init__": 8,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    parts = ("hf_rece", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path):
    """All modules of the package that a file imports, inside functions and by name too."""
    modules = {module_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "import_module":
            # The front door imports by a table, whose names it also imports for type checkers.
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from (name for name in names if name in modules)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = room_of(module_of(path))
    for imported in imports_of(path):
        room = room_of(imported)
        assert room == own or FLOORS[room] < FLOORS[own], f"{imported} is not below {own}"


def test_there_are_no_circles():
    graph = {module_of(path): set(imports_of(path)) - {module_of(path)} for path in FILES}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_has_more_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_imports_by_name_are_followed():
    assert "hf_rece.ops.stream_triton" in set(imports_of(PACKAGE / "ops" / "stream.py"))
