"""The project's own sources as trees, for tests that read code; each file is parsed once a process."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import memconsole

PACKAGE = Path(memconsole.__file__).parent


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


def package() -> Iterator[tuple[str, ast.AST]]:
    """Every node of the package, with its file's path below it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        yield from ((name, node) for node in nodes(path))
