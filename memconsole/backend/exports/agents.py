"""What passes between the agents socket and a guest's agent, and what is kept of each: offers, requests, uffds.

SOCK_SEQPACKET, one message a packet, little-endian; ``native/agent.h`` is the same grammar in C::

    message  = head body                    head.length counts the whole packet, at most 8192 bytes
    head     = u32 magic "MCAG", u16 version 1, u16 type, u32 id, u32 length
    name     = 64 bytes of UTF-8, NUL-padded, the last byte NUL

    agent -> control
      HELLO    1  = u32 runs_as (0 neither, 1 kvm, 2 process), u32 count, count * name   first message: what it holds
      DONE     2  = i32 status, u32 zero, char text[120]         the answer to the request of that id; 0 or an errno
      HANDED   5  = u32 modes, u32 zero, u64 address; one fd: an uffd with which the mapping at the address is
                    registered (UFFDIO_REGISTER_MODE_*); comes before the answer to a GRANT that wants one, by its id
      REPORTED 3  = u32 runs_as, u32 state (1 running, 2 paused, 3 failed),
                    u64 beats, checked, wrong, gap_ns, gaps, restored, blackout_ns, char text[120]
      SWEPT    4  = u64 pages, u64 wrong, u64 ns
    control -> agent
      GRANT   16  = name, u64 offset, u64 length, u64 gpa (all ones: none), u32 access (1 ro, 2 rw, 3 a window),
                    u32 wants (1 its page faults, 2 a way to bar it); one fd
      UNMAP   17  = name
      SAVE    22    no body, one fd: stop, and write there what it is besides its RAM
      TAKEN   24    no body: the uffd handed over for the GRANT of that id is in custody, or nobody has it
      PAUSE 18, RESUME 19, REPORT 20, STOP 21, SWEEP 23 have no body
"""

from __future__ import annotations

import select
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from memconsole import agent as wire
from memconsole.agent import BadMessage, Type
from memconsole.backend.exports.answers import AgentReply
from memconsole.backend.exports.offer import Offer
from memconsole.errors import KernelRefused
from memconsole.model import Access, ProcessId


class Uffd(NamedTuple):
    """An uffd as a guest's ``process`` handed it over: for which grant's mapping, and how that is
    registered; ``fd`` is closed afterwards.
    """

    guest: str
    process: ProcessId
    grant: str
    fd: int
    modes: int
    address: int


@dataclass
class PendingRequest:
    """A request that was sent, until it is answered."""

    type: Type
    grant: str
    handed: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    given_up: bool = False
    answered: threading.Event = field(default_factory=threading.Event)
    answer: AgentReply | None = None


@dataclass
class OfferedGrant:
    """A grant offered to a guest, with a duplicate of its fd; ``sent`` once its agent has it."""

    offer: Offer
    fd: int
    sent: bool


@dataclass
class AgentPeer:
    """A registered guest, and the connection of its agent, if it has one; ``mapped`` as the agent says."""

    name: str
    process: ProcessId
    offers: dict[str, OfferedGrant] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)
    asked: dict[int, PendingRequest] = field(default_factory=dict)
    socket: socket.socket | None = None
    greeted: bool = False
    last_id: int = 0


class UffdTransfer(NamedTuple):
    """An uffd on its way into custody, and where it came from."""

    peer: AgentPeer
    connection: socket.socket
    id: int
    uffd: Uffd


def body_of(type: Type, grant: str, offered: OfferedGrant | None) -> bytes:
    """The body of a request about a grant; empty where a request has none."""
    if offered is not None:
        offer = offered.offer
        return wire.GRANT.pack(
            wire.pack_name(grant),
            offer.offset,
            offer.length,
            wire.NO_GPA if offer.gpa is None else offer.gpa,
            wire.WINDOW if offer.window else 2 if offer.access is Access.RW else 1,
            offer.wants,
        )
    return wire.pack_name(grant) if type is Type.UNMAP else b""


def held_by(hello: wire.Message) -> set[str]:
    """The grants that an agent has mapped, as its HELLO says.

    Raises:
        BadMessage: it is too short, or of another length than it says.
    """
    if len(hello.body) < wire.HELLO.size:
        raise BadMessage("a HELLO too many or too short")
    _, count = wire.HELLO.unpack_from(hello.body)
    names = hello.body[wire.HELLO.size :][: count * wire.NAME.size]
    if count > wire.MAX_GRANTS or len(names) < count * wire.NAME.size:
        raise BadMessage("a HELLO of another length than it says")
    return {wire.unpack_name(raw) for (raw,) in wire.NAME.iter_unpack(names)}


def writable(connection: socket.socket, within: float) -> bool:
    """Whether there is room in a connection, or comes within so many seconds."""
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    return bool(poller.poll(int(within * 1000)))


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, in place of one left there.

    Raises:
        KernelRefused: it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        # Guests run as anybody: who they are decides, not that they can knock.
        path.chmod(0o666)
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise KernelRefused(str(path), error.errno or 0, what="the agents socket cannot be made") from None
    return listener
