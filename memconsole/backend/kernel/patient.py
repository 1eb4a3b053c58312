"""Reading what the kernel shows of processes, without waiting for one that is locked up.

Whoever reads the maps, smaps, cmdline, environ, pagemap or map_files of a process takes the lock of its memory map. A
process that holds it over something that does not end (a disk or a server that does not answer) keeps the reader in the
kernel, and no signal but SIGKILL gets it out. So such reads are made by threads of their own::

    caller ── each(pids, read) ─→ reader thread ── pid after pid ──→ answers
       └─ looks again and again: a reader that is blocked is left to itself, and another one goes on behind its process

Only a reader that the kernel keeps in uninterruptible sleep counts as blocked (/proc/self/task/TID/stat: state D, and
not one time slice since): one that waits for a processor, or for this interpreter, does not. A process whose reader is
blocked is not asked again before that one came back.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from memconsole import unforeseen
from memconsole.errors import MemconsoleError, Silent

WITHIN_S = 2.0
"""Seconds that a reader may be blocked on one process; the same for all whose readers are blocked at the same time."""
LOOK_S = 0.25
NEXT_LOOK_S = 0.025
"""Seconds between two looks once one reader is blocked: where one process is locked up, so may hundreds be."""

T = TypeVar("T")
_inside = threading.local()
_changing = threading.Lock()
_blocked: dict[int, float] = {}
"""The processes whose readers are blocked, with since when (monotonic)."""
_idle: list[_Reader] = []


class _Round(Generic[T]):
    """What one reader is to read, and has read."""

    def __init__(self, pids: Sequence[int], read: Callable[[int], T]) -> None:
        self.pids = pids
        self.at = 0
        self.answers: dict[int, T | BaseException] = {}
        self.done = threading.Event()
        self.left = False
        self._read = read

    def run(self) -> None:
        for at, pid in enumerate(self.pids):
            self.at = at
            try:
                self.answers[pid] = self._read(pid)
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                self.answers[pid] = error
            if self.left:
                break
        self.done.set()

    def rest(self) -> Sequence[int]:
        """Leave the reader to itself; what it has not begun."""
        self.left = True
        return self.pids[self.at + 1 :]


class _Reader:
    """A thread that reads; ``tid`` is the kernel's number of it."""

    def __init__(self) -> None:
        self.tid = 0
        self._rounds: queue.SimpleQueue[_Round[Any] | None] = queue.SimpleQueue()
        unforeseen.thread("memconsole-reader", self._run).start()

    def begin(self, round: _Round[Any]) -> None:
        self._rounds.put(round)

    def end(self) -> None:
        self._rounds.put(None)

    def _run(self) -> None:
        self.tid = threading.get_native_id()
        _inside.reading = True
        while (round := self._rounds.get()) is not None:
            round.run()
            if round.left:
                with _changing:
                    _blocked.pop(round.pids[round.at], None)
                return

    def stands(self) -> tuple[str, str]:
        """Its state and its time slices, as the kernel has them."""
        state = slices = ""
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/self/task/{self.tid}/stat", encoding="ascii", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
            with open(f"/proc/self/task/{self.tid}/schedstat", encoding="ascii") as file:
                slices = file.read()
        return state, slices


class _Watch(Generic[T]):
    """A reader at its round, and since when it is seen blocked on the same process."""

    def __init__(self, round: _Round[T]) -> None:
        self.round = round
        self.reader = _take()
        self.reader.begin(round)
        self._stood: tuple[int, str, str] = (-1, "", "")
        self._since = 0.0

    def blocked_s(self) -> float:
        """Seconds for which it is blocked; 0 if it is not."""
        stands = (self.round.at, *self.reader.stands())
        if stands != self._stood or stands[1] != "D":
            self._stood, self._since = stands, time.monotonic()
            return 0.0
        return time.monotonic() - self._since


def call(pid: int, read: Callable[[int], T]) -> T:
    """What ``read`` makes of a process.

    Raises:
        Silent: its memory map is locked. Otherwise as ``read``.
    """
    answer = each([pid], read)[pid]
    if isinstance(answer, MemconsoleError):
        raise answer
    return answer


def each(pids: Sequence[int], read: Callable[[int], T]) -> dict[int, T | MemconsoleError]:
    """What ``read`` makes of each process, or its error: ``Silent`` of one whose memory map is locked."""
    answers: dict[int, T | MemconsoleError] = {}
    with _changing:
        known = {pid: since for pid, since in _blocked.items() if pid in pids}
    for pid, since in known.items():
        answers[pid] = _silent(pid, time.monotonic() - since)
    left = [pid for pid in pids if pid not in known]
    if getattr(_inside, "reading", False):
        return answers | _plain(left, read)
    suspects: list[_Watch[T]] = []
    while left:
        watch = _Watch(_Round(left, read))
        left = []
        while not watch.round.done.wait(NEXT_LOOK_S if suspects else LOOK_S):
            if watch.blocked_s():
                left = list(watch.round.rest())
                suspects.append(watch)
                break
        else:
            _give(watch.reader)
        answers |= _answers(watch.round)
    for watch in suspects:
        _last_look(watch, answers)
    return answers


def _last_look(watch: _Watch[T], answers: dict[int, T | MemconsoleError]) -> None:
    """Wait for a reader that was blocked, unless it is so for too long."""
    pid = watch.round.pids[watch.round.at]
    while not watch.round.done.is_set():
        if (blocked := watch.blocked_s()) > WITHIN_S:
            with _changing:
                if not watch.round.done.is_set():
                    _blocked[pid] = time.monotonic() - blocked
            answers[pid] = _silent(pid, blocked)
            return
        watch.round.done.wait(NEXT_LOOK_S)
    answers |= _answers(watch.round)


def _plain(pids: Sequence[int], read: Callable[[int], T]) -> dict[int, T | MemconsoleError]:
    round = _Round(pids, read)
    round.run()
    return _answers(round)


def _answers(round: _Round[Any]) -> dict[int, Any]:
    found = {}
    for pid, answer in list(round.answers.items()):
        if isinstance(answer, BaseException) and not isinstance(answer, MemconsoleError):
            raise answer
        found[pid] = answer
    return found


def _silent(pid: int, seconds: float) -> Silent:
    why = f"the lock of its memory map has not been given up for {seconds:.0f} s"
    remedy = f"see what it waits for: cat /proc/{pid}/task/*/stack"
    return Silent(f"process {pid} does not show its memory", why, remedy)


def _take() -> _Reader:
    with _changing:
        return _idle.pop() if _idle else _Reader()


def _give(reader: _Reader) -> None:
    with _changing:
        if not _idle:
            _idle.append(reader)
            return
    reader.end()


def _forget() -> None:
    """In a child of this process there are no such threads."""
    global _changing  # noqa: PLW0603
    _changing = threading.Lock()
    _blocked.clear()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)
