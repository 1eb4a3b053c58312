"""The host map: whose every frame is, by what the kernel says and the tables of frames."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace
from support.synthetic import MIB, NOW_NS, PAGE, SyntheticSource, snapshot

from memconsole import hostmap
from memconsole.errors import MemconsoleError
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.hostmap import HOLE, Use
from memconsole.model import LiveSession, Node, Range, Snapshot, Survival, Window

GIB = 1 << 30
PRESENT = int(Flag.PRESENT)


@pytest.fixture
def host() -> Snapshot:
    """A host of 4 GiB in two nodes with a hole for MMIO, one region in two runs, one BAR granted to a guest."""
    made = snapshot(regions=1, guests=1, windows=0, domains=0)
    return replace(
        made,
        memory=replace(
            made.memory,
            nodes=(
                Node(0, 2 * GIB, GIB, "0", (Range(0, 2 * GIB, "node 0"),)),
                Node(1, 2 * GIB, GIB, "1", (Range(4 * GIB, 6 * GIB, "node 1"),)),
            ),
        ),
        iomem=(
            Range(0x1000, 0x9FC00, "System RAM"),
            Range(0x9FC00, 0x100000, "Reserved"),
            Range(0x100000, 2 * GIB, "System RAM"),
            Range(16 * MIB, 32 * MIB, "Kernel code", 1),
            Range(0xC0000000, 0xFEC00000, "PCI Bus 0000:00"),
            Range(0xD0000000, 0xD0100000, "0000:00:04.0", 1),
            Range(4 * GIB, 6 * GIB, "System RAM"),
        ),
        survival=Survival(scratch=(Range(64 * MIB, 80 * MIB, "scratch"),)),
        windows=(
            Window("0000:00:04.0:0", "0000:00:04.0", 0, 0xD0000000, 0x100000, driver="vfio-pci", guest="web0"),
            Window("0000:00:05.0:0", "0000:00:05.0", 0, 0x3000, 0x20, io=True),
        ),
    )


@pytest.fixture
def tables(host: Snapshot) -> SyntheticSource:
    source = SyntheticSource(host)
    name = host.regions[0].name
    rows = [Extent(0, 0x10000, 8192, PRESENT), Extent(8192, 0x7FF00, 0x100, PRESENT)]
    source.show_rows(f"region:{name}", [*rows, Extent(8448, 0x100000, 7936, PRESENT)])
    return source


def test_later_layers_lie_over_earlier_ones(host: Snapshot, tables: SyntheticSource) -> None:
    found = hostmap.survey(host, tables)
    name = host.regions[0].name
    expected = {
        0x1: (Use.RAM, "System RAM"),
        0xA0: (Use.FIRMWARE, "Reserved"),
        16 * MIB // PAGE: (Use.KERNEL, "Kernel code"),
        32 * MIB // PAGE: (Use.RAM, "System RAM"),
        64 * MIB // PAGE: (Use.SCRATCH, "KHO scratch"),
        0x10000: (Use.REGION, name),
        0x11FFF: (Use.REGION, name),
        0x12000: (Use.RAM, "System RAM"),
        0x100000: (Use.REGION, name),
        0xC0001: (Use.BUS, "PCI Bus 0000:00"),
        0xD0000: (Use.GRANTED, "0000:00:04.0:0 vfio-pci"),
    }
    assert {pfn: (found.owner_at(pfn).owner.use, found.owner_at(pfn).owner.name) for pfn in expected} == expected
    assert found.owner_at(0x90000).owner is HOLE
    assert found.owner_at(0xFFFFFFF).owner is HOLE
    assert found.unseen == ()
    found.close()


def test_a_frame_names_the_page_that_is_in_it_and_its_guest(host: Snapshot, tables: SyntheticSource) -> None:
    found = hostmap.survey(host, tables)
    assert found.owner_at(0x10005).page == 5
    place = found.owner_at(0x100001)
    assert (place.page, place.owner.guest, place.owner.subject) == (8449, "web0", f"region:{host.regions[0].name}")
    assert found.owner_at(0x1).page is None
    assert (found.node_of(0x10), found.node_of(0x100000), found.node_of(0x90000)) == (0, 1, None)


def test_ranges_are_cut_by_owner_and_node_and_add_up(host: Snapshot, tables: SyntheticSource) -> None:
    found = hostmap.survey(host, tables)
    rows = list(found.ranges())
    assert all(before.end <= after.start for before, after in itertools.pairwise(rows))
    assert all(row.size == row.end - row.start for row in rows)
    region = [row for row in rows if row.use == "region"]
    assert [(row.start, row.node) for row in region] == [(0x10000000, 0), (0x7FF00000, 0), (0x100000000, 1)]
    assert sum(row.size for row in region) == (8192 + 0x100 + 7936) * PAGE
    within = list(found.ranges((0x10000000, 0x10002000)))
    assert [(row.start, row.size, row.use) for row in within] == [(0x10000000, 0x2000, "region")]
    totals = {(row.use, row.node): row for row in found.totals()}
    assert totals["region", 0].size == (8192 + 0x100) * PAGE
    assert totals["region", 0].runs == 2
    assert sum(row.size for row in totals.values()) == sum(row.size for row in rows)


def test_blocks_leave_out_buses_and_long_holes(host: Snapshot) -> None:
    found = hostmap.survey(host)
    assert found.blocks == ((1, 0x80000 - 1), (0xD0000, 0x100), (0x100000, 0x80000))


def test_what_is_preserved_is_seen_while_sessions_are_open(host: Snapshot, tables: SyntheticSource) -> None:
    tables.show_rows(hostmap.PRESERVED, [Extent(0x20000, 0x20000, 16, PRESENT), Extent(0x10000, 0x10000, 16, PRESENT)])
    assert hostmap.survey(host, tables).owner_at(0x20000).owner.use is Use.RAM
    open_now = replace(host, survival=replace(host.survival, sessions=(LiveSession("web", (1,)),)))
    found = hostmap.survey(open_now, tables)
    assert found.owner_at(0x2000F).owner.use is Use.PRESERVED
    assert found.owner_at(0x10000).owner.use is Use.REGION


def test_a_table_that_cannot_be_had_is_named(host: Snapshot) -> None:
    class Without(SyntheticSource):
        def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
            raise MemconsoleError(f"no {key}", "PFNs are hidden", "run as root")

    found = hostmap.survey(host, Without(host))
    assert [(gap.source, gap.why) for gap in found.unseen] == [(f"region:{host.regions[0].name}", "PFNs are hidden")]
    assert found.owner_at(0x10000).owner.use is Use.RAM


def test_a_host_that_shows_no_addresses_has_an_empty_map() -> None:
    found = hostmap.survey(replace(snapshot(windows=0), iomem=(), taken_ns=NOW_NS))
    assert found.blocks == ()
    assert list(found.ranges()) == []


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("System RAM (kmem)", Use.RAM),
        ("Kernel bss", Use.KERNEL),
        ("Crash kernel", Use.KERNEL),
        ("ACPI Tables", Use.FIRMWARE),
        ("reserved", Use.FIRMWARE),
        ("Persistent Memory (legacy)", Use.PERSISTENT),
        ("Soft Reserved", Use.PERSISTENT),
        ("PCI Bus 0000:00", Use.BUS),
        ("PCI ECAM 0000 [bus 00-00]", Use.MMIO),
        ("IOAPIC 0", Use.MMIO),
    ],
)
def test_what_the_kernel_calls_a_range_says_its_use(name: str, use: Use) -> None:
    assert hostmap.use_of(Range(0, PAGE, name)) is use
