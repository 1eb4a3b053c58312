"""The pane beside the rows of a wide terminal, and what a click does on tabs, keys, rows and the map."""

from __future__ import annotations

import pytest
from support import synthetic
from support.console import SMALL, WIDE, console, refreshed, running, shown, toasts, until

from memconsole.views.places import Place
from memconsole.views.screens.dialogs import Confirm
from memconsole.views.screens.help import Help
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.settings import ConsoleSettings
from memconsole.views.widgets.bars import Keys, Tabs
from memconsole.views.widgets.pane import WIDTH, Pane
from memconsole.views.widgets.table import VirtualTable

BROAD = (200, 60)


def pane_of(text: str) -> list[str]:
    """What stands in the pane, line by line."""
    return [line[BROAD[0] - WIDTH + 2 :].rstrip() for line in text.splitlines()[3:-1]]


async def test_the_pane_follows_the_cursor_and_the_table_in_use() -> None:
    app = console()
    async with running(app, BROAD) as pilot:
        await pilot.press("2")
        assert "Regions: web0-ram0" in pane_of(shown(app))[0]
        await pilot.press("down")
        assert "Regions: db1-ram0" in pane_of(shown(app))[0]
        await pilot.press("6", "tab")
        assert "PCI devices: " in pane_of(shown(app))[0] or "Devices: " in pane_of(shown(app))[0]


async def test_the_pane_shows_what_becomes_of_the_row() -> None:
    app = console()
    async with running(app, BROAD) as pilot:
        await pilot.press("3")
        assert any("1,000" in line for line in pane_of(shown(app)))
        await refreshed(pilot, app, synthetic.snapshot(beats=1500))
        assert any("1,500" in line for line in pane_of(shown(app)))


async def test_the_pane_can_be_put_away_and_stays_so() -> None:
    app = console()
    async with running(app, BROAD) as pilot:
        await pilot.press("2", "d", "3")
        assert not app.view.query_one(Pane).display
        await pilot.press("d")
        assert "Guests: web0" in pane_of(shown(app))[0]


async def test_a_narrow_terminal_has_no_pane_and_says_why() -> None:
    app = console(settings=ConsoleSettings(pane=False))
    async with running(app, WIDE) as pilot:
        await pilot.press("2")
        assert not app.view.query_one(Pane).display
        await pilot.press("d")
        assert not app.view.query_one(Pane).display
        assert "it needs 160 columns, there are 132" in toasts(app)


async def test_what_the_pane_has_no_room_for_is_said_to_be_missing() -> None:
    app = console()
    async with running(app, (200, 16)) as pilot:
        await pilot.press("3")
        assert pane_of(shown(app))[-1].startswith("… ")
        assert "more lines; Enter shows all" in pane_of(shown(app))[-1]


@pytest.mark.parametrize("size", [SMALL, WIDE, (60, 20)])
async def test_a_click_on_a_tab_opens_its_view(size: tuple[int, int]) -> None:
    app = console()
    async with running(app, size) as pilot:
        for number, view in enumerate(app.VIEWS):
            start, _, _ = app.screen.query_one(Tabs).keys_at[number]
            if start + 1 >= size[0]:
                break  # there is no room for this one, and an ellipsis says so
            await pilot.click(Tabs, offset=(start + 1, 0))
            place = [Place(view.name)]
            await until(pilot, lambda place=place: app.trail == place)  # type: ignore[misc]


async def test_a_click_on_a_key_does_what_the_key_does() -> None:
    app = console(on_quit_warning=lambda: "2 guests end with this console")
    async with running(app) as pilot:
        width = app.size.width
        await pilot.click(Keys, offset=(width - 2, 0))
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("escape")
        line = shown(app).splitlines()[-1]
        await pilot.click(Keys, offset=(line.index("? Help"), 0))
        await until(pilot, lambda: isinstance(app.screen, Help))


async def test_a_click_on_a_tab_goes_by_the_operator_s_own_key() -> None:
    app = console(settings=ConsoleSettings(keys={"view-guests": "ctrl+g"}))
    async with running(app) as pilot:
        await pilot.click(Tabs, offset=(app.screen.query_one(Tabs).keys_at[2][0] + 1, 0))
        await until(pilot, lambda: app.trail == [Place("guests")])


async def test_a_click_chooses_a_row_and_a_page() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        table = app.view.query_one(VirtualTable)
        await pilot.click(table, offset=(4, 3))
        assert table.cursor == 2
        app.open_view("pfn", "region:web0-ram0")
        view = app.view
        assert isinstance(view, PfnMap)
        await until(pilot, lambda: view.table is not None)
        await pilot.click(view.map, offset=(20, 1))
        assert view.map.cursor > 0


async def test_the_mouse_can_be_left_to_the_terminal() -> None:
    app = console(settings=ConsoleSettings(mouse=False))
    async with running(app) as pilot:
        seen = [app.mouse]
        for _ in range(2):
            await pilot.press("number_sign")
            seen.append(app.mouse)
        assert seen == [False, True, False]
        assert "the terminal has the mouse" in toasts(app)
