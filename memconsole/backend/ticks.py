"""What a control process does of itself, again and again: each job in a thread of its own.

A job that hangs holds up no other. Its errors are logged when they change, and it is tried again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from memconsole import unforeseen
from memconsole.errors import MemconsoleError

log = logging.getLogger("memconsole.ticks")

ENDS_S = 15.0
"""Seconds a job under way has to end: longer than anybody may take to answer it."""


class Ticks:
    """Jobs that are done until :meth:`close`."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, name: str, every_s: float, job: Callable[[], None]) -> None:
        """Do a job every so many seconds, for the first time once they have passed."""
        thread = unforeseen.thread(f"memconsole-{name}", partial(self._run, name, every_s, job))
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Do nothing more, once what is under way has ended."""
        self._ending.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(ENDS_S)

    def _run(self, name: str, every_s: float, job: Callable[[], None]) -> None:
        complaint = ""
        while not self._ending.wait(every_s):
            failed = unforeseen.attempt(name, "job", job)
            if isinstance(failed, MemconsoleError) and failed.code != unforeseen.CODE and str(failed) != complaint:
                log.warning("%s: %s", name, failed)
            complaint = str(failed or "")
