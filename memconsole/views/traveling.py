"""The app's memory: it walks through what the Source recorded, one Snapshot at a time.

In the past ``source`` is a :class:`~memconsole.source.Moment` of the live one, so that whatever asks it sees nothing
but what was recorded and is refused every Action; the live one is still followed. ``neighbour`` is the Snapshot
recorded before the one that is shown: a view that shows both, in this order, marks what changed between them.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.message import Message

from memconsole.errors import MemconsoleError
from memconsole.model import Snapshot
from memconsole.source import Moment, nothing_at
from memconsole.units import parse_time
from memconsole.views.doing import Doing
from memconsole.views.refresh import settle

KEPT = 8
"""Snapshots kept, so that a step to and fro asks for none again."""


class Traveled(Message):
    """A recorded Snapshot came, with the one before it; or none, where the present begins."""

    def __init__(
        self, journey: int, times: list[int], taken: int, moment: Moment | None, neighbour: Snapshot | None
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


class Traveling(Doing):
    """An App that can show the past."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "travel(-1)", "Earlier", show=False, id="earlier", tooltip="the past, a step"),
        Binding("right_square_bracket", "travel(1)", "Later", show=False, id="later", tooltip="a step to the present"),
        Binding("left_curly_bracket", "travel(-60)", "Much earlier", show=False, id="much-earlier"),
        Binding("right_curly_bracket", "present", "Present", show=False, id="present", tooltip="back to the present"),
    ]

    neighbour: Snapshot | None = None
    _times: Sequence[int] = ()
    _taken: int | None = None
    _steps = 0
    _aim: int | None = None
    _underway = False
    _journey = 0

    @property
    def away(self) -> bool:
        """Whether the past is shown."""
        return self.source is not self.live

    def action_travel(self, by: int) -> None:
        """Go so many recorded Snapshots back, or forth; steps asked for while one is under way are taken at once."""
        if by > 0 and not self.away and not self._underway:
            self.notify("there is nothing later to show", title="This is the present", timeout=2, markup=False)
            return
        self._steps += by
        self._depart()

    def travel_to(self, text: str) -> None:
        """Go to the last Snapshot recorded until a time (``-5m``, ``14:03:12``).

        Raises:
            UsageError: it is no time.
        """
        self._aim, self._steps = parse_time(text, self.clock()), 0
        self._depart()

    def action_present(self) -> None:
        """Show what is now."""
        self._steps, self._aim = 0, None
        self._journey += 1
        if self.away:
            self._arrive_now()

    def _depart(self) -> None:
        if not self._underway:
            self._underway = True
            steps, self._steps = self._steps, 0
            aim, self._aim = self._aim, None
            self._travel(self._journey, self._times, self._taken, steps, aim)

    @work(thread=True, group="travel", exit_on_error=False)
    def _travel(self, journey: int, known: Sequence[int], taken: int | None, steps: int, aim: int | None) -> None:
        try:
            times = [*known, *self.live.history(known[-1] if known else 0)]
            if not times or (aim is not None and aim < times[0]):
                raise nothing_at(times)
            if aim is not None:
                at = bisect.bisect_right(times, aim) - 1
            else:
                at = max((bisect.bisect_left(times, taken) if taken is not None else len(times)) + steps, 0)
            if at >= len(times):
                self.post_message(Traveled(journey, times, 0, None, None))
                return
            before = self._recorded(times[at - 1]) if at else None
            found = self._recorded(times[at])
            moment = Moment(self.live, settle(before, found))
            self.post_message(Traveled(journey, times, times[at], moment, before))
        except (MemconsoleError, OSError) as error:
            self.post_message(Strayed(error))

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
        if event.journey != self._journey:  # the operator turned back meanwhile
            return
        if event.moment is None:
            self._steps, self._aim = 0, None
            self._arrive_now()
            return
        self.source, self._taken, self.neighbour = event.moment, event.taken, event.neighbour
        self.snapshot = event.moment.snapshot()
        self.show_snapshot()
        if self._steps or self._aim is not None:
            self._depart()

    def on_strayed(self, event: Strayed) -> None:
        """Say why the past cannot be shown; what is shown stays."""
        self._underway = False
        self._times, self._steps, self._aim = (), 0, None
        self.notify(str(event.error), title="✖ The past", severity="warning", markup=False)

    def _arrive_now(self) -> None:
        self.source, self._taken, self.neighbour = self.live, None, None
        if self.latest is not None:
            self.snapshot = self.latest
        self.show_snapshot()
        self.action_refresh()
