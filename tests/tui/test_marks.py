"""Marked rows: what is chosen, one plan for all of it, what fails; columns, exports and copies of what is shown."""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support import synthetic
from support.console import (
    SMALL,
    console,
    focused,
    refreshed,
    running,
    selected,
    shown,
    snapshot_of,
    toasts,
    type_text,
    until,
)
from support.synthetic import SyntheticSource
from textual.pilot import Pilot
from textual.widgets import Input

from memconsole.actions import Action, GuestPause, Map, Release
from memconsole.errors import Gone
from memconsole.model import Outcome, Plan, Refusal
from memconsole.views.app import ConsoleApp
from memconsole.views.remembering import Memory
from memconsole.views.screens.acting import Confirmation, Form
from memconsole.views.screens.columns import Columns
from memconsole.views.screens.many import ManyDone, ManyPlan
from memconsole.views.widgets.table import VirtualTable


def table(app: ConsoleApp) -> VirtualTable:
    return app.view.query(VirtualTable).first()


def names(items: Sequence[Any]) -> list[str]:
    return [item.name for item in items]


async def planned(pilot: Pilot[None], app: ConsoleApp) -> None:
    await until(pilot, lambda: isinstance(app.screen, ManyPlan) and "can be done" in shown(app))


class Picky(SyntheticSource):
    """It refuses and fails where it is told to."""

    def __init__(self, *, refused: Collection[str] = (), failing: Collection[str] = ()) -> None:
        super().__init__()
        self.refused, self.failing = refused, failing

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        assert isinstance(action, Release)
        refusal = Refusal("Granted", f"{action.region} is granted", "", "revoke it")
        self.refuse = (refusal,) if action.region in self.refused else ()
        return super().plan(action, after)

    def apply(self, action: Action) -> Outcome:
        assert isinstance(action, Release)
        if action.region in self.failing:
            raise Gone(f"{action.region} is gone", "its memfd is closed", "look again")
        return super().apply(action)


async def test_rows_are_marked_one_by_one_by_range_all_and_inverted() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "space", "down", "space")
        rows = names(snapshot_of(app).regions)
        assert names(table(app).chosen) == [rows[0], rows[2]]
        assert "2 marked" in shown(app)
        await pilot.press("down", "V")
        assert names(table(app).chosen) == [rows[0], *rows[2:5]]
        await pilot.press("I")
        assert names(table(app).chosen) == [rows[1], *rows[5:]]
        await pilot.press("A")
        assert names(table(app).chosen) == rows
        await pilot.press("escape")
        assert names(table(app).chosen) == [selected(app).name]
        assert "marked" not in shown(app)


async def test_all_marks_what_the_filter_shows_and_what_it_hides_is_told_and_left_alone() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "web")
        await pilot.press("enter", "A")
        web = [name for name in names(snapshot_of(app).regions) if "web" in name]
        assert names(table(app).chosen) == web
        table(app).set_filter("name:web0-ram0")
        assert names(table(app).chosen) == ["web0-ram0"]
        await pilot.pause()
        assert f"{len(web)} marked, {len(web) - 1} of them not shown" in shown(app)
        table(app).set_filter("name:db*")
        await pilot.press("X")
        assert "every marked row" in toasts(app)


async def test_marks_stay_on_their_rows_through_sorting_and_refresh_and_go_with_them() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "space", "space")
        marked = set(names(table(app).chosen))
        await pilot.press("greater_than_sign", "greater_than_sign", "i")
        assert set(names(table(app).chosen)) == marked
        fewer = replace(snapshot_of(app), regions=snapshot_of(app).regions[1:])
        await refreshed(pilot, app, fewer)
        assert set(names(table(app).chosen)) == marked - {synthetic.snapshot().regions[0].name}


async def test_marks_are_seen_without_colour() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "space")
        lines = [table(app).render_line(y).text for y in (1, 2)]
        assert lines[0].startswith("■")
        await pilot.press("up")
        assert table(app).render_line(1).text.startswith("◆")


async def test_one_plan_lists_each_and_one_number_confirms_them_all() -> None:
    source = Picky(refused={"db1-ram0"})
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "space", "space", "space", "X")
        await planned(pilot, app)
        text = shown(app)
        assert "2 can be done · refused, and left as it is: 1" in text
        assert "memconsole release db1-ram0 refused" in text
        assert "▸ revoke it" in text
        assert "Release region: 3 · destroys" in text
        await pilot.press("3", "enter")
        assert isinstance(app.screen, ManyPlan)
        app.screen.query_one("#typed", Input).value = ""
        await pilot.press("2", "enter")
        await until(pilot, lambda: "all 2 done" in toasts(app))
        done = [name for name in names(synthetic.snapshot().regions)[:3] if name != "db1-ram0"]
    assert source.applied == [Release(name) for name in done]
    assert app.journal[-2:] == source.applied


