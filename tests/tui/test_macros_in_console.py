"""Macros in the console: from a key, the palette or a command; planned first, run in a thread, recorded to a file."""

from pathlib import Path

import pytest
from support.console import console, running, shown, toasts, type_text, until
from support.synthetic import SyntheticSource

from memconsole import macros
from memconsole.actions import GuestPause, Release, Reserve
from memconsole.errors import Refused
from memconsole.views.screens.dialogs import AskName
from memconsole.views.screens.running import MacroForm, MacroPlan

WEB = macros.loads(
    """
title = "Web tier"
key = "ctrl+w"

[params.name]
[params.size]
default = "64M"

[[step]]
do = "reserve"
name = "${name}"
size = "${size}"

[[step]]
view = "regions"
subject = "region:${name}"
""",
    "web",
)
CLEAR = macros.loads('[[step]]\ndo = "release"\nregion = "spare6"\n', "clear")


@pytest.fixture(autouse=True)
def own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


async def planned(pilot, app):
    await until(pilot, lambda: isinstance(app.screen, MacroPlan) and "planning" not in shown(app))


async def test_a_macro_asks_for_its_parameters_shows_its_plan_and_runs():
    source = SyntheticSource()
    app = console(source, known_macros=(WEB,))
    async with running(app) as pilot:
        await pilot.press("ctrl+w")
        assert isinstance(app.screen, MacroForm)
        await pilot.press("enter")
        assert isinstance(app.screen, MacroForm)
        await type_text(pilot, "tier")
        await pilot.press("enter")
        await planned(pilot, app)
        assert "memconsole reserve tier 64M" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "✔ Macro web" in toasts(app))
        assert app.trail[-1].subject == "region:tier"
        assert app.busy == []
    assert source.applied == [Reserve("tier", 64 << 20)]


async def test_a_macro_that_destroys_wants_its_name():
    source = SyntheticSource()
    app = console(source, known_macros=(CLEAR,))
    async with running(app) as pilot:
        await pilot.press("colon")
        await type_text(pilot, "macro clear")
        await pilot.press("enter")
        await planned(pilot, app)
        assert "type clear to run it" in shown(app)
        await pilot.press("enter")
        assert isinstance(app.screen, MacroPlan)
        await type_text(pilot, "clear")
        await pilot.press("enter")
        await until(pilot, lambda: source.applied == [Release("spare6")])


async def test_a_macro_that_fails_says_what_was_done_and_what_not():
    source = SyntheticSource()
    app = console(source, known_macros=(WEB,))
    async with running(app) as pilot:
        app.action_macro("web", {"name": "tier"})
        await planned(pilot, app)
        source.fail["apply"] = Refused("no room", code="NoRoom")
        await pilot.press("enter")
        await until(pilot, lambda: "✖ Macro web: MacroFailed" in toasts(app))
        assert "done: none; failed: 1; not begun: 2" in toasts(app)
        assert app.busy == []


async def test_what_is_done_and_opened_is_recorded_and_can_be_run_again(own_config):
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("Q", "3")
        assert "● REC 1" in shown(app)
        app.perform(GuestPause("web0"))
        await until(pilot, lambda: "✔ Pause guest" in toasts(app))
        await pilot.press("Q")
        assert isinstance(app.screen, AskName)
        await type_text(pilot, "quiet")
        await pilot.press("enter")
        await until(pilot, lambda: "2 steps saved" in toasts(app))
        assert "REC" not in shown(app)
        assert [macro.name for macro in app.macros] == ["quiet"]
    written = macros.load(own_config / "memconsole" / "macros" / "quiet.toml")
    assert [step.text for step in written.steps] == ["view guests", "guest-pause name=web0"]


async def test_a_recording_for_a_file_is_written_on_leaving(tmp_path):
    path: Path = tmp_path / "made.toml"
    app = console(record_to=path)
    async with running(app) as pilot:
        await pilot.press("2", "q")
        await until(pilot, lambda: app._exit)
    assert [step.text for step in macros.load(path).steps] == ["view regions"]


async def test_a_key_that_is_taken_stays_with_its_owner():
    taken = macros.loads('key = "q"\n[[step]]\nview = "audit"\n', "taken")
    app = console(known_macros=(taken,))
    async with running(app):
        assert "Macro taken has no key" in toasts(app)
        assert app.active_bindings["q"].binding.id == "quit"
