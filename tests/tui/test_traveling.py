"""The console in the past: what it shows, what it says of the time, what it does not do, and how one comes back."""

from __future__ import annotations

from functools import partial

import pytest
from msgspec.structs import replace
from support.console import console, refreshed, running, shown, snapshot_of, toasts, until
from support.synthetic import NOW_NS, SyntheticSource, snapshot

from memconsole.errors import BadFile
from memconsole.model import Snapshot
from memconsole.source import PastSource
from memconsole.views.app import ConsoleApp
from memconsole.views.headline import whole_seconds
from memconsole.views.screens.pfnmap import PfnMap

S = 10**9
EARLIER, LATER, PRESENT = "left_square_bracket", "right_square_bracket", "right_curly_bracket"


def at(seconds: int, regions: int) -> Snapshot:
    made = snapshot(regions, 2)
    host = replace(made.host, uptime_s=1000.0 + seconds)
    return replace(made, host=host, taken_ns=NOW_NS + seconds * S)


@pytest.fixture
def source() -> SyntheticSource:
    made = SyntheticSource(at(0, 6))
    made.recorded = [at(-300, 2), at(-200, 3), at(-100, 3), at(-1, 5)]
    return made


def regions_of(app: ConsoleApp) -> int:
    return len(snapshot_of(app).regions)


def shows(app: ConsoleApp, time_ns: int) -> bool:
    return snapshot_of(app).taken_ns == time_ns


