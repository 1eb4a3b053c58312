"""No source file has 500 lines, and no function of Python 60: longer ones are several things under one name."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sources import nodes

ROOT = Path(__file__).parents[2]
LINES, FUNCTION_LINES = 500, 60


def sources(*patterns: str) -> list[Path]:
    """The sources that the project wrote; a tree that is no checkout cannot say."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *patterns], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    paths = [ROOT / name for name in listed.stdout.splitlines() if "/third_party/" not in name]
    return [path for path in paths if path.exists()]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file by its name, and how many lines it has."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def test_no_file_is_longer_than_one_subject_takes() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources("*.py", "*.c", "*.h")
        if len(path.read_text().splitlines()) >= LINES
    }
    assert found == set()


def test_no_function_is_longer_than_a_screen() -> None:
    found = {
        f"{path.relative_to(ROOT)} {name}"
        for path in sources("*.py")
        for name, lines in functions(path)
        if lines >= FUNCTION_LINES
    }
    assert found == set()
