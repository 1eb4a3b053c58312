r"""Which RAM block of a running QEMU is where, by its own word: in its process, and in its guest's physical addresses.

    query-memdev          the memory backends: id, size, share
    info mtree -f         the FlatView of address space "memory"
    gpa2hva ADDRESS       where a guest physical address is in QEMU's process
    query-migrate         whether it is on its way elsewhere

``info mtree -f`` (QEMU's monitor/hmp-cmds, system/memory.c: mtree_print_flatview)::

    views  = { "FlatView #" N "\n" { " AS \"" NAME "\", root: " TEXT "\n" } " Root memory region: " TEXT "\n" row }
    row    = { "  " START "-" END " (prio " P ", " TYPE "): " NAME [ " @" OFFSET ] [ " KVM" ] "\n" }

START, END and OFFSET are 16 hexadecimal digits, END is the last byte. A block is in several rows: registers and ROM lie
over it. Rows with the same difference between address and offset are one part of it; what lies over it is inside.

``gpa2hva``: ``Host virtual address for 0xN (NAME) is 0xN``. ``info ramblock`` says the same of all blocks at once, but
not before QEMU 8.1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memconsole import decoding
from memconsole.backend.kernel.kvm import options
from memconsole.errors import GuestError
from memconsole.model.base import Value

Ask = Callable[[str, Mapping[str, object]], Any]
"""A monitor: what QEMU returns for a QMP command with its arguments; GuestError where it does not."""

LARGEST = 8 << 20
"""The most bytes of an answer: a tree of memory has some ten kilobytes, a host's worth of devices more."""

_ROW = re.compile(
    r"  (?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, (?P<type>[a-z/-]+)\): "
    r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?",
    re.ASCII,
)
_SPACE = re.compile(r' AS "(?P<name>.*)", root: .*')
_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.+)\) is 0x(?P<hva>[0-9a-f]{1,16})\s*", re.ASCII)
_MEMORY = "memory"
_TYPES = frozenset({"ram", "nv-ram"})
_OBJECTS = "/objects/"
_WHAT = "what QEMU says of its memory"
_UNDER_WAY = frozenset({"setup", "active", "postcopy-active", "postcopy-paused", "pre-switchover", "device", "colo"})
"""States of a migration in which RAM is on its way, or is about to be."""


class BlockPart(NamedTuple):
    """A part of a block: ``size`` bytes from ``offset`` in it, at guest physical address ``gpa``."""

    gpa: int
    offset: int
    size: int


class Block(NamedTuple):
    """A RAM block that the guest has: ``hva`` where QEMU's process maps it, ``parts`` by address, ``nv``: an nvdimm."""

    name: str
    size: int
    shared: bool
    hva: int
    parts: tuple[BlockPart, ...]
    nv: bool = False


def file_name(block: str) -> str:
    """What libvirt calls a block in the directory that it makes for RAM."""
    return block.removeprefix("mem") if block.startswith("memdimm") else block


class MemoryBackend(NamedTuple):
    """A memory backend in QEMU's command line, as far as it is said there."""

    id: str
    type: str
    shared: bool


class _Backend(Value, frozen=True):
    id: str = ""
    size: int = 0
    share: bool = False


class _Migration(Value, frozen=True):
    status: str = "none"


def blocks(ask: Ask) -> tuple[Block, ...]:
    """The blocks of a guest's RAM that are mapped in its physical addresses, by address.

    Raises:
        GuestError: QEMU does not answer, or is migrating. Undecodable: it answers in a way that is not known here.
    """
    migration = decoding.convert(ask("query-migrate", {}), _Migration, what=_WHAT)
    if migration.status in _UNDER_WAY:
        why = f"query-migrate says {migration.status}"
        raise GuestError("a migration or a save is under way", why, "wait until it has ended", code="JobUnderWay")
    backends = decoding.convert(ask("query-memdev", {}), list[_Backend], what=_WHAT)
    view = flat_view(_said(ask, "info mtree -f"))
    found = []
    for backend in backends:
        rows = view.get(backend.id, ())
        if not backend.id or not rows:
            continue  # an object that no device uses
        parts = merged([part for part, _ in rows])
        first = rows[0][0]
        hva = host_address(_said(ask, f"gpa2hva {first.gpa:#x}"), backend.id) - first.offset
        nv = any(kind == "nv-ram" for _, kind in rows)
        found.append(Block(backend.id, backend.size, backend.share, hva, parts, nv))
    return tuple(sorted(found, key=lambda block: block.parts[0].gpa))


