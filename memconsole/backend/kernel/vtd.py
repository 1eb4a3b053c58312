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

import msgspec

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound

DEBUGFS = "/sys/kernel/debug/iommu/intel"
_FILE = "domain_translation_struct"
_TABLE = re.compile(rb"Device ([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?: with pasid ([0-9a-f]+))? @0x([0-9a-f]+)")
_LEAF = re.compile(rb"0x([0-9a-f]{13}) \|" + rb"\t0x(?:[0-9a-f]{16})" * 2 + rb"\t0x([0-9a-f]{16})" * 3)
_ZERO = b"0" * 16
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


class Budget(msgspec.Struct):
    """How many page table leaves a reader is still willing to look at, over all the dumps it reads."""

    leaves: int


def iovas(root: Root, bdf: str, budget: Budget | None = None) -> Iterator[Iova]:
    """The IOVA runs of one device's address space, in order, in constant memory.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NotFound: no debugfs, no such device, or the IOMMU does not translate for it.
        Denied, KernelRefused: it cannot be read.
        BadFile: it is not as the kernel writes it.
    """
    try:
        fd = _open(root, f"{DEBUGFS}/{bdf}/{_FILE}")
    except NotFound:
        fd = _open(root, f"{DEBUGFS}/{_FILE}")
    with os.fdopen(fd, "rb", buffering=0) as file:
        for run in parse(iter(lambda: file.read(_CHUNK), b""), budget):
            if run.device == bdf:
                yield run


def parse(chunks: Iterable[bytes], budget: Budget | None = None) -> Iterator[Iova]:
    """The runs in a dump given piece by piece: leaves that follow each other in IOVA, PFN and access become one.

    Raises:
        TooMany: the budget, if one is given, does not last.
        BadFile: a line is none of the grammar's, or the last one is cut off.
    """
    device = ""
    iova = pfn = pages = 0
    access, huge = "", False
    for row in _rows(chunks):
        if match := _LEAF.fullmatch(row):
            if budget is not None:
                budget.leaves -= 1
                if budget.leaves < 0:
                    raise TooMany
            where, pdpe, pde, pte = match.groups()
            last, count = (pte, 1) if pte != _ZERO else (pde, 1 << 9) if pde != _ZERO else (pdpe, 1 << 18)
            if last == _ZERO or not device:
                raise tree.malformed(_FILE, row)
            entry = int(last, 16)
            start, target = int(where, 16), entry >> 12 & _PFN_MASK & -count
            allowed, large = _ACCESS[entry & 3], count > 1
            if (
                start == iova + pages
                and target == pfn + pages
                and allowed == access
                and large == huge
                and pages + count <= _PAGES_MAX
            ):
                pages += count
                continue
            if pages:
                yield Iova(device, iova, pfn, pages, access, huge)
            iova, pfn, pages, access, huge = start, target, count, allowed, large
        else:
            if pages:
                yield Iova(device, iova, pfn, pages, access, huge)
                pages = 0
            device = _title(row, device)
    if pages:
        yield Iova(device, iova, pfn, pages, access, huge)


def _title(row: bytes, device: str) -> str:
    """The device whose table the next leaves belong to."""
    if match := _TABLE.fullmatch(row):
        return match[1].decode("ascii")
    if row and not row.startswith((b"IOVA_PFN", b"DMA Remapping is not enabled on ")):
        raise tree.malformed(_FILE, row)
    return device


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
