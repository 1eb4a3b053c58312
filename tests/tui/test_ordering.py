"""Keys that come in one burst go where those before them have led."""

from __future__ import annotations

from support import synthetic
from support.console import console, running, shown, synthetic_source, until
from support.synthetic import SyntheticSource
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input

from memconsole.views.app import ConsoleApp
from memconsole.views.widgets.prompt import Prompt
from memconsole.views.widgets.table import VirtualTable

ENDS = {"\n": "enter", "\t": "tab", "\x1b": "escape"}
NAMES = ENDS | {" ": "space", ":": "colon", "/": "slash", ">": "greater_than_sign"}


def burst(app: ConsoleApp, text: str) -> None:
    """All keys of a text at once, as a terminal sends what was typed ahead."""
    for char in text:
        app.post_message(events.Key(NAMES.get(char, char), None if char in ENDS else char))


async def settled(pilot: Pilot[None], app: ConsoleApp) -> None:
    await until(pilot, lambda: not app.typing)


def prompt(app: ConsoleApp) -> Prompt:
    return app.screen_stack[0].query_one(Prompt)


async def test_a_command_typed_ahead_is_done() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, ":regions web\n")
        await until(pilot, lambda: "/web" in shown(app))
        await settled(pilot, app)
        assert app.trail[0].view == "regions"
        assert not prompt(app).display


async def test_a_filter_typed_ahead_is_the_one_that_is_used() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, "2/size>64M\n3")
        await until(pilot, lambda: app.trail[0].view == "guests")
        await settled(pilot, app)
        assert app.screen.query_one("#regions").query(VirtualTable).first().rows.filter_text == "size>64M"


async def test_the_fields_of_a_form_get_what_is_typed_for_each() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, "2n" + "ab\t8M")
        await until(pilot, lambda: len(app.screen_stack) == 2 and not app.typing)
        values = [each.value for each in app.screen.query(Input)]
        assert values[:2] == ["ab", "8M"]
        assert synthetic_source(app).applied == []


async def test_what_is_typed_for_a_dialog_that_opens_reaches_the_dialog() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, "2c\x1b3")
        await until(pilot, lambda: app.trail[0].view == "guests")
        assert len(app.screen_stack) == 1


async def test_a_pasted_command_is_on_the_line_and_waits_for_enter() -> None:
    app = console()
    async with running(app) as pilot:
        app.post_message(events.Paste(":reserve foo 4M\nsecond line"))
        await until(pilot, lambda: prompt(app).display)
        assert prompt(app).value == "reserve foo 4M"
        assert synthetic_source(app).applied == []


async def test_a_pasted_filter_works_at_once() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, "2")
        app.post_message(events.Paste("/web"))
        await until(pilot, lambda: "3 of 10 · /web" in shown(app))


async def test_a_paste_that_nothing_takes_does_nothing_and_says_so() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, "2")
        app.post_message(events.Paste("Xqn web"))
        await until(pilot, lambda: "Nothing here takes what was pasted" in shown(app))
        assert len(app.screen_stack) == 1
        assert app.is_running


async def test_a_paste_goes_into_the_line_that_is_being_typed() -> None:
    app = console()
    async with running(app) as pilot:
        burst(app, ":")
        app.post_message(events.Paste("regions"))
        burst(app, " db1\n")
        await until(pilot, lambda: "/db1" in shown(app))


async def test_a_widget_that_goes_with_its_key_holds_no_key_up() -> None:
    source = SyntheticSource(synthetic.snapshot())
    app = console(source)
    async with running(app) as pilot:
        for _ in range(5):
            burst(app, "?\x1b")
        burst(app, "3")
        await until(pilot, lambda: app.trail[0].view == "guests" and not app.typing)
        assert len(app.screen_stack) == 1
