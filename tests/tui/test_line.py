"""The ``:`` line: what it offers, what it plans while one types, what it reaches, what it remembers; and undo."""

from pathlib import Path
from typing import Any

from support import synthetic
from support.console import SMALL, console, focused, running, shown, snapshot_of, toasts, type_text, until
from support.synthetic import SyntheticSource
from textual.pilot import Pilot

from memconsole import macros
from memconsole.actions import GuestPause, GuestResume, Release, Reserve
from memconsole.cli.inside import Inside
from memconsole.commandlog import CommandLog
from memconsole.model import Refusal
from memconsole.views.app import ConsoleApp
from memconsole.views.remembering import Memory
from memconsole.views.screens.acting import Confirmation
from memconsole.views.screens.many import ManyPlan
from memconsole.views.screens.output import Output, Said
from memconsole.views.widgets.prompt import Prompt


def whole(source: SyntheticSource | None = None, **options: Any) -> ConsoleApp:
    """A console with the whole command line behind its own."""
    return console(source, command_line=Inside(), **options)


async def line(pilot: Pilot[None], text: str) -> None:
    await pilot.press("colon")
    await type_text(pilot, text)


async def test_the_words_that_may_stand_there_are_listed_with_their_help() -> None:
    app = whole()
    async with running(app, SMALL) as pilot:
        await line(pilot, "guest ")
        await until(pilot, lambda: "attach" in shown(app))
        assert "Take a running process as a guest" in shown(app)
        await type_text(pilot, "pause ")
        await until(pilot, lambda: "web0" in shown(app))
        assert "guest to pause" in shown(app)
        await pilot.press("escape")
        assert "guest to pause" not in shown(app)


async def test_tab_goes_through_the_words_and_back() -> None:
    app = whole()
    async with running(app) as pilot:
        await line(pilot, "guest p")
        await pilot.press("tab")
        assert focused(app, Prompt).value == "guest pause"
        await pilot.press("space", "tab", "tab")
        assert focused(app, Prompt).value == "guest pause db1"
        await pilot.press("shift+tab")
        assert focused(app, Prompt).value == "guest pause web0"


async def test_arguments_say_what_they_are_where_the_cursor_is() -> None:
    app = whole()
    async with running(app) as pilot:
        await line(pilot, "reserve ")
        await until(pilot, lambda: "name of the new region" in shown(app))
        await type_text(pilot, "web ")
        await until(pilot, lambda: "its size, for example 64M or 2G" in shown(app))
        await type_text(pilot, "64M --page-size ")
        await until(pilot, lambda: "page size: 4K, 2M or 1G" in shown(app))
        await pilot.press("tab")
        assert focused(app, Prompt).value == "reserve web 64M --page-size 4K"


async def test_a_list_of_columns_is_completed_word_by_word() -> None:
    app = whole()
    async with running(app) as pilot:
        await line(pilot, "regions --columns size,na")
        await pilot.press("tab")
        assert focused(app, Prompt).value == "regions --columns size,name"
        await type_text(pilot, ",si")
        await pilot.press("tab")
        assert focused(app, Prompt).value == "regions --columns size,name,si", "size stands there already"


async def test_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "host.snap").write_text("")
    app = whole()
    async with running(app) as pilot:
        await line(pilot, f"inspect {tmp_path}/ho")
        await pilot.press("tab")
        assert focused(app, Prompt).value == f"inspect {tmp_path}/host.snap"


async def test_the_plan_stands_there_while_an_action_is_typed_and_nothing_is_done() -> None:
    source = SyntheticSource()
    app = whole(source)
    async with running(app) as pilot:
        await line(pilot, "guest pause web0")
        await until(pilot, lambda: "prepare to guest-pause web0" in shown(app))
        source.refuse = (Refusal("Paused", "db1 is paused", "", "resume it"),)
        await pilot.press(*["backspace"] * 4)
        await until(pilot, lambda: "prepare to" not in shown(app))
        await type_text(pilot, "db1")
        await until(pilot, lambda: "✖ Paused: db1 is paused" in shown(app))
        assert "▸ resume it" in shown(app)
        await pilot.press("escape")
        assert "Paused" not in shown(app)
    assert source.applied == []


async def test_every_command_of_the_command_line_is_reached_and_what_it_says_is_shown() -> None:
    app = whole()
    async with running(app) as pilot:
        for text, told in (
            ("handoff check", "a handoff"),
            ("diff live live", "it said nothing"),
            ("regions --sort size --columns name,size --csv", "name,size"),
            ("status", "not"),
            ("history list", "Taken"),
            ("memconsole macro list", "exit code 0"),
        ):
            await line(pilot, text)
            await pilot.press("enter")
            await until(pilot, lambda told=told: isinstance(app.screen, Output) and told in shown(app))  # type: ignore[misc]
            await pilot.press("c", "escape")
            assert app.screen is app.screen_stack[0]


