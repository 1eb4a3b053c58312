"""Memory of a known shape for tests: a memfd mapped in a process of its own, and an independent reader of pagemaps."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE = 4096
TREE = Path(__file__).parents[2]

_HOLD = """
import ctypes, mmap, sys
fd, size, touched = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
memory = mmap.mmap(fd, size)
for span in touched:
    first, last = map(int, span.split("-"))
    for page in range(first, last):
        memory[page * 4096] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


def need_frames() -> None:
    """Skips the test where the kernel hides frame numbers."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(ctypes.addressof(ctypes.c_char.from_buffer(bytearray(1))) // PAGE * 8)
        if not struct.unpack("<Q", file.read(8))[0] & ((1 << 55) - 1):
            pytest.skip("frame numbers are for CAP_SYS_ADMIN")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def growth() -> Iterator[Callable[[], int]]:
    """By how many bytes this process's resident memory is, at most, above what it was (VmHWM, from where it is now)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    yield lambda: max(0, _status("VmHWM") - before)


@contextlib.contextmanager
def memfd(size: int, flags: int = 0) -> Iterator[int]:
    fd = os.memfd_create("memconsole-test", os.MFD_CLOEXEC | flags)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def holder(fd: int, size: int, *touched: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that maps ``size`` bytes of fd and touches page spans (``0-512``): the process, and the address."""
    command = [sys.executable, "-c", _HOLD, str(fd), str(size), *touched]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(fd,)) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def read_pagemap(pid: int, start: int, length: int) -> list[int]:
    """The raw entry of every page, read one by one."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        entries = []
        for address in range(start, start + length, PAGE):
            file.seek(address // PAGE * 8)
            entries.append(struct.unpack("<Q", file.read(8))[0])
    return entries


def page_types() -> str:
    """The kernel's page-types, or a skip."""
    candidates = [
        os.environ.get("MEMCONSOLE_PAGE_TYPES"),
        shutil.which("page-types"),
        TREE / "../shared/lab/page-types",
    ]
    found = next((str(path) for path in candidates if path and Path(path).exists()), None)
    if found is None:
        pytest.skip("no page-types: name one in MEMCONSOLE_PAGE_TYPES")
    return found


@contextlib.contextmanager
def mapped(fd: int, size: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(fd, size) as memory:
        yield memory
