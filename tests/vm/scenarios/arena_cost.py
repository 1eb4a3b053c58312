"""What an arena costs beside memfds and beside its own plain files: a file cut, and pages touched through the mount.

arena_cost MB ROUNDS
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support import lab_guest as lab
from support.lab_host import MADV_POPULATE_WRITE

from memconsole.backend.exports.fuse import FuseTree
from memconsole.backend.kernel import pmem
from memconsole.backend.stores import arena, memfd
from memconsole.backend.stores.dax import DaxStore

SIZE, ROUNDS = int(sys.argv[1]) << 20, int(sys.argv[2])
RUN = Path("/run/memconsole")
HUGE = 2 << 20
FIXED, NO_ACCESS = 0x10, 0

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.mmap.restype = ctypes.c_size_t
libc.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]


@contextlib.contextmanager
def touched(fd: int) -> Iterator[int]:
    """All of a file mapped at a multiple of 2 MiB and touched; the nanoseconds that the touching took."""
    room = libc.mmap(0, SIZE + HUGE, NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = -(-room // HUGE) * HUGE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(address, SIZE, access, mmap.MAP_SHARED | FIXED, fd, 0) == address, ctypes.get_errno()
    began = time.perf_counter_ns()
    assert not libc.madvise(address, SIZE, MADV_POPULATE_WRITE), ctypes.get_errno()
    took = time.perf_counter_ns() - began
    try:
        yield took
    finally:
        libc.munmap(room, SIZE + HUGE)


def cut_memfd() -> int:
    (fd,) = memfd.reserve_segments("bench", SIZE)
    with touched(fd):
        began = time.perf_counter_ns()
        memfd.empty_segments([fd])
        took = time.perf_counter_ns() - began
    os.close(fd)
    return took


def cut_arena(store: DaxStore) -> int:
    (fd,) = store.reserve_segments("bench", SIZE, 4096, None, prefault=False, promised=0)
    with touched(fd):
        began = time.perf_counter_ns()
        store.empty_segments([fd])
        took = time.perf_counter_ns() - began
    store.discard("bench")
    os.close(fd)
    return took


def first_touches(store: DaxStore) -> tuple[list[int], list[int]]:
    """Nanoseconds of the plain file, and of the same one through the mount, in turns."""
    (fd,) = store.reserve_segments("bench", SIZE, 4096, None, prefault=False, promised=0)
    point = RUN / "mnt"
    point.mkdir()
    tree = FuseTree.start(RUN, point)
    for name in ("guests", "guests/bench", "guests/bench/ram"):
        tree.directory(name)
    file = os.open(tree.add_ram("bench", "ram", fd), os.O_RDWR)
    plain, through = [], []
    for _ in range(3 * ROUNDS):
        with touched(fd) as took:
            plain.append(took)
        with touched(file) as took:
            through.append(took)
    os.close(file)
    tree.close()
    os.close(fd)
    return plain, through


def main() -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    store = DaxStore(RUN, lasting=True)
    (device,) = pmem.devices("/")
    arena.create("bench", device, RUN)
    memfds, arenas = [], []
    for _ in range(ROUNDS):
        memfds.append(cut_memfd())
        arenas.append(cut_arena(store))
    lab.say("cost", of="cut", floor_ns=memfds, ours_ns=arenas)
    plain, through = first_touches(store)
    lab.say("cost", of="touch", floor_ns=plain, ours_ns=through)
    lab.say("end")


main()
