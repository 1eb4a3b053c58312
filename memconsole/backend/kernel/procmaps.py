r"""The VMAs of a process: /proc/PID/maps, and one VMA by address through PROCMAP_QUERY.

    maps = { START "-" END " " PERMS " " OFFSET " " MAJOR ":" MINOR " " INODE [ blanks PATH ] "\n" }

Numbers but INODE are hexadecimal. PATH is the rest of the line, blanks included; only a newline in it is escaped
(``\012``). An unlinked file's path ends in `` (deleted)``; a memfd's is ``/memfd:NAME (deleted)``, or ``/ (deleted)``
once it was retrieved from a live update session; files of no directory read ``anon_inode:[vfio-device]``, and memory
of no file has no path or a word in brackets.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

import msgspec

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root

_DELETED = " (deleted)"
_QUERY = struct.Struct("=QQQ QQQQ QQ IIII QQ")
_PROCMAP_QUERY = 0xC0686611
_NAME_MAX = 4096
_HUGETLB = ("Shared_Hugetlb", "Private_Hugetlb")
_RESIDENT = ("Rss", *_HUGETLB)
"""The counters of smaps that add up to what has a frame: pages of the hugetlb pool are not in Rss."""


class Vma(msgspec.Struct, frozen=True):
    """One mapping: ``[start, end)`` and ``offset`` in bytes; ``device`` as st_dev; ``deleted``: it has no name."""

    start: int
    end: int
    perms: str
    offset: int
    device: int
    inode: int
    path: str
    deleted: bool

    @property
    def size(self) -> int:
        """Bytes of address space."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file (MAP_SHARED)."""
        return self.perms[3:4] == "s"

    @property
    def writable(self) -> bool:
        """Whether the process may write through it now."""
        return self.perms[1:2] == "w"


def raw(root: Root, pid: int, task: int | None = None) -> bytes:
    """The maps of a process as the kernel writes them, by its thread ``task``; empty for a kernel thread.

    Raises:
        Gone: the process ended.
        Denied: it is another user's.
        KernelRefused: any other errno.
    """
    return tree.read(root, f"{tree.of_process(pid, task)}/maps")


def vmas(root: Root, pid: int, task: int | None = None) -> list[Vma]:
    """The mappings of a process, by address.

    Raises:
        Gone, Denied, KernelRefused: as :func:`raw`.
        BadFile: a line is no mapping.
    """
    return parse(raw(root, pid, task))


def parse(data: bytes, *needles: bytes) -> list[Vma]:
    """The mappings in a maps text; with ``needles``, only those whose line has one of them.

    Raises:
        BadFile: a line that was wanted is no mapping.
    """
    if needles:
        return [_vma(data[start:end]) for start, end in sorted(_holding(data, needles))]
    rows = data.split(b"\n")
    if rows and not rows[-1]:
        rows.pop()
    return [_vma(row) for row in rows]


def _holding(data: bytes, needles: Sequence[bytes]) -> set[tuple[int, int]]:
    """Where the lines begin and end that have a needle: of a host's many lines few do."""
    found = set()
    for needle in needles:
        at = data.find(needle)
        while at >= 0:
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            found.add((data.rfind(b"\n", 0, at) + 1, end))
            at = data.find(needle, end)
    return found


def device_word(device: int) -> bytes:
    """How the mappings of a filesystem's files (by st_dev) are told in a maps text, whatever the files are called."""
    return b" %02x:%02x " % (os.major(device), os.minor(device))


