"""Asking others without waiting for them longer than a looker may be kept: guests, custody, the mount's server.

    looker ── begin ─→ question under way, one at most ── answer, with its time ─→ hear, until the looker's deadline

Each has a thread of its own, which waits for it however long it takes: one that hangs holds up its own thread and
nobody else. What it last answered stays, with its age.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from memconsole import unforeseen
from memconsole.errors import MemconsoleError

PATIENCE_S = 2.0
"""Seconds a Snapshot waits for all whom it asks, together; after them who has not answered is silent."""
AGAIN_S = 0.1
"""Seconds it waits for one that was silent before."""

T = TypeVar("T")


class Polled(NamedTuple, Generic[T]):
    """The last answer and when it came, ns since the epoch, if ever; ``why`` there is no newer one, or empty."""

    answer: T | None
    at_ns: int | None
    why: str = ""


class Poller(Generic[T]):
    """One who is asked ``question``, in a thread named ``name``; every method may be called from any thread."""

    def __init__(self, name: str, question: Callable[[], T]) -> None:
        self._name = name
        self._question = question
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wanted = self._begun = self._ended = 0
        self._since: float | None = None
        self._heard: Polled[T] = Polled(None, None, "it was never asked")
        self._then: Callable[[], None] | None = None
        self._closed = False

    def begin(self) -> int:
        """Ask now, or as soon as the question under way has its answer; the number of the question."""
        with self._changed:
            if not self._closed:
                self._wanted = self._begun + 1
                if self._thread is None:
                    self._thread = unforeseen.thread(f"memconsole-{self._name}", self._run)
                    self._thread.start()
                self._changed.notify_all()
            return self._begun + 1

    def poll(self, number: int, deadline: float) -> Polled[T]:
        """The answer to a question if it comes until ``deadline`` (monotonic), else the last one there was."""
        with self._changed:
            was_silent = self._ended > 0 and bool(self._heard.why)
            if was_silent or (self._since is not None and time.monotonic() - self._since > PATIENCE_S):
                deadline = min(deadline, time.monotonic() + AGAIN_S)
            self._changed.wait_for(lambda: self._ended >= number or self._closed, max(0.0, deadline - time.monotonic()))
            if self._ended >= number:
                return self._heard
            since = self._since if self._since is not None else time.monotonic()
            why = self._heard.why if was_silent else f"no answer for {time.monotonic() - since:.1f} s"
            return self._heard._replace(why=why)

    def end(self, then: Callable[[], None] = lambda: None) -> None:
        """Ask no more; ``then`` is called once no question is under way: now, or in the thread that asks."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            under_way = self._since is not None
            if under_way:
                self._then = then
            self._changed.notify_all()
        if not under_way:
            then()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted > self._begun or self._closed)
                if self._closed:
                    break
                self._begun += 1
                self._since = time.monotonic()
            heard = self._ask()
            with self._changed:
                self._heard, self._ended, self._since = heard, self._begun, None
                self._changed.notify_all()
        if self._then is not None:
            self._then()

    def _ask(self) -> Polled[T]:
        said = unforeseen.attempt(f"the question to {self._name}", "survey", self._question)
        if isinstance(said, MemconsoleError):
            return self._heard._replace(why=str(said))
        return Polled(said, time.time_ns())
