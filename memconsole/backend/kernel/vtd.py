"""Intel's second-level page tables as debugfs shows them, as tables of extents by IOVA.

    /sys/kernel/debug/iommu/intel/BDF/domain_translation_struct   the grammar stands in native/iommu.c

Before Linux 6.5 one file above that one holds every device. It can have a line for each page of a guest: it is read
in pieces of ``CHUNK`` bytes, and only the runs are kept. (The kernel itself makes the whole text when it is opened.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import BadFile, NotFound
from memconsole.units import PAGE

# A host without page tables in debugfs needs no native core to say so.
if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

DEBUGFS = "/sys/kernel/debug/iommu/intel"
CHUNK = 1 << 20
NAME_MAX = 31
"""Bytes of a device's name that the native parser compares."""
_FILE = "domain_translation_struct"


class Iova(NamedTuple):
    """A run of IOVA: ``iova`` and ``pfn`` are page numbers, ``pages`` of 4 KiB, ``huge`` from leaves above 4 KiB."""

    iova: int
    pfn: int
    pages: int
    access: str
    huge: bool


class TooMany(Exception):
    """A device's page tables have more leaves than their reader wanted to look at."""


class NoTable(NotFound):
    """The driver translates nothing for a device: it is blocked, or reaches physical memory as it is."""


class Budget(msgspec.Struct):
    """How many page table leaves a reader is still willing to look at, over all the tables it reads."""

    leaves: int

    def spend(self, leaves: int) -> None:
        """Look at so many.

        Raises:
            TooMany: the budget does not last.
        """
        self.leaves -= leaves
        if self.leaves < 0:
            raise TooMany


def table(root: Root, bdf: str, budget: Budget | None = None) -> ExtentTable:
    """A device's address space by IOVA page, which the caller closes; rows have READ, WRITE and HUGE.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NoTable: the IOMMU has none for it.
        NotFound: no debugfs, or no such device.
        Denied, KernelRefused: it cannot be read.
        BadFile: it is not as the kernel writes it.
    """
    try:
        fd = _open(root, f"{DEBUGFS}/{bdf}/{_FILE}")
    except NotFound:
        fd = _open(root, f"{DEBUGFS}/{_FILE}")
    with os.fdopen(fd, "rb", buffering=0) as file:
        return parse(iter(lambda: file.read(CHUNK), b""), bdf, budget)


def parse(chunks: Iterable[bytes], bdf: str, budget: Budget | None = None) -> ExtentTable:
    """The same from a dump given piece by piece; leaves that follow each other in IOVA, frame and access are one row.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NoTable: none in it is the device's.
        BadFile: it is not as the kernel writes it, or it is cut off within a line.
    """
    from memconsole import native
    from memconsole.extents import ExtentTable
    from memconsole.native import ffi, lib

    if len(bdf.encode()) > NAME_MAX:
        raise NotFound(f"device {bdf} has no page tables", f"names of devices have at most {NAME_MAX} bytes here")
    what = f"{_FILE} of {bdf} is not as the kernel writes it"
    out = ffi.new("struct mc_table **")
    native.call(what, lib.mc_table_new, out, PAGE)
    found = ExtentTable(out[0])
    dump = ffi.new("struct mc_dump *", {"device": bdf.encode()})
    try:
        for chunk in chunks:
            before = dump.leaves
            native.call(what, lib.mc_dump_feed, found.handle, dump, ffi.from_buffer(chunk), len(chunk))
            if budget is not None:
                budget.spend(dump.leaves - before)
        native.call(what, lib.mc_dump_end, found.handle, dump)
    except BadFile as error:
        found.close()
        raise BadFile(error.what, error.why) from None
    except BaseException:
        found.close()
        raise
    if not dump.own:
        found.close()
        raise NoTable(f"device {bdf} has no page tables", f"{_FILE} has none of it")
    return found


def iovas(root: Root, bdf: str) -> Iterator[Iova]:
    """The rows of :func:`table` as IOVA runs, in order.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: as :func:`table`.
    """
    from memconsole.extents import Flag

    with table(root, bdf) as found:
        for row in found:
            access = ("r" if row.flags & Flag.READ else "") + ("w" if row.flags & Flag.WRITE else "")
            yield Iova(row.offset, row.pfn, row.count, access, bool(row.flags & Flag.HUGE))


def _open(root: Root, path: str) -> int:
    try:
        return os.open(tree.below(root, path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error
