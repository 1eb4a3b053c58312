"""The memfds of this host: who holds one, who maps it, how large it is, and how it is sealed.

    /proc/PID/fd/N          /memfd:NAME (deleted), or "/ (deleted)" once retrieved from a live update session
    /proc/PID/fdinfo/N      ino: INODE

Two processes share a memfd when device and inode agree.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from memconsole.backend.kernel import procmaps, tree
from memconsole.backend.kernel.census import Census
from memconsole.errors import Gone

_F_GET_SEALS = 1034
SEALS = {0x01: "seal", 0x02: "shrink", 0x04: "grow", 0x08: "write", 0x10: "future_write", 0x20: "exec"}
_PREFIX = "/memfd:"
RETRIEVED = "/ (deleted)"
"""What a memfd is called that came by live update."""


@dataclass(slots=True)
class Memfd:
    """One memfd: sizes in bytes (None on a recorded tree), seals by name (None where they may not be read)."""

    device: int
    inode: int
    name: str
    size: int | None = None
    resident: int | None = None
    page_size: int | None = None
    seals: tuple[str, ...] | None = None
    holders: list[tuple[int, int]] = field(default_factory=list)
    mappers: list[int] = field(default_factory=list)


def memfds(census: Census) -> tuple[Memfd, ...]:
    """Every memfd that a visible process holds (PID, fd) or maps (PID), by device and inode.

    Raises:
        KernelRefused, BadFile: one of them cannot be read.
    """
    found: dict[tuple[int, int], Memfd] = {}
    for pid, fd, name in _held(census):
        try:
            memfd = _memfd(census, pid, fd, name)
        except Gone:
            continue
        found.setdefault((memfd.device, memfd.inode), memfd).holders.append((pid, fd))
    for process in census.processes.values():
        if b"/memfd:" not in process.maps and b" / (deleted)" not in process.maps:
            continue
        for vma in procmaps.parse(process.maps, b"/memfd:", b" / (deleted)"):
            name = vma.path.removeprefix(_PREFIX).removeprefix("/")
            memfd = found.setdefault((vma.device, vma.inode), Memfd(vma.device, vma.inode, name))
            if process.pid not in memfd.mappers:
                memfd.mappers.append(process.pid)
    return tuple(found[key] for key in sorted(found))


def holders(census: Census, objects: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    """Who holds an fd of these memfds, given as (st_dev, st_ino) of this host: (PID, fd).

    Raises:
        Denied, KernelRefused: an fd cannot be looked at.
    """
    found = []
    for pid, fd, _ in _held(census):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ESRCH}:
                continue
            raise tree.failure(path, error) from error
        if (status.st_dev, status.st_ino) in objects:
            found.append((pid, fd))
    return found


def seal_names(bits: int) -> tuple[str, ...]:
    """The seals in an F_GET_SEALS answer, by name."""
    return tuple(name for bit, name in SEALS.items() if bits & bit)


def _held(census: Census) -> Iterator[tuple[int, int, str]]:
    for process in census.processes.values():
        for fd, link in process.fds.items():
            if link.startswith(_PREFIX):
                yield process.pid, fd, link.removeprefix(_PREFIX).removesuffix(" (deleted)")
            elif link == RETRIEVED:
                yield process.pid, fd, ""


def _memfd(census: Census, pid: int, fd: int, name: str) -> Memfd:
    if not tree.live(census.root):
        return Memfd(_MEMFD_DEVICE, inode(census, pid, fd), name)
    path = f"/proc/{pid}/fd/{fd}"
    try:
        status = os.stat(path)
    except OSError as error:
        raise tree.failure(path, error) from error
    return Memfd(
        status.st_dev,
        status.st_ino,
        name,
        status.st_size,
        status.st_blocks * 512,
        status.st_blksize,
        _seals(path),
    )


_MEMFD_DEVICE = os.makedev(0, 1)
"""The kernel's own shmem mount, the first of its unnamed devices; a recorded tree cannot be asked."""


def inode(census: Census, pid: int, fd: int) -> int:
    """The inode an fd of a process is open on (/proc/PID/fdinfo/FD:ino).

    Raises:
        Gone, NotFound, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"/proc/{pid}/fdinfo/{fd}"
    for row in tree.read(census.root, source).split(b"\n"):
        if row.startswith(b"ino:"):
            try:
                return int(row[4:])
            except ValueError as error:
                raise tree.malformed(source, row) from error
    raise tree.malformed(source, "no ino")


def _seals(path: str) -> tuple[str, ...] | None:
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            return None
        raise tree.failure(path, error) from error
    try:
        return seal_names(fcntl.fcntl(fd, _F_GET_SEALS))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return ()
        raise tree.failure(path, error) from error
    finally:
        os.close(fd)
