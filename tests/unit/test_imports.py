"""No circle of imports: of those that run, those inside functions, and those for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import memconsole

PACKAGE = Path(memconsole.__file__).parent


def modules(package: Path) -> dict[str, Path]:
    """Every module below a package's directory, by its name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """What a module imports of those that are known, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in known:
                    yield whole
                elif base in known:
                    yield base


def circle(package: Path) -> list[str]:
    """One circle of imports, beginning and ending with the same module; empty where there is none."""
    known = modules(package)
    graph = {name: set(imported(name, path, known)) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert " -> ".join(circle(PACKAGE)) == ""


def test_a_circle_is_found_however_it_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "wing").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "wing" / "__init__.py").touch()
    (package / "runs.py").write_text("from package.wing import types\n")
    (package / "wing" / "types.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import late\n"
    )
    (package / "wing" / "late.py").write_text("def work():\n    from ..runs import something\n")
    assert sorted(set(circle(package))) == ["package.runs", "package.wing.late", "package.wing.types"]
    (package / "wing" / "late.py").write_text("import os\n")
    assert circle(package) == []
