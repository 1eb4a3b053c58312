"""The console goes on whatever fails in it: the operator is told, and the guests embedded in it live."""

from collections.abc import Callable
from typing import Never

import pytest
from support.console import console, plan_in, running, toasts, until
from support.synthetic import SyntheticSource
from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import Input

from memconsole import unforeseen
from memconsole.actions import Reserve
from memconsole.macros import Macro, MacroStep
from memconsole.views.app import ConsoleApp
from memconsole.views.screens.acting import Form
from memconsole.views.screens.handoff import Handoff
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.screens.running import MacroPlan
from memconsole.views.widgets.table import VirtualTable


class Unforeseen(ZeroDivisionError):
    """What no code expects."""


def fail(*_: object, **__: object) -> Never:
    raise Unforeseen("in the test")


async def goes_on(pilot: Pilot[None], app: ConsoleApp) -> None:
    """It takes keys and shows what they ask for."""
    assert app.is_running
    app._notifications.clear()
    while len(app.screen_stack) > 1:
        await pilot.press("escape")
        await pilot.pause()
    await pilot.press("3")
    await until(pilot, lambda: app.trail[-1].view == "guests")
    await pilot.press("2")
    await until(pilot, lambda: app.trail[-1].view == "regions")
    assert app.return_code is None


async def told(pilot: Pilot[None], app: ConsoleApp) -> None:
    await until(pilot, lambda: "Unforeseen: in the test" in toasts(app))
    assert "Internal" in toasts(app)


async def test_a_plan_that_fails_is_refused_in_its_dialog() -> None:
    source = SyntheticSource()
    source.fail["plan"] = Unforeseen("in the test")
    app = console(source)
    async with running(app, faults=True) as pilot:
        app.propose(Reserve("x", 4096))
        await until(pilot, lambda: plan_in(app) is not None)
        plan = plan_in(app)
        assert plan is not None
        (refusal,) = plan.refusals
        assert refusal.code == "Internal"
        await goes_on(pilot, app)


async def test_an_action_that_fails_is_told_and_over() -> None:
    source = SyntheticSource()
    source.fail["apply"] = Unforeseen("in the test")
    app = console(source)
    async with running(app, faults=True) as pilot:
        app.perform(Reserve("x", 4096))
        await told(pilot, app)
        assert app.busy == []
        await goes_on(pilot, app)


async def test_macros_that_fail_are_told_step_by_step() -> None:
    source = SyntheticSource()
    source.fail["apply"] = Unforeseen("in the test")
    macro = Macro("m", steps=(MacroStep(do="reserve", arguments={"name": "a", "size": "4K"}),))
    app = console(source, known_macros=(macro,))
    async with running(app, faults=True) as pilot:
        app.action_macro("m")
        await until(pilot, lambda: isinstance(app.screen, MacroPlan))
        await until(pilot, lambda: not app.screen.query_one("#run").disabled)
        await pilot.press("enter")
        await until(pilot, lambda: "step 1 failed" in toasts(app))
        assert app.busy == []
        source.fail["plan"] = Unforeseen("in the test")
        app.action_macro("m")
        await until(pilot, lambda: isinstance(app.screen, MacroPlan))
        await until(pilot, lambda: not app.screen.query_one("#run").disabled)
        await goes_on(pilot, app)


@pytest.mark.parametrize("what", ["snapshot", "history", "extents", "plan"])
async def test_a_source_that_fails_is_told_and_asked_again(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    source = SyntheticSource()
    app = console(source)
    before = sum(unforeseen.counts().values())
    async with running(app, faults=True) as pilot:
        with monkeypatch.context() as patch:
            patch.setattr(source, what, fail)
            match what:
                case "snapshot":
                    app.action_refresh()
                    await until(pilot, lambda: "Unforeseen" in app.trouble)
                case "history":
                    app.action_travel(-1)
                    await until(pilot, lambda: "Unforeseen" in toasts(app))
                case "extents":
                    app.open_view("pfn", "guest:db1")
                    await until(pilot, lambda: isinstance(app.view, PfnMap) and app.view.error is not None)
                case "plan":
                    app.action_go(10)
                    assert isinstance(app.view, Handoff)
                    app.view.action_check()
            await until(pilot, lambda: sum(unforeseen.counts().values()) > before)
        app.action_refresh()
        await until(pilot, lambda: not app.trouble)
        await goes_on(pilot, app)


@pytest.mark.parametrize(
    ("cls", "method"),
    [(VirtualTable, "on_key"), (Input, "_on_key"), (Form, "on_mount"), (Form, "on_input_changed"), (Form, "compose")],
)
async def test_a_handler_that_fails_costs_its_message(
    monkeypatch: pytest.MonkeyPatch, cls: type[Widget], method: str
) -> None:
    app = console()
    async with running(app, faults=True) as pilot:
        await pilot.press("2")
        with monkeypatch.context() as patch:
            patch.setattr(cls, method, fail, raising=False)
            await pilot.press("x" if cls is VirtualTable else "n")
            await pilot.press("w")
            await told(pilot, app)
        await goes_on(pilot, app)
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, Form))
        await pilot.press("w", "e", "b")
        await until(pilot, lambda: app.screen.query_one("#arg-name", Input).value == "web")


async def test_timers_callbacks_and_views_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console()
    async with running(app, faults=True) as pilot:
        ways: tuple[Callable[[], object], ...] = (
            lambda: app.set_timer(0.001, fail),
            lambda: app.call_later(fail),
            lambda: app.call_after_refresh(fail),
            lambda: app.view.call_later(fail),
            lambda: app.run_worker(fail, thread=True),
        )
        for begin in ways:
            app._notifications.clear()
            app.__dict__.pop("_told", None)
            begin()
            await told(pilot, app)
            await goes_on(pilot, app)
        with monkeypatch.context() as patch:
            app.__dict__.pop("_told", None)
            patch.setattr(type(app.view), "show", fail)
            app.action_refresh()
            await told(pilot, app)
        await goes_on(pilot, app)