def find(pid: int, address: int) -> Vma | None:
    """The mapping of a process of this host that holds ``address``; None where none does.

    One ioctl where the kernel has PROCMAP_QUERY (6.11), else its maps are read.

    Raises:
        Gone, Denied, KernelRefused: the process cannot be read.
    """
    import fcntl

    source = f"/proc/{pid}/maps"
    name = bytearray(_NAME_MAX)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(source, error) from error
    try:
        query = bytearray(_QUERY.pack(_QUERY.size, 0, address, 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0, _address(name), 0))
        fcntl.ioctl(fd, _PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno == errno.ENOTTY:
            return next((vma for vma in vmas("/", pid) if vma.start <= address < vma.end), None)
        raise tree.failure(f"PROCMAP_QUERY of {source}", error) from error
    finally:
        os.close(fd)
    fields = _QUERY.unpack(query)
    _, _, _, start, end, flags, _, offset, inode, major, minor, length = fields[:12]
    path = tree.text(bytes(name[: max(length - 1, 0)]))
    perms = "".join(letter if flags & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
    return Vma(
        start,
        end,
        perms + ("s" if flags & 8 else "p"),
        offset,
        os.makedev(major, minor),
        inode,
        path.removesuffix(_DELETED),
        path.endswith(_DELETED),
    )


def resident(root: Root, pid: int, wanted: Sequence[Vma], task: int | None = None) -> list[int]:
    """Bytes of each mapping that have a frame: of its file's blocks where it is a memfd, else counted by the kernel.

    A memfd that is shared answers at once, for the whole file; other memory is walked (/proc/PID/smaps), at 10-30 ns a
    page.

    Raises:
        Gone, Denied, KernelRefused, BadFile: the process cannot be read.
    """
    found = [_memfd_resident(task or pid, vma) if tree.live(root) else None for vma in wanted]
    walked = smaps(root, pid, task) if None in found else {}
    return [
        sum(walked.get(vma.start, {}).get(name, 0) for name in _RESIDENT) if known is None else known
        for vma, known in zip(wanted, found, strict=True)
    ]


def _memfd_resident(tid: int, vma: Vma) -> int | None:
    """None where it is no memfd, or may not be asked; never asks a file system, which might be served by ourselves.

    Of a private mapping the pages that were written are not the file's.
    """
    if not (vma.shared and vma.deleted and vma.inode and vma.path.startswith(("/memfd:", "/dev/zero"))):
        return None
    path = f"/proc/{tid}/map_files/{vma.start:x}-{vma.end:x}"
    try:
        return min(os.stat(path).st_blocks * 512, vma.size)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EACCES}:
            return None
        raise tree.failure(path, error) from error


class MappedBytes(msgspec.Struct, frozen=True):
    """How a mapping is mapped, in bytes: ``mapped`` has page table entries, ``huge`` of it by 2 MiB or more an entry.

    ``eligible``: whether the kernel would map it by 2 MiB (``THPeligible``); None where it does not say (before 5.0).
    """

    mapped: int
    huge: int
    eligible: bool | None


_BY_HUGE_PAGES = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", *_HUGETLB)


def paged(root: Root, pid: int, task: int | None = None) -> dict[int, MappedBytes]:
    """How every mapping of a process is mapped, by its start (/proc/PID/smaps, by its thread ``task``).

    The kernel walks 4 KiB pages for it.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    return {start: _paged(counters) for start, counters in smaps(root, pid, task).items()}


def _paged(counters: dict[str, int]) -> MappedBytes:
    def total(*names: str) -> int:
        return sum(counters.get(name, 0) for name in names)

    eligible = counters.get("THPeligible")
    return MappedBytes(total(*_RESIDENT), total(*_BY_HUGE_PAGES), None if eligible is None else bool(eligible))


def smaps(root: Root, pid: int, task: int | None = None) -> dict[int, dict[str, int]]:
    """The counters of every mapping by its start (``Rss``, ``Pss``, ``KernelPageSize``...), in bytes, and its flags.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"{tree.of_process(pid, task)}/smaps"
    found: dict[int, dict[str, int]] = {}
    counters: dict[str, int] = {}
    for row in tree.read(root, source).split(b"\n"):
        words = row.split(None, 3)
        if not words:
            continue
        if words[0].endswith(b":"):
            if len(words) == 3 and words[2] == b"kB" and words[1].isdigit():
                counters[tree.text(words[0][:-1])] = int(words[1]) << 10
            elif len(words) == 2 and words[1].isdigit():
                counters[tree.text(words[0][:-1])] = int(words[1])
        else:
            counters = found.setdefault(_vma(row).start, {})
    return found


def _vma(row: bytes) -> Vma:
    words = row.split(None, 5)
    try:
        start, end = words[0].split(b"-")
        major, minor = words[3].split(b":")
        path = tree.text(words[5]) if len(words) > 5 else ""
        deleted = path.endswith(_DELETED)
        return Vma(
            int(start, 16),
            int(end, 16),
            tree.text(words[1]),
            int(words[2], 16),
            os.makedev(int(major, 16), int(minor, 16)),
            int(words[4]),
            path[: -len(_DELETED)] if deleted else path,
            deleted,
        )
    except (ValueError, IndexError, OverflowError) as error:
        raise tree.malformed("/proc/PID/maps", row) from error


def _address(buffer: bytearray) -> int:
    """Where a buffer stands in memory, for an ioctl that writes through a pointer."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
