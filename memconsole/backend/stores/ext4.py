"""ext4 as an arena uses it: its tools, its superblock, where a file lies, and how a file is cut for good.

superblock (at byte 1024)   +0x04 u32 blocks   +0x18 u32 log2(block size) - 10   +0x38 u16 0xEF53   +0x3a u16 state
                            +0x60 u32 incompatible features   +0x68 uuid[16]   +0x78 label[16]   +0x150 u32 blocks, high
                            little-endian
fiemap                      u64 start  u64 length  u32 flags  u32 mapped  u32 count  u32 0   extent*
extent                      u64 logical  u64 physical  u64 length  u64[2]  u32 flags  u32[3]    bytes

Sources: fs/ext4/ext4.h, include/uapi/linux/{fiemap,fs}.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memconsole.errors import KernelRefused, NotFound, Refused

BLOCK = 4096
CLUSTER = 2 << 20
"""What an arena is given out in: so every file's extents are 2 MiB aligned, whatever was freed before (bigalloc)."""
_SUPER, _SUPER_SIZE, _MAGIC = 1024, 1024, 0xEF53
_ERRORS, _RECOVER, _64BIT, _LARGEST = 0x2, 0x4, 0x80, 6
_FIEMAP = 0xC020660B
_HEAD, _EXTENT = struct.Struct("<QQIIII"), struct.Struct("<QQQQQIIII")
_MOST = 4096
_LAST, _UNKNOWN, _DELALLOC, _INLINE = 0x1, 0x2, 0x4, 0x200
_GETFLAGS, _SETFLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
_LONG = struct.Struct("l")
_KEEP_SIZE, _INLINE_EXTENTS = 1, 4
SHALLOW = 256 << 20
"""Bytes of the largest file that surely needs no list of extents; a larger one takes :data:`LIST` besides."""
LIST = (_INLINE_EXTENTS + 2) * CLUSTER
"""What a large file needs besides, while it is made; all but one cluster is free again afterwards."""
TOOL_S = 600.0
"""Seconds a tool has: mkfs of a range of terabytes takes its time."""


class Run(NamedTuple):
    """A part of a file in one piece of the device; bytes."""

    logical: int
    physical: int
    length: int


class Super(NamedTuple):
    """What an ext4 superblock says of itself: ``size`` in bytes.

    ``errors``: it has noted some; ``replays``: its journal is not empty.
    """

    label: str
    uuid: str
    errors: bool = False
    replays: bool = False
    size: int = 0


def superblock(raw: bytes) -> Super | None:
    """What the first bytes of a device say, where they are of an ext2, ext3 or ext4."""
    block = raw[_SUPER : _SUPER + _SUPER_SIZE]
    if len(block) < 0x88 or struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        return None
    label = block[0x78:0x88].split(b"\0")[0].decode("utf-8", "backslashreplace")
    state, incompatible = struct.unpack_from("<H", block, 0x3A)[0], struct.unpack_from("<I", block, 0x60)[0]
    low, power = struct.unpack_from("<I", block, 0x04)[0], struct.unpack_from("<I", block, 0x18)[0]
    high = struct.unpack_from("<I", block.ljust(_SUPER_SIZE, b"\0"), 0x150)[0] if incompatible & _64BIT else 0
    size = (high << 32 | low) << (10 + min(power, _LARGEST))
    return Super(label, block[0x68:0x78].hex(), bool(state & _ERRORS), bool(incompatible & _RECOVER), size)


def runs(fd: int, size: int) -> tuple[Run, ...]:
    """Where the first ``size`` bytes of a file lie on its device, in order of the file, neighbours joined (FIEMAP).

    Nothing is touched, so a page that was never written has its place all the same.

    Raises:
        KernelRefused: the file system does not say, or has not decided yet.
    """
    found: list[Run] = []
    at = 0
    while at < size:
        extents = _extents(fd, at, size - at)
        for logical, physical, length, flags in extents:
            if flags & (_UNKNOWN | _DELALLOC | _INLINE):
                raise KernelRefused("FIEMAP", errno.EIO, what="a part of a region has no place in the arena")
            found = _joined(found, Run(logical, physical, min(length, size - logical)))
            at = logical + length
        if not extents or extents[-1][3] & _LAST:
            break
    return tuple(found)


def _joined(found: list[Run], run: Run) -> list[Run]:
    last = found[-1] if found else None
    if last and (last.logical + last.length, last.physical + last.length) == (run.logical, run.physical):
        return [*found[:-1], last._replace(length=last.length + run.length)]
    return [*found, run]


def _extents(fd: int, start: int, length: int) -> list[tuple[int, int, int, int]]:
    asked = bytearray(_HEAD.pack(start, length, 0, 0, _MOST, 0) + bytes(_MOST * _EXTENT.size))
    try:
        fcntl.ioctl(fd, _FIEMAP, asked, True)
    except OSError as error:
        raise KernelRefused("FIEMAP", error.errno or 0, what="the place of the region cannot be seen") from None
    count = min(_HEAD.unpack_from(asked)[3], _MOST)
    rows = (_EXTENT.unpack_from(asked, _HEAD.size + index * _EXTENT.size) for index in range(count))
    return [(row[0], row[1], row[2], row[5]) for row in rows]


