"""History in a line: what is recorded, where events were, and which moment is shown; and what its marks mean.

13:05:10 ┃──•────────   ──•─┃──────•──── now         a cell is a part of the time from the first Snapshot until now
"""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Sequence

from textual import events
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

from memconsole.model import Event
from memconsole.views.widgets.bars import Part, line

HERE, EVENT, RECORDED, NOTHING = "┃", "•", "─", " "
LOOKS = {HERE: "bold $accent", EVENT: "bold $warning", RECORDED: "$primary", NOTHING: ""}
NOW = " now "
SECOND = 1_000_000_000


def marks(times: Sequence[int], happened: Sequence[int], here_ns: int, now_ns: int, width: int) -> str:
    """A mark for each of ``width`` parts of the time from the first of ``times`` until now; all in ns since the epoch.

    ``times`` are those of what is recorded, oldest first. What happened before them is left out.
    """
    if not times or width <= 0:
        return NOTHING * max(width, 0)
    first, span = times[0], max(now_ns - times[0], 1) + 1

    def at(moment: int) -> int:
        return min(max((moment - first) * width // span, 0), width - 1)

    cells = [NOTHING] * width
    for cell in range(width):
        begin, end = first + -(-cell * span // width), first + -(-(cell + 1) * span // width)
        if bisect.bisect_left(times, begin) < bisect.bisect_left(times, end):
            cells[cell] = RECORDED
    for moment in happened:
        if first <= moment <= now_ns:
            cells[at(moment)] = EVENT
    cells[at(here_ns)] = HERE
    return "".join(cells)


def moment_at(times: Sequence[int], now_ns: int, cell: int, width: int) -> int:
    """The end of a cell's part of the time, ns since the epoch."""
    first, span = times[0], max(now_ns - times[0], 1) + 1
    return first + -(-(cell + 1) * span // width) - 1


class TimeBar(Widget):
    """The past that is recorded; a click goes to a moment of it."""

    DEFAULT_CSS = "TimeBar { height: 2; width: 1fr; display: none; background: $panel; }"
    ALLOW_SELECT = False

    class Chosen(Message):
        """The operator wants to see a moment, ns since the epoch."""

        def __init__(self, at_ns: int) -> None:
            super().__init__()
            self.at_ns = at_ns

    def __init__(self) -> None:
        super().__init__()
        self._times: Sequence[int] = ()
        self._happened: Sequence[Event] = ()
        self._here_ns = self._now_ns = 0

    def show_past(self, times: Sequence[int], happened: Sequence[Event], here_ns: int, now_ns: int) -> None:
        """Show what is recorded, what happened meanwhile, and where one is; ns since the epoch."""
        now_ns = max(now_ns, here_ns) // SECOND * SECOND + SECOND  # a second is the least that is told apart
        shown = (times, happened, here_ns, now_ns)
        if shown != (self._times, self._happened, self._here_ns, self._now_ns):
            self._times, self._happened, self._here_ns, self._now_ns = shown
            self.refresh()

    @property
    def _lead(self) -> str:
        first = self._times[0] if self._times else self._here_ns
        taken = datetime.datetime.fromtimestamp(first // SECOND, datetime.UTC)
        return f" {taken:%Y-%m-%d %H:%M:%S} " if self._now_ns - first > 86_400 * SECOND else f" {taken:%H:%M:%S} "

    @property
    def _room(self) -> int:
        return max(self.size.width - len(self._lead) - len(NOW), 1)

    def render(self) -> Content:
        """The bar, and below it what happened last by then, and what the marks mean."""
        happened = [event.at_ns for event in self._happened]
        drawn = marks(self._times, happened, self._here_ns, self._now_ns, self._room)
        first: list[Part] = [
            (self._lead, "$text-muted"),
            *((mark, LOOKS[mark]) for mark in drawn),
            (NOW, "$text-muted"),
        ]
        return Content("\n").join([line(first), self._words().truncate(self.size.width, ellipsis=True)])

    def _words(self) -> Content:
        parts: list[Part] = [(" ", "")]
        for mark, words in ((HERE, "shown"), (EVENT, "events"), (RECORDED, "recorded")):
            parts += [(mark, LOOKS[mark]), (f" {words}  ", "$text-muted")]
        parts.append(("( ) events  [ ] snapshots  } present", "$text-muted"))
        last = max((event for event in self._happened if event.at_ns <= self._here_ns), key=_at, default=None)
        if last is not None:
            parts += [("   last: ", "$secondary"), (last.text, "")]
        return line(parts)

    def on_click(self, event: events.Click) -> None:
        """A click goes to the moment below it."""
        cell = event.x - len(self._lead)
        if event.y == 0 and self._times and 0 <= cell < self._room:
            self.post_message(self.Chosen(moment_at(self._times, self._now_ns, cell, self._room)))


def _at(event: Event) -> int:
    return event.at_ns
