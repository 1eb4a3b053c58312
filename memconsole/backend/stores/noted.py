"""Which arenas a host had (``arenas.json`` of the state directory): for a kernel that does not set their ranges aside.

An arena says of itself all that is needed, where its range is set aside. Where it is not, its range is ordinary memory
to this kernel, nothing is found in it, and somebody has to say what to boot. Noted are the arenas that were in use; one
stays noted until it is removed, or its range is another arena's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from memconsole import decoding, wholefile
from memconsole.actions import NAME
from memconsole.backend.kernel import cmdline, pmem
from memconsole.backend.kernel.cmdline import MemmapRange
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import ranges
from memconsole.errors import MemconsoleError
from memconsole.model import Finding, Severity, Value
from memconsole.units import format_address, format_size

if TYPE_CHECKING:
    from memconsole.backend.stores.base import Store

IDS = frozenset({"arena-missing", "arena-note"})
"""The findings that are of what was noted."""
FILE = "arenas.json"
_LIMIT = 1 << 20
_RESERVED = "$"
"""The mark of ``memmap=`` whose range the kernel shows no device for."""


class NotedArena(Value, frozen=True, kw_only=True):
    """An arena, bytes from a physical address; without a ``word`` of the command line, hardware sets it aside."""

    name: str
    start: int
    size: int
    word: str = ""


class Noted(Value, frozen=True, kw_only=True):
    """What is in the file."""

    arenas: tuple[NotedArena, ...] = ()


def word_of(start: int | None, root: Root = "/") -> str:
    """The word of this kernel's command line (``memmap=nn!ss``) that sets an address aside; empty where none does."""
    for each in cmdline.memmaps(cmdline.read(root)):
        if each.mark in "!$" and start is not None and each.start <= start < each.start + each.size:
            return f"memmap={each.said}"
    return ""


class ArenaNotes:
    """The arenas that one control process has noted."""

    def __init__(self, state_dir: Path, root: Root = "/") -> None:
        self._path = state_dir / FILE
        self._root = root
        self._noted: tuple[NotedArena, ...] = ()
        self._why = ""
        with self._troubles("read"):
            self._noted = self._read()

    def look(self, stores: Iterable[Store]) -> None:
        """Note the arenas that are in use now."""
        here = []
        for store in stores:
            for each in store.held_ranges():
                word = word_of(each.start, self._root)
                here.append(NotedArena(name=each.name, start=each.start, size=each.size, word=word))
        kept = [old for old in self._noted if not any(_overlap(old, new) or old.name == new.name for new in here)]
        self._write((*kept, *here))

    def forget(self, name: str) -> None:
        """Have an arena be noted no more."""
        self._write(tuple(each for each in self._noted if each.name != name))

    def missing(self) -> tuple[NotedArena, ...]:
        """The noted arenas whose ranges this kernel does not show."""
        if not self._noted:
            return ()
        words = cmdline.memmaps(cmdline.read(self._root))
        shown = [(each.start, each.size) for each in pmem.devices(self._root, [])]
        shown += [(each.start, each.size) for each in ranges.devdax(self._root)]
        return tuple(each for each in self._noted if not _is_shown(each, words, shown))

    def findings(self) -> tuple[Finding, ...]:
        """What of the noted arenas is not there, by name and with what to boot."""
        found = []
        with self._troubles("looked for"):
            found = [self._missing(each) for each in self.missing()]
        if self._why:
            remedy = f"see that {self._path} can be written to; then memconsole arena scan"
            found.append(Finding("arena-note", Severity.WARNING, "arenas", self._why, str(self._path), remedy))
        return tuple(found)

    def _missing(self, arena: NotedArena) -> Finding:
        what = f"arena {arena.name}, {format_size(arena.size)} at {format_address(arena.start)}, is not there"
        if not arena.word:
            why, remedy = "its device (an NVDIMM, or CXL memory) is not shown", "ndctl list -v and dmesg say more"
        elif word_of(arena.start, self._root):
            why = f"this kernel sets it aside ({arena.word}) and shows no device for it"
            remedy = "boot a kernel that has CONFIG_X86_PMEM_LEGACY, BLK_DEV_PMEM and FS_DAX; nothing in it is lost"
        else:
            why = f"this kernel's command line lacks {arena.word}"
            remedy = (
                f"boot with {arena.word}, at once: to this kernel its range is ordinary memory, which it may overwrite;"
                f" memconsole wrote nothing there. If it is no longer needed: memconsole arena remove {arena.name}"
            )
        return Finding("arena-missing", Severity.ERROR, arena.name, f"{what}: {why}", "/proc/cmdline", remedy)

    @contextlib.contextmanager
    def _troubles(self, done: str) -> Iterator[None]:
        try:
            yield
        except (MemconsoleError, OSError) as error:
            self._why = f"which arenas this host had cannot be {done}: {error}"

    def _read(self) -> tuple[NotedArena, ...]:
        if not self._path.exists():
            return ()
        raw = decoding.contents(self._path, limit=_LIMIT)
        found = decoding.json(raw, Noted, what=str(self._path), limit=_LIMIT)
        return tuple(each for each in found.arenas if re.fullmatch(NAME, each.name))

    def _write(self, arenas: tuple[NotedArena, ...]) -> None:
        if arenas == self._noted and not self._why:
            return
        self._noted, self._why = arenas, ""
        with self._troubles("written down"), wholefile.written(self._path, lasting=True) as file:
            file.write(msgspec.json.encode(Noted(arenas=arenas)))


def _overlap(one: NotedArena, other: NotedArena) -> bool:
    return one.start < other.start + other.size and other.start < one.start + one.size


def _is_shown(arena: NotedArena, words: Iterable[MemmapRange], shown: Iterable[tuple[int | None, int]]) -> bool:
    """Whether a device, or a word of the command line that makes none (``$``), has all of an arena's range."""
    here = list(shown)
    if _RESERVED in arena.word:
        here += [(each.start, each.size) for each in words if each.mark == _RESERVED]
    return any(
        start is not None and start <= arena.start and arena.start + arena.size <= start + size for start, size in here
    )