async def test_a_view_is_opened_by_its_name_and_with_a_filter_and_a_command_by_its_options() -> None:
    app = whole()
    async with running(app) as pilot:
        await line(pilot, "regions web")
        await pilot.press("enter")
        assert app.trail[-1].view == "regions"
        assert "/web" in shown(app)
        await line(pilot, "pfn web0")
        await pilot.press("enter")
        assert app.trail[-1].view == "pfn"
        assert "web0" in shown(app)
        assert "✖" not in toasts(app)


async def test_what_cannot_be_done_here_says_why_and_stays_to_be_corrected() -> None:
    app = whole()
    async with running(app) as pilot:
        for text, why in (
            ("demo", "there is no command 'demo'"),
            ("guest", "guest takes one of: start, attach"),
            ("frobnicate", "one of: overview"),
        ):
            await line(pilot, text)
            await pilot.press("enter")
            assert why in toasts(app), text
            assert focused(app, Prompt).value == text
            await pilot.press("escape")


async def test_lines_are_remembered_and_found_by_what_is_in_them(tmp_path: Path) -> None:
    app = whole(memory=Memory(tmp_path))
    async with running(app) as pilot:
        for text in ("regions web", "guests db", "theme textual-dark"):
            await line(pilot, text)
            await pilot.press("enter")
    again = whole(memory=Memory(tmp_path))
    async with running(again) as pilot:
        await pilot.press("colon", "up")
        assert focused(again, Prompt).value == "theme textual-dark"
        await pilot.press("up", "up", "down")
        assert focused(again, Prompt).value == "guests db"
        await pilot.press("escape")
        await line(pilot, "web")
        await pilot.press("ctrl+r")
        assert focused(again, Prompt).value == "regions web"


async def test_what_was_done_is_undone_with_its_plan_shown() -> None:
    source = SyntheticSource()
    app = whole(source)
    async with running(app) as pilot:
        await pilot.press("U")
        assert "nothing was done here yet" in toasts(app)
        app.perform(GuestPause("web0"))
        await until(pilot, lambda: source.applied == [GuestPause("web0")])
        await until(pilot, lambda: not app.busy)
        await pilot.press("U")
        await until(
            pilot, lambda: isinstance(app.screen, Confirmation) and "memconsole guest resume web0" in shown(app)
        )
        await until(pilot, lambda: "prepare to guest-resume web0" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: source.applied[-1] == GuestResume("web0"))
        await until(pilot, lambda: not app.busy)
        app.perform(Release("web0-ram0"))
        await until(pilot, lambda: source.applied[-1] == Release("web0-ram0"))
        await until(pilot, lambda: not app.busy)
        await pilot.press("U")
        assert "its contents are gone" in toasts(app)


async def test_an_action_on_many_rows_is_undone_on_all_of_them() -> None:
    source = SyntheticSource()
    app = whole(source)
    async with running(app) as pilot:
        await pilot.press("3", "A", "p")
        await until(pilot, lambda: "3 can be done" in shown(app))
        await pilot.press("3", "enter")
        await until(pilot, lambda: "all 3 done" in toasts(app))
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, ManyPlan) and "3 can be done" in shown(app))
        await pilot.press("3", "enter")
        guests = [guest.name for guest in synthetic.snapshot().guests]
        await until(pilot, lambda: source.applied[3:] == [GuestResume(name) for name in reversed(guests)])


async def test_command_lines_are_listed_taken_up_again_and_made_a_macro(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(macros, "macro_paths", lambda: (tmp_path,))
    app = whole(SyntheticSource(), said=CommandLog(tmp_path, "s"))
    async with running(app) as pilot:
        app.perform(Reserve("fresh", 4096))
        await until(pilot, lambda: "✔ Reserve region" in toasts(app))
        app.perform(GuestPause("web0"))
        await until(pilot, lambda: "✔ Pause guest" in toasts(app))
        await line(pilot, "history commands")
        await pilot.press("enter")
        assert isinstance(app.screen, Said)
        assert "memconsole reserve fresh 4K" in shown(app)
        await pilot.press("enter")
        assert focused(app, Prompt).value == "guest pause web0"
        await pilot.press("escape")
        await line(pilot, "history commands")
        await pilot.press("enter", "down", "space", "m")
        await type_text(pilot, "again")
        await pilot.press("enter")
        await until(pilot, (tmp_path / "again.toml").exists)
        assert [step.do for step in app.macros[-1].steps] == ["reserve"]
    assert [each.line for each in CommandLog(tmp_path).lines] == [
        "memconsole reserve fresh 4K",
        "memconsole guest pause web0",
    ]
    assert snapshot_of(app)
