"""Whatever a file holds, a reader returns values or raises an error that has a name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.machines import machines
from support.trees import FakeProcess, Tree, intel_dump, maps_line

from memconsole.backend.handoff import bootfiles
from memconsole.backend.kernel import (
    census,
    cgroup,
    dax,
    host,
    iomem,
    iommu,
    kho,
    memory,
    mounts,
    pci,
    procmaps,
    tree,
    vtd,
)
from memconsole.errors import BadFile
from memconsole.extents import Flag

BDF = "0000:41:00.0"
ALIKE = st.text("0123456789abcdefx-:|.,()[] \t\nkBrwsp\x00", max_size=200).map(str.encode)
ANYTHING = st.one_of(ALIKE, st.binary(max_size=200))


@given(ANYTHING)
@example(b"0-0 r 0 fffffffff:0 0")
def test_maps(raw: bytes) -> None:
    with suppress(BadFile):
        for vma in procmaps.parse(raw):
            msgspec.json.encode(vma.path)


@given(ANYTHING)
@example(b"1 2 0:3 /a\\040b /c - fuse.x y rw")
@example(b"1 2 99999999999:3 / /c rw - x y\n")
def test_mounts(raw: bytes) -> None:
    with suppress(BadFile):
        for each in mounts.parse(raw):
            assert each.device >= 0


@given(ANYTHING)
def test_iomem(raw: bytes) -> None:
    with suppress(BadFile):
        msgspec.json.encode(iomem.parse("/proc/iomem", raw))


HEAD = intel_dump(BDF, []).rstrip("\n") + "\n"


@given(st.lists(ANYTHING, max_size=5))
@example([HEAD.encode(), b"0x1 |\t0x0\t0x0\t0x0\t0x0\t0xffffffffffffffffffff\n"])
@example([b"0x1 | 0x1 0x1 0x1 0x1 0x1\n"])
def test_page_tables(chunks: list[bytes]) -> None:
    with suppress(BadFile), vtd.parse([HEAD.encode(), *chunks], BDF) as table:
        for row in table:
            assert row.count > 0
            assert 0 <= row.pfn < 1 << 40


LEAF = st.tuples(st.integers(0, 1 << 20), st.integers(0, (1 << 40) - 1), st.integers(1, 3), st.integers(1, 3))
PIECE = st.integers(1, 300)


@given(st.lists(LEAF, max_size=30), PIECE)
def test_runs_hold_exactly_the_leaves(leaves: list[tuple[int, int, int, int]], piece: int) -> None:
    """Whatever pieces they come in; each leaf stands a while behind the one before."""
    given, at = [], 0
    for gap, pfn, level, access in leaves:
        size = 1 << 9 * (level - 1)
        given.append((at + gap % 3, pfn & -size, level, access))
        at = given[-1][0] + size
    raw = intel_dump(BDF, given).encode()
    with vtd.parse((raw[at : at + piece] for at in range(0, len(raw), piece)), BDF) as table:
        found = list(table)
    for row in found:
        at = 0
        while at < row.count:
            iova, pfn, level, access = given.pop(0)
            assert (row.offset + at, row.pfn + at) == (iova, pfn)
            assert bool(row.flags & Flag.HUGE) == (level > 1)
            assert (bool(row.flags & Flag.READ), bool(row.flags & Flag.WRITE)) == (bool(access & 1), bool(access & 2))
            at += 1 << 9 * (level - 1)
        assert at == row.count
    assert given == []


def _machines(root: Path) -> object:
    return machines(census.take(root))


def _holders(root: Path) -> object:
    seen = census.take(root)
    return pci.holders(seen, pci.functions(root)), pci.openers(seen)


SOURCES: dict[str, Callable[[Path], object]] = {
    "/proc/meminfo": memory.memory,
    "/sys/devices/system/node/node0/meminfo": memory.nodes,
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled": memory.shmem_thp,
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": memory.pools,
    "/proc/uptime": host.host,
    "/proc/self/auxv": host.host,
    "/sys/devices/system/cpu/online": host.host,
    "/proc/config.gz": host.config,
    "/proc/iomem": iomem.iomem,
    "/sys/firmware/memmap/0/start": iomem.firmware,
    "/sys/bus/dax/devices/dax0.0/size": dax.dax,
    "/proc/4000/stat": census.take,
    "/proc/4000/status": lambda root: census.uid(root, 4000),
    "/proc/4000/smaps": lambda root: procmaps.smaps(root, 4000),
    f"/sys/bus/pci/devices/{BDF}/uevent": pci.functions,
    f"/sys/bus/pci/devices/{BDF}/resource": pci.functions,
    f"/sys/bus/pci/devices/{BDF}/numa_node": pci.functions,
    "/sys/kernel/iommu_groups/12/reserved_regions": iommu.domains,
    "/sys/kernel/debug/kho/out/scratch_phys": kho.survival,
    "/sys/kernel/debug/kho/in/sub_fdts/kexec-metadata": kho.survival,
    "/proc/cmdline": kho.survival,
    "/proc/self/cgroup": cgroup.memory_limit,
    "/proc/self/mountinfo": cgroup.memory_limit,
    "/sys/fs/cgroup/a/memory.max": cgroup.memory_limit,
    "/sys/kernel/security/lockdown": tree.lockdown,
    "/boot/loader/entries/x.conf": bootfiles.default,
    "/boot/loader/loader.conf": bootfiles.default,
    "/boot/grub2/grubenv": bootfiles.default,
    "/proc/5000/task/5001/stat": census.take,
    "/proc/4000/maps": _machines,
    "/proc/4000/cmdline": _machines,
    "/proc/4000/fdinfo/7": _holders,
    "/sys/class/uio/uio0/maps/map0/addr": _holders,
    "/sys/kernel/debug/kvm/4000-5/vcpu3/pid": _machines,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    found = Tree(tmp_path_factory.mktemp("host"))
    found.host()
    found.meminfo()
    found.node(0, 1 << 30, 1 << 29, "0-7")
    found.pool(2 << 20, 1, 1)
    found.iomem([(0, 0, 0xFFF, "Reserved"), (0, 0x1000, 0x9FFFF, "System RAM")])
    found.firmware([(0, 0x9FFFF, "System RAM")])
    found.dax("dax0.0", size=1 << 30, align=2 << 20, node=0, start=1 << 32)
    fds = {5: "anon_inode:kvm-vm", 6: "anon_inode:kvm-vcpu:3", 7: "anon_inode:[vfio-device]", 8: "/dev/vfio/12"}
    area = maps_line(0x1000, 0x2000, "rw-p") + maps_line(0x3000, 0x4000, "rw-s", path="/dev/uio0")
    vm = FakeProcess(4000, maps=area, smaps=area, command=("q", "-name", "x"), fds=fds, fdinfo={7: "pos:\t0\n"})
    found.process(vm)
    found.write("/proc/4000/task/4000/comm", "qemu\n")
    found.left_by_its_first_thread(FakeProcess(5000), 5001)
    found.write("/sys/kernel/debug/kvm/4000-5/vcpu3/pid", "4000\n")
    found.write("/sys/class/uio/uio0/maps/map0/addr", "0xfe000000\n")
    found.write("/sys/class/uio/uio0/maps/map0/size", "0x1000\n")
    found.write("/proc/self/cgroup", "0::/a\n")
    found.write("/sys/fs/cgroup/a/memory.max", "max\n")
    found.write("/boot/loader/entries/x.conf", "linux /vmlinuz-1\n")
    found.write("/boot/vmlinuz-1", b"")
    found.pci(BDF, ids=(1, 2), class_code=0x30000, group=12, bars=[(0xFE000000, 0xFE000FFF, 0x200)])
    found.group(12, "DMA")
    found.kho(incoming=("kexec-metadata",), scratch=[(0x1000, 0x1000)])
    return found


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ANYTHING)
@example(b"")
@example(b"18446744073709551616\n")
@example(b"-1 -1 -1\n")
def test_any_content_of_any_source(made: Tree, source: str, raw: bytes) -> None:
    place = made.root / source.lstrip("/")
    kept = place.read_bytes() if place.exists() else None
    try:
        made.write(source, raw)
        with suppress(*tree.UNREADABLE):
            found = SOURCES[source](made.root)
            if SOURCES[source] is not census.take:
                msgspec.json.encode(found)
    finally:
        if kept is None:
            place.unlink()
        else:
            place.write_bytes(kept)


@pytest.mark.parametrize("source", SOURCES)
def test_the_sources_are_read_at_all(made: Tree, source: str) -> None:
    assert SOURCES[source](made.root) is not None or "config" in source or "cgroup" in source or "mount" in source
