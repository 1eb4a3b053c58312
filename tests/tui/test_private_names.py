"""Textual's private names: the one file that uses them says which, they are there, and no other file has any."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from textual.drivers.linux_driver import LinuxDriver

import memconsole.views
from memconsole.views import private

VIEWS = Path(memconsole.views.__path__[0])
USED = frozenset().union(*private.NAMES.values())


def defined(cls: type) -> set[str]:
    """The private names that a class of Textual has: its methods, and what it sets of itself."""
    found = {name for name in vars(cls) if name.startswith("_")}
    module = inspect.getmodule(cls)
    assert module is not None
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr.startswith("_"):
            found.add(node.attr)
    return {name for name in found if not name.startswith("__")}


def bases() -> set[type]:
    """The classes of Textual that those of the views are made of."""
    found: set[type] = {LinuxDriver, *private.NAMES}
    for module in pkgutil.walk_packages(memconsole.views.__path__, "memconsole.views."):
        for made in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(made) and made.__module__ == module.name:
                found |= {base for base in made.__mro__ if base.__module__.startswith("textual")}
    return found


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The attributes that a file uses, and the functions it defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, all in private.NAMES.items() for name in sorted(all)])
def test_a_name_is_where_it_is_said_to_be(cls: type, name: str) -> None:
    assert name in defined(cls) | set(dir(cls))


def test_every_name_that_is_listed_is_used() -> None:
    assert {name for _, name in names(ast.parse((VIEWS / "private.py").read_text()))} >= USED


def test_no_other_file_uses_a_private_name() -> None:
    textuals = set().union(*map(defined, bases()))
    found = []
    for path in sorted(VIEWS.rglob("*.py")):
        tree = ast.parse(path.read_text())
        own = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        own |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        for line, name in names(tree):
            if name in (USED if name in own else textuals):
                found.append(f"{path.relative_to(VIEWS)}:{line}: {name}")
    assert [each for each in found if not each.startswith("private.py:")] == []


def test_no_thread_is_described_by_what_it_is_given() -> None:
    """Textual would write down the ``repr`` of every argument: megabytes at each start where one is a Snapshot."""
    found = {
        f"{path.name}:{node.lineno}": {keyword.arg for keyword in node.keywords}
        for path in sorted(VIEWS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "work"
    }
    assert [place for place, named in found.items() if "description" not in named] == []
