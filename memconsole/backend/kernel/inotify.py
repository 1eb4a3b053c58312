"""inotify(7): what appears in directories, and goes from them, told by the kernel at once.

event = int wd, uint32 mask, uint32 cookie, uint32 len, len bytes: the name, ended by NULs
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

_EVENT = struct.Struct("=iIII")
_LONGEST = 64 << 10
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_DELETE_SELF, _IN_MOVE_SELF = 0x400, 0x800
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x4000, 0x8000, 0x0100_0000
_COMES_AND_GOES = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE
_GONE = _IN_DELETE_SELF | _IN_MOVE_SELF


class Event(NamedTuple):
    """What happened to ``name`` in the directory that is watched as ``watch``; ``lost``: the kernel dropped events."""

    watch: int
    name: str
    ended: bool = False
    lost: bool = False


class Inotify:
    """One queue of events, of at most 16384; more are lost, which is an event of its own."""

    def __init__(self) -> None:
        """Raises OSError: EMFILE where this user has as many as he may (fs.inotify.max_user_instances)."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, directory: str | int) -> int:
        """Watch a directory, by its path or an open descriptor; the same number for the same directory.

        Raises:
            OSError: there is none, it may not be watched, or there are too many (ENOSPC).
        """
        path = directory if isinstance(directory, str) else f"/proc/self/fd/{directory}"
        mask = _COMES_AND_GOES | _GONE | _IN_ONLYDIR
        return self._checked(self._libc.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint32(mask)))

    def read(self) -> Iterator[Event]:
        """What happened since it was read last; nothing, if nothing did."""
        while True:
            try:
                raw = os.read(self.fd, _LONGEST)
            except BlockingIOError:
                return
            at = 0
            while at < len(raw):
                watch, mask, _, length = _EVENT.unpack_from(raw, at)
                at += _EVENT.size
                name = os.fsdecode(raw[at : at + length].partition(b"\0")[0])
                at += length
                yield Event(watch, name, bool(mask & (_GONE | _IN_IGNORED)), bool(mask & _IN_Q_OVERFLOW))

    def close(self) -> None:
        """Watch nothing more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _checked(self, made: int) -> int:
        if made < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(made)
