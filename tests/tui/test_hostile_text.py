"""Text of others in the console: shown as text, never taken for markup, and nothing in it acts."""

import re

import pytest
from support.console import console, running, shown, toasts, until
from support.spoiling import spoiled
from support.synthetic import SyntheticSource

from memconsole.errors import Refused
from memconsole.macros import Macro, MacroStep, Param
from memconsole.model import Danger, Effect, Plan, Refusal

BRACKETS = "awk -F[/] [bold]x[/bold] [link=\x1b] [@click=app.quit]y[/] [ \\[ a\x1b]0;pwn\x07\x9b2J\u202e"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def source() -> SyntheticSource:
    found = SyntheticSource()
    found.show(spoiled(found.snapshot(), lambda text: BRACKETS + text, {"shmem_thp"}))
    return found


async def test_every_view_shows_it_as_text(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        for key in "1234567890":
            await pilot.press(key)
            await pilot.pause()
            assert not ACTS.search(shown(app).replace("\n", "")), f"view {key}"
            await pilot.press("enter")
            await pilot.pause()
            assert not ACTS.search(shown(app).replace("\n", "")), f"detail of view {key}"
            await pilot.press("escape")


async def test_what_is_typed_copied_and_notified_is_no_markup(source: SyntheticSource) -> None:
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("9", "y")
        await until(pilot, lambda: "Copied" in toasts(app))
        await pilot.press("Y")
        await pilot.press("5", "enter", "at", "left_square_bracket", "slash", "right_square_bracket", "enter")
        app.notify(BRACKETS, title=BRACKETS)
        app.notify(BRACKETS, title=BRACKETS, markup=True)
        await pilot.pause()
        assert not ACTS.search(toasts(app).replace("\n", ""))
        await until(pilot, lambda: "awk -F[/]" in shown(app))
        assert app.is_running


async def test_dialogs_and_the_palette_show_it_as_text(
    source: SyntheticSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Refusal("Taken", BRACKETS, BRACKETS, BRACKETS)
    plan = Plan("reserve", BRACKETS, Danger.CHANGES, (Effect(BRACKETS, BRACKETS),), (refusal,))
    monkeypatch.setattr(source, "plan", lambda *_, **__: plan)
    source.fail["apply"] = Refused(BRACKETS, BRACKETS, BRACKETS)
    step = MacroStep(do="reserve", arguments={"name": "a", "size": "4K"})
    macro = Macro("m[/]", title=BRACKETS, params={"p[/]": Param(BRACKETS, BRACKETS)}, steps=(step,), path=BRACKETS)
    app = console(source, known_macros=(macro,))
    async with running(app) as pilot:
        app.action_macro("m[/]")
        await pilot.pause()
        assert not ACTS.search(shown(app).replace("\n", ""))
        await pilot.press("ctrl+s", "enter")
        await pilot.pause()
        app.action_macro("m[/]", {"p[/]": "x"})
        await until(pilot, lambda: "awk -F[/]" in shown(app))
        assert not ACTS.search(shown(app).replace("\n", ""))
        while len(app.screen_stack) > 1:
            await pilot.press("escape")
        await pilot.press("ctrl+p")
        await pilot.press("m")
        await until(pilot, lambda: "Run macro m[/]" in shown(app))
        await pilot.press("escape")
        assert app.is_running
