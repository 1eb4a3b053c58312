"""A guest that keeps every way into its memory (tests/host/hostile_revoke.c), and what it says of each."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.guests import Obedient

TREE = Path(__file__).parents[2]
SECRET, LATER = b"SECRET01", b"LATER-02"
PINS = {"pipe", "ring"}
"""The ways that no revoke can close: what they lead to is quarantined."""


def build(directory: Path) -> Path:
    """Compile it."""
    program = directory / "hostile_revoke"
    strict = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    sources = [TREE / "tests/host" / name for name in ("hostile_revoke.c", "hostile_fds.c")]
    subprocess.run(["cc", *strict, "-I", TREE / "memconsole/native", "-o", program, *sources], check=True)
    return program


@contextlib.contextmanager
def no_fresh_files() -> Iterator[None]:
    """This process, and what it starts, can make no memory file as large as the region: contents cannot be moved."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Hostile(Obedient):
    """One such process."""

    def ready(self) -> None:
        """Wait until it has mapped its grant and pinned its pages."""
        assert self._line() == "ready"

    def tries(self) -> dict[str, str]:
        """What each way leads to now: 8 bytes of contents, or why not."""
        return dict(line.split(" ", 1) for line in self._told("try"))

    def scrawls(self) -> None:
        """Have it write by every way it has."""
        self._told("scrawl")

    def drops_pins(self) -> None:
        """Have it let its pins go."""
        self._told("drop")

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def _told(self, word: str) -> list[str]:
        self.tell(word)
        # It is granted its memory again by a control process that does not know that it was given back.
        return [line for line in iter(self._line, "end") if line != "ready"]

    def _line(self) -> str:
        line = self.line()
        assert line, "it ended"
        return line


ACCOMPLICE = """
import mmap, os, socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
fd = memory = None
for line in sys.stdin:
    try:
        if line == "take\\n":
            fd = socket.recv_fds(end, 1, 1)[1][0]
            said = os.pread(fd, 8, 0).decode() or "nothing"
        elif line == "map\\n":
            memory = mmap.mmap(fd, 4096)
            said = memory[:8].decode()
        else:
            said = memory[:8].decode()
    except (OSError, ValueError) as error:
        said = f"refused: {error}"
    print(said, flush=True)
"""


class Accomplice(Obedient):
    """A process that is no child of the hostile one, and is sent its fd, which it takes or leaves in the socket.

    It can ``take`` what was sent, ``map`` it, ``look`` at it, and says the word that is there.
    """

    def __init__(self) -> None:
        mine, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            super().__init__([sys.executable, "-c", ACCOMPLICE, str(mine.fileno())], [mine.fileno()])

    def ended(self) -> int | None:
        """How it ended, if it did."""
        return self.process.poll()

    def end(self) -> int:
        """Kill it, if it did not end, and close our side of its socket."""
        self.socket.close()
        return super().end()


@contextlib.contextmanager
def accomplices() -> Iterator[tuple[Accomplice, Accomplice]]:
    """Two of them."""
    with contextlib.ExitStack() as stack:
        found = Accomplice(), Accomplice()
        for each in found:
            stack.callback(each.end)
        yield found


@contextlib.contextmanager
def running(program: Path, agents: Path, manners: str, *accomplices: Accomplice) -> Iterator[Hostile]:
    """One that knocks at an agents socket; ``manners``: ``ignore`` or ``lie``."""
    ends = [accomplice.socket.detach() for accomplice in accomplices]
    with Hostile([program, agents, manners, *map(str, ends)], ends) as found:
        for end in ends:
            os.close(end)
        yield found
