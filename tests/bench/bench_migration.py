"""QEMU's migration stream filtered as it comes out of a pipe, against reading the same pipe and looking at nothing.

And private RAM of a QEMU that is moved into a file (``guest adopt --copy``), against QEMU's own live migration to a
descriptor whose reader discards it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import Result, Skip, span
from support.streams import PAGE, Page, Stream

from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.guests.statestream import StateStream
from memconsole.backend.managers.migration import Elsewhere, filtered
from memconsole.units import format_size

PIECE = 1 << 20
"""What QEMU's end of the pipe holds, as the drivers set it."""
ROUNDS = 5


def stream(size: int) -> bytes:
    """One of so many bytes of RAM, no page of it of zeros."""
    head, tail = Stream((("pc.ram", size),), ((Page("pc.ram", 0, b"\1" * PAGE),),)).raw().split(b"\1" * PAGE)
    page = os.urandom(PAGE)
    records = (struct.pack(">Q", at | 0x28) + page for at in range(PAGE, size, PAGE))
    return head + b"\1" * PAGE + b"".join(records) + tail


def through_pipe(raw: bytes, reader: Callable[[int], object]) -> float:
    """GB/s at which a reader takes what another thread writes."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIECE)

    def write() -> None:
        rest = memoryview(raw)
        while rest:
            rest = rest[os.write(writing, rest[:PIECE]) :]
        os.close(writing)

    writer = threading.Thread(target=write)
    begin = time.perf_counter_ns()
    writer.start()
    reader(reading)
    took = time.perf_counter_ns() - begin
    writer.join()
    os.close(reading)
    return len(raw) / took


def only_read(fd: int) -> None:
    """Read to the end, in the pieces that the filter reads in."""
    buffer = bytearray(256 << 10)
    while os.readv(fd, [buffer]):
        pass


def bench_filter() -> list[Result]:
    """Pages thrown away, and pages put where they belong."""
    size = span("512M")
    raw = stream(size)
    sink, none = os.memfd_create("sink", os.MFD_CLOEXEC), os.open("/dev/null", os.O_WRONLY)
    os.ftruncate(sink, size)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, sink)
        stack.callback(os.close, none)
        best = dict.fromkeys(("floor", "dropped", "put"), 0.0)
        for _ in range(ROUNDS):  # in turns: noise hits all
            runs: dict[str, Callable[[int], object]] = {
                "floor": only_read,
                "dropped": lambda fd: filtered(fd, none, (Elsewhere("pc.ram", size),), lock=True),
                "put": lambda fd: filtered(fd, none, (Elsewhere("pc.ram", size, sink),), lock=True),
            }
            for name, reader in runs.items():
                best[name] = max(best[name], through_pipe(raw, reader))
    what = f"migration stream of {format_size(size)}, its pages"
    return [
        Result(f"{what} thrown away, against the pipe", best["dropped"], "GB/s", best["floor"], 1.5, "higher", True),
        Result(f"{what} put into a file, against the pipe", best["put"], "GB/s", best["floor"], None, "higher"),
    ]


@contextlib.contextmanager
def private(size: int) -> Iterator[tuple[int, Callable[..., Any]]]:
    """A QEMU that runs with so much RAM of its own, no page of it of zeros: its PID and its monitor."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise Skip("there is no qemu-system-x86_64")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        place = Path(name)
        with (place / "ram").open("wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(os.urandom(1 << 20))
        ram = f"memory-backend-file,id=pc.ram,size={size},share=off,prealloc=on,mem-path={place}/ram"
        words = ("-machine", "q35,memory-backend=pc.ram", "-accel", "tcg", "-object", ram, "-m", f"{size >> 20}")
        alone = ("-nodefaults", "-no-user-config", "-display", "none")
        socket = ("-qmp", f"unix:{place}/qmp,server=on,wait=off")
        with subprocess.Popen([qemu, *words, *alone, *socket]) as process:
            try:
                while not (place / "qmp").exists():
                    time.sleep(0.01)
                with contextlib.closing(Qmp("bench", place / "qmp")) as qmp:

                    def ask(command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:
                        return qmp.execute(command, arguments, within=60.0, fd=fd)

                    yield process.pid, ask
            finally:
                process.kill()


def discarded(ask: Callable[..., Any]) -> float:
    """Seconds that QEMU's migration takes into a pipe whose reader looks at nothing."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIECE)
    ask("getfd", {"fdname": "discards"}, writing)
    os.close(writing)
    reader = threading.Thread(target=only_read, args=(reading,))
    reader.start()
    ask("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    begin = time.perf_counter()
    ask("migrate", {"uri": "fd:discards"})
    reader.join()
    while ask("query-migrate", {})["status"] != "completed":
        time.sleep(0.001)
    took = time.perf_counter() - begin
    os.close(reading)
    ask("cont", {})
    return took


def moved(pid: int, ask: Callable[..., Any], size: int) -> float:
    """Seconds that it takes into a file of a tmpfs, from the first question to the last byte of its state."""
    with contextlib.ExitStack() as stack:
        fds = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("ram", "state")]
        for fd in fds:
            stack.callback(os.close, fd)
        os.ftruncate(fds[0], size)
        stream = StateStream("bench", pid, ask, fds[1], (Elsewhere("pc.ram", size, fds[0]),))
        begin = time.perf_counter()
        for step in stream.steps():
            step.do()
        took = time.perf_counter() - begin
        assert stream.taken is not None
        for step in reversed(stream.steps()):
            if step.undo is not None:
                step.undo()
        return took


def bench_copy() -> list[Result]:
    """RAM that only its QEMU has, moved while it is there; in turns, the best of each."""
    size = span("1G")
    with private(size) as (pid, ask):
        best = {"floor": float("inf"), "moved": float("inf")}
        for _ in range(3):
            best["floor"] = min(best["floor"], discarded(ask))
            best["moved"] = min(best["moved"], moved(pid, ask, size))
    what = (
        f"--copy: {format_size(size)} of private RAM moved into a file, against QEMU's migration to a pipe that is read"
    )
    return [Result(what, best["moved"], "s", best["floor"], 1.3)]
