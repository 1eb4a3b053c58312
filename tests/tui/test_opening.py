"""The console opens: the first view with its data, the others behind it, and no key is lost meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
from support.console import console, shown, until
from textual.events import Resize
from textual.geometry import Size
from textual.pilot import Pilot

from memconsole.views.app import ConsoleApp
from memconsole.views.painting import Views
from memconsole.views.places import Place
from memconsole.views.screens.detail import DETAILS
from memconsole.views.view import View


class Held:
    """Views of an app that are built only once they may be."""

    def __init__(self, app: ConsoleApp, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may = False
        self._app, self._go_on = app, app._build
        monkeypatch.setattr(app, "_build", self._build)

    async def _build(self, rest: Sequence[tuple[str, type[View]]]) -> None:
        if self.may:
            await self._go_on(rest)
        else:
            self._app.set_timer(0.01, partial(self._build, rest))


@asynccontextmanager
async def opening(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[ConsoleApp, Pilot[None], Held]]:
    """A console whose first view is there with its data, and which builds the others once they may be."""
    app = console()
    held = Held(app, monkeypatch)
    async with app.run_test(size=(132, 50)):
        pilot = Pilot(app)
        await until(pilot, lambda: "web0" in shown(app))
        yield app, pilot, held


async def test_the_first_frame_has_data_before_the_other_views_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opening(monkeypatch) as (app, pilot, held):
        assert app.opening
        assert [view.id for view in app.query_one(Views).children] == ["overview"]
        held.may = True
        await until(pilot, lambda: not app.opening)
        assert [view.id for view in app.query_one(Views).children] == [*(view.name for view in app.VIEWS), *DETAILS]


async def test_keys_clicks_and_a_resize_before_the_views_are_there_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opening(monkeypatch) as (app, pilot, held):
        for key in ("5", "enter", "colon", *"regions", "enter"):
            app.simulate_key(key)
        app.post_message(Resize(Size(80, 24), Size(80, 24)))
        await until(pilot, lambda: app.size == (80, 24))
        assert app.trail == [Place("overview")]
        held.may = True
        await until(pilot, lambda: not app.typing and app.trail == [Place("regions")])
        assert "web0-ram0" in shown(app)


async def test_a_click_on_a_tab_before_its_view_is_there_opens_it_then(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opening(monkeypatch) as (app, pilot, held):
        await pilot.click("Tabs", offset=(shown(app).splitlines()[1].index("Guests"), 0))
        assert app.trail == [Place("overview")]
        held.may = True
        await until(pilot, lambda: app.trail == [Place("guests")])
