"""One survey of the host for everybody who asks at about the same time, encoded once.

A survey that takes long makes no reader wait long: after :meth:`SharedSurvey.patience` who asks gets the last Snapshot
there is, with a finding that says its age, while the one survey goes on. No other is begun behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from dataclasses import replace as replaced

import msgspec
from msgspec.structs import replace

from memconsole import unforeseen
from memconsole.backend.wire.loop import Loop
from memconsole.backend.wire.pool import Pool
from memconsole.errors import MemconsoleError, Refused
from memconsole.model import Finding, Part, Severity, Snapshot
from memconsole.units import format_duration

FRESH_S = 0.25
PATIENCE_S = 3.0
"""Seconds a question waits for the survey under way at the least, where there is an older Snapshot to be had."""
USUAL = 4
"""How many times as long as the last survey took a question waits: a busy host is slow, and does not hang."""
AFTER_ACTION = 5
"""How many times longer it waits where an action was applied since that Snapshot, which denies what was just done."""
OLD_S = 1.0
"""Seconds for which an older Snapshot is handed out as it was made ready once."""
MOST_S = 24.0
"""Seconds a question waits at the most: its deadline (``server.READ_S``) is not far."""


@dataclass(frozen=True, eq=False)
class SharedSnapshot:
    """A Snapshot with its number in this service's life, its JSON, and when and after which action it was begun.

    It has ``parts`` that had to be asked for.
    """

    generation: int
    snapshot: Snapshot
    encoded: bytes
    begun: float
    took: float
    epoch: int
    parts: frozenset[Part] = frozenset()

    def fresh(self, epoch: int, parts: Collection[Part] = ()) -> bool:
        """Whether it still answers: it has the parts, is not older than ``FRESH_S`` or its own cost, and no action was
        applied since.
        """
        young = time.monotonic() - self.begun - self.took <= max(FRESH_S, self.took)
        return young and self.epoch == epoch and self.parts.issuperset(parts)


Then = Callable[[SharedSnapshot | MemconsoleError], None]


@dataclass(frozen=True, eq=False)
class Question:
    """Who waits for a Snapshot: after which action and when it was asked for, with which parts, and what follows."""

    epoch: int
    asked: float
    parts: frozenset[Part]
    then: Then

    def answered_by(self, epoch: int, parts: frozenset[Part]) -> bool:
        """Whether a survey answers it that was begun after this action, with these parts."""
        return self.epoch <= epoch and self.parts <= parts


class SharedSurvey:
    """Snapshots of a source, at most one being taken at a time; every method is called on the loop's thread."""

    def __init__(self, loop: Loop, pool: Pool, take: Callable[[Collection[Part]], Snapshot]) -> None:
        self._loop = loop
        self._pool = pool
        self._take = take
        self._latest: SharedSnapshot | None = None
        self._old: SharedSnapshot | None = None
        self._old_of = (0, 0)
        self._old_at = 0.0
        self._waiting: list[Question] = []
        self._running = False
        self._began = 0.0
        self._watching = False
        self._generation = time.time_ns()
        self._epoch = 0

    def latest(self, parts: Collection[Part] = ()) -> SharedSnapshot | None:
        """The newest Snapshot if it is fresh and has these parts."""
        return self._latest if self._latest is not None and self._latest.fresh(self._epoch, parts) else None

    def outdate(self) -> None:
        """An action was applied: no Snapshot begun before now answers a question asked after now."""
        self._epoch += 1

    def get(self, then: Then, parts: Collection[Part] = ()) -> None:
        """Call ``then`` with a Snapshot begun after the last applied action, or with the error that prevents one.

        It has these parts, and those that others asked for at the same time. Where it takes longer than
        :meth:`patience`: the last Snapshot there is, which says so.
        """
        if (taken := self.latest(parts)) is not None:
            then(taken)
            return
        now = time.monotonic()
        if self._running and self._latest is not None and now - self._began > self.patience(self._latest):
            then(self._older(self._latest))
            return
        self._waiting.append(Question(self._epoch, now, frozenset(parts), then))
        self._start()
        self._deadline()

    def patience(self, latest: SharedSnapshot) -> float:
        """Seconds a question waits before it is answered with this older Snapshot."""
        usual = max(PATIENCE_S, USUAL * latest.took)
        return min(MOST_S, usual if latest.epoch == self._epoch else AFTER_ACTION * usual)

    def _deadline(self) -> None:
        """See to it that nobody waits longer than he should."""
        if self._waiting and not self._watching and self._latest is not None:
            self._watching = True
            waited = time.monotonic() - self._waiting[0].asked
            self._loop.later(max(0.0, self.patience(self._latest) - waited), self._late)

    def _late(self) -> None:
        self._watching = False
        now = time.monotonic()
        if self._latest is not None:
            longest = self.patience(self._latest)
            late = [each for each in self._waiting if now - each.asked >= longest]
            self._waiting = [each for each in self._waiting if now - each.asked < longest]
            for each in late:
                with unforeseen.contained("an answer with a snapshot", "survey"):
                    each.then(self._older(self._latest))
            self._deadline()

    def _older(self, latest: SharedSnapshot) -> SharedSnapshot:
        """The last Snapshot, with a finding that says its age; encoded once a second, however many ask."""
        now = time.monotonic()
        made_of = (latest.generation, self._epoch)
        if self._old is None or self._old_of != made_of or now - self._old_at > OLD_S:
            self._generation += 1
            age, under_way = (format_duration(int(since * 1e9)) for since in (now - latest.begun, now - self._began))
            what = f"this Snapshot is {age} old: the next one has been under way for {under_way}"
            if latest.epoch != self._epoch:
                what += "; what was done since is not in it"
            remedy = "find the process that blocks a read of /proc: ps -eo pid,stat,wchan:32,comm (state D)"
            finding = Finding("snapshot-old", Severity.WARNING, "snapshot", what, "the survey of the host", remedy)
            snapshot = replace(latest.snapshot, findings=(*latest.snapshot.findings, finding))
            encoded = msgspec.json.encode(snapshot)
            self._old = replaced(latest, generation=self._generation, snapshot=snapshot, encoded=encoded)
            self._old_of, self._old_at = made_of, now
        return self._old

    def _start(self) -> None:
        if self._running:
            return
        epoch, begun = self._epoch, time.monotonic()
        parts = frozenset(part for each in self._waiting for part in each.parts)
        self._began = begun
        self._generation += 1
        generation = self._generation

        def take() -> SharedSnapshot:
            snapshot = self._take(parts)
            encoded = msgspec.json.encode(snapshot)
            return SharedSnapshot(generation, snapshot, encoded, begun, time.monotonic() - begun, epoch, parts)

        def job() -> None:
            taken = unforeseen.attempt("the survey", "survey", take)
            self._loop.call(lambda: self._finished(taken, epoch, parts))

        self._running = self._pool.submit(job)
        if not self._running:
            self._finished(
                Refused("no snapshot is available", "the service is busy", "try again", code="Busy"), epoch, parts
            )

    def _finished(self, taken: SharedSnapshot | MemconsoleError, epoch: int, parts: frozenset[Part]) -> None:
        self._running = False
        if isinstance(taken, SharedSnapshot):
            self._latest = taken
        ready = [each for each in self._waiting if each.answered_by(epoch, parts)]
        self._waiting = [each for each in self._waiting if not each.answered_by(epoch, parts)]
        for each in ready:
            with unforeseen.contained("an answer with a snapshot", "survey"):
                each.then(taken)
        if self._waiting:
            self._start()
