"""PCI functions, IOMMU units, groups and page tables, read from trees of hosts that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trees import FakeProcess, Tree, intel_dump, maps_line

from memconsole.backend.kernel import census, iomem, iommu, pci, tree, vtd
from memconsole.errors import BadFile, Denied, NotFound
from memconsole.model import Reserved, Unread

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
    ("path", "offset"),
    [
        ("/dev/mem", 0x4000000000),
        ("/dev/mem", 0x4000FFF000),
        ("/proc/bus/pci/41/00.0", 0x4000000000),
        ("/proc/bus/pci/0000:41/00.0", 0x4000000000),
        ("/dev/uio3", 0x1000),
    ],
)
def test_a_bar_is_mapped_by_its_physical_address_too(made: Tree, path: str, offset: int) -> None:
    made.write("/sys/class/uio/uio3/maps/map1/addr", "0x4000000000\n")
    made.write("/sys/class/uio/uio3/maps/map1/size", "0x1000\n")
    made.process(FakeProcess(800, maps=maps_line(0x7F0000000000, 0x7F0000004000, "rw-s", offset, (0, 6), 301, path)))
    made.process(FakeProcess(801, maps=maps_line(0x7F0000000000, 0x7F0000004000, "rw-s", 0xF000, (0, 6), 301, path)))
    assert pci.holders(census.take(made.root), pci.functions(made.root)) == {f"{GPU}:0": (800,)}


def vfio(pid: int, group: str, *devices: str | None, index: int = 0) -> FakeProcess:
    """A process with a group and an fd for each device, which says its address or (None) does not."""
    fds = {8: f"/dev/vfio/{group}", 9: "/dev/vfio/vfio"} if group else {}
    says = "pos:\t0\nvfio-device-syspath: /sys/devices/"
    said = {20 + n: f"{says}{bdf}\n" if bdf else "pos:\t0\n" for n, bdf in enumerate(devices)}
    fds |= dict.fromkeys(said, "anon_inode:[vfio-device]")
    return FakeProcess(pid, maps=mapping("anon_inode:[vfio-device]", index=index), fds=fds, fdinfo=said)


def test_a_device_is_held_without_an_iommu_too(made: Tree) -> None:
    made.process(vfio(500, "noiommu-12", None))
    made.link("/sys/class/vfio-dev/vfio0/device", f"../../../{NIC}")
    made.process(FakeProcess(501, fds={5: "/dev/vfio/devices/noiommu-vfio0"}))
    made.link("/sys/class/uio/uio3/device", f"../../../{NIC}")
    made.process(FakeProcess(502, fds={5: "/dev/uio3"}))
    seen = census.take(made.root)
    assert pci.openers(seen) == {GPU: (500,), NIC: (501, 502)}
    assert pci.holders(seen, pci.functions(made.root)) == {f"{GPU}:0": (500,)}


def test_a_device_fd_that_does_not_say_what_it_is_may_be_any_of_the_group(made: Tree) -> None:
    sound = "0000:41:00.1"
    made.pci(sound, ids=(0x10DE, 0x22BA), class_code=0x040300, driver="vfio-pci", group=12)
    made.process(vfio(500, "12", sound))
    made.process(vfio(501, "12", sound, None))
    made.process(vfio(502, "77", None))  # the group went meanwhile
    assert pci.openers(census.take(made.root)) == {sound: (500, 501), GPU: (501,)}


@pytest.mark.parametrize(
    "link",
    [
        f"/sys/devices/pci0000:40/{GPU}/resource0",
        f"/sys/devices/pci0000:40/{GPU}/resource0_wc",
        "/proc/bus/pci/41/00.0",
        "/proc/bus/pci/0000:41/00.0",
        "/dev/mem",
    ],
)
def test_whoever_has_a_file_of_a_bar_may_map_it_any_time(made: Tree, link: str) -> None:
    made.process(FakeProcess(800, fds={3: link}))
    made.process(FakeProcess(801, fds={3: f"/sys/devices/pci0000:40/{GPU}/resource2", 4: f"{link}x"}))
    bar = next(each for function in pci.functions(made.root) for each in function.bars if each.id == f"{GPU}:0")
    seen = census.take(made.root)
    assert [pid for pid, process in seen.processes.items() if pci.may_map(seen, process, bar)] == [800]


def test_a_process_that_cannot_be_read_costs_itself_alone(made: Tree) -> None:
    made.process(FakeProcess(100, maps=mapping(f"/sys/devices/pci0000:00/{NIC}/resource0")))
    made.process(FakeProcess(101, maps=f"7f00 is torn /sys/devices/pci0000:00/{NIC}/resource0\n"))
    made.process(FakeProcess(102, fds={5: "/dev/vfio/devices/vfio0"}))
    made.link("/sys/class/vfio-dev/vfio0/device", f"../../../{NIC}")
    seen = census.take(made.root)
    gaps: list[Unread] = []
    assert pci.holders(seen, pci.functions(made.root), gaps) == {f"{NIC}:0": (100,)}
    assert [gap.source for gap in gaps] == ["/proc/101/maps"]
    assert "cannot read" in gaps[0].why
    assert pci.openers(seen, gaps) == {NIC: (102,)}
    with pytest.raises(BadFile):
        pci.holders(seen, pci.functions(made.root))


@pytest.mark.parametrize(
    ("file", "content"),
    [("uevent", "PCI_CLASS=60000\n"), ("uevent", "PCI_CLASS=zz\nPCI_ID=1:2\n"), ("resource", "0x0 0x0\n")],
)
def test_a_torn_function_is_named_and_costs_no_other(made: Tree, file: str, content: str) -> None:
    made.write(f"/sys/bus/pci/devices/{NIC}/{file}", content)
    with pytest.raises(BadFile, match=file):
        pci.functions(made.root)
    gaps: list[Unread] = []
    assert [function.device.bdf for function in pci.functions(made.root, gaps)] == [BRIDGE, GPU]
    assert [gap.source for gap in gaps] == [f"/sys/bus/pci/devices/{NIC}"]
    assert gaps[0].why


# --- IOMMU ------------------------------------------------------------------------------------------------------


def test_an_iommu_that_cannot_be_read_is_named_and_costs_no_other(made: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    made.iommu("dmar0", devices=[GPU])
    made.iommu("dmar1", devices=[BRIDGE])
    torn = "/sys/class/iommu/dmar1/devices"
    listed = tree.names

    def names(root: tree.Root, path: str) -> list[str]:
        if path == torn:
            raise Denied(f"{path} is not shown", "a security policy")
        return listed(root, path)

    monkeypatch.setattr(tree, "names", names)
    gaps: list[Unread] = []
    assert [unit.name for unit in iommu.units(made.root, gaps)] == ["dmar0"]
    said = f"{torn} is not shown: a security policy"
    assert [(gap.source, gap.why) for gap in gaps] == [("/sys/class/iommu/dmar1", said)]
    assert [domain.group for domain in iommu.domains(made.root, [])] == [3, 12]
    with pytest.raises(Denied):
        iommu.units(made.root)
    with pytest.raises(NotFound) as caught:
        iommu.table(made.root, "3")
    assert "dmar1" in caught.value.why


def test_what_is_no_group_costs_no_group(made: Tree) -> None:
    made.write("/sys/kernel/iommu_groups/odd/type", "DMA\n")
    gaps: list[Unread] = []
    assert [domain.group for domain in iommu.domains(made.root, gaps)] == [3, 12]
    assert [gap.source for gap in gaps] == ["/sys/kernel/iommu_groups/odd"]


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


@pytest.mark.parametrize(
    ("unit", "attributes", "says"),
    [("ivhd0", "amd-iommu", "this device is none"), ("dmar0", "intel-iommu", "has no page tables of AMDI0096:00")],
)
def test_a_device_that_is_no_pci_function_has_a_reason_of_its_own_and_costs_no_other_group(
    made: Tree, unit: str, attributes: str, says: str
) -> None:
    made.group(0, "DMA-FQ")
    made.directory("/sys/kernel/iommu_groups/0/devices/AMDI0096:00")
    made.iommu(unit, ["AMDI0096:00", GPU], attributes, {"cap": "1"})
    made.intel_tables(GPU, intel_dump(GPU, [(0x100, 0x5000, 1, 3)]))
    made.write("/dev/mem", bytes(8192))
    found = {domain.group: domain for domain in iommu.domains(made.root)}
    assert set(found) == {0, 3, 12}
    assert (found[0].devices, found[0].mapped) == (("AMDI0096:00",), None)
    assert says in found[0].why_not
    assert "debugfs mounted" not in found[0].why_not
    with pytest.raises(NotFound, match="IOMMU group 0"):
        iommu.table(made.root, "0")


def test_a_group_is_read_by_the_pci_function_in_it_whatever_else_is(made: Tree) -> None:
    made.directory("/sys/kernel/iommu_groups/12/devices/0000-dma")
    made.iommu("dmar0", [GPU, "0000-dma"], "intel-iommu", {"cap": "1"})
    made.intel_tables(GPU, intel_dump(GPU, [(0x100, 0x5000, 1, 3)]))
    (domain,) = (domain for domain in iommu.domains(made.root) if domain.group == 12)
    assert (domain.devices, domain.mapped) == (("0000-dma", GPU), 4096)


def test_a_name_that_is_too_long_is_never_taken_for_one_that_begins_like_it() -> None:
    with pytest.raises(NotFound, match="at most 31"):
        vtd.parse([intel_dump("x" * 31, [(1, 2, 1, 3)]).encode()], "x" * 32)


def test_a_group_that_cannot_be_read_says_why_and_costs_no_other(made: Tree) -> None:
    made.write("/sys/kernel/iommu_groups/3/reserved_regions", "nonsense\n")
    unread, read = iommu.domains(made.root)
    assert (unread.group, unread.kind, unread.mapped) == (3, "unknown", None)
    assert "reserved_regions is not as the kernel writes it" in unread.why_not
    assert (read.group, read.devices) == (12, (GPU,))


def test_a_group_that_goes_while_it_is_read_costs_no_other(made: Tree) -> None:
    made.directory("/sys/kernel/iommu_groups/7/devices")  # listed, and its files are gone
    assert [domain.group for domain in iommu.domains(made.root)] == [3, 12]


# --- Intel's page tables ----------------------------------------------------------------------------------------


def test_one_file_for_all_devices_as_older_kernels_have_it(made: Tree) -> None:
    dump = intel_dump(NIC, [(1, 2, 1, 3)]) + "DMA Remapping is not enabled on dmar1\n" + intel_dump(GPU, [(3, 4, 1, 3)])
    made.write("/sys/kernel/debug/iommu/intel/domain_translation_struct", dump)
    assert list(vtd.iovas(made.root, GPU)) == [vtd.Iova(3, 4, 1, "rw", False)]


def test_no_debugfs_is_not_found(made: Tree) -> None:
    with pytest.raises(NotFound):
        list(vtd.iovas(made.root, GPU))
