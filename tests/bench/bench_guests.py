"""A QEMU of memconsole's against the same QEMU by itself: how its RAM is mapped, and how long all of it takes to read.

Both have their frames in place before. By itself: QEMU's own anonymous memory, for which it asks huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import Result, Skip, span

from memconsole.backend.guests import commandline
from memconsole.backend.kernel import procmaps
from memconsole.backend.peers.handle import spawn
from memconsole.backend.stores import memfd
from memconsole.model import Access

HUGE = 2 << 20
ROUNDS = 3
_COLLAPSE, _FIXED = 25, 0x10


class Monitor:
    """QMP, one command after the other."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._lines = self._socket.makefile("rw")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> object:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while True:
            said = json.loads(self._lines.readline())
            if "error" in said:
                raise Skip(f"QEMU refused {command}: {said['error']['desc']}")
            if "return" in said:
                return said["return"]


@contextlib.contextmanager
def qemu(words: Sequence[str], socket_path: Path, fds: Sequence[int] = ()) -> Iterator[tuple[int, Monitor]]:
    handle = spawn([*words, "-S"], socket_path.with_name("log"), *fds)
    try:
        yield handle.pid, Monitor(socket_path)
    finally:
        handle.kill()
        handle.close()


def collapsed(fd: int, size: int) -> None:
    """Every page of a memfd in place, in huge pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    room = libc.mmap(None, size + HUGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    at = -(-room // HUGE) * HUGE
    libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, fd, 0)
    ctypes.memset(at, 0, size)
    if libc.madvise(at, size, _COLLAPSE):
        raise Skip(f"no huge pages of a memfd: {os.strerror(ctypes.get_errno())}")
    libc.munmap(room, size + HUGE)


def figures(pid: int, monitor: Monitor, size: int) -> tuple[float, int]:
    """Percent of its RAM that is mapped by huge pages, and the ns all of it took to read, the least of some."""
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        monitor("pmemsave", val=0, size=size, filename="/dev/null")
        took.append(time.perf_counter_ns() - began)
    found = procmaps.paged("/", pid)
    vmas = [vma for vma in procmaps.vmas("/", pid) if vma.size == size]
    if not vmas:
        raise Skip("its RAM is not one mapping")
    return max(found[vma.start].huge for vma in vmas) * 100 / size, min(took)


def bench_qemu_by_huge_pages() -> list[Result]:
    if shutil.which(commandline.BINARY) is None or os.geteuid():
        raise Skip(f"it wants {commandline.BINARY}, and root")
    size = span("1G")
    with tempfile.TemporaryDirectory(prefix="mcg-") as directory:
        path = Path(directory) / "qmp"
        (fd,) = memfd.reserve_segments("bench", size)
        try:
            collapsed(fd, size)
            given = memfd.segment_fd(fd, Access.RW)
            words = commandline.started("bench", size, path, ("-accel", "tcg"))
            with qemu(words, path, (given,)) as (pid, monitor):
                ours, took = figures(pid, monitor, size)
            os.close(given)
        finally:
            memfd.free_segments([fd])
        path.unlink(missing_ok=True)
        alone = [commandline.BINARY, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        alone += [
            "-machine",
            "q35,memory-backend=ram",
            "-m",
            f"size={size}B",
            "-qmp",
            f"unix:{path},server=on,wait=off",
        ]
        alone += ["-object", f"memory-backend-ram,id=ram,size={size},prealloc=on"]
        with qemu(alone, path) as (pid, monitor):
            own, floor = figures(pid, monitor, size)
    return [
        Result("RAM of a QEMU that is mapped by huge pages, against the same QEMU alone", ours, "%", own, 1, "higher"),
        Result("all of its RAM read, against the same QEMU alone", took / 1e6, "ms", floor / 1e6, 1.15),
    ]
