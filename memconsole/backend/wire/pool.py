"""Threads for what may block, with a bounded queue: what does not fit is refused at once, not kept waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from memconsole import unforeseen


class Pool:
    """At most ``threads`` daemon threads, started as they are needed, behind at most ``waiting`` jobs."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._name = name
        self._most_threads = threads
        self._most_jobs = threads + waiting
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._unfinished = 0
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> bool:
        """Have ``job`` run by a thread; false if too many wait already. What it raises is only logged."""
        with self._lock:
            if self._unfinished >= self._most_jobs:
                return False
            self._unfinished += 1
            if self._unfinished > len(self._threads) and len(self._threads) < self._most_threads:
                thread = unforeseen.thread(f"{self._name}-{len(self._threads)}", self._work)
                self._threads.append(thread)
                thread.start()
        self._jobs.put(job)
        return True

    def close(self, within: float) -> None:
        """Let the jobs under way and waiting come to their end, for at most so many seconds each thread."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(within)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with unforeseen.contained(f"a job of {self._name}", "job"):
                job()
            with self._lock:
                self._unfinished -= 1
