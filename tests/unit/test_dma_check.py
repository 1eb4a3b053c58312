"""What a device's page tables say against what was granted: each difference by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.trees import Tree

from memconsole.backend.dma import check
from memconsole.backend.dma.check import Run, compare
from memconsole.model import Access, Grant, GrantState

P = 4096
EDU = "0000:00:04.0"
ONE = Grant("g1", "ram", "vm", 0, 16 * P, Access.RW, GrantState.MAPPED, gpa=0x100 * P, dma=EDU)
TWO = replace(ONE, id="g2", offset=32 * P, length=8 * P, gpa=0x200 * P)
FRAMES: dict[str, Sequence[Run] | None] = {
    "g1": [Run(0x100, 7000, 10), Run(0x10A, 9000, 6)],
    "g2": [Run(0x200, 5000, 8)],
}
TABLES = [Run(0x100, 7000, 10), Run(0x10A, 9000, 6), Run(0x200, 5000, 8)]


def found(tables: Sequence[Run], frames: dict[str, Sequence[Run] | None] = FRAMES) -> list[tuple[str, str]]:
    findings = list(compare(EDU, [ONE, TWO], tables, frames))
    assert all(finding.what and finding.evidence and finding.remedy for finding in findings)
    return [(finding.id, finding.subject) for finding in findings]


def test_tables_as_granted_are_no_finding_however_they_are_cut() -> None:
    assert found(TABLES) == []
    apart = [Run(run.page + n, run.pfn + n, 1) for run in TABLES for n in range(run.pages)]
    assert found(apart) == []


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (TABLES[1:], [("dma-missing", "g1")]),
        ([], [("dma-missing", "g1"), ("dma-missing", "g2")]),
        ([*TABLES, Run(0x900, 1, 1)], [("dma-unknown", EDU)]),
        ([*TABLES[:2], Run(0x1FF, 4999, 9)], [("dma-unknown", EDU)]),
        ([*TABLES[:2], Run(0x200, 5000, 9)], [("dma-unknown", EDU)]),
        ([*TABLES[:2], Run(0x200, 5001, 8)], [("dma-elsewhere", "g2")]),
        ([Run(0x100, 7000, 16), TABLES[2]], [("dma-elsewhere", "g1")]),
    ],
)
def test_a_difference_has_its_name(tables: Sequence[Run], expected: list[tuple[str, str]]) -> None:
    assert found(tables) == expected


def test_frames_nobody_read_are_not_judged() -> None:
    assert found([Run(0x100, 1, 16), Run(0x200, 99, 8)], {"g1": None, "g2": None}) == []
    assert found(TABLES, {**FRAMES, "g2": []}) == [("dma-elsewhere", "g2")]


def test_a_device_that_is_not_alone_in_its_group_is_named_and_bridges_do_not_count(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(EDU, ids=(0x1234, 0x11E8), class_code=0xFF0000, group=5)
    tree.pci("0000:00:1c.0", ids=(1, 2), class_code=0x060400, group=5)
    tree.pci("0000:01:00.0", ids=(1, 3), class_code=0x020000, group=6)
    assert list(check._shared(tree.root, {EDU})) == []
    tree.pci("0000:02:00.0", ids=(1, 4), class_code=0x020000, group=5)
    (finding,) = check._shared(tree.root, {EDU})
    assert (finding.id, finding.subject) == ("device-shared", EDU)
    assert "0000:02:00.0" in finding.what


def test_a_device_nobody_holds_is_lost() -> None:
    given = [("vm", EDU)]
    assert list(check._lost(given, {EDU: "vm"})) == []
    assert [finding.id for held in ({}, {EDU: "other"}) for finding in check._lost(given, held)] == ["dma-lost"] * 2
