"""The lab's sources: every test of the tier runs whatever the day, and a scenario imports what the lab's Python has."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import lab_python

TREE = Path(__file__).parents[2]

# --- what runs


def collected(**more: str) -> list[str]:
    """The tests of the tier, in the order in which they run."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/vm"]
    done = subprocess.run(command, cwd=TREE, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_test_of_the_tier_runs_whatever_the_day_and_the_environment() -> None:
    tests = collected()
    assert collected(MEMCONSOLE_SOAK="1", TZ="Pacific/Kiritimati", PYTHONHASHSEED="7") == tests
    names = {name for path in TREE.glob("tests/vm/test_*.py") for name in functions(path)}
    assert {line.split("::")[1].split("[")[0] for line in tests} == names


def functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def groups(path: Path) -> set[str]:
    """Every group that a file of tests names."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    marks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "group"]
    return {str(ast.literal_eval(call.args[0])) for call in marks}


def test_the_groups_are_those_whose_time_is_known() -> None:
    source = ast.parse((TREE / "tests" / "vm" / "conftest.py").read_text(encoding="utf-8"))
    known = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SECONDS"
    )
    named = set().union(*(groups(path) for path in TREE.glob("tests/vm/test_*.py")))
    assert named <= set(known)
    unmarked = {path.stem.removeprefix("test_").replace("_", "-") for path in TREE.glob("tests/vm/test_*.py")}
    assert set(known) <= named | unmarked


READS_THE_DATE = {"gmtime", "localtime", "today", "now", "strftime", "utcnow"}


def test_nothing_of_the_lab_asks_what_day_it_is() -> None:
    for path in [*TREE.glob("tests/vm/**/*.py"), *TREE.glob("tests/support/lab*.py"), TREE / "tools/run_tests.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in READS_THE_DATE:
                raise AssertionError(f"{path}:{node.lineno}: {node.attr}")
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv):
                assert "time.time" not in ast.unparse(node), f"{path}:{node.lineno}"


# --- what a scenario imports


def imported(path: Path) -> set[str]:
    """The modules that a file imports when it is imported, and those that files of tests/support import for it."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{each.name}" for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    shared = [TREE / "tests" / f"{name.replace('.', '/')}.py" for name in found if name.startswith("support.")]
    return found.union(*(imported(each) for each in shared))


@pytest.mark.parametrize("path", sorted(TREE.glob("tests/vm/scenarios/*.py")), ids=lambda path: path.stem)
def test_a_scenario_imports_nothing_that_the_labs_python_lacks(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(path)} & set(lab_python.LEFT_OUT)
