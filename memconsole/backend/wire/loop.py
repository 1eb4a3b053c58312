"""One thread that serves many unix stream sockets: framing, bounds, time, and nothing of what the messages say.

Memory is bounded whatever peers do: an input message by ``Limits.message``, all unfinished input together by
``Limits.buffered``, output by one answer a connection (a connection whose answer is not yet taken is not read from).
Time too: a message once begun must be finished, and an answer taken, within ``Limits.patience_s``.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger("memconsole.wire")

_UCRED = struct.Struct("=iII")
_SO_PEERGROUPS = 59
_RECEIVE = 1 << 16
_SEND_BUFFER = 1 << 20
_READ = select.EPOLLIN | select.EPOLLRDHUP
_PARKED = -1


@dataclass(frozen=True)
class Limits:
    """What peers may cost; sizes in bytes."""

    message: int = 1 << 20
    buffered: int = 32 << 20
    connections: int = 1024
    per_user: int = 128
    patience_s: float = 10.0


@dataclass(frozen=True)
class Peer:
    """Who is at the other end (SO_PEERCRED, SO_PEERGROUPS), as it was when it connected."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The peer of a connected unix socket."""
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        size = 4 * 256
        while True:
            try:
                raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, size)
            except OSError as error:
                if error.errno != errno.ERANGE:
                    raise
                size *= 16
                continue
            return cls(pid, uid, gid, struct.unpack(f"={len(raw) // 4}I", raw))

    def __str__(self) -> str:
        return f"uid {self.uid} pid {self.pid}"


class Speaker(Protocol):
    """What is spoken on a listening socket; every method is called on the loop's thread."""

    end: bytes
    """What ends a message; it is no part of it."""

    def opened(self, connection: Connection) -> None:
        """A peer connected."""

    def received(self, connection: Connection, message: bytes) -> None:
        """A whole message arrived; the next comes when ``connection.busy`` is false and all output is taken."""

    def refuse(self, connection: Connection, code: str, why: str) -> None:
        """Say, if there is a way to, why the connection is about to be closed."""

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""


