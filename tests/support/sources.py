"""The project's own sources as trees, for tests that read code; each file is parsed once a process."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import TypeVar

import memconsole

PACKAGE = Path(memconsole.__file__).parent
Node = TypeVar("Node", bound=ast.AST)


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a Python source, those that hold others first."""
    found: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in found:  # grows meanwhile
        for value in vars(node).values():
            if isinstance(value, list):
                found.extend(each for each in value if isinstance(each, ast.AST))
            elif isinstance(value, ast.AST):
                found.append(value)
    return tuple(found)


@functools.cache
def package(kind: type[Node]) -> tuple[tuple[str, Node], ...]:
    """Every node of a kind in the package, with its file's path below it."""
    files = ((str(path.relative_to(PACKAGE)), path) for path in sorted(PACKAGE.rglob("*.py")))
    return tuple((name, node) for name, path in files for node in nodes(path) if isinstance(node, kind))
