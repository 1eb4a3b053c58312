"""The documents are true: every finding and condition stands in them, and every command line in them is one."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import sources

import memconsole
from memconsole.backend.handoff.doubts import DOUBTS
from memconsole.cli.parser import parse
from memconsole.finding_kinds import KINDS
from memconsole.model import Condition

ROOT = Path(memconsole.__path__[0])
TOP = ROOT.parent
DOCUMENTS = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]


def ids(word: str, keyword: str = "id") -> Iterator[str]:
    """The first argument of every call of ``word`` in the package, where it is written out."""
    for _, node in sources.package(ast.Call):
        if getattr(node.func, "id", getattr(node.func, "attr", "")) == word:
            said = [*node.args[:1], *(each.value for each in node.keywords if each.arg == keyword)]
            for each in said:
                for text in [each.body, each.orelse] if isinstance(each, ast.IfExp) else [each]:
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        yield text.value


def of_the_resume() -> Iterator[str]:
    """The findings of memconsole-resume, as a control process shows them."""
    for path in (ROOT / "native").glob("resume*.c"):
        yield from (f"handoff-{id}" for id in re.findall(r'finding\("([a-z-]+)"', path.read_text(encoding="utf-8")))


def standing(document: str) -> set[str]:
    """What stands in a document as a word of code, or stressed."""
    return set(re.findall(r"[`*]([a-z0-9-]+)[`*]", (TOP / "docs" / document).read_text(encoding="utf-8")))


def test_every_finding_stands_in_the_documents() -> None:
    made = {*ids("Finding"), *of_the_resume()}
    assert len(made) > 40
    assert sorted(made - standing("audit.md")) == []


def test_every_finding_has_a_requirement_and_a_risk() -> None:
    made = {*ids("Finding"), *of_the_resume(), *ids("_damage")}
    assert sorted(made - KINDS.keys() - {"handoff-guest-held"}) == []
    silent = {f"{subject}-silent" for subject in ids("_silent", "subject")}
    assert sorted(KINDS.keys() - made - silent) == []
    assert all(kind.requirement and kind.risk for kind in KINDS.values())


def test_every_condition_stands_in_the_documents() -> None:
    made = set(ids("Condition"))
    assert len(made) > 25
    assert sorted(made - standing("handoff.md")) == []


ROW = re.compile(r"\| (\*\*?)([a-z-]+)\1 \| (.+) \| (.+) \|")


def conditions() -> dict[str, list[tuple[str, str, str]]]:
    """The table of conditions: by id how it is stressed, its requirement and its risk."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for line in (TOP / "docs" / "handoff.md").read_text(encoding="utf-8").splitlines():
        if row := ROW.fullmatch(line):
            rows.setdefault(row[2], []).append((row[1], row[3], row[4]))
    return rows


def written(node: ast.expr | None, blank: str) -> str | None:
    """A text as it stands in the code, with ``blank`` for what is filled in; None where it stands elsewhere."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else blank for part in node.values)
    return None


def test_the_table_of_conditions_says_what_the_code_says() -> None:
    rows, made, whole = conditions(), set(DOUBTS), {*ids("Condition"), *DOUBTS}
    for id, words in DOUBTS.items():
        assert rows[id] == [("**", *words)]
    for _, node in sources.package(ast.Call):
        if getattr(node.func, "id", "") != "Condition":
            continue
        said = dict(zip(Condition.__struct_fields__, node.args, strict=False))
        said |= {each.arg: each.value for each in node.keywords if each.arg}
        pattern = written(said["id"], "[a-z]+")
        if pattern is None:
            continue
        filled = rows.keys() - whole if pattern not in whole else {pattern}
        found = {id: rows[id] for id in filled if id in rows and re.fullmatch(pattern, id)}
        assert found, f"{pattern} has no row"
        made |= found.keys()
        warns = "WARNING" in ast.unparse(said["severity"]) and "ERROR" not in ast.unparse(said["severity"])
        for id, row in found.items():
            for place, word in ((1, "requirement"), (2, "risk")):
                text = written(said[word], "…")
                assert text is None or any(like(text, each[place]) for each in row), f"{id} has another {word}"
            assert {each[0] for each in row} == {"*" if warns else "**"}, id
    assert made == rows.keys()


def like(text: str, shown: str) -> bool:
    """Whether a text with blanks is what a row shows, where they may be filled in."""
    return re.fullmatch(".*".join(map(re.escape, text.split("…"))), shown) is not None


def command_lines() -> Iterator[tuple[str, str]]:
    """Every line of the documents that begins with the program's name, without what is said of it behind two blanks."""
    for document in DOCUMENTS:
        fenced = False
        for line in document.read_text(encoding="utf-8").splitlines():
            fenced ^= line.startswith("```")
            if fenced and line.startswith("memconsole "):
                words = re.split(r"\s{2,}|\s#", line, maxsplit=1)[0]
                if not re.search(r"[\[|<>$]|\.\.\.|COMMAND", words):
                    yield document.name, words


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_every_command_line_is_one(document: str, line: str) -> None:
    assert parse(["4242" if word == "PID" else word for word in shlex.split(line)[1:]]), document
