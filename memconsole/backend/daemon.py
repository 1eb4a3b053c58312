"""The client's end of the small daemons that outlive the control process (``native/daemon.h``): keeper and mount.

One connection, one request at a time, made anew when it breaks; but never to another process than the first one, for
that would not hold what this one held.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from memconsole.errors import Denied, Gone, MemconsoleError, Refused, WireError

_ALREADY_SERVED = 3
_LINGERS_S = 2.0

R = TypeVar("R")
D = TypeVar("D", bound="DaemonClient")


class DaemonClient(ABC):
    """The daemon on the socket at ``path``; ``pid`` once it has answered. Every method from any thread.

    Raises:
        Gone: none answers there.
        Denied: it runs as another user, and this process not as root.
        Refused: it has too many connections.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.pid = 0
        with self._lock:
            self._connect()

    def close(self) -> None:
        """Close the connection; the daemon goes on."""
        with self._lock:
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
    def _replaced(self, pid: int) -> Gone:
        """The error for another daemon in the place of the one that was there."""

    def _ask(
        self, message: bytes, fds: Sequence[int], receive: Callable[[socket.socket], R], *, patient: bool = False
    ) -> R:
        """What ``receive`` makes of the answer to a message."""
        with self._lock:
            connection = self._socket or self._connect()
            try:
                connection.settimeout(None if patient else self._timeout)
                socket.send_fds(connection, [message], list(fds))
                return receive(connection)
            except OSError as error:
                self._disconnect()
                raise self._ended(str(error)) from None
            except WireError:
                self._disconnect()
                raise

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.settimeout(self._timeout)
        try:
            connection.connect(str(self.path))
            pid = self._greeted(connection)
            if self.pid not in {0, pid}:
                raise self._replaced(pid)
        except OSError as error:
            connection.close()
            if isinstance(error, PermissionError):
                raise Denied(f"{self.path} may not be reached", str(error), "run as root") from None
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


def started(connect: Callable[[], D], program: str, *arguments: Path, what: str, remedy: str, taken: str) -> D:
    """The daemon that runs, else a new one, which outlives this process.

    Raises:
        MemconsoleError: it cannot be started: ``what``, its last words, ``remedy``.
        Refused: another holds its place and does not answer (code ``taken``).
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
            why = ran.stderr.decode(errors="replace").strip() or str(gone)
            if ran.returncode not in {0, _ALREADY_SERVED}:
                raise MemconsoleError(what, why, remedy) from None
            # one that was started at the same moment does not listen yet, or one that ends has not ended
            if time.monotonic() > deadline:
                raise Refused(what, why, code=taken) from None
            time.sleep(0.02)
