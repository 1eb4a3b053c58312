"""Maps by colours: nodes, sharing, what is preserved, what devices reach; domains by IOVA; against a recorded map."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.maps import arrived, cells
from support.synthetic import NOW_NS, PAGE, SyntheticSource, snapshot
from textual.pilot import Pilot

from memconsole import hostmap, recording
from memconsole.errors import Denied, NotFound
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.model import Device, Domain, Node, Range, Reserved, Window
from memconsole.views.app import ConsoleApp
from memconsole.views.commands import run_line
from memconsole.views.completing import complete
from memconsole.views.remembering import Memory
from memconsole.views.screens.mapview import MapView
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.heatmap import GUTTER

MAP = "region:web0-ram0"
BDF = "0000:00:05.0"
S = 10**9
HELD = int(Flag.PRESENT | Flag.FILE)
RW = int(Flag.PRESENT | Flag.READ | Flag.WRITE)
GPA = 4 << 20


def made() -> SyntheticSource:
    """A region of 16,384 pages, of which the first half is on node 0, and 64 are granted to a device of group 7."""
    shown = snapshot(regions=1, guests=1, windows=0, domains=0)
    nodes = (
        Node(0, 1 << 30, 0, "0", (Range(0, 1 << 30, "node 0"),)),
        Node(1, 1 << 30, 0, "1", (Range(1 << 30, 2 << 30, "node 1"),)),
    )
    grant = replace(shown.grants[0], gpa=GPA, length=64 * PAGE, offset=0, dma=BDF)
    source = SyntheticSource(
        replace(
            shown,
            memory=replace(shown.memory, nodes=nodes),
            iomem=(Range(0, 2 << 30, "System RAM"), Range(0xFE000000, 0xFE100000, BDF)),
            grants=(grant,),
            devices=(Device(BDF, 1, 2, 3, group=7),),
            windows=(Window(f"{BDF}:0", BDF, 0, 0xFE000000, 1 << 20),),
            domains=(Domain(7, "DMA-FQ", "dmar0", (BDF,), (Reserved(0xFEE00000, 0xFEF00000, "msi"),), 64 * PAGE, 2),),
        )
    )
    exclusive = int(Flag.PRESENT | Flag.EXCLUSIVE)
    source.show_rows(MAP, [Extent(0, 0x10000, 8192, HELD), Extent(8192, 0x50000, 8192, exclusive)])
    source.show_rows("domain:7", [Extent(GPA // PAGE, 0x10000, 60, RW), Extent(GPA // PAGE + 60, 0x7000, 1, RW)])
    source.show_rows(hostmap.PRESERVED, [Extent(0x10000, 0x10000, 8191, HELD)])
    return source


@asynccontextmanager
async def opened(source: SyntheticSource, subject: str) -> AsyncIterator[tuple[Pilot[None], MapView]]:
    app = ConsoleApp(source, interval=1e6, clock=lambda: NOW_NS)
    async with app.run_test(size=(132, 50)) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        app.open_view("pfn", subject)
        yield pilot, await arrived(pilot)


def booked(view: MapView) -> list[int]:
    """The lines of the map that say that there is a bookmark, each with one cell underlined."""
    lines = [view.map.render_line(y) for y in range(view.map.size.height)]
    found = [y for y, line in enumerate(lines) if line.text[GUTTER - 1] == "'"]
    assert found == [
        y for y, line in enumerate(lines) if sum(bool(part.style and part.style.underline) for part in line)
    ]
    return found


def legend(view: MapView) -> str:
    return view.query_one("#pfn-legend", Lines).render().plain


async def colour(pilot: Pilot[None], view: MapView, title: str) -> None:
    """Press ``t`` until the map is coloured by this."""
    assert view.model is not None
    for _ in view.model.modes:
        if view.status.startswith(f"by {title} "):
            return
        await pilot.press("t")
        await arrived(pilot)
    raise AssertionError(f"no colours by {title}")


@pytest.mark.parametrize(
    ("title", "first", "last", "word"),
    [
        ("NUMA node", "0", "1", "node 1"),
        ("sharing", "░", "█", "in one process alone"),
        ("preserved", "█", "░", "preserved over the next kexec"),
        ("devices", "a", "░", BDF),
    ],
)
async def test_each_colour_tells_the_first_half_from_the_second(title: str, first: str, last: str, word: str) -> None:
    async with opened(made(), MAP) as (pilot, view):
        await colour(pilot, view, title)
        assert cells(view).replace(" ", "")[0] == first
        assert cells(view).replace(" ", "")[-1] == last
        assert word in legend(view)


async def test_a_colour_that_cannot_be_told_is_passed_over_with_its_reason() -> None:
    async with opened(made(), MAP) as (pilot, view):
        await colour(pilot, view, "sharing")
        await pilot.press("t")
        await arrived(pilot)
        assert view.status.startswith("by sharing ")
        assert any("soft-dirty" in note.title for note in pilot.app._notifications)
        await pilot.press("t")
        await arrived(pilot)
        assert view.status.startswith("by preserved ")


async def test_the_next_edge_is_that_of_the_colours_shown() -> None:
    async with opened(made(), MAP) as (pilot, view):
        await colour(pilot, view, "devices")
        await pilot.press("home", "e")
        assert view.map.cursor == 60
        await colour(pilot, view, "NUMA node")
        await pilot.press("home", "e")
        assert view.map.cursor == 8192


async def test_a_domain_shows_what_leads_elsewhere_what_is_missing_and_interrupts() -> None:
    async with opened(made(), "domain:7") as (pilot, view):
        assert "as granted" in view.query_one("#pfn-title", Lines).render().plain
        assert set(cells(view)) >= {"█", "*", "!"}
        assert "granted, and leads nowhere" in legend(view)
        view.map.go_to_page(GPA // PAGE + 60)
        said = view.query_one("#pfn-facts", Lines).render().plain
        assert "0x7000" in said
        assert "0x1003c" in said
        assert "leads elsewhere" in said
        await pilot.press("enter")
        host = await arrived(pilot)
        assert host.map.cursor == 0x7000
        await pilot.press("escape")
        assert (await arrived(pilot)).map.cursor == GPA // PAGE + 60


async def test_the_maps_of_a_device_and_of_a_window_are_a_key_away() -> None:
    async with opened(made(), MAP) as (pilot, _):
        assert isinstance(pilot.app, ConsoleApp)
        await pilot.press("6", "f")
        assert (await arrived(pilot)).map.cursor == 0xFE000000 // PAGE
        await pilot.press("escape", "tab", "f")
        await arrived(pilot)
        assert pilot.app.trail[-1] == ("pfn", "domain:7")


def told(view: MapView) -> str:
    return view.query_one("#pfn-facts", Lines).render().plain


async def test_the_kernel_is_asked_for_the_frame_on_which_the_cursor_rests() -> None:
    source = made()
    async with opened(source, "web0-ram0") as (pilot, view):
        await arrived(pilot)
        while "uptodate lru active mmap" not in told(view):
            await pilot.pause(0.01)
        assert "1 time" in told(view)
        source.fail["frame"] = Denied("/proc/kpageflags", "the kernel shows it to CAP_SYS_ADMIN only", "run as root")
        await pilot.press("right")
        assert "uptodate" not in told(view)
        while "the kernel shows it to" not in told(view):
            await pilot.pause(0.01)


async def test_a_map_is_held_against_a_recorded_snapshot(tmp_path: Path) -> None:
    source = made()
    path = tmp_path / "then.snap"
    with ExtentTable.from_rows([Extent(0, 0x90000, 10, HELD), Extent(10, 0x1000A, 8182, HELD)]) as before:
        shown = source.snapshot()
        recording.write(path, shown, {MAP: before})
    async with opened(source, f"web0-ram0 against {path}") as (pilot, view):
        await arrived(pilot)
        assert "moved 10 came 8,192 gone 0" in view.query_one("#pfn-title", Lines).render().plain
        view.map.go_to_page(3)
        assert "moved, was in 0x90003" in view.query_one("#pfn-facts", Lines).render().plain


async def test_a_map_is_held_against_the_last_one_that_was_recorded_until_a_time() -> None:
    source = made()
    source.recorded = [replace(source.snapshot(), taken_ns=NOW_NS - 60 * S)]
    source.recorded_rows[MAP] = [(NOW_NS - 90 * S, [Extent(0, 0x90000, 10, HELD), Extent(10, 0x1000A, 8182, HELD)])]
    async with opened(source, "web0-ram0 against @-30s") as (pilot, view):
        await arrived(pilot)
        assert "moved 10 came 8,192 gone 0" in view.query_one("#pfn-title", Lines).render().plain
        assert view.status == "by page size · scanned 0s ago"
        view.aim("against @-2m")
        for _ in range(200):
            await pilot.pause(0.01)
            if pilot.app._notifications:
                break
        assert "nothing is recorded" in " ".join(each.message for each in pilot.app._notifications)


async def test_the_map_of_the_past_says_how_long_before_it_was_scanned() -> None:
    source = made()
    source.recorded = [replace(source.snapshot(), taken_ns=NOW_NS - 60 * S)]
    source.recorded_rows[MAP] = [(NOW_NS - 90 * S, [Extent(0, 0x90000, 10, HELD)])]
    async with opened(source, "web0-ram0") as (pilot, view):
        await arrived(pilot)
        await pilot.press("left_square_bracket")
        while not (view.model is not None and view.status.endswith("scanned 30s before")):
            await pilot.pause(0.01)
        assert "40K 100% resident" in view.query_one("#pfn-title", Lines).render().plain


async def test_the_past_of_a_file_is_that_file_with_its_maps(tmp_path: Path) -> None:
    source = made()
    path = tmp_path / "then.snap"
    with source.extents(MAP) as table:
        recording.write(path, source.snapshot(), {MAP: table})
    app = ConsoleApp(recording.Recording(path), interval=1e6, clock=lambda: NOW_NS)
    async with app.run_test(size=(132, 50)) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        await pilot.press("left_square_bracket")
        while not app.away:
            await pilot.pause(0.01)
        app.open_view("pfn", MAP)
        assert (await arrived(pilot)).model is not None


async def test_a_place_of_a_map_is_bookmarked_and_found_again_in_another_session(tmp_path: Path) -> None:
    source = made()
    app = ConsoleApp(source, interval=1e6, clock=lambda: NOW_NS, memory=Memory(tmp_path))
    async with app.run_test(size=(132, 50)) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        app.open_view("pfn", MAP)
        view = await arrived(pilot)
        view.map.go_to_page(8192)
        assert not booked(view)
        await pilot.press("b")
        assert booked(view) == [view.map._grid.place(8192)[0]]
        app.open_view("regions")
        app.add_bookmark("all regions")
    assert [each.name for each in Memory(tmp_path).bookmarks] == ["pfn web0-ram0 0x2000000", "all regions"]
    app = ConsoleApp(source, interval=1e6, clock=lambda: NOW_NS, memory=Memory(tmp_path))
    async with app.run_test(size=(132, 50)) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        await pilot.press("apostrophe", "enter")
        view = await arrived(pilot)
        assert (app.trail[-1], view.map.cursor) == (("pfn", MAP), 8192)
        assert booked(view) == [view.map._grid.place(8192)[0]]
        await pilot.press("b")
        assert not booked(view)
        assert [each.name for each in Memory(tmp_path).bookmarks] == ["all regions"]
        assert [each.word for each in complete(app, "go ").words] == ["all regions"]
        run_line(app, "go all regions")
        assert app.trail[-1] == ("regions", "")
        with pytest.raises(NotFound, match="there is no bookmark 'nowhere'"):
            run_line(app, "go nowhere")


async def test_the_panel_is_as_high_as_what_it_says_after_the_terminal_changed_its_size() -> None:
    async with opened(made(), "web0-ram0") as (pilot, view):
        await arrived(pilot)
        for size in ((80, 24), (132, 50), (60, 20), (132, 50)):
            await pilot.resize_terminal(*size)
            for name in ("#pfn-facts", "#pfn-legend"):
                lines = view.query_one(name, Lines)
                while lines.size.height != len(lines.render().plain.splitlines()) or view.size.width != size[0]:
                    await pilot.pause(0.01)
