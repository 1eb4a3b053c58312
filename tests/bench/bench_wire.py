"""Calls to a service over this host, with consoles attached, against a server that only sends back what it got."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import Result

from memconsole.backend.wire.client import Client
from memconsole.backend.wire.client import ClientConnection as Raw
from memconsole.backend.wire.dialing import Local
from memconsole.extents import ExtentTable

SECONDS = 3.0
CONSOLES = 50

SERVICE = """
import sys
from pathlib import Path
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.wire.serving import serve_in_thread
sys.setswitchinterval(0.001)
control = Control(Path(sys.argv[1]), OwnCustody())
serving = serve_in_thread(control, sys.argv[1] + "/control")
print("ready", flush=True)
sys.stdin.read()
serving.close()
control.close()
"""

TABLES = """
import os, sys
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.extents import Extent, ExtentTable
sys.path.insert(0, sys.argv[2])
from support.served import ServedSource
class Tables(ServedSource):
    table = ExtentTable.from_rows(Extent(16 * i, (i * 7919) << 5, 16, 1) for i in range(1 << 20))
    def extents(self, key, at_ns=None):
        return self
    fd, page_size, close = table.fd, table.page_size, lambda self: None
    def __len__(self):
        return len(self.table)
serving = serve_in_thread(Tables(), sys.argv[1] + "/control")
print("ready", flush=True)
sys.stdin.read()
serving.close()
"""

ATTACHED = """
import sys, time
from memconsole.backend.wire.client import Client
consoles = [Client(sys.argv[1] + "/control") for _ in range(int(sys.argv[3]))]
print("ready", flush=True)
while True:
    for console in consoles:
        console.snapshot()
        time.sleep(1 / len(consoles))
"""

ECHO = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + "/control")
listener.listen()
print("ready", flush=True)
sock, _ = listener.accept()
while data := sock.recv(65536):
    sock.sendall(data)
"""


@contextlib.contextmanager
def running(program: str) -> Iterator[Path]:
    """A process that runs ``program`` with a directory as its argument; the socket it serves."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", program, directory, str(Path(__file__).parents[1])]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"ready\n"
                yield Path(directory) / "control"
            finally:
                process.stdin.close()
                process.wait(30)


@contextlib.contextmanager
def attached(path: Path, count: int) -> Iterator[None]:
    """So many consoles with nobody at their keys: each takes a Snapshot a second."""
    command = [sys.executable, "-c", ATTACHED, str(path.parent), "", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


def latencies(call: Callable[[], object], seconds: float = SECONDS) -> list[float]:
    """Microseconds of each of as many calls as fit, shortest first."""
    took = []
    end = time.perf_counter() + seconds
    begin = time.perf_counter()
    while begin < end:
        call()
        now = time.perf_counter()
        took.append((now - begin) * 1e6)
        begin = now
    return sorted(took)


def p99(took: list[float]) -> float:
    return took[int(len(took) * 0.99)]


def echo() -> list[float]:
    """The floor: a message there and back between two Python processes."""
    with running(ECHO) as path, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))

        def call() -> None:
            sock.sendall(b"x" * 100)
            sock.recv(65536)

        return latencies(call)


def bench_calls() -> list[Result]:
    floor = echo()
    results = []
    with running(SERVICE) as path, contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(Client(path)))
        last = client.events(0)[-1].seq if client.events(0) else 0
        stack.enter_context(attached(path, CONSOLES))
        whole = stack.enter_context(contextlib.closing(Raw(Local(path))))
        for name, call in (
            ("snapshot (sent when it changed)", client.snapshot),
            ("snapshot, whole JSON each time", lambda: whole.call("GetSnapshot", {}, 10)),
            ("events", lambda: client.events(last)),
        ):
            took = latencies(call)
            rate = len(took) / SECONDS
            goal = 3000 if "whole" not in name else None
            results += [
                Result(f"calls a second: {name}", rate, "1/s", None, goal, "higher"),
                Result(f"p99 of a call: {name}", p99(took) / 1000, "ms", None, 2),
                Result(
                    f"median of a call, against an echo: {name}", took[len(took) // 2], "us", floor[len(floor) // 2]
                ),
            ]
    return results


def bench_table() -> list[Result]:
    """The PFN map of a guest of 64 GiB in 1,048,576 extents (24 MiB), from the service to a mapping in the client."""
    with running(TABLES) as path, contextlib.closing(Client(path)) as client:
        took = latencies(lambda: client.extents("guest:large").close(), 1.0)
        with client.extents("guest:large") as table:
            here = latencies(lambda: ExtentTable.from_fd(table.fd).close(), 1.0)
    name = "1,048,576 extents from the service, against opening them here"
    return [Result(name, took[len(took) // 2], "us", here[len(here) // 2], 1.2)]
