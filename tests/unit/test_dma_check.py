"""What a device's page tables say against what was granted: each difference by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.trees import Tree

from memconsole.backend.dma import check
from memconsole.backend.dma.check import compare_tables, difference_findings
from memconsole.backend.dma.frame_owners import WINDOW, Owners
from memconsole.backend.kernel import pci
from memconsole.extents import Extent, ExtentTable, Flag, Part
from memconsole.model import Access, Grant, GrantState

P = 4096
EDU = "0000:00:04.0"
ONE = Grant("g1", "ram", "vm", 0, 16 * P, Access.RW, GrantState.MAPPED, gpa=0x100 * P, dma=EDU)
TWO = replace(ONE, id="g2", offset=32 * P, length=8 * P, gpa=0x200 * P, access=Access.RO)
R, RW = Flag.PRESENT | Flag.READ, Flag.PRESENT | Flag.READ | Flag.WRITE
FILE = Flag.PRESENT | Flag.FILE
REGION = [Extent(0, 7000, 10, FILE), Extent(10, 9000, 10, FILE), Extent(32, 5000, 8, FILE | Flag.HUGE)]
TABLES = [Extent(0x100, 7000, 10, RW), Extent(0x10A, 9000, 6, RW), Extent(0x200, 5000, 8, R | Flag.HUGE)]


def found(
    tables: Sequence[Extent], *, unread: Sequence[str] = (), region: Sequence[Extent] = REGION
) -> list[tuple[str, str]]:
    with (
        contextlib.ExitStack() as stack,
        ExtentTable.from_rows(tables) as table,
        ExtentTable.from_rows(region, first=0, pages=64) as frames,
    ):
        parts = {grant.id: Part(frames, grant.offset // P, 0, 0) for grant in (ONE, TWO) if grant.id not in unread}
        differences = compare_tables([TWO, ONE], table, {"g1": None, "g2": None, **parts})
        findings = [
            *difference_findings(EDU, [ONE, TWO], differences),
            *check._targets(EDU, differences.unknown, stack.enter_context(owners()), {"ram"}),
        ]
    assert all(finding.observed and finding.evidence and finding.remedy for finding in findings)
    return [(finding.id, finding.subject) for finding in findings]


def owners() -> Owners:
    """Frames below 100 are nobody's, 100 is another region's, 101 a window's, the rest are the guest's own."""
    rows = (("other", Extent(7, 100, 1, FILE)), (WINDOW, Extent(0, 101, 1, FILE)), ("ram", Extent(0, 102, 10000, FILE)))
    return Owners((name, ExtentTable.from_rows([row])) for name, row in rows)


def test_tables_as_granted_are_no_finding_however_they_are_cut() -> None:
    assert found(TABLES) == []
    apart = [Extent(run.offset + n, run.pfn + n, 1, run.flags) for run in TABLES for n in range(run.count)]
    assert found(apart) == []


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (TABLES[1:], [("dma-missing", "g1")]),
        ([], [("dma-missing", "g1"), ("dma-missing", "g2")]),
        ([*TABLES, Extent(0x900, 1, 1, RW)], [("dma-unknown", EDU), ("dma-outside", EDU)]),
        ([*TABLES, Extent(0x900, 100, 1, RW)], [("dma-unknown", EDU), ("frame-shared", EDU)]),
        ([*TABLES, Extent(0x900, 101, 1, RW)], [("dma-unknown", EDU)]),
        ([*TABLES, Extent(0x900, 101, 2, RW)], [("dma-unknown", EDU)]),
        (
            [*TABLES, Extent(0x900, 98, 5, RW)],
            [("dma-unknown", EDU), ("frame-shared", EDU), ("dma-outside", EDU)],
        ),
        ([*TABLES[:2], Extent(0x1FF, 4999, 9, R)], [("dma-unknown", EDU)]),
        ([*TABLES[:2], Extent(0x200, 5000, 9, R)], [("dma-unknown", EDU)]),
        ([*TABLES[:2], Extent(0x200, 5001, 8, R)], [("dma-elsewhere", "g2")]),
        ([*TABLES[:2], Extent(0x200, 5000, 8, RW)], [("dma-writable", "g2")]),
        ([Extent(0x100, 7000, 16, RW), TABLES[2]], [("dma-elsewhere", "g1")]),
    ],
)
def test_a_difference_has_its_name(tables: Sequence[Extent], expected: list[tuple[str, str]]) -> None:
    assert found(tables) == expected


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.integers(1, 5)), max_size=9),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
)
def test_runs_are_cut_where_their_owner_changes(
    known: list[tuple[str, int, int]], asked: list[tuple[int, int]]
) -> None:
    owned: dict[int, str] = {}
    tables, at = [], 0
    for name, gap, count in known:
        tables.append((name, ExtentTable.from_rows([Extent(3, at + gap, count, FILE)], first=0, pages=count + 3)))
        owned.update((at + gap + n, name) for n in range(count))
        at += gap + count
    runs = [Extent(100 * n, pfn, count, RW) for n, (pfn, count) in enumerate(asked)]
    with Owners(tables) as owners:
        pieces = list(owners.pieces(runs))
    pages = [(piece.offset + n, piece.pfn + n, owner) for owner, piece in pieces for n in range(piece.count)]
    assert pages == [(run.offset + n, run.pfn + n, owned.get(run.pfn + n)) for run in runs for n in range(run.count)]


def test_a_difference_says_how_much_and_where() -> None:
    with ExtentTable.from_rows([*TABLES, Extent(0x900, 1, 3, RW)]) as table:
        (finding,) = difference_findings(EDU, [ONE, TWO], compare_tables([ONE, TWO], table, {"g1": None, "g2": None}))
    assert "12K" in finding.observed
    assert "0x00900000" in finding.evidence
    assert "PFN 0x1" in finding.evidence


def test_frames_nobody_read_are_not_judged() -> None:
    assert found([Extent(0x100, 1, 16, RW), Extent(0x200, 99, 8, R)], unread=["g1", "g2"]) == []
    assert found([Extent(0x100, 1, 15, RW), Extent(0x200, 99, 8, R)], unread=["g1", "g2"]) == [("dma-missing", "g1")]
    assert found(TABLES, region=REGION[:2]) == [("dma-elsewhere", "g2")]


def test_a_device_that_is_not_alone_in_its_group_is_named_and_bridges_do_not_count(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(EDU, ids=(0x1234, 0x11E8), class_code=0xFF0000, group=5)
    tree.pci("0000:00:1c.0", ids=(1, 2), class_code=0x060400, group=5)
    tree.pci("0000:01:00.0", ids=(1, 3), class_code=0x020000, group=6)
    assert list(check._shared_groups(pci.functions(tree.root), {EDU})) == []
    tree.pci("0000:02:00.0", ids=(1, 4), class_code=0x020000, group=5)
    (finding,) = check._shared_groups(pci.functions(tree.root), {EDU})
    assert (finding.id, finding.subject) == ("device-shared", EDU)
    assert "0000:02:00.0" in finding.observed


def test_interrupts_that_are_not_remapped_are_named(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("/proc/interrupts", "   0:   112   IR-IO-APIC   2-edge   timer\n")
    assert list(check._interrupts(tree.root, {EDU})) == []  # there is no IOMMU
    tree.iommu("dmar0", [EDU], "intel-iommu", {"cap": "1"})
    assert list(check._interrupts(tree.root, {EDU})) == []
    tree.write("/proc/interrupts", "   0:   112   IO-APIC   2-edge   timer\n  24:  0  DMAR-MSI 0-edge dmar0\n")
    assert list(check._interrupts(tree.root, set())) == []
    assert [(each.id, each.subject) for each in check._interrupts(tree.root, {EDU})] == [("device-interrupts", EDU)]


def test_a_device_nobody_holds_is_lost() -> None:
    given = [("vm", EDU)]
    assert list(check._lost_devices(given, {EDU: "vm"})) == []
    assert [finding.id for held in ({}, {EDU: "other"}) for finding in check._lost_devices(given, held)] == [
        "dma-lost"
    ] * 2
