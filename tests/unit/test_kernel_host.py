"""Host, memory, address maps, devdax and live update, read from trees of hosts that are not here."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from support.trees import BOOT_ID, GIB, Tree

from memconsole.backend.kernel import dax, host, iomem, kho, kpage, memory, tree
from memconsole.errors import BadFile, Denied, Gone, NotFound
from memconsole.model import Dax, FrameState, HugePool, Node, Range, Survival, Unread


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_host_is_read_from_its_tree(made: Tree) -> None:
    made.host(arch="aarch64", cpus="0-3,8,10-11", page_size=65536)
    found = host.host(made.root)
    assert (found.name, found.kernel, found.arch, found.boot_id) == ("hv1", "7.3.4-test", "aarch64", BOOT_ID)
    assert (found.cpus, found.page_size, found.uptime_s) == (7, 65536, 3600.25)


def test_a_frame_is_told_by_its_flags_and_how_often_it_is_mapped(made: Tree) -> None:
    made.write("/proc/kpageflags", struct.pack("<3Q", 0, 1 << 5 | 1 << 11 | 1 << 22 | 1 << 60, 1 << 20))
    made.write("/proc/kpagecount", struct.pack("<3Q", 0, 3, 0))
    assert kpage.frame(made.root, 1) == FrameState(1, ("lru", "mmap", "thp", "bit-60"), 3)
    assert kpage.frame(made.root, 0) == FrameState(0, (), 0)
    with pytest.raises(NotFound, match="there is no frame 0x3"):
        kpage.frame(made.root, 3)


def test_a_kernels_configuration_is_read_from_boot_where_proc_has_none(made: Tree) -> None:
    made.host()
    assert host.config(made.root) is None
    made.write("/boot/config-7.3.4-test", '# CONFIG_KEXEC is not set\nCONFIG_KEXEC_FILE=y\nCONFIG_LOCALVERSION="-x"\n')
    assert host.config(made.root) == {"CONFIG_KEXEC_FILE": "y", "CONFIG_LOCALVERSION": "-x"}


def test_a_configuration_that_is_no_gzip_is_named(made: Tree) -> None:
    made.write("/proc/config.gz", b"\x1f\x8b\x08 cut")
    with pytest.raises(BadFile, match=r"/proc/config\.gz"):
        host.config(made.root)


def test_a_node_has_the_addresses_of_its_memory_blocks(made: Tree) -> None:
    made.meminfo(total=64 * GIB, free=32 * GIB)
    made.write("/sys/devices/system/memory/block_size_bytes", "8000000\n")
    for number, blocks in ((0, (0, 1, 2, 8)), (1, (3, 4))):
        made.node(number, GIB, GIB, "0-7")
        made.write(f"/sys/devices/system/node/node{number}/memory_failure/total", "0\n")
        for block in blocks:
            made.link(f"/sys/devices/system/node/node{number}/memory{block}", f"../../memory/memory{block}")
    block = 128 << 20
    first, second = memory.nodes(made.root)
    assert [(each.start // block, each.end // block) for each in first.ranges] == [(0, 3), (8, 9)]
    assert [(each.start // block, each.end // block) for each in second.ranges] == [(3, 5)]


def test_memory_nodes_and_pools(made: Tree) -> None:
    made.meminfo(total=64 * GIB, free=32 * GIB)
    made.node(10, GIB, GIB // 2, "8-15")
    made.node(2, 2 * GIB, GIB, "0-7")
    made.pool(1 << 30, 4, 3, 1)
    made.pool(2 << 20, 100, 40, 5, 2)
    found = memory.memory(made.root)
    assert (found.total, found.free, found.available) == (64 * GIB, 32 * GIB, 33 * GIB)
    assert (found.shmem, found.huge_shmem, found.swap_total, found.swap_free) == (3 * GIB, 2 * GIB, 8 * GIB, 7 * GIB)
    assert found.shmem_thp == "advise"
    assert found.nodes == (Node(2, 2 * GIB, GIB, "0-7"), Node(10, GIB, GIB // 2, "8-15"))
    assert found.pools == (HugePool(2 << 20, 100, 40, 5, 2), HugePool(1 << 30, 4, 3, 1, 0))


def test_a_kernel_without_numa_hugetlb_and_thp(made: Tree) -> None:
    made.meminfo(shmem_thp=None)
    found = memory.memory(made.root)
    assert (found.nodes, found.pools, found.shmem_thp) == ((), (), "")


@pytest.mark.parametrize("content", ["MemTotal: lots kB\n", "MemTotal:\n", "MemTotal: 1 kB\n"])
def test_a_torn_meminfo_is_named(made: Tree, content: str) -> None:
    made.write("/proc/meminfo", content)
    with pytest.raises(BadFile, match="/proc/meminfo"):
        memory.memory(made.root)


IOMEM = (
    (0, 0x1000, 0x9FBFF, "System RAM"),
    (0, 0x100000000, 0x63FFFFFFF, "System RAM"),
    (1, 0x101000000, 0x102209987, "Kernel code"),
    (0, 0x4000000000, 0x7FFFFFFFFF, "PCI Bus 0000:00"),
    (1, 0x4000000000, 0x400007FFFF, "0000:00:01.0"),
    (2, 0x4000000000, 0x400007FFFF, "virtio-pci-modern"),
)


def test_iomem_keeps_depth_and_excludes_its_ends(made: Tree) -> None:
    made.iomem(IOMEM)
    found = iomem.iomem(made.root)
    assert found == tuple(Range(start, end + 1, name, depth) for depth, start, end, name in IOMEM)


def test_iomem_of_an_ordinary_user_is_denied_not_empty(made: Tree) -> None:
    made.iomem(IOMEM, hidden=True)
    with pytest.raises(Denied, match="hides its addresses"):
        iomem.iomem(made.root)


def test_the_firmware_map_is_sorted_by_address(made: Tree) -> None:
    made.firmware([(0x100000, 0x7FFFFFFF, "System RAM"), (0, 0x9FBFF, "System RAM"), (0xF0000, 0xFFFFF, "Reserved")])
    assert [(part.start, part.end) for part in iomem.firmware(made.root)] == [
        (0, 0x9FC00),
        (0xF0000, 0x100000),
        (0x100000, 0x80000000),
    ]


def test_devdax_devices(made: Tree) -> None:
    made.dax("dax0.0", size=512 << 20, align=2 << 20, node=1, start=GIB)
    made.write("/sys/bus/dax/devices/dax1.0/size", f"{GIB}\n")
    assert dax.dax(made.root) == (
        Dax("dax0.0", 512 << 20, 1, 2 << 20, GIB),
        Dax("dax1.0", GIB),
    )


def test_an_entry_that_goes_while_it_is_read_costs_no_other(made: Tree) -> None:
    made.dax("dax0.0", size=GIB, align=2 << 20, node=1, start=GIB)
    made.directory("/sys/bus/dax/devices/dax1.0")
    assert [found.name for found in dax.dax(made.root)] == ["dax0.0"]
    made.meminfo()
    made.node(0, GIB, GIB // 2, "0-7")
    made.directory("/sys/devices/system/node/node1")
    assert [node.number for node in memory.memory(made.root).nodes] == [0]
    made.firmware([(0, 0x9FBFF, "System RAM")])
    made.directory("/sys/firmware/memmap/1")
    assert len(iomem.firmware(made.root)) == 1
    made.directory("/sys/kernel/boot_params/setup_data/0")
    made.write("/sys/kernel/boot_params/setup_data/1/type", "0xa\n")
    made.host()
    assert kho.survival(made.root).kho


# --- live update ------------------------------------------------------------------------------------------------

SCRATCH = [(0x1F000000, 16 << 20), (0x40000000, 128 << 20)]


def test_a_live_update_host_after_a_cold_boot(made: Tree) -> None:
    made.host(command_line="kho=on liveupdate=on")
    made.write("/dev/liveupdate", b"")
    made.kho(scratch=SCRATCH)
    made.write("/sys/kernel/debug/kho/out/fdt", b"\xd0\x0d\xfe\xed")
    assert kho.survival(made.root) == Survival(
        kho=True,
        luo=True,
        kho_cmdline=True,
        luo_cmdline=True,
        scratch=tuple(Range(start, start + size, "KHO scratch") for start, size in SCRATCH),
        outgoing=("LUO", "kexec-metadata"),
    )


def test_a_live_update_host_after_a_handover(made: Tree) -> None:
    made.host(command_line="kho=on liveupdate=on")
    made.write("/dev/liveupdate", b"")
    made.kho(scratch=SCRATCH, incoming=("LUO", "kexec-metadata"), count=3)
    found = kho.survival(made.root)
    assert found.incoming == ("LUO", "kexec-metadata")
    assert (found.kexec_count, found.detail) == (3, "booted through KHO from 7.3.3-old (kexec 3)")


def test_an_unknown_metadata_version_is_shown_not_decoded(made: Tree) -> None:
    made.host()
    made.kho(incoming=("kexec-metadata",))
    made.write("/sys/kernel/debug/kho/in/sub_fdts/kexec-metadata", b"\x07" + bytes(90))
    found = kho.survival(made.root)
    assert found.kexec_count == 0
    assert "unknown version 7" in found.detail


def test_without_debugfs_live_update_is_inferred(made: Tree) -> None:
    made.host(command_line="kho=1 liveupdate=off")
    assert kho.survival(made.root) == Survival(kho_cmdline=True, detail="debugfs is not mounted")
    made.write("/dev/liveupdate", b"")
    made.write("/sys/kernel/boot_params/setup_data/1/type", "0xa\n")
    found = kho.survival(made.root)
    assert (found.kho, found.luo, found.luo_cmdline) == (True, True, False)
    assert "booted through KHO" in found.detail


def test_debugfs_without_kho_says_so(made: Tree) -> None:
    made.host()
    made.directory("/sys/kernel/debug/x86")
    assert kho.survival(made.root) == Survival(detail="the kernel has no KHO, or it is off (kho=on)")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_of_debugfs_that_cannot_be_opened_cost_nothing_else(made: Tree) -> None:
    """As under lockdown: they are listed, and may not be opened."""
    made.host(command_line="kho=on liveupdate=on")
    made.write("/dev/liveupdate", b"")
    made.kho(scratch=SCRATCH, incoming=("kexec-metadata",), count=3)
    for directory in (made.root, *made.root.parents):
        directory.chmod(directory.stat().st_mode | 0o555)
    for name in ("out/scratch_phys", "out/scratch_len", "in/sub_fdts/kexec-metadata"):
        (made.root / f"sys/kernel/debug/kho/{name}").chmod(0)
    try:
        os.seteuid(65534)
        found = kho.survival(made.root)
    finally:
        os.seteuid(0)
    assert (found.kho, found.luo, found.kho_cmdline, found.luo_cmdline) == (True, True, True, True)
    assert (found.scratch, found.kexec_count) == ((), 0)
    assert "scratch_phys is not shown" in found.detail
    assert "kexec-metadata is not shown" in found.detail


def test_torn_scratch_regions_are_named(made: Tree) -> None:
    made.host()
    made.kho(scratch=SCRATCH)
    made.write("/sys/kernel/debug/kho/out/scratch_len", "0x1000000\n")
    with pytest.raises(BadFile, match="torn"):
        kho.survival(made.root)


# --- what a reader raises ---------------------------------------------------------------------------------------


def test_what_is_missing_and_what_is_gone_differ(made: Tree) -> None:
    with pytest.raises(NotFound, match="/proc/meminfo"):
        tree.read(made.root, "/proc/meminfo")
    with pytest.raises(Gone, match="/proc/77/maps"):
        tree.read(made.root, "/proc/77/maps")


def test_an_error_becomes_a_gap_that_keeps_its_remedy(made: Tree) -> None:
    made.iomem(IOMEM, hidden=True)
    with pytest.raises(Denied) as caught:
        iomem.iomem(made.root)
    gap = tree.gap("/proc/iomem", caught.value)
    assert gap.source == "/proc/iomem"
    assert "CAP_SYS_ADMIN" in gap.why
    assert "root" in gap.remedy


def test_an_entry_that_is_torn_costs_no_other_and_is_named(made: Tree) -> None:
    made.meminfo()
    made.node(0, GIB, GIB // 2, "0-7")
    made.write("/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: lots kB\n")
    made.pool(2 << 20, 100, 40, 5, 2)
    made.write("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "many\n")
    made.dax("dax0.0", size=GIB, align=2 << 20, node=1, start=GIB)
    made.write("/sys/bus/dax/devices/dax1.0/size", "large\n")
    made.firmware([(0, 0x9FBFF, "System RAM")])
    made.write("/sys/firmware/memmap/1/start", "here\n")
    made.write("/sys/kernel/boot_params/setup_data/0/type", "none\n")
    made.write("/sys/kernel/boot_params/setup_data/1/type", "0xa\n")
    gaps: list[Unread] = []
    found = memory.memory(made.root, gaps)
    assert [node.number for node in found.nodes] == [0]
    assert [pool.page_size for pool in found.pools] == [2 << 20]
    assert [each.name for each in dax.dax(made.root, gaps)] == ["dax0.0"]
    assert len(iomem.firmware(made.root, gaps)) == 1
    assert [gap.source for gap in gaps] == [
        "/sys/devices/system/node/node1",
        "/sys/kernel/mm/hugepages/hugepages-1048576kB",
        "/sys/bus/dax/devices/dax1.0",
        "/sys/firmware/memmap/1",
    ]
    made.host()
    assert kho.survival(made.root).kho
    for reader in (memory.memory, dax.dax, iomem.firmware):
        with pytest.raises(BadFile):
            reader(made.root)
