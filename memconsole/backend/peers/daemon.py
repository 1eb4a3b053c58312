"""The client's end of the small daemons that outlive the control process (``native/daemon.h``): keeper and mount.

One connection, one request at a time (:mod:`.turns`), made anew when it breaks; but never to another process than the
first one, for that would not hold what this one held. A daemon that is there and does not answer is silent, not gone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from memconsole import decoding
from memconsole.backend.peers.turns import Turn
from memconsole.errors import Denied, Gone, MemconsoleError, Refused, Silent, WireError

_ALREADY_SERVED = 3
_LINGERS_S = 2.0
_SHORTEST_S = 0.01
"""A timeout of 0 would make a socket non-blocking."""


class Refusal(NamedTuple):
    """What a code of a daemon means: an error, in whose words ``{name}`` is what was asked about."""

    error: type[MemconsoleError]
    what: str
    why: str = ""
    remedy: str = ""
    code: str = ""


_BROKEN = {
    1: "the lengths in the request do not add up",
    2: "the server does not speak the version of the request",
    3: "the server has no such operation",
    4: "the name in the request is not valid",
    5: "the operation takes other descriptors",
    6: "the request is longer than any may be",
}
"""Codes that the daemons share: of requests that memconsole does not make."""


def refused(server: str, refusals: Mapping[int, Refusal], code: int, name: str) -> MemconsoleError:
    """The error for a code that is not OK (``enum code`` of the daemon's source)."""
    found = refusals.get(code)
    if found is None:
        why = _BROKEN.get(code, f"code {code}")
        return WireError(f"{server} refused a request", why, f"use one version of memconsole and {server}")
    return found.error(found.what.format(name=repr(name)), found.why, found.remedy, code=found.code)


R = TypeVar("R")
D = TypeVar("D", bound="DaemonClient")


class DaemonClient(ABC):
    """The daemon on the socket at ``path``; ``pid`` once it has answered. Every method from any thread.

    Raises:
        Gone: none answers there.
        Silent: one is there and does not answer within ``timeout`` seconds.
        Denied: it runs as another user, and this process not as root.
        Refused: it has too many connections.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self._turn = Turn(f"the server at {path}")
        self._socket: socket.socket | None = None
        self._closed = False
        self.pid = 0
        with self._turn.taken("a greeting", timeout) as left:
            self._connect(left)

    def close(self) -> None:
        """Close the connection; the daemon goes on. A request under way ends with an error."""
        self._closed = True
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Silent), self._turn.taken("its end", self._timeout):
            self._disconnect()

    @abstractmethod
    def _greeted(self, connection: socket.socket) -> int:
        """The PID in the greeting that a new connection receives."""

    @abstractmethod
    def _nobody(self, why: str) -> Gone:
        """The error for a socket on which nobody answers."""

    @abstractmethod
    def _ended(self, why: str) -> Gone:
        """The error for a daemon that was there and is no more."""

    @abstractmethod
    def _silent(self, pid: int, why: str) -> Silent:
        """The error for a daemon that is there and does not answer."""

    @abstractmethod
    def _replaced(self, pid: int) -> Gone:
        """The error for another daemon in the place of the one that was there."""

    def _ask(
        self,
        doing: str,
        message: bytes,
        fds: Sequence[int],
        receive: Callable[[socket.socket], R],
        *,
        patient: bool = False,
    ) -> R:
        """What ``receive`` makes of the answer to a message; ``patient``: however long that takes."""
        with self._turn.taken(doing, self._timeout) as left:
            deadline = time.monotonic() + left
            connection = self._socket or self._connect(left)
            try:
                connection.settimeout(None if patient else _until(deadline))
                socket.send_fds(connection, [message], list(fds))
                connection.settimeout(None if patient else _until(deadline))
                return receive(connection)
            except (TimeoutError, BlockingIOError):
                # What it says later would be taken for the answer to another request.
                self._disconnect()
                raise self._silent(self.pid, f"no answer to {doing} within {self._timeout:g} s") from None
            except OSError as error:
                self._disconnect()
                raise self._ended(str(error)) from None
            except WireError:
                self._disconnect()
                raise

    def _connect(self, within: float) -> socket.socket:
        if self._closed:
            raise self._ended("this process closed its connection")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.settimeout(max(_SHORTEST_S, within))
        try:
            connection.connect(str(self.path))
            pid = self._greeted(connection)
            if self.pid not in {0, pid}:
                raise self._replaced(pid)
        except (TimeoutError, BlockingIOError):  # the latter: as many wait to be let in as may
            pid = self.pid or _listener(connection)
            connection.close()
            raise self._silent(pid, f"it sent no greeting for {within:g} s") from None
        except OSError as error:
            connection.close()
            if isinstance(error, PermissionError):
                raise Denied(f"{self.path} cannot be reached", str(error), "run as root") from None
            raise self._nobody(str(error)) from None
        except MemconsoleError:
            connection.close()
            raise
        self.pid = pid
        self._socket = connection
        return connection

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _until(deadline: float) -> float:
    return max(_SHORTEST_S, deadline - time.monotonic())


def _listener(connection: socket.socket) -> int:
    """The PID of the process that listens, as the kernel noted it; 0 where there is no connection."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])


def started(connect: Callable[[], D], program: str, *arguments: Path, what: str, remedy: str, taken: str) -> D:
    """The daemon that runs, else a new one, which outlives this process.

    Raises:
        MemconsoleError: it cannot be started: ``what``, its last words, ``remedy``.
        Silent: one is there, and does not answer: it would hold what a new one does not.
        Refused: another holds its place (code ``taken``).
    """
    with contextlib.suppress(Gone):
        return connect()
    import subprocess

    from memconsole import native

    command = [native.program(program), *map(str, arguments)]
    deadline = time.monotonic() + _LINGERS_S
    while True:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        try:
            return connect()
        except Gone as gone:
            why = decoding.text(ran.stderr).strip() or str(gone)
            if ran.returncode not in {0, _ALREADY_SERVED}:
                raise MemconsoleError(what, why, remedy) from None
            # one that was started at the same moment does not listen yet, or one that ends has not ended
            if time.monotonic() > deadline:
                raise Refused(what, why, code=taken) from None
            time.sleep(0.02)
