"""Tables against a naive model: a dict from page to what is there."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.errors import UsageError
from memconsole.extents import ChangeKind, Extent, ExtentTable, Flag, Part

FLAGS = [Flag.PRESENT, Flag.PRESENT | Flag.HUGE, Flag.PRESENT | Flag.FILE, Flag.SWAP]
Model = dict[int, tuple[int, int]]


def step(flags: int) -> int:
    return 32 if flags & Flag.SWAP else 1


@st.composite
def row_lists(draw: st.DrawFn) -> list[Extent]:
    """Rows in order that do not overlap; often adjacent, often in consecutive frames, so that merging matters."""
    rows, page, pfn = [], draw(st.integers(0, 5)), 1
    for _ in range(draw(st.integers(0, 12))):
        flags, count = draw(st.sampled_from(FLAGS)), draw(st.integers(1, 6))
        pfn = draw(st.one_of(st.just(pfn), st.integers(1, 40)))
        rows.append(Extent(page, pfn, count, flags))
        pfn += count * step(flags)
        page += count + draw(st.sampled_from([0, 0, 1, 4]))
    return rows


def model_of(rows: list[Extent]) -> Model:
    return {r.offset + i: (r.pfn + i * step(r.flags), r.flags) for r in rows for i in range(r.count)}


@given(row_lists(), st.randoms(use_true_random=False))
def test_rows_in_any_order_become_the_same_merged_table(rows: list[Extent], random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    with ExtentTable.from_rows(shuffled) as table:
        got = table.rows()
        assert model_of(got) == model_of(rows)
        for a, b in itertools.pairwise(got):
            joined = a.offset + a.count == b.offset and a.pfn + a.count * step(a.flags) == b.pfn and a.flags == b.flags
            assert not joined
        assert [table[i] for i in range(len(table))] == got == list(table)
        assert [table[i - len(table)] for i in range(len(table))] == got
        assert table.rows(1, 3) == got[1:3]
        assert table.rows(-2) == got[-2:]
        with pytest.raises(IndexError):
            table[len(table)]


@given(row_lists())
def test_lookups(rows: list[Extent]) -> None:
    model = model_of(rows)
    frames: dict[int, int] = {}
    for page, (pfn, flags) in sorted(model.items(), reverse=True):
        if flags & Flag.PRESENT:
            frames[pfn] = page
    with ExtentTable.from_rows(rows) as table:
        for page in range(-1, max(model, default=0) + 3):
            row = table.lookup(page)
            if page in model:
                assert row is not None
                extent = table[row]
                assert extent.offset <= page < extent.offset + extent.count
            else:
                assert row is None
        for pfn in range(-1, 500):
            assert table.lookup_pfn(pfn) == frames.get(pfn)


@given(row_lists(), row_lists(), st.lists(st.integers(0, 70), max_size=8))
def test_changes_are_counted_by_range_and_listed_outside_of_them(
    old_rows: list[Extent], new_rows: list[Extent], bounds: list[int]
) -> None:
    edges = sorted(bounds[: len(bounds) // 2 * 2])
    ranges = list(zip(edges[::2], edges[1::2], strict=True))
    with ExtentTable.from_rows(old_rows) as before, ExtentTable.from_rows(new_rows) as after:
        tallies, outside, pages = before.diff_count(after, ranges, 2)
        single = [
            c._replace(offset=c.offset + n, count=1, old_pfn=0, new_pfn=0)
            for c in before.diff(after)
            for n in range(c.count)
        ]
    for (first, end), tally in zip(ranges, tallies, strict=True):
        inside = [change for change in single if first <= change.offset < end]
        gone = [change for change in inside if not change.new_flags]
        assert tally.vanished == len(gone)
        assert tally.moved + tally.widened <= len(inside) - len(gone)
    apart = [change for change in single if not any(first <= change.offset < end for first, end in ranges)]
    assert pages == len(apart)
    assert len(outside) <= 2
    listed = [change.offset + n for change in outside for n in range(change.count)]
    assert listed == [change.offset for change in apart][: len(listed)]


def test_what_is_counted_of_a_change() -> None:
    read, write = Flag.PRESENT | Flag.READ, Flag.PRESENT | Flag.READ | Flag.WRITE
    rows = [Extent(0, 10, 4, read), Extent(4, 20, 4, write)]
    with (
        ExtentTable.from_rows(rows) as before,
        ExtentTable.from_rows([Extent(0, 10, 2, write), Extent(2, 40, 2, read), Extent(8, 50, 3, read)]) as after,
    ):
        tallies, outside, pages = before.diff_count(after, [(1, 3), (3, 6), (7, 9)], 9)
        with pytest.raises(UsageError):
            before.diff_count(after, [(3, 6), (5, 7)], 9)
    assert tallies == [(0, 1, 1), (2, 1, 0), (1, 1, 0)]
    assert [(change.kind, change.offset, change.count, change.new_pfn) for change in outside] == [
        (ChangeKind.FLAGS, 0, 1, 10),
        (ChangeKind.VANISHED, 6, 1, 0),
        (ChangeKind.APPEARED, 9, 2, 51),
    ]
    assert pages == 4


@given(row_lists())
def test_by_frame_every_frame_leads_to_a_page_that_is_in_it(rows: list[Extent]) -> None:
    pages: dict[int, set[int]] = {}
    for page, (pfn, flags) in model_of(rows).items():
        if flags & Flag.PRESENT:
            pages.setdefault(pfn, set()).add(page)
    with ExtentTable.from_rows(rows) as table, table.by_frame() as turned:
        found = model_of(turned.rows())
        assert found.keys() == pages.keys()
        assert all(page in pages[frame] for frame, (page, _) in found.items())
        assert (turned.first, turned.end) == ((min(pages), max(pages) + 1) if pages else (0, 0))
        with turned.by_frame() as back:
            assert model_of(back.rows()) == {page: (frame, Flag.PRESENT) for frame, (page, _) in found.items()}


def test_a_page_beyond_any_address_space_cannot_be_turned_round() -> None:
    with ExtentTable.from_rows([Extent(1 << 60, 1, 1, Flag.PRESENT)]) as table, pytest.raises(UsageError):
        table.by_frame()


@given(row_lists(), st.integers(0, 30), st.integers(0, 60), st.integers(1, 20))
def test_bins(rows: list[Extent], first: int, pages: int, cells: int) -> None:
    model = model_of(rows)
    with ExtentTable.from_rows(rows) as table:
        bins = table.bin(first, pages, cells)
        merged = table.rows()
    for cell in range(cells):
        span = range(first + pages * cell // cells, first + pages * (cell + 1) // cells)
        inside = [model[page][1] for page in span if page in model]
        assert bins.present[cell] == sum(bool(flags & Flag.PRESENT) for flags in inside)
        assert bins.swapped[cell] == sum(bool(flags & Flag.SWAP) for flags in inside)
        assert bins.huge[cell] == sum(bool(flags & Flag.HUGE) for flags in inside)
        touching = [r for r in merged if r.offset < span.stop and r.offset + r.count > span.start and span]
        assert bins.runs[cell] == len(touching)


@given(row_lists(), row_lists())
def test_a_diff_applied_to_the_old_gives_the_new(old_rows: list[Extent], new_rows: list[Extent]) -> None:
    old, new = model_of(old_rows), model_of(new_rows)
    with ExtentTable.from_rows(old_rows) as before, ExtentTable.from_rows(new_rows) as after:
        changes = before.diff(after)
        assert before.diff(before) == []
    patched = dict(old)
    for change in changes:
        for i in range(change.count):
            page = change.offset + i
            was, now = old.get(page), new.get(page)
            assert was != now
            if change.new_flags:
                patched[page] = (change.new_pfn + i * step(change.new_flags), change.new_flags)
            else:
                del patched[page]
            if change.kind is ChangeKind.APPEARED:
                assert was is None
            elif change.kind is ChangeKind.VANISHED:
                assert now is None
            else:
                assert was is not None
                assert now is not None
                if change.kind is ChangeKind.MOVED:
                    assert was[0] != now[0]
                    assert step(was[1]) == step(now[1])
                else:
                    assert was[1] != now[1]
    assert patched == new


@given(row_lists(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_parts_in_any_order_join_to_the_whole(rows: list[Extent], parts: int, random: Random) -> None:
    """Rows dealt out over tables that lie between each other; neighbours that continue each other merge again."""
    dealt = [rows[i::parts] for i in range(parts)]
    tables = [ExtentTable.from_rows(part) for part in dealt if part]
    random.shuffle(tables)
    spans = [(table.first, table.end) for table in tables]
    if not tables:
        with pytest.raises(UsageError):
            ExtentTable.concat(tables)
        return
    covered, span = sum(table.pages for table in tables), max(e for _, e in spans) - min(s for s, _ in spans)
    if covered > span:
        with pytest.raises(UsageError, match="overlap"):
            ExtentTable.concat(tables)
        return
    with ExtentTable.concat(tables) as joined, ExtentTable.from_rows(rows) as whole:
        assert joined.rows() == whole.rows()
        assert joined.pages == covered
        assert (joined.first, joined.end) == (min(s for s, _ in spans), max(e for _, e in spans))


@given(row_lists(), row_lists())
def test_a_digest_is_where_present_pages_are_and_nothing_else(some: list[Extent], others: list[Extent]) -> None:
    def placement(rows: list[Extent]) -> Model:
        return {page: (pfn, 1) for page, (pfn, flags) in model_of(rows).items() if flags & Flag.PRESENT}

    with ExtentTable.from_rows(some) as a, ExtentTable.from_rows(others) as b:
        assert (a.digest() == b.digest()) == (placement(some) == placement(others))
    split = [
        Extent(
            r.offset + i, r.pfn + i * step(r.flags), 1, r.flags ^ (Flag.HUGE if r.flags & Flag.PRESENT and i % 2 else 0)
        )
        for r in some
        for i in range(r.count)
    ]
    with ExtentTable.from_rows(some) as a, ExtentTable.from_rows(split) as b:
        assert a.digest() == b.digest()


@given(row_lists())
def test_stats(rows: list[Extent]) -> None:
    flags = [flags for _, flags in model_of(rows).values()]
    with ExtentTable.from_rows(rows, first=0, pages=200) as table:
        stats = table.stats()
        assert stats.pages == 200
        assert stats.present == sum(bool(f & Flag.PRESENT) for f in flags)
        assert stats.swapped == sum(bool(f & Flag.SWAP) for f in flags)
        assert stats.absent == 200 - len(flags)
        assert stats.huge == sum(bool(f & Flag.HUGE) for f in flags)
        assert stats.runs == len(table)


@pytest.mark.parametrize(
    "rows",
    [
        [Extent(0, 1, 5, 1), Extent(4, 9, 1, 1)],
        [Extent(0, 1, 0, 1)],
        [Extent(0, 1, 1, 3)],
        [Extent(0, 1, 1, 128)],
        [Extent(0, 1, 1, 64)],
        [Extent(0, 1 << 55, 1, 1)],
        [Extent(-1, 1, 2, 1)],
        [Extent(1 << 64, 1, 1, 1)],
        [Extent(0, 1, 1 << 32, 1)],
        [Extent(1 << 62, 1, 1, 1)],
    ],
)
def test_rows_that_are_not_a_table(rows: list[Extent]) -> None:
    with pytest.raises(UsageError, match="not a table"):
        ExtentTable.from_rows(rows)


def test_rows_outside_what_a_table_covers_and_absent_rows() -> None:
    with pytest.raises(UsageError):
        ExtentTable.from_rows([Extent(5, 1, 2, 1)], first=0, pages=6)
    with pytest.raises(UsageError):
        ExtentTable.from_rows([Extent(5, 1, 2, 1)], first=6)
    with ExtentTable.from_rows([Extent(4, 0, 10, 0), Extent(14, 1, 2, 1)]) as table:
        assert (table.rows(), table.first, table.pages) == ([Extent(14, 1, 2, 1)], 4, 12)


def test_a_run_beyond_32_bits_is_two_rows() -> None:
    half = (1 << 32) - 1
    with ExtentTable.from_rows([Extent(0, 0, half, 1), Extent(half, half, half, 1)]) as table:
        assert len(table) == 2
        assert table.stats().present == 2 * half
        assert table.bin(0, 2 * half, 2).present == [half, half]


@pytest.mark.parametrize(("first", "pages", "cells"), [(-1, 1, 1), (0, -1, 1), (0, 1, 0), (0, 1, -1), (0, 1, 1 << 40)])
def test_ranges_that_cannot_be_divided(first: int, pages: int, cells: int) -> None:
    with ExtentTable.from_rows([]) as table, pytest.raises(UsageError):
        table.bin(first, pages, cells)


def test_a_million_rows_grow_without_copying_anything_wrong() -> None:
    rows = [Extent(i * 3, i * 7 % 1000003 + 1, 2, 1) for i in range(700_000)]
    with ExtentTable.from_rows(rows) as table:
        assert len(table) == 700_000
        assert table.rows(699_990) == rows[699_990:]
        assert table.rows(4090, 4100) == rows[4090:4100]
        assert table.stats().present == 1_400_000


def test_a_part_of_no_pages_has_no_rows_and_is_accepted_back() -> None:
    with ExtentTable.from_rows([Extent(0, 1, 10, Flag.PRESENT)], first=0, pages=100) as whole:
        for first, to in ((5, 50), (0, 0), (10, 50), (99, 3)):
            with ExtentTable.of_parts([Part(whole, first, 0, to)]) as part:
                assert len(part) == 0
                with ExtentTable.from_bytes(part.to_bytes()) as again:
                    assert list(again) == []
