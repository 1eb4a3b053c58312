"""The other side of live update, from Python: what the previous kernel handed over. memconsole-resume does it in C."""

from __future__ import annotations

import bisect
import errno
import fcntl
import os
from collections.abc import Mapping
from typing import Self

from memconsole.backend.handoff import luo
from memconsole.backend.kernel.handover.values import Preserved
from memconsole.errors import KernelRefused

_RETRIEVE_SESSION, _RETRIEVE_FD = 0xBA01, 0xBA41
_OF_SESSION = {errno.ENOENT: "NoSession", errno.EINVAL: "AlreadyRetrieved"}
_OF_FD = {errno.ENOENT: "NoToken", errno.ENOMEM: "NoMemory", errno.EINVAL: "WrongSide"}


class Incoming(luo.LuoSession):
    """A session that the previous kernel handed over; to close it discards what was not retrieved."""

    @classmethod
    def retrieve(cls, name: str) -> Self:
        """By name; the code of an error is one of ``_OF_SESSION``."""
        argument = bytearray(luo._NAMED.pack(luo._NAMED.size, -1, name.encode()))
        device = os.open(luo.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            _asked(device, _RETRIEVE_SESSION, argument, _OF_SESSION)
        finally:
            os.close(device)
        return cls(_closed_on_exec(luo._NAMED.unpack(argument)[1]), name)

    def retrieve_fd(self, token: int) -> int:
        """See :func:`retrieve_fd`."""
        return retrieve_fd(self, token)


def retrieve_fd(session: luo.LuoSession, token: int) -> int:
    """The fd handed over under a token; a failure lasts. The code of an error is one of ``_OF_FD``."""
    found = bytearray(luo._FD.pack(luo._FD.size, -1, token))
    _asked(session.fd, _RETRIEVE_FD, found, _OF_FD)
    return _closed_on_exec(luo._FD.unpack(found)[1])


def _asked(fd: int, request: int, argument: bytearray, codes: Mapping[int, str]) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        number = error.errno or 0
        raise KernelRefused(f"ioctl {request:#x}", number, code=codes.get(number, "Unexpected")) from None


def _closed_on_exec(fd: int) -> int:
    os.set_inheritable(fd, False)
    return fd


def covers(preserved: Preserved, pfn: int, count: int = 1) -> bool:
    """Whether all of these frames are in the set that the next kernel leaves alone."""
    row = bisect.bisect_right(preserved.runs, pfn, key=lambda run: run.pfn) - 1
    return row >= 0 and pfn + count <= preserved.runs[row].pfn + preserved.runs[row].count
