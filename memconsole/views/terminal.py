"""The terminal a console is on, and its end: closed, with a signal or without, or SIGTERM.

Once a terminal is closed every write to it fails, which ends the writer of the driver, and the app then waits for the
writer for ever. What is written goes nowhere instead, so that the app can end in order, and its guests with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import IO, Any

from textual.app import App
from textual.drivers.linux_driver import LinuxDriver


class Outlet:
    """A terminal's file as the driver's writer uses it; when it is gone this process gets SIGHUP, and writes vanish."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._gone = False

    def fileno(self) -> int:
        """The terminal's file descriptor."""
        return self._file.fileno()

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        if not self._gone:
            try:
                return self._file.write(text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        """Have it written, or lost."""
        if not self._gone:
            try:
                self._file.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        self._gone = True
        os.kill(os.getpid(), signal.SIGHUP)


class Terminal(LinuxDriver):
    """The driver, which outlives its terminal for as long as the app needs to end."""

    def __init__(self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: Any = None) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._file: Any = Outlet(self._file)


async def run(app: App[Any]) -> None:
    """Run the app; a closed terminal (SIGHUP) and SIGTERM end it in order, whatever it would lose."""
    loop = asyncio.get_running_loop()

    def end(number: int, _: object) -> None:
        loop.call_soon_threadsafe(lambda: app.exit(return_code=128 + number))

    # Plain handlers: those of the loop would leave the default ones behind, and what follows wants its own.
    before = {number: signal.signal(number, end) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        await app.run_async()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
