"""A guest joined with its frames, windows and IOVAs; a frame with everybody who reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole import joined, recording
from memconsole.errors import NotFound, UsageError
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.joined import Frame, Joined, Reacher
from memconsole.model import (
    Access,
    Device,
    Domain,
    FrameState,
    Grant,
    GrantMapping,
    GrantState,
    Guest,
    GuestKind,
    GuestState,
    Range,
    Region,
    RegionSeen,
    RegionState,
    Snapshot,
    Window,
)

P = 4096
NIC, BMC, DISK = "0000:41:00.0", "0000:02:00.0", "0000:03:00.0"
RW = Flag.PRESENT | Flag.READ | Flag.WRITE
FILE = Flag.PRESENT | Flag.FILE
BAR = 0xFE000
BASE = synthetic.snapshot(1, 1)

SNAPSHOT = replace(
    BASE,
    regions=(
        Region(
            "ram", "memfd", 64 * P, P, RegionState.MAPPED, grants=("g1",), seen=RegionSeen(64 * P, mappers=(500, 600))
        ),
        Region("spare", "memfd", 8 * P, P, RegionState.RESERVED, seen=RegionSeen(8 * P)),
    ),
    guests=(
        Guest("vm", GuestKind.QEMU, GuestState.RUNNING, 500, grants=("g1",)),
        Guest("qemu-700", GuestKind.FOREIGN, GuestState.RUNNING, 700, memory=16 * P),
    ),
    grants=(
        Grant(
            "g1",
            "ram",
            "vm",
            16 * P,
            32 * P,
            Access.RW,
            GrantState.MAPPED,
            gpa=0x100 * P,
            dma=NIC,
            seen=(GrantMapping(500, 0x7F0000000000, 0x7F0000000000 + 32 * P, 16 * P, "rw-s"),),
        ),
    ),
    devices=(
        Device(NIC, 1, 2, 0x020000, "vfio-pci", 9),
        Device(BMC, 1, 3, 0x030000, "ast", 3),
        Device(DISK, 1, 4, 0x010000, "vfio-pci", 7, holders=(700,)),
    ),
    windows=(
        Window(
            f"{NIC}:0",
            NIC,
            0,
            BAR * P,
            4 * P,
            driver="vfio-pci",
            claimed="vfio-pci",
            holders=(500,),
            grant="g2",
            guest="vm",
        ),
    ),
    domains=(
        Domain(3, "identity", "dmar0", (BMC,), why_not="identity: an IOVA is the physical address"),
        Domain(7, "DMA-FQ", "dmar0", (DISK,), mapped=16 * P, extents=1),
        Domain(9, "DMA-FQ", "dmar0", (NIC,), mapped=33 * P, extents=3),
    ),
    iomem=(
        Range(0x1000, 0x80000000, "System RAM"),
        Range(0x1000000, 0x2000000, "Kernel code", 1),
        Range(BAR * P, (BAR + 16) * P, "PCI Bus 0000:41"),
    ),
)
ROWS: dict[str, Sequence[Extent]] = {
    "region:ram": [Extent(0, 0x5000, 40, FILE), Extent(41, 0x6000, 23, FILE)],
    "region:spare": [Extent(0, 0x7000, 8, FILE)],
    "guest:qemu-700": [Extent(0x7E000, 0x8000, 16, FILE)],
    "domain:7": [Extent(0x10, 0x8000, 16, RW)],
    "domain:9": [
        Extent(0x100, 0x5010, 20, RW),
        Extent(0x114, 0x4444, 4, RW),  # other frames than the region has
        Extent(0x119, 0x6000, 7, RW),
        Extent(0x300, 0x7002, 2, Flag.PRESENT | Flag.READ),
    ],
}


class Shown:
    """Tables as they are given; others are not to be had."""

    def __init__(self, rows: Mapping[str, Sequence[Extent]]) -> None:
        self._rows = rows

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        if key not in self._rows:
            raise NotFound(f"no PFN map of {key}", "it is not recorded")
        return ExtentTable.from_rows(self._rows[key])

    def frame(self, pfn: int) -> FrameState:
        return FrameState(pfn, ("lru", "mmap"), 2)


def asked(target: str, rows: Mapping[str, Sequence[Extent]] = ROWS, snapshot: Snapshot = SNAPSHOT) -> Joined | Frame:
    return joined.resolve_target(snapshot, Shown(rows), target)


def frame(target: str) -> Frame:
    found = asked(target)
    assert isinstance(found, Frame)
    return found


def reached(found: Frame) -> list[tuple[str, str, int | None]]:
    return [(each.kind, each.who, each.address) for each in found.reached]


def test_a_guest_s_memory_is_split_where_frames_or_iovas_do_not_go_on() -> None:
    found = asked("vm")
    assert isinstance(found, Joined)
    ram = [span for span in found.spans if span.kind == "ram"]
    assert [(span.gpa // P, span.size // P, span.pfn) for span in ram if span.gpa is not None] == [
        (0x100, 20, 0x5010),
        (0x114, 4, 0x5024),
        (0x118, 1, None),
        (0x119, 7, 0x6000),
    ]
    assert ram[0].iovas == ((NIC, 0x100 * P, "rw"),)
    assert (ram[0].hva, ram[3].hva) == (0x7F0000000000, 0x7F0000000000 + 25 * P)
    assert [span.note for span in ram] == ["", f"{NIC} finds PFN 0x4444", f"absent; {NIC} does not reach it", ""]
    (window,) = (span for span in found.spans if span.kind == "window")
    assert (window.pfn, window.size, window.grant) == (BAR, 4 * P, "g2")
    (stray,) = (span for span in found.spans if span.kind == "iova")
    assert (stray.pfn, stray.size, stray.iovas) == (0x7002, 2 * P, ((NIC, 0x300 * P, "r"),))
    assert sum(span.size for span in ram) == 32 * P


def test_a_vm_that_is_not_ours_is_joined_with_the_devices_it_holds() -> None:
    found = asked("qemu-700")
    assert isinstance(found, Joined)
    (span,) = found.spans
    assert (span.hva, span.pfn, span.iovas) == (0x7E000 * P, 0x8000, ((DISK, 0x10 * P, "rw"),))


def test_a_frame_of_a_region_and_all_who_reach_it() -> None:
    found = frame("0x5011")
    assert (found.region, found.offset, found.guests) == ("ram", 17 * P, (("vm", 0x101 * P),))
    assert found.where == ("System RAM",)
    assert reached(found) == [
        ("kernel", "kernel", None),
        ("process", "500", 0x7F0000001000),
        ("process", "600", None),
        ("device", BMC, 0x5011 * P),
        ("device", NIC, 0x101 * P),
    ]
    assert "without a grant" in found.reached[2].how
    assert found.unseen == ()


def test_a_frame_that_only_a_stray_device_reaches() -> None:
    found = frame("0x7002")
    assert found.region == "spare"
    assert ("device", NIC, 0x300 * P) in reached(found)


@pytest.mark.parametrize(
    ("target", "pfn"),
    [
        (f"0x101000@{NIC}", 0x5011),
        (f"0x114000@{NIC}", 0x4444),
        ("0x11000@region:ram", 0x5011),
        ("0x11000@ram", 0x5011),
        ("0x7e000000@qemu-700", 0x8000),
        (f"0x1234000@{BMC}", 0x1234),  # nothing translates for it
    ],
)
def test_an_address_leads_to_its_frame(target: str, pfn: int) -> None:
    assert frame(target).pfn == pfn


def test_from_an_iova_to_the_page_of_the_guest() -> None:
    assert frame(f"0x119000@{NIC}").guests == (("vm", 0x119 * P),)


def test_a_frame_of_a_window_and_of_the_kernel() -> None:
    window = frame(f"{BAR + 1:#x}")
    assert {(each.kind, each.who) for each in window.reached} >= {
        ("kernel", "vfio-pci"),
        ("device", NIC),
        ("process", "500"),
        ("guest", "vm"),
    }
    kernel = frame("0x1001")
    assert kernel.where == ("System RAM", "Kernel code")
    assert kernel.reached[0] == Reacher("kernel", "kernel", "its own: Kernel code")
    assert [gap.source for gap in kernel.unseen] == ["processes"]


@pytest.mark.parametrize(
    ("name", "kernels"), [("System RAM (kmem)", True), ("System RAM (virtio_mem)", True), ("System RAMs", False)]
)
def test_memory_that_a_driver_added_is_the_kernel_s_too(name: str, kernels: bool) -> None:
    ranges = (Range(1 << 40, 2 << 40, "dax0.0"), Range(1 << 40, 2 << 40, name, 1))
    found = asked(hex(1 << 28), snapshot=replace(SNAPSHOT, iomem=ranges))
    assert isinstance(found, Frame)
    assert found.where == ("dax0.0", name)
    assert any(each.kind == "kernel" for each in found.reached) == kernels
    assert any(gap.source == "processes" for gap in found.unseen) == kernels


def test_what_could_not_be_had_is_named() -> None:
    found = asked("0x5011", {"region:ram": ROWS["region:ram"]})
    assert {gap.source for gap in found.unseen} == {"region:spare", "domain:7", "domain:9"}
    guest = asked("vm", {})
    assert isinstance(guest, Joined)
    assert [gap.source for gap in guest.unseen] == ["domain:9", "region:ram"]
    assert guest.spans[0].note == "its frames are not shown"


def test_a_long_answer_says_that_there_is_more() -> None:
    found = joined.joined_guest(SNAPSHOT, Shown(ROWS), "vm", most=2)
    assert (len(found.spans), found.more) == (2, True)


def test_a_host_without_an_iommu_confines_nobody() -> None:
    found = asked("0x5011", snapshot=replace(SNAPSHOT, domains=()))
    assert isinstance(found, Frame)
    assert reached(found)[-1] == ("device", "any", 0x5011 * P)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("nobody", UsageError),
        ("-1", UsageError),
        ("0x10000000000000", UsageError),
        ("0x1000@nobody", NotFound),
        (f"0x9999000@{NIC}", NotFound),
        ("zz@ram", UsageError),
        ("", UsageError),
    ],
)
def test_a_target_that_is_none_is_refused(target: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        asked(target)


def test_a_file_answers_as_the_host_does(tmp_path: Path) -> None:
    tables = {key: ExtentTable.from_rows(rows) for key, rows in ROWS.items()}
    recording.write(tmp_path / "host.mc", SNAPSHOT, tables)
    recorded = recording.Recording(tmp_path / "host.mc")
    for target in ("vm", "qemu-700", "0x5011", f"0x119000@{NIC}"):
        live = asked(target)
        if isinstance(live, Frame):
            assert live.state == FrameState(live.pfn, ("lru", "mmap"), 2)
            assert "flags lru mmap; mapped 2 times" in joined.frame_lines(live)
            live = replace(live, state=None)
        assert joined.resolve_target(recorded.snapshot(), recorded, target) == live
    recorded.close()


def test_an_address_that_was_granted_is_found_though_no_process_maps_it() -> None:
    """A grant for a device alone: its guest's process has nothing of it in its own address space."""
    rows = {key: found for key, found in ROWS.items() if not key.startswith("guest:")}
    found = joined.resolve_target(SNAPSHOT, Shown(rows), f"{0x100 * P:#x}@vm")
    assert isinstance(found, Frame)
    assert (found.region, found.offset) == ("ram", 16 * P)
    with pytest.raises(NotFound):
        joined.resolve_target(SNAPSHOT, Shown(rows), "0x1000@vm")


# --- what a name means --------------------------------------------------------------------------------------------


def test_a_name_of_a_guest_and_of_its_ram_is_the_guest() -> None:
    grant = replace(SNAPSHOT.grants[0], guest="ram")
    own = replace(SNAPSHOT, guests=(replace(SNAPSHOT.guests[0], name="ram"),), grants=(grant,))
    assert joined.table_key(own, "ram") == "guest:ram"
    assert joined.table_key(own, "region:ram") == "region:ram"
    assert joined.table_key(own, "spare") == "region:spare"


def test_a_name_of_a_guest_and_of_a_region_that_is_not_its_own_wants_its_kind() -> None:
    other = replace(SNAPSHOT, guests=(replace(SNAPSHOT.guests[0], name="spare"),))
    with pytest.raises(UsageError, match="ambiguous") as refused:
        joined.table_key(other, "spare")
    assert "region:spare or guest:spare" in refused.value.remedy
    with pytest.raises(NotFound):
        joined.table_key(other, "nothing")
