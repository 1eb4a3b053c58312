"""Who holds the file descriptors without which memory or a session would vanish.

One protocol, three holders: this process (:class:`OwnCustody`: an embedded control process, whose memory may go with
it), the keeper (:class:`KeeperCustody`), and the service manager's fd store (:class:`~.fdstore.SystemdCustody`).
A name is 1 to 200 bytes; a payload is at most 4096 bytes and says what the fd is.

The keeper's protocol stands at the top of ``native/keeper.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from memconsole.backend.daemon import DaemonClient, started
from memconsole.errors import Denied, Gone, KernelRefused, MemconsoleError, NotFound, Refused, UsageError, WireError

MAX_NAME = 200
MAX_PAYLOAD = 4096


class Custody(Protocol):
    """A holder of fds by name; every method may be called from any thread.

    Whatever holds the fds, every method raises ``Gone`` (``CustodyGone``) once the holder is no more.
    """

    @property
    def label(self) -> str:
        """Who holds, in a few words (``this process``, ``keeper, pid 812``)."""

    @property
    def survives(self) -> bool:
        """Whether what is held outlives this process."""

    @property
    def resumes(self) -> bool:
        """Whether memconsole-resume finds what it holds, and so can start a VM from it."""

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """Hold a duplicate of ``fd`` with ``payload``, in the place of what was held under ``name``; at once or not.

        Raises:
            UsageError: the name or payload is too long or empty.
            Refused: the holder is full (``CustodyFull``).
        """

    def get(self, name: str) -> tuple[int, bytes]:
        """A new fd, which the caller closes, and the payload.

        Raises:
            NotFound: nothing is held under this name.
        """

    def drop(self, name: str) -> None:
        """Let go of what is held under ``name``.

        Raises:
            NotFound: nothing is held under this name.
        """

    def names(self) -> list[str]:
        """The names held, sorted."""

    def jump(self) -> None:
        """Boot the kernel that was loaded, from whoever makes sure that what is held is held until the end.

        Returns only by raising.

        Raises:
            Denied: no CAP_SYS_BOOT. KernelRefused: NotLoaded, or why the kernel stays (``NotJumped``).
        """

    def check(self) -> None:
        """Ask the holder whether it is there.

        Raises:
            Gone: it is no more.
        """

    def troubles(self) -> list[str]:
        """What went wrong with the holder and was mended as far as it could be, in words."""

    def close(self) -> None:
        """Let go of the holder; a holder that survives keeps what it holds."""


def check(name: str, payload: bytes) -> bytes:
    """The name as bytes.

    Raises:
        UsageError: the name is empty, too long or holds a NUL; or the payload is too long.
    """
    raw = name.encode()
    if not 0 < len(raw) <= MAX_NAME or b"\0" in raw:
        raise UsageError(f"{name!r} cannot name an fd", f"a name has 1 to {MAX_NAME} bytes and no NUL")
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(f"the payload of {name} is too long", f"{len(payload)} bytes where {MAX_PAYLOAD} may be")
    return raw


def nothing_held(name: str) -> NotFound:
    """The error for a name nothing is held under."""
    return NotFound(f"nothing is held under {name!r}", "", "it was never put into custody, or was dropped")


def boot_loaded() -> None:
    """Boot the loaded kernel from this process (reboot(2), LINUX_REBOOT_CMD_KEXEC); see :meth:`Custody.jump`."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.reboot(_CMD_KEXEC)
    raise not_jumped(ctypes.get_errno())


def not_jumped(code: int) -> MemconsoleError:
    """The error for a jump the kernel refused with an errno; every guest is where it was."""
    what = "the loaded kernel was not booted"
    if code == errno.EPERM:
        return Denied(what, os.strerror(code), "run as root (CAP_SYS_BOOT)")
    if code == errno.EINVAL:
        remedy = "load one first (kexec_file_load), from the first PID namespace"
        return KernelRefused("reboot", code, what=what, remedy=remedy, code="NotLoaded")
    return KernelRefused("reboot", code, what=what, remedy="dmesg says what it met", code="NotJumped")