@dataclass(eq=False)
class Connection:
    """One peer; ``busy`` holds back its further messages, ``streaming`` makes its hang-up the end of everything."""

    loop: Loop
    sock: socket.socket
    peer: Peer
    speaker: Speaker
    busy: bool = False
    streaming: bool = False
    open: bool = True
    inbox: bytearray = field(default_factory=bytearray)
    outbox: deque[tuple[memoryview, tuple[int, ...]]] = field(default_factory=deque)
    waiting_since: float = 0.0
    ended: bool = False
    finishing: bool = False
    mask: int = 0

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue bytes, and file descriptors that become the connection's to close, and send what can be sent now."""
        if not self.open:
            _close_all(fds)
            return
        self.outbox.append((memoryview(data), tuple(fds)))
        if len(self.outbox) == 1:
            self.loop.flush(self)

    def release(self) -> None:
        """The message was answered: go on with the next."""
        self.busy = False
        self.waiting_since = time.monotonic()
        if self.open:
            self.loop.proceed(self)

    def finish(self) -> None:
        """Close once everything queued was taken."""
        self.finishing = True
        if not self.outbox:
            self.loop.drop(self)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Loop:
    """The epoll loop; only ``call`` and ``stop`` may be called from other threads."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._listeners: dict[int, tuple[socket.socket, Speaker]] = {}
        self._connections: dict[int, Connection] = {}
        self._users: Counter[int] = Counter()
        self._buffered = 0
        self._runnable: deque[Connection] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._sweeping = False
        self._stop_at: float | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._connections)

    # --- from any thread ------------------------------------------------------------------------------------------

    def call(self, what: Callable[[], None]) -> bool:
        """Run ``what`` on the loop's thread soon; false, and nothing is run, once the loop was closed."""
        with self._lock:
            if self._closed:
                return False
            self._calls.append(what)
            os.eventfd_write(self._wake, 1)
            return True

    def stop(self, grace: float) -> None:
        """Take no more messages, and make :meth:`run` return when all are answered or ``grace`` seconds have passed."""
        self.call(lambda: self._stop(grace))

    def _stop(self, grace: float) -> None:
        self._stop_at = time.monotonic() + grace
        for sock, _ in self._listeners.values():
            self._epoll.unregister(sock.fileno())

    # --- on the loop's thread -------------------------------------------------------------------------------------

    def listen(self, sock: socket.socket, speaker: Speaker) -> None:
        """Serve a listening socket, which becomes the loop's to close."""
        sock.setblocking(False)
        self._listeners[sock.fileno()] = sock, speaker
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Run ``what`` after so many seconds."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), what))

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._done():
            for fd, event in self._epoll.poll(self._timeout()):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif fd in self._listeners:
                    self._accept(*self._listeners[fd])
                else:
                    self._ready(fd, event)
            while self._calls:
                self._calls.popleft()()
            for _ in range(len(self._runnable)):
                self._take(self._runnable.popleft())
            self._due()

    def close(self) -> None:
        """Close every connection, listener and descriptor."""
        with self._lock:
            self._closed = True
        for connection in list(self._connections.values()):
            self.drop(connection)
        while self._calls:
            self._calls.popleft()()
        for sock, _ in self._listeners.values():
            sock.close()
        self._listeners.clear()
        self._epoll.close()
        os.close(self._wake)

    def _done(self) -> bool:
        if self._stop_at is None:
            return False
        unanswered = any(connection.busy or connection.outbox for connection in self._connections.values())
        return not unanswered or time.monotonic() >= self._stop_at

    def _timeout(self) -> float:
        if self._stop_at is not None:
            return 0.05
        if self._runnable or self._calls:
            return 0
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    # --- connections ----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, speaker: Speaker) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                raise
            log.warning("cannot accept a connection: %s; trying again in a second", error.strerror)
            self._epoll.modify(listener.fileno(), 0)
            self.later(1.0, lambda: self._epoll.modify(listener.fileno(), select.EPOLLIN))
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        peer = Peer.of(sock)
        connection = Connection(self, sock, peer, speaker)
        self._connections[sock.fileno()] = connection
        self._users[peer.uid] += 1
        self._epoll.register(sock.fileno(), _READ)
        connection.mask = _READ
        if not self._sweeping:
            self._sweeping = True
            self.later(1.0, self._sweep)
        speaker.opened(connection)
        if len(self._connections) > self.limits.connections:
            self._refuse(connection, "TooManyClients", f"{self.limits.connections} are connected")
        elif peer.uid and self._users[peer.uid] > self.limits.per_user:
            self._refuse(connection, "TooManyClients", f"user {peer.uid} has {self.limits.per_user} connections")

    def drop(self, connection: Connection) -> None:
        """Close a connection now, whatever it still wanted."""
        if not connection.open:
            return
        connection.open = False
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._users[connection.peer.uid] -= 1
        if not self._users[connection.peer.uid]:
            del self._users[connection.peer.uid]
        self._buffered -= len(connection.inbox)
        connection.inbox.clear()
        for _, fds in connection.outbox:
            _close_all(fds)
        connection.outbox.clear()
        if connection.mask != _PARKED:
            self._epoll.unregister(fd)
        connection.sock.close()
        connection.speaker.closed(connection)

    def _refuse(self, connection: Connection, code: str, why: str) -> None:
        connection.busy = True
        self._buffered -= len(connection.inbox)
        connection.inbox.clear()
        connection.speaker.refuse(connection, code, why)
        connection.finish()

    def _ready(self, fd: int, event: int) -> None:
        connection = self._connections.get(fd)
        if connection is None:
            return
        if event & select.EPOLLOUT:
            self.flush(connection)
        if not connection.open:
            return
        if event & (select.EPOLLIN | select.EPOLLRDHUP) and self._accepting(connection):
            self._receive(connection)
        elif connection.streaming and event & (select.EPOLLRDHUP | select.EPOLLHUP):
            self.drop(connection)
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            self._hung_up(connection)
        else:
            self._watch(connection)

    def _hung_up(self, connection: Connection) -> None:
        if connection.busy and not connection.finishing:
            # Calls sent before the peer left are still to be heard; epoll would report the hang-up all the while.
            self._epoll.unregister(connection.sock.fileno())
            connection.mask = _PARKED
        else:
            self.drop(connection)

    def _accepting(self, connection: Connection) -> bool:
        held = connection.busy or connection.outbox or connection.ended or connection.finishing
        return not held and self._stop_at is None

    def _watch(self, connection: Connection) -> None:
        mask = _READ if self._accepting(connection) else 0
        if connection.streaming:
            mask |= select.EPOLLRDHUP
        if connection.outbox:
            mask |= select.EPOLLOUT
        if mask == connection.mask:
            return
        if connection.mask == _PARKED:
            self._epoll.register(connection.sock.fileno(), mask)
        else:
            self._epoll.modify(connection.sock.fileno(), mask)
        connection.mask = mask

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            self.drop(connection)
            return
        inbox = connection.inbox
        if not data:
            connection.ended = True
            self.proceed(connection)
            return
        if not inbox:
            connection.waiting_since = time.monotonic()
        searched = max(0, len(inbox) - len(connection.speaker.end))
        inbox += data
        self._buffered += len(data)
        if inbox.find(connection.speaker.end, searched) >= 0:
            self._take(connection)
        elif len(inbox) > self.limits.message:
            self._refuse(connection, "TooLarge", f"a message is at most {self.limits.message} bytes")
        elif self._buffered > self.limits.buffered:
            self._refuse(connection, "Busy", f"unfinished messages of all clients exceed {self.limits.buffered} bytes")

    def proceed(self, connection: Connection) -> None:
        """Let a connection's next message be taken in its turn; close it if its peer ended and nothing is left."""
        if connection.busy or connection.outbox or not connection.open:
            return
        if connection.inbox.find(connection.speaker.end) >= 0:
            self._runnable.append(connection)
        elif connection.ended or connection.finishing:
            self.drop(connection)
        else:
            self._watch(connection)

    def _take(self, connection: Connection) -> None:
        if connection.busy or connection.outbox or not connection.open or connection.finishing or self._stop_at:
            return
        inbox = connection.inbox
        end = connection.speaker.end
        at = inbox.find(end)
        if at < 0:
            return
        message = bytes(inbox[:at])
        del inbox[: at + len(end)]
        self._buffered -= at + len(end)
        connection.waiting_since = time.monotonic()
        connection.speaker.received(connection, message)
        if connection.inbox or connection.ended:
            self.proceed(connection)

    def flush(self, connection: Connection) -> None:
        """Send what the peer will take of what is queued."""
        outbox = connection.outbox
        try:
            while outbox:
                data, fds = outbox[0]
                if fds:
                    sent = socket.send_fds(connection.sock, [data], list(fds), socket.MSG_NOSIGNAL)
                    _close_all(fds)
                else:
                    sent = connection.sock.send(data, socket.MSG_NOSIGNAL)
                connection.waiting_since = time.monotonic()
                if sent == len(data):
                    outbox.popleft()
                else:
                    outbox[0] = data[sent:], ()
        except BlockingIOError:
            self._watch(connection)
            return
        except OSError as error:
            log.info("dropped %s: %s", connection.peer, error.strerror)
            self.drop(connection)
            return
        if connection.finishing:
            self.drop(connection)
            return
        if connection.mask & select.EPOLLOUT:
            self._watch(connection)
            self.proceed(connection)

    def _sweep(self) -> None:
        oldest = time.monotonic() - self.limits.patience_s
        for connection in list(self._connections.values()):
            if connection.waiting_since > oldest:
                continue
            if connection.outbox:
                log.warning("dropped %s: it does not read what it asked for", connection.peer)
                self.drop(connection)
            elif connection.inbox and not connection.busy:
                self._refuse(connection, "Unfinished", f"a message is finished within {self.limits.patience_s:g} s")
        self._sweeping = bool(self._connections)
        if self._sweeping:
            self.later(1.0, self._sweep)
