"""One thread that serves many unix stream sockets: framing, bounds, time, and nothing of what the messages say.

Memory is bounded whatever peers do: an input message by ``Limits.message``, all unfinished input together by
``Limits.buffered``, output by one answer a connection (a connection whose answer is not yet taken is not read from).
Time too: a message once begun must be finished, and an answer taken, within ``Limits.patience_s``.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from memconsole import unforeseen
from memconsole.backend.peers.peer import EXHAUSTED, ConnectionLimits, ConnectionSlots, Peer, PeerLog

log = logging.getLogger("memconsole.wire")

_RECEIVE = 1 << 16
_SEND_BUFFER = 1 << 20
_READ = select.EPOLLIN | select.EPOLLRDHUP
_PARKED = -1


@dataclass(frozen=True)
class Limits:
    """What peers may cost; sizes in bytes. Strangers are peers of rank 0: all of them do not fill ``buffered``."""

    message: int = 1 << 20
    strangers_message: int = 1 << 16
    buffered: int = 32 << 20
    shares: ConnectionLimits = field(default_factory=ConnectionLimits)
    patience_s: float = 10.0
    strangers_idle_s: float = 30.0
    looked_after_s: float = 1.0
    """How often is looked for those whose time is over; also when one is let in again where no more could be."""


class Speaker(Protocol):
    """What is spoken on a listening socket; every method is called on the loop's thread."""

    end: bytes
    """What ends a message; it is no part of it."""

    def opened(self, connection: PeerConnection) -> None:
        """A peer connected."""

    def received(self, connection: PeerConnection, message: bytes) -> None:
        """A whole message arrived; the next comes when ``connection.busy`` is false and all output is taken."""

    def refuse(self, connection: PeerConnection, code: str, why: str) -> None:
        """Say, if there is a way to, why the connection is about to be closed."""

    def closed(self, connection: PeerConnection) -> None:
        """The connection is gone."""


