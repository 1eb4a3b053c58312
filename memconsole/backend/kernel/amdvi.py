"""AMD's I/O page tables: found by the device table, walked in physical memory.

    /sys/kernel/debug/iommu/amd/{devid,devtbl}   since Linux 6.17: write a BDF, read its entry; "BDF Q3 Q2 Q1 Q0 iommuN"
    /sys/firmware/acpi/tables/IVRS               else: where an IOMMU's registers are; mapped through /dev/mem
    /proc/kcore, /dev/mem                        the tables themselves, where the kernel shows memory

As AMD's I/O Virtualization Technology specification (48882) has them, little-endian::

    ivrs       := acpi[36] u32 u64 { ivhd | other }
    ivhd       := u8 type 0x10|0x11|0x40, u8, u16 length, u16 bdf, u16, u64 registers, u16 segment...
    registers  := u64 device table (bits 12-51; bits 0-8: pages of it less one)...
    entry      := u64 (0 valid, 1 translated, 9-11 levels, 12-51 table, 55 guest tables, 61 read, 62 write), 3 * u64
    table      := 512 * u64 (0 present, 9-11 level below: 0 a leaf, 7 a leaf of another size; 12-51 address, 61, 62)

A leaf of another size has it in its address: the lowest bit that is 0 says how large, and it stands in as many entries
as it covers. The kernel may change a table while it is walked; what does not fit the grammar is an error, never a row.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.handover.memory import DEVMEM, PhysicalMemory, Walk, this_host
from memconsole.backend.kernel.pci import BDF
from memconsole.backend.kernel.tree import Root
from memconsole.backend.kernel.vtd import Budget
from memconsole.errors import BadFile, NotFound

if TYPE_CHECKING:
    from memconsole.extents import Extent, ExtentTable

DEBUGFS = "/sys/kernel/debug/iommu/amd"
IVRS = "/sys/firmware/acpi/tables/IVRS"
_IVHD = {0x10, 0x11, 0x40}
_BLOCK = struct.Struct("<BBHHHQH")
_BLOCKS_AT = 48
_ENTRY = struct.Struct("<4Q")
_TABLE = struct.Struct("<512Q")
_VALID, _TRANSLATED, _GUEST = 1, 2, 1 << 55
_READ, _WRITE = 1 << 61, 1 << 62
_ADDRESS = ((1 << 40) - 1) << 12
_LEVELS_MAX = 6
_OTHER_SIZE = 7


def table(root: Root, bdf: str, budget: Budget | None = None) -> ExtentTable:
    """A device's address space by IOVA page, which the caller closes; rows have READ, WRITE and HUGE.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NotFound: its device table entry is not shown, or has no tables: why not.
        Denied, KernelRefused: physical memory is not shown.
        BadFile: what is there is no table.
    """
    from memconsole.extents import ExtentTable

    if not BDF.fullmatch(bdf):
        why = "the device table has an entry for each PCI function, and this device is none"
        raise NotFound(f"device {bdf} has no page tables", why)
    with this_host(root) as memory:
        entry = device_entry(root, bdf, memory)
        return ExtentTable.from_rows(leaves(entry[0], bdf, memory, budget))


def device_entry(root: Root, bdf: str, memory: PhysicalMemory) -> tuple[int, int, int, int]:
    """The four words of a device's entry, the lowest first.

    Raises:
        NotFound: neither debugfs nor the registers lead to it.
        Denied, KernelRefused, BadFile: they cannot be read.
    """
    if tree.exists(root, f"{DEBUGFS}/devtbl"):
        return _shown_entry(root, bdf)
    base, size = _device_table(root, int(bdf.partition(":")[0], 16))
    at = _number(bdf) * _ENTRY.size
    if at + _ENTRY.size > size:
        raise BadFile(f"the device table has no entry for {bdf}", f"it has {size // _ENTRY.size} entries")
    first, second, third, fourth = _ENTRY.unpack(memory.read(base + at, _ENTRY.size))
    return first, second, third, fourth


def leaves(entry: int, bdf: str, memory: PhysicalMemory, budget: Budget | None = None) -> Iterator[Extent]:
    """The leaves that the first word of a device's entry leads to, as rows by IOVA page, in order.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NotFound: it has no tables of this format.
        BadFile: what is there is no table.
    """
    what = f"device {bdf} has no page tables"
    levels = entry >> 9 & 7
    if not entry & _VALID:
        raise NotFound(what, "identity: its entry is not valid, so an IOVA is the physical address")
    if entry & _GUEST:
        raise NotFound(what, "its address space is in the format of a CPU's (amd_iommu=pgtbl_v2)")
    if not entry & _TRANSLATED or (not levels and not entry & (_READ | _WRITE)):
        return iter(())
    if not levels:
        raise NotFound(what, "identity: an IOVA is the physical address")
    if levels > _LEVELS_MAX:
        raise BadFile(f"the device table entry of {bdf} is corrupt", f"{levels} levels of tables")
    return _walk(Walk(memory), entry, levels, 0, budget)


def _walk(walk: Walk, entry: int, level: int, base: int, budget: Budget | None) -> Iterator[Extent]:
    from memconsole.extents import Extent, Flag

    size = 1 << 9 * (level - 1)
    entries = _TABLE.unpack(walk.page(entry & _ADDRESS, "an I/O page table"))
    if budget is not None:
        budget.spend(sum(each & 1 for each in entries))
    for index, each in enumerate(entries):
        if not each & 1:
            continue
        below, page = each >> 9 & 7, base + index * size
        allowed = each & (entry | ~(_READ | _WRITE))
        if below not in {0, _OTHER_SIZE}:
            if below >= level:
                raise BadFile("an I/O page table is corrupt", f"level {below} stands below level {level}")
            yield from _walk(walk, allowed, below, page, budget)
            continue
        pfn, pages = (each & _ADDRESS) >> 12, size
        if below == _OTHER_SIZE:
            pages = 2 << ((~pfn & -~pfn).bit_length() - 1)
            if not size <= pages <= size << 9:
                raise BadFile("an I/O page table is corrupt", f"a leaf of {pages} pages stands in level {level}")
        flags = Flag.PRESENT | (Flag.READ if allowed & _READ else 0) | (Flag.WRITE if allowed & _WRITE else 0)
        yield Extent(page, (pfn & -pages) + (page & (pages - size)), size, flags | (Flag.HUGE if pages > 1 else 0))


def _shown_entry(root: Root, bdf: str) -> tuple[int, int, int, int]:
    source = f"{DEBUGFS}/devtbl"
    try:
        fd = os.open(tree.below(root, f"{DEBUGFS}/devid"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, f"{bdf}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(f"{DEBUGFS}/devid", error) from error
    rows = tree.text(tree.read(root, source)).splitlines()
    words = rows[1].split() if len(rows) > 1 else []
    if words[:1] != [bdf]:
        raise NotFound(f"device {bdf} has no entry in the device table", f"{source}: {' '.join(rows[:1])}")
    try:
        fourth, third, second, first = (int(word, 16) for word in words[1:5])
    except ValueError as error:
        raise tree.malformed(source, rows[1]) from error
    return first, second, third, fourth


def _device_table(root: Root, segment: int) -> tuple[int, int]:
    """Address and bytes of a PCI segment's device table: the kernel gives all of its IOMMUs the same."""
    for registers in _blocks(tree.read(root, IVRS), segment):
        word = _register(root, registers)
        return word & _ADDRESS, ((word & 0x1FF) + 1) << 12
    raise NotFound("the device table cannot be found", f"{IVRS} names no IOMMU for PCI segment {segment}")


