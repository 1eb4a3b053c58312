"""What users read: no riddles, no refusal without why and what to do, and no command that does not parse."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import sources

import memconsole
from memconsole import errors
from memconsole.cli import parser
from memconsole.errors import MemconsoleError
from memconsole.finding_kinds import KINDS

ROOT = Path(memconsole.__path__[0])
RIDDLES = re.compile(
    r"\b(?:nobody(?:'s)?|whoever|somebody(?:'s)?|anybody|everybody|of ours|beside|besides|can be had|"
    r"is wanted|are wanted|wanted:|let go of)\b"
)
"""Words that hide the subject: a message names the process, the peer, the guest, custody."""


def quoted(nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    """Every string of a source that is no docstring, ``{}`` for what is put in."""
    skipped: set[int] = set()
    for node in nodes:
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr):
                skipped.add(id(statement.value))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
    for node in nodes:
        if id(node) not in skipped and (text := literal(node)) is not None:
            yield node.lineno, text  # type: ignore[attr-defined]  # a Constant or a JoinedStr


def literal(node: ast.AST | None) -> str | None:
    """The text of a literal; None for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


@functools.cache
def said() -> list[tuple[str, str]]:
    """Every text of the package with where it stands."""
    files = ((path.relative_to(ROOT), sources.nodes(path)) for path in sorted(ROOT.rglob("*.py")))
    return [(f"{name}:{line}", text) for name, nodes in files for line, text in quoted(nodes) if " " in text.strip()]


def test_what_is_said_is_found() -> None:
    assert len(said()) > 2000


def test_no_word_hides_who_does_what() -> None:
    assert [(where, text) for where, text in said() if RIDDLES.search(text) and not text.startswith("\n")] == []