async def test_the_brackets_walk_and_the_header_says_when(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2")
        assert "● live" in shown(app)
        for seconds, regions in ((-1, 5), (-100, 3), (-200, 3), (-300, 2)):
            await pilot.press(EARLIER)
            await until(pilot, partial(shows, app, NOW_NS + seconds * S))
            assert app.view.current_table is not None
            assert app.view.current_table.rows.total == regions
            assert "PAST" in shown(app)
            assert "live" not in shown(app)
        assert "5m05s ago" in shown(app)
        assert "14:08:20 UTC" in shown(app)
        await pilot.press(EARLIER)  # there is nothing before
        await pilot.pause()
        assert regions_of(app) == 2
        await pilot.press(LATER)
        await until(pilot, lambda: snapshot_of(app).taken_ns == NOW_NS - 200 * S)
        await pilot.press(PRESENT)
        await until(pilot, lambda: not app.away)
        assert regions_of(app) == 6
        assert "● live" in shown(app)


@pytest.mark.parametrize(
    ("age", "said"),
    [(0, "under a second"), (S - 1, "under a second"), (S, "1s"), (65 * S, "1m05s")],
)
def test_an_age_is_said_in_whole_seconds(age: int, said: str) -> None:
    assert whole_seconds(age) == said


async def test_a_moment_that_was_just_recorded_is_under_a_second_ago(source: SyntheticSource) -> None:
    app = console(source)
    app.clock = lambda: NOW_NS - S
    async with running(app) as pilot:
        await pilot.press(EARLIER)
        await until(pilot, lambda: snapshot_of(app).taken_ns == NOW_NS - S)
        await until(pilot, lambda: "under a second ago" in shown(app))
        assert "0ns" not in shown(app)


async def test_every_view_shows_the_past(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press(EARLIER)
        await until(pilot, lambda: app.away)
        for number in range(1, len(app.VIEWS) + 1):
            await pilot.press(str(number))
            await pilot.pause()
            assert "PAST" in shown(app)
        app.open_view("regions", f"region:{source.recorded[-1].regions[4].name}")
        await pilot.pause()
        assert source.recorded[-1].regions[4].name in shown(app)


async def test_rows_are_marked_by_what_changed_since_the_one_before_whichever_way_one_came(
    source: SyntheticSource,
) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", EARLIER, EARLIER, EARLIER)
        await until(pilot, lambda: snapshot_of(app).taken_ns == NOW_NS - 200 * S)
        table = app.view.current_table
        assert table is not None
        new = source.recorded[1].regions[2].name
        assert [key for key, before in table.rows.before.items() if before is None] == [new]
        await pilot.press(LATER)
        await until(pilot, lambda: snapshot_of(app).taken_ns == NOW_NS - 100 * S)
        assert [key for key, before in table.rows.before.items() if before is None] == []
        await pilot.press("3")
        guests = app.view.current_table
        assert guests is not None
        assert [key for key, before in guests.rows.before.items() if before is None] == []
        await pilot.press("2", PRESENT)
        await until(pilot, lambda: not app.away)
        assert table.rows.before == {}


async def test_nothing_is_done_there_and_the_reason_is_said(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", EARLIER)
        await until(pilot, lambda: app.away)
        await pilot.press("n")
        await pilot.pause()
        assert "this is the past, 2026-09-21 14:13:19" in toasts(app)
        app.action_macro("none")
        await pilot.press("X")
        await pilot.pause()
        assert source.applied == []
        assert source.calls.count("apply") == 0
        await pilot.press(PRESENT)
        await pilot.press("n")
        await until(pilot, lambda: len(app.screen_stack) > 1)


async def test_what_arrives_meanwhile_waits_for_the_return(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press(EARLIER)
        await until(pilot, lambda: app.away)
        source.show(at(7, 8))
        app.action_refresh()
        await until(pilot, lambda: app.latest is not None and len(app.latest.regions) == 8)
        assert regions_of(app) == 5
        await pilot.press("escape")
        await until(pilot, lambda: regions_of(app) == 8)
        assert not app.away
        await refreshed(pilot, app, at(8, 9))


async def test_escape_goes_back_first_and_then_to_the_present(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", EARLIER)
        await until(pilot, lambda: app.away)
        await pilot.press("enter")
        await until(pilot, lambda: len(app.trail) == 2)
        await pilot.press("escape")
        assert app.away
        assert len(app.trail) == 1
        await pilot.press("escape")
        assert not app.away


async def test_steps_past_the_last_one_are_the_present(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press(LATER)
        await pilot.pause()
        assert "This is the present" in toasts(app)
        await pilot.press(EARLIER)
        await until(pilot, lambda: app.away)
        await pilot.press(LATER)
        await until(pilot, lambda: not app.away)


async def test_a_time_can_be_named(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        app.travel_to("-2m")
        await until(pilot, lambda: app.away)
        assert snapshot_of(app).taken_ns == NOW_NS - 200 * S
        app.travel_to("14:12:00")
        await until(pilot, lambda: snapshot_of(app).taken_ns == NOW_NS - 100 * S)
        app.travel_to("-9d")
        await until(pilot, lambda: "nothing is recorded" in toasts(app))
        assert snapshot_of(app).taken_ns == NOW_NS - 100 * S


async def test_where_nothing_is_recorded_it_is_said_and_the_present_stays() -> None:
    app = console(SyntheticSource())
    async with running(app) as pilot:
        await pilot.press(EARLIER)
        await until(pilot, lambda: "no snapshot was recorded" in toasts(app))
        assert not app.away


async def test_a_history_that_cannot_be_read_is_said(source: SyntheticSource) -> None:
    source.fail["at"] = BadFile("it is damaged")
    app = console(source)
    async with running(app) as pilot:
        await pilot.press(EARLIER)
        await until(pilot, lambda: "it is damaged" in toasts(app))
        assert not app.away
        del source.fail["at"]
        await pilot.press(EARLIER)
        await until(pilot, lambda: app.away)


async def test_who_turns_back_on_the_way_does_not_arrive(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        app.action_travel(-1)
        app.action_present()
        await until(pilot, lambda: not app._underway)
        assert not app.away


async def test_a_pfn_map_is_not_shown_as_it_is_now(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        app.open_view("pfn", f"region:{source.snapshot().regions[0].name}")
        view = app.view
        assert isinstance(view, PfnMap)
        await until(pilot, lambda: view.table is not None)
        await pilot.press(EARLIER)
        await until(pilot, lambda: view.error is not None)
        assert view.table is None
        assert isinstance(app.source, PastSource)
        assert "no PFN map" in shown(app)
        await pilot.press(PRESENT)
        await until(pilot, lambda: view.table is not None)
        assert view.error is None
