r"""Intel's second-level page tables as debugfs shows them, streamed and coalesced.

    dump   = { table | note }
    table  = "Device " BDF [ " with pasid " HEX ] " @0x" ROOT "\n"  "IOVA_PFN" titles "\n"  { leaf "\n" } "\n"
    leaf   = "0x" IOVA_PFN " |" 5 * ( "\t0x" ENTRY )        PML5E PML4E PDPE PDE PTE; hexadecimal
    note   = "DMA Remapping is not enabled on " NAME "\n"

A leaf of a large page stops early: the entries below it are zero. The target PFN is bits 12-51 of the last entry that
is not; bit 0 allows reading, bit 1 writing (a first-level table's bits 0 and 1, present and writable, read alike).
The file is /sys/kernel/debug/iommu/intel/BDF/domain_translation_struct; before Linux 6.5 one file above it holds
every device. It can have a line for each page of a guest: nothing here keeps more than one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound

DEBUGFS = "/sys/kernel/debug/iommu/intel"
_FILE = "domain_translation_struct"
_TABLE = re.compile(rb"Device ([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?: with pasid ([0-9a-f]+))? @0x([0-9a-f]+)")
_CHUNK = 1 << 20
_PFN_MASK = (1 << 40) - 1
_PAGES_MAX = (1 << 32) - 1
_ACCESS = ("", "r", "w", "rw")


class Iova(NamedTuple):
    """A run of IOVA: ``iova`` and ``pfn`` are page numbers, ``pages`` of 4 KiB, ``huge`` from leaves above 4 KiB."""

    device: str
    iova: int
    pfn: int
    pages: int
    access: str
    huge: bool


class TooMany(Exception):
    """A dump has more leaves than its reader wanted to look at."""


def iovas(root: Root, bdf: str, *, leaves_max: int | None = None) -> Iterator[Iova]:
    """The IOVA runs of one device's address space, in order, in constant memory.

    Raises:
        TooMany: after ``leaves_max`` page table leaves, if that is given.
        NotFound: no debugfs, no such device, or the IOMMU does not translate for it.
        Denied, KernelRefused: it cannot be read.
        BadFile: it is not as the kernel writes it.
    """
    try:
        fd = _open(root, f"{DEBUGFS}/{bdf}/{_FILE}")
    except NotFound:
        fd = _open(root, f"{DEBUGFS}/{_FILE}")
    with os.fdopen(fd, "rb", buffering=0) as file:
        for run in parse(iter(lambda: file.read(_CHUNK), b""), leaves_max=leaves_max):
            if run.device == bdf:
                yield run


def parse(chunks: Iterable[bytes], *, leaves_max: int | None = None) -> Iterator[Iova]:
    """The runs in a dump given piece by piece: leaves that follow each other in IOVA, PFN and access become one.

    Raises:
        TooMany: after ``leaves_max`` leaves, if that is given.
        BadFile: a line is none of the grammar's, or the last one is cut off.
    """
    device = ""
    run: Iova | None = None
    leaves = 0
    for row in _rows(chunks):
        if row.startswith(b"0x"):
            leaves += 1
            if leaves_max is not None and leaves > leaves_max:
                raise TooMany
            leaf = _leaf(device, row)
            if run is not None and _follows(run, leaf):
                run = run._replace(pages=run.pages + leaf.pages)
                continue
            if run is not None:
                yield run
            run = leaf
        elif match := _TABLE.fullmatch(row):
            device = match[1].decode("ascii")
        elif row and not row.startswith((b"IOVA_PFN", b"DMA Remapping is not enabled on ")):
            raise tree.malformed(_FILE, row)
    if run is not None:
        yield run


def _follows(run: Iova, leaf: Iova) -> bool:
    return (
        run.iova + run.pages == leaf.iova
        and run.pfn + run.pages == leaf.pfn
        and run.access == leaf.access
        and run.huge == leaf.huge
        and run.device == leaf.device
        and run.pages + leaf.pages <= _PAGES_MAX
    )


def _leaf(device: str, row: bytes) -> Iova:
    words = row.split()
    try:
        if len(words) != 7 or words[1] != b"|" or not device:
            raise tree.malformed(_FILE, row)
        entries = [int(word, 16) for word in words[:1:-1]]
        level = next(level for level, entry in enumerate(entries) if entry)
        if level > 2:
            raise tree.malformed(_FILE, row)
        entry, count = entries[level], 1 << (9 * level)
        return Iova(
            device,
            int(words[0], 16),
            entry >> 12 & _PFN_MASK & -count,
            count,
            _ACCESS[entry & 3],
            level > 0,
        )
    except (ValueError, StopIteration) as error:
        raise tree.malformed(_FILE, row) from error


def _rows(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        rows = (rest + chunk).split(b"\n")
        rest = rows.pop()
        if len(rest) > _CHUNK:
            raise tree.malformed(_FILE, rest)
        yield from rows
    if rest:
        raise tree.malformed(_FILE, rest)


def _open(root: Root, path: str) -> int:
    try:
        return os.open(tree.below(root, path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error
