"""Physical memory as bytes.

An ELF core is ``Ehdr64 Phdr64*`` and the bytes of its segments; of interest are those of type PT_LOAD, each
``p_filesz`` bytes of memory from physical address ``p_paddr`` on at file offset ``p_offset``. /proc/kcore is such a
file (of the kernel that runs; it gives the direct map's segments a ``p_paddr`` and all others -1), and so are the dumps
of QEMU and kdump.
"""

from __future__ import annotations

import bisect
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

from memconsole.backend.kernel import tree
from memconsole.errors import BadFile, Denied, NotFound
from memconsole.units import PAGE

KCORE, DEVMEM = "/proc/kcore", "/dev/mem"
PAGE_MASK = PAGE - 1
_EHDR = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _ET_CORE, _CLASS64, _LITTLE = 1, 4, 2, 1
_NO_ADDRESS = (1 << 64) - 1
_CHUNK = 1 << 20


class PhysicalMemory(Protocol):
    """Physical memory: ``read`` gives exactly ``length`` bytes, or raises BadFile where there is no memory."""

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from physical ``address`` on."""
        ...


class CoreSegment(NamedTuple):
    """``size`` bytes of memory from ``address`` on, at ``offset`` of the file."""

    address: int
    size: int
    offset: int


class Core:
    """Memory in an ELF core file; a context manager."""

    def __init__(self, path: str) -> None:
        """Opens ``path``.

        Raises:
            BadFile: not a core with physical addresses, or truncated. NotFound, Denied, KernelRefused: see tree.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise tree.failure(path, error) from error
        try:
            self.segments = tuple(self._segments())
        except BaseException:
            self.close()
            raise
        self._starts = [segment.address for segment in self.segments]

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from physical ``address`` on, which may lie in several segments.

        Raises:
            BadFile: the file has no such memory, or ends before it.
        """
        parts = []
        while length:
            segment = self._holding(address)
            within = address - segment.address
            parts.append(self._at(segment.offset + within, min(length, segment.size - within)))
            address += len(parts[-1])
            length -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def size(self) -> int:
        """Bytes of memory in the file."""
        return sum(segment.size for segment in self.segments)

    def find(self, needle: bytes, limit: int) -> Iterator[int]:
        """Addresses of the pages that begin with ``needle``, of the first ``limit`` bytes of memory."""
        for segment in self.segments:
            for begin in range(0, segment.size, _CHUNK):
                length = min(_CHUNK, segment.size - begin)
                limit -= length
                if limit < 0:
                    return
                chunk = self._at(segment.offset + begin, length)
                at = chunk.find(needle)
                while at >= 0:
                    if not (segment.address + begin + at) & PAGE_MASK:
                        yield segment.address + begin + at
                    at = chunk.find(needle, at + 1)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _at(self, offset: int, length: int) -> bytes:
        """Bytes of the file; /proc/kcore may give fewer at a time than were asked for."""
        parts = bytearray()
        while len(parts) < length:
            try:
                part = os.pread(self._fd, length - len(parts), offset + len(parts))
            except OverflowError as error:
                raise BadFile(f"{self.path} is not a core", f"a segment at offset {offset:#x}") from error
            except OSError as error:
                raise tree.failure(self.path, error) from error
            if not part:
                raise BadFile(f"{self.path} is truncated", f"it ends before offset {offset + length:#x}")
            parts += part
        return bytes(parts)

    def _segments(self) -> Iterator[CoreSegment]:
        try:
            magic, word, order, *_, kind, _machine, _version, _entry, table, _, _, _, size, count, _, _, _ = (
                _EHDR.unpack(self._at(0, _EHDR.size))
            )
        except BadFile as error:
            raise BadFile(f"{self.path} is not an ELF core", "it is too short") from error
        if (magic, word, order, kind, size) != (b"\x7fELF", _CLASS64, _LITTLE, _ET_CORE, _PHDR.size):
            raise BadFile(f"{self.path} is not an ELF core", "its header is not that of a 64-bit little-endian core")
        headers = self._at(table, count * size)
        found = sorted(
            CoreSegment(address, length, offset)
            for kind, _flags, offset, _virtual, address, length, _memory, _align in _PHDR.iter_unpack(headers)
            if kind == _PT_LOAD and address != _NO_ADDRESS and length
        )
        if not found:
            raise BadFile(f"{self.path} has no physical memory", "no segment has a physical address")
        end = 0
        for segment in found:
            # A kernel's own text is in the direct map too; the segment that reaches further is enough.
            skip = max(0, end - segment.address)
            if skip < segment.size:
                yield CoreSegment(segment.address + skip, segment.size - skip, segment.offset + skip)
                end = segment.address + segment.size

    def _holding(self, address: int) -> CoreSegment:
        row = bisect.bisect_right(self._starts, address) - 1
        if row < 0 or address >= self.segments[row].address + self.segments[row].size:
            raise BadFile(f"there is no memory at {address:#x}", f"{self.path} has none there")
        return self.segments[row]


class DevMem:
    """Memory through /dev/mem, where the kernel shows RAM there (STRICT_DEVMEM off); a context manager."""

    def __init__(self, path: str = DEVMEM) -> None:
        """Opens ``path``.

        Raises:
            NotFound, Denied, KernelRefused: see tree.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise tree.failure(path, error) from error

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from physical ``address`` on.

        Raises:
            BadFile: there is no memory. Denied: the kernel does not show it.
        """
        try:
            data = os.pread(self._fd, length, address)
        except OverflowError:
            data = b""
        except OSError as error:
            if error.errno in {errno.EFAULT, errno.EINVAL}:
                data = b""
            else:
                raise tree.failure(self.path, error) from error
        if len(data) != length:
            raise BadFile(f"there is no memory at {address:#x}", f"{self.path} gave {len(data)} of {length} bytes")
        return data

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def this_host(root: tree.Root = "/") -> Core | DevMem:
    """The memory of the kernel that runs (below ``root``).

    Raises:
        Denied, NotFound, BadFile: neither /proc/kcore nor /dev/mem shows it.
    """
    try:
        return Core(tree.below(root, KCORE))
    except (NotFound, Denied, BadFile) as error:
        try:
            return DevMem(tree.below(root, DEVMEM))
        except (NotFound, Denied) as other:
            raise type(other)("physical memory cannot be read", f"{error}; {other}", other.remedy) from other


class Walk:
    """Reads structures of pages, each page once: what is met twice is a circle, and work is bounded by memory."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._seen: set[int] = set()

    def page(self, address: int, what: str) -> bytes:
        """The page at ``address``.

        Raises:
            BadFile: it is not aligned, was read before, or is not there.
        """
        return self.pages(address, 1, what)

    def pages(self, address: int, count: int, what: str) -> bytes:
        """``count`` pages from ``address`` on.

        Raises:
            BadFile: as for :meth:`page`.
        """
        if address & PAGE_MASK or not address:
            raise BadFile(f"{what} is corrupt", f"it should be at {address:#x}, which is no page")
        span = range(address, address + count * PAGE, PAGE)
        if not self._seen.isdisjoint(span):
            raise BadFile(f"{what} is corrupt", f"the page at {address:#x} is met a second time")
        try:
            data = self._memory.read(address, count * PAGE)
        except BadFile as error:
            raise BadFile(f"{what} is corrupt", f"{error.what}: {error.why}") from error
        self._seen.update(span)
        return data
