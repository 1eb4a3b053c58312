"""The host map in the console: the cursor names a frame, Enter goes where it leads, and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from support.maps import arrived, cells
from support.synthetic import NOW_NS, PAGE, SyntheticSource, snapshot
from textual.pilot import Pilot

from memconsole import hostmap
from memconsole.extents import Extent, Flag
from memconsole.model import Memory, Node, Range
from memconsole.views.app import ConsoleApp
from memconsole.views.headless import render
from memconsole.views.screens.mapview import MapView
from memconsole.views.widgets.facts import Lines

GIB = 1 << 30
FIRST = 0x200000


def made() -> SyntheticSource:
    """A host of 16 GiB in two nodes, with one region of two runs and its guest."""
    shown = snapshot(regions=1, guests=1, windows=2)
    nodes = (
        Node(0, 8 * GIB, GIB, "0", (Range(0, 8 * GIB, "node 0"),)),
        Node(1, 8 * GIB, GIB, "1", (Range(8 * GIB, 16 * GIB, "node 1"),)),
    )
    memory: Memory = replace(shown.memory, nodes=nodes, total=16 * GIB)
    iomem = (Range(0, 16 * GIB, "System RAM"), Range(1 << 24, 1 << 25, "Kernel code", 1))
    source = SyntheticSource(replace(shown, memory=memory, iomem=iomem))
    rows = [Extent(0, FIRST, 8192, int(Flag.PRESENT)), Extent(8192, 0x100000, 8192, int(Flag.PRESENT))]
    source.show_rows(f"region:{shown.regions[0].name}", rows)
    return source


REGION = snapshot(regions=1, guests=1).regions[0].name


@asynccontextmanager
async def console(source: SyntheticSource, size: tuple[int, int] = (132, 50)) -> AsyncIterator[Pilot[None]]:
    app = ConsoleApp(source, interval=1e6, clock=lambda: NOW_NS)
    async with app.run_test(size=size) as pilot:
        while app.opening or app.snapshot is None:
            await pilot.pause(0.01)
        yield pilot


def facts(view: MapView) -> str:
    return view.query_one("#pfn-facts", Lines).render().plain


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (132, 50), (200, 60)])
async def test_the_cursor_names_the_frame_its_owner_and_who_reaches_it(size: tuple[int, int]) -> None:
    async with console(made(), size) as pilot:
        await pilot.press("M")
        view = await arrived(pilot)
        view.map.go_to_page(FIRST + 3)
        await pilot.pause()
        said = facts(view)
        assert f"{FIRST + 3:#x}" in said
        assert REGION in said
        assert "0x00003000" in said
        assert "pid 4000" in said
        view.map.go_to_page((1 << 24) // PAGE)
        assert "Kernel code" in facts(view)


async def test_enter_leads_to_the_page_of_the_region_and_on_to_the_frame_and_escape_back() -> None:
    async with console(made()) as pilot:
        app = pilot.app
        assert isinstance(app, ConsoleApp)
        await pilot.press("M")
        view = await arrived(pilot)
        view.map.go_to_page(0x100000 + 5)
        await pilot.press("enter")
        pages = await arrived(pilot)
        assert (pages.subject, pages.map.cursor) == (f"region:{REGION}", 8197)
        await pilot.press("right", "enter")
        host = await arrived(pilot)
        assert host is view
        assert host.map.cursor == 0x100000 + pages.map.cursor - 8192
        await pilot.press("escape")
        assert app.view is pages
        await pilot.press("escape", "escape")
        assert app.view is not pages


async def test_enter_on_memory_of_no_region_says_who_reaches_it() -> None:
    async with console(made()) as pilot:
        await pilot.press("M")
        view = await arrived(pilot)
        view.map.go_to_page(0x3000)
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(pilot.app, ConsoleApp)
        assert pilot.app.trail[-1] == ("reach", "reach:0x3000")


@pytest.mark.parametrize(
    ("words", "page"), [("4G", 0x100000), ("pfn 0x1234", 0x1234), (REGION, 0x100000), ("web0", 0x100000)]
)
async def test_one_goes_to_an_address_a_frame_or_a_name(words: str, page: int) -> None:
    async with console(made()) as pilot:
        assert isinstance(pilot.app, ConsoleApp)
        pilot.app.open_view("host", words)
        view = await arrived(pilot)
        assert view.map.cursor == page


async def test_a_name_that_is_not_there_is_said() -> None:
    async with console(made()) as pilot:
        assert isinstance(pilot.app, ConsoleApp)
        pilot.app.open_view("host", "64T")
        await arrived(pilot)
        assert any("not on the host map" in note.message for note in pilot.app._notifications)


async def test_the_map_is_coloured_by_guest_by_node_and_by_what_is_preserved() -> None:
    source = made()
    async with console(source) as pilot:
        await pilot.press("M")
        view = await arrived(pilot)
        assert "by use" in view.status
        assert set(cells(view)) >= {"·", "█"}
        await pilot.press("t")
        await arrived(pilot)
        assert "by guest" in view.status
        assert "a" in cells(view)
        assert "web0" in view.query_one("#pfn-legend", Lines).render().plain
        await pilot.press("t")
        await arrived(pilot)
        assert set(cells(view).strip()) == {"0", "1"}
        await pilot.press("t")  # nothing is preserved: the source has no such table
        await arrived(pilot)
        assert "by NUMA node" in view.status
        assert any("preserved" in note.title for note in pilot.app._notifications)
        await pilot.press("t")
        assert "by use" in view.status


async def test_what_is_preserved_is_seen_even_if_it_is_one_page() -> None:
    source = made()
    source.show_rows(hostmap.PRESERVED, [Extent(0x300000, 0x300000, 1, int(Flag.PRESENT))])
    async with console(source) as pilot:
        await pilot.press("M")
        view = await arrived(pilot)
        await pilot.press("T")
        await arrived(pilot)
        assert "by preserved" in view.status
        assert cells(view).count("█") == 1
        view.map.go_to_page(0x2F0000)
        await pilot.press("e")
        assert view.map.cursor == 0x300000


async def test_hjkl_move_the_cursor() -> None:
    async with console(made()) as pilot:
        await pilot.press("M")
        view = await arrived(pilot)
        cell = view.map.cell_pages
        await pilot.press("l", "l", "j", "h", "k")
        assert view.map.cursor == cell


def test_the_host_map_is_text_without_a_terminal() -> None:
    text = render(made(), "host", "text", (132, 40))
    assert "physical memory" in text
    assert "a region" in text
    assert "the part on the screen inverted" in text
