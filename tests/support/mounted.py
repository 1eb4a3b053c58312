"""A service with a mount, through its deaths and those of the mount's server, and processes that use the files."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from memconsole import actions as do
from memconsole.backend.exports.fuse import FuseTree
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.wire.client import Client
from memconsole.errors import Gone
from memconsole.model import RevokeReport, Rung, Snapshot
from support.guests import Obedient, own_frames
from support.mounts import NOBODY, end_at, wait_gone
from support.services import Service, services
from support.waiting import until

SIZE = 4 << 20

USER = """
import mmap, os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
ours, theirs = socket.socketpair()
fd = memory = None
for line in sys.stdin:
    word, *more = line.split()
    said = "done"
    try:
        if word == "open":
            fd = os.open(more[0], os.O_RDWR)
        elif word == "close":
            os.close(fd)
        elif word == "map":
            memory = mmap.mmap(fd, os.fstat(fd).st_size)
        elif word == "unmap":
            memory.close()
        elif word == "write":
            memory[: len(more[0])] = more[0].encode()
        elif word == "read":
            said = bytes(memory[:6]).decode().strip("\\0") or "nothing"
        elif word == "send":
            socket.send_fds(ours, [b"."], [fd])
        elif word == "receive":
            fd = socket.recv_fds(theirs, 1, 1)[1][0]
    except OSError as error:
        said = error.strerror
    print(said, flush=True)
"""


class User(Obedient):
    """A process of some user that does what it is told; it ends with the test."""

    def __init__(self, uid: int = NOBODY) -> None:
        super().__init__([sys.executable, "-c", USER, str(uid)])


def patience(at_most: Rung) -> float:
    """Seconds a revoke is given: what must succeed may take its time, what is only asked for is refused at the end."""
    return 2.0 if at_most is Rung.ASK else 60.0


class Place:
    """A service with a mount, its client, and processes that end with the test."""

    def __init__(self, service: Service, stack: contextlib.ExitStack) -> None:
        self.service = service
        self.point = service.directory / "mnt"
        self._stack = stack
        self.client = self.start()

    def start(self, fault: str = "") -> Client:
        self.service.start("--mount", str(self.point), env={FAULT_VARIABLE: fault})
        self.client = self.service.client()
        self._stack.callback(self.client.close)
        return self.client

    def stop(self) -> None:
        """kill -9."""
        self.client.close()
        if self.service.process is not None:
            self.service.process.kill()
            self.service.process.communicate()
            self.service.process = None

    def restart(self, fault: str = "") -> None:
        """kill -9, and another one, which dies at a fault point."""
        self.stop()
        self.start(fault)

    def _after(self, time_ns: int) -> bool:
        return self.client.snapshot().taken_ns > time_ns

    def shown(self) -> Snapshot:
        """A Snapshot begun from now on: the one after one taken from now on. The mount follows soon, by itself."""
        for _ in range(2):
            now = time.time_ns()
            until(partial(self._after, now), "a new Snapshot")
        return self.client.snapshot()

    def kill_server(self) -> int:
        """The mount's server dies; its PID."""
        with contextlib.closing(FuseTree(self.service.runtime / "fuse")) as tree:
            os.kill(tree.pid, signal.SIGKILL)
            wait_gone(tree.pid)
            return tree.pid

    def server(self) -> int:
        """The PID of the mount's server; 0 while there is none."""
        with contextlib.suppress(Gone), contextlib.closing(FuseTree(self.service.runtime / "fuse")) as tree:
            return tree.pid
        return 0

    def mounted_anew(self, after: int) -> None:
        """Wait until another server than the one ``after`` which it comes shows the tree."""
        until(lambda: self.server() not in {0, after}, "another server mounts", 60.0)
        until(self._shows, "the tree is shown")

    def _shows(self) -> bool:
        with contextlib.suppress(OSError):  # of a dead server
            return (self.point / "guests").stat() is not None
        return False

    def user(self, uid: int = NOBODY) -> User:
        """A process that already runs as its user: what it is granted belongs to whom it is when it is attached."""
        user = User(uid)
        self._stack.callback(user.end)
        assert user.do("nothing") == "done"
        return user

    def at_end(self, do: Callable[[], object]) -> None:
        """Something to be done when the test is over."""
        self._stack.callback(do)

    def path(self, guest: str, region: str) -> Path:
        return self.point / "guests" / guest / "ram" / region

    def frames(self, path: Path) -> list[int]:
        """The PFNs of a file of the mount, through a mapping of it."""
        fd = os.open(path, os.O_RDWR)
        try:
            return own_frames(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def owners(self, region: str) -> Path:
        return self.point / "regions" / region

    def grant(self, user: User, *, name: str = "web", region: str = "pool") -> Path:
        """A process becomes a guest with a whole region: the file."""
        self.client.apply(do.Reserve(region, SIZE))
        self.client.apply(do.GuestAttach(name, user.pid))
        self.client.apply(do.Map(region, name))
        return self.path(name, region)

    def revoke(self, grant: str = "g1", at_most: Rung = Rung.KILL) -> RevokeReport:
        report = self.client.apply(do.Revoke(grant, within=patience(at_most), at_most=at_most)).revoke
        assert report is not None
        return report


@contextlib.contextmanager
def places() -> Iterator[Place]:
    """A service that shows memory as files, or a skip."""
    if os.geteuid():
        pytest.skip("mounting is for root")
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse")
    with services() as service, contextlib.ExitStack() as stack:
        service.directory.chmod(0o755)
        stack.callback(lambda: end_at(service.runtime, service.directory))
        place = Place(service, stack)
        stack.callback(place.stop)
        with contextlib.closing(FuseTree(service.runtime / "fuse")) as tree:
            if tree.status().passthrough:
                pytest.skip(tree.status().capability().why)
        yield place


def unexpected(snapshot: Snapshot) -> list[str]:
    return [
        finding.observed for finding in snapshot.findings if finding.id.startswith(("mapping-", "grant-", "mount-"))
    ]
