"""What host and guests use, as an operator sees it: asked for while a view shows it, columns, trends, and the past."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from support.console import SMALL, WIDE, console, running, shown, snapshot_of, synthetic_source, until
from support.synthetic import SyntheticSource, snapshot, with_usage
from textual.pilot import Pilot

from memconsole.model import Part, Snapshot
from memconsole.views.app import ConsoleApp
from memconsole.views.headless import render
from memconsole.views.widgets.table import VirtualTable

S = 10**9
USAGE = frozenset({Part.USAGE})


def used(seconds: float, **changes: Any) -> Snapshot:
    made = with_usage(snapshot(4, 3), seconds)
    return replace(made, taken_ns=made.taken_ns + round(seconds * S), **changes)


async def later(pilot: Pilot[None], app: ConsoleApp, seconds: float) -> None:
    """So much later, with what was used until then."""
    synthetic_source(app).show(used(seconds))
    app.action_refresh()
    await until(pilot, lambda: snapshot_of(app).taken_ns == used(seconds).taken_ns)


def rows(app: ConsoleApp) -> list[str]:
    table = app.view.query(VirtualTable).first()
    return [table.rows.key(row) for row in range(len(table.rows))]


def cell(app: ConsoleApp, key: str, field_id: str) -> str:
    table = app.view.query(VirtualTable).first()
    field = next(field for field in table.table.fields if field.id == field_id)
    row = table.rows.row_of(key)
    assert row is not None
    return field.text(table.rows[row])


async def test_usage_is_asked_for_while_a_view_shows_it() -> None:
    source = SyntheticSource(snapshot(4, 3))
    app = console(source)
    async with running(app) as pilot:
        assert source.asked_for[0] == USAGE, "the overview shows it"
        await pilot.press("2")
        app.action_refresh()
        await until(pilot, lambda: source.asked_for[-1] == frozenset())
        await pilot.press("3")
        await until(pilot, lambda: source.asked_for[-1] == USAGE)
        await pilot.press("enter")
        await until(pilot, lambda: source.asked_for[-1] == {Part.USAGE, Part.PLACEMENT})


async def test_columns_that_are_hidden_are_not_asked_for() -> None:
    source = SyntheticSource(snapshot(4, 3))
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("3")
        app.view.query(VirtualTable).first().set_columns(["name", "memory"])
        await until(pilot, lambda: app.parts == frozenset())


@pytest.mark.parametrize("size", [SMALL, WIDE])
async def test_a_rate_needs_two_snapshots_and_is_there_at_once_then(size: tuple[int, int]) -> None:
    app = console(SyntheticSource(used(0)))
    async with running(app, size) as pilot:
        await pilot.press("3")
        assert "CPU %" in shown(app)
        assert cell(app, "cache2", "cpu") == "-"
        assert "rates need a second Snapshot" in cell(app, "cache2", "usage")
        await later(pilot, app, 2)
        assert [cell(app, key, "cpu") for key in ("web0", "db1", "cache2")] == ["0.0", "25.0", "50.0"]
        assert "50.0" in shown(app)
        assert cell(app, "cache2", "usage") == "-"
        await later(pilot, app, 4)
        assert cell(app, "cache2", "cpu_trend") == "▅▅"
        assert cell(app, "web0", "cpu_trend") == "▁▁"


async def test_the_busiest_guest_comes_first_when_rows_are_sorted_by_cpu() -> None:
    app = console(SyntheticSource(used(0)))
    async with running(app) as pilot:
        await pilot.press("3")
        await later(pilot, app, 1)
        await pilot.press("s", *["down"] * 4, "enter")
        await until(pilot, lambda: "by CPU % ▼" in shown(app))
        assert rows(app) == ["cache2", "db1", "web0"]
        await pilot.press("i")
        assert rows(app) == ["web0", "db1", "cache2"]


async def test_what_always_runs_on_does_not_mark_a_row_as_changed() -> None:
    app = console(SyntheticSource(used(0)))
    async with running(app) as pilot:
        await pilot.press("3")
        await later(pilot, app, 1)
        table = app.view.query(VirtualTable).first()
        lines = [table.render_line(y).text for y in range(1, 4)]
        assert not any("•" in line for line in lines), lines


async def test_the_overview_says_how_busy_the_host_is() -> None:
    app = console(SyntheticSource(used(0)))
    async with running(app) as pilot:
        assert "a second snapshot is needed" in shown(app)
        await later(pilot, app, 2)
        screen = shown(app)
        assert "16.0 of 64" in screen
        assert "25%" in screen
        for words in ("load 16.25 12.50 8.00 · guests 75%", "control process", "5% · 48M"):
            assert words in screen


async def test_a_guests_vcpus_say_what_they_use() -> None:
    app = console(SyntheticSource(used(0)))
    async with running(app) as pilot:
        app.open_view("guests", "guest:db1")
        await later(pilot, app, 2)
        screen = shown(app)
        assert "CPU 0/KVM" in screen
        assert "25.0" in screen


async def test_the_past_has_what_was_recorded() -> None:
    source = SyntheticSource(used(0, usage=None))
    source.recorded = [used(-30), used(-20)]
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("3", "left_square_bracket")
        await until(pilot, lambda: app.away)
        assert cell(app, "cache2", "cpu") == "50.0"
        await pilot.press("left_square_bracket")
        await until(pilot, lambda: snapshot_of(app).taken_ns == used(-30).taken_ns)
        assert cell(app, "cache2", "cpu") == "-", "nothing was recorded before it"


def test_a_picture_asks_for_what_its_view_shows() -> None:
    source = SyntheticSource(used(0))
    assert "2h00m" in render(source, "guests", "text", (300, 20))
    assert source.asked_for == [USAGE]
    render(source, "regions", "text", (80, 24))
    assert source.asked_for[-1] == frozenset()
