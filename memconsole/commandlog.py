"""The command lines of console sessions: what was done, as the command line writes it, in the order it was done.

``console.commands`` in the user's state directory has one JSON object a line: ``{"at_ns", "session", "line", "code"}``;
lines are appended, so that consoles that run at the same time lose none of each other's. ``code`` is the exit code that
the command would have had.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import msgspec

from memconsole import command, decoding
from memconsole.actions import Action
from memconsole.errors import MemconsoleError
from memconsole.field import Field, moment_field
from memconsole.macros import Macro, recorded
from memconsole.model import Request

NAME = "console.commands"
KEPT = 2000
"""Lines that are kept when a session begins."""
LIMIT = 16 << 20


class CommandLine(Request, frozen=True):
    """A line that was done: when, in which session, and its exit code."""

    at_ns: int
    session: str
    line: str
    code: int = 0


FIELDS = (
    moment_field("at", "Time (UTC)", "when it was done", lambda each: each.at_ns, default=True),
    Field("session", "Session", "the console's process and when it began", lambda each: each.session, width=18),
    Field("code", "Code", "exit code that the command would have had", lambda each: each.code, width=4, right=True),
    Field("line", "Command", "the command line that does the same", lambda each: each.line, width=60),
)


class CommandLog:
    """The command lines there are; without a directory those of this session alone."""

    def __init__(self, directory: Path | None = None, session: str = "") -> None:
        self.session = session
        self.trouble = ""
        self._path = None if directory is None else directory / NAME
        self.lines: list[CommandLine] = [] if self._path is None else self._read(self._path)

    def _read(self, path: Path) -> list[CommandLine]:
        if not path.is_file():
            return []
        remedy = "remove it; the console writes it anew"
        try:
            raw = decoding.contents(path, limit=LIMIT, remedy=remedy)
            found = [decoding.json(line, CommandLine, what=str(path), remedy=remedy) for line in raw.splitlines()]
        except MemconsoleError as error:
            self.trouble = str(error)
            return []
        return found[-KEPT:]

    def add(self, at_ns: int, line: str, code: int = 0) -> None:
        """Write down a line that was done."""
        done = CommandLine(at_ns, self.session, line, code)
        self.lines.append(done)
        if self._path is None or self.trouble:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(msgspec.json.encode(done) + b"\n")
        except OSError as error:
            self.trouble = str(error)


def macro_of(name: str, lines: Iterable[CommandLine]) -> Macro:
    """A macro of the actions among lines that were done; what only looked, or failed, is left out."""
    done: list[Action | tuple[str, str]] = []
    for each in lines:
        try:
            done += [command.parse(shlex.split(each.line))] if each.code == 0 else []
        except (MemconsoleError, ValueError):  # it is no action
            continue
    return recorded(name, done)
