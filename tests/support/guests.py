"""What the tests of guests share: a hub in a short directory, agents in processes of their own, a reader of pagemap."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Self

from memconsole import agent as wire
from memconsole.backend.exports.fd import Hub
from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.kernel.census import links
from memconsole.backend.stores import files, memfd
from memconsole.model import Access, Segment
from support.waiting import LONG_S


@contextlib.contextmanager
def hubs() -> Iterator[Callable[[], Hub]]:
    """Make hubs, one after the other on the same socket; a path of a unix socket has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="mc-"))
    made: list[Hub] = []

    def make() -> Hub:
        if made:
            made[-1].close()
        made.append(Hub(directory / "agents"))
        return made[-1]

    try:
        yield make
    finally:
        for hub in made:
            hub.close()
        rmtree(directory)


@contextlib.contextmanager
def region(size: int, **options: bool) -> Iterator[int]:
    """A region of one segment."""
    (fd,) = memfd.reserve_segments("test", size, **options)
    try:
        yield fd
    finally:
        memfd.free_segments([fd])


@contextlib.contextmanager
def given(fd: int, grant: str, length: int, *, access: Access = Access.RW, gpa: int | None = 0) -> Iterator[Offer]:
    """A grant of a region's first bytes."""
    mine = memfd.segment_fd(fd, access)
    try:
        yield Offer(grant, mine, 0, length, access, gpa)
    finally:
        os.close(mine)


class Obedient:
    """A process that does what a line on its stdin says, and answers with one; it is killed in the end.

    It has the descriptors ``pass_fds`` too.
    """

    def __init__(self, command: Sequence[str | Path], pass_fds: Sequence[int] = ()) -> None:
        self.process = subprocess.Popen(
            command, pass_fds=pass_fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def do(self, *words: object) -> str:
        """What it answers; an empty string if it died of it."""
        self.tell(*words)
        return self.line()

    def tell(self, *words: object) -> None:
        """Have it begin, and wait for nothing."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        """The next line it says; an empty string if it ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> int:
        """Kill it, if it did not end; how it ended."""
        self.process.kill()
        self.process.communicate()
        return self.process.returncode

    def finish(self) -> int:
        """Have it end in order, for it is told nothing more; how it ended."""
        self.process.communicate()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


AGENT = """
import sys
from memconsole.agent import Agent
agent = Agent(sys.argv[1])
view = None
for line in sys.stdin:
    words = line.split()
    if words[0] == "read":
        said = bytes(agent.grants[words[1]].memory[: int(words[2])]).decode()
    elif words[0] == "write":
        try:
            agent.grants[words[1]].memory[: len(words[2])] = words[2].encode()
            said = "done"
        except TypeError as error:
            said = f"refused {error}"
    elif words[0] == "wait":
        said = agent.wait(words[1], 600).id
    elif words[0] == "hold":
        view = agent.grants[words[1]].memory[:10]
        said = "done"
    elif words[0] == "let-go":
        view.release()
        said = "done"
    elif words[0] == "spread":  # another part of the same file, by a mapping that needs no descriptor
        import ctypes, os
        paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        path = next(p for p in paths if os.path.lexists(p) and os.readlink(p).startswith("/memfd:memconsole:"))
        fd = int(path.rpartition("/")[2])
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        spread = libc.mmap(None, 4096, 3, 1, fd, int(words[1]))
        ctypes.memmove(spread, b"spread", 6)
        said = "done"
    elif words[0] == "drop":  # the mapping alone, and say nothing
        import ctypes
        memory = agent.grants[words[1]].memory
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ctypes.CDLL(None).munmap(ctypes.c_void_p(place), ctypes.c_size_t(len(memory)))
        said = "done"
    elif words[0] == "spin":  # for so many seconds, and no other thread gets its turn
        import time
        sys.setswitchinterval(1e6)
        print("spins", flush=True)
        ends = time.monotonic() + float(words[1])
        while time.monotonic() < ends:
            pass
        sys.setswitchinterval(0.005)
        said = "done"
    elif words[0] == "look":
        said = ctypes.string_at(spread, 6).decode()
    elif words[0] == "grants":
        said = " ".join(sorted(agent.grants)) or "none"
    print(said, flush=True)
agent.close()
"""


class AgentProcess(Obedient):
    """A process with an agent that does what it is told."""

    def __init__(self, path: Path) -> None:
        super().__init__([sys.executable, "-c", AGENT, str(path)])


def sweep(guest: CanaryGuest, within: float) -> tuple[int, int]:
    """Have a canary check every page at once: how many were checked, and how many bytes are wrong."""
    answer = guest._ask(wire.Type.SWEEP, within, patient=True)
    return answer.pages, answer.wrong


def knock(path: Path) -> socket.socket:
    """A bare connection to an agents socket, from this process."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(LONG_S)
    connection.connect(str(path))
    return connection


def greet(connection: socket.socket, *held: str) -> None:
    """Say HELLO."""
    body = wire.HELLO.pack(0, len(held)) + b"".join(wire.pack_name(name) for name in held)
    connection.send(wire.pack(wire.Type.HELLO, 0, body))


def hung_up(connection: socket.socket) -> bool:
    """Whether the other side closes the connection, what it still sent aside."""
    try:
        while connection.recv(wire.MAX_MESSAGE):
            pass
    except ConnectionResetError:
        return True
    return True


def fd_links(pid: int) -> dict[Path, str]:
    """The open fds of a process that lives on: their links in /proc, and what they say; some go meanwhile."""
    return {Path(f"/proc/{pid}/fd/{fd}"): said for fd, said in links("/", pid).items()}


HUGE = 2 << 20


def collapse(fd: int, size: int) -> None:
    """Fill the first bytes of a memfd, and have the kernel put them into huge pages, whatever its settings are."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room = libc.mmap(None, size + HUGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    at = -(-room // HUGE) * HUGE
    shared, fixed, collapses = mmap.MAP_SHARED, 0x10, 25
    assert libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, shared | fixed, fd, 0) == at
    ctypes.memset(at, 0, size)
    refused = libc.madvise(at, size, collapses)
    libc.munmap(room, size + HUGE)
    if refused:
        import pytest  # scenarios of the lab import this module, and have none

        pytest.skip(f"this kernel makes no huge pages of a memfd: {os.strerror(ctypes.get_errno())}")


