"""Page faults served by the native thread, against a minimal handler in C in the same run."""

from __future__ import annotations

import ctypes
import os

from harness import Result, span
from memory_floors import memory_floors

from memconsole.backend.exports.userfault import MINOR, FaultService, KeptUffd
from memconsole.units import format_size

ROUNDS = 7


def per_fault(size: int, batch: int, *, ours: bool) -> float:
    """Nanoseconds a fault takes whoever touches the memory, a page of every batch touched once."""
    library = memory_floors()
    registered = (ctypes.c_uint64 * 3)()
    library.floor_register(ctypes.c_uint64(size), registered)
    uffd, fd, address = (int(value) for value in registered)
    board = os.memfd_create("board", os.MFD_CLOEXEC)
    try:
        if ours:
            handed = KeptUffd("g1", "bench", os.getpid(), 0, address, size, 0, 4096, MINOR, True)
            service = FaultService(handed, uffd, fd, board, batch)
            took = library.floor_touch(address, size, batch)
            while service.read().minor < size // batch:  # the last one is counted when its page is there
                pass
            service.close()
        else:
            library.floor_serve(uffd, batch)
            took = library.floor_touch(address, size, batch)
            library.floor_stop()
    finally:
        os.close(board)
        library.floor_unregister(registered, ctypes.c_uint64(size))
    return float(took) / (size // batch)


def held(size: int, batch: int) -> Result:
    """Ours and the floor in turns: noise hits both."""
    floor, ours = [], []
    for _ in range(ROUNDS):
        floor.append(per_fault(size, batch, ours=False))
        ours.append(per_fault(size, batch, ours=True))
    name = f"fault served, {format_size(batch)} at a time"
    return Result(name, min(ours) / 1e3, "us", min(floor) / 1e3, 1.2)


def bench_faults() -> list[Result]:
    """Single pages, the default batch, and 2 MiB batches."""
    return [held(span("64M"), 4096), held(span("256M"), 64 << 10), held(span("512M"), 2 << 20)]