async def test_what_fails_is_said_item_by_item_and_offered_again() -> None:
    first, second = names(synthetic.snapshot().regions)[:2]
    source = Picky(failing=[second])
    app = console(source)
    async with running(app, SMALL) as pilot:
        await pilot.press("2", "space", "space", "X")
        await planned(pilot, app)
        await pilot.press("2", "enter")
        await until(pilot, lambda: isinstance(app.screen, ManyDone))
        text = shown(app)
        assert f"✖ memconsole release {second}" in text
        assert "its memfd is closed" in text
        assert f"✔ release {first}" in text
        source.failing = ()
        await pilot.press("enter")
        await planned(pilot, app)
        await pilot.press("1", "enter")
        await until(pilot, lambda: source.applied == [Release(first), Release(second)])


async def test_what_no_row_answers_is_asked_for_once() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "space", "space", "m")
        await until(pilot, lambda: isinstance(app.screen, Form))
        assert "Map region: 2 rows" in shown(app)
        await type_text(pilot, "web0")
        await pilot.press("enter")
        await planned(pilot, app)
        await pilot.press("2", "enter")
        first, second = names(synthetic.snapshot().regions)[:2]
        await until(pilot, lambda: source.applied == [Map(first, "web0"), Map(second, "web0")])


async def test_a_thousand_guests_are_acted_on_at_once() -> None:
    source = SyntheticSource(synthetic.snapshot(regions=1000, guests=1000))
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("3", "A", "p")
        await planned(pilot, app)
        await type_text(pilot, "1000")
        await pilot.press("enter")
        await until(pilot, lambda: "all 1,000 done" in toasts(app))
    assert source.applied == [GuestPause(guest.name) for guest in source.snapshot().guests]


async def test_one_marked_row_is_confirmed_as_any_row() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "space", "p")
        await until(pilot, lambda: isinstance(app.screen, Confirmation))


# --- columns --------------------------------------------------------------------------------------------------------


async def test_columns_are_hidden_moved_and_remembered_and_the_name_stays(tmp_path: Path) -> None:
    app = console(memory=Memory(tmp_path))
    async with running(app) as pilot:
        await pilot.press("2", "c")
        assert isinstance(app.screen, Columns)
        assert "✔  2 State" in shown(app)
        await pilot.press("space", "up", "up", "J", "enter")
        fields = [field.id for field in table(app).rows.fields]
        assert fields[0] == "name"
        assert "state" not in fields
        await pilot.press("s", "down", "enter")
    again = console(memory=Memory(tmp_path))
    async with running(again) as pilot:
        await pilot.press("2")
        assert [field.id for field in table(again).rows.fields] == fields
        assert table(again).layout_now.sort == fields[1]
        await pilot.press("c", "d", "enter")
        assert [field.id for field in table(again).rows.fields][1] == "state"


async def test_what_is_remembered_badly_is_told_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "console.json").write_text("{")
    app = console(memory=Memory(tmp_path))
    async with running(app):
        assert "console.json cannot be read" in toasts(app)


# --- what is taken out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redact", [False, True])
async def test_what_is_shown_is_exported_as_it_is_sorted_filtered_and_chosen(tmp_path: Path, redact: bool) -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        table(app).set_columns(["name", "size"])
        table(app).set_filter("web0")
        table(app).sort_by(table(app).table.fields[2])
        for ending in ("csv", "json", "svg", "txt"):
            await pilot.press("colon")
            await type_text(pilot, f"export {tmp_path}/rows.{ending}" + " --redact" * redact)
            await pilot.press("enter")
            await until(pilot, (tmp_path / f"rows.{ending}").exists)
        expected = [(region.name, region.size) for region in table(app).shown_items]
    texts = {path.suffix: path.read_text() for path in tmp_path.iterdir()}  # noqa: ASYNC240 - nothing else waits
    written = list(csv.reader(texts[".csv"].splitlines()))
    assert written[0] == ["name", "size"]
    assert len(written) == len(expected) + 1
    told = json.loads(texts[".json"])
    assert [each["size"] for each in told] == [size for _, size in expected]
    assert len(texts) == 4
    assert all(("web0" in text) is not redact for text in texts.values())
    assert all(("region-1" in text) is redact for text in texts.values())


async def test_an_export_that_cannot_be_leaves_the_line_to_be_corrected(tmp_path: Path) -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "W")
        assert focused(app, Input).value == "export regions.csv"
        focused(app, Input).value = f"export {tmp_path}/rows"
        await pilot.press("enter")
        assert "has no format" in toasts(app)
        assert focused(app, Input).value == f"export {tmp_path}/rows"


async def test_a_cell_a_row_the_marked_rows_and_the_table_are_copied() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "C", "enter")
        assert app.clipboard == table(app).line_of(snapshot_of(app).regions[0])
        await pilot.press("C", "home", "enter")
        assert app.clipboard == snapshot_of(app).regions[0].name
        await pilot.press("C", "end", "enter")
        assert len(list(csv.reader(app.clipboard.splitlines()))) == len(snapshot_of(app).regions) + 1
        await pilot.press("space", "space", "y")
        assert app.clipboard.splitlines() == [table(app).line_of(item) for item in snapshot_of(app).regions[:2]]
