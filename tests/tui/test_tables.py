"""Tables as an operator uses them: cursor, filter, sort, columns, copy, change marks."""

import msgspec
import pytest
from support import synthetic
from support.console import SMALL, console, refreshed, running, shown, type_text, until

from memconsole.model import RegionState
from memconsole.views.widgets.table import VirtualTable, fit


def table(app):
    return app.view.query(VirtualTable).first()


def lines(widget):
    return [widget.render_line(y).text.rstrip() for y in range(widget.size.height)]


def row_line(widget, key):
    return next((line for line in lines(widget) if line[2:].split(" ")[0] == key), "")


async def test_the_filter_works_as_it_is_typed_and_escape_clears_it():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "web")
        assert [line[2:11] for line in lines(table(app))[1:4]] == ["web0-ram0", "web0-ram1", "web0-ram3"]
        await pilot.press("enter")
        assert "3 of 10 · /web" in shown(app)
        await pilot.press("escape")
        assert len(table(app).rows) == 10
        await pilot.press("slash", "x", "escape")
        assert table(app).rows.filter_text == ""


async def test_nothing_found_says_how_to_go_on():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "zzz")
        assert "none of 10 rows matches 'zzz'; Escape clears the filter" in shown(app)


async def test_the_cursor_stays_on_its_entity_through_sort_filter_and_refresh():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "down", "down", "down")
        assert table(app).selected.name == "web0-ram1"
        await pilot.press("greater_than_sign", "i")
        assert table(app).selected.name == "web0-ram1"
        await pilot.press("slash")
        await type_text(pilot, "web")
        await pilot.press("enter")
        assert table(app).selected.name == "web0-ram1"
        grown = synthetic.snapshot(regions=14)
        await refreshed(pilot, app, grown)
        assert table(app).selected.name == "web0-ram1"
        await pilot.press("escape")
        assert table(app).selected.name == "web0-ram1"
        fewer = msgspec.structs.replace(grown, regions=grown.regions[:2])
        await refreshed(pilot, app, fewer)
        assert table(app).selected in fewer.regions


async def test_sort_by_a_picked_column_shows_the_order():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "s", "down", "down", "enter")
        sizes = [table(app).rows[row].size for row in range(10)]
        assert sizes == sorted(sizes)
        assert "Size ▲" in lines(table(app))[0]
        await pilot.press("i")
        assert table(app).rows[0].size == max(sizes)
        assert "Size ▼" in lines(table(app))[0]


async def test_columns_are_chosen_and_the_name_always_stays():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "c", "space", "enter")
        header = lines(table(app))[0]
        assert "State" not in header
        assert "Name" in header


async def test_columns_that_do_not_fit_scroll_and_the_first_one_stays():
    app = console()
    async with running(app, SMALL) as pilot:
        await pilot.press("2")
        before = lines(table(app))[0]
        assert before.endswith("▸")
        assert "Mapped by" not in before
        await pilot.press(*["right"] * 12)
        after = lines(table(app))[0]
        assert "Name" in after
        assert "Mapped by" in after
        assert not after.endswith("▸")


async def test_changed_cells_are_marked_until_the_next_refresh():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        old = app.snapshot
        first = old.regions[0]
        bigger = msgspec.structs.replace(first, size=first.size * 2, state=RegionState.FROZEN)
        fresh = msgspec.structs.replace(first, name="fresh", grants=())
        await refreshed(pilot, app, msgspec.structs.replace(old, regions=(bigger, *old.regions[1:], fresh)))
        changed = row_line(table(app), "web0-ram0")
        assert changed[1] == "•"
        assert "128M↑" in changed
        assert "◈ frozen" in changed
        assert row_line(table(app), "fresh")[1] == "+"
        assert row_line(table(app), "db1-ram0")[1] == " "
        app.action_refresh()
        await until(pilot, lambda: row_line(table(app), "web0-ram0")[1] == " ")
        assert "↑" not in row_line(table(app), "web0-ram0")


async def test_only_the_lines_that_changed_are_painted_again():
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        widget = table(app)
        painted = []
        build = widget.render_line
        widget.render_line = lambda y: painted.append(y) or build(y)
        await pilot.press("down")
        assert set(painted) == {1, 2}
        painted.clear()
        old = app.snapshot
        third = msgspec.structs.replace(old.regions[2], size=1 << 20)
        await refreshed(pilot, app, msgspec.structs.replace(old, regions=(*old.regions[:2], third, *old.regions[3:])))
        assert set(painted) == {3}


async def test_only_rows_in_sight_are_formatted():
    app = console(synthetic.SyntheticSource(synthetic.big_snapshot()))
    async with running(app) as pilot:
        seen = set()
        await pilot.press("2")
        widget = table(app)
        build = widget._row
        widget._row = lambda key, line, width: seen.add(key) or build(key, line, width)
        await pilot.press("end")
        assert widget.selected.name == app.snapshot.regions[-1].name
        assert 0 < len(seen) <= 2 * widget.size.height


async def test_a_row_is_copied_as_text_and_as_json():
    app = console()
    copied = []
    app.copy_to_clipboard = copied.append
    async with running(app) as pilot:
        await pilot.press("2", "y", "Y")
        assert copied[0].split("\t")[:3] == ["web0-ram0", "mapped", "64M"]
        assert msgspec.json.decode(copied[1])["name"] == "web0-ram0"


async def test_what_a_process_calls_itself_cannot_steer_the_terminal():
    old = synthetic.snapshot()
    evil = msgspec.structs.replace(old.guests[0], name="a\x1b]0;owned\x07b")
    app = console(synthetic.SyntheticSource(msgspec.structs.replace(old, guests=(evil,))))
    async with running(app) as pilot:
        await pilot.press("3")
        assert "a·]0;owned·b" in shown(app)
        assert "\x1b" not in shown(app)


@pytest.mark.parametrize(
    ("text", "width", "right", "wanted"),
    [("abc", 5, False, "abc  "), ("abc", 5, True, "  abc"), ("abcdef", 4, False, "abc…"), ("日本語", 4, False, "日 …")],
)
def test_text_is_fitted_to_cells(text, width, right, wanted):
    assert fit(text, width, right=right) == wanted


async def test_the_newest_event_stays_under_the_cursor_until_it_is_moved():
    app = console()
    async with running(app) as pilot:
        await pilot.press("8")
        assert table(app).selected.seq == 8
        await refreshed(pilot, app, synthetic.snapshot(events=9))
        assert table(app).selected.seq == 9
        await pilot.press("down")
        await refreshed(pilot, app, synthetic.snapshot(events=10))
        assert table(app).selected.seq == 8


async def test_an_equal_part_of_a_changed_entity_is_not_marked():
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "enter")
        await refreshed(pilot, app, synthetic.snapshot(beats=2000))
        assert "•2,000" in shown(app)
        assert all(line[1] == " " for widget in app.view.query(VirtualTable) for line in lines(widget)[1:] if line)
