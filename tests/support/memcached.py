"""memcached as tests speak to it, over its socket: items whose values follow from their keys."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import NamedTuple

from support.waiting import LONG_S, accepts, until

LEAST_MIB = 40
"""It takes 39 MiB at least."""
AT_ONCE = 500
"""So many items are asked for at once that their answers fit into a socket."""


def value(item: int) -> str:
    """The value of an item, 96 bytes."""
    return f"{item:08d}" * 12


class Memcached(NamedTuple):
    """One that listens on a socket; its answers are waited for so many seconds."""

    socket: Path
    patience: float = LONG_S

    def say(self, text: str, end: str) -> str:
        """What it answers, up to ``end``; raises OSError where it does not listen."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(self.patience)
            connection.connect(str(self.socket))
            connection.sendall(text.encode())
            heard = bytearray()
            while not heard.endswith(end.encode()):
                part = connection.recv(1 << 20)
                if not part:
                    raise ConnectionResetError("memcached ended in the middle of an answer")
                heard += part
            return heard.decode()

    def fill(self, items: int) -> None:
        """Give it so many items, once it listens; it has taken all when this returns."""
        until(lambda: accepts(self.socket), "memcached listens", self.patience)
        self.say("".join(f"set k{n} 0 0 96 noreply\r\n{value(n)}\r\n" for n in range(items)) + "version\r\n", "\r\n")

    def missing(self, items: range) -> int:
        """How many of these items it does not have as they were."""
        lacking = 0
        for start in range(0, len(items), AT_ONCE):
            asked = items[start : start + AT_ONCE]
            heard = self.say("".join(f"get k{n}\r\n" for n in asked) + "mn\r\n", "MN\r\n")
            lacking += sum(f"VALUE k{n} 0 96\r\n{value(n)}\r\n" not in heard for n in asked)
        return lacking

    def items(self) -> int:
        """How many items it has."""
        rows = self.say("stats\r\n", "END\r\n").splitlines()
        return next(int(row.split()[2]) for row in rows if row.startswith("STAT curr_items "))

    def answers(self) -> bool:
        """Whether it listens, and answers."""
        with contextlib.suppress(OSError):
            return self.say("version\r\n", "\r\n").startswith("VERSION")
        return False
