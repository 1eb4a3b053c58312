"""Where a control process is, and a line to it: the socket of this host, or what ``remote`` makes of another host."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Protocol

from memconsole.backend.wire import protocol
from memconsole.errors import Denied, MemconsoleError, NoControl

CONNECT_S = 5.0


class Line:
    """A connected stream socket to a control process, and what is said where it fails."""

    greets_within = CONNECT_S
    """Seconds within which the service greets."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.sock = sock
        self._path = path

    def wait(self, deadline: float | None) -> None:
        """Let the next ``recvmsg`` of ``sock`` wait until ``deadline`` (monotonic seconds) at the most."""
        self.sock.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))

    def gone(self, method: str, *, acting: bool) -> MemconsoleError:
        """The error for a line that ended before the answer to ``method``."""
        return protocol.gone(self._path, method, acting=acting)

    def silent(self, method: str, seconds: float) -> MemconsoleError:
        """The error for an answer that did not come within so many seconds."""
        return NoControl(
            f"the control process at {self._path} does not answer {method}",
            f"nothing came within {seconds:g} s",
            "see its log; restart it if it hangs: guests and memory stay",
            code="NoAnswer",
        )

    def greeted(self) -> None:
        """The service answered: the line stands."""

    def close(self) -> None:
        """End it."""
        self.sock.close()


class Place(Protocol):
    """Where a control process answers."""

    @property
    def label(self) -> str:
        """The place in a few words: a socket's path, a host as ssh knows it."""

    @property
    def descriptors(self) -> bool:
        """Whether file descriptors come through."""

    def dial(self, *, first: bool) -> Line:
        """A new line; the ``first`` of a client may ask the person at the terminal something.

        Raises:
            NoControl: nothing answers there. Denied: this user may not.
        """


class Local:
    """The control process at a socket of this host."""

    descriptors = True

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def label(self) -> str:
        """The socket's path."""
        return str(self._path)

    def dial(self, *, first: bool) -> Line:  # noqa: ARG002 - nothing is asked
        """See :class:`Place`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A timeout of Python's own would not wait for room where as many as may wait to be let in already.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT_S), 0))
            sock.connect(str(self._path))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
        except OSError as error:
            sock.close()
            raise _unreachable(self._path, error) from None
        return Line(sock, str(self._path))


def _unreachable(path: Path, error: OSError) -> MemconsoleError:
    what = f"no control process answers at {path}"
    start = "start it: memconsole serve"
    if isinstance(error, FileNotFoundError):
        return NoControl(what, "there is no such socket", start, code="NoSocket")
    if isinstance(error, ConnectionRefusedError):
        return NoControl(what, "the control process that made the socket died", start, code="StaleSocket")
    if isinstance(error, PermissionError):
        return Denied(
            f"{path} cannot be opened", "its permissions forbid it", "run as root or as a member of its group"
        )
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return NoControl(what, "it takes no connections", "see its log", code="NoAnswer")
    return NoControl(what, str(error), start)