def _said(ask: Ask, command: str) -> str:
    said = ask("human-monitor-command", {"command-line": command})
    return decoding.convert(said, str, what=_WHAT)


def flat_view(text: str) -> dict[str, list[tuple[BlockPart, str]]]:
    """The rows of RAM in address space "memory", with their types, by the name of the block.

    Raises:
        Undecodable: there is no such space, or a row of it is none.
    """
    found: dict[str, list[tuple[BlockPart, str]]] = {}
    ours = seen = False
    for line in text.replace("\r", "").split("\n"):
        space = _SPACE.fullmatch(line)
        if line.startswith("FlatView #"):
            ours = False
        elif space is not None:
            ours = ours or space["name"] == _MEMORY
            seen = seen or ours
        elif ours and line.startswith("  ") and not line.startswith("  No rendered"):
            row = _ROW.fullmatch(line)
            if row is None:
                raise _unread(line)
            if row["type"] in _TYPES:
                start = int(row["start"], 16)
                size = int(row["end"], 16) - start + 1
                if size <= 0:
                    raise _unread(line)
                part = BlockPart(start, int(row["offset"] or "0", 16), size)
                found.setdefault(row["name"].removeprefix(_OBJECTS), []).append((part, row["type"]))
    if not seen:
        raise _unread(f"no address space {_MEMORY!r}")
    return found


def merged(parts: Sequence[BlockPart]) -> tuple[BlockPart, ...]:
    """The parts of a block by address, those that differ only by what lies over them as one."""
    by_shift: dict[int, tuple[int, int]] = {}
    for part in parts:
        shift = part.gpa - part.offset
        start, end = by_shift.get(shift, (part.offset, part.offset + part.size))
        by_shift[shift] = min(start, part.offset), max(end, part.offset + part.size)
    return tuple(sorted(BlockPart(shift + start, start, end - start) for shift, (start, end) in by_shift.items()))


def host_address(text: str, block: str) -> int:
    """Where a guest physical address is in QEMU's process, which must be in this block.

    Raises:
        Undecodable: QEMU says something else.
    """
    said = _HVA.fullmatch(text.strip())
    if said is None or said["name"].removeprefix(_OBJECTS) != block:
        raise _unread(text.strip()[:200])
    return int(said["hva"], 16)


def _unread(text: str) -> decoding.Undecodable:
    remedy = "report it, with the version of this QEMU"
    return decoding.Undecodable(_WHAT, f"it is not as this memconsole knows it: {text!r}", remedy, fault="malformed")


def backends(command: Sequence[str]) -> tuple[MemoryBackend, ...]:
    """The memory backends in a QEMU's command line (``-object``), in either way of writing them.

    Raises:
        Undecodable: an object written in JSON is none.
    """
    found = []
    for flag, value in itertools.pairwise(command):
        if flag not in {"-object", "--object"}:
            continue
        if value.startswith("{"):
            said = decoding.json(value.encode(), dict[str, Any], what="an -object of QEMU's", limit=LARGEST)
        else:
            said = dict(options(value, "qom-type"))
        kind = str(said.get("qom-type", ""))
        if kind.startswith("memory-backend-"):
            shared = said.get("share") in {True, "on", "yes", "true"}
            found.append(MemoryBackend(str(said.get("id", "")), kind, shared))
    return tuple(found)
