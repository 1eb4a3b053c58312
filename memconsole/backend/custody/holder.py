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

from memconsole import decoding
from memconsole.backend.custody.guard import Guard
from memconsole.backend.peers.daemon import DaemonClient, Refusal, refused, started
from memconsole.errors import (
    Denied,
    Gone,
    KernelRefused,
    MemconsoleError,
    NotFound,
    Refused,
    Silent,
    UsageError,
    WireError,
)

MAX_NAME = 200
MAX_PAYLOAD = 4096
ANSWERS = 10.0
"""Seconds a holder has for a request, the turn for its connection included."""
MEMORY = ("region:", "fresh:", "state:", "carried:", "ledger", "manifest")
"""How the names of what is memory begin; the rest are descriptors of processes, devices and sessions."""


class Custody(Protocol):
    """A holder of fds by name; every method may be called from any thread.

    Whatever holds the fds, every method raises ``Gone`` (``CustodyGone``) once the holder is no more, and ``Silent``
    (``CustodySilent``) while it is there and does not answer; nothing waits longer than ``ANSWERS`` seconds for it.
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
            Gone: it is no more. Silent: it does not answer.
        """

    @property
    def lost(self) -> tuple[str, ...]:
        """The names that it held and cannot give back."""

    def troubles(self) -> list[str]:
        """What went wrong with the holder and was mended as far as it could be, in words."""

    def unguarded(self) -> list[str]:
        """What could end the holder, against which it is not guarded, in words; as of the last :meth:`check`."""

    def bind(self, pid: int) -> None:
        """Have a guest that was started end with what is held, where that ends with this process.

        Raises:
            Gone: it has ended.
        """

    def close(self) -> None:
        """Let go of the holder; a holder that survives keeps what it holds."""


def check(name: str, payload: bytes) -> bytes:
    """The name as bytes.

    Raises:
        UsageError: the name is empty, too long or holds a NUL; or the payload is too long.
    """
    raw = name.encode(errors="backslashreplace")
    if not 0 < len(raw) <= MAX_NAME or b"\0" in raw:
        raise UsageError(f"{name!r} cannot name an fd", f"a name has 1 to {MAX_NAME} bytes and no NUL")
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(f"the payload of {name} is too long", f"{len(payload)} bytes where {MAX_PAYLOAD} may be")
    return raw


def nothing_held(name: str) -> NotFound:
    """The error for a name nothing is held under."""
    return NotFound(
        f"custody holds nothing called {name!r}",
        "it was never put into custody, or was dropped",
        "memconsole audit says what is missing",
    )


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
    return KernelRefused("reboot", code, what=what, remedy="see dmesg for the kernel's reason", code="NotJumped")


class OwnCustody:
    """Fds held by this process; they go when it does, and so do the guests bound to it and the ``directory``."""

    label = "this process"
    survives = False
    resumes = False
    lost: tuple[str, ...] = ()

    def __init__(self, directory: Path | None = None) -> None:
        self._held: dict[str, tuple[int, bytes]] = {}
        self._lock = threading.Lock()
        self._directory = directory
        self._guard: Guard | None = None

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

    def unguarded(self) -> list[str]:
        """See :class:`Custody`; it does not outlive this process anyway."""
        return []

    def bind(self, pid: int) -> None:
        """See :class:`Custody`."""
        with self._lock:
            if self._guard is None:
                self._guard = Guard(self._directory)
            self._guard.bind(pid)

    def close(self) -> None:
        """Close every fd held; guests that are left go on."""
        with self._lock:
            held, self._held = self._held, {}
            guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()
        for fd, _ in held.values():
            os.close(fd)


_CLOSE_TO_LOST = (
    "memconsole copy REGION FILE saves a region that no guest maps; then restart the control process: it adopts what"
    " guests still hold"
)


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
        """The protections of its own life that the keeper could not get, in words (``enum guard`` in keeper.h)."""
        words = ("it is not exempt from the OOM killer", "it is not locked in memory")
        return [word for bit, word in enumerate(words) if not self.guards >> bit & 1]


