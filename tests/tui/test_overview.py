"""The Overview: what stands first at every size, what each part leads to, and that it is never empty nor cut short."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.console import SMALL, WIDE, console, running, shown, until
from support.synthetic import NOW_NS, SyntheticSource, snapshot, with_usage

from memconsole.model import Event, GuestKind, GuestResult, HandoffReport, HandoffState, Range, Snapshot, Stalls
from memconsole.views.headless import render
from memconsole.views.places import Place
from memconsole.views.screens.overview import GlancePanel
from memconsole.views.widgets.table import VirtualTable

S = 10**9
BIG = (200, 60)
REHEARSAL = HandoffReport(
    "rehearse",
    HandoffState.DONE,
    NOW_NS - 300 * S,
    guests=(
        GuestResult("web0", GuestKind.CANARY, 1 << 30, back=True, blackout_ns=12_000_000),
        GuestResult("db1", GuestKind.QEMU, 1 << 30, back=True, blackout_ns=30_000_000),
    ),
)


def host(seconds: int = 0, guests: int = 3, **changes: Any) -> Snapshot:
    made = with_usage(snapshot(10, guests), seconds)
    assert made.usage is not None
    usage = replace(made.usage, stalls=Stalls(seconds * S // 2, 0, 0))
    return replace(made, taken_ns=NOW_NS + seconds * S, usage=usage, **changes)


async def later(pilot: Any, app: Any, seconds: int, **changes: Any) -> None:
    app.source.show(host(seconds, **changes))
    app.action_refresh()
    await until(pilot, lambda: app.snapshot.taken_ns == NOW_NS + seconds * S)


def parts(screen: str) -> list[str]:
    """The titles of the parts in sight, in their order."""
    known = ("Ready to hand off?", "Last rehearsal", "Guests", "Findings", "Physical memory", "Trends", "Live update")
    return [name for line in screen.splitlines()[3:] for name in known if f"─{name}" in line]


@pytest.mark.parametrize("size", [SMALL, WIDE, BIG])
async def test_what_matters_is_in_sight_at_every_size(size: tuple[int, int]) -> None:
    app = console(SyntheticSource(host(handoff=REHEARSAL)))
    async with running(app, size) as pilot:
        await later(pilot, app, 2, handoff=REHEARSAL)
        screen = shown(app)
        found = parts(screen)
        if size == SMALL:
            assert found == ["Ready to hand off?", "Guests", "Findings", "Physical memory", "Trends"]
        else:
            assert found[:2] == ["Ready to hand off?", "Last rehearsal"]
            assert found[-1] == "Live update"
        for words in ("last rehearsal done, longest blackout 30.0ms", "5m02s", "ago"):
            assert words in screen
        assert "db1 30.0ms, web0 12.0ms" in screen
        assert "25.0" in screen, "the CPU of db1"
        assert "2M 1.1G 4K 360.0M" in screen
        assert "█ regions" in screen
        assert "16.0 of 64" in screen


async def test_guests_get_the_room_there_is_and_the_least_where_there_is_none() -> None:
    for size, least in ((SMALL, 3), (WIDE, 10), (BIG, 20)):
        app = console(SyntheticSource(host(guests=40)))
        async with running(app, size):
            guests = app.view.query_one("#guests-now", VirtualTable)
            assert guests.size.height - 1 >= least
            assert parts(shown(app))[-1] in {"Trends", "Physical memory", "Live update"}


async def test_a_guests_last_blackout_stands_in_its_row() -> None:
    app = console(SyntheticSource(host(handoff=REHEARSAL)))
    async with running(app):
        row = next(line for line in shown(app).splitlines() if "web0 " in line and "running" in line)
        assert "12.0ms" in row


async def test_enter_on_each_part_leads_to_its_view() -> None:
    app = console(SyntheticSource(host()))
    async with running(app, BIG) as pilot:
        for id, view in (("verdict", "handoff"), ("last", "handoff"), ("memory", "host"), ("trends", "guests")):
            await pilot.press("1")
            app.view.query_one(f"#{id}", GlancePanel).focus()
            await pilot.press("enter")
            assert app.trail == [Place(view)], id
        await pilot.press("1")
        app.view.query_one("#guests-now", VirtualTable).focus()
        await pilot.press("down", "enter")
        assert app.trail[-1] == Place("guest", "guest:db1")
        await pilot.press("escape")
        app.view.query_one("#findings-now", VirtualTable).focus()
        await pilot.press("enter")
        assert app.trail[-1].view == "finding"


async def test_tab_reaches_every_part_and_brings_it_into_sight() -> None:
    app = console(SyntheticSource(host()))
    async with running(app, SMALL) as pilot:
        seen = []
        for _ in range(10):
            seen.append(app.focused.id if app.focused is not None else None)
            await pilot.press("tab")
        assert {"verdict", "memory", "trends", "held", "survival", "guests-now", "findings-now", "events-now"} <= {
            *seen
        }
        app.view.query_one("#survival").focus()
        await until(pilot, lambda: "Live update" in shown(app))


async def test_enter_on_an_event_leads_to_what_it_is_about() -> None:
    events = (
        Event(1, NOW_NS, "guest-start", "web0", "started web0"),
        Event(2, NOW_NS, "handoff-rehearse", "handoff", "rehearsed"),
        Event(3, NOW_NS, "release", "gone9", "released gone9"),
    )
    app = console(SyntheticSource(host(events=events)))
    async with running(app) as pilot:
        await pilot.press("8", "enter")
        assert app.trail[-1] == Place("event", "event:3"), "what is gone has no other place"
        await pilot.press("escape", "down", "enter")
        assert app.trail == [Place("handoff")]
        await pilot.press("8", "end", "enter")
        assert app.trail[-1] == Place("guest", "guest:web0")
        app.view.query_one("#events" if app.view.query("#events") else VirtualTable)
        table = next(each for each in app.view.query(VirtualTable) if each.table.id == "events" and each.display)
        table.focus()
        await pilot.press("enter")
        assert app.trail[-1] == Place("event", "event:1"), "the guest is in front already"


async def test_trends_say_what_they_need_and_a_guest_has_its_own() -> None:
    app = console(SyntheticSource(host()))
    async with running(app) as pilot:
        assert "trends need a second snapshot" in shown(app)
        await later(pilot, app, 2)
        screen = shown(app)
        for title in ("CPU stall", "mem stall", "memory", "WSS"):
            assert title in screen
        assert "50.0%" in screen
        assert "a cell each 2s" in screen
        app.open_view("guests", "guest:db1")
        await until(pilot, lambda: "25.0%" in shown(app))


async def test_no_part_is_empty_on_a_host_with_nothing() -> None:
    full = host()
    empty = Snapshot(taken_ns=full.taken_ns, host=full.host, memory=full.memory)
    app = console(SyntheticSource(empty))
    async with running(app):
        screen = shown(app)
        assert "no guests yet" in screen
        assert "✔ no findings" in screen
        assert "never rehearsed" in screen
        assert "does not show this user where memory lies" in screen
        assert "nothing has happened yet" in screen
        assert "What could not be read" not in screen


async def test_every_mark_of_the_strips_is_explained_beside_it() -> None:
    scratch = (Range(1 << 40, 1 << 41, "scratch"),)
    made = host()
    app = console(SyntheticSource(replace(made, survival=replace(made.survival, scratch=scratch))))
    async with running(app, BIG):
        screen = shown(app)
        for mark in ("█ regions", "▒ other", "░ reclaimable", "· free", "█ RAM", "▓ kernel", "▒ KHO scratch"):
            assert mark in screen


@pytest.mark.parametrize("size", [SMALL, WIDE, BIG])
def test_the_twin_without_a_terminal_shows_the_same(size: tuple[int, int]) -> None:
    async def screen() -> list[str]:
        app = console(SyntheticSource(host(handoff=REHEARSAL)), clock=lambda: NOW_NS)
        async with running(app, size):
            return shown(app).splitlines()

    seen = asyncio.run(screen())
    text = render(SyntheticSource(host(handoff=REHEARSAL)), "overview", "text", size).splitlines()
    assert text[3:-1] == seen[3:-1]
