"""What the detail of a guest joins: its NUMA cells with the regions that are their RAM, and the devices it has."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from support.desks import grant, region
from support.domains import host

from memconsole.backend.observe.survey import SurveyInput, survey
from memconsole.model import Device, Guest, RegionSeen, Snapshot
from memconsole.views import tables

M = 1 << 20


def adopted(tmp_path: Path) -> tuple[Snapshot, Guest]:
    """A guest of two cells, the second of which is in two parts."""
    snapshot = survey(SurveyInput(), host(tmp_path).root)
    guest = replace(snapshot.guests[0], name="web")
    regions = tuple(
        replace(region(f"web.ram-node{n}", 64 * M), block=f"ram-node{n}", seen=RegionSeen(32 * M, runs=3))
        for n in range(2)
    )
    grants = (
        replace(grant("g1", region="web.ram-node0", guest="web"), gpa=0),
        replace(grant("g2", region="web.ram-node1", guest="web"), gpa=64 * M),
        replace(grant("g3", region="web.ram-node1", guest="web"), gpa=4 << 30, offset=32 * M),
    )
    return replace(snapshot, guests=(guest,), regions=regions, grants=grants), guest


def test_each_cell_has_its_region_with_address_and_frames(tmp_path: Path) -> None:
    snapshot, guest = adopted(tmp_path)
    rows = [[field.text(row) for field in tables.CELLS.fields] for row in tables.cells(snapshot, guest)]
    assert [row[:4] for row in rows] == [["0", "64M", "0", "web.ram-node0"], ["1", "64M", "1", "web.ram-node1"]]
    assert [row.gpa for row in tables.cells(snapshot, guest)] == [0, 64 * M]
    assert [row[5:] for row in rows] == [["32M", "3"], ["32M", "3"]]


def test_cells_of_one_that_is_not_adopted_stand_alone(tmp_path: Path) -> None:
    snapshot, guest = adopted(tmp_path)
    rows = tables.cells(replace(snapshot, grants=()), guest)
    assert [(row.cell.id, row.region, row.gpa) for row in rows] == [(0, None, None), (1, None, None)]
    assert all(field.text(row) is not None for row in rows for field in tables.CELLS.fields)


def test_its_devices_are_those_that_its_manager_names(tmp_path: Path) -> None:
    snapshot, guest = adopted(tmp_path)
    devices = (Device("0000:41:00.1", 0x8086, 0x10ED, 0x20000), Device("0000:41:00.0", 0x8086, 0x10FB, 0x20000))
    found = tables.passed_through(replace(snapshot, devices=devices), guest)
    assert [each.bdf for each in found] == ["0000:41:00.1"]
