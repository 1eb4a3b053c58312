"""What every store's segments have in common: each is a file of this kernel, told apart by device and inode."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence

from msgspec.structs import replace

from memconsole.backend.kernel.memfds import seal_names
from memconsole.errors import KernelRefused
from memconsole.model import Access, Region, RegionState, Segment

SEGMENT = 512 << 30
"""Bytes of a segment at most: the kernel's array of preserved folios has no room for 1 TiB."""


def segments(fds: Sequence[int]) -> tuple[Segment, ...]:
    """The segments by the inode and device their mappings show in /proc/PID/maps."""
    found = [os.fstat(fd) for fd in fds]
    return tuple(Segment(stat.st_ino, stat.st_dev, stat.st_size) for stat in found)


def opened_again(fd: int, access: Access, what: str) -> int:
    """A new file description of a segment, read-only for ``ro``, which the caller closes.

    Raises:
        KernelRefused: it cannot be opened; ``what`` says of what.
    """
    flags = os.O_RDWR if access is Access.RW else os.O_RDONLY
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused("open", error.errno or 0, what=f"{what} cannot be opened") from None


def meant(region: Region) -> Region:
    """A region as its memory says of itself: without what is of one boot, or is said beside it."""
    return replace(region, state=RegionState.RESERVED, segments=(), grants=(), seen=None)


def resident_bytes(fds: Sequence[int]) -> int:
    """Bytes that have frames (fstat:st_blocks)."""
    return sum(os.fstat(fd).st_blocks * 512 for fd in fds)


def seals(fd: int) -> tuple[str, ...]:
    """The names of a segment's seals (F_GET_SEALS); a file of a kind that has none has none."""
    try:
        return seal_names(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return ()
        raise


def was_preserved(fd: int) -> bool:
    """Whether a segment was handed over by the kernel before, which hands the file over and not its name."""
    return os.readlink(f"/proc/self/fd/{fd}") == "/ (deleted)"  # noqa: PTH115 - on the path of every snapshot