class OwnCustody:
    """Fds held by this process; they go when it does."""

    label = "this process"
    survives = False
    resumes = False

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, bytes]] = {}
        self._lock = threading.Lock()

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """See :class:`Custody`."""
        check(name, payload)
        copy = os.dup(fd)
        with self._lock:
            old = self._held.get(name)
            self._held[name] = (copy, payload)
        if old is not None:
            os.close(old[0])

    def get(self, name: str) -> tuple[int, bytes]:
        """See :class:`Custody`."""
        with self._lock:
            if name not in self._held:
                raise nothing_held(name)
            fd, payload = self._held[name]
            return os.dup(fd), payload

    def drop(self, name: str) -> None:
        """See :class:`Custody`."""
        with self._lock:
            if name not in self._held:
                raise nothing_held(name)
            fd, _ = self._held.pop(name)
        os.close(fd)

    def names(self) -> list[str]:
        """See :class:`Custody`."""
        with self._lock:
            return sorted(self._held)

    def jump(self) -> None:
        """See :class:`Custody`."""
        boot_loaded()

    def check(self) -> None:
        """See :class:`Custody`; it is this process."""

    def troubles(self) -> list[str]:
        """See :class:`Custody`; none."""
        return []

    def close(self) -> None:
        """Close every fd held."""
        with self._lock:
            held, self._held = self._held, {}
        for fd, _ in held.values():
            os.close(fd)


_CLOSE_TO_LOST = "copy out what no guest maps, then restart the control process: it adopts what guests still hold"


class KeeperStatus(NamedTuple):
    """What the keeper says of itself: entries held and room for, connections, bytes of names and payloads, guards."""

    pid: int
    held: int
    room: int
    clients: int
    bytes: int
    bytes_room: int
    guards: int

    def unguarded(self) -> list[str]:
        """The protections the keeper could not get, in words."""
        words = ("it is not exempt from the OOM killer", "it is not locked in memory", "RLIMIT_NOFILE limits its room")
        return [word for bit, word in enumerate(words) if not self.guards >> bit & 1]


class KeeperCustody(DaemonClient):
    """Fds held by the keeper on the socket at ``path``, over one connection.

    Raises:
        Gone: no keeper answers there (``CustodyGone``).
        Denied: the keeper runs as another user, and this process not as root.
        Refused: the keeper has too many connections (``CustodyBusy``).
    """

    survives = True
    resumes = True

    def __init__(self, path: Path, *, timeout: float = 10.0) -> None:
        super().__init__(path, timeout)

    @classmethod
    def start(cls, runtime_dir: Path) -> KeeperCustody:
        """The keeper of a runtime directory: the one that runs, else a new one, which outlives this process.

        Raises:
            Refused, MemconsoleError: it could not be started.
        """
        path = runtime_dir.absolute() / "keeper"
        what, remedy = "the keeper did not start", "look at the processes that use its socket"
        return started(lambda: cls(path), "memconsole-keeper", path, what=what, remedy=remedy, taken="CustodyTaken")

    @property
    def label(self) -> str:
        """See :class:`Custody`."""
        return f"keeper, pid {self.pid}"

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """See :class:`Custody`."""
        os.fstat(fd)  # a bad fd is the caller's error, not the keeper's end
        self._request(_Op.PUT, check(name, payload), payload, fds=[fd])

    def get(self, name: str) -> tuple[int, bytes]:
        """See :class:`Custody`."""
        reply = self._request(_Op.GET, check(name, b""))
        return reply.fds[0], reply.payload

    def drop(self, name: str) -> None:
        """See :class:`Custody`."""
        self._request(_Op.DROP, check(name, b""))

    def names(self) -> list[str]:
        """See :class:`Custody`."""
        names: list[str] = []
        more, last = True, b""
        while more:
            reply = self._request(_Op.LIST, last)
            more, at = reply.more, 0
            while at < len(reply.payload):
                end = at + 1 + reply.payload[at]
                last = reply.payload[at + 1 : end]
                names.append(last.decode(errors="surrogateescape"))
                at = end
        return names

    def jump(self) -> None:
        """See :class:`Custody`; the keeper itself makes the jump, so that nothing it holds can vanish before it."""
        self._request(_Op.JUMP, patient=True)

    def status(self) -> KeeperStatus:
        """What the keeper says of itself."""
        return _status(self._request(_Op.STAT).payload)

    def check(self) -> None:
        """See :class:`Custody`."""
        self.status()

    def troubles(self) -> list[str]:
        """See :class:`Custody`; none: a keeper that ended is gone."""
        return []

    def end(self, *, holding: bool = False) -> None:
        """Tell the keeper to end; with ``holding`` even if fds are held, which then go.

        Raises:
            Refused: it holds fds (``CustodyHolding``).
        """
        self._request(_Op.QUIT, flags=int(holding))

    def _greeted(self, connection: socket.socket) -> int:
        return _status(_receive(connection, _Op.GREETING, "").payload).pid

    def _nobody(self, why: str) -> Gone:
        return Gone(f"no keeper answers at {self.path}", why, "memconsole serve starts one", code="CustodyGone")

    def _ended(self, why: str) -> Gone:
        what = f"the keeper with pid {self.pid} does not answer"
        why = why or "it ended, and what nobody else holds went with it"
        return Gone(what, why, _CLOSE_TO_LOST, code="CustodyGone")

    def _replaced(self, pid: int) -> Gone:
        why = f"another one, pid {pid}, serves {self.path} and does not hold what it held"
        return Gone(f"the keeper with pid {self.pid} ended", why, _CLOSE_TO_LOST, code="CustodyGone")

    def _request(
        self,
        op: int,
        name: bytes = b"",
        payload: bytes = b"",
        *,
        flags: int = 0,
        fds: Sequence[int] = (),
        patient: bool = False,
    ) -> _Reply:
        message = _REQUEST.pack(_VERSION, op, len(name), flags, len(payload), 0) + name + payload
        return self._ask(message, fds, lambda connection: _receive(connection, op, os.fsdecode(name)), patient=patient)


