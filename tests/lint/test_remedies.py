"""No remedy destroys what could still be kept: every remedy in the code is read, wherever it is written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support import sources

from memconsole import errors

PLACES = {
    "Finding": 5,
    "Condition": 5,
    "Refusal": 3,
    "refuse": 3,
} | {name: 2 for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, errors.MemconsoleError)}
"""Where the remedy stands among the positional arguments of what has one."""
DESTROYS = re.compile(
    r"(?<!not )\b(?:end|kill|terminate|stop) (?:process|whoever|whom|the process|it\b|what holds)|\bkill (?!-CONT)"
    r"|\brelease (?!\w*s? that)|guest stop|\bdiscard|--finish|\bend \{|\brm\b|delete|-at-most kill",
    re.IGNORECASE,
)
NOTHING_LEFT_TO_KEEP = {
    "its regions keep their contents; memconsole guest stop {} ends its grants": "its process has ended",
    "memconsole guest stop {} ends its grants; its regions keep their contents": "its process has ended",
    "see its log; memconsole guest stop {} ends it, its regions keep their contents": "its vCPUs cannot go on",
    "its contents are gone; memconsole release {} forgets the name": "nobody holds the memory",
    "what is left stays in custody until memconsole release {} gives it up": "it says that it is kept",
    "memconsole audit says what can still be kept of each; one that is gone for good: memconsole release REGION": "",
    "once nothing in them is missed: --finish finishes them, and discards files that no entry refers to": "only then",
    "nothing need be done: its regions are carried; memconsole guest stop NAME ends its grants": "it has ended",
    "{}; memconsole release {} forgets it; reserve a new region": "copied out first",
    "memconsole guest stop {} ends its grants": "its process has ended by itself",
    "memconsole copy {} FILE keeps its contents, then memconsole release {}": "copied out first",
    "release what it holds first": "the keeper ends by this alone, and whoever releases decides what",
    "release regions and guests that are not needed": "that are not needed",
    "memconsole guest stop {}": "its process has ended by itself",
}
"""Remedies with such a word in which nothing is destroyed that could be kept, each with why."""


def texts(node: ast.expr | None) -> Iterator[str]:
    """The texts an expression may be, ``{}`` for what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        case ast.IfExp():
            yield from texts(node.body)
            yield from texts(node.orelse)
        case ast.BoolOp():
            for each in node.values:
                yield from texts(each)
        case ast.BinOp():
            yield " ".join([*texts(node.left), *texts(node.right)])


def said(call: ast.Call) -> Iterator[ast.expr]:
    """The remedy that a call is given."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    yield from (each.value for each in call.keywords if each.arg == "remedy")
    yield from call.args[PLACES.get(name, 99) :][:1]


def named(assignment: ast.Assign) -> Iterator[ast.expr]:
    """The remedies that are given a name."""
    for target in assignment.targets:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = assignment.value.elts if isinstance(assignment.value, ast.Tuple) else [assignment.value]
        for each, value in zip(names, values, strict=False):
            if isinstance(each, ast.Name) and each.id.strip("_").lower() in {"remedy", "remedies"}:
                yield from value.values if isinstance(value, ast.Dict) else [value]


def remedies() -> Iterator[tuple[str, str]]:
    """Every remedy with where it stands."""
    given = [(name, node.lineno, each) for name, node in sources.package(ast.Call) for each in said(node)]
    given += [(name, node.lineno, each) for name, node in sources.package(ast.Assign) for each in named(node)]
    yield from ((f"{name}:{line}", text) for name, line, each in given for text in texts(each))


def test_no_remedy_destroys_what_can_be_kept() -> None:
    found = list(remedies())
    assert len(found) > 200
    assert [each for each in found if DESTROYS.search(each[1]) and each[1] not in NOTHING_LEFT_TO_KEEP] == []


def test_what_would_destroy_is_recognised() -> None:
    for text in (
        "end process {}, or revoke it",
        "kill it",
        "memconsole release {}",
        "memconsole guest stop {}",
        "end {}",
    ):
        assert DESTROYS.search(text)
    for text in ("if a signal has stopped it, kill -CONT {}", "revoke {}", "shut it down from inside"):
        assert not DESTROYS.search(text)