PROSE_RIDDLES = re.compile(r"\b(?:nobody|whoever|somebody|anybody|everybody)(?:'s)?\b|\bof ours\b", re.IGNORECASE)
"""The same for documents, where a file may lie beside another."""
DOCUMENTS = sorted([*(ROOT.parent / "docs").glob("*.md"), ROOT.parent / "README.md", ROOT.parent / "CONTRIBUTING.md"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_word_hides_who_does_what_in_a_document(document: Path) -> None:
    lines = enumerate(document.read_text(encoding="utf-8").splitlines(), 1)
    assert [(number, line) for number, line in lines if PROSE_RIDDLES.search(line)] == []


# --- refusals, conditions, findings -------------------------------------------------------------------------------

REFUSE = {
    name: 0
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, errors.Refused | errors.NoControl | errors.Silent | errors.Gone)
} | {"Refusal": 1, "refuse": 1}
"""What refuses, and where its ``what`` stands; its why and its remedy follow."""
INTERNAL = {"backend/work.py", "backend/peers/daemon.py", "backend/wire/loop.py", "backend/wire/server.py"}
"""Where one is made of another's parts."""


def calls() -> Iterator[tuple[str, str, list[ast.expr | None]]]:
    """Every refusal that is written out: where, of what class, and its what, why and remedy."""
    for name, node in sources.package(ast.Call):
        if name in INTERNAL:
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called not in REFUSE or any(isinstance(each, ast.Starred) for each in node.args):
            continue
        first = REFUSE[called]
        given: list[ast.expr | None] = [*node.args[first : first + 3], *[None] * 3][:3]
        for each in node.keywords:
            if each.arg in {"what", "why", "remedy"}:
                given[("what", "why", "remedy").index(each.arg)] = each.value
        if literal(given[0]) is not None:
            yield f"{name}:{node.lineno}", called, given


def test_refusals_are_found() -> None:
    assert len(list(calls())) > 80


def test_no_refusal_is_without_why_and_what_to_do() -> None:
    lacking = [
        (where, called, literal(what))
        for where, called, (what, why, remedy) in calls()
        if why is None or remedy is None or literal(why) == "" or literal(remedy) == ""
    ]
    assert lacking == []


def sentences() -> Iterator[tuple[str, str]]:
    """What errors, refusals and findings say first, where it is written out."""
    known = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, MemconsoleError)}
    places = dict.fromkeys(known - {"KernelRefused"}, 0) | {"Refusal": 1, "refuse": 1, "Finding": 3}
    for name, node in sources.package(ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        first = [*node.args[places[called] :][:1]] if called in places else []
        if called in known | {"Finding"}:
            first += [each.value for each in node.keywords if each.arg in {"what", "observed"}]
        yield from ((f"{name}:{node.lineno}", text) for each in first if (text := literal(each)))


def test_what_is_wrong_is_one_sentence_that_begins_with_its_subject() -> None:
    wrong = [
        (where, text)
        for where, text in sentences()
        if re.match(r"(?:it|they|this|that|its|he|she)\b(?! (?:kernel|memconsole|Snapshot|is not a|control))", text)
        or text.endswith((":", ".", ","))
        or text != text.strip()
    ]
    assert wrong == []


def test_every_finding_says_what_to_do() -> None:
    for name, node in sources.package(ast.Call):
        if getattr(node.func, "id", "") == "Finding":
            given = [*node.args[5:6], *(each.value for each in node.keywords if each.arg == "remedy")]
            assert given, f"{name}:{node.lineno}"
            assert literal(given[0]) != "", f"{name}:{node.lineno}"


def test_requirement_and_risk_are_sentences_of_their_own() -> None:
    for kind in KINDS.values():
        for text in kind:
            assert text == text.strip()
            assert text[-1] not in ".:,"
            assert not RIDDLES.search(text)
        assert kind.requirement != kind.risk


# --- commands -----------------------------------------------------------------------------------------------------

NAMED = re.compile(r"\bmemconsole ((?:--)?[a-z][a-z-]*)\b")
PROSE = {
    "above", "again", "already", "as", "at", "and", "by", "cannot", "created", "did", "does", "file", "first", "has",
    "holds", "is", "itself", "knows", "made", "manages", "maps", "may", "only", "or", "preserves", "reads", "released",
    "reserve", "can", "speaks", "are",
    "serves", "that", "to", "was", "wrote", "with", "whose", "asked", "agent",
}  # fmt: skip
"""What follows the program's name where it is the subject of a sentence."""
STANDS_FOR = ("copy", "4242", "0000:00:04.0", "64M", "0000:00:04.0:0")
"""What a placeholder may stand for, one after the other until the command parses."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that a text names, as the words up to the end of its clause."""
    for where, text in said():
        for found in NAMED.finditer(text):
            if found[1] in PROSE - {"reserve"} or (found[1] == "reserve" and text[: found.start()].endswith("what ")):
                continue
            clause = re.split(r"[;,()\n`]|: |\.(?:\s|$)| \[|\s{2,}", text[found.start(1) :], maxsplit=1)[0]
            yield where, clause.split()


def parses(words: list[str]) -> bool:
    """Whether a command is one, whatever its placeholders stand for."""
    places = [at for at, word in enumerate(words) if re.search(r"\{\}|^[A-Z][A-Z:-]*$", word)]
    for given in itertools.product(STANDS_FOR, repeat=min(len(places), 3)):
        filled = list(words)
        for at, value in zip(places, itertools.cycle(given or ("copy",)), strict=False):
            filled[at] = re.sub(r"\{\}|^[A-Z][A-Z:-]*$", value, filled[at])
        try:
            parser.parse(filled)
        except MemconsoleError:
            continue
        except SystemExit as end:
            return end.code == 0
        return True
    return False


def longest(words: list[str]) -> int:
    """How many of the words are a command; what follows it is prose."""
    return next((count for count in range(len(words), 0, -1) if parses(words[:count])), 0)


@pytest.fixture
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser is made once, not for each command."""
    monkeypatch.setattr(parser, "build", functools.cache(parser.build))


@pytest.mark.usefixtures("one_parser")
def test_every_command_that_is_named_parses() -> None:
    found = {(where, *words) for where, words in commands()}
    assert len(found) > 60
    wrong = []
    for where, *words in sorted(found):
        rest = words[(count := longest(words)) :]
        if not count or [word for word in rest if word.startswith("--") or re.search(r"\{\}|^[A-Z]{3,}$", word)]:
            wrong.append(f"{where}: memconsole {' '.join(words)}")
    assert wrong == []


@pytest.mark.usefixtures("one_parser")
def test_a_command_that_is_none_is_recognised() -> None:
    assert not longest(["reigons"])
    assert longest(["audit", "says", "more"]) == 1
    assert longest(["guest", "attach", "NAME", "--pid", "PID"]) == 5
    assert longest(["guest", "attach", "NAME", "--pod", "PID"]) < 3
