"""Macros in the console: from a key, the palette or a command; planned first, run in a thread, recorded to a file."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.console import console, focused, running, shown, toasts, type_text, until
from support.synthetic import SyntheticSource
from textual.pilot import Pilot
from textual.widgets import Input

from memconsole import macros
from memconsole.actions import GuestPause, Release, Reserve
from memconsole.cli.inside import Inside
from memconsole.errors import Refused
from memconsole.macro_run import Ran
from memconsole.views.app import ConsoleApp
from memconsole.views.screens.dialogs import AskName
from memconsole.views.screens.running import MacroEnd, MacroForm, MacroPlan, MacroStepAsked
from memconsole.views.widgets.prompt import Prompt

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
GIVE = macros.loads(
    """
[params.region]
[params.guest]
default = "web0"
[params.size]
default = "4M"

[[step]]
do = "map"
region = "${region}"
guest = "${guest}"
length = "${size}"
""",
    "give",
)
TWICE = macros.loads(
    """
[[step]]
do = "reserve"
name = "a"
size = "4M"

[[step]]
do = "release"
region = "spare6"

[[step]]
do = "reserve"
name = "b"
size = "4M"
""",
    "twice",
)
LOOK = macros.loads("[[step]]\nrun = \"audit --where 'severity=error'\"\n", "look")
CLEAR = macros.loads('[[step]]\ndo = "release"\nregion = "spare6"\n', "clear")


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


async def planned(pilot: Pilot[None], app: ConsoleApp) -> None:
    await until(pilot, lambda: isinstance(app.screen, MacroPlan) and "planning" not in shown(app))


async def test_a_macro_asks_for_its_parameters_shows_its_plan_and_runs() -> None:
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


async def test_the_line_offers_macros_and_their_parameters_and_asks_for_values_that_it_was_not_given() -> None:
    app = console(SyntheticSource(), known_macros=(WEB, CLEAR), command_line=Inside())
    async with running(app) as pilot:
        await pilot.press("colon")
        await type_text(pilot, "macro ")
        await until(pilot, lambda: "Web tier" in shown(app))
        assert "list the macros that are installed" in shown(app)
        await pilot.press("tab")
        assert focused(app, Prompt).value == "macro web"
        await type_text(pilot, " ")
        await until(pilot, lambda: "name=" in shown(app) and "size=" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, MacroForm))


async def test_a_macro_that_destroys_wants_its_name() -> None:
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


async def test_a_macro_that_fails_says_what_was_done_and_what_not() -> None:
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
        await until(pilot, lambda: isinstance(app.screen, MacroEnd))
        assert "✖ reserve name=tier size=64M" in shown(app)
        assert "not begun: view regions region:tier" in shown(app)
        assert "memconsole macro run web --steps 1,2 --set name=tier" in shown(app)
        del source.fail["apply"]
        await pilot.press("right", "tab", "enter")
        await planned(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: "✔ Macro web" in toasts(app))
    assert source.applied == [Reserve("tier", 64 << 20)]


async def test_the_form_of_a_macro_is_like_every_other_form() -> None:
    source = SyntheticSource()
    app = console(source, known_macros=(GIVE,))
    async with running(app) as pilot:
        app.action_macro("give")
        await until(pilot, lambda: isinstance(app.screen, MacroForm))
        region, size = (app.screen.query_one(f"#arg-{name}", Input) for name in ("region", "size"))
        await type_text(pilot, "spare")
        await until(pilot, lambda: region._suggestion.startswith("spare"))
        await pilot.press("right", "down", "down")
        assert app.focused is size
        size.value = "64Q"
        await until(pilot, lambda: "✖" in shown(app))
        await pilot.press("ctrl+s")
        assert isinstance(app.screen, MacroForm)
        size.value = "8M"
        await pilot.press("up", "up")
        assert app.focused is region
        assert "memconsole macro run give --set" in shown(app)
        await pilot.press("ctrl+s")
        await planned(pilot, app)


async def test_a_macro_is_stepped_through_with_the_plan_of_each_step() -> None:
    source = SyntheticSource()
    app = console(source, known_macros=(TWICE,))
    async with running(app) as pilot:
        app.action_macro("twice")
        await planned(pilot, app)
        await pilot.press("ctrl+t")
        await until(pilot, lambda: isinstance(app.screen, MacroStepAsked))
        assert "memconsole reserve a 4M" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "memconsole release spare6" in shown(app))
        assert app.screen.query_one("#do").disabled
        await type_text(pilot, "spare6")
        await pilot.press("enter")
        await until(pilot, lambda: "memconsole reserve b 4M" in shown(app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, MacroEnd))
        assert "not begun: reserve name=b size=4M" in shown(app)
    assert source.applied == [Reserve("a", 4 << 20), Release("spare6")]


async def test_what_a_command_of_a_macro_says_is_shown() -> None:
    asked: list[list[str]] = []

    def command(words: Sequence[str]) -> Ran:
        asked.append(list(words))
        return Ran(4, "error  frames-moved web: two pages\n")

    app = console(known_macros=(LOOK,), command=command)
    async with running(app) as pilot:
        app.action_macro("look")
        await planned(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, MacroEnd))
        assert "frames-moved web: two pages" in shown(app)
        assert "ended with 4" in shown(app)
    assert asked == [["audit", "--where", "severity=error"]]


async def test_files_of_macros_are_read_again_when_they_change(own_config: Path) -> None:
    directory = own_config / "memconsole" / "macros"
    directory.mkdir(parents=True)
    file = directory / "mine.toml"
    file.write_text('key = "ctrl+e"\n[[step]]\nview = "audit"\n')
    app = console(known_macros=None)
    async with running(app) as pilot:
        assert {"mine", "drain-guest"} <= {macro.name for macro in app.macros}
        file.write_text('key = "ctrl+y"\n[[step]]\nview = "guests"\n')
        app.reload_macros()
        await until(pilot, lambda: "Macros were read again" in toasts(app))
        assert "ctrl+e" not in app.active_bindings
        await pilot.press("ctrl+y")
        await planned(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: app.trail[-1].view == "guests")
        file.write_text("[[step")
        app.reload_macros()
        await until(pilot, lambda: "A macro cannot be used" in toasts(app))
        assert "mine" not in {macro.name for macro in app.macros}


async def test_what_is_done_and_opened_is_recorded_and_can_be_run_again(own_config: Path) -> None:
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
    assert [step.text({}) for step in written.steps] == ["view guests", "guest-pause name=web0"]


async def test_a_recording_for_a_file_is_written_on_leaving(tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    app = console(record_to=path)
    async with running(app) as pilot:
        await pilot.press("2", "q")
        await until(pilot, lambda: app._exit)
    assert [step.text({}) for step in macros.load(path).steps] == ["view regions"]


async def test_a_key_that_is_taken_stays_with_its_owner() -> None:
    taken = macros.loads('key = "q"\n[[step]]\nview = "audit"\n', "taken")
    app = console(known_macros=(taken,))
    async with running(app):
        assert "Macro taken has no key" in toasts(app)
        assert app.active_bindings["q"].binding.id == "quit"
