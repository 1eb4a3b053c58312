"""A host with an AMD IOMMU, written from the specification (48882): IVRS, registers, device table, I/O page tables."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from support.handover_image import Cells
from support.trees import Tree

READ, WRITE = 1 << 61, 1 << 62
REGISTERS = 0x3000
"""Where the registers of the synthetic host are: low, so that its /dev/mem stays a small file."""


class AmdHost:
    """Writes its parts below a tree; ``memory`` holds the tables, ``entries`` what devices find them by."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.memory = Cells()
        self._base = self.memory.put(pages=512)

    def page_tables(self, leaves: Iterable[tuple[int, int, int, int]], levels: int = 4) -> int:
        """Tables of leaves (iova page, pfn, pages, access bits 1 read 2 write); the first word of a device's entry.

        A leaf of 1, 512 or 512 * 512 pages is its level's own; of another power of two it is written as often as it
        has parts, with its size in the address (table 7 of the specification).
        """
        root = self.memory.put()
        for iova, pfn, pages, access in leaves:
            level = 1 + (pages.bit_length() - 1) // 9
            part = 1 << 9 * (level - 1)
            bits = (access & 1) << 61 | (access & 2) << 61
            word = 1 | bits | pfn << 12
            if pages != part:
                word |= 7 << 9 | (pages // 2 - 1) << 12
            for n in range(pages // part):
                self._put(root, levels, iova + n * part, level, word)
        return 1 | 2 | levels << 9 | root | READ | WRITE

    def _put(self, table: int, level: int, iova: int, at_level: int, word: int) -> None:
        at = table + (iova >> 9 * (level - 1) & 511) * 8
        if level == at_level:
            self.memory.write(at, struct.pack("<Q", word))
            return
        (found,) = struct.unpack("<Q", self.memory.read(at, 8))
        if not found:
            found = self.memory.put() | 1 | (level - 1) << 9 | READ | WRITE
            self.memory.write(at, struct.pack("<Q", found))
        self._put(found & ((1 << 52) - PAGE), level - 1, iova, at_level, word)

    def device(self, bdf: str, word: int) -> None:
        """A device's entry in the device table."""
        _, bus, rest = bdf.split(":")
        slot, _, function = rest.partition(".")
        number = int(bus, 16) << 8 | int(slot, 16) << 3 | int(function, 16)
        self.memory.write(self._base + number * 32, struct.pack("<4Q", word, 1, 0, 0))

    def write(self) -> None:
        """IVRS, registers behind /dev/mem, and memory as /proc/kcore."""
        other = struct.pack("<BBH", 0x21, 0, 24).ljust(24, b"\0")
        block = struct.pack("<BBHHHQHHI", 0x11, 0, 40, 2, 0x40, REGISTERS, 0, 0, 0).ljust(40, b"\0")
        self.tree.write("/sys/firmware/acpi/tables/IVRS", b"IVRS".ljust(48, b"\0") + other + block)
        registers = struct.pack("<Q", self._base | 511)
        self.tree.write("/dev/mem", registers.rjust(REGISTERS + 8, b"\0").ljust(REGISTERS + PAGE, b"\0"))
        self.tree.directory("/proc")
        self.memory.core(self.tree.root / "proc/kcore")

    def debugfs(self, bdf: str, word: int) -> None:
        """drivers/iommu/amd/debugfs.c, since Linux 6.17, once a BDF was written to ``devid``."""
        base = "/sys/kernel/debug/iommu/amd"
        self.tree.write(f"{base}/devid", "")
        titles = f"{'DeviceId':<12} {'QWORD[3]':>16} {'QWORD[2]':>16} {'QWORD[1]':>16} {'QWORD[0]':>16} iommu\n"
        self.tree.write(f"{base}/devtbl", f"{titles}{bdf} {0:016x} {0:016x} {1:016x} {word:016x} iommu0\n")


PAGE = 4096
