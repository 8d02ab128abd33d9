"""The modules of ringattn.hf import each other without a cycle, imports for type checkers included.

The import linter checks the imports that run; it leaves out blocks under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ringattn.hf as rhf

ROOM = Path(rhf.__file__).parent


def imported_modules(path: Path) -> set[str]:
    """Returns the modules of ringattn.hf that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    prefix = f"{rhf.__name__}."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def test_no_import_cycles() -> None:
    graph = {path.stem: imported_modules(path) for path in ROOM.glob("*.py")}
    assert "handle" in graph["ring_cache"]
    TopologicalSorter(graph).prepare()  # raises CycleError
