"""The app's memory: it walks through what the Source recorded, one Snapshot at a time.

In the past ``source`` is a :class:`~memconsole.source.PastSource` of the live one, so that whatever asks it sees
nothing but what was recorded and is refused every Action; the live one is still followed. ``neighbour`` is the Snapshot
recorded before the one that is shown: a view that shows both, in this order, marks what changed between them.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

from textual import work
from textual.binding import BindingType
from textual.message import Message

from memconsole import unforeseen
from memconsole.differ import settled
from memconsole.errors import MemconsoleError, NotFound
from memconsole.model import Event, Snapshot
from memconsole.rates import rated
from memconsole.source import PastSource, nothing_at
from memconsole.units import parse_time
from memconsole.views.bound import bound
from memconsole.views.manifold import Manifold
from memconsole.views.widgets.timebar import TimeBar

KEPT = 8
"""Snapshots kept, so that a step to and fro asks for none again."""


class Wish(NamedTuple):
    """Where in the past one wants to be: so many Snapshots on, at a time (ns since the epoch), or so many events on."""

    steps: int = 0
    aim: int | None = None
    seek: int = 0

    def place(self, times: Sequence[int], taken: int | None, happened: Sequence[int]) -> int:
        """The place among ``times`` (that of what is shown is ``taken``, None: the present); behind all: the present.

        ``happened`` is when events were.

        Raises:
            NotFound: no event was before.
        """
        if self.aim is not None:
            return bisect.bisect_right(times, self.aim) - 1
        here = bisect.bisect_left(times, taken) if taken is not None else len(times)
        if not self.seek:
            return max(here + self.steps, 0)
        told = {bisect.bisect_left(times, at) for at in happened if at >= times[0]} - {len(times)}
        if self.seek > 0:
            behind = sorted(place for place in told if place > here)
            return behind[self.seek - 1] if self.seek <= len(behind) else len(times)
        before = sorted(place for place in told if place < here)
        if not before:
            raise NotFound("no event was recorded before", "none that is known was then", "[ goes a snapshot back")
        return before[max(self.seek, -len(before))]


NOWHERE = Wish()
"""No wish: one is where one wants to be."""


class Traveled(Message):
    """A recorded Snapshot came, with the one before it; or none, where the present begins."""

    def __init__(
        self, journey: int, times: list[int], taken: int, moment: PastSource | None, neighbour: Snapshot | None
    ) -> None:
        super().__init__()
        self.journey = journey
        self.times = times
        self.taken = taken
        self.moment = moment
        self.neighbour = neighbour


class Strayed(Message):
    """What was recorded could not be had."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Traveling(Manifold):
    """An App that can show the past."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bound("earlier", "travel(-1)", "Earlier", show=False, tooltip="show the snapshot before this one"),
        bound("later", "travel(1)", "Later", show=False, tooltip="show the snapshot after this one"),
        bound("much-earlier", "travel(-60)", "Much earlier", show=False),
        bound("event-before", "travel_events(-1)", "Event before", show=False, tooltip="to the event before"),
        bound("event-after", "travel_events(1)", "Event behind", show=False, tooltip="to the event behind"),
        bound("present", "present", "Present", show=False, tooltip="back to the present"),
    ]

    neighbour: Snapshot | None = None
    _times: Sequence[int] = ()
    _taken: int | None = None
    _wish = NOWHERE
    _underway = False
    _journey = 0

    @property
    def away(self) -> bool:
        """Whether the past is shown."""
        return self.source is not self.live

    def action_travel(self, by: int) -> None:
        """Go so many recorded Snapshots back, or forth; steps asked for while one is under way are taken at once."""
        if by > 0 and not self.away and not self._underway:
            self.notify("there is no later snapshot", title="This is the present", timeout=2, markup=False)
            return
        self._depart(self._wish._replace(steps=self._wish.steps + by))

    def action_travel_events(self, by: int) -> None:
        """Go to the first Snapshot recorded with the event before what is shown, or behind it."""
        if by > 0 and not self.away and not self._underway:
            self.notify("there is no later event", title="This is the present", timeout=2, markup=False)
            return
        self._depart(self._wish._replace(seek=self._wish.seek + by))

    @property
    def known_events(self) -> Sequence[Event]:
        """What happened, as far as the present says, and what is shown."""
        known = {event.seq: event for shown in (self.snapshot, self.latest) if shown for event in shown.events}
        return sorted(known.values(), key=lambda event: event.seq)

    def show_history(self, bar: TimeBar) -> None:
        """Show the bar of history, in the past alone."""
        bar.display = self.away
        if self.away and self.snapshot is not None:
            bar.show_past(self._times, self.known_events, self.snapshot.taken_ns, self.clock())

    def on_time_bar_chosen(self, event: TimeBar.Chosen) -> None:
        """Go to the moment that was clicked at."""
        self.travel_to_moment(event.at_ns)

    def travel_to_moment(self, at_ns: int) -> None:
        """Go to the last Snapshot recorded until a moment, ns since the epoch."""
        self._depart(Wish(aim=at_ns))

    def travel_to(self, text: str) -> None:
        """Go to the last Snapshot recorded until a time (``-5m``, ``@-5m``, ``14:03:12``).

        Raises:
            UsageError: it is no time.
        """
        self.travel_to_moment(parse_time(text.strip().removeprefix("@"), self.clock()))

    def action_present(self) -> None:
        """Show what is now."""
        self._wish = NOWHERE
        self._journey += 1
        if self.away:
            self._arrive_now()

    def _depart(self, wish: Wish) -> None:
        """Begin to go where one wants to be; once what is under way has arrived, where that is so."""
        self._wish = wish if self._underway else NOWHERE
        if not self._underway:
            self._underway = True
            happened = tuple(event.at_ns for event in self.known_events)
            self._travel(self._journey, self._times, self._taken, wish, happened)

    @work(thread=True, group="travel", exit_on_error=False, description="travel")
    def _travel(
        self, journey: int, known: Sequence[int], taken: int | None, wish: Wish, happened: Sequence[int]
    ) -> None:
        go = partial(self._traveled, journey, known, taken, wish, happened)
        found = unforeseen.attempt("the past", "console", go)
        self.post_message(Strayed(found) if isinstance(found, MemconsoleError) else found)

    def _traveled(
        self, journey: int, known: Sequence[int], taken: int | None, wish: Wish, happened: Sequence[int]
    ) -> Traveled:
        """Where a journey leads."""
        times = [*known, *self.live.history(known[-1] if known else 0)]
        if not times or (wish.aim is not None and wish.aim < times[0]):
            raise nothing_at(times)
        at = wish.place(times, taken, happened)
        if at >= len(times):
            return Traveled(journey, times, 0, None, None)
        before = self._recorded(times[at - 1]) if at else None
        found = rated(before, self._recorded(times[at]))
        moment = PastSource(self.live, settled(before, found))
        return Traveled(journey, times, times[at], moment, before)

    def _recorded(self, taken: int) -> Snapshot:
        """A recorded Snapshot, kept for a while; called by one thread at a time."""
        kept: OrderedDict[int, Snapshot] = self.__dict__.setdefault("_kept", OrderedDict())
        if taken not in kept:
            kept[taken] = self.live.at(taken)
            if len(kept) > KEPT:
                kept.popitem(last=False)
        return kept[taken]

    def on_traveled(self, event: Traveled) -> None:
        """Show the past, and go on where more steps were asked for meanwhile."""
        self._underway = False
        self._times = event.times
        if event.journey == self._journey:  # else the operator turned back meanwhile
            self._arrive(event)
        if self._wish != NOWHERE:
            self._depart(self._wish)

    def _arrive(self, event: Traveled) -> None:
        if event.moment is None:
            self._wish = NOWHERE
            self._arrive_now()
            return
        self.source, self._taken, self.neighbour = event.moment, event.taken, event.neighbour
        self.snapshot = event.moment.snapshot()
        self.show_snapshot()

    def on_strayed(self, event: Strayed) -> None:
        """Say why the past cannot be shown; what is shown stays."""
        self._underway = False
        self._times, self._wish = (), NOWHERE
        self.notify(str(event.error), title="✖ The past", severity="warning", markup=False)

    def _arrive_now(self) -> None:
        self.source, self._taken, self.neighbour = self.live, None, None
        if self.latest is not None:
            self.snapshot = self.latest
        self.show_snapshot()
        self.action_refresh()
