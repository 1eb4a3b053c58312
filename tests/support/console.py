"""A console over a synthetic Source, and what a person would see of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from support.synthetic import NOW_NS, SyntheticSource
from textual.pilot import Pilot

from memconsole.views.app import ConsoleApp

WIDE = (132, 50)
SMALL = (80, 24)


def console(source: Any = None, **kwargs: Any) -> ConsoleApp:
    """A console whose clock stands still and which refreshes only when it is asked to."""
    source = SyntheticSource() if source is None else source
    return ConsoleApp(source, **({"interval": 3600, "clock": lambda: NOW_NS + 5_000_000_000} | kwargs))


@asynccontextmanager
async def running(app: ConsoleApp, size: tuple[int, int] = WIDE) -> AsyncIterator[Pilot[None]]:
    """The console with its first Snapshot on the screen."""
    async with app.run_test(size=size, notifications=True) as pilot:
        await until(pilot, lambda: app.snapshot is not None or bool(app.trouble))
        await pilot.pause()
        yield pilot
        await pilot.pause()


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Let the console work until something holds."""
    for _ in range(500):
        if condition():
            await pilot.pause()
            return
        await pilot.pause(0.01)
    raise AssertionError("it never came to hold; the screen:\n" + shown(pilot.app))


async def refreshed(pilot: Pilot[None], app: ConsoleApp, snapshot: Any) -> None:
    """Make this the Source's Snapshot and wait until it is on the screen."""
    app.source.show(snapshot)
    app.action_refresh()
    await until(pilot, lambda: app.snapshot == snapshot)


async def type_text(pilot: Pilot[None], text: str) -> None:
    """Type, key by key."""
    names = {" ": "space", "-": "minus", ":": "colon", "!": "exclamation_mark", "/": "slash", ".": "full_stop"}
    await pilot.press(*(names.get(char, char) for char in text))


def shown(app: Any) -> str:
    """The text on the screen."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


def toasts(app: Any) -> str:
    """Everything that was notified."""
    return "\n".join(f"{note.title}: {note.message}" for note in app._notifications)
