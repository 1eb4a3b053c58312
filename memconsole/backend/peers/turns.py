"""One connection, one owner at a time: who has it, and what a caller is told whose turn does not come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from memconsole.errors import Silent

BUSY = "ConnectionBusy"
"""The code of the error for a caller whose turn did not come."""


class _Holder(NamedTuple):
    doing: str
    thread: str
    since: float


class Turn:
    """The right to use a connection, which one thread has at a time; ``of`` is what is connected, in a few words."""

    def __init__(self, of: str) -> None:
        self._of = of
        self._lock = threading.RLock()
        self._holder: _Holder | None = None

    @contextlib.contextmanager
    def taken(self, doing: str, within: float) -> Iterator[float]:
        """Have the connection for ``doing``; what is left of ``within`` seconds once the turn has come.

        Raises:
            Silent: it did not come in time (``ConnectionBusy``); the error says who has it, for what and how long.
        """
        began = time.monotonic()
        if not self._lock.acquire(timeout=max(0.0, within)):
            raise self._busy(doing, within)
        before, self._holder = self._holder, _Holder(doing, threading.current_thread().name, time.monotonic())
        try:
            yield max(0.0, within - (time.monotonic() - began))
        finally:
            self._holder = before
            self._lock.release()

    def _busy(self, doing: str, within: float) -> Silent:
        holder = self._holder
        why = f"its turn did not come within {within:g} s"
        if holder is not None:
            why += f": thread {holder.thread} has had the connection for {time.monotonic() - holder.since:.1f} s"
            why += f" ({holder.doing})"
        return Silent(f"{self._of} was not asked for {doing}", why, "try again", code=BUSY)
