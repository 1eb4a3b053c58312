"""The console without a terminal: any view of a Source as an SVG picture or as text."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from memconsole.errors import MemconsoleError
from memconsole.source import Moment
from memconsole.views.app import ConsoleApp
from memconsole.views.looks import THEME
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.screens.reach import Reach
from memconsole.views.settings import Settings

if TYPE_CHECKING:
    from memconsole.actions import Action
    from memconsole.extents import ExtentTable
    from memconsole.model import Event, Outcome, Plan, Snapshot
    from memconsole.source import Source

Format = Literal["svg", "text"]
NEVER = 1e6
"""Seconds until the next Snapshot: a picture has one."""


class Still:
    """A Source that stands still: one Snapshot for ever, everything else from the source behind it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._snapshot = source.snapshot()

    @property
    def label(self) -> str:
        """The label of the source behind it."""
        return self._source.label

    @property
    def read_only(self) -> str:
        """Why the source behind it is read-only."""
        return self._source.read_only

    def snapshot(self) -> Snapshot:
        """The Snapshot taken when this was made."""
        return self._snapshot

    def extents(self, key: str) -> ExtentTable:
        """The PFN map from the source behind it."""
        return self._source.extents(key)

    def plan(self, action: Action) -> Plan:
        """The plan of the source behind it."""
        return self._source.plan(action)

    def apply(self, action: Action) -> Outcome:
        """Done by the source behind it."""
        return self._source.apply(action)

    def events(self, after: int) -> Sequence[Event]:
        """Those of the Snapshot."""
        return [event for event in self._snapshot.events if event.seq > after]

    def history(self, after: int = 0) -> Sequence[int]:
        """What the source behind it recorded."""
        return self._source.history(after)

    def at(self, time_ns: int) -> Snapshot:
        """What the source behind it recorded."""
        return self._source.at(time_ns)

    def close(self) -> None:
        """The source behind it stays open."""


def render(
    source: Source, view: str, format: Format, size: tuple[int, int] = (132, 50), subject: str | None = None
) -> str:
    """One view of a Source as it stands in a terminal of ``size`` (columns, rows).

    ``view`` is a view's name (``regions``, ``pfn``), ``subject`` what it is about (``region:web``). The same Snapshot
    gives the same picture: no clock is shown but the Snapshot's own.

    Raises:
        UsageError: there is no such view.
        MemconsoleError: the source has no Snapshot, or no PFN map of the subject.
    """
    return asyncio.run(
        _render(source if isinstance(source, Moment) else Still(source), view, format, size, subject or "")
    )


async def _render(source: Still | Moment, view: str, format: Format, size: tuple[int, int], subject: str) -> str:
    taken = source.snapshot().taken_ns
    app = ConsoleApp(source, interval=NEVER, clock=lambda: taken, settings=Settings(theme=THEME.name))
    app.animation_level = "none"
    async with app.run_test(size=size) as pilot:
        while app.snapshot is None:
            if app.return_code is not None:
                raise MemconsoleError("the console ended before it showed anything")
            await pilot.pause(0.01)
        app.open_view(view, subject)
        await pilot.pause()
        front = app.view
        if isinstance(front, (PfnMap, Reach)):
            for scan in [worker for worker in app.workers if worker.node is front]:
                await scan.wait()
            await pilot.pause()
            if front.error is not None:
                raise front.error
        return app.export_screenshot() if format == "svg" else _text(app, size)


def _text(app: ConsoleApp, size: tuple[int, int]) -> str:
    width, height = size
    console = Console(
        width=width, height=height, file=io.StringIO(), record=True, color_system=None, legacy_windows=False
    )
    console.print(app.screen._compositor.render_update(full=True))  # noqa: SLF001 - as export_screenshot does
    lines = console.export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
