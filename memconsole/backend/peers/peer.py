"""Who is at the other end of a unix socket: what the kernel says, and what that one may take of what all share.

A process id alone is no identity: it is another process's once the first has ended. Where the kernel hands out a
descriptor of the process that connected (SO_PEERPIDFD, Linux 6.5), that is who the peer is.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("memconsole.wire")

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What accept(2) says of a process or host that has no room for a connection now."""
_UCRED = struct.Struct("=iII")
_SO_PEERGROUPS, _SO_PEERPIDFD = 59, 77
_NO_DESCRIPTOR = frozenset({errno.ENOPROTOOPT, errno.EINVAL, errno.EMFILE, errno.ENFILE})
"""Kernels before 6.5, and a process or host without room for a descriptor."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end (SO_PEERCRED, SO_PEERGROUPS, SO_PEERPIDFD), as it was when it connected.

    ``process`` is a pidfd, which whoever has the connection closes; None where there is none. ``ended``: the process
    was gone before it could be had.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    process: int | None = field(default=None, compare=False)
    ended: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The peer of a connected unix socket."""
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        groups = _groups(sock)
        try:
            return cls(pid, uid, gid, groups, _process(sock))
        except ProcessLookupError:
            return cls(pid, uid, gid, groups, ended=True)

    def is_alive(self) -> bool:
        """Whether the process that connected runs, as far as the kernel tells: so long ``pid`` is its own."""
        if self.process is None:
            return not self.ended
        poll = select.poll()
        poll.register(self.process, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Let go of the process; called once, by whoever has the connection."""
        if self.process is not None:
            os.close(self.process)

    def who(self) -> str:
        """The peer for those who read of it later: a process that has ended is no more the one with that number."""
        return str(self) if self.is_alive() else f"{self} (ended)"

    def __str__(self) -> str:
        return f"uid {self.uid} pid {self.pid}"


def _groups(sock: socket.socket) -> tuple[int, ...]:
    size = 4 * 256
    while True:
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, size)
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
            size *= 16
            continue
        return struct.unpack(f"={len(raw) // 4}I", raw)


def _process(sock: socket.socket) -> int | None:
    """A pidfd of the process that connected.

    Raises:
        ProcessLookupError: it has ended (Linux before 6.16; later ones give a pidfd of an ended process).
    """
    try:
        (fd,) = struct.unpack("=i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
    except OSError as error:
        if error.errno in _NO_DESCRIPTOR:
            return None
        raise
    os.set_inheritable(fd, False)
    return int(fd)


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be: of everybody up to a rank together, and of one user but root.

    ``ranks`` by rank, 0 for those who have no role: so whatever the lower ranks do, there is room for the higher ones.
    """

    ranks: tuple[int, ...] = (256, 768, 1024)
    per_user: int = 128
    per_stranger: int = 16


class ConnectionSlots:
    """The connections there are, against what each rank and user may have."""

    def __init__(self, shares: ConnectionLimits, rank: Callable[[Peer], int]) -> None:
        self._shares = shares
        self._rank = rank
        self._ranks: Counter[int] = Counter()
        self._users: Counter[int] = Counter()

    def take(self, peer: Peer) -> tuple[int, str]:
        """The rank of a peer, and why there is no place for it, or an empty string; it is counted either way."""
        rank = self._rank(peer)
        self._ranks[rank] += 1
        self._users[peer.uid] += 1
        limit = self._shares.per_user if rank else self._shares.per_stranger
        if sum(self._ranks[lower] for lower in range(rank + 1)) > self._shares.ranks[rank]:
            others = "are connected" if rank + 1 == len(self._shares.ranks) else "are connected who may not act"
            return rank, f"{self._shares.ranks[rank]} {others}"
        if peer.uid and self._users[peer.uid] > limit:
            return rank, f"user {peer.uid} has {limit} connections"
        return rank, ""

    def give_up(self, peer: Peer, rank: int) -> None:
        """Give a place back that was taken."""
        self._ranks[rank] -= 1
        self._users[peer.uid] -= 1
        if not self._users[peer.uid]:
            del self._users[peer.uid]


class Rate:
    """At most ``each`` in ``window_s`` seconds for one user, and ``together`` for all; ``left_out`` were too many."""

    def __init__(self, each: int, together: int, window_s: float = 60.0) -> None:
        self._each, self._together, self._window_s = each, together, window_s
        self._since = -window_s
        self._taken: Counter[int] = Counter()
        self.left_out = 0

    def take(self, uid: int) -> bool:
        """Whether there may be one more."""
        if time.monotonic() - self._since >= self._window_s:
            self._since = time.monotonic()
            self._taken.clear()
        if self._taken[uid] >= self._each or self._taken.total() >= self._together:
            self.left_out += 1
            return False
        self._taken[uid] += 1
        return True


class PeerLog:
    """Lines about what peers do: a few a minute for each user and for all, and how many were left out."""

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._later = later
        self._rate = Rate(each=10, together=60)

    def line(self, level: int, peer: Peer, text: str, *args: object) -> None:
        """Log a line about a peer, or count it."""
        if self._rate.take(peer.uid):
            log.log(level, text, *args)
        elif self._rate.left_out == 1:
            self._later(60.0, lambda: self._tell(str(peer)))

    def _tell(self, first: str) -> None:
        left_out, self._rate.left_out = self._rate.left_out, 0
        log.warning("%d more lines about peers were left out within a minute, the first about %s", left_out, first)
