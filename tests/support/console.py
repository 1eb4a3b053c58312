"""A console over a synthetic Source, and what a person would see of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, overload

from textual.app import App
from textual.pilot import Pilot
from textual.widget import Widget

from memconsole import unforeseen
from memconsole.command import CommandLine
from memconsole.commandlog import CommandLog
from memconsole.macros import Macro
from memconsole.model import Plan, Snapshot
from memconsole.source import Source
from memconsole.views.app import ConsoleApp
from memconsole.views.remembering import Memory
from memconsole.views.screens.acting import Confirmation
from memconsole.views.scripting import Command
from memconsole.views.settings import ConsoleSettings
from memconsole.views.widgets.table import VirtualTable
from support.synthetic import NOW_NS, SyntheticSource
from support.waiting import LONG_S

W = TypeVar("W", bound=Widget)

WIDE = (132, 50)
SMALL = (80, 24)


class Options(TypedDict, total=False):
    """What a console can be given besides its Source."""

    interval: float
    clock: Callable[[], int]
    known_macros: Sequence[Macro] | None
    record_to: Path | None
    command: Command | None
    settings: ConsoleSettings | None
    on_quit_warning: Callable[[], str] | None
    memory: Memory
    command_line: CommandLine
    said: CommandLog


def console(source: Source | None = None, **options: Unpack[Options]) -> ConsoleApp:
    """A console whose clock stands still and which refreshes only when it is asked to."""
    still: Options = {"interval": 3600, "clock": lambda: NOW_NS + 5_000_000_000}
    return ConsoleApp(SyntheticSource() if source is None else source, **(still | options))


class Typist(Pilot[None]):
    """A person who waits until what was typed has been done."""

    async def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        await super().press(*keys)
        app = self.app
        assert isinstance(app, ConsoleApp)
        if app.typing:
            await until(self, lambda: not app.typing)


@asynccontextmanager
async def running(app: ConsoleApp, size: tuple[int, int] = WIDE, *, faults: bool = False) -> AsyncIterator[Pilot[None]]:
    """The console with its first Snapshot on the screen; without ``faults`` none may occur."""
    before = unforeseen.counts()["console"]
    async with app.run_test(size=size, notifications=True):
        pilot = Typist(app)
        await until(pilot, lambda: not app.opening and (app.snapshot is not None or bool(app.trouble)))
        await pilot.pause()
        yield pilot
        await pilot.pause()
    assert faults or unforeseen.counts()["console"] == before, "something failed that was not foreseen: see the log"


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Let the console work until something holds."""
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        if condition():
            await pilot.pause()
            return
        await pilot.pause(0.01)
    raise AssertionError("it never came to hold; the screen:\n" + shown(pilot.app))


async def refreshed(pilot: Pilot[None], app: ConsoleApp, snapshot: Snapshot) -> None:
    """Make this the Source's Snapshot and wait until it is on the screen."""
    synthetic_source(app).show(snapshot)
    app.action_refresh()
    await until(pilot, lambda: app.snapshot == snapshot)


async def type_text(pilot: Pilot[None], text: str) -> None:
    """Type, key by key."""
    names = {" ": "space", "-": "minus", ":": "colon", "!": "exclamation_mark", "/": "slash", ".": "full_stop"}
    await pilot.press(*(names.get(char, char) for char in text))


def synthetic_source(app: ConsoleApp) -> SyntheticSource:
    """The Source of a console, which is a synthetic one."""
    assert isinstance(app.source, SyntheticSource)
    return app.source


def snapshot_of(app: ConsoleApp) -> Snapshot:
    """The Snapshot that is shown."""
    assert app.snapshot is not None
    return app.snapshot


def current_table(app: ConsoleApp) -> VirtualTable:
    """The table that keys go to."""
    table = app.view.current_table
    assert table is not None
    return table


def selected(app: ConsoleApp) -> Any:
    """The entity under the cursor: of whichever type the table's rows are."""
    entity = current_table(app).selected
    assert entity is not None
    return entity


@overload
def focused(app: App[None]) -> Widget: ...
@overload
def focused(app: App[None], kind: type[W]) -> W: ...
def focused(app: App[None], kind: type[Widget] = Widget) -> Widget:
    """The widget of the foremost screen that has the focus, which is of this kind."""
    widget = app.screen.focused
    assert isinstance(widget, kind)
    return widget


def plan_in(app: App[None]) -> Plan | None:
    """The plan that a dialog shows and asks about; None: there is no such dialog, or it is still planning."""
    return app.screen._plan if isinstance(app.screen, Confirmation) else None


def shown(app: App[None]) -> str:
    """The text on the screen."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


def toasts(app: App[None]) -> str:
    """Everything that was notified."""
    return "\n".join(f"{note.title}: {note.message}" for note in app._notifications)
