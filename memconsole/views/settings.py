"""What an operator may set: a keymap, keys by the ids of :mod:`memconsole.keys`, and the theme.

Grammar of ``console.toml`` (in ``$XDG_CONFIG_HOME/memconsole``, else ``/etc/memconsole``)::

    theme = "ansi-dark"            any theme the palette lists
    keymap = "vim"                 default, vim or arrows
    glyphs = "ascii"               ascii or unicode; left out, what the terminal needs
    mouse = false                  leave the mouse to the terminal
    pane = false                   no pane with the details of a row on a wide terminal

    [keys]                         an id and its keys; ``memconsole keys`` lists the ids
    reserve = "N"
    again = "ctrl+r,f5"
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from memconsole import decoding
from memconsole.model import Request


class ConsoleSettings(Request, frozen=True):
    """What ``console.toml`` says."""

    theme: str = ""
    keymap: str = ""
    glyphs: Literal["", "ascii", "unicode"] = ""
    mouse: bool = True
    pane: bool = True
    keys: dict[str, str] = msgspec.field(default_factory=dict)

    def place(self, word: str) -> str:
        """Where a word is set, as complaints name it."""
        return word


class FileSettings(ConsoleSettings, frozen=True):
    """Settings of a file: its path, and the line of each word that is set in it."""

    path: str = ""
    lines: dict[str, int] = msgspec.field(default_factory=dict)

    def place(self, word: str) -> str:
        """The file and the line."""
        return f"{self.path} line {self.lines[word]}" if word in self.lines else self.path


def settings_paths() -> tuple[Path, ...]:
    """Where ``console.toml`` is looked for; the first one counts."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "memconsole" / "console.toml", Path("/etc/memconsole/console.toml"))


def load(paths: Sequence[Path] | None = None) -> ConsoleSettings:
    """The settings of the first file there is, else the defaults.

    Raises:
        BadFile: it cannot be read, is not TOML, or sets something unknown.
    """
    for path in settings_paths() if paths is None else paths:
        if not path.is_file():
            continue
        remedy = "correct it or move it away"
        raw = decoding.contents(path, limit=decoding.SETTINGS, remedy=remedy)
        table = decoding.toml(raw, what=str(path), remedy=remedy)
        if isinstance(keys := table.get("keys"), dict):
            table["keys"] = _flat(keys)
        found = decoding.convert(table, ConsoleSettings, what=str(path), remedy=remedy)
        words = {name: getattr(found, name) for name in found.__struct_fields__}
        return FileSettings(**words, path=str(path), lines=_lines(decoding.text(raw)))
    return ConsoleSettings()


def _flat(table: dict[str, Any], lead: str = "") -> dict[str, Any]:
    """A table with ``a.b = x`` for what TOML takes for a table ``a`` with a ``b``, where ids have dots."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{lead}{name}.") if isinstance(value, dict) else {lead + name: value}
    return found


_SETTING = re.compile(r"""\s*(?:keys\s*\.\s*)?(?:"([^"]+)"|'([^']+)'|([\w.-]+))\s*=""")


def _lines(text: str) -> dict[str, int]:
    """The line, from 1, on which each word is set."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _SETTING.match(line):
            found.setdefault(next(filter(None, match.groups())), number)
    return found