def allocate(fd: int, size: int) -> None:
    """Give a file its clusters, where it lacks some; what is new reads as zeros.

    An inode has room for four extents, of 122 MiB each; the fifth has ext4 take a cluster for a list of them, and the
    next one behind the file's last is what it takes. So a large file is given its list before anything else.

    Raises:
        OSError: there is no room.
    """
    listed = size > SHALLOW and not os.fstat(fd).st_blocks
    if listed:
        for number in range(_INLINE_EXTENTS + 1):
            _preallocate(fd, size + (2 * number + 1) * CLUSTER, CLUSTER)
    os.posix_fallocate(fd, 0, size)
    if listed:
        os.ftruncate(fd, size)  # what lies behind its end is free again, the list stays


def largest(free: int) -> int:
    """The largest file that fits into so many free bytes, if they are in one run."""
    room = free - LIST if free - LIST > SHALLOW else min(free, SHALLOW)
    return room // CLUSTER * CLUSTER


def _preallocate(fd: int, offset: int, length: int) -> None:
    """Give a file clusters behind its end, which stays where it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, _KEEP_SIZE, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fill(fd: int, size: int) -> None:
    """Write zeros over a new file, and have that on the device.

    That a cluster was written to is metadata: it is in the journal seconds after the first touch, and a kernel that
    ends before reads zeros there. Of a file that was written to from the beginning nothing can be lost so.

    Raises:
        OSError: it cannot be written to.
    """
    zeros = bytes(CLUSTER)
    for at in range(0, size, CLUSTER):
        os.pwrite(fd, zeros[: size - at], at)
    os.fsync(fd)


# --- for good ---------------------------------------------------------------------------------------------------


def set_immutable(fd: int, *, on: bool) -> None:
    """Nobody, root and whoever has it open included, changes a file's size or contents while it is immutable.

    Raises:
        KernelRefused: the file system has no such flag, or this process may not set it (CAP_LINUX_IMMUTABLE).
    """
    try:
        (flags,) = _LONG.unpack(fcntl.ioctl(fd, _GETFLAGS, bytes(_LONG.size)))
        fcntl.ioctl(fd, _SETFLAGS, _LONG.pack(flags | _IMMUTABLE if on else flags & ~_IMMUTABLE))
    except OSError as error:
        raise KernelRefused("FS_IOC_SETFLAGS", error.errno or 0, what="a file cannot be made immutable") from None


def truncate(fd: int, within: float) -> None:
    """Cut a file to no length, in a process of its own: the kernel waits there for whoever pins a page of it.

    That it returned is the proof that nobody does. A process that is ended meanwhile has changed nothing.

    Raises:
        KernelRefused: somebody still pins a page after ``within`` seconds (EBUSY), or it cannot be cut.
    """
    command = ["truncate", "--no-create", "--size=0", f"/proc/self/fd/{fd}"]
    with subprocess.Popen(
        command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as cutting:
        try:
            _, said = cutting.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            cutting.kill()
            cutting.communicate()
            raise KernelRefused(
                "ftruncate",
                errno.EBUSY,
                what=f"a file of the arena cannot be cut: a page of it is still pinned after {within:g} s",
                remedy="find what pins it (reach REGION) and try again",
            ) from None
    if cutting.returncode:
        raise KernelRefused("ftruncate", errno.EIO, what=f"a file of the arena cannot be cut: {said.strip()}")


# --- tools ------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], what: str, *, codes: Sequence[int] = (0,)) -> str:
    """What a tool said (stdout), which ended with one of these exit codes.

    Raises:
        NotFound: it is not installed. Refused: it failed (``ToolFailed``).
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=TOOL_S,
            check=False,
        )
    except FileNotFoundError:
        raise NotFound(f"there is no {command[0]}", what, "install e2fsprogs and util-linux") from None
    except subprocess.TimeoutExpired:
        raise Refused(what, f"{command[0]} did not end within {TOOL_S:g} s", "see dmesg", code="ToolFailed") from None
    if done.returncode not in codes:
        why = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")[:500]
        raise Refused(what, f"{' '.join(command)}: {why}", "see dmesg", code="ToolFailed")
    return done.stdout


def make(device: str, label: str, size: int) -> None:
    """Format a device: clusters of 2 MiB, inodes that have room for what a region says of itself, a small journal.

    Raises:
        NotFound, Refused: see :func:`run`.
    """
    inodes = max(1024, min(65536, size // CLUSTER * 2))
    features = "bigalloc,extent,^resize_inode"
    run(
        [
            *("mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-O", features, "-C", str(CLUSTER), "-I", "1024"),
            *("-N", str(inodes), "-m", "0", "-J", "size=4", "-E", "nodiscard,lazy_itable_init=0", "-L", label, device),
        ],
        f"{device} cannot be formatted",
    )


def mount(device: str, directory: Path, options: str) -> None:
    """Mount a device at a directory; raises as :func:`run`."""
    run(["mount", "-t", "ext4", "-o", options, device, str(directory)], f"{device} cannot be mounted")


def unmount(directory: Path) -> None:
    """Take a mount away that nobody uses; raises as :func:`run`."""
    run(["umount", str(directory)], f"{directory} cannot be unmounted")
