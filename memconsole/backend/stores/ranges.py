"""Ranges of memory that are one device file, without a file system, and what each says of itself (:mod:`.described`).

A range is mapped, never read or written to: devdax takes nothing else. There is nothing to flush, either: what a
process stored is in memory, or in caches that a kexec keeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from memconsole.backend.kernel import dax, tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import described, ext4
from memconsole.backend.stores.arena import Contents, machine_id
from memconsole.backend.stores.described import COPY, UNIT, Description, Read
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.model import Dax
from memconsole.units import format_address

DEVDAX = "devdax"
"""The store of devdax devices."""
NODES = "/dev/memconsole"
"""Where regions have their device files: a file of its own each, so that /proc/PID/maps says whose a mapping is."""
_DRIVER = "device_dax"
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)
_HEAD, _SAMPLE, _SAMPLES = 2 * UNIT, 4096, 256
_DEVICES = "/sys/bus/dax/devices"
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock (fcntl.h): type, whence, start, length, pid."""


class Range(NamedTuple):
    """A device file that is memory: from ``base`` of it on, ``size`` bytes, which begin at the physical ``start``.

    ``number`` is its st_rdev; ``start`` None where it is not shown. ``trouble``: why it cannot be used; ``remedy``:
    what to do about it, or where the kernel does not let it be opened or mapped.
    """

    name: str
    path: str
    number: int
    size: int
    base: int = 0
    start: int | None = None
    node: int = -1
    trouble: str = ""
    remedy: str = ""

    @property
    def where(self) -> str:
        """Its device file, and where it begins in it."""
        return f"{self.path} at {format_address(self.base)}" if self.base else self.path


Devices = Callable[[Root], tuple[Range, ...]]


def devdax(root: Root = "/") -> tuple[Range, ...]:
    """The devdax devices of a host; none where the kernel has no such bus.

    Raises:
        Denied, KernelRefused: they cannot be listed.
    """
    try:
        found = dax.dax(root, [])
    except NotFound:
        return ()
    return tuple(each for device in found for each in _devdax(root, device))


def _devdax(root: Root, device: Dax) -> Iterator[Range]:
    base = f"{_DEVICES}/{device.name}"
    driver = tree.link_name(root, f"{base}/driver")
    trouble = ""
    if driver != _DRIVER:
        trouble = f"its driver is {driver or 'none'}, not {_DRIVER}"
    elif device.align != UNIT:
        trouble = f"it is mapped in pages of {device.align} bytes, not of {UNIT}"
    try:
        major, _, minor = tree.line(root, f"{base}/dev").partition(":")
        number = os.makedev(int(major), int(minor))
    except (*tree.UNREADABLE, ValueError):
        number, trouble = 0, trouble or "it has no device file"
    path = tree.below(root, f"/dev/{device.name}")
    yield Range(device.name, str(path), number, device.size, 0, device.start or None, device.node, trouble)


def make_node(device: Range, path: Path) -> None:
    """A device file of its own for a region; one that is there already stays if it is of the same device.

    Raises:
        KernelRefused: it cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_rdev != device.number:
            path.unlink()
        if not path.exists():
            os.mknod(path, stat.S_IFCHR | 0o600, device.number)
    except OSError as error:
        remedy = "the service needs CAP_MKNOD, and /dev has to be a devtmpfs"
        raise KernelRefused("mknod", error.errno or 0, what=f"{path} cannot be made", remedy=remedy) from None


class Opened:
    """A range that is this process's alone: the lock on its device file, its description, and a way to change it."""

    def __init__(self, device: Range, fd: int, memory: mmap.mmap, found: Read) -> None:
        self.device = device
        self._fd = fd
        self._memory = memory
        self._found = found

    @property
    def said(self) -> Description:
        """What it says now."""
        assert self._found.description is not None  # noqa: S101 - only such ranges are opened
        return self._found.description

    @property
    def generation(self) -> int:
        """How often it was changed."""
        return self._found.generation

    @property
    def free(self) -> tuple[int, int]:
        """Bytes that regions may still have, and the most that one may have."""
        return described.free(self.said, self.device.size)

    def change(self, description: Description) -> None:
        """Have it say something else: over the older copy, so that it says the one or the other at any moment.

        Raises:
            BadFile: there is no room for so much.
        """
        self._found = _write(self._memory, self.device, self._found, description)

    def zero(self, start: int, size: int) -> None:
        """Write zeros over a part of it."""
        with _mapped(self._fd, self.device, start, size) as memory:
            _zero(memory)

    def copied(self, name: str, start: int, size: int) -> int:
        """A new memfd with what a part of it holds, with holes where it holds zeros; the caller closes it.

        Raises:
            KernelRefused: it cannot be mapped, or there is no memory.
        """
        copy = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(copy, size)
            with _mapped(self._fd, self.device, start, size) as memory:
                for at in range(0, size, _BLOCK):
                    block = memory[at : at + _BLOCK]
                    if block != _ZEROS:
                        os.pwrite(copy, block, at)
        except OSError as error:
            os.close(copy)
            raise KernelRefused("pwrite", error.errno or 0, what=f"{name} cannot be copied") from None
        except BaseException:
            os.close(copy)
            raise
        return copy

    def close(self) -> None:
        """Let go of it."""
        self._memory.close()
        os.close(self._fd)


