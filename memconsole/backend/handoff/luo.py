"""LUO, the kernel's live update orchestrator: sessions that carry files over a kexec.

    /dev/liveupdate, one opener at a time; ioctl 0xBA00 | nr, every struct begins with u32 size
    0x00 CREATE_SESSION     device             u32 size; s32 fd (out); u8 name[64]
    0x01 RETRIEVE_SESSION   device             the same
    0x40 PRESERVE_FD        outgoing session   u32 size; s32 fd (in); u64 token
    0x41 RETRIEVE_FD        incoming session   u32 size; s32 fd (out); u64 token
    0x42 FINISH             incoming session   u32 size; u32 reserved
    0x43 GET_NAME           session            u32 size; u32 reserved; u8 name[64] (out)

The device is opened for one call and closed at once, and a moment's patience is had with another opener. A session
lives as long as a file of it is open: who calls must put :attr:`LuoSession.fd` into custody. There is no call to take
one fd out of a session, and none to list sessions: close the session and build it again.
Source: include/uapi/linux/liveupdate.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from typing import NamedTuple, Self

from memconsole.decoding import text
from memconsole.errors import Denied, KernelRefused, MemconsoleError, NotFound, Refused

DEVICE = "/dev/liveupdate"
PREFIX = "memconsole:"
NAME_LIMIT = 63
"""Bytes of a session's name; a NUL follows them."""

_NAMED = struct.Struct("<Ii64s")
_FD = struct.Struct("<IiQ")
_PLAIN = struct.Struct("<II")
_CREATE = 0xBA00
_PRESERVE_FD, _FINISH, _GET_NAME = 0xBA40, 0xBA42, 0xBA43
_PATIENCE = 1.0
_PAUSE = 0.01


class _Named(NamedTuple):
    code: str
    why: str
    remedy: str


_WRONG_SIDE = _Named("WrongSide", "the session came from the previous kernel", "preserve into a session of this kernel")
_NOT_INCOMING = _Named("WrongSide", "the session is of this kernel", "only a session handed over can do this")

_ERRORS: dict[int, dict[int, _Named]] = {
    _CREATE: {
        errno.EEXIST: _Named("SessionExists", "a session of this name is open already", "close it, or adopt its fd"),
        errno.ENOSPC: _Named("NoSpace", "the kernel's table of sessions is full", "close a session"),
    },
    _PRESERVE_FD: {
        errno.EEXIST: _Named("TokenUsed", "the session has a file of this token", "choose another token"),
        errno.ENOENT: _Named(
            "NoHandler",
            "this kernel cannot hand over this kind of file",
            "only shmem memfds (no hugetlb) are handed over",
        ),
        errno.EBUSY: _Named("AlreadyPreserved", "a session holds this file already", "close that session first"),
        errno.EOPNOTSUPP: _Named("SealUnknown", "it has a seal this kernel cannot hand over", "use a memfd without it"),
        errno.EFBIG: _Named("TooLarge", "it has more folios than the kernel's list can hold", "split it into segments"),
        errno.ENOSPC: _Named("NoSpace", "the session's table of files is full", "use a second session"),
        errno.EINVAL: _WRONG_SIDE,
    },
    _FINISH: {
        errno.EBUSY: _Named("NotFinished", "a file of the session cannot be finished yet", "try again"),
        errno.EINVAL: _NOT_INCOMING,
    },
    _GET_NAME: {
        errno.ENOTTY: _Named("NotASession", "the fd is no session of live update", "look at its link in /proc")
    },
}
_CALLS = {
    _CREATE: "LIVEUPDATE_IOCTL_CREATE_SESSION",
    _PRESERVE_FD: "LIVEUPDATE_SESSION_PRESERVE_FD",
    _FINISH: "LIVEUPDATE_SESSION_FINISH",
    _GET_NAME: "LIVEUPDATE_SESSION_GET_NAME",
}


def session_name(guest: str) -> str:
    """The name of a guest's session, ``memconsole:GUEST``.

    Raises:
        Refused: BadName, the kernel has no room for it.
    """
    name = PREFIX + guest
    _encoded(name)
    return name


