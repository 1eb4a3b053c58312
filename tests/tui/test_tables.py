"""Tables as an operator uses them: cursor, filter, sort, columns, copy, change marks."""

import msgspec
import pytest
from support import synthetic
from support.console import SMALL, console, refreshed, running, selected, shown, snapshot_of, type_text, until
from textual.strip import Strip

from memconsole.model import RegionState
from memconsole.views.app import ConsoleApp
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.prompt import Prompt
from memconsole.views.widgets.table import TableLine, VirtualTable


def table(app: ConsoleApp) -> VirtualTable:
    return app.view.query(VirtualTable).first()


def lines(widget: VirtualTable) -> list[str]:
    return [widget.render_line(y).text.rstrip() for y in range(widget.size.height)]


def row_line(widget: VirtualTable, key: str) -> str:
    return next((line for line in lines(widget) if line[2:].split(" ")[0] == key), "")


async def test_the_filter_works_as_it_is_typed_and_escape_clears_it() -> None:
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


async def test_a_filter_that_is_none_says_why_while_the_last_one_stays() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "web fo")
        assert len(table(app).rows) == 0
        await type_text(pilot, ":1")
        assert "✖ there is no field 'fo'" in shown(app)
        assert table(app).rows.filter_text == "web fo"
        await pilot.press("enter")
        assert app.query_one(Prompt).has_focus
        assert app.query_one(Prompt).value == "web fo:1"
        await pilot.press(*["backspace"] * 5)
        assert "3 of 10 · /web" in shown(app)
        await pilot.press("escape")
        assert table(app).rows.filter_text == ""
        assert "✖ there is no field" not in shown(app)


async def test_tab_completes_fields_and_values_of_a_filter() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "sta")
        await pilot.pause()
        await pilot.press("tab")
        assert app.query_one(Prompt).value == "state:"
        await type_text(pilot, "map")
        await pilot.pause()
        await pilot.press("tab", "enter")
        assert table(app).rows.filter_text == "state:mapped"
        assert {region.state for region in table(app).rows.items if region.name in lines(table(app))[1]} == {"mapped"}


async def test_a_view_opens_with_a_filter() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("colon")
        await type_text(pilot, "regions page:2M | size>1G")
        await pilot.press("enter")
        assert "/page:2M | size>1G" in shown(app)
        chosen = [table(app).rows[row] for row in range(len(table(app).rows))]
        assert chosen == [r for r in snapshot_of(app).regions if r.page_size == 2 << 20 or r.size > 1 << 30]


async def test_nothing_found_says_how_to_go_on() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "slash")
        await type_text(pilot, "zzz")
        assert "none of 10 rows matches 'zzz'; Escape clears the filter" in shown(app)


async def test_the_cursor_stays_on_its_entity_through_sort_filter_and_refresh() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "down", "down", "down")
        assert selected(app).name == "web0-ram1"
        await pilot.press("greater_than_sign", "i")
        assert selected(app).name == "web0-ram1"
        await pilot.press("slash")
        await type_text(pilot, "web")
        await pilot.press("enter")
        assert selected(app).name == "web0-ram1"
        grown = synthetic.snapshot(regions=14)
        await refreshed(pilot, app, grown)
        assert selected(app).name == "web0-ram1"
        await pilot.press("escape")
        assert selected(app).name == "web0-ram1"
        fewer = msgspec.structs.replace(grown, regions=grown.regions[:2])
        await refreshed(pilot, app, fewer)
        assert table(app).selected in fewer.regions


async def test_sort_by_a_picked_column_shows_the_order() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "s", "down", "down", "enter")
        sizes = [table(app).rows[row].size for row in range(10)]
        assert sizes == sorted(sizes, reverse=True)
        assert "Size ▼" in lines(table(app))[0]
        await pilot.press("i")
        assert table(app).rows[0].size == min(sizes)
        assert "Size ▲" in lines(table(app))[0]


async def test_columns_are_chosen_and_the_name_always_stays() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "c", "space", "enter")
        header = lines(table(app))[0]
        assert "State" not in header
        assert "Name" in header


async def test_columns_that_do_not_fit_scroll_and_the_first_one_stays() -> None:
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


