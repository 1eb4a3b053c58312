"""News for those who asked for more: each subscriber has a cursor, and takes what it lacks when it took the rest.

Nothing is queued for a subscriber, so a slow one costs nothing and loses nothing: its next piece of news is larger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from memconsole.backend.wire import delta
from memconsole.backend.wire.loop import Connection, Loop
from memconsole.backend.wire.pool import Pool
from memconsole.backend.wire.shared import SharedSurvey, Taken
from memconsole.errors import Refused
from memconsole.source import Source

if TYPE_CHECKING:
    from memconsole.backend.wire.server import Call

TICK_S = 0.2


@dataclass(eq=False)
class EventStream:
    """A subscriber to events; it has those up to ``after``."""

    call: Call
    after: int


@dataclass(eq=False)
class WatchStream:
    """A subscriber to Snapshots; it has ``base``, and wants the next ``every`` so many seconds."""

    call: Call
    every: float
    base: Taken | None = None
    sent_at: float = 0.0


class Streams:
    """The subscribers, and the tick that looks for news while there are any; lives on the loop's thread."""

    def __init__(self, loop: Loop, pool: Pool, survey: SharedSurvey, source: Source) -> None:
        self._loop = loop
        self._pool = pool
        self._survey = survey
        self._source = source
        self._listeners: dict[Connection, EventStream] = {}
        self._watchers: dict[Connection, WatchStream] = {}
        self._ticking = False
        self._comparing = False

    def listen(self, call: Call, after: int) -> None:
        """Begin a stream of events; its connection hears nothing else from now on."""
        self._listeners[call.connection] = EventStream(call, after)
        self._begin(call.connection)

    def watch(self, call: Call, every: float) -> None:
        """Begin a stream of Snapshots; its connection hears nothing else from now on."""
        self._watchers[call.connection] = WatchStream(call, every)
        self._begin(call.connection)

    def _begin(self, connection: Connection) -> None:
        connection.busy = connection.streaming = True
        self.news()
        if not self._ticking:
            self._ticking = True
            self._loop.later(TICK_S, self._tick)

    def closed(self, connection: Connection) -> None:
        """Forget a subscriber."""
        self._listeners.pop(connection, None)
        self._watchers.pop(connection, None)

    def _fail(self, streams: Sequence[EventStream | WatchStream], error: Exception) -> None:
        for stream in streams:
            self.closed(stream.call.connection)
            stream.call.connection.streaming = False
            stream.call.fail(error)

    def _tick(self) -> None:
        self._ticking = bool(self._listeners or self._watchers)
        if self._ticking:
            self._loop.later(TICK_S, self._tick)
            self.news()

    def news(self) -> None:
        """Look for news on behalf of every subscriber that has taken the last."""
        self._tell()
        if self._due():
            self._survey.get(self._show)

    # --- events ---------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        ready = [stream for connection, stream in self._listeners.items() if not connection.outbox]
        if not ready:
            return
        try:
            found = self._source.events(min(stream.after for stream in ready))
        except Exception as error:  # noqa: BLE001 - the subscribers are told, and fail() logs what is no refusal
            self._fail(ready, error)
            return
        encoded: dict[int, bytes] = {}
        for stream in ready:
            if not found or found[-1].seq <= stream.after:
                continue
            if stream.after not in encoded:
                encoded[stream.after] = msgspec.json.encode([event for event in found if event.seq > stream.after])
            events, stream.after = encoded[stream.after], found[-1].seq
            stream.call.answer(b'{"events":%b}' % events, continues=True)

    # --- Snapshots ------------------------------------------------------------------------------------------------

    def _due(self) -> list[WatchStream]:
        now = time.monotonic()
        return [
            stream
            for connection, stream in self._watchers.items()
            if not connection.outbox and now - stream.sent_at >= stream.every
        ]

    def _show(self, taken: Taken | Exception) -> None:
        due = self._due()
        if isinstance(taken, Exception):
            self._fail(due, taken)
            return
        old: dict[int, Taken] = {}
        for stream in due:
            if stream.base is None:
                whole = b'{"generation":%d,"snapshot":%b}' % (taken.generation, taken.encoded)
                self._send(stream, taken, whole)
            elif stream.base.generation != taken.generation:
                old[stream.base.generation] = stream.base
        if old and not self._comparing:
            self._compare(list(old.values()), taken)

    def _compare(self, old: Sequence[Taken], new: Taken) -> None:
        """Work out, away from the loop, what each subscriber lacks."""

        def job() -> None:
            changes = {
                base.generation: b'{"generation":%d,"base":%d,"changes":%b}'
                % (new.generation, base.generation, msgspec.json.encode(delta.between(base.snapshot, new.snapshot)))
                for base in old
            }
            self._loop.call(lambda: self._compared(changes, new))

        self._comparing = self._pool.submit(job)

    def _compared(self, changes: dict[int, bytes], new: Taken) -> None:
        self._comparing = False
        for stream in self._due():
            if stream.base is not None and stream.base.generation in changes:
                self._send(stream, new, changes[stream.base.generation])

    def _send(self, stream: WatchStream, taken: Taken, parameters: bytes) -> None:
        stream.base = taken
        stream.sent_at = time.monotonic()
        stream.call.answer(parameters, continues=True)

    def end(self) -> None:
        """Tell every subscriber that the service ends."""
        ending = Refused("the control process ends", "it was asked to", "connect again once it is back", code="Ending")
        self._fail([*self._listeners.values(), *self._watchers.values()], ending)