class LuoSession:
    """An open session; a context manager. Closing an outgoing one lets go of all it preserved."""

    def __init__(self, fd: int, name: str) -> None:
        """Takes over ``fd``; use the class methods."""
        self._fd = fd
        self.name = name

    @classmethod
    def create(cls, name: str) -> Self:
        """A new outgoing session.

        Raises:
            Refused: BadName. KernelRefused: SessionExists, NoSpace, Busy, Broken. NotFound: NoLuo. Denied: not root.
        """
        return cls(_on_device(_CREATE, name, f"session {name} cannot be created"), name)

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """The session behind an fd from custody, which it takes over.

        Raises:
            KernelRefused: NotASession; the fd stays the caller's.
        """
        found = bytearray(_NAMED.pack(_NAMED.size, 0, b""))
        _call(fd, _GET_NAME, found, f"fd {fd} cannot be adopted as a session")
        return cls(fd, text(_NAMED.unpack(found)[2].split(bytes(1))[0]))

    @property
    def fd(self) -> int:
        """The session's file; it stays the session's, so dup it to keep it."""
        if self._fd < 0:
            raise ValueError("the session is closed")
        return self._fd

    def preserve(self, fd: int, token: int) -> None:
        """Have ``fd`` handed over under ``token`` (u64): every hole is filled, every page pinned, the size frozen.

        The fd may be closed afterwards. Its frames may have moved: read them again.

        Raises:
            KernelRefused: TokenUsed, NoHandler, AlreadyPreserved, SealUnknown, TooLarge, NoSpace, WrongSide.
        """
        _call(self.fd, _PRESERVE_FD, bytearray(_FD.pack(_FD.size, fd, token)), f"fd {fd} cannot be preserved")

    def finish(self) -> None:
        """Tell the kernel that all of it was retrieved; what was not is discarded. The session must still be closed.

        Raises:
            KernelRefused: NotFinished, WrongSide.
        """
        _call(self.fd, _FINISH, bytearray(_PLAIN.pack(_PLAIN.size, 0)), f"session {self.name} cannot be finished")

    def close(self) -> None:
        """Close the session's file; what it preserved is let go unless another fd of it is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _encoded(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogatepass")
    if not raw or len(raw) > NAME_LIMIT or bytes(1) in raw:
        why = f"a session's name has 1 to {NAME_LIMIT} bytes, none of them NUL"
        raise Refused(f"{name!r} cannot name a session", why, "use a shorter name", code="BadName")
    if name.startswith("systemd"):
        raise Refused(
            f"{name!r} cannot name a session",
            "names that begin so are reserved for systemd",
            "use another name",
            code="BadName",
        )
    return raw


def _on_device(request: int, name: str, what: str) -> int:
    argument = bytearray(_NAMED.pack(_NAMED.size, -1, _encoded(name)))
    device = _open()
    try:
        _call(device, request, argument, what)
    finally:
        os.close(device)
    return _taken(_NAMED.unpack(argument)[1])


def _open() -> int:
    """The device; another opener's moment is waited for."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= until:
                raise _not_opened(error) from None
        time.sleep(_PAUSE)


def _not_opened(error: OSError) -> MemconsoleError:
    number = error.errno or errno.EIO
    if number == errno.ENOENT:
        remedy = "boot a kernel with CONFIG_LIVEUPDATE, with kho=on liveupdate=on"
        return NotFound("this kernel has no live update", f"there is no {DEVICE}", remedy, code="NoLuo")
    if number in {errno.EACCES, errno.EPERM}:
        return Denied(f"{DEVICE} is not open to this user", os.strerror(number), "run as root")
    if number == errno.EBUSY:
        remedy = f"find the process that has it: fuser {DEVICE}"
        return KernelRefused(DEVICE, number, what="another process holds the device", remedy=remedy, code="Busy")
    if number == errno.EIO:
        what = "this kernel cannot read what the previous one handed over"
        return KernelRefused(
            DEVICE, number, what=what, remedy="reboot: nothing that was handed over can be retrieved", code="Broken"
        )
    return KernelRefused(DEVICE, number)


def _call(fd: int, request: int, argument: bytearray, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise _refused(request, error.errno or errno.EIO, what) from None


def _refused(request: int, number: int, what: str) -> KernelRefused:
    """The error for an errno of a call, by its name where the call has one for it."""
    named = _ERRORS[request].get(number)
    if named is None:
        return KernelRefused(_CALLS[request], number, what=what)
    refused = KernelRefused(_CALLS[request], number, what=what, remedy=named.remedy, code=named.code)
    refused.why = f"{named.why}: {refused.why}"
    return refused


def _taken(fd: int) -> int:
    """The kernel hands fds out without FD_CLOEXEC."""
    os.set_inheritable(fd, False)
    return fd
