"""PCI functions, IOMMU units, groups and page tables, read from trees of hosts that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.memory import growth
from support.trees import FakeProcess, Tree, intel_dump, maps_line

from memconsole.backend.kernel import census, iomem, iommu, pci, vtd
from memconsole.errors import BadFile, NotFound
from memconsole.extents import Extent, Flag
from memconsole.model import Reserved

GPU, NIC, BRIDGE = "0000:41:00.0", "0000:00:04.0", "0000:00:1c.0"
MEM, MEM64P, IO, UNSET = 0x40200, 0x14220C, 0x40101, 0x20040200
MSI = (0xFEE00000, 0xFEEFFFFF, "msi")


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.host()
    found.pci(
        GPU,
        ids=(0x10DE, 0x2331),
        class_code=0x030200,
        driver="vfio-pci",
        group=12,
        node=1,
        bars=[
            (0x4000000000, 0x4000FFFFFF, MEM64P),
            (0, 0, 0),
            (0x9000000000, 0x9FFFFFFFFF, MEM64P),
            (0, 0, 0),
            (0xF000, 0xF07F, IO),
            (0x0, 0x7FFF, UNSET),
            (0xFB000000, 0xFB07FFFF, 0x46200),  # the ROM
        ],
    )
    found.pci(NIC, ids=(0x1AF4, 0x1041), class_code=0x020000, driver="virtio-pci", bars=[(0xFEBC0000, 0xFEBC0FFF, MEM)])
    bridge_windows = [(0, 0, 0)] * 7 + [(0x1000, 0x1FFF, 0x101), (0xFE000000, 0xFE1FFFFF, 0x200)]
    found.pci(BRIDGE, ids=(0x8086, 0xA110), class_code=0x060400, driver="pcieport", group=3, bars=bridge_windows)
    found.group(3, "identity", [MSI])
    found.group(12, "DMA")
    return found


def test_functions_and_their_bars(made: Tree) -> None:
    found = {function.device.bdf: function for function in pci.functions(made.root)}
    gpu = found[GPU]
    assert (gpu.device.vendor, gpu.device.device, gpu.device.class_code) == (0x10DE, 0x2331, 0x030200)
    assert (gpu.device.driver, gpu.device.group, gpu.device.node) == ("vfio-pci", 12, 1)
    assert [(bar.id, bar.bar, bar.start, bar.size) for bar in gpu.bars] == [
        (f"{GPU}:0", 0, 0x4000000000, 16 << 20),
        (f"{GPU}:2", 2, 0x9000000000, 64 << 30),
        (f"{GPU}:4", 4, 0xF000, 128),
    ]
    assert [(bar.io, bar.wide, bar.prefetchable) for bar in gpu.bars] == [
        (False, True, True),
        (False, True, True),
        (True, False, False),
    ]
    assert found[BRIDGE].bars == ()
    assert (found[NIC].device.group, found[NIC].device.node) == (None, -1)


def test_a_function_comes_before_the_others_of_its_group(made: Tree) -> None:
    sound, gone = "0000:41:00.1", "0000:41:00.2"
    made.pci(sound, ids=(0x10DE, 0x22BA), class_code=0x040300, driver="snd_hda_intel", group=12)
    made.directory(f"/sys/kernel/iommu_groups/12/devices/{gone}")
    assert [each.bdf for each in pci.in_group(made.root, sound)] == [sound, GPU]
    assert [each.driver for each in pci.in_group(made.root, GPU)] == ["vfio-pci", "snd_hda_intel"]
    assert pci.in_group(made.root, NIC) == (pci.device(made.root, NIC),), "without an IOMMU it is alone"
    with pytest.raises(NotFound):
        pci.in_group(made.root, gone)
    assert iommu.reserved(made.root, "3") == (Reserved(0xFEE00000, 0xFEF00000, "msi"),)


def test_windows_name_who_claims_them(made: Tree) -> None:
    made.iomem(
        [
            (0, 0xFE000000, 0xFEFFFFFF, "PCI Bus 0000:00"),
            (1, 0xFEBC0000, 0xFEBC0FFF, NIC),
            (2, 0xFEBC0000, 0xFEBC0FFF, "virtio-pci-modern"),
            (0, 0x4000000000, 0x9FFFFFFFFF, "PCI Bus 0000:41"),
            (1, 0x4000000000, 0x4000FFFFFF, GPU),
        ]
    )
    made.iomem([(0, 0xF000, 0xF07F, GPU), (1, 0xF000, 0xF07F, "vfio-pci")], ports=True)
    windows = pci.windows(pci.functions(made.root), iomem.iomem(made.root), iomem.ioports(made.root))
    claimed = {window.id: window.claimed for window in windows}
    assert claimed == {
        f"{NIC}:0": "virtio-pci-modern",
        f"{GPU}:0": None,
        f"{GPU}:2": None,
        f"{GPU}:4": "vfio-pci",
    }


def mapping(path: str, size: int = 0x1000, index: int = 0) -> str:
    return maps_line(0x7F0000000000, 0x7F0000000000 + size, "rw-s", index << 40, (0, 22), 99, path)


def test_holders_through_sysfs_and_every_form_of_vfio(made: Tree) -> None:
    made.process(FakeProcess(100, maps=mapping(f"/sys/devices/pci0000:00/{NIC}/resource0")))
    made.process(FakeProcess(101, maps=mapping(f"/sys/devices/pci0000:40/{GPU}/resource2_wc")))
    # since Linux 6.17 a device fd says which device it is
    made.process(
        FakeProcess(
            102,
            maps=mapping("anon_inode:[vfio-device]", 16 << 20),
            fds={7: "anon_inode:[vfio-device]"},
            fdinfo={7: f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:40/{GPU}\n"},
        )
    )
    # before, the group is all there is
    made.process(
        FakeProcess(
            103,
            maps=mapping("anon_inode:[vfio-device]", 16 << 20, index=2),
            fds={7: "anon_inode:[vfio-device]", 8: "/dev/vfio/12", 9: "/dev/vfio/vfio"},
            fdinfo={7: "pos:\t0\n"},
        )
    )
    made.link("/sys/class/vfio-dev/vfio0/device", f"../../../{GPU}")
    made.process(FakeProcess(104, maps=mapping("/dev/vfio/devices/vfio0", index=0)))
    made.process(FakeProcess(105, maps=mapping("/home/me/vfio-notes.txt")))
    found = pci.holders(census.take(made.root), pci.functions(made.root))
    assert found == {f"{NIC}:0": (100,), f"{GPU}:2": (101, 103), f"{GPU}:0": (102, 104)}


@pytest.mark.parametrize(
    ("file", "content"),
    [("uevent", "PCI_CLASS=60000\n"), ("uevent", "PCI_CLASS=zz\nPCI_ID=1:2\n"), ("resource", "0x0 0x0\n")],
)
def test_a_torn_function_is_named(made: Tree, file: str, content: str) -> None:
    made.write(f"/sys/bus/pci/devices/{NIC}/{file}", content)
    with pytest.raises(BadFile, match=file):
        pci.functions(made.root)


# --- IOMMU ------------------------------------------------------------------------------------------------------


def test_a_host_without_iommu_has_neither_units_nor_groups(tmp_path: Path) -> None:
    assert (iommu.units(tmp_path), iommu.domains(tmp_path)) == ((), ())


def test_an_intel_host_with_page_tables(made: Tree) -> None:
    made.group(12, "DMA-FQ", [(0, 0xFFFFFF, "direct-relaxable"), MSI])
    made.iommu("dmar0", [GPU, BRIDGE], "intel-iommu", {"version": "5:0", "cap": "19ed008c40780c66", "ecap": "f050da"})
    made.intel_tables(GPU, intel_dump(GPU, [(0x100, 0x5000, 1, 3), (0x101, 0x5001, 1, 3), (0x200, 0x80000, 2, 3)]))
    made.intel_tables(BRIDGE, "")
    (unit,) = iommu.units(made.root)
    assert (unit.name, unit.kind, unit.devices) == ("dmar0", "intel-iommu", (BRIDGE, GPU))
    assert unit.detail == "version 5:0, cap 19ed008c40780c66, ecap f050da"
    plain, translated = iommu.domains(made.root)
    assert (plain.group, plain.mapped, plain.why_not) == (3, None, "identity: an IOVA is the physical address")
    assert (translated.group, translated.kind, translated.iommu, translated.devices) == (12, "DMA-FQ", "dmar0", (GPU,))
    assert translated.reserved == (Reserved(0, 0x1000000, "direct-relaxable"), Reserved(0xFEE00000, 0xFEF00000, "msi"))
    assert (translated.mapped, translated.extents, translated.why_not) == ((2 + 512) * 4096, 2, "")


def test_more_leaves_than_wanted_are_not_counted(made: Tree) -> None:
    made.iommu("dmar0", [GPU], "intel-iommu", {"cap": "0"})
    made.intel_tables(GPU, intel_dump(GPU, [(page, page, 1, 3) for page in range(11)]))
    found = {domain.group: domain for domain in iommu.domains(made.root, leaves_max=11) if domain.group == 12}
    assert found[12].mapped == 11 * 4096
    made.intel_tables(GPU, intel_dump(GPU, [(page, page, 1, 3) for page in range(12)]))
    (capped,) = (domain for domain in iommu.domains(made.root, leaves_max=11) if domain.group == 12)
    assert capped.mapped is None
    (unopened,) = (domain for domain in iommu.domains(made.root, leaves_max=0) if domain.group == 12)
    assert unopened.why_not == capped.why_not
    assert "too many" in capped.why_not


@pytest.mark.parametrize(
    ("name", "attributes", "kind", "says"),
    [
        ("dmar0", "intel-iommu", "intel-iommu", "CONFIG_INTEL_IOMMU_DEBUGFS"),
        ("ivhd0", "amd-iommu", "amd-iommu", "/proc/kcore"),
        ("smmu3.0x0000000009050000", "", "arm-smmu", "Arm SMMU"),
        ("0000:00:01.0", "virtio0", "virtio-iommu", "hypervisor"),
        ("iommufd_selftest_iommu.0", "", "iommufd-selftest", "shows no page tables"),
        ("apple-dart", "", "unknown", "shows no page tables"),
    ],
)
def test_where_page_tables_are_not_shown_the_reason_is(
    made: Tree, name: str, attributes: str, kind: str, says: str
) -> None:
    made.iommu(name, [GPU], attributes, {"cap": "f001"} if attributes.endswith("iommu") else {})
    assert iommu.units(made.root)[0].kind == kind
    (domain,) = (domain for domain in iommu.domains(made.root) if domain.group == 12)
    assert (domain.mapped, domain.extents) == (None, None)
    assert says in domain.why_not


@pytest.mark.parametrize(
    ("shown", "mapped", "says"),
    [
        (intel_dump(GPU, [(0x100, 0x5000, 1, 3)]), 4096, ""),
        (intel_dump(GPU, []), 0, ""),
        ("", None, "identity: an IOVA is the physical address"),
        (None, None, "identity, unless VFIO has it in a domain of its own: no /sys/kernel/debug/iommu/intel"),
    ],
)
def test_a_device_that_vfio_has_leads_where_its_tables_say_whatever_type_its_group_was(
    made: Tree, shown: str | None, mapped: int | None, says: str
) -> None:
    made.write("/sys/kernel/iommu_groups/12/type", "identity\n")
    made.iommu("dmar0", [GPU], "intel-iommu", {"cap": "0"})
    if shown is not None:
        made.intel_tables(GPU, shown)
    (domain,) = (domain for domain in iommu.domains(made.root) if domain.group == 12)
    assert domain.mapped == mapped
    assert domain.why_not.startswith(says)
    if mapped is None:
        with pytest.raises(NotFound, match="identity"):
            iommu.table(made.root, "12")


def test_a_device_that_vfio_has_attached_to_nothing_reaches_nothing(made: Tree) -> None:
    made.iommu("dmar0", [GPU], "intel-iommu", {"cap": "0"})
    made.intel_tables(GPU, "")
    (domain,) = (domain for domain in iommu.domains(made.root) if domain.group == 12)
    assert (domain.mapped, domain.extents, domain.why_not) == (0, 0, "")


def test_large_pages_cost_one_leaf_each_of_the_budget(made: Tree) -> None:
    made.iommu("dmar0", [GPU], "intel-iommu", {"cap": "0"})
    made.intel_tables(GPU, intel_dump(GPU, [(page << 9, page << 9, 2, 3) for page in range(5)]))
    (domain,) = (domain for domain in iommu.domains(made.root, leaves_max=5) if domain.group == 12)
    assert (domain.mapped, domain.extents) == (5 * 2 << 20, 1)


def test_amd_debugfs_is_named_where_it_is(made: Tree) -> None:
    made.iommu("ivhd0", [GPU], "amd-iommu", {"cap": "1", "features": "2"})
    for file in ("iommu00/mmio", "devid", "devtbl", "irqtbl"):
        made.write(f"/sys/kernel/debug/iommu/amd/{file}", "")
    assert iommu.units(made.root)[0].detail == "cap 1, features 2, debugfs devid, devtbl, iommu00, irqtbl"


# --- Intel's page tables ----------------------------------------------------------------------------------------


RW = Flag.PRESENT | Flag.READ | Flag.WRITE


def runs(dump: str, chunk: int = 1 << 20) -> list[Extent]:
    raw = dump.encode()
    with vtd.parse((raw[at : at + chunk] for at in range(0, len(raw), chunk)), GPU) as table:
        assert table.pages == sum(row.count for row in table)
        return list(table)


@pytest.mark.parametrize("padded", [False, True])
def test_leaves_coalesce_while_iova_pfn_and_access_follow(padded: bool) -> None:
    leaves = [
        (0x10, 0x100, 1, 3),
        (0x11, 0x101, 1, 3),
        (0x12, 0x102, 1, 1),  # read only: another run
        (0x13, 0x200, 1, 1),  # elsewhere
        (0x15, 0x201, 1, 1),  # a hole in IOVA
        (0x200, 0x40000, 2, 3),
        (0x400, 0x40200, 2, 3),
        (0x40000, 0x80000, 3, 2),
    ]
    read = Flag.PRESENT | Flag.READ
    assert runs(intel_dump(GPU, leaves, padded=padded)) == [
        Extent(0x10, 0x100, 2, RW),
        Extent(0x12, 0x102, 1, read),
        Extent(0x13, 0x200, 1, read),
        Extent(0x15, 0x201, 1, read),
        Extent(0x200, 0x40000, 1024, RW | Flag.HUGE),
        Extent(0x40000, 0x80000, 1 << 18, Flag.PRESENT | Flag.WRITE | Flag.HUGE),
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_the_pieces_a_dump_comes_in_do_not_matter(chunk: int) -> None:
    dump = intel_dump(GPU, [(page * 2, page, 1, 3) for page in range(50)])
    assert runs(dump, chunk) == runs(dump)


def test_one_file_for_all_devices_as_older_kernels_have_it(made: Tree) -> None:
    dump = intel_dump(NIC, [(1, 2, 1, 3)]) + "DMA Remapping is not enabled on dmar1\n" + intel_dump(GPU, [(3, 4, 1, 3)])
    made.write("/sys/kernel/debug/iommu/intel/domain_translation_struct", dump)
    assert list(vtd.iovas(made.root, GPU)) == [vtd.Iova(3, 4, 1, "rw", False)]


def test_a_table_with_a_pasid_is_a_process_and_not_the_device() -> None:
    own = intel_dump(GPU, [(3, 4, 1, 3)], pasid=0)
    assert runs(own + intel_dump(GPU, [(1, 9, 1, 3)], pasid=0x1F)) == [Extent(3, 4, 1, RW)]


def test_a_long_run_is_one_row_and_a_long_dump_is_never_held() -> None:
    sizes = []

    def chunks() -> Iterator[bytes]:
        yield intel_dump(GPU, []).encode().rstrip(b"\n") + b"\n"
        for first in range(0, 200_000, 1000):
            whole = intel_dump(GPU, [(page, page, 1, 3) for page in range(first, first + 1000)])
            text = "\n".join(whole.split("\n")[2:-1]).encode()
            sizes.append(len(text))
            yield text

    with growth() as grown, vtd.parse(chunks(), GPU) as table:
        assert list(table) == [Extent(0, 0, 200_000, RW)]
        assert grown() < 4 << 20 < 20 << 20 < sum(sizes)


def test_a_budget_is_kept_and_shared() -> None:
    dump = intel_dump(GPU, [(page, page, 1, 3) for page in range(10)]).encode()
    budget = vtd.Budget(15)
    vtd.parse([dump], GPU, budget).close()
    assert budget.leaves == 5
    with pytest.raises(vtd.TooMany):
        vtd.parse([dump], GPU, budget)


@pytest.mark.parametrize(
    "dump",
    [
        "Invalid device or pasid!\n",
        intel_dump(GPU, [(1, 2, 1, 3)]).rstrip("\n"),
        intel_dump(GPU, [(1, 2, 1, 3)]).replace("|", "!"),
        intel_dump(GPU, [(1, 2, 1, 3)]).split("\n", 2)[2],
        intel_dump(GPU, [(1, 0, 4, 3)]),
        intel_dump(GPU, [(2, 2, 1, 3), (1, 1, 1, 3)]),
        intel_dump(GPU, [(512, 512, 2, 3), (513, 1, 1, 3)]),
        intel_dump(GPU, [(1, 2, 1, 3)]).replace("0x0000000000001", "0X0000000000001"),
        f"Device {GPU} with pasid  @0x1000\n",
        f"Device {GPU}\n",
        f"Device {GPU} @0x1000\n0x1 |\t0x0\t0x0\t0x0\t0x0\t0x0\n",
    ],
)
def test_a_dump_that_is_not_as_the_kernel_writes_it_is_named(dump: str) -> None:
    with pytest.raises(BadFile, match="domain_translation_struct"):
        runs(dump)


def test_no_debugfs_is_not_found(made: Tree) -> None:
    with pytest.raises(NotFound):
        list(vtd.iovas(made.root, GPU))
