"""AMD's I/O page tables of a real device, walked in the memory of the kernel that wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import lab_guest as lab

from memconsole.backend.dma import iommufd, vfio
from memconsole.backend.kernel import amdvi, iommu, tree
from memconsole.extents import ExtentTable, Flag

EDU = "0000:00:04.0"
PAGE = 4096
SIZE = 8 << 20
SMALL, LARGE = 0x10000000, 0x40000000


def rows(table: ExtentTable) -> list[tuple[int, int, int]]:
    return [(row.offset, row.pfn, row.count) for row in table]


def frames(fd: int, size: int, iova: int) -> list[tuple[int, int, int]]:
    """Where a file's pages are, by IOVA page; runs of frames, however they are mapped."""
    found: list[tuple[int, int, int]] = []
    with ExtentTable.scan_fd(fd, size) as table:
        for row in table:
            page = iova // PAGE + row.offset
            last = found[-1] if found else (0, 0, 0)
            if last[0] + last[2] == page and last[1] + last[2] == row.pfn:
                found[-1] = (last[0], last[1], last[2] + row.count)
            else:
                found.append((page, row.pfn, row.count))
    return found


units = iommu.units()
lab.say("units", any(unit.kind == "amd-iommu" for unit in units), units=units)
Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts").write_text("1")
vfio.bind("/", EDU)
device, space_fd = vfio.open_device("/", EDU), iommufd.create()
space = iommufd.make_space(space_fd)
iommufd.bind(device, EDU, space_fd)
iommufd.attach(device, space)
with amdvi.table("/", EDU) as table:
    lab.say("empty", len(table) == 0, rows=rows(table))

small, large = os.memfd_create("small"), os.memfd_create("large")
os.ftruncate(small, SIZE)
os.ftruncate(large, SIZE)
enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
iommufd.map_file(space_fd, space, iommufd.Mapping(small, 0, SIZE, SMALL, False))
enabled.write_text("always")
iommufd.map_file(space_fd, space, iommufd.Mapping(large, 0, SIZE, LARGE, True))
enabled.write_text("never")
want = [*frames(small, SIZE, SMALL), *frames(large, SIZE, LARGE)]
with amdvi.table("/", EDU) as table:
    merged: list[tuple[int, int, int]] = []
    for page, pfn, count in rows(table):
        last = merged[-1] if merged else (0, 0, 0)
        if last[0] + last[2] == page and last[1] + last[2] == pfn:
            merged[-1] = (last[0], last[1], last[2] + count)
        else:
            merged.append((page, pfn, count))
    lab.say("tables", merged == want, have=merged[:8], want=want[:8])
    flags = {bool(row.flags & Flag.WRITE) for row in table if row.offset < LARGE // PAGE}
    lab.say("read-only", flags == {False}, rows=[tuple(row) for row in list(table)[:4]])
    lab.say("large", any(row.flags & Flag.HUGE for row in table if row.offset >= LARGE // PAGE))
domain = next(each for each in iommu.domains() if EDU in each.devices)
lab.say("domain", domain.mapped == 2 * SIZE, domain=domain)
iommufd.unmap(space_fd, space, SMALL, SIZE)
with iommu.table("/", str(domain.group)) as table:
    lab.say("unmapped", rows(table) and table[0].offset == LARGE // PAGE, rows=rows(table)[:4])
lab.say("remapped", not tree.text(tree.read("/", "/proc/interrupts")).count("IR-"))
lab.say("end")
