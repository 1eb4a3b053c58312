"""Which device a file that a process holds or maps leads to: told by what the file is, and never by what it is called.

    a file of sysfs or of /proc/bus/pci   its inode, on any mount of these file systems: the kernel numbers their files
                                          once, also those that other namespaces see
    a node of a character device          its device number, wherever the node lies: /sys/dev/char/MAJOR:MINOR
                                          -> .../NAME, and .../NAME/subsystem -> .../SUBSYSTEM

A file is asked as it was looked up last (AT_STATX_DONT_SYNC, and nothing wanted): its file system, which a process may
serve, is not. Of a recorded tree only names are left, and they decide.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from memconsole.backend.kernel import patient, procmaps, tree
from memconsole.backend.kernel.census import Process
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound
from memconsole.model import Window


class Way(enum.Enum):
    """How a file leads to a device."""

    BAR = "sysfs"
    """``name`` is the window's id."""
    BUS = "/proc/bus/pci"
    """``name`` is a function's address; offsets are physical addresses."""
    MEM = "mem"
    """Offsets are physical addresses."""
    UIO = "uio"
    VFIO_DEVICE = "vfio-dev"
    VFIO_GROUP = "vfio"
    """``name`` is the group's number."""


class Lead(NamedTuple):
    """What a file leads to; ``name`` as its way has it."""

    way: Way
    name: str = ""


class _Status(NamedTuple):
    mode: int
    device: int
    inode: int
    rdev: int


_NAMES = (
    (Way.BAR, re.compile(r".*/([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])/resource(\d)(?:_wc)?")),
    (Way.BUS, re.compile(r"/proc/bus/pci/(?:([0-9a-f]{4,}):)?([0-9a-f]{2})/([0-9a-f]{2}\.[0-7])")),
    (Way.VFIO_DEVICE, re.compile(r"/dev/vfio/devices/(?:noiommu-)?(vfio\d+)")),
    (Way.VFIO_GROUP, re.compile(r"/dev/vfio/(?:noiommu-)?(\d+)")),
    (Way.UIO, re.compile(r"/dev/(uio\d+)")),
    (Way.MEM, re.compile(r"/dev/(mem)")),
)
_IN_A_LINE = (b"/resource", b"vfio", b"/dev/uio", b"/dev/mem", b"/proc/bus/pci/")
_SHARED = (b"-s ", b"xs ")
"""The ends of the permissions of a shared mapping, and the blank behind them."""
_SYSFS, _PROC, _DEV, _PCI = "/sys", "/proc", "/dev", "/sys/bus/pci/devices"
_CHARACTER, _BUS = "/sys/dev/char", "/proc/bus/pci"
_AT_FDCWD, _DONT_SYNC, _NOTHING = -100, 0x4000, 0
"""What is wanted and was cached is cheap, what is wanted and was not is asked for; type and numbers come either way."""
_MODE, _INODE, _NUMBERS = struct.Struct("=H"), struct.Struct("=Q"), struct.Struct("=IIII")


def named(path: str) -> Lead | None:
    """What a path on a host as it usually is leads to."""
    for way, pattern in _NAMES:
        if match := pattern.fullmatch(path):
            if way is Way.BAR:
                return Lead(way, f"{match[1]}:{match[2]}")
            if way is Way.BUS:
                return Lead(way, f"{match[1] or '0000'}:{match[2]}:{match[3]}")
            return Lead(way, match[1])
    return None


