"""The agents socket: how grants reach guests as file descriptors, and how they are asked back.

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

The agent connects. Who it is, the kernel says (SO_PEERCRED): a process that is not a registered guest, or whose start
time is another's, is disconnected, and so is whoever breaks the grammar; nobody else notices. A guest is only ever
sent its own grants. After HELLO it is sent the grants it lacks and asked to unmap what is not granted any more.

An agent that has handed an uffd over uses the mapping from TAKEN on, and answers DONE then. If the connection ends
before, it unmaps: HELLO lacks the grant, which is offered and handed over again. So whoever dies, a mapping that is in
use and registered has its uffd in custody. Fault points: ``map.uffd.before``, ``held`` (in custody), ``after`` (told).
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from memconsole import agent as wire
from memconsole.agent import BadMessage, Type
from memconsole.backend import steps
from memconsole.backend.guests.base import Offer
from memconsole.backend.guests.handle import stat
from memconsole.errors import Gone, GuestError, KernelRefused, NotFound, Refused
from memconsole.model import Access, Progress


class Uffd(NamedTuple):
    """An uffd as a guest's ``process`` (PID, start time) handed it over: for which grant's mapping, and how that is
    registered; ``fd`` is closed afterwards.
    """

    guest: str
    process: tuple[int, int]
    grant: str
    fd: int
    modes: int
    address: int


OnUffd = Callable[[Uffd], None]
_MAX_UNANSWERED = 256
_STATES = {1: "running", 2: "paused", 3: "failed"}


class Answer(NamedTuple):
    """What a guest answered: ``status`` 0 or an errno, its words; to REPORT its state, progress and how often it was
    restored, last after how long; to SWEEP the pages it checked and the bytes that are wrong.
    """

    status: int
    text: str
    state: str = ""
    progress: Progress | None = None
    restored: int = 0
    blackout_ns: int = 0
    pages: int = 0
    wrong: int = 0


@dataclass
class _Ask:
    type: Type
    grant: str
    handed: bool = False
    answered: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None


@dataclass
class _Offered:
    offer: Offer
    fd: int
    sent: bool


@dataclass
class _Peer:
    name: str
    pid: int
    start_ticks: int
    offers: dict[str, _Offered] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)
    asked: dict[int, _Ask] = field(default_factory=dict)
    socket: socket.socket | None = None
    greeted: bool = False
    last_id: int = 0


class Hub:
    """The agents socket of one control process; one thread listens, every method may be called from any thread."""

    def __init__(
        self, path: Path, *, on_change: Callable[[str], None] | None = None, on_uffd: OnUffd | None = None
    ) -> None:
        """Listen on ``path``, in place of a socket left there.

        ``on_change`` is called, in the hub's thread, with a guest's name when it connected, went, or mapped or
        unmapped a grant; ``on_uffd`` when it handed an uffd over, before it uses the mapping.

        Raises:
            KernelRefused: the socket cannot be made.
        """
        self.path = path
        self._on_change = on_change
        self._on_uffd = on_uffd
        self._state = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._closed = False
        self._woken, self._wake = os.pipe()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            # Guests run as anybody: who they are decides, not that they can knock.
            path.chmod(0o666)
            self._listener.listen(64)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            os.close(self._woken)
            os.close(self._wake)
            raise KernelRefused(str(path), error.errno or 0, what="the agents socket cannot be made") from None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="memconsole-agents", daemon=True)
        self._thread.start()

    # --- what control calls -------------------------------------------------------------------------------------

    def register(self, name: str, pid: int, start_ticks: int, offers: Iterable[Offer] = ()) -> None:
        """Let a process in as a guest, with the grants it holds already (after a restart of the control process).

        Duplicates of the offers' fds are kept until the grants are withdrawn.

        Raises:
            Refused: a guest of this name, or this process under another name, is registered (``NameTaken``).
        """
        peer = _Peer(name, pid, start_ticks)
        with self._state:
            if name in self._peers or any(other.pid == pid for other in self._peers.values()):
                raise Refused(
                    f"guest {name} cannot be registered",
                    f"its name, or process {pid}, is a guest already",
                    "detach that one first",
                    code="NameTaken",
                )
            for offer in offers:
                peer.offers[offer.grant] = _Offered(offer, os.dup(offer.fd), sent=True)
            self._peers[name] = peer

    def unregister(self, name: str) -> None:
        """Disconnect a guest and forget it; no error if it is not registered."""
        with self._state:
            peer = self._peers.pop(name, None)
            if peer is not None:
                self._disconnect(peer)
                for offered in peer.offers.values():
                    os.close(offered.fd)
                peer.offers.clear()

    def connected(self, name: str, within: float = 0) -> bool:
        """Whether a guest's agent is connected, or comes within so many seconds."""
        with self._state:
            return self._state.wait_for(lambda: name in self._peers and self._peers[name].greeted, within)

    def mapped(self, name: str) -> frozenset[str]:
        """The grants a guest said it has mapped."""
        with self._state:
            return frozenset(self._peer(name).mapped)

    def offer(self, name: str, offer: Offer, within: float) -> bool:
        """Offer a grant: true once the guest has mapped it, false if its agent gets it when it connects.

        Raises:
            GuestError: it answered that it cannot, or did not answer; the offer is withdrawn.
        """
        try:
            wire.pack_name(offer.grant)
        except ValueError as error:
            raise GuestError(f"grant {offer.grant} cannot be offered", str(error)) from None
        with self._state:
            peer = self._peer(name)
            old = peer.offers.pop(offer.grant, None)
            if old is not None:
                os.close(old.fd)
            if len(peer.offers) >= wire.MAX_GRANTS:
                raise GuestError(
                    f"guest {name} takes no more grants", f"an agent holds at most {wire.MAX_GRANTS}", "revoke one"
                )
            offered = peer.offers[offer.grant] = _Offered(offer, os.dup(offer.fd), sent=False)
            if not peer.greeted:
                return False
        try:
            answer = self._request(peer, Type.GRANT, offer.grant, within, offered=offered)
        except GuestError:
            self.withdraw(name, offer.grant)
            raise
        if answer.status:
            self.withdraw(name, offer.grant)
            raise GuestError(f"guest {name} did not map grant {offer.grant}", answer.text or os.strerror(answer.status))
        return True

    def ask_unmap(self, name: str, grant: str, within: float) -> bool:
        """Ask a guest to unmap a grant: true once it did (and the offer is withdrawn), false if it has no agent or
        says that it cannot.

        Raises:
            GuestError: it did not answer.
        """
        with self._state:
            peer = self._peer(name)
            offered = peer.offers.get(grant)
            if offered is not None and not offered.sent:
                self._withdraw(peer, grant)
                return True
            if not peer.greeted:
                return False
        return self._request(peer, Type.UNMAP, grant, within).status == 0

    def withdraw(self, name: str, grant: str) -> None:
        """Stop offering a grant; a guest that maps it all the same is asked to unmap it."""
        with self._state:
            self._withdraw(self._peer(name), grant)

    def ask(self, name: str, type: Type, within: float, fd: int | None = None) -> Answer:
        """Send a request without a body, SAVE with the file to write into, and wait for the answer.

        Raises:
            GuestError: it is not connected, did not answer in time, or went away.
        """
        with self._state:
            peer = self._peer(name)
        return self._request(peer, type, "", within, fd=fd)

    def close(self) -> None:
        """Stop listening and disconnect everybody; guests go on, and what they mapped stays mapped."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        os.write(self._wake, b"x")
        self._thread.join()
        for name in list(self._peers):
            self.unregister(name)
        self._selector.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        os.close(self._woken)
        os.close(self._wake)

    # --- requests ------------------------------------------------------------------------------------------------

    def _peer(self, name: str) -> _Peer:
        peer = self._peers.get(name)
        if peer is None:
            raise NotFound(f"guest {name} is not registered", "it has no agent of ours", "attach or start it")
        return peer

    def _withdraw(self, peer: _Peer, grant: str) -> None:
        offered = peer.offers.pop(grant, None)
        if offered is not None:
            os.close(offered.fd)

    def _request(
        self,
        peer: _Peer,
        type: Type,
        grant: str,
        within: float,
        *,
        offered: _Offered | None = None,
        fd: int | None = None,
    ) -> Answer:
        deadline = time.monotonic() + within
        while True:
            with self._state:
                if not peer.greeted or peer.socket is None:
                    raise GuestError(f"guest {peer.name} does not answer", "its agent is not connected", "try again")
                ask = self._post(peer, type, grant, offered, fd)
                connection = peer.socket
            if ask is not None:
                break
            # Its queue is full: it does not read. Wait for room, but no longer than it is given.
            poller = select.poll()
            poller.register(connection, select.POLLOUT)
            if not poller.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                raise self._silent(peer, within)
        if not ask.answered.wait(max(0.0, deadline - time.monotonic())):
            raise self._silent(peer, within)
        if ask.answer is None:
            raise GuestError(f"guest {peer.name} did not answer", "its agent went away", "try again")
        return ask.answer

    def _silent(self, peer: _Peer, within: float) -> GuestError:
        return GuestError(
            f"guest {peer.name} does not answer", f"its agent said nothing for {within:g} s", "take a harder rung"
        )

    def _post(
        self, peer: _Peer, type: Type, grant: str, offered: _Offered | None = None, fd: int | None = None
    ) -> _Ask | None:
        """Send a request, lock held; None when there is no room for it now."""
        if peer.socket is None or len(peer.asked) >= _MAX_UNANSWERED:
            return None
        body = b""
        if offered is not None:
            offer = offered.offer
            body = wire.GRANT.pack(
                wire.pack_name(grant),
                offer.offset,
                offer.length,
                wire.NO_GPA if offer.gpa is None else offer.gpa,
                wire.WINDOW if offer.window else 2 if offer.access is Access.RW else 1,
                offer.wants,
            )
            fd = offered.fd
        elif type is Type.UNMAP:
            body = wire.pack_name(grant)
        fds = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        ask = _Ask(type, grant)
        id = peer.last_id + 1
        try:
            peer.socket.sendmsg([wire.pack(type, id, body)], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return None
        except OSError:
            self._disconnect(peer)
            raise GuestError(f"guest {peer.name} did not answer", "its agent went away", "try again") from None
        if offered is not None:
            offered.sent = True
        peer.last_id = id
        peer.asked[id] = ask
        return ask

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._woken:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                    continue
                peer: _Peer = key.data
                if self._receive(peer) and self._on_change is not None:
                    self._on_change(peer.name)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it went away before it was let in
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", raw)[0]
        with self._state:
            peer = next((peer for peer in self._peers.values() if peer.pid == pid), None)
            with contextlib.suppress(Gone):
                if peer is not None and stat(pid)[1] == peer.start_ticks:
                    self._disconnect(peer)
                    connection.setblocking(False)
                    peer.socket = connection
                    self._selector.register(connection, selectors.EVENT_READ, peer)
                    return
        connection.close()

    def _receive(self, peer: _Peer) -> bool:
        """Serve one packet of a guest; whether its state changed."""
        with self._state:
            if peer.socket is None:
                return False
            fds: list[int] = []
            try:
                # Room for one fd: the kernel drops what else a guest sends.
                packet, controls, flags, _ = peer.socket.recvmsg(
                    wire.MAX_MESSAGE, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
                fds += [fd for _, _, raw in controls for (fd,) in struct.iter_unpack("i", raw[: len(raw) // 4 * 4])]
                whole = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                changed = self._take(peer, wire.unpack(packet if whole else b""), fds)
            except BlockingIOError:
                return False
            except (OSError, BadMessage, GuestError):
                self._disconnect(peer)
                return True
            finally:
                for fd in fds:
                    os.close(fd)
            if changed:
                self._state.notify_all()
            return changed

    def _take(self, peer: _Peer, message: wire.Message, fds: list[int]) -> bool:
        if len(fds) != (message.type is Type.HANDED):
            raise BadMessage("a message with an fd too many or too few")
        if message.type is Type.HELLO:
            return self._greet(peer, message)
        if message.type is Type.HANDED:
            self._handed(peer, message, fds[0])
            return False
        ask = peer.asked.pop(message.id, None)
        if not peer.greeted or ask is None:
            raise BadMessage("an answer to nothing")
        try:
            ask.answer = _answer(message)
        finally:
            ask.answered.set()
        if ask.answer.status:
            return False
        if ask.type is Type.GRANT:
            if ask.grant not in peer.offers:
                self._post(peer, Type.UNMAP, ask.grant)
            peer.mapped.add(ask.grant)
        elif ask.type is Type.UNMAP:
            peer.mapped.discard(ask.grant)
            self._withdraw(peer, ask.grant)
        return ask.type in {Type.GRANT, Type.UNMAP}

    def _handed(self, peer: _Peer, message: wire.Message, uffd: int) -> None:
        ask = peer.asked.get(message.id)
        if not peer.greeted or ask is None or ask.handed or len(message.body) != wire.HANDED.size:
            raise BadMessage("an uffd for nothing")
        offered = peer.offers.get(ask.grant)
        if ask.type is not Type.GRANT or (offered is not None and not offered.offer.wants):
            raise BadMessage("an uffd nobody asked for")
        ask.handed = True
        modes, _, address = wire.HANDED.unpack(message.body)
        steps.point("map.uffd.before")
        if offered is not None and self._on_uffd is not None:
            self._on_uffd(Uffd(peer.name, (peer.pid, peer.start_ticks), ask.grant, uffd, modes, address))
        steps.point("map.uffd.held")
        assert peer.socket is not None  # noqa: S101 - this came by it
        try:
            peer.socket.sendmsg([wire.pack(Type.TAKEN, message.id)], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise BadMessage("it does not read") from None
        steps.point("map.uffd.after")

    def _greet(self, peer: _Peer, message: wire.Message) -> bool:
        if peer.greeted or len(message.body) < wire.HELLO.size:
            raise BadMessage("a HELLO too many or too short")
        _, count = wire.HELLO.unpack_from(message.body)
        names = message.body[wire.HELLO.size :]
        if count > wire.MAX_GRANTS or len(names) != count * wire.NAME.size:
            raise BadMessage("a HELLO of another length than it says")
        peer.mapped = {wire.unpack_name(raw) for (raw,) in wire.NAME.iter_unpack(names)}
        peer.greeted = True
        for grant in peer.mapped - peer.offers.keys():
            self._post(peer, Type.UNMAP, grant)
        for grant in peer.offers.keys() & peer.mapped:
            peer.offers[grant].sent = True
        for grant in peer.offers.keys() - peer.mapped:
            if self._post(peer, Type.GRANT, grant, peer.offers[grant]) is None:
                raise BadMessage("it does not read")
        return True

    def _disconnect(self, peer: _Peer) -> None:
        """Let a connection go, lock held; whoever waits for an answer learns that none comes."""
        if peer.socket is not None:
            self._selector.unregister(peer.socket)
            peer.socket.close()
        peer.socket = None
        peer.greeted = False
        for ask in peer.asked.values():
            ask.answered.set()
        peer.asked.clear()
        self._state.notify_all()


def _answer(message: wire.Message) -> Answer:
    if message.type is Type.DONE and len(message.body) == wire.DONE.size:
        status, _, text = wire.DONE.unpack(message.body)
        return Answer(status, _text(text))
    if message.type is Type.REPORTED and len(message.body) == wire.REPORTED.size:
        runs_as, state, beats, checked, wrong, gap_ns, gaps, restored, blackout_ns, text = wire.REPORTED.unpack(
            message.body
        )
        if runs_as not in {1, 2} or state not in _STATES:
            raise BadMessage("a report of nothing known")
        why = _text(text)
        progress = Progress("kvm" if runs_as == 1 else "process", beats, checked, wrong, gap_ns, gaps, why)
        return Answer(0, why, _STATES[state], progress, restored, blackout_ns)
    if message.type is Type.SWEPT and len(message.body) == wire.SWEPT.size:
        pages, wrong, _ = wire.SWEPT.unpack(message.body)
        return Answer(0, "", pages=pages, wrong=wrong)
    raise BadMessage(f"a malformed {message.type.name}")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")
