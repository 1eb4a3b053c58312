"""The console without a terminal: any view of a Source as an SVG picture or as text."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from memconsole.errors import MemconsoleError, NotFound
from memconsole.fleet import Fleet
from memconsole.source import PastSource
from memconsole.views.app import ConsoleApp
from memconsole.views.fleetapp import FleetApp
from memconsole.views.helping import screen_text
from memconsole.views.screens.detail import DETAILS, Detail
from memconsole.views.screens.mapview import MapView
from memconsole.views.screens.reach import Reach
from memconsole.views.settings import ConsoleSettings
from memconsole.views.themes import DARK

if TYPE_CHECKING:
    from textual.pilot import Pilot

    from memconsole.actions import Action
    from memconsole.extents import ExtentTable
    from memconsole.model import Event, FrameState, Outcome, Part, Plan, Snapshot
    from memconsole.source import Source

Format = Literal["svg", "text"]
NEVER = 1e6
"""Seconds until the next Snapshot: a picture has one."""
STANDS = 3
"""Pauses that leave the screen as it was, after which it stands still."""


class FrozenSource:
    """A Source that stands still: one Snapshot for ever, with some parts; all else from the source behind it."""

    def __init__(self, source: Source, parts: Collection[Part] = ()) -> None:
        self._source = source
        self._snapshot = source.snapshot(parts)

    @property
    def label(self) -> str:
        """The label of the source behind it."""
        return self._source.label

    @property
    def read_only(self) -> str:
        """Why the source behind it is read-only."""
        return self._source.read_only

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:  # noqa: ARG002 - there is one
        """The Snapshot taken when this was made."""
        return self._snapshot

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The PFN map from the source behind it."""
        return self._source.extents(key, at_ns)

    def frame(self, pfn: int) -> FrameState:
        """What the source behind it says of a frame."""
        return self._source.frame(pfn)

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """The plan of the source behind it."""
        return self._source.plan(action, after)

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
    gives the same picture: no clock is shown but the Snapshot's own. Of a Fleet it is the console of many hosts, of
    which each is shown as it answered last.

    Raises:
        UsageError: there is no such view.
        NotFound: the subject is not there.
        MemconsoleError: the source has no Snapshot, or no PFN map of the subject.
    """
    stands = isinstance(source, (PastSource, Fleet))
    still = source if stands else FrozenSource(source, _parts(view, subject or ""))
    return asyncio.run(_render(still, view, format, size, subject or ""))


def _parts(view: str, subject: str) -> frozenset[Part]:
    """What a view shows that must be asked for."""
    kind = subject.partition(":")[0]
    shown = DETAILS.get(kind) or DETAILS.get(view)
    found = [shown] if shown else [each.cls for each in ConsoleApp.VIEWS if each.name == view]
    return frozenset(part for cls in found for part in cls.PARTS)


async def _render(source: Source, view: str, format: Format, size: tuple[int, int], subject: str) -> str:
    taken = source.snapshot().taken_ns
    given: dict[str, Any] = {
        "interval": NEVER, "clock": lambda: taken, "settings": ConsoleSettings(theme=DARK.name),
    }  # fmt: skip
    app = FleetApp(source, **given) if isinstance(source, Fleet) else ConsoleApp(source, **given)
    app.animation_level = "none"
    async with app.run_test(size=size) as pilot:
        while app.snapshot is None or app.opening:
            if app.return_code is not None:
                raise MemconsoleError(
                    "the view was not rendered", "the console ended before its first refresh", "see the log; try again"
                )
            await pilot.pause(0.01)
        app.open_view(view, subject)
        await pilot.pause()
        front = app.view
        if isinstance(front, Detail) and front.item is None:
            raise NotFound(f"there is no {subject}", "the snapshot has none of this name", f"see memconsole {view}")
        if isinstance(front, (MapView, Reach)):
            for scan in [worker for worker in app.workers if worker.node is front]:
                await scan.wait()
            await pilot.pause()
            while isinstance(front, MapView) and front.scanning:
                await pilot.pause(0.01)
            app.show_state()
            await pilot.pause()
            if front.error is not None:
                raise front.error
        await _settled(app, pilot)
        return app.export_screenshot() if format == "svg" else _text(app)


async def _settled(app: ConsoleApp, pilot: Pilot[None]) -> None:
    """Wait until the screen stands still.

    A pause handles what every widget has been sent so far; what that leads to (a line that wraps, so a pane that grows,
    so a bar that scrolls) comes in the next ones.
    """
    seen, same = "", 0
    while same < STANDS:
        await pilot.pause()
        now = _text(app)
        same = same + 1 if now == seen else 0
        seen = now


def _text(app: ConsoleApp) -> str:
    return "\n".join(line.rstrip() for line in screen_text(app.screen).splitlines()) + "\n"