def opened(device: Range, root: Root = "/") -> Opened | None:
    """An arena to be used; None where the range is none.

    Raises:
        BadFile: what it says cannot be used (see :func:`described.read`). Refused: another process uses it
            (``InUse``), or another host made it (``OtherHost``). KernelRefused: it cannot be opened or mapped.
    """
    with contextlib.ExitStack() as undo:
        fd = _open(device, os.O_RDWR)
        undo.callback(os.close, fd)
        memory = _map(fd, device, 0, UNIT)
        undo.callback(memory.close)
        if _read(memory, device).description is None:  # somebody else's: not even locked for a moment
            return None
        _lock(device, fd)
        found = _read(memory, device)
        if found.description is None:
            return None
        _same_host(found.description, root)
        undo.pop_all()
        return Opened(device, fd, memory, found)


def _same_host(said: Description, root: Root) -> None:
    """Raises Refused: another host made it."""
    host, here = said.host, machine_id(root)
    if host and here and host != here:
        why = f"another host made it (machine id {host})"
        raise Refused(f"the arena {said.name} is not used", why, "it is left as it is", code="OtherHost")


def look(device: Range) -> Read:
    """What a range says, whoever uses it.

    Raises:
        BadFile: see :func:`described.read`. KernelRefused: it cannot be opened or mapped.
    """
    fd = _open(device, os.O_RDWR)  # a mapping to read of some kinds of devices needs it
    try:
        with _mapped(fd, device, 0, UNIT) as memory:
            return _read(memory, device)
    finally:
        os.close(fd)


