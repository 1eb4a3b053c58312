"""Actions from key to plan to result: forms, confirmations, refusals, failures, read-only; nothing blocks."""

import threading

import msgspec
import pytest
from support.console import console, focused, plan_in, running, selected, shown, toasts, type_text, until
from support.synthetic import SyntheticSource
from support.waiting import LONG_S
from textual.pilot import Pilot
from textual.widgets import Button, Input, Select

from memconsole import actions
from memconsole.actions import Action, GuestPause, Map, Release, Reserve, Revoke
from memconsole.errors import KernelRefused
from memconsole.fields import TABLES
from memconsole.model import Danger, Outcome, Refusal, Rung, Snapshot
from memconsole.views.app import ConsoleApp
from memconsole.views.screens.acting import Confirmation, Form

VIEW_KEYS = {"regions": "2", "guests": "3", "grants": "4", "windows": "6"}


async def planned(pilot: Pilot[None], app: ConsoleApp) -> None:
    await until(pilot, lambda: plan_in(app) is not None)


def may_apply(app: ConsoleApp) -> bool:
    return not app.screen.query_one("#apply", Button).disabled


async def test_a_form_asks_for_what_is_missing_and_shows_the_command() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "n")
        await type_text(pilot, "web")
        await pilot.press("enter")
        assert focused(app).id == "arg-size"
        await type_text(pilot, "64M")
        assert "$ memconsole reserve web 64M" in shown(app)
        await pilot.press("enter")
        await planned(pilot, app)
        assert "1 prepare to reserve web" in shown(app)
        assert "undo: forget web" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "✔ Reserve region" in toasts(app))
    assert source.applied == [Reserve("web", 64 << 20)]


async def test_a_wrong_value_is_named_in_its_row_and_goes_nowhere() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "n")
        await type_text(pilot, "web")
        app.screen.query_one("#arg-size", Input).value = "64Q"
        app.screen.query_one("#arg-node", Input).value = "one"
        await pilot.pause()
        assert "✖ write 64M or 2G" in shown(app)
        assert "✖ write digits" in shown(app)
        await pilot.press("ctrl+s")
        assert isinstance(app.screen, Form)
        assert focused(app).id in {"arg-size", "arg-node"}


async def test_choices_and_flags_are_chosen_from_what_there_is() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        app.begin("reserve", {"name": "web", "size": "2G"}, options=True)
        await until(pilot, lambda: isinstance(app.screen, Form))
        app.screen.query_one("#arg-page_size", Select).value = "2M"
        app.screen.query_one("#arg-prefault", Select).value = "yes"
        await pilot.press("ctrl+s")
        await planned(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: bool(source.applied))
    assert source.applied == [Reserve("web", 2 << 30, page_size=2 << 20, prefault=True)]


@pytest.mark.parametrize("size", [(60, 20), (200, 60)])
async def test_the_help_of_a_form_is_whole_at_every_size(size: tuple[int, int]) -> None:
    def length(cls: type[Action]) -> int:
        return max((len(field.arg.help) for field in actions.fields(cls)), default=0)

    app = console()
    async with running(app, size) as pilot:
        for cls in sorted(actions.REGISTRY.values(), key=length)[-3:]:
            form = Form(cls, {})
            app.push_screen(form)
            await until(pilot, lambda form=form: any(each.size.width for each in form.query(".-help")))  # type: ignore[misc]
            for help, field in zip(form.query(".-help"), actions.fields(cls), strict=True):
                seen = " ".join(help.render_line(y).text.strip() for y in range(help.size.height))
                assert seen.strip() == field.arg.help
            app.pop_screen()
            await pilot.pause()


async def test_the_chosen_row_fills_the_form_and_names_are_completed() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "down", "m")
        assert app.screen.query_one("#arg-region", Input).value == "db1-ram0"
        assert focused(app).id == "arg-guest"
        await type_text(pilot, "ca")
        await until(pilot, lambda: app.screen.query_one("#arg-guest", Input)._suggestion == "cache2")
        await pilot.press("right", "enter")
        await planned(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: bool(source.applied))
    assert source.applied == [Map("db1-ram0", "cache2")]


async def test_what_destroys_wants_the_name_typed_exactly() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "X")
        await planned(pilot, app)
        assert not may_apply(app)
        await type_text(pilot, "web0-ram")
        await pilot.press("enter")
        assert not may_apply(app)
        assert source.applied == []
        await type_text(pilot, "0")
        assert may_apply(app)
        await pilot.press("enter")
        await until(pilot, lambda: bool(source.applied))
    assert source.applied == [Release("web0-ram0")]


async def test_escape_leaves_everything_as_it_was() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "X")
        await planned(pilot, app)
        await pilot.press("escape", "n", "escape")
        assert app.screen is app.screen_stack[0]
    assert source.applied == []


async def test_a_refusal_stands_by_name_with_its_remedy_and_cannot_be_applied() -> None:
    source = SyntheticSource()
    source.refuse = (Refusal("Granted", "web0-ram0 is granted", "g1 maps it", "revoke g1 first"),)
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("2", "X")
        await planned(pilot, app)
        text = shown(app)
        assert "✖ Granted: web0-ram0 is granted" in text
        assert "▸ revoke g1 first" in text
        assert "✖ refused: Granted" in text
        assert not may_apply(app)
        assert not app.screen.query_one("#typed", Input).display
    assert source.applied == []


