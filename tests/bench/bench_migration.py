"""QEMU's migration stream filtered as it comes out of a pipe, against reading the same pipe and looking at nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable

from harness import Result, span
from support.streams import PAGE, Page, Stream

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
