"""News for those who asked for more: each subscriber has a cursor, and takes what it lacks when it took the rest.

Nothing is queued for a subscriber, so a slow one costs nothing and loses nothing: its next piece of news is larger.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from memconsole import unforeseen
from memconsole.backend.wire import delta
from memconsole.backend.wire.call import Call
from memconsole.backend.wire.loop import Loop, PeerConnection
from memconsole.backend.wire.pool import Pool
from memconsole.backend.wire.shared_survey import SharedSnapshot, SharedSurvey
from memconsole.errors import MemconsoleError, Refused
from memconsole.model import Part
from memconsole.source import Source

TICK_S = 0.2
SOON_S = 0.25
"""How soon after its last Snapshot a subscriber gets the next where something has happened (an event) since."""


@dataclass(eq=False)
class EventStream:
    """A subscriber to events; it has those up to ``after``."""

    call: Call
    after: int


@dataclass(eq=False)
class WatchStream:
    """A subscriber to Snapshots; it has ``base``, and wants the next ``every`` so many seconds, with ``parts``."""

    call: Call
    every: float
    parts: Collection[Part] = ()
    base: SharedSnapshot | None = None
    sent_at: float = 0.0


class Streams:
    """The subscribers, and the tick that looks for news while there are any; lives on the loop's thread."""

    def __init__(self, loop: Loop, pool: Pool, survey: SharedSurvey, source: Source) -> None:
        self._loop = loop
        self._pool = pool
        self._survey = survey
        self._source = source
        self._listeners: dict[PeerConnection, EventStream] = {}
        self._watchers: dict[PeerConnection, WatchStream] = {}
        self._ticking = False
        self._comparing = False

    def listen(self, call: Call, after: int) -> None:
        """Begin a stream of events; its connection hears nothing else from now on."""
        self._listeners[call.connection] = EventStream(call, after)
        self._begin(call.connection)

    def watch(self, call: Call, every: float, parts: Collection[Part] = ()) -> None:
        """Begin a stream of Snapshots; its connection hears nothing else from now on."""
        self._watchers[call.connection] = WatchStream(call, every, parts)
        self._begin(call.connection)

    def _begin(self, connection: PeerConnection) -> None:
        connection.busy = connection.streaming = True
        self.news()
        if not self._ticking:
            self._ticking = True
            self._loop.later(TICK_S, self._tick)

    def closed(self, connection: PeerConnection) -> None:
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
        if due := self._due():
            self._survey.get(self._show, {part for stream in due for part in stream.parts})

    # --- events ---------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        ready = [stream for connection, stream in self._listeners.items() if not connection.outbox]
        if not ready:
            return
        found = unforeseen.attempt("Events", "call", lambda: self._source.events(min(stream.after for stream in ready)))
        if isinstance(found, MemconsoleError):
            self._fail(ready, found)
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
        ready = [stream for connection, stream in self._watchers.items() if not connection.outbox]
        waits = [stream for stream in ready if now - stream.sent_at < stream.every]
        happened = self._newest_event(min(map(_last_event, waits))) if waits else 0
        return [
            stream
            for stream in ready
            if now - stream.sent_at >= (SOON_S if happened > _last_event(stream) else stream.every)
        ]

    def _newest_event(self, after: int) -> int:
        found = unforeseen.attempt("Watch", "call", lambda: self._source.events(after))
        return 0 if isinstance(found, MemconsoleError) or not found else found[-1].seq

    def _show(self, taken: SharedSnapshot | MemconsoleError) -> None:
        due = self._due()
        if isinstance(taken, MemconsoleError):
            self._fail(due, taken)
            return
        old: dict[int, SharedSnapshot] = {}
        for stream in due:
            if stream.base is None:
                whole = b'{"generation":%d,"snapshot":%b}' % (taken.generation, taken.encoded)
                self._send(stream, taken, whole)
            elif stream.base.generation != taken.generation:
                old[stream.base.generation] = stream.base
        if old and not self._comparing:
            self._compare(list(old.values()), taken)

    def _compare(self, old: Sequence[SharedSnapshot], new: SharedSnapshot) -> None:
        """Work out, away from the loop, what each subscriber lacks."""

        def compare() -> dict[int, bytes]:
            return {
                base.generation: b'{"generation":%d,"base":%d,"changes":%b}'
                % (new.generation, base.generation, msgspec.json.encode(delta.between(base.snapshot, new.snapshot)))
                for base in old
            }

        def job() -> None:
            changes = unforeseen.attempt("Watch", "call", compare)
            self._loop.call(lambda: self._compared(changes, new))

        self._comparing = self._pool.submit(job)

    def _compared(self, changes: dict[int, bytes] | MemconsoleError, new: SharedSnapshot) -> None:
        self._comparing = False
        if isinstance(changes, MemconsoleError):
            self._fail([stream for stream in self._due() if stream.base is not None], changes)
            return
        for stream in self._due():
            if stream.base is not None and stream.base.generation in changes:
                self._send(stream, new, changes[stream.base.generation])

    def _send(self, stream: WatchStream, taken: SharedSnapshot, parameters: bytes) -> None:
        stream.base = taken
        stream.sent_at = time.monotonic()
        stream.call.answer(parameters, continues=True)

    def end(self) -> None:
        """Tell every subscriber that the service ends."""
        ending = Refused(
            "the control process is ending", "it was asked to", "connect again once it is back", code="Ending"
        )
        self._fail([*self._listeners.values(), *self._watchers.values()], ending)


def _last_event(stream: WatchStream) -> int:
    """The newest event that a subscriber has."""
    events = stream.base.snapshot.events if stream.base is not None else ()
    return events[-1].seq if events else 0
