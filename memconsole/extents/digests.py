"""Digests of what files hold, by the native core."""

from __future__ import annotations

import os

from memconsole import native
from memconsole.errors import UsageError
from memconsole.extents.opening import whole
from memconsole.native import ffi, lib


def digest_region(fd: int, offset: int, length: int, threads: int = 0) -> str:
    """xxh3-128 over the xxh3-128 of each 2 MiB of ``length`` bytes from ``offset`` on, as hex.

    ``threads`` 0 is one a CPU this process may use. A hole counts as the zeros it reads as and is not filled.

    Raises:
        UsageError: beyond the end of the file. KernelRefused: it cannot be read.
    """
    what = "a digest cannot be made"
    digest = ffi.new("uint8_t[16]")
    offset, length = whole("offset", offset, what), whole("length", length, what)
    threads = threads or min(len(os.sched_getaffinity(0)), 256)
    if not 0 < threads <= 256:
        raise UsageError(what, f"{threads} threads")
    native.call(what, lib.mc_digest, fd, offset, length, threads, digest)
    return bytes(ffi.buffer(digest)).hex()


def digest_fd(fd: int, threads: int = 0) -> str:
    """:func:`digest_region` of a whole file."""
    return digest_region(fd, 0, os.fstat(fd).st_size, threads)