async def test_a_plan_that_cannot_be_made_is_a_refusal() -> None:
    source = SyntheticSource()
    source.fail["plan"] = KernelRefused("/proc/1/maps", 13)
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("3", "p")
        await planned(pilot, app)
        assert "✖ refused: Kernel" in shown(app)


async def test_options_lead_back_to_the_form_with_what_was_given() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("4", "R")
        await planned(pilot, app)
        app.screen.query_one("#options", Button).press()
        await until(pilot, lambda: isinstance(app.screen, Form))
        app.screen.query_one("#arg-at_most", Select).value = "ask"
        await pilot.press("ctrl+s")
        await planned(pilot, app)
        assert "memconsole revoke g1 --at-most ask" in shown(app)
        await type_text(pilot, "g1")
        await pilot.press("enter")
        await until(pilot, lambda: "✔ Revoke grant in 1.0ms: revoke g1" in toasts(app))
    assert source.applied == [Revoke("g1", at_most=Rung.ASK)]


async def test_a_failure_says_what_why_and_what_to_do() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("3", "p")
        await planned(pilot, app)
        source.fail["apply"] = KernelRefused("/dev/kvm", 16, what="cannot pause web0", remedy="try again")
        await pilot.press("enter")
        await until(pilot, lambda: "✖ Pause guest: Kernel" in toasts(app))
        assert "cannot pause web0" in toasts(app)
        assert "▸ try again" in toasts(app)
        assert app.busy == []


async def test_the_console_goes_on_while_an_action_takes_its_time() -> None:
    gate = threading.Event()

    class Slow(SyntheticSource):
        def apply(self, action: Action) -> Outcome:
            gate.wait(LONG_S)
            return super().apply(action)

    source = Slow()
    app = console(source)
    async with running(app) as pilot:
        try:
            await pilot.press("3", "p")
            await planned(pilot, app)
            await pilot.press("enter", "2", "down")
            assert "◌ Pause guest…" in shown(app)
            assert selected(app).name == "db1-ram0"
        finally:
            gate.set()
        await until(pilot, lambda: "✔ Pause guest" in toasts(app))
        assert app.journal == [("guests", ""), ("regions", ""), GuestPause("web0")]


async def test_what_was_done_is_on_the_screen_at_once() -> None:
    def reserve(action: Action, snapshot: Snapshot) -> Snapshot:
        assert isinstance(action, Reserve)
        made = msgspec.structs.replace(snapshot.regions[0], name=action.name, size=action.size, grants=())
        return msgspec.structs.replace(snapshot, regions=(*snapshot.regions, made))

    app = console(SyntheticSource(on_apply=reserve))
    async with running(app) as pilot:
        await pilot.press("2")
        app.perform(Reserve("fresh", 1 << 20))
        await until(pilot, lambda: "+fresh" in shown(app))


@pytest.mark.parametrize("id", sorted(id for id, cls in actions.REGISTRY.items() if cls.spec.on in TABLES))
async def test_every_action_is_reached_by_its_key_and_says_why_it_cannot_when_read_only(id: str) -> None:
    spec = actions.REGISTRY[id].spec
    assert spec.on in VIEW_KEYS
    assert spec.key
    app = console()
    async with running(app) as pilot:
        await pilot.press(VIEW_KEYS[spec.on], spec.key)
        await until(pilot, lambda: isinstance(app.screen, Form | Confirmation))
        assert spec.title in shown(app)
    source = SyntheticSource(read_only="a recorded snapshot")
    app = console(source)
    async with running(app) as pilot:
        await pilot.press(VIEW_KEYS[spec.on], spec.key)
        await until(pilot, lambda: "read-only: a recorded snapshot" in toasts(app))
        assert app.screen is app.screen_stack[0]
        assert " READ-ONLY " in shown(app)
        assert app.screen.active_bindings[spec.key].enabled is False
    assert source.applied == []


async def test_an_action_on_a_row_is_grey_where_there_is_no_row() -> None:
    app = console(SyntheticSource(msgspec.structs.replace(SyntheticSource().snapshot(), regions=())))
    async with running(app) as pilot:
        await pilot.press("2")
        assert "no regions yet; n reserves one" in shown(app)
        active = app.screen.active_bindings
        assert active["n"].enabled
        assert not active["X"].enabled
        await pilot.press("X")
        await until(pilot, lambda: "no row is chosen" in toasts(app))


def test_nothing_that_destroys_hangs_on_a_key_without_a_typed_name_and_keys_suit_a_terminal() -> None:
    from memconsole.views.screens.listing import CLASSES

    for id, cls in actions.REGISTRY.items():
        spec = cls.spec
        if spec.danger is Danger.DESTROYS and spec.key:  # what has none is typed on the line
            assert spec.key.isupper(), f"{id} destroys and hangs on a plain key"
    classes: tuple[type, ...] = (ConsoleApp, *CLASSES.values())
    for shown_class in classes:
        for base in shown_class.__mro__:
            if base.__module__.startswith("memconsole"):
                for binding in base.__dict__.get("BINDINGS", ()):
                    assert binding.id, f"{shown_class.__name__} {binding.key} has no id"
                    keys = set(binding.key.split(","))
                    assert not keys & {"ctrl+a", "ctrl+b"}
                    assert not any(key.startswith("alt+") for key in keys)
                    assert not all(key.startswith("f") and key[1:].isdigit() for key in keys)
