"""Who holds the file descriptors without which memory or a session would vanish.

One protocol, three holders: this process (:class:`OwnCustody`: an embedded control process, whose memory may go with
it), the keeper (:mod:`memconsole.backend.keeper`), and the service manager's fd store
(:mod:`memconsole.backend.fdstore`). A name is 1 to 200 bytes; a payload is at most 4096 bytes and says what the fd is.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

from memconsole.errors import NotFound, UsageError

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


class OwnCustody:
    """Fds held by this process; they go when it does."""

    label = "this process"
    survives = False

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

    def close(self) -> None:
        """Close every fd held."""
        with self._lock:
            held, self._held = self._held, {}
        for fd, _ in held.values():
            os.close(fd)
