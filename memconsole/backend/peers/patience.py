"""How long a process is waited for, told by what it does and not by the clock alone.

A process that the host gives no processor to cannot answer, and is not dead. So the time in which one of its threads
ran or waited for a processor is not held against it; the time in which all of them slept, or were stopped, is. A
process that is busy for ever is waited for ``MOST`` times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from memconsole.backend.kernel import schedule, tree

MOST = 12
"""A machine with a load of so many is one on which everything takes so many times as long."""


class Patience:
    """So many seconds for a process that owes something; ``most`` times as many where it is busy all the time.

    Where the kernel does not count (no ``schedstat``), and with ``most`` 1, they are seconds of the clock.
    """

    def __init__(self, pid: int, seconds: float, *, most: float = MOST, root: tree.Root = "/") -> None:
        self._pid, self._seconds, self._most, self._root = pid, seconds, most, root
        self._silent = 0.0
        self._begun = self._looked = time.monotonic()
        self._before = self._threads()

    def left(self) -> float:
        """Seconds that may be waited before this is asked again; 0 when there is no reason to wait any longer."""
        now, threads = time.monotonic(), self._threads()
        busy = max((_wanted(threads[tid], self._before.get(tid, (0, 0))) for tid in threads), default=0.0)
        self._silent += max(0.0, now - self._looked - busy)
        self._looked, self._before = now, threads
        return max(0.0, min(self._seconds - self._silent, self._begun + self._most * self._seconds - now))

    def _threads(self) -> dict[int, tuple[int, int]]:
        return schedule.threads(self._root, self._pid) if self._most > 1 else {}

    def lasts(self, wait: Callable[[float], object]) -> bool:
        """Whether what ``wait`` is given seconds to wait for comes, and it returns true, before patience is over."""
        while not wait(left := self.left()):
            if not left:
                return False
        return True


def _wanted(now: tuple[int, int], before: tuple[int, int]) -> float:
    return (sum(now) - sum(before)) / 1e9
