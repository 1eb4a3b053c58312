"""One survey of the host for everybody who asks at about the same time, encoded once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from memconsole.backend.wire.loop import Loop
from memconsole.backend.wire.pool import Pool
from memconsole.errors import Refused
from memconsole.model import Snapshot

FRESH_S = 0.25


@dataclass(frozen=True, eq=False)
class Taken:
    """A Snapshot with its number in this service's life, its JSON, and when and after which action it was begun."""

    generation: int
    snapshot: Snapshot
    encoded: bytes
    begun: float
    took: float
    epoch: int

    def fresh(self, epoch: int) -> bool:
        """Whether it still answers: not older than ``FRESH_S`` or its own cost, and no action was applied since."""
        return self.epoch == epoch and time.monotonic() - self.begun - self.took <= max(FRESH_S, self.took)


Then = Callable[[Taken | Exception], None]


class SharedSurvey:
    """Snapshots of a source, at most one being taken at a time; every method is called on the loop's thread."""

    def __init__(self, loop: Loop, pool: Pool, take: Callable[[], Snapshot]) -> None:
        self._loop = loop
        self._pool = pool
        self._take = take
        self._latest: Taken | None = None
        self._waiting: list[tuple[int, Then]] = []
        self._running = False
        self._generation = time.time_ns()
        self._epoch = 0

    @property
    def latest(self) -> Taken | None:
        """The newest Snapshot if it is fresh."""
        return self._latest if self._latest is not None and self._latest.fresh(self._epoch) else None

    def outdate(self) -> None:
        """An action was applied: no Snapshot begun before now answers a question asked after now."""
        self._epoch += 1

    def get(self, then: Then) -> None:
        """Call ``then`` with a Snapshot begun after the last applied action, or with the error that prevents one."""
        if (taken := self.latest) is not None:
            then(taken)
            return
        self._waiting.append((self._epoch, then))
        self._start()

    def _start(self) -> None:
        if self._running:
            return
        epoch, begun = self._epoch, time.monotonic()
        self._generation += 1
        generation = self._generation

        def job() -> None:
            taken: Taken | Exception
            try:
                snapshot = self._take()
                encoded = msgspec.json.encode(snapshot)
                taken = Taken(generation, snapshot, encoded, begun, time.monotonic() - begun, epoch)
            except Exception as error:  # noqa: BLE001 - whoever waits is told, and logs what is no refusal
                taken = error
            self._loop.call(lambda: self._finished(taken, epoch))

        self._running = self._pool.submit(job)
        if not self._running:
            self._finished(Refused("no snapshot now", "the service is busy", "try again", code="Busy"), epoch)

    def _finished(self, taken: Taken | Exception, epoch: int) -> None:
        self._running = False
        if isinstance(taken, Taken):
            self._latest = taken
        ready = [then for asked, then in self._waiting if asked <= epoch]
        self._waiting = [(asked, then) for asked, then in self._waiting if asked > epoch]
        for then in ready:
            then(taken)
        if self._waiting:
            self._start()
