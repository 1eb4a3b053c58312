"""Somebody at a terminal: types, clicks, and reads what is on the screen; quickly for a test, slowly for an onlooker.

The program runs on a real pty; what it paints is read by a terminal emulator. With an onlooker every byte also goes to
the terminal that this runs on, its last line has a caption, and in the end the keyboard can be handed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyte

from support.waiting import LONG_S

KEYS = {
    "enter": "\r",
    "escape": "\x1b",
    "tab": "\t",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "right": "\x1b[C",
    "left": "\x1b[D",
}


@dataclass(frozen=True)
class Onlooker:
    """Who watches: seconds between keys, and for each caption."""

    key_s: float = 0.12
    caption_s: float = 2.5


class Person:
    """Somebody at the terminal of one program."""

    def __init__(self, fd: int, pid: int, size: tuple[int, int], onlooker: Onlooker | None) -> None:
        self._fd = fd
        self._pid = pid
        self._onlooker = onlooker
        self.size = size
        self._screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self._screen)

    # --- what is seen ---------------------------------------------------------------------------------------------

    @property
    def screen(self) -> str:
        """What is on the screen, a line a row."""
        return "\n".join(line.rstrip() for line in self._screen.display)

    def sees(self, *texts: str) -> None:
        """Wait until all of these are on the screen at once."""
        self._wait(lambda: all(text in self.screen for text in texts), f"{texts} on the screen")

    def sees_no_more(self, text: str) -> None:
        """Wait until this is not on the screen."""
        self._wait(lambda: text not in self.screen, f"the end of {text!r}")

    def finds(self, pattern: str) -> str:
        """Wait for a pattern on the screen; what its group matches."""
        self._wait(lambda: re.search(pattern, self.screen), f"{pattern!r} on the screen")
        found = re.search(pattern, self.screen)
        assert found is not None
        return found[1]

    def _wait(self, condition: object, what: str) -> None:
        deadline = time.monotonic() + LONG_S
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline or not self.takes_in(0.1):
                raise AssertionError(f"waited in vain for {what}; the screen:\n{self.screen}")

    def takes_in(self, seconds: float) -> bool:
        """Read what comes for so long; whether the program still runs."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not select.select([self._fd], [], [], left)[0]:
                return True
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:
                return False
            if not data:
                return False
            self._stream.feed(data)
            if self._onlooker is not None:
                os.write(sys.stdout.fileno(), data)
        return True

    # --- what is done ---------------------------------------------------------------------------------------------

    def presses(self, *keys: str) -> None:
        """Press keys by name (``enter``), or as they are written."""
        for key in keys:
            os.write(self._fd, KEYS.get(key, key).encode())
            self.takes_in(self._onlooker.key_s if self._onlooker is not None else 0.02)

    def types(self, text: str) -> None:
        """Type a text: a key after the other."""
        self.presses(*text)

    def clicks(self, text: str) -> None:
        """Click where a text begins."""
        self.sees(text)
        row, line = next((row, line) for row, line in enumerate(self._screen.display, 1) if text in line)
        place = f"0;{line.index(text) + 1};{row}"
        os.write(self._fd, f"\x1b[<{place}M\x1b[<{place}m".encode())
        self.takes_in(self._onlooker.key_s if self._onlooker is not None else 0.02)

    def commands(self, line: str) -> None:
        """Type a command on the ``:`` line, and wait for what it asks."""
        self.presses(":")
        self.types(line)
        self.presses("enter")

    def confirms(self) -> None:
        """Do what a plan proposes: its name where it asks for one."""
        name = self.finds(r"type (\S+) to confirm")
        self.types(name)
        self.presses("enter")

    def caption(self, text: str) -> None:
        """Tell the onlooker what comes now."""
        if self._onlooker is None:
            return
        row = self.size[1] + 1
        os.write(
            sys.stdout.fileno(),
            f"\x1b7\x1b[{row};1H\x1b[7m {text[: self.size[0] - 2]:<{self.size[0] - 1}}\x1b[0m\x1b8".encode(),
        )
        self.takes_in(self._onlooker.caption_s)

    def hands_over(self) -> None:
        """Give the keyboard to who sits at this terminal, until the program ends."""
        self.caption("the keyboard is yours; q leaves")
        before = termios.tcgetattr(0)
        tty.setraw(0)
        try:
            while self.takes_in(0.02):
                if select.select([0], [], [], 0)[0]:
                    os.write(self._fd, os.read(0, 1 << 12))
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def person(
    words: Sequence[str],
    *,
    size: tuple[int, int] = (132, 42),
    env: Mapping[str, str] | None = None,
    onlooker: Onlooker | None = None,
) -> Iterator[Person]:
    """Somebody at a program that is started, and ended with it."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe(
            words[0], list(words), {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(env or {})}
        )
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    try:
        yield Person(fd, pid, size, onlooker)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)
