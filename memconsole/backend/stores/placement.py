"""Where a memfd's frames come from, and when: node binding, huge folios, population; through libc.

Apart from the store because ctypes and thread pools cost start-up time that a plain reservation need not pay.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import ENOSYS

_MADV_POPULATE_WRITE = 23
_MPOL_BIND = 2
_SYS_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
_PART = 256 << 20
_LET_GO = 32 << 20
"""Bytes that are mapped at a time, where what is in place is let go of again: it would count as resident here."""


def place(fd: int, size: int, *, huge: bool, node: int | None, populate: bool) -> None:
    """Reserve hugetlb pages for a memfd, bind it to a NUMA node, put its pages in place.

    ``huge``: it is a hugetlb memfd. ``populate``: in place now, in 2 MiB folios where the kernel has them for shmem.

    Raises:
        OSError: mmap, mbind or madvise failed.
    """
    # Mapping hugetlb pages reserves them for the inode; a shmem inode keeps the policy of its mappings. A hugetlb
    # inode does not: what must come from one node has to come now.
    with _mapped(fd, size) as address:
        if node is not None:
            _bind(address, size, node)
        if not huge:
            _libc().madvise(address, size, mmap.MADV_HUGEPAGE)  # advice: kernels without it go on in 4 KiB
        if populate or (node is not None and huge):
            _populate(address, size, huge=huge)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    libc.syscall.argtypes = [ctypes.c_long, pointer, size, number, pointer, ctypes.c_ulong, ctypes.c_uint]
    libc.syscall.restype = ctypes.c_long
    return libc


def _failure(what: str) -> OSError:
    errno = ctypes.get_errno()
    return OSError(errno, f"{what}: {os.strerror(errno)}")


@contextmanager
def _mapped(fd: int, size: int) -> Iterator[int]:
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise _failure("mmap")
    try:
        yield address
    finally:
        libc.munmap(address, size)


def _bind(address: int, size: int, node: int) -> None:
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << (node % 64)
    number = _SYS_MBIND.get(os.uname().machine)
    if number is None:
        raise OSError(ENOSYS, "mbind on this processor")
    if _libc().syscall(number, address, size, _MPOL_BIND, ctypes.addressof(mask), words * 64 + 1, 0):
        raise _failure("mbind")


def _populate(address: int, size: int, *, huge: bool) -> None:
    libc, step = _libc(), _PART if huge else _LET_GO

    def part(offset: int) -> None:
        at, length = address + offset, min(step, size - offset)
        if libc.madvise(at, length, _MADV_POPULATE_WRITE):
            raise _failure("MADV_POPULATE_WRITE")
        if not huge:  # pages of the hugetlb pool are not counted
            libc.madvise(at, length, mmap.MADV_DONTNEED)  # advice: they stay in the file

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(part, range(0, size, step)):
            pass
