"""Labelled tables, held against what a walk over single pages finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole import labels
from memconsole.errors import UsageError
from memconsole.extents import Extent, ExtentTable, Flag

PAGES = 120
LABELS = 6
ranges = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40), st.integers(0, LABELS - 1)), max_size=8
)  # fmt: skip


def by_page(table: ExtentTable) -> dict[int, tuple[int, int]]:
    """The frame and the label of every page."""
    return {
        row.offset + into: (row.pfn + into, labels.label_of(row)) for row in table for into in range(row.count)
    }  # fmt: skip


def walked(parts: list[tuple[int, int, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for first, frames, label in sorted(parts):
        for frame in range(first, first + frames):
            found.setdefault(frame, label)
    return found


@given(ranges)
def test_painted_ranges_have_their_labels_and_the_earlier_one_wins(parts: list[tuple[int, int, int]]) -> None:
    with labels.painted(parts) as table:
        found = by_page(table)
        assert {frame: label for frame, (_, label) in found.items()} == walked(parts)
        assert all(frame == pfn for frame, (pfn, _) in found.items())


@given(st.lists(ranges, max_size=5))
def test_of_stacked_tables_the_later_one_is_seen(stack: list[list[tuple[int, int, int]]]) -> None:
    expected: dict[int, int] = {}
    for parts in stack:
        expected |= walked(parts)
    with labels.stacked([labels.painted(parts) for parts in stack]) as table:
        assert {frame: label for frame, (_, label) in by_page(table).items()} == expected


@given(ranges, st.lists(st.tuples(st.integers(0, PAGES), st.integers(1, 9)), max_size=12))
def test_pages_get_the_labels_of_their_frames(parts: list[tuple[int, int, int]], runs: list[tuple[int, int]]) -> None:
    rows, page = [], 3
    for number, (pfn, count) in enumerate(runs):
        rows.append(Extent(page, pfn, count, int(Flag.SWAP if number % 5 == 4 else Flag.PRESENT)))
        page += count + number % 3
    owners = walked(parts)
    with ExtentTable.from_rows(rows) as table, labels.painted(parts) as frames:
        found = by_page(labels.classified(table, frames))
    present = [row for row in rows if row.flags & Flag.PRESENT]
    assert found == {
        row.offset + into: (row.pfn + into, owners.get(row.pfn + into, 0))
        for row in present
        for into in range(row.count)
    }


@given(ranges, st.integers(1, 20), st.sets(st.integers(1, 3)))
def test_a_cell_has_the_look_of_most_of_its_pages_unless_another_shouts(
    parts: list[tuple[int, int, int]], cells: int, loud: set[int]
) -> None:
    looks = bytes((0, 1, 2, 3, 1, 0))
    mask = sum(1 << look for look in loud)
    owners = walked(parts)
    with labels.painted(parts) as table:
        shown, most = labels.count_looks(table, (0, PAGES, cells), looks, mask)
    for cell in range(cells):
        span = range(PAGES * cell // cells, PAGES * (cell + 1) // cells)
        counts = [0] * 4
        for page in span:
            counts[looks[owners[page]] if page in owners else 0] += 1
        shouting = [look for look in (1, 2, 3) if counts[look] and look in loud]
        rest = shouting or [look for look in (1, 2, 3) if counts[look]]
        best = max(rest, key=lambda look: (counts[look], -look), default=0)
        assert shown[cell] == best
        assert most[cell] == counts[best]


def test_a_range_longer_than_a_row_can_be_is_painted_whole() -> None:
    with labels.painted([(1 << 30, 1 << 34, 5)]) as table:
        assert sum(row.count for row in table) == 1 << 34
        assert labels.count_looks(table, (1 << 30, 1 << 34, 1), bytes(6)) == (b"\0", [1 << 34])
        row = table.lookup((1 << 30) + (1 << 33) + 7)
        assert row is not None
        assert labels.label_of(table[row]) == 5


def test_a_look_that_cannot_be_is_refused() -> None:
    with labels.painted([(0, 4, 1)]) as table:
        with pytest.raises(UsageError, match="look beyond"):
            labels.count_looks(table, (0, 4, 1), bytes((0, 64)))
        with pytest.raises(UsageError, match="no cells"):
            labels.count_looks(table, (0, 4, 0), bytes(2))


def test_pages_are_told_apart_by_a_flag() -> None:
    rows = [
        Extent(0, 100, 4, int(Flag.PRESENT | Flag.EXCLUSIVE)),
        Extent(4, 104, 4, int(Flag.PRESENT | Flag.FILE)),
        Extent(8, 64, 2, int(Flag.SWAP)),
    ]
    with ExtentTable.from_rows(rows) as table, labels.flagged(table, Flag.EXCLUSIVE) as marked:
        assert [(row.offset, row.pfn, row.count, labels.label_of(row)) for row in marked] == [
            (0, 100, 4, 2),
            (4, 104, 4, 1),
        ]


def test_a_labelled_table_does_not_leave_the_process() -> None:
    with labels.painted([(0, 4, 1)]) as table, pytest.raises(UsageError):
        ExtentTable.from_rows(list(table))
