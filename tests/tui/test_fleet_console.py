"""The console of many hosts: the hosts, their tables as one, and the way into one of them."""

from __future__ import annotations

from contextlib import closing

from msgspec.structs import replace
from support.console import SMALL, current_table, running, selected, shown, type_text, until
from support.fleets import fleet_of
from support.stub_host import HUGETLB
from support.synthetic import NOW_NS, SyntheticSource
from textual.pilot import Pilot

from memconsole.actions import GuestPause
from memconsole.fleet import Fleet
from memconsole.model import Readiness
from memconsole.source import Source
from memconsole.views.app import ConsoleApp
from memconsole.views.fleetapp import FleetApp, Into
from memconsole.views.places import Place
from memconsole.views.screens.many import ManyPlan


def over(fleet: Fleet) -> FleetApp:
    return FleetApp(fleet, interval=3600, clock=lambda: NOW_NS)


async def left(pilot: Pilot[None], app: FleetApp) -> Into:
    await until(pilot, lambda: app.into is not None)
    assert app.into is not None
    return app.into


async def test_the_hosts_are_the_first_view_and_enter_leads_into_one() -> None:
    fleet, sources = fleet_of(3)
    sources[1].fails = True
    fleet.members["h2"].ask((), join=True)
    with closing(fleet):
        app = over(fleet)
        async with running(app, SMALL) as pilot:
            words = ("h1", "h2", "h3", "live", "lost", "3 hosts", "1 do not answer")
            await until(pilot, lambda: all(word in shown(app) for word in words))
            await pilot.press("down", "down", "enter")
            assert await left(pilot, app) == Into("h3")


async def test_a_host_that_never_answered_cannot_be_opened_and_says_why() -> None:
    fleet, _ = fleet_of(1)
    member = fleet.members["h1"]
    member.source = member.snapshot = member.joined = None
    with closing(fleet):
        app = over(fleet)
        async with running(app) as pilot:
            await until(pilot, lambda: "connecting" in shown(app))
            await pilot.press("enter")
            await until(pilot, lambda: "h1 did not answer" in shown(app))
            assert app.into is None


async def test_tables_of_all_hosts_have_the_host_first_are_filtered_by_it_and_lead_to_the_row_on_its_host() -> None:
    fleet, _ = fleet_of(3)
    with closing(fleet):
        app = over(fleet)
        async with running(app) as pilot:
            await pilot.press("3")
            table = current_table(app)
            assert table.rows.fields[0].id == "host"
            assert table.rows.total == 9
            await pilot.press("slash")
            await type_text(pilot, "host:h2")
            await pilot.press("enter")
            await until(pilot, lambda: len(table.rows) == 3)
            name = selected(app).name
            assert name.startswith("h2/")
            await pilot.press("enter")
            assert await left(pilot, app) == Into("h2", Place("guest", f"guest:{name.removeprefix('h2/')}"))


async def test_an_action_on_rows_of_several_hosts_is_planned_on_each_and_wants_the_number() -> None:
    fleet, sources = fleet_of(2)
    with closing(fleet):
        app = over(fleet)
        async with running(app) as pilot:
            await pilot.press("3", "A", "p")
            await until(pilot, lambda: isinstance(app.screen, ManyPlan) and "6 can be done" in shown(app))
            assert "h1/" in shown(app)
            assert "h2/" in shown(app)
            await type_text(pilot, "6")
            await pilot.press("enter")
            await until(pilot, lambda: sum(len(each.applied) for each in sources) == 6)
            for source in sources:
                names = {each.name for each in source.snapshot().guests}
                assert {each.name for each in source.applied if isinstance(each, GuestPause)} == names


async def test_what_is_one_hosts_alone_says_where_it_is_seen() -> None:
    fleet, _ = fleet_of(2)
    with closing(fleet):
        app = over(fleet)
        async with running(app) as pilot:
            for key in ("5", "7", "0"):
                await pilot.press(key)
                await until(pilot, lambda: "choose a host in Hosts" in shown(app))


async def test_a_hosts_console_opens_at_the_row_that_was_chosen() -> None:
    source: Source = SyntheticSource()
    name = source.snapshot().guests[1].name
    app = ConsoleApp(source, interval=3600, clock=lambda: NOW_NS)
    app.begin_at = Place("guest", f"guest:{name}")
    async with running(app) as pilot:
        await until(pilot, lambda: app.trail[-1] == Place("guest", f"guest:{name}"))


async def test_the_first_line_says_how_many_hosts_are_ready() -> None:
    fleet, _ = fleet_of(3)
    ready = Readiness(NOW_NS, 1, (), 50)
    for name, found in (("h1", ready), ("h2", replace(ready, failing=(HUGETLB,))), ("h3", None)):
        member = fleet.members[name]
        assert member.snapshot is not None
        member.snapshot = replace(member.snapshot, readiness=found)
    with closing(fleet):
        app = over(fleet)
        async with running(app) as pilot:
            await until(pilot, lambda: "1 not ready" in shown(app) and "1 unchecked" in shown(app))
            for member in fleet.members.values():
                assert member.snapshot is not None
                member.snapshot = replace(member.snapshot, readiness=ready)
            await pilot.press("ctrl+r")
            await until(pilot, lambda: "all 3 ready" in shown(app))
