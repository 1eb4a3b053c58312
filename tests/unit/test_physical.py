"""The host's physical memory in a line of cells: amounts add up, and what is rare is still seen."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support.synthetic import GIB, MIB, snapshot

from memconsole import physical
from memconsole.model import Range, Survival
from memconsole.physical import Share
from memconsole.views.glance import Held

HOST = snapshot()


def test_the_shares_of_use_are_all_of_the_memory() -> None:
    shares = {share.name: share.size for share in physical.by_use(HOST, Held().resident(HOST))}
    assert sum(shares.values()) == HOST.memory.total
    small = [region for region in HOST.regions if region.page_size == HOST.host.page_size]
    assert shares["regions"] == sum(region.seen.resident for region in small if region.seen is not None)
    assert shares["hugetlb pools"] == 1024 * 2 * MIB + 16 * GIB
    assert shares["free"] == HOST.memory.free


def test_shares_never_exceed_what_is_used_whatever_the_counters_say() -> None:
    memory = replace(HOST.memory, available=HOST.memory.total - MIB, free=HOST.memory.total)
    shares = physical.by_use(replace(HOST, memory=memory), Held().resident(HOST))
    assert sum(share.size for share in shares) == memory.total
    assert [share.name for share in shares] == ["hugetlb pools", "free"]


@pytest.mark.parametrize("width", [10, 57, 200])
def test_cells_fill_the_width_and_leave_no_share_out(width: int) -> None:
    shares = [Share("a", 1, "a", ""), Share("b", 1 << 40, "b", ""), Share("c", 1 << 39, "c", "")]
    found = physical.cells(shares, width)
    assert sum(found) == width
    assert min(found) >= 1
    assert physical.cells([], width) == []


def test_by_place_a_cell_shows_the_rarest_that_is_in_it() -> None:
    iomem = (
        Range(0, GIB, "System RAM"),
        Range(MIB, 2 * MIB, "Kernel code", 1),
        Range(3 * GIB, 3 * GIB + MIB, "PCI Bus 0000:00"),
        Range(4 * GIB, 8 * GIB, "System RAM"),
        Range(64 * GIB, 65 * GIB, "PCI Bus 0000:00"),
    )
    scratch = Survival(scratch=(Range(5 * GIB, 5 * GIB + MIB, "scratch"),))
    marks, kinds = physical.by_place(replace(HOST, iomem=iomem, survival=scratch), 8)
    assert marks == "▓··=█▒██", "what lies behind the last RAM is left out"
    assert {kind.name: kind.size for kind in kinds} == {
        "holes": 3 * GIB - MIB,
        "RAM": 5 * GIB,
        "devices": MIB,
        "kernel": MIB,
        "KHO scratch": MIB,
    }


def test_where_addresses_are_not_shown_there_is_no_strip() -> None:
    assert physical.by_place(replace(HOST, iomem=()), 50) == ("", [])
    assert physical.by_place(HOST, 0) == ("", [])
