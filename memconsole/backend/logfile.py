"""The log of a service in the background: a file that stays small, whatever is written into it.

    serve.log       what fd 2 is, of this process and of those it starts
    serve.log.1 ... what was in it before, the last first

A service under a service manager has its journal instead, which bounds itself. Either way the lines are written by a
thread of their own: a terminal that is halted, a pipe that is not read and a journal that hangs hold up no action.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
from pathlib import Path

from memconsole import unforeseen

LARGEST = 8 << 20
"""Bytes of one file."""
KEPT = 3
"""Files that are kept beside it."""
MOST = 4096
"""Records that wait to be written; what comes after them is left out, and counted."""
ENDS_S = 1.0
"""Seconds that the end of the process waits for what is still to be written."""
_LINE = 16 << 10
"""Characters of one record: a long trace is cut in its middle."""


def opened(path: Path) -> int:
    """A log file to append to, made if it is missing, which only this user reads; the caller closes it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


class Stderr(logging.Handler):
    """Writes to fd 2 as it is, past the buffer and the lock of ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a stream that is closed takes none."""
        left = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(2, left) :]


class RotatingStderr(Stderr):
    """Writes to fd 2, which is the file at ``path``, and puts a new one in its place when that has grown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def format(self, record: logging.LogRecord) -> str:
        """One record, no longer than a record may be."""
        text = super().format(record)
        half = _LINE // 2
        return (
            text
            if len(text) <= _LINE
            else f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, into a new file if the old one is full."""
        super().emit(record)
        if os.fstat(2).st_size > LARGEST:
            # A disk without room for a new file keeps the old one.
            with contextlib.suppress(OSError):
                self._rotate()

    def _rotate(self) -> None:
        for number in range(KEPT - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._numbered(number).rename(self._numbered(number + 1))
        self._path.rename(self._numbered(1))
        fd = opened(self._path)
        os.dup2(fd, 2)
        os.close(fd)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


class Detached(logging.Handler):
    """Has another handler write in a thread of its own; the text of a record is made where it is logged."""

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__()
        self._inner = inner
        self._text = inner.format
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(MOST)
        self._left_out = 0
        inner.format = lambda record: record.getMessage()  # type: ignore[method-assign]
        unforeseen.thread("memconsole-log", self._run).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have one record written, or left out where too many wait."""
        try:
            self._lines.put_nowait(self._ready(record))
        except queue.Full:
            self._left_out += 1

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        waiting = self._lines
        with waiting.all_tasks_done:
            waiting.all_tasks_done.wait_for(lambda: not waiting.unfinished_tasks, ENDS_S)

    def _ready(self, record: logging.LogRecord) -> logging.LogRecord:
        return logging.makeLogRecord({"levelno": record.levelno, "msg": self._text(record)})

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            self._inner.emit(line)  # not under its lock, which the end of the process would wait for
            if self._left_out and self._lines.empty():
                missing, self._left_out = self._left_out, 0
                record = logging.LogRecord(
                    "memconsole.log", logging.WARNING, "", 0, "%d lines left out", (missing,), None
                )
                self._inner.emit(self._ready(record))
            self._lines.task_done()
