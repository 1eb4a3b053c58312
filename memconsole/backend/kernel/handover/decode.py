"""One handover from its root FDT: what a kernel will hand over (``out``), was handed (``in``), or had when dumped.

    /        compatible="kho-v4"; preserved-memory-map=<u64 PA of the radix tree>
    /NAME    preserved-data=<u64 PA>; blob-size=<u64>

``compatible`` is a word of :mod:`.abi`, or several: one that is known here is enough. A root that has none is opaque.
A blob is known by the name KHO gives it (``kexec-metadata``: u32 version=1, char previous_release[65], u32
kexec_count) or by the ABI it names itself (LUO's, or an FDT's ``compatible``); any other is opaque.

What can be read on Linux 7.3: before the jump all but LUO's sessions, which are written at the jump; after it the root
FDT and the metadata only, for the pages of the tree, of LUO's state and of its lists are freed when the kernel boots.
A kernel that was itself booted through KHO does not show its own outgoing FDT, which is then looked for in memory.
A dump taken at the jump has all of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Literal

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.handover import abi, fdt, radix, records
from memconsole.backend.kernel.handover.fdt import FdtNode
from memconsole.backend.kernel.handover.memory import Core, PhysicalMemory, this_host
from memconsole.backend.kernel.handover.values import Blob, Handover, Luo, Metadata, Preserved
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.model import Range, Unread
from memconsole.units import PAGE

Side = Literal["out", "in"]

DEBUGFS = "/sys/kernel/debug/kho"
ROOTS = frozenset({"kho-v4"})
SEARCHED = 64 << 30
"""Bytes of memory in which an outgoing FDT is looked for."""

_STRINGS = b"preserved-memory-map\0compatible\0preserved-data\0blob-size\0"
_METADATA = struct.Struct("=I65sI")
_MAP, _DATA, _SIZE = "preserved-memory-map", "preserved-data", "blob-size"
_LARGEST_BLOB = 1 << 20
_TREE = "the tree of preserved pages"
_FREED = "the kernel freed its pages when it booted"


def decode(blob: bytes, memory: PhysicalMemory, side: str = "") -> Handover:
    """The handover whose root FDT is ``blob``; parts that cannot be read are gaps.

    Raises:
        BadFile: it is no FDT.
    """
    return _Decoder(memory, side, lambda _, address, size: memory.read(address, size)).decode(blob)


def live(side: Side) -> Handover:
    """What this kernel will hand over at the next jump (``out``), or what was handed to it (``in``).

    Raises:
        NotFound: this kernel has no KHO, or was not booted through it. Denied: not root, or the kernel is locked down.
        BadFile: what debugfs shows is no FDT.
    """
    with this_host() as memory:
        if side == "in":
            blob = tree.read("/", f"{DEBUGFS}/in/fdt", limit=PAGE)
            return _Decoder(memory, side, _incoming, freed=True).decode(blob)
        try:
            blob = tree.read("/", f"{DEBUGFS}/out/fdt", limit=PAGE)
        except NotFound:
            blob = _outgoing(memory)
        return decode(blob, memory, side)


def describe(path: str) -> tuple[Handover, ...]:
    """What a file says of handovers: a root FDT alone, or a dump (an ELF core) with all that is in it.

    A dump may have several root FDTs: what was handed in, and what will be handed out. ``side`` is their address.

    Raises:
        BadFile: it is neither. NotFound, Denied, KernelRefused: it cannot be read.
    """
    head = _head(path)
    if head.startswith(fdt.MAGIC):
        if not _is_root(head):
            raise BadFile(f"{path} is no root FDT of KHO", f"its compatible is {', '.join(_kinds(head))!r}")
        return (decode(head, _NoMemory()),)
    with Core(path) as memory:
        found = []
        for address in memory.find(fdt.MAGIC, memory.size):
            blob = memory.read(address, PAGE)
            if _is_root(blob):
                found.append(decode(blob, memory, f"{address:#x}"))
    if not found:
        raise BadFile(f"{path} has no handover", "no page of it is a root FDT of KHO", "dump a kernel that has kho=on")
    return tuple(found)


class _NoMemory:
    """The memory of a tree that came alone."""

    def read(self, address: int, _length: int) -> bytes:
        raise BadFile(f"there is no memory at {address:#x}", "the file is a tree alone")


class _Decoder:
    """Collects the parts of a handover; one that cannot be read becomes a gap and does not cost the others."""

    def __init__(
        self, memory: PhysicalMemory, side: str, contents: Callable[[str, int, int], bytes], *, freed: bool = False
    ) -> None:
        self._memory = memory
        self._side = side
        self._contents = contents
        self._freed = freed
        self._gaps: list[Unread] = []
        self._metadata: Metadata | None = None
        self._luo: Luo | None = None
        self._reserved: tuple[Range, ...] = ()

    def decode(self, blob: bytes) -> Handover:
        """All of it.

        Raises:
            BadFile: ``blob`` is no FDT.
        """
        root = fdt.parse(blob, _STRINGS)
        offered = root.texts("compatible")
        kind = next((each for each in offered if each in ROOTS), ", ".join(offered))
        if kind not in ROOTS:
            return Handover(self._side, kind)
        return Handover(
            self._side,
            kind,
            preserved=self._preserved(root),
            blobs=tuple(blob for node in root.children.values() for blob in self._blob(node)),
            metadata=self._metadata,
            luo=self._luo,
            reserved=self._reserved,
            gaps=tuple(self._gaps),
        )

    def _preserved(self, root: FdtNode) -> Preserved | None:
        if self._freed:
            self._gaps.append(Unread(_TREE, _FREED, "a dump taken at the jump has it"))
            return None
        try:
            return radix.walk(self._memory, root.number(_MAP))
        except tree.UNREADABLE as error:
            self._gaps.append(_gap(_TREE, error))
            return None

    def _blob(self, node: FdtNode) -> list[Blob]:
        """A child of the root, and what is behind it."""
        try:
            address, size = node.number(_DATA), node.number(_SIZE)
        except BadFile as error:
            self._gaps.append(_gap(node.name, error))
            return []
        kind = "opaque"
        try:
            if size > _LARGEST_BLOB:
                raise BadFile(f"{node.name} is corrupt", f"it has {size} bytes")
            kind = self._read(node.name, self._contents(node.name, address, size))
        except tree.UNREADABLE as error:
            self._gaps.append(_gap(node.name, error))
        return [Blob(node.name, address, size, kind)]

    def _read(self, name: str, data: bytes) -> str:
        """Decodes a blob; its ABI."""
        if name == "kexec-metadata":
            return self._read_metadata(data)
        if data.startswith(fdt.MAGIC):
            found = fdt.parse(data)
            if "memblock-v1" in found.texts("compatible"):
                self._reserved = tuple(_reserved(child) for child in found.children.values())
            return ", ".join(found.texts("compatible")) or "opaque"
        kind = records.compatible(data)
        if kind in records.LUO:
            self._luo = records.luo(self._memory, data)
        elif name == "LUO" and self._freed:
            self._gaps.append(Unread("LUO", _FREED, "a dump taken at the jump has it"))
        return kind

    def _read_metadata(self, data: bytes) -> str:
        if len(data) < _METADATA.size:
            raise BadFile("kexec-metadata is truncated", f"{len(data)} bytes of {_METADATA.size}")
        version, release, count = _METADATA.unpack_from(data)
        if version != 1:
            return "opaque"
        self._metadata = Metadata(tree.text(release.split(bytes(1))[0]), count)
        return "kexec-metadata-v1"


def _gap(source: str, error: MemconsoleError) -> Unread:
    """What is missing, with the structure that was torn."""
    return Unread(source, f"{error.what}: {error.why}" if error.why else error.what, error.remedy)


def _incoming(name: str, _address: int, size: int) -> bytes:
    return tree.read("/", f"{DEBUGFS}/in/sub_fdts/{name}", limit=size)


_place: dict[str, int] = {}
"""Where the outgoing root FDT of the kernel of this boot ID is: it stays there."""


def _outgoing(memory: PhysicalMemory) -> bytes:
    boot_id = tree.line("/", "/proc/sys/kernel/random/boot_id")
    if boot_id not in _place:
        _place[boot_id] = _search(memory)
    return memory.read(_place[boot_id], PAGE)


def _search(memory: PhysicalMemory) -> int:
    """Where the outgoing root FDT of this kernel is: a page of KHO whose metadata is what debugfs shows as outgoing.

    Raises:
        NotFound: there is none.
    """
    metadata = tree.read("/", f"{DEBUGFS}/out/sub_fdts/kexec-metadata")
    if isinstance(memory, Core):
        for address in memory.find(fdt.MAGIC, SEARCHED):
            blob = memory.read(address, PAGE)
            try:
                node = fdt.parse(blob, _STRINGS).children["kexec-metadata"]
                if memory.read(node.number(_DATA), len(metadata)) == metadata:
                    return address
            except (BadFile, KeyError):
                # Memory is full of other trees, and of what is left of them.
                continue
    raise NotFound(
        "this kernel's outgoing FDT is not to be found",
        f"{DEBUGFS}/out/fdt is not there on a kernel booted through KHO, and no page of memory holds it",
        "run as root, where /proc/kcore can be read",
    )


def _kinds(blob: bytes) -> tuple[str, ...]:
    try:
        return fdt.parse(blob, _STRINGS).texts("compatible")
    except BadFile:
        return ()


def _is_root(blob: bytes) -> bool:
    """Whether a tree is KHO's, of a version that is known here or not."""
    return any(abi.family(each) == "kho" for each in _kinds(blob))


def _reserved(node: FdtNode) -> Range:
    start = node.number("start")
    return Range(start, start + node.number("size"), node.name)


def _head(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, PAGE)
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(path, error) from error