async def test_changed_cells_are_marked_until_the_next_refresh() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        old = snapshot_of(app)
        first = old.regions[0]
        bigger = msgspec.structs.replace(first, size=first.size * 2, state=RegionState.RESTORED)
        fresh = msgspec.structs.replace(first, name="fresh", grants=())
        await refreshed(pilot, app, msgspec.structs.replace(old, regions=(bigger, *old.regions[1:], fresh)))
        changed = row_line(table(app), "web0-ram0")
        assert changed[1] == "•"
        assert "128M↑" in changed
        assert "◇ restored" in changed
        assert row_line(table(app), "fresh")[1] == "+"
        assert row_line(table(app), "db1-ram0")[1] == " "
        app.action_refresh()
        await until(pilot, lambda: row_line(table(app), "web0-ram0")[1] == " ")
        assert "↑" not in row_line(table(app), "web0-ram0")


async def test_only_the_lines_that_changed_are_painted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        widget = table(app)
        painted: list[int] = []
        build = widget.render_line

        def render_line(y: int) -> Strip:
            painted.append(y)
            return build(y)

        monkeypatch.setattr(widget, "render_line", render_line)
        await pilot.press("down")
        assert set(painted) == {1, 2}
        painted.clear()
        old = snapshot_of(app)
        third = msgspec.structs.replace(old.regions[2], size=1 << 20)
        await refreshed(pilot, app, msgspec.structs.replace(old, regions=(*old.regions[:2], third, *old.regions[3:])))
        assert set(painted) == {3}


async def test_only_rows_in_sight_are_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console(synthetic.SyntheticSource(synthetic.big_snapshot()))
    async with running(app) as pilot:
        seen: set[str] = set()
        await pilot.press("2")
        widget = table(app)
        build = widget._row

        def row(key: str, line: TableLine, width: int) -> Strip:
            seen.add(key)
            return build(key, line, width)

        monkeypatch.setattr(widget, "_row", row)
        await pilot.press("end")
        assert selected(app).name == snapshot_of(app).regions[-1].name
        assert 0 < len(seen) <= 2 * widget.size.height


async def test_a_view_that_comes_back_makes_only_the_lines_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = synthetic.snapshot(100, 3)
    first = msgspec.structs.replace(before.regions[1], state=RegionState.RESTORED)
    app = console(synthetic.SyntheticSource(before))
    made: list[str] = []
    row = VirtualTable._row

    def count(self: VirtualTable, key: str, line: TableLine, width: int) -> Strip:
        made.append(key)
        return row(self, key, line, width)

    monkeypatch.setattr(VirtualTable, "_row", count)
    async with running(app) as pilot:
        await pilot.press("2", "3")
        regions = (before.regions[0], first, *before.regions[2:])
        await refreshed(pilot, app, msgspec.structs.replace(before, regions=regions))
        made.clear()
        await pilot.press("2")
        assert made == [first.name]
        await pilot.press("3", "2")
        assert made == [first.name] * 2  # its mark fades
        await pilot.press("3", "2")
        assert made == [first.name] * 2


async def test_a_row_is_copied_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console()
    copied: list[str] = []
    monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
    async with running(app) as pilot:
        await pilot.press("2", "y", "Y")
        assert copied[0].split("\t")[:3] == ["web0-ram0", "mapped", "64M"]
        assert msgspec.json.decode(copied[1])["name"] == "web0-ram0"


async def test_what_a_process_calls_itself_cannot_steer_the_terminal() -> None:
    old = synthetic.snapshot()
    evil = msgspec.structs.replace(old.guests[0], name="a\x1b]0;owned\x07b")
    app = console(synthetic.SyntheticSource(msgspec.structs.replace(old, guests=(evil,))))
    async with running(app) as pilot:
        await pilot.press("3")
        assert "a\\x1b]0;" in shown(app)
        assert "\x1b" not in shown(app)


@pytest.mark.parametrize(
    ("text", "width", "right", "wanted"),
    [("abc", 5, False, "abc  "), ("abc", 5, True, "  abc"), ("abcdef", 4, False, "abc…"), ("日本語", 4, False, "日 …")],
)
def test_text_is_fitted_to_cells(text: str, width: int, right: bool, wanted: str) -> None:
    assert fit(text, width, right=right) == wanted


async def test_the_newest_event_stays_under_the_cursor_until_it_is_moved() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("8")
        assert selected(app).seq == 8
        await refreshed(pilot, app, synthetic.snapshot(events=9))
        assert selected(app).seq == 9
        await pilot.press("down")
        await refreshed(pilot, app, synthetic.snapshot(events=10))
        assert selected(app).seq == 8


async def test_an_equal_part_of_a_changed_entity_is_not_marked() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "enter")
        await refreshed(pilot, app, synthetic.snapshot(beats=2000))
        assert "•2,000" in shown(app)
        assert all(line[1] == " " for widget in app.view.query(VirtualTable) for line in lines(widget)[1:] if line)