@dataclass(eq=False)
class PeerConnection:
    """One peer; ``busy`` holds back its further messages, ``streaming`` makes its hang-up the end of everything."""

    loop: Loop
    sock: socket.socket
    peer: Peer
    speaker: Speaker
    rank: int
    busy: bool = False
    streaming: bool = False
    open: bool = True
    inbox: bytearray = field(default_factory=bytearray)
    outbox: deque[tuple[memoryview, tuple[int, ...]]] = field(default_factory=deque)
    waiting_since: float = field(default_factory=time.monotonic)
    ended: bool = False
    finishing: bool = False
    mask: int = 0
    inline: bool = False
    lent: tuple[int, ...] = ()

    def lend(self, fds: Sequence[int]) -> None:
        """Keep these descriptors, and no others, for a peer that reads them by parts; ``inline`` says that it does."""
        _close_all(self.lent)
        self.lent = tuple(fds) if self.open else ()
        if not self.open:
            _close_all(fds)

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

    def __init__(self, limits: Limits | None = None, rank: Callable[[Peer], int] | None = None) -> None:
        """``rank`` says which of ``Limits.shares`` a peer belongs to; everybody to the last, if there is none."""
        self.limits = limits or Limits()
        last = len(self.limits.shares.ranks) - 1
        self._places = ConnectionSlots(self.limits.shares, rank or (lambda _: last))
        self.peers = PeerLog(self.later)
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._listeners: dict[int, tuple[socket.socket, Speaker]] = {}
        self._connections: dict[int, PeerConnection] = {}
        self._buffered = 0
        self._runnable: deque[PeerConnection] = deque()
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
                    with unforeseen.contained("a connection's begin", "loop"):
                        self._accept(*self._listeners[fd])
                elif (connection := self._connections.get(fd)) is not None:
                    with self.contained(connection):
                        self._ready(connection, event)
            while self._calls:
                with unforeseen.contained("a call to the loop", "loop"):
                    self._calls.popleft()()
            for _ in range(len(self._runnable)):
                connection = self._runnable.popleft()
                with self.contained(connection):
                    self._take(connection)
            self._due()

    @contextlib.contextmanager
    def contained(self, connection: PeerConnection) -> Iterator[None]:
        """An exception that was not foreseen ends the one connection it came of."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - this is where it ends
            unforeseen.note(error, f"the service of {connection.peer}", "loop")
            self.drop(connection)

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
            with unforeseen.contained("a timer of the loop", "loop"):
                heapq.heappop(self._timers)[2]()

    # --- connections ----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, speaker: Speaker) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            log.warning("cannot accept a connection: %s; trying again in a second", error.strerror)
            self._epoll.modify(listener.fileno(), 0)
            self.later(self.limits.looked_after_s, lambda: self._epoll.modify(listener.fileno(), select.EPOLLIN))
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        peer = Peer.of(sock)
        rank, crowded = self._places.take(peer)
        connection = PeerConnection(self, sock, peer, speaker, rank)
        self._connections[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), _READ)
        connection.mask = _READ
        if not self._sweeping:
            self._sweeping = True
            self.later(self.limits.looked_after_s, self._sweep)
        speaker.opened(connection)
        if crowded:
            self._refuse(connection, "TooManyClients", crowded)

    def drop(self, connection: PeerConnection) -> None:
        """Close a connection now, whatever it still wanted."""
        if not connection.open:
            return
        connection.open = False
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._places.give_up(connection.peer, connection.rank)
        connection.peer.close()
        self._buffered -= len(connection.inbox)
        connection.inbox.clear()
        for _, fds in connection.outbox:
            _close_all(fds)
        connection.outbox.clear()
        connection.lend(())
        if connection.mask != _PARKED:
            self._epoll.unregister(fd)
        connection.sock.close()
        with unforeseen.contained("a connection's end", "loop"):
            connection.speaker.closed(connection)

    def _refuse(self, connection: PeerConnection, code: str, why: str) -> None:
        connection.busy = True
        self._buffered -= len(connection.inbox)
        connection.inbox.clear()
        connection.speaker.refuse(connection, code, why)
        connection.finish()

    def _ready(self, connection: PeerConnection, event: int) -> None:
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

    def _hung_up(self, connection: PeerConnection) -> None:
        if connection.busy and not connection.finishing:
            # Calls sent before the peer left are still to be heard; epoll would report the hang-up all the while.
            self._epoll.unregister(connection.sock.fileno())
            connection.mask = _PARKED
        else:
            self.drop(connection)

    def _accepting(self, connection: PeerConnection) -> bool:
        held = connection.busy or connection.outbox or connection.ended or connection.finishing
        return not held and self._stop_at is None

    def _watch(self, connection: PeerConnection) -> None:
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

    def _receive(self, connection: PeerConnection) -> None:
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
        elif len(inbox) > (most := self.limits.message if connection.rank else self.limits.strangers_message):
            self._refuse(connection, "TooLarge", f"a message is at most {most} bytes")
        elif self._buffered > self.limits.buffered:
            self._refuse(connection, "Busy", f"unfinished messages of all clients exceed {self.limits.buffered} bytes")

    def proceed(self, connection: PeerConnection) -> None:
        """Let a connection's next message be taken in its turn; close it if its peer ended and nothing is left."""
        if connection.busy or connection.outbox or not connection.open:
            return
        if connection.inbox.find(connection.speaker.end) >= 0:
            self._runnable.append(connection)
        elif connection.ended or connection.finishing:
            self.drop(connection)
        else:
            self._watch(connection)

    def _take(self, connection: PeerConnection) -> None:
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
        self.proceed(connection)  # also where nothing is left here: it may not have been listened to meanwhile

    def flush(self, connection: PeerConnection) -> None:
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
            self.peers.line(logging.INFO, connection.peer, "dropped %s: %s", connection.peer, error.strerror)
            self.drop(connection)
            return
        if connection.finishing:
            self.drop(connection)
            return
        if connection.mask & select.EPOLLOUT:
            self._watch(connection)
            self.proceed(connection)

    def _sweep(self) -> None:
        self._sweeping = bool(self._connections)
        if self._sweeping:
            self.later(self.limits.looked_after_s, self._sweep)
        now = time.monotonic()
        for connection in list(self._connections.values()):
            self._end_overdue(connection, now - connection.waiting_since)

    def _end_overdue(self, connection: PeerConnection, waited: float) -> None:
        patience = self.limits.patience_s
        if connection.outbox:
            if waited > patience:
                text = "dropped %s: it does not read what it asked for"
                self.peers.line(logging.WARNING, connection.peer, text, connection.peer)
                self.drop(connection)
        elif connection.busy:
            pass
        elif connection.inbox:
            if waited > patience:
                self._refuse(connection, "Unfinished", f"a message is finished within {patience:g} s")
        elif not connection.rank and waited > self.limits.strangers_idle_s:
            self.drop(connection)