_VERSION = 1
_CMD_KEXEC = 0x45584543
_NOT_JUMPED = 14
_REQUEST = struct.Struct("<BBBBHH")
_STATUS = struct.Struct("<IIIIQQII")
_LARGEST_REPLY = _REQUEST.size + MAX_PAYLOAD


class _Op:
    GREETING, PUT, GET, DROP, LIST, STAT, QUIT, JUMP = range(8)


class _Reply(NamedTuple):
    more: bool
    payload: bytes
    fds: list[int]


_BROKEN = {
    1: "its lengths do not add up",
    2: "it is of a version this keeper does not speak",
    3: "there is no such operation",
    4: "the name is empty or holds a NUL",
    5: "not as many descriptors arrived as the operation takes",
    6: "it is longer than any request may be",
}
_FULL = {
    8: "it has no room for another descriptor",
    9: "it has no room for another name and payload",
    10: "the kernel gave it no memory",
}


def _refusal(code: int, name: str) -> MemconsoleError:
    """The error for a code that is not OK (``enum code`` in keeper.h)."""
    if code in _FULL:
        return Refused(f"the keeper cannot hold {name!r}", _FULL[code], "release regions", code="CustodyFull")
    match code:
        case 7:
            return nothing_held(name)
        case 11:
            return Refused("the keeper does not end", "it holds descriptors", "release them", code="CustodyHolding")
        case 12:
            return Denied("the keeper denied this process", "it is neither root nor the keeper's user", "run as root")
        case 13:
            return Refused("the keeper has no room for another connection", "", "close others", code="CustodyBusy")
    return WireError("the keeper refused a request", _BROKEN.get(code, f"code {code}"), "use the same version of both")


def _receive(connection: socket.socket, op: int, name: str) -> _Reply:
    """The reply to a request about ``name``.

    Raises:
        OSError: there is none.
        WireError: it is not a reply to this request.
    """
    # socket.recv_fds of Python 3.11 does not pass its flags on, and would leave the fd inheritable
    raw, controls, _, _ = connection.recvmsg(_LARGEST_REPLY, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    fds = [struct.unpack_from("i", data)[0] for _, _, data in controls if len(data) >= 4]
    if not raw:
        raise ConnectionResetError("it closed the connection")
    version, answered, code, more, length, _ = _REQUEST.unpack_from(raw.ljust(_REQUEST.size, b"\0"))
    if version != _VERSION:
        raise WireError(
            f"the keeper speaks version {version} of its protocol",
            f"this memconsole speaks version {_VERSION}",
            "use the memconsole that started it, or release all it holds and end it",
        )
    whole = len(raw) == _REQUEST.size + length and answered == op
    if whole and code == 0 and len(fds) == (op == _Op.GET):
        return _Reply(bool(more), raw[_REQUEST.size :], fds)
    for fd in fds:
        os.close(fd)
    if whole and code == _NOT_JUMPED:
        raise not_jumped(int.from_bytes(raw[_REQUEST.size :], "little"))
    if whole and code:
        raise _refusal(code, name)
    raise WireError("the keeper's reply makes no sense", f"{raw[:8].hex()} with {len(fds)} descriptors")


def _status(payload: bytes) -> KeeperStatus:
    if len(payload) != _STATUS.size:
        raise WireError("the keeper's status makes no sense", f"it has {len(payload)} bytes")
    return KeeperStatus(*_STATUS.unpack(payload)[:7])
