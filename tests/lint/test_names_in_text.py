"""What text names in the package exists: programs that tests start from a string, cross-references, commands.

No type checker reads these, so a module that moves leaves them behind.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from support import sources

ROOT = Path(__file__).parents[2]
IMPORTED = re.compile(r"from (memconsole(?:\.\w+)*) import (\w+(?:, \w+)*)")
NAMED = re.compile(r"(?::\w+:`~?|-m )(memconsole(?:\.\w+)+)")
SOURCES = sorted(
    path
    for place in ("memconsole", "tests", "tools", "docs")
    for path in (ROOT / place).rglob("*")
    if path.suffix in {".py", ".md", ".sh"} and path != Path(__file__)
)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return bool(module) and exists(module) and hasattr(importlib.import_module(module), last)
    return True


def test_what_a_text_names_in_the_package_exists() -> None:
    missing = []
    for path in SOURCES:
        text = path.read_text()
        names = {f"{module}.{name}" for module, some in IMPORTED.findall(text) for name in some.split(", ")}
        names |= set(NAMED.findall(text))
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names) if not exists(name)]
    assert missing == []


def programs(path: Path) -> Iterator[ast.Module]:
    """The programs that a source has as text; what an f-string fills in is the name ``filled``."""
    for node in sources.nodes(path):
        if not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "filled" for part in parts)
        if "import " in text and "\n" in text:
            with contextlib.suppress(SyntaxError):
                yield ast.parse(text)


def undefined(program: ast.Module) -> set[str]:
    """The names that a program uses and nowhere binds."""
    nodes = list(ast.walk(program))
    bound = {*dir(builtins), "filled", *(node.arg for node in nodes if isinstance(node, ast.arg))}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    return {node.id for node in nodes if isinstance(node, ast.Name)} - bound


def test_a_program_in_a_text_uses_no_name_of_the_source_around_it() -> None:
    texts = [path for path in SOURCES if path.suffix == ".py"]
    found = [(path, program) for path in texts for program in programs(path)]
    assert {path: names for path, program in found if (names := undefined(program))} == {}
    assert len(found) > 20
    assert undefined(ast.parse("import os\nos.wait(LONG_S)")) == {"LONG_S"}
