"""What the console remembers from one session to the next: layouts of tables, bookmarks, and lines that were typed.

Two files in this user's state directory: ``console.json`` (``{"layouts": {TABLE: {"columns": [ID...], "sort":
ID, "reverse": BOOL}}, "bookmarks": [...]}``, replaced as a whole) and ``console.lines`` (a line each, appended, so that
two consoles lose none of each other's). What cannot be read or written is told once, and the console works without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from memconsole import decoding, wholefile
from memconsole.errors import MemconsoleError
from memconsole.model import Request

LINES = 1000
"""Lines that are remembered; the file has up to twice as many."""
LONGEST = 4096
MOST_BOOKMARKS = 200


class Layout(Request, frozen=True):
    """How a table is laid out: ids of its columns in their order, and of the one it is sorted by."""

    columns: tuple[str, ...] = ()
    sort: str = ""
    reverse: bool = False


class Bookmark(Request, frozen=True):
    """A place that is remembered: its name, the views and subjects on the way there, the page where it is of a map."""

    name: str
    trail: tuple[tuple[str, str], ...]
    page: int | None = None


class Remembered(Request, frozen=True):
    """What ``console.json`` says."""

    layouts: dict[str, Layout] = msgspec.field(default_factory=dict)
    bookmarks: tuple[Bookmark, ...] = ()


class Memory:
    """The console's memory, in a directory; without one it ends with the session."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self.trouble = ""
        self._layouts: dict[str, Layout] = {}
        self.bookmarks: tuple[Bookmark, ...] = ()
        self.lines: list[str] = []
        if directory is not None:
            self._read(directory)

    def _read(self, directory: Path) -> None:
        remedy = "remove it; the console writes it anew"
        path = directory / "console.json"
        try:
            if path.is_file():
                raw = decoding.contents(path, limit=decoding.SETTINGS, remedy=remedy)
                found = decoding.json(raw, Remembered, what=str(path), remedy=remedy)
                self._layouts, self.bookmarks = dict(found.layouts), found.bookmarks[:MOST_BOOKMARKS]
            path = directory / "console.lines"
            if path.is_file():
                raw = decoding.contents(path, limit=2 * LINES * LONGEST, remedy=remedy)
                self.lines = decoding.text(raw).splitlines()
        except (MemconsoleError, OSError) as error:
            self.trouble = str(error)
        if len(self.lines) > 2 * LINES:
            self.lines = self.lines[-LINES:]
            self._replace("console.lines", "".join(f"{line}\n" for line in self.lines))

    def pages_of(self, view: str, subject: str) -> list[int]:
        """The pages of a map that are bookmarks: those of a view about a subject."""
        return [each.page for each in self.bookmarks if each.page is not None and each.trail[-1] == (view, subject)]

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layouts that were chosen, by the name of their table."""
        return self._layouts

    def arrange(self, name: str, layout: Layout) -> None:
        """Remember how a table is laid out."""
        if self._layouts.get(name) != layout:
            self._layouts[name] = layout
            self._write()

    def keep_bookmark(self, bookmark: Bookmark) -> None:
        """Remember a place, in the stead of one that had its name; of too many the oldest goes."""
        others = [each for each in self.bookmarks if each.name != bookmark.name]
        self.bookmarks = (*others, bookmark)[-MOST_BOOKMARKS:]
        self._write()

    def drop_bookmark(self, name: str) -> None:
        """Forget a place."""
        self.bookmarks = tuple(each for each in self.bookmarks if each.name != name)
        self._write()

    def _write(self) -> None:
        told = msgspec.json.format(msgspec.json.encode(Remembered(self._layouts, self.bookmarks)), indent=1)
        self._replace("console.json", decoding.text(told))

    def add_line(self, line: str) -> None:
        """Remember a line that was typed, as the last one, unless it is what was typed before it."""
        line = line.strip()[:LONGEST]
        if not line or "\n" in line or (self.lines and self.lines[-1] == line):
            return
        self.lines.append(line)
        if self._directory is not None:
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                with open(self._directory / "console.lines", "a", opener=_private, encoding="utf-8") as file:
                    file.write(f"{line}\n")
            except OSError as error:
                self.trouble = str(error)

    def find_lines(self, text: str) -> Sequence[str]:
        """The lines in which a text is found, the last ones first, each once."""
        return list(dict.fromkeys(line for line in reversed(self.lines) if text.lower() in line.lower()))

    def _replace(self, name: str, text: str) -> None:
        if self._directory is None:
            return
        path = self._directory / name
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with wholefile.written(path) as file:
                file.write(text.encode())
        except OSError as error:
            self.trouble = str(error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