def _register(root: Root, address: int) -> int:
    """A register of 64 bits: /dev/mem lets RAM be read, and registers be mapped alone."""
    try:
        fd = os.open(tree.below(root, DEVMEM), os.O_RDONLY | os.O_CLOEXEC)
        try:
            page = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=address & -mmap.PAGESIZE)
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(DEVMEM, error) from error
    except (ValueError, OverflowError) as error:
        raise BadFile(f"there are no registers at {address:#x}", f"{DEVMEM}: {error}") from error
    with page, memoryview(page) as view, view.cast("Q") as words:
        return words[address % mmap.PAGESIZE // 8]


def _blocks(raw: bytes, segment: int) -> Iterator[int]:
    """Where an IVRS says that the registers of a PCI segment's IOMMUs are."""
    at = _BLOCKS_AT
    while at + _BLOCK.size <= len(raw):
        kind, _, length, _, _, registers, number = _BLOCK.unpack_from(raw, at)
        if kind in _IVHD and number == segment:
            yield registers
        if not length:
            raise tree.malformed(IVRS, raw[at : at + 8])
        at += length


def _number(bdf: str) -> int:
    _, bus, rest = bdf.split(":")
    device, _, function = rest.partition(".")
    return int(bus, 16) << 8 | int(device, 16) << 3 | int(function, 16)
