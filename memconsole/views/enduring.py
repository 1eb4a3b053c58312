"""An App that goes on: an exception that was not foreseen ends the message, timer or thread it came of, and is told.

Textual ends the App at the first one, and a control process embedded in it, with its guests, ends with the App. Here
a widget's messages are dispatched by :meth:`Enduring.dispatch`, so that its pump goes on, and what Textual reports is
a notice, the same one at most every ``AGAIN_S`` seconds. An App that cannot start still ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from textual.filter import LineFilter
from textual.message import Message
from textual.worker import WorkerFailed

from memconsole import unforeseen
from memconsole.escaping import escape
from memconsole.views.harmless import Harmless
from memconsole.views.private import Dispatch, Overseen

AGAIN_S = 10.0
LONG = 15


class Enduring(Overseen):
    """An App that outlives faults from the moment ``enduring`` is true."""

    enduring = False
    _last_filter: Harmless | None = None

    def get_line_filters(self) -> Sequence[LineFilter]:
        """What each painted line goes through."""
        before = tuple(super().get_line_filters())
        if self._last_filter is None or self._last_filter.before != before:
            self._last_filter = Harmless(before)
        return (self._last_filter,)

    async def dispatch(self, handle: Dispatch, message: Message) -> None:
        """Have a message handled; what that raises is a notice."""
        try:
            await handle(message)
        except Exception as error:
            if not self.enduring:
                raise
            self.report(error)

    def outlived(self, error: Exception) -> bool:
        """Say what an exception was, once in a while, and go on."""
        if not self.enduring:
            return False
        cause = error.error if isinstance(error, WorkerFailed) and isinstance(error.error, Exception) else error
        if self._told_lately(f"{type(cause).__name__}: {cause}"):
            return True
        named = unforeseen.named(cause, "this part of the console", "console")
        text = "\n".join(part for part in (named.what, named.why, named.remedy and f"▸ {named.remedy}") if part)
        self.notify(text, title=f"✖ {named.code}", severity="error", timeout=LONG, markup=False)
        return True

    def notify(self, message: str, *, title: str = "", markup: bool = False, **how: Any) -> None:
        """Show a notice: text of others is text, never markup, and nothing in it acts."""
        del markup
        super().notify(escape(message, keep="\n"), title=escape(title), markup=False, **how)

    def _told_lately(self, fault: str) -> bool:
        """Whether the same was told already: a notice is painted, which would fail again where painting fails."""
        now = time.monotonic()
        told: dict[str, float] = self.__dict__.setdefault("_told", {})
        lately = now - told.get(fault, -AGAIN_S) < AGAIN_S
        if not lately:
            told[fault] = now
        return lately