def read(pid: int, start: int, size: int) -> None:
    """Have a process fault its memory in, at each page, as an access of its own would."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for at in range(start, start + size, 4096):
            memory.seek(at)
            memory.read(1)


def frames(pid: int | str, address: int, pages: int) -> list[int]:
    """PFNs of pages of a process, 0 where none is present: /proc/PID/pagemap, bits 0-54 and 63."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as file:
        file.seek(address // 4096 * 8)
        words = struct.unpack(f"{pages}Q", file.read(pages * 8))
    return [word & ((1 << 55) - 1) if word >> 63 else 0 for word in words]


def own_frames(fd: int, size: int) -> list[int]:
    """PFNs of a memfd, through a mapping of our own that touches every page."""
    import ctypes

    with mmap.mmap(fd, size) as mapping:
        for at in range(0, size, 4096):
            mapping[at]
        anchor = ctypes.c_char.from_buffer(mapping)
        found = frames("self", ctypes.addressof(anchor), size // 4096)
        del anchor
    return found


def segment_of(fd: int) -> Segment:
    """The segment a memfd is: told from files of other kinds, whose inodes are counted alike, by its device."""
    (found,) = files.segments([fd])
    return found


def mapping_of(pid: int, segment: Segment) -> tuple[int, int]:
    """Address and length of the largest mapping of a segment in a process (/proc/PID/maps)."""
    device = f"{os.major(segment.device):02x}:{os.minor(segment.device):02x}"
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split()
        if words[3:5] == [device, str(segment.inode)]:
            start, end = (int(word, 16) for word in words[0].split("-"))
            found.append((end - start, start))
    length, start = max(found)
    return start, length