def contents(device: Range) -> Contents:
    """What a range holds: by its description, by the marks of others, by samples of its bytes.

    Raises:
        KernelRefused: it cannot be opened or mapped.
    """
    try:
        found = look(device)
    except BadFile as error:
        return Contents(other=f"a description of memconsole that cannot be used: {error.what}: {error.why}")
    if found.description is not None:
        return Contents(found.description.name)
    fd = _open(device, os.O_RDWR)
    try:
        with _mapped(fd, device, 0, device.size // UNIT * UNIT) as memory:
            end = len(memory)
            step = max(_SAMPLE, end // _SAMPLES // _SAMPLE * _SAMPLE)
            head = memory[: min(_HEAD, end)]
            other = ext4.superblock(head)
            if other is not None:
                return Contents(other=f"an ext4 file system {other.label}".strip())
            unfinished = found.empty and any(head[:UNIT])
            parts = [head[UNIT:] if unfinished else head, memory[max(UNIT, end - _HEAD) : end]]
            parts += [memory[at : at + _SAMPLE] for at in range(UNIT, end, step)]
    finally:
        os.close(fd)
    return Contents(other="bytes that nothing describes") if any(map(any, parts)) else Contents()


def create(device: Range, name: str, root: Root = "/") -> Opened:
    """Have an empty range say that it is an arena, in both copies.

    Raises:
        Refused: another process uses it. KernelRefused: it cannot be opened or mapped.
    """
    with _taken(device) as (fd, memory):
        found = Read(None, 0, 0)
        said = Description(name=name, host=machine_id(root), created_ns=time.time_ns())
        for _ in range(2):
            found = _write(memory, device, found, said)
        return Opened(device, fd, memory, found)


@contextlib.contextmanager
def _taken(device: Range) -> Iterator[tuple[int, mmap.mmap]]:
    """A range that is this process's alone, with what it says of itself mapped; given up where the block fails."""
    with contextlib.ExitStack() as undo:
        fd = _open(device, os.O_RDWR)
        undo.callback(os.close, fd)
        _lock(device, fd)
        memory = _map(fd, device, 0, UNIT)
        undo.callback(memory.close)
        yield fd, memory
        undo.pop_all()


def smaller(device: Range) -> Read | None:
    """What a range says that became larger than the arena in it; None where that is not so.

    Raises:
        BadFile: what it says cannot be. KernelRefused: it cannot be opened or mapped.
    """
    fd = _open(device, os.O_RDWR)
    try:
        with _mapped(fd, device, 0, UNIT) as memory:
            return described.said_of_less(memory[:COPY], memory[COPY:UNIT], device.size, device.where)
    finally:
        os.close(fd)


def grow(device: Range, root: Root = "/") -> Opened:
    """Have an arena have all of its range: both copies say so, the older one first; its regions stay where they are.

    Raises:
        BadFile: what it says cannot be. Refused: another process uses it (``InUse``), another host made it
            (``OtherHost``), or it did not become larger (``NotLarger``). KernelRefused: it cannot be opened or mapped.
    """
    with _taken(device) as (fd, memory):
        found = described.said_of_less(memory[:COPY], memory[COPY:UNIT], device.size, device.where)
        if found is None or found.description is None:
            why = "it describes all of its range, or none of memconsole's"
            raise Refused(f"{device.where} did not become larger", why, "memconsole arena list", code="NotLarger")
        _same_host(found.description, root)
        for _ in range(2):
            found = _write(memory, device, found, found.description)
        return Opened(device, fd, memory, found)


def wipe(arena: Opened) -> None:
    """Write zeros over all of a range, what it says of itself first."""
    arena.zero(0, UNIT)
    arena.zero(UNIT, arena.device.size // UNIT * UNIT - UNIT)


# --- inside -----------------------------------------------------------------------------------------------------


def _open(device: Range, flags: int) -> int:
    try:
        return os.open(device.path, flags | os.O_CLOEXEC)
    except OSError as error:
        what = f"{device.where} cannot be opened"
        raise KernelRefused(device.path, error.errno or 0, what=what, remedy=device.remedy) from None


def _lock(device: Range, fd: int) -> None:
    try:
        lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, device.base, device.size, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)  # of its own part alone: a device file may be of several ranges
    except BlockingIOError:
        why = "another control process, or another program, has it locked"
        raise Refused(f"{device.where} is not used", why, "end that one first", code="InUse") from None


def _map(fd: int, device: Range, start: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, offset=device.base + start)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        what = f"{device.where} cannot be mapped"
        raise KernelRefused("mmap", number, what=what, remedy=device.remedy) from None


@contextlib.contextmanager
def _mapped(fd: int, device: Range, start: int, size: int) -> Iterator[mmap.mmap]:
    with contextlib.closing(_map(fd, device, start, size)) as memory:
        yield memory


def _zero(memory: mmap.mmap) -> None:
    libc = ctypes.CDLL(None)  # a call into it lets other threads run
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memset.restype = ctypes.c_void_p
    place = (ctypes.c_char * len(memory)).from_buffer(memory)
    try:
        libc.memset(ctypes.addressof(place), 0, len(memory))
    finally:
        del place


def _read(memory: mmap.mmap, device: Range) -> Read:
    return described.read(memory[:COPY], memory[COPY:UNIT], device.size, device.where)


def _write(memory: mmap.mmap, device: Range, found: Read, description: Description) -> Read:
    raw = described.written(description, found.generation + 1, device.size, device.where)
    at = found.older * COPY
    memory[at : at + len(raw)] = raw
    return Read(description, found.generation + 1, 1 - found.older)
