"""The bar of history: what is recorded, where events were, where one is; and the keys and clicks that go there."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from support.console import SMALL, WIDE, console, running, shown, toasts, until
from support.synthetic import NOW_NS, SyntheticSource, snapshot

from memconsole.model import Event, Snapshot
from memconsole.views.traveling import Wish
from memconsole.views.widgets.timebar import TimeBar, marks, moment_at

S = 10**9
BEFORE, BEHIND = "left_parenthesis", "right_parenthesis"


def event(seq: int, seconds: int, text: str = "reserved web") -> Event:
    return Event(seq, NOW_NS + seconds * S, "reserve", "web", text)


EVENTS = (event(1, -900), event(2, -210, "started db1"), event(3, -205), event(4, -50, "mapped web"))


def at(seconds: int) -> Snapshot:
    taken = NOW_NS + seconds * S
    return replace(snapshot(3, 2), taken_ns=taken, events=tuple(each for each in EVENTS if each.at_ns <= taken))


@pytest.fixture
def source() -> SyntheticSource:
    made = SyntheticSource(at(0))
    made.recorded = [at(-300), at(-200), at(-100), at(-40), at(-1)]
    return made


async def shows(pilot: Any, app: Any, seconds: int) -> None:
    await until(pilot, lambda: app.snapshot.taken_ns == NOW_NS + seconds * S)


def test_a_cell_is_a_part_of_the_time_from_the_first_snapshot_until_now() -> None:
    assert marks([0, 1, 2, 7], [5], 2, 9, 10) == "──┃  • ─  "
    assert marks([0], [0], 0, 0, 3) == "┃  ", "one moment"
    assert marks([100], [5, 200], 100, 150, 5) == "┃    ", "what was before, and what is to come, is left out"
    assert marks([], [], 0, 0, 4) == "    "
    assert marks([0, 9], [], 99, 9, 4) == "─  ┃", "a moment behind the last one is at the end"


@pytest.mark.parametrize("width", [1, 7, 120])
def test_a_cell_that_is_clicked_is_the_one_that_is_then_marked(width: int) -> None:
    times = [NOW_NS, NOW_NS + 1000 * S]
    now = times[-1] + 17 * S
    for cell in range(width):
        assert marks(times, [], moment_at(times, now, cell, width), now, width)[cell] == "┃"


def test_an_event_is_gone_to_by_the_first_snapshot_that_was_taken_with_it() -> None:
    times = [10, 20, 30, 40]
    happened = (5, 12, 13, 30, 45)

    def lead(seek: int, taken: int | None) -> int:
        return Wish(seek=seek).place(times, taken, happened)

    assert [times[lead(-1, taken)] for taken in (None, 40, 30)] == [30, 30, 20], "two events of one snapshot are one"
    assert times[lead(-2, None)] == times[lead(-9, None)] == 20
    assert times[lead(1, 20)] == 30
    assert lead(1, 30) == len(times), "behind the last one is the present"
    with pytest.raises(Exception, match="no event was recorded before"):
        lead(-1, 20)


async def test_the_bar_is_there_in_the_past_alone_and_says_where_one_is(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        assert not app.query_one(TimeBar).display
        await pilot.press("left_square_bracket", "left_square_bracket")
        await shows(pilot, app, -40)
        await until(pilot, lambda: "┃ shown" in shown(app))
        bar, words = shown(app).splitlines()[3:5]
        assert bar.startswith(" 14:08:20 ")
        assert bar.endswith(" now")
        assert bar.count("┃") == 1
        assert bar.count("•") == 3, "what was before the first snapshot is left out"
        assert "last: mapped web" in words
        await pilot.press("right_curly_bracket")
        await until(pilot, lambda: not app.away)
        assert "┃ shown" not in shown(app)


@pytest.mark.parametrize("size", [SMALL, WIDE])
async def test_keys_go_from_event_to_event_and_on_to_the_present(
    source: SyntheticSource, size: tuple[int, int]
) -> None:
    app = console(source)
    async with running(app, size) as pilot:
        await pilot.press(BEHIND)
        assert not app.away, "there is nothing behind the present"
        await pilot.press(BEFORE)
        await shows(pilot, app, -40)
        await pilot.press(BEFORE)
        await shows(pilot, app, -200)
        await pilot.press(BEFORE)
        await until(pilot, lambda: "no event was recorded before" in toasts(app))
        assert app.snapshot is not None
        assert app.snapshot.taken_ns == NOW_NS - 200 * S
        await pilot.press(BEHIND)
        await shows(pilot, app, -40)
        await pilot.press(BEHIND)
        await until(pilot, lambda: not app.away)


async def test_a_click_on_the_bar_goes_to_its_moment(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("left_square_bracket")
        await until(pilot, lambda: app.away and app.query_one(TimeBar).size.width > 0)
        await pilot.click(TimeBar, offset=(12, 0))
        await shows(pilot, app, -300)


async def test_a_time_may_be_written_as_diff_writes_it(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        app.travel_to("@-2m")
        await shows(pilot, app, -200)