class Files:
    """What files lead to, on one host and for one look at it; ``bars`` are the windows that are asked about."""

    def __init__(self, root: Root, bars: Iterable[Window]) -> None:
        self._root = root
        self._live = tree.live(root)
        places = (_SYSFS, _PROC, _DEV) if self._live else ()
        usual = {device for path in places if (device := _device(path))}
        self._usual = [procmaps.device_word(device) for device in sorted(usual)]
        self._bars = tuple(bars)
        self._leads: dict[tuple[int, int], Lead | None] = {}
        self._characters: dict[int, Lead | None] = {}
        self._known: dict[tuple[str, int], Lead] | None = None

    def mappings(self, process: Process) -> Iterator[tuple[Vma, Lead]]:
        """The mappings of a process that may lead to a device; those through VFIO's device files are not among them.

        Of a private mapping, which reads what is there, the usual places of such files are all that is looked at.

        Raises:
            KernelRefused, BadFile: its maps are not as the kernel writes them, or a file cannot be looked at.
        """
        if not self._live:
            for vma in procmaps.parse(process.maps, *_IN_A_LINE):
                if lead := named(vma.path):
                    yield vma, lead
            return
        for vma in procmaps.parse(process.maps, *_SHARED, *self._usual):
            if vma.inode and vma.device != _memory() and not vma.path.startswith("anon_inode:"):
                if (vma.device, vma.inode) not in self._leads:
                    self._leads[vma.device, vma.inode] = self._lead(process, self._mapped(process, vma))
                if lead := self._leads[vma.device, vma.inode]:
                    yield vma, lead

    def opened(self, process: Process) -> Iterator[Lead]:
        """What the files lead to that a process holds, but for VFIO's device files without a name.

        Raises:
            Denied, KernelRefused: a file cannot be looked at.
        """
        for fd, link in process.fds.items():
            if not link.startswith("/") or link.startswith("/memfd:"):
                continue
            lead = self._lead(process, self._held(process, fd)) if self._live else named(link)
            if lead:
                yield lead

    def _held(self, process: Process, fd: int) -> _Status | None:
        path = f"{process.place}/fd/{fd}"
        try:
            return _status(path)
        except PermissionError as error:
            raise tree.failure(path, error) from error

    def _mapped(self, process: Process, vma: Vma) -> _Status | None:
        try:
            path = f"/proc/{process.task}/map_files/{vma.start:x}-{vma.end:x}"
            return patient.call(process.pid, lambda _: _status(path))
        except PermissionError:  # without CAP_CHECKPOINT_RESTORE: the name is asked, and held to what is mapped
            with contextlib.suppress(OSError):
                found = _status(vma.path)
                if found is not None and (found.device, found.inode) == (vma.device, vma.inode):
                    return found
            return None

    def _lead(self, process: Process, status: _Status | None) -> Lead | None:
        if status is None:
            return None
        if stat.S_ISCHR(status.mode):
            if status.rdev not in self._characters:
                self._characters[status.rdev] = _character(status.rdev)
            return self._characters[status.rdev]
        if not stat.S_ISREG(status.mode) or os.major(status.device):
            return None
        for kind, place in (("sysfs", _SYSFS), ("proc", _PROC)):
            lead = self._files().get((kind, status.inode))
            if lead and (status.device == _device(place) or status.device in _mounted(self._root, process, kind)):
                return lead
        return None

    def _files(self) -> dict[tuple[str, int], Lead]:
        """The files of the BARs by file system and inode."""
        if self._known is None:
            self._known = {(kind, inode): lead for bar in self._bars for kind, inode, lead in _files_of(bar)}
        return self._known


def _files_of(bar: Window) -> Iterator[tuple[str, int, Lead]]:
    """The files of a BAR: the kind of its file system, its inode, and what it leads to."""
    domain, bus, rest = bar.bdf.split(":")
    own, function = Lead(Way.BAR, bar.id), Lead(Way.BUS, bar.bdf)
    paths = [("sysfs", f"{_PCI}/{bar.bdf}/resource{bar.bar}{end}", own) for end in ("", "_wc")]
    paths.append(("proc", f"{_BUS}/{domain}:{bus}/{rest}", function))
    if domain == "0000":
        paths.append(("proc", f"{_BUS}/{bus}/{rest}", function))
    for kind, path, lead in paths:
        with contextlib.suppress(PermissionError):
            if (status := _status(path)) is not None:
                yield kind, status.inode, lead


def _character(rdev: int) -> Lead | None:
    """What a character device is, as sysfs has it."""
    place = f"{_CHARACTER}/{os.major(rdev)}:{os.minor(rdev)}"
    name = tree.link_name("/", place)
    subsystem = tree.link_name("/", f"{place}/subsystem") if name else None
    if name is None or (subsystem == "mem") != (name == "mem"):
        return None
    for way in (Way.MEM, Way.UIO, Way.VFIO_DEVICE, Way.VFIO_GROUP):
        if subsystem == way.value:
            return Lead(way, name.removeprefix("noiommu-"))
    return None


def _mounted(root: Root, process: Process, kind: str) -> set[int]:
    """The devices of the file systems of a kind that a process has mounted (/proc/PID/mountinfo: fields 3, - 1)."""
    found = set()
    with contextlib.suppress(*tree.UNREADABLE):
        for row in tree.text(tree.read(root, f"{process.place}/mountinfo")).splitlines():
            left, _, right = row.partition(" - ")
            words = left.split(" ", 3)
            if right.startswith(f"{kind} ") and len(words) > 3:
                major, _, minor = words[2].partition(":")
                found.add(os.makedev(int(major), int(minor)))
    return found


def _device(place: str) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(place).st_dev
    return None


@cache
def _memory() -> int:
    """The device of memfds and other shared memory without a name: a file system that no node can be made in."""
    fd = os.memfd_create("device")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


@cache
def _statx() -> ctypes._NamedFuncPointer | None:
    """statx(2) of the C library; None before glibc 2.28."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    return function


def _status(path: str) -> _Status | None:
    """What a file is; None where there is none any more.

    Raises:
        PermissionError: it may not be looked at. KernelRefused: any other errno.
    """
    function = _statx()
    if function is None:
        raise NotFound("there is no statx(2)", "the C library is too old")
    buffer = ctypes.create_string_buffer(256)
    if function(_AT_FDCWD, os.fsencode(path), _DONT_SYNC, _NOTHING, buffer) < 0:
        number = ctypes.get_errno()
        if number in {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}:
            return None
        if number in {errno.EPERM, errno.EACCES}:
            raise PermissionError(number, path)
        raise tree.failure(path, OSError(number, os.strerror(number)))
    rmajor, rminor, major, minor = _NUMBERS.unpack_from(buffer, 128)
    (mode,), (inode,) = _MODE.unpack_from(buffer, 28), _INODE.unpack_from(buffer, 32)
    return _Status(mode, os.makedev(major, minor), inode, os.makedev(rmajor, rminor))
