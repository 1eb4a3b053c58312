"""The PFN map: its cursor names the right page, zooming keeps it, and what moved is marked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic import NOW_NS, PAGE, SyntheticSource
from textual.pilot import Pilot
from textual.widgets import Input

from memconsole.errors import Denied, NotFound
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.units import format_size
from memconsole.views.app import ConsoleApp
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.widgets import pagegrid
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.heatmap import HeatMap
from memconsole.views.widgets.pagegrid import (
    Axis,
    Block,
    Grid,
    Marks,
    PageKind,
    cell_looks,
    kind_of,
    next_kind,
    next_run,
)

HUGE, SMALL = Flag.PRESENT | Flag.HUGE, Flag.PRESENT | Flag.FILE
SUBJECT = "guest:web0"


def look_at(heat: HeatMap, page: int) -> int:
    """The look that the cell of a page has on the screen; OUTSIDE if it is not there."""
    row, column = heat._grid.place(page)
    line = row - heat._top
    return heat._rows[line][1][column] if 0 <= line < len(heat._rows) else pagegrid.OUTSIDE


# --- the grid, as values ------------------------------------------------------------------------------------------


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    blocks, page = [], draw(st.integers(0, 1 << 36))
    for _ in range(draw(st.integers(1, 5))):
        pages = draw(st.integers(1, 5000))
        blocks.append(Block(page, pages))
        page += pages + draw(st.sampled_from([0, 1, 512, 1 << 20]))
    return Axis(blocks)


@given(axes(), st.sampled_from([8, 16, 64]), st.integers(1, 50), st.data())
def test_every_page_has_one_place_and_its_cell_holds_it(
    axis: Axis, width: int, height: int, data: st.DataObject
) -> None:
    whole = Grid.fit(axis, width, height)
    grid = Grid(axis, width, 1 << data.draw(st.integers(0, whole.cell.bit_length() - 1)))
    page = next(axis.pieces(data.draw(st.integers(0, axis.pages - 1)), 1))[0]
    row, column = grid.place(page)
    first, pages = grid.cell_at(page)
    assert 0 <= row < grid.rows
    assert 0 <= column < width
    assert first <= page < first + pages
    assert grid.page(row, column) == first
    assert axis.holds(first)
    assert axis.holds(first + pages - 1)


@given(axes(), st.sampled_from([8, 64]), st.integers(0, 12))
def test_the_ranges_of_all_rows_are_the_blocks(axis: Axis, width: int, zoom: int) -> None:
    grid = Grid(axis, width, 1 << zoom)
    covered = sum(pages for _, pages, _ in grid.ranges(0, grid.rows))
    assert covered == axis.pages
    for first, pages, cells in grid.ranges(0, grid.rows):
        assert axis.holds(first)
        assert axis.holds(first + pages - 1)
        assert pages % cells == 0


def test_a_whole_map_fits_the_screen_when_it_can() -> None:
    axis = Axis([Block(0, 1 << 28)])
    grid = Grid.fit(axis, 64, 40)
    assert grid.rows <= 40
    assert Grid(axis, 64, grid.cell // 2).rows > 40


def test_blocks_that_overlap_are_shown_once() -> None:
    assert Axis([Block(0, 10), Block(5, 10)]).blocks == [Block(0, 10), Block(10, 5)]


def table(*rows: tuple[int, int, int, int], pages: int = 4096) -> ExtentTable:
    return ExtentTable.from_rows([Extent(*row) for row in rows], first=0, pages=pages)


def test_a_cell_looks_like_most_of_its_pages() -> None:
    shown = table(
        (0, 512, 512, HUGE), (512, 5000, 100, SMALL), (1024, 9000, 300, SMALL), (1536, 20000, 512, SMALL),
        (2048, 64, 400, Flag.SWAP), (2448, 30000, 10, SMALL), (2560, 40960, 256, HUGE),
    )  # fmt: skip
    cells = cell_looks(shown, [(0, 4096, 8)])
    assert list(cells) == [
        pagegrid.HUGE, pagegrid.THIN, pagegrid.HALF, pagegrid.FULL,
        pagegrid.SWAP, pagegrid.PART_HUGE, pagegrid.ABSENT, pagegrid.ABSENT,
    ]  # fmt: skip
    by_runs = cell_looks(shown, [(0, 4096, 8)], by_runs=True)
    assert [pagegrid.ALL_LOOKS[look].glyph for look in by_runs] == ["0", "0", "0", "0", "1", "0", "·", "·"]


TOGETHER = {
    "kinds": pagegrid.LOOKS,
    "runs": (*pagegrid.LOOKS[:2], *pagegrid.RUNS),
    "uses": pagegrid.USES,
    "letters": pagegrid.LETTERS,
    "numbers": pagegrid.NUMBERS,
    "answers": pagegrid.ANSWERS,
}


@pytest.mark.parametrize("name", TOGETHER)
def test_looks_that_are_seen_together_have_glyphs_of_their_own(name: str) -> None:
    glyphs = [look.glyph for look in TOGETHER[name]]
    assert len(set(glyphs)) == len(glyphs)
    assert len(pagegrid.LOOKS) <= 16


rows_of_kinds = st.lists(
    st.tuples(st.sampled_from([0, int(SMALL), int(HUGE), int(Flag.SWAP)]), st.integers(1, 40)), min_size=1, max_size=30
)


@given(rows_of_kinds, st.data())
@settings(max_examples=200)
def test_the_next_kind_and_run_are_those_a_walk_finds(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    rows, page = [], 0
    for number, (flags, count) in enumerate(parts):
        if flags:
            rows.append(Extent(page, (number + 1) << 20, count, flags))
        page += count
    shown = ExtentTable.from_rows(rows, first=0, pages=page)
    axis = Axis([Block(0, page)])
    here = data.draw(st.integers(0, page - 1))
    kinds: list[PageKind] = []
    numbers: list[int | None] = []
    for each in range(page):
        row = shown.lookup(each)
        kinds.append(kind_of(None if row is None else shown[row]))
        numbers.append(row)
    for way, others in ((1, range(here + 1, page)), (-1, range(here - 1, -1, -1))):
        kind = next((other for other in others if kinds[other] is not kinds[here]), None)
        assert next_kind(shown, axis, here, way) == kind
        run = next((other for other in others if numbers[other] != numbers[here]), None)
        assert next_run(shown, axis, here, way) == run


def test_marks_say_what_happened_to_each_page() -> None:
    before = table((0, 1000, 100, SMALL), (200, 5000, 10, SMALL), (300, 64, 4, Flag.SWAP))
    after = table((0, 1000, 50, SMALL), (50, 7000, 50, SMALL), (300, 9000, 4, SMALL), (400, 9100, 6, SMALL))
    marks = Marks(before, after)
    assert (marks.moved, marks.gone, marks.came) == (50, 10, 10)
    assert marks.at(0) is None
    assert marks.at(53) == ("moved", 1053)
    assert marks.at(205) == ("gone", 5005)
    assert marks.at(300) is not None
    cells = cell_looks(after, [(0, 512, 8)])
    marks.draw(cells, [(0, 512, 8)])
    assert [pagegrid.LOOKS[look].id for look in cells[:1]] == ["moved"]
    assert pagegrid.LOOKS[cells[3]].id == "gone"
    assert pagegrid.LOOKS[cells[6]].id == "came"
    assert cells[7] == pagegrid.ABSENT


# --- on the screen ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(
    source: SyntheticSource, subject: str = SUBJECT, size: tuple[int, int] = (132, 50)
) -> AsyncIterator[tuple[Pilot[None], PfnMap]]:
    app = ConsoleApp(source, interval=1e6, clock=lambda: NOW_NS)
    async with app.run_test(size=size) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        app.open_view("pfn", subject)
        view = app.view
        assert isinstance(view, PfnMap)
        await scanned(pilot, view)
        yield pilot, view
        await pilot.pause()


async def scanned(pilot: Pilot[None], view: PfnMap) -> None:
    await pilot.pause()
    while view.scanning:
        await pilot.pause(0.01)
    await pilot.pause()


def facts(view: PfnMap) -> str:
    return view.query_one("#pfn-facts", Lines).render().plain


def text(view: PfnMap) -> list[str]:
    heatmap = view.query_one(HeatMap)
    return [heatmap.render_line(y).text for y in range(heatmap.size.height)]


def expected(source: SyntheticSource, page: int) -> Extent | None:
    with source.extents(SUBJECT) as shown:
        row = shown.lookup(page)
        return None if row is None else shown[row]


@pytest.mark.parametrize("size", [(132, 50), (80, 24)])
async def test_the_cursor_names_the_page_it_is_on(size: tuple[int, int]) -> None:
    source = SyntheticSource()
    async with opened(source, size=size) as (pilot, view):
        for key in ("right", "down", "plus", "plus", "right", "plus", "e", "down", "full_stop", "comma", "left"):
            await pilot.press(key)
            await pilot.pause()
            page = view.map.cursor
            extent = expected(source, page)
            said = facts(view)
            assert f"{page * PAGE:#x}" in said
            if extent is not None and extent.flags & Flag.PRESENT:
                assert f"{extent.pfn + page - extent.offset:#x}" in said
            else:
                assert look_at(view.map, page) in {pagegrid.ABSENT, pagegrid.SWAP, pagegrid.HALF, pagegrid.THIN}


async def test_the_facts_name_region_grant_and_process() -> None:
    source = SyntheticSource()
    async with opened(source) as (pilot, view):
        guest = source.snapshot().guests[0]
        assert guest.seen is not None
        block = guest.seen.ram[1]
        assert block.gpa is not None
        view.map.go_to_page((block.gpa + 0x3000) // PAGE)
        await pilot.pause()
        said = facts(view)
        assert f"{block.region}+0x3000" in said
        assert f"{guest.grants[1]} rw to {guest.name}" in said
        assert f"{block.start + 0x3000:#x} of {guest.pid}" in said


async def test_zooming_keeps_the_page_and_the_whole_comes_back() -> None:
    async with opened(SyntheticSource()) as (pilot, view):
        whole = view.map.cell_pages
        view.map.go_to_page(100_003)
        for _ in range(6):
            await pilot.press("plus")
            assert view.map.cursor == 100_003
            first, pages = view.map.cell
            assert first <= 100_003 < first + pages
        assert view.map.cell_pages == 1
        assert view.map.cell == (100_003, 1)
        assert look_at(view.map, 100_003) != pagegrid.OUTSIDE
        for _ in range(9):
            await pilot.press("minus")
        assert view.map.cursor == 100_003
        assert view.map.cell_pages == whole
        await pilot.press("z")
        assert view.map.cell_pages == 1
        await pilot.press("z")
        assert view.map.cell_pages == whole


async def test_panning_goes_through_every_page_once() -> None:
    async with opened(SyntheticSource(), subject="region:web0-ram0", size=(80, 24)) as (pilot, view):
        await pilot.press("z", "home")
        seen = [view.map.cursor]
        for _ in range(200):
            view.map.action_move(1, 0)
            seen.append(view.map.cursor)
        assert seen == list(range(201))
        await pilot.press("end")
        assert view.map.cursor == 16383
        assert look_at(view.map, 16383) != pagegrid.OUTSIDE
        view.map.action_move(1, 0)
        assert view.map.cursor == 16383
        await pilot.press("pageup", "home")
        assert view.map.cursor == 0
        view.map.action_move(-1, 0)
        assert view.map.cursor == 0


async def test_go_to_a_frame_an_address_and_an_hva() -> None:
    source = SyntheticSource()
    async with opened(source) as (pilot, view):
        with source.extents(SUBJECT) as shown:
            extent = next(row for row in shown if row.flags & Flag.PRESENT and row.count > 3 and row.offset > 1000)
        guest = source.snapshot().guests[0]
        assert guest.seen is not None
        asked = {
            f"pfn {extent.pfn + 3:#x}": extent.offset + 3,
            f"pfn {extent.pfn}": extent.offset,
            "0x1234000": 0x1234,
            "64M": 16384,
            f"hva {guest.seen.ram[1].start + 0x5000:#x}": (guest.seen.ram[1].gpa or 0) // PAGE + 5,
        }
        for question, page in asked.items():
            await ask(pilot, view, question)
            assert view.map.cursor == page, question
            assert view.map.has_focus


async def ask(pilot: Pilot[None], view: PfnMap, question: str) -> None:
    await pilot.press("at")
    view.query_one(Input).value = question
    await pilot.press("enter")
    await pilot.pause()


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (132, 50)])
async def test_what_is_typed_to_go_somewhere_is_seen(size: tuple[int, int]) -> None:
    async with opened(SyntheticSource(), size=size) as (pilot, view):
        await pilot.press("at", *"64M")
        await pilot.pause()
        line = view.query_one(Input)
        shown = line.render_lines(line.size.region)
        assert any("64M" in strip.text for strip in shown)
        assert line.region.height == 1
        await pilot.press("enter")
        assert view.map.cursor == 16384


async def test_the_title_says_the_cells_that_are_shown_after_another_layout() -> None:
    async with opened(SyntheticSource(), size=(60, 20)) as (pilot, view):
        title = view.query_one("#pfn-title", Lines)
        for size in ((200, 60), (80, 24)):
            before = view.map.cell_pages
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert view.map.cell_pages != before
            assert f" in {format_size(view.map.cell_pages * PAGE)} " in title.render().plain


async def test_lines_painted_before_the_map_knew_its_size_are_painted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lay = HeatMap.on_resize

    def painted_first(heat: HeatMap) -> None:
        heat.render_lines(heat.size.region)
        lay(heat)

    monkeypatch.setattr(HeatMap, "on_resize", painted_first)
    async with opened(SyntheticSource(), size=(132, 50)) as (pilot, view):
        for size in ((80, 50), (132, 50)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            heat = view.map
            assert heat.size.height > len(heat._rows), "below the last row there is the minimap alone"
            painted = [strip.text for strip in heat.render_lines(heat.size.region)]
            assert painted == [heat.render_line(line).text for line in range(heat.size.height)]


async def test_a_map_is_opened_by_a_bare_name_and_at_an_address() -> None:
    async with opened(SyntheticSource(), subject="") as (pilot, view):
        assert isinstance(pilot.app, ConsoleApp)
        pilot.app.open_view("pfn", "web0 64M")
        await scanned(pilot, view)
        assert (view.subject, view.map.cursor) == (SUBJECT, 16384)
        with pytest.raises(NotFound, match="nowhere"):
            pilot.app.open_view("pfn", "nowhere")


@pytest.mark.parametrize(
    ("question", "why"),
    [("pfn 0x7", "no page of"), ("nonsense", "not a size"), ("900T", "is not in"), ("hva 0x10", "nothing of")],
)
async def test_where_nothing_is_one_cannot_go(question: str, why: str) -> None:
    async with opened(SyntheticSource()) as (pilot, view):
        await ask(pilot, view, question)
        assert view.map.cursor == 0
        assert any(why in note.message for note in pilot.app._notifications)
        assert view.query_one(Input).has_focus
        await pilot.press("escape")
        assert view.map.has_focus


async def test_a_second_scan_marks_what_moved_and_keeps_the_cursor() -> None:
    source = SyntheticSource()
    async with opened(source) as (pilot, view):
        await pilot.press("z")
        with source.extents(SUBJECT) as shown:
            rows = list(shown)
        moved, gone = rows[3], rows[9]
        changed = [row for row in rows if row is not gone]
        changed[3] = moved._replace(pfn=0x5000000)
        source.show_rows(SUBJECT, changed)
        view.map.go_to_page(moved.offset + 2)
        await pilot.press("r")
        await scanned(pilot, view)
        assert view.map.cursor == moved.offset + 2
        assert look_at(view.map, view.map.cursor) == pagegrid.MOVED
        assert f"moved, was in {moved.pfn + 2:#x}" in facts(view)
        assert f"{0x5000002:#x}" in facts(view)
        assert f"moved {moved.count:,} came 0 gone {gone.count:,}" in view.query_one("#pfn-title", Lines).render().plain
        view.map.go_to_page(gone.offset)
        assert look_at(view.map, gone.offset) == pagegrid.GONE
        await pilot.press("v")
        assert look_at(view.map, gone.offset) == pagegrid.ABSENT
        await pilot.press("v", "r")
        await scanned(pilot, view)
        assert look_at(view.map, gone.offset) == pagegrid.ABSENT


async def test_a_key_repaints_only_the_lines_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(SyntheticSource()) as (pilot, _):
        painted: list[object] = []
        refresh = HeatMap.refresh

        def spy(self: HeatMap, *regions: Any, **options: Any) -> HeatMap:
            painted.extend([region.y for region in regions] or ["everything"])
            return refresh(self, *regions, **options)

        with monkeypatch.context() as patched:
            patched.setattr(HeatMap, "refresh", spy)
            await pilot.press("right")
            assert painted == [0]
            painted.clear()
            await pilot.press("down")
            assert painted == [0, 1]


async def test_the_cursor_is_seen_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with opened(SyntheticSource(), size=(80, 24)) as (pilot, view):
        await pilot.press("right", "right")
        segments = list(view.map.render_line(0))
        reversed_ = [segment.style is not None and bool(segment.style.reverse) for segment in segments]
        before = "".join(segment.text for segment in segments[: reversed_.index(True)])
        assert len(before) == 15 + 2


async def test_an_error_is_said_and_what_was_there_stays() -> None:
    source = SyntheticSource()
    async with opened(source) as (pilot, view):
        before = text(view)
        source.fail["extents"] = Denied("PFNs are hidden", "not root", "run as root")
        await pilot.press("r")
        await scanned(pilot, view)
        assert "PFNs are hidden" in view.query_one("#pfn-title", Lines).render().plain
        assert text(view) == before


async def test_without_a_subject_there_is_a_list_to_choose_from() -> None:
    source = SyntheticSource()
    async with opened(source, subject="") as (pilot, view):
        await pilot.press("down", "enter")
        await scanned(pilot, view)
        assert view.subject == f"guest:{source.snapshot().guests[1].name}"
        assert view.map.has_focus
        await pilot.press("o")
        await pilot.pause()
        assert view.subject == ""
        assert view.current_table is not None
        assert view.current_table.has_focus


async def test_fragments_show_runs_and_the_legend_says_so() -> None:
    async with opened(SyntheticSource()) as (pilot, view):
        legend = view.query_one("#pfn-legend", Lines)
        assert "swapped" in legend.render().plain
        await pilot.press("F")
        await pilot.pause()
        assert "or more runs" in legend.render().plain
        cells = {glyph for line in text(view) for glyph in line[15:79]}
        assert cells <= set(" ·0123456789")
        assert cells & set("123456789")


async def test_a_map_of_a_terabyte_is_drawn_whole() -> None:
    source = SyntheticSource()
    guest = source.snapshot().guests[0]
    rows = [Extent(page << 18, (page + 1) << 20, 1 << 17, int(HUGE)) for page in range(1024)]
    source.show_rows(SUBJECT, rows)
    assert guest.seen is not None
    async with opened(source) as (pilot, view):
        await pilot.press("end")
        said = facts(view)
        assert f"{view.map.cursor * PAGE:#x}" in said
