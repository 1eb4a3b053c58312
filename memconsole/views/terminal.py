"""The terminal a console is on, and its end: closed, with a signal or without, or SIGTERM.

Once a terminal is closed every write to it fails, which ends the writer of the driver, and the app then waits for the
writer for ever. What is written goes nowhere instead, so that the app can end in order, and its guests with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from textual.app import App

from memconsole import escaping
from memconsole.views import glyphs
from memconsole.views.private import Driver

_LOG_BYTES = 1 << 20


class Outlet:
    """A terminal's file as the driver's writer uses it; when it is gone this process gets SIGHUP, and writes vanish.

    With ``only_ascii`` glyphs that the terminal has not are written as their twins in ASCII.
    """

    def __init__(self, file: IO[str], *, only_ascii: bool = False) -> None:
        self._terminal = file
        self._only_ascii = only_ascii
        self._gone = False

    def fileno(self) -> int:
        """The terminal's file descriptor."""
        return self._terminal.fileno()

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        if not self._gone:
            try:
                self._terminal.write(glyphs.plain(text) if self._only_ascii else text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        """Have it written, or lost."""
        if not self._gone:
            try:
                self._terminal.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        self._gone = True
        os.kill(os.getpid(), signal.SIGHUP)


class Terminal(Driver):
    """The driver, which outlives its terminal for as long as the app needs to end."""

    def outlet(self, file: IO[str], app: App[Any]) -> Outlet:
        """What loses what is written once the terminal is gone."""
        setting = getattr(getattr(app, "settings", None), "glyphs", "")
        return Outlet(file, only_ascii=glyphs.only_ascii(setting, encoding=getattr(file, "encoding", None) or "ascii"))


async def run(app: App[Any], *, mouse: bool = True) -> None:
    """Run the app, with the mouse or without; a closed terminal (SIGHUP) and SIGTERM end it in order."""
    loop = asyncio.get_running_loop()

    def end(number: int, _: object) -> None:
        loop.call_soon_threadsafe(lambda: app.exit(return_code=128 + number))

    # Plain handlers: those of the loop would leave the default ones behind, and what follows wants its own.
    before = {number: signal.signal(number, end) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        await app.run_async(mouse=mouse)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Have the log written to a file while the terminal is the console's; the former half of it is kept beside."""
    log = logging.getLogger("memconsole")
    handler: logging.Handler
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    except OSError:  # a home that cannot be written to: the notices in the console are all there is
        handler = logging.NullHandler()
    handler.setFormatter(escaping.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(handler)
        handler.close()
