"""The memfds of this host: who holds one, who maps it, how large it is, and how it is sealed.

    /proc/PID/fd/N          /memfd:NAME (deleted), or "/ (deleted)" once retrieved from a live update session
    /proc/PID/fdinfo/N      ino: INODE

Two processes share a memfd when device and inode agree.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.tree import Root

_F_GET_SEALS = 1034
SEALS = {0x01: "seal", 0x02: "shrink", 0x04: "grow", 0x08: "write", 0x10: "future_write", 0x20: "exec"}
_PREFIX = "/memfd:"
RETRIEVED = "/ (deleted)"
"""What a memfd is called that came by live update."""


def holders(
    census: Census, objects: Collection[tuple[int, int]], places: Collection[str] = ()
) -> list[tuple[int, int]]:
    """Who holds an fd of these memfds, or files in ``places``, given as (st_dev, st_ino) of this host: (PID, fd).

    Raises:
        Denied, KernelRefused: an fd cannot be looked at.
    """
    found = []
    for process, fd, _ in _held(census, places):
        path = f"{process.place}/fd/{fd}"
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ESRCH}:
                continue
            raise tree.failure(path, error) from error
        if (status.st_dev, status.st_ino) in objects:
            found.append((process.pid, fd))
    return found


def seal_names(bits: int) -> tuple[str, ...]:
    """The seals in an F_GET_SEALS answer, by name."""
    return tuple(name for bit, name in SEALS.items() if bits & bit)


def _held(census: Census, places: Collection[str] = ()) -> Iterator[tuple[Process, int, str]]:
    for process in census.processes.values():
        for fd, link in process.fds.items():
            if link.startswith(_PREFIX):
                yield process, fd, link.removeprefix(_PREFIX).removesuffix(" (deleted)")
            elif link == RETRIEVED or (places and link.rpartition("/")[0] in places):
                yield process, fd, ""


def inode(root: Root, place: str, fd: int) -> int:
    """The inode an fd is open on (fdinfo/FD:ino) of the process, or the thread, whose files in /proc are at ``place``.

    Raises:
        Gone, NotFound, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"{place}/fdinfo/{fd}"
    for row in tree.read(root, source).split(b"\n"):
        if row.startswith(b"ino:"):
            try:
                return int(row[4:])
            except ValueError as error:
                raise tree.malformed(source, row) from error
    raise tree.malformed(source, "no ino")
