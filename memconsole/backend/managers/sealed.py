"""Configuration of a host that memconsole writes and knows again: a file of its own, or a block in another's file.

    file    ... a line ``# Written by memconsole[, and its directory]; sha256 HEX``, HEX that of all its other lines
    block   ``# Begin of memconsole[, which made this file]; sha256 HEX``, lines, ``# End of memconsole``; HEX of these

So what it wrote can be told from what somebody changed since, without a word kept elsewhere. What was changed is
``altered``, and left alone by those who write and those who remove.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from memconsole import decoding, wholefile
from memconsole.errors import KernelRefused

_FILE = re.compile(r"# Written by memconsole(, and its directory)?; sha256 ([0-9a-f]{64})\n")
_BEGIN = re.compile(r"# Begin of memconsole(, which made this file)?; sha256 ([0-9a-f]{64})\n")
_END = "# End of memconsole\n"
_LARGEST = 1 << 20
_UNFINISHED = 0o600
"""The mode of a program until it has its name: whoever runs all programs of its directory meets it once, and whole."""


class Standing(enum.StrEnum):
    """How a part of the configuration stands: as it should, not there, of another version, or changed by others."""

    THERE = "there"
    MISSING = "missing"
    STALE = "stale"
    ALTERED = "altered"


class Look(NamedTuple):
    """A place that was looked at: how it stands, why, the text there (None: no file), and what was made for it."""

    standing: Standing
    why: str = ""
    text: str | None = None
    made: bool = False


class Change(NamedTuple):
    """What is done to a file: its text before and after (None: there is none), and the mode of a new one.

    ``directory``: its directory is made with it, or goes with it.
    """

    path: Path
    before: str | None
    after: str | None
    mode: int = 0o644
    directory: bool = False

    def diff(self, shown: str) -> list[str]:
        """As a unified diff; ``shown`` is what the file is called."""
        was, will = ("/dev/null" if text is None else shown for text in (self.before, self.after))
        before, after = ((text or "").splitlines() for text in (self.before, self.after))
        return list(difflib.unified_diff(before, after, was, will, lineterm=""))


class Whole(NamedTuple):
    """A file of memconsole's own; ``text`` ends with a newline, and its first line stays the first if it is ``#!``."""

    path: Path
    text: str
    mode: int = 0o644

    def look(self) -> Look:
        """How the file stands."""
        text, why = _read(self.path)
        if why:
            return Look(Standing.ALTERED, why, text)
        if text is None:
            return Look(Standing.MISSING, f"there is no {self.path.name}")
        seal = _FILE.search(text)
        if seal is None:
            return Look(Standing.ALTERED, "memconsole did not write it", text)
        if _digest(text[: seal.start()] + text[seal.end() :]) != seal[2]:
            return Look(Standing.ALTERED, "it was changed since memconsole wrote it", text)
        made, mode = bool(seal[1]), stat.S_IMODE(self.path.stat().st_mode)
        if mode == _UNFINISHED != self.mode:
            return Look(Standing.STALE, "it was not written to the end", text, made)
        if mode != self.mode:
            return Look(Standing.ALTERED, f"its mode is not {self.mode:04o}", text)
        if text != self._sealed(made=made):
            return Look(Standing.STALE, "another version of memconsole wrote it", text, made)
        return Look(Standing.THERE, "", text, made)

    def put(self, look: Look) -> Change:
        """What makes it stand as it should."""
        made = look.made if look.text is not None else not self.path.parent.exists()
        return Change(self.path, look.text, self._sealed(made=made), self.mode, made)

    def take(self, look: Look) -> Change:
        """What takes it away."""
        return Change(self.path, look.text, None, self.mode, look.made)

    def _sealed(self, *, made: bool) -> str:
        seal = f"# Written by memconsole{', and its directory' if made else ''}; sha256 {_digest(self.text)}\n"
        first, rest = self.text.split("\n", 1) if self.text.startswith("#!") else ("", self.text)
        return f"{first}\n{seal}{rest}" if first else f"{seal}{rest}"


class Block(NamedTuple):
    """Lines in a file of others; ``text`` ends with a newline."""

    path: Path
    text: str

    def look(self) -> Look:
        """How the block stands."""
        text, why = _read(self.path)
        if why:
            return Look(Standing.ALTERED, why, text)
        begin = _BEGIN.search(text or "")
        if text is None or begin is None:
            return Look(Standing.MISSING, f"{self.path.name} has no lines of memconsole", text)
        end = text.find(_END, begin.end())
        if end < 0 or _digest(text[begin.end() : end]) != begin[2] or _BEGIN.search(text, begin.end()):
            return Look(Standing.ALTERED, "the lines that memconsole wrote were changed since", text)
        stands = Standing.THERE if text[begin.end() : end] == self.text else Standing.STALE
        why = "" if stands is Standing.THERE else "another version of memconsole wrote its lines"
        return Look(stands, why, text, bool(begin[1]))

    def put(self, look: Look) -> Change:
        """What makes it stand as it should: behind what is there, or in the place of an older one."""
        made = look.made or look.text is None
        text = look.text or ""
        begin = _BEGIN.search(text)
        before, after = (text[: begin.start()], self._behind(text, begin.end())) if begin else (text, "")
        if before and not before.endswith("\n"):
            before += "\n"
        head = f"# Begin of memconsole{', which made this file' if made else ''}; sha256 {_digest(self.text)}\n"
        return Change(self.path, look.text, f"{before}{head}{self.text}{_END}{after}")

    def take(self, look: Look) -> Change:
        """What takes it away: the lines, and the file if memconsole made it and nothing else is in it."""
        text = look.text or ""
        begin = _BEGIN.search(text)
        rest = text[: begin.start()] + self._behind(text, begin.end()) if begin else text
        return Change(self.path, look.text, None if look.made and not rest else rest)

    def _behind(self, text: str, start: int) -> str:
        return text[text.index(_END, start) + len(_END) :]


def make(change: Change) -> None:
    """Make a change, as a whole or not at all.

    Raises:
        KernelRefused: the file system does not let it.
    """
    path = change.path
    try:
        if change.after is None:
            path.unlink()
            if change.directory and not any(path.parent.iterdir()):
                path.parent.rmdir()
            return
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        like = None if change.before is None else path.stat()
        mode = change.mode if like is None or change.mode & 0o111 else stat.S_IMODE(like.st_mode)
        _write(path, change.after, like, mode)
    except OSError as error:
        raise KernelRefused(str(path), error.errno or 0, remedy="see what the file system lets root do there") from None


def _write(path: Path, text: str, like: os.stat_result | None, mode: int) -> None:
    """Write a file as a whole, with the owner of the one it replaces."""
    owner = None if like is None else (like.st_uid, like.st_gid)
    with wholefile.written(path, mode=_UNFINISHED if mode & 0o111 else mode, owner=owner, lasting=True) as file:
        file.write(text.encode())
    path.chmod(mode)


def _read(path: Path) -> tuple[str | None, str]:
    """The text of a file, and why it is none of ours to touch; no text where there is no file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None, "it is no regular file"
        if path.stat().st_size > _LARGEST:
            return None, f"it has more than {_LARGEST} bytes"
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        raise KernelRefused(str(path), error.errno or 0, remedy="run as root") from None
    text = decoding.text(raw)
    return (text, "") if text.encode() == raw else (text, "it is not UTF-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
