"""The service on its socket, in a thread: of ``memconsole serve``, and of a console's embedded control process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from memconsole import paths, unforeseen
from memconsole.backend.wire import sockets
from memconsole.backend.wire.loop import Limits, Loop, Speaker
from memconsole.backend.wire.roles import Roles
from memconsole.backend.wire.server import Service, ServiceSource

GRACE_S = 20.0
"""How long what is under way may take to end before a service that was asked to end does."""


class RunningService:
    """A service that runs; ``path`` is removed when it ends, unless the socket was given by a service manager."""

    def __init__(self, loop: Loop, service: Service, path: Path | None) -> None:
        self._loop = loop
        self._service = service
        self._path = path
        self._inode = path.stat().st_ino if path is not None else 0
        self._closed = False
        self._thread = unforeseen.thread("memconsole-wire", self._run)
        self._thread.start()

    def listen(self, sock: socket.socket, speaker: Speaker) -> None:
        """Serve another listening socket from the same thread."""
        self._loop.call(lambda: self._loop.listen(sock, speaker))

    @property
    def loop(self) -> Loop:
        """The loop it runs on."""
        return self._loop

    @property
    def service(self) -> Service:
        """What it serves."""
        return self._service

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, grace: float = GRACE_S) -> None:
        """Take no more calls, let those under way end, and remove the socket; the Source stays open."""
        if self._closed:
            return
        self._closed = True
        if self._path is not None and _inode(self._path) == self._inode:
            self._path.unlink(missing_ok=True)
        self._loop.call(self._service.farewell)
        self._loop.stop(grace)
        self._thread.join()
        self._service.close(grace)

    def _run(self) -> None:
        try:
            self._loop.run()
        finally:
            self._loop.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


def serve_in_thread(
    source: ServiceSource,
    path: str | os.PathLike[str] | None = None,
    *,
    sock: socket.socket | None = None,
    roles: Roles | None = None,
    limits: Limits | None = None,
) -> RunningService:
    """Serve a Source on a socket made at ``path``, or on the listening socket ``sock`` of a service manager.

    Raises:
        Refused: the path is in use or in the way (:func:`places.bind`).
    """
    made: Path | None = None
    if sock is None:
        if path is None:
            raise TypeError("serve_in_thread needs a path or a socket")
        made = Path(path)
        paths.make_directory(made.parent, 0o755)
        sock = sockets.bind(made)
    roles = roles or Roles()
    loop = Loop(limits, roles.of)
    service = Service(loop, source, roles)
    loop.listen(sock, service)
    return RunningService(loop, service, made)
