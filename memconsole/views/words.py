"""Words of the ``:`` line that are neither views nor commands of the command line: what they take, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from memconsole.errors import UsageError
from memconsole.views.console import Console

Run = Callable[[Console, list[str]], None]


class Word(NamedTuple):
    """A word: its arguments as they are written, what it does, and how."""

    arguments: str
    help: str
    run: Run


def _export(app: Console, words: list[str]) -> None:
    paths = [word for word in words if word != "--redact"]
    if len(paths) != 1:
        raise UsageError("export wants one file", "", "export FILE.csv [--redact]; .csv, .json, .svg or .txt")
    app.export_table(paths[0], redact="--redact" in words)


def _macro(app: Console, words: list[str]) -> None:
    if not words:
        raise UsageError("macro wants a name", "", f"macros: {', '.join(macro.name for macro in app.macros) or 'none'}")
    words = words[1:] if words[0] == "run" and len(words) > 1 else words
    given = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} sets nothing", "it has no =", "write KEY=VALUE")
        given[name] = value
    app.action_macro(words[0], given or None)


WORDS: Mapping[str, Word] = {
    "export": Word(
        "FILE [--redact]", "write the rows that are shown, as the file's name ends: .csv .json .svg .txt", _export
    ),
    "macro": Word("NAME [KEY=VALUE ...]", "run a macro; without values it asks for them", _macro),
    "theme": Word("NAME", "use other colours", lambda app, rest: app.use_theme(" ".join(rest))),
    "at": Word(
        "TIME",
        "show what was recorded at a time: -5m, 14:03:12",
        lambda app, rest: app.travel_to(" ".join(rest)),
    ),
    "now": Word("", "return to the present", lambda app, _: app.action_present()),
    "bookmark": Word("[NAME]", "remember the place one is at", lambda app, rest: app.add_bookmark(" ".join(rest))),
    "go": Word("BOOKMARK", "go to a place that is remembered", lambda app, rest: app.go_to_bookmark(" ".join(rest))),
    "undo": Word("", "plan what undoes the last action", lambda app, _: app.action_undo()),
    "help": Word("", "keys, marks and words", lambda app, _: app.action_keys()),
    "quit": Word("", "leave the console", lambda app, _: app.leave_console()),
}
"""The words, by name."""

SHORT: Mapping[str, str] = {"?": "help", "q": "quit", "exit": "quit"}
"""Other ways to write some of them."""


def word_of(name: str) -> Word | None:
    """The word of a name, or of a shorter way to write it."""
    return WORDS.get(SHORT.get(name, name))