class KeeperCustody(DaemonClient):
    """Fds held by the keeper on the socket at ``path``, over one connection.

    Raises:
        Gone: no keeper is there (``CustodyGone``).
        Silent: one is there and does not answer (``CustodySilent``).
        Denied: the keeper runs as another user, and this process not as root.
        Refused: the keeper has too many connections (``CustodyBusy``).
    """

    survives = True
    resumes = True
    lost: tuple[str, ...] = ()

    def __init__(self, path: Path, *, timeout: float = ANSWERS) -> None:
        self._unguarded: list[str] = []
        super().__init__(path, timeout)

    @classmethod
    def start(cls, runtime_dir: Path, *, timeout: float = ANSWERS) -> KeeperCustody:
        """The keeper of a runtime directory: the one that runs, else a new one, which outlives this process.

        Raises:
            Refused, MemconsoleError: it could not be started.
        """
        path = runtime_dir.absolute() / "keeper"
        what, remedy = "the keeper did not start", "find the process that uses its socket: fuser"
        return started(
            lambda: cls(path, timeout=timeout),
            "memconsole-keeper",
            path,
            what=what,
            remedy=remedy,
            taken="CustodyTaken",
        )

    @property
    def label(self) -> str:
        """See :class:`Custody`."""
        return f"keeper, pid {self.pid}"

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """See :class:`Custody`."""
        os.fstat(fd)  # a bad fd is the caller's error, not the keeper's end
        self._request(_KeeperOp.PUT, check(name, payload), payload, fds=[fd])

    def get(self, name: str) -> tuple[int, bytes]:
        """See :class:`Custody`."""
        reply = self._request(_KeeperOp.GET, check(name, b""))
        return reply.fds[0], reply.payload

    def drop(self, name: str) -> None:
        """See :class:`Custody`."""
        self._request(_KeeperOp.DROP, check(name, b""))

    def names(self) -> list[str]:
        """See :class:`Custody`."""
        names: list[str] = []
        more, last = True, b""
        while more:
            reply = self._request(_KeeperOp.LIST, last)
            more, at = reply.more, 0
            while at < len(reply.payload):
                end = at + 1 + reply.payload[at]
                last = reply.payload[at + 1 : end]
                names.append(decoding.text(last))
                at = end
        return names

    def jump(self) -> None:
        """See :class:`Custody`; the keeper itself makes the jump, so that nothing it holds can vanish before it."""
        self._request(_KeeperOp.JUMP, patient=True)

    def status(self) -> KeeperStatus:
        """What the keeper says of itself."""
        return _status(self._request(_KeeperOp.STAT).payload)

    def check(self) -> None:
        """See :class:`Custody`."""
        self._unguarded = self.status().unguarded()

    def unguarded(self) -> list[str]:
        """See :class:`Custody`."""
        return self._unguarded

    def bind(self, pid: int) -> None:
        """See :class:`Custody`; the keeper outlives this process."""

    def troubles(self) -> list[str]:
        """See :class:`Custody`; none: a keeper that ended is gone."""
        return []

    def end(self, *, holding: bool = False) -> None:
        """Tell the keeper to end; with ``holding`` even if fds are held, which then go.

        Raises:
            Refused: it holds fds (``CustodyHolding``).
        """
        self._request(_KeeperOp.QUIT, flags=int(holding))

    def _greeted(self, connection: socket.socket) -> int:
        return _status(_receive(connection, _KeeperOp.GREETING, "").payload).pid

    def _nobody(self, why: str) -> Gone:
        return Gone(f"no keeper answers at {self.path}", why, "memconsole serve starts one", code="CustodyGone")

    def _ended(self, why: str) -> Gone:
        what = f"the keeper with pid {self.pid} ended"
        why = why or "memory that no other process holds is lost"
        return Gone(what, why, _CLOSE_TO_LOST, code="CustodyGone")

    def _silent(self, pid: int, why: str) -> Silent:
        remedy = f"find what blocks it: if a signal stopped it, kill -CONT {pid}; do not end it, it holds the memory"
        return Silent(f"the keeper with pid {pid} does not answer", why, remedy, code="CustodySilent")

    def _replaced(self, pid: int) -> Gone:
        why = f"another keeper, pid {pid}, serves {self.path} and does not hold its memory"
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
    ) -> _KeeperReply:
        message = _REQUEST.pack(_VERSION, op, len(name), flags, len(payload), 0) + name + payload
        said = os.fsdecode(name)
        doing = f"{_KeeperOp.NAMES[op]} {said}".rstrip()
        return self._ask(doing, message, fds, lambda connection: _receive(connection, op, said), patient=patient)


_VERSION = 1
"""Raised when ``KEEPER_VERSION`` of ``native/keeper.h`` is, by the rule there."""
_CMD_KEXEC = 0x45584543
_NOT_JUMPED = 14
_REQUEST = struct.Struct("<BBBBHH")
_STATUS = struct.Struct("<IIIIQQII")
_LARGEST_REPLY = _REQUEST.size + MAX_PAYLOAD


class _KeeperOp:
    GREETING, PUT, GET, DROP, LIST, STAT, QUIT, JUMP = range(8)
    NAMES = ("greeting", "put", "get", "drop", "list", "status", "quit", "jump")


class _KeeperReply(NamedTuple):
    more: bool
    payload: bytes
    fds: list[int]


def _full(why: str) -> Refusal:
    remedy = "raise LimitNOFILE= of the service, or reserve fewer regions"
    return Refusal(Refused, "the keeper cannot hold {name}", why, remedy, "CustodyFull")


_REFUSALS = {
    7: Refusal(
        NotFound,
        "custody holds nothing called {name}",
        "it was never put there, or was dropped",
        "memconsole audit says what is missing",
    ),
    8: _full("its table of descriptors is full"),
    9: _full("its room for names and payloads is full"),
    10: _full("the kernel has no memory for it"),
    11: Refusal(
        Refused, "the keeper does not end", "it holds descriptors", "release what it holds first", "CustodyHolding"
    ),
    12: Refusal(Denied, "the keeper denied this process", "it is neither root nor the keeper's user", "run as root"),
    13: Refusal(
        Refused, "the keeper takes no more connections", "all its connections are in use", "close others", "CustodyBusy"
    ),
}


def _receive(connection: socket.socket, op: int, name: str) -> _KeeperReply:
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
            "use the memconsole that started it",
        )
    whole = len(raw) == _REQUEST.size + length and answered == op
    if whole and code == 0 and len(fds) == (op == _KeeperOp.GET):
        return _KeeperReply(bool(more), raw[_REQUEST.size :], fds)
    for fd in fds:
        os.close(fd)
    if whole and code == _NOT_JUMPED:
        raise not_jumped(int.from_bytes(raw[_REQUEST.size :], "little"))
    if whole and code:
        raise refused("the keeper", _REFUSALS, code, name)
    raise WireError("the keeper's reply makes no sense", f"{raw[:8].hex()} with {len(fds)} descriptors")


def _status(payload: bytes) -> KeeperStatus:
    if len(payload) < _STATUS.size:
        raise WireError("the keeper's status makes no sense", f"it has {len(payload)} bytes")
    return KeeperStatus(*_STATUS.unpack_from(payload)[:7])
