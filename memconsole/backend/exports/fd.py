"""The agents socket: how grants reach guests as file descriptors, and how they are asked back.

What passes over it stands in :mod:`.agents`.

The agent connects. Who it is, the kernel says (SO_PEERCRED, SO_PEERPIDFD): a process that is not a registered guest,
or whose start time is another's, is disconnected, and so is whoever breaks the grammar; nobody else notices. A guest
is only ever sent its own grants. After HELLO it is sent the grants it lacks and asked to unmap what is not granted any
more.

What becomes of an uffd that an agent hands over stands in :mod:`.uffds`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from memconsole import agent as wire
from memconsole import unforeseen
from memconsole.agent import BadMessage, Type
from memconsole.backend.exports import answers
from memconsole.backend.exports.agents import (
    AgentPeer,
    OfferedGrant,
    PendingRequest,
    Uffd,
    UffdTransfer,
    body_of,
    held_by,
    listen,
    writable,
)
from memconsole.backend.exports.answers import AgentReply
from memconsole.backend.exports.offer import Offer
from memconsole.backend.exports.uffds import OnUffd, UffdIntake
from memconsole.backend.peers.handle import stat
from memconsole.backend.peers.patience import MOST, Patience
from memconsole.backend.peers.peer import EXHAUSTED, Peer
from memconsole.errors import Gone, GuestError, MemconsoleError, NotFound, Refused
from memconsole.model import ProcessId

log = logging.getLogger("memconsole.agents")

OnChange = Callable[[str, frozenset[str]], None]
_MAX_UNANSWERED = 256
_ROOM_S = 0.05
"""Seconds between two looks whether one that was asked too much has answered anything."""
_AGAIN_S = 1.0


class Hub:
    """The agents socket of one control process; one thread listens, every method may be called from any thread."""

    def __init__(self, path: Path, *, on_change: OnChange | None = None, on_uffd: OnUffd | None = None) -> None:
        """Listen on ``path``, in place of a socket left there.

        ``on_change`` is called, in the hub's thread, with a guest's name and the grants that it has mapped, when it
        connected, went, or mapped or unmapped a grant; ``on_uffd`` when it handed an uffd over, before it uses the
        mapping.

        Raises:
            KernelRefused: the socket cannot be made.
        """
        self.path = path
        self._on_change = on_change
        self._state = threading.Condition()
        self._peers: dict[str, AgentPeer] = {}
        self._closed = False
        self._untold: dict[str, float] = {}
        """Guests whose change was not taken, and when it is told again."""
        self._accept_at = 0.0
        """When connections are accepted again, after there was no descriptor for one; 0 while they are."""
        self._uffds = UffdIntake(on_uffd, self._state, self._disconnect)
        self._listener = listen(path)
        self._woken, self._wake = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = unforeseen.thread("memconsole-agents", self._run)
        self._thread.start()

    # --- what control calls -------------------------------------------------------------------------------------

    def register(self, name: str, pid: int, start_ticks: int, offers: Iterable[Offer] = ()) -> None:
        """Let a process in as a guest, with the grants it holds already (after a restart of the control process).

        Duplicates of the offers' fds are kept until the grants are withdrawn.

        Raises:
            Refused: a guest of this name, or this process under another name, is registered (``NameTaken``).
        """
        peer = AgentPeer(name, ProcessId(pid, start_ticks))
        with self._state:
            if name in self._peers or any(other.process.pid == pid for other in self._peers.values()):
                raise Refused(
                    f"guest {name} cannot be registered",
                    f"its name, or process {pid}, is a guest already",
                    "detach that one first",
                    code="NameTaken",
                )
            for offer in offers:
                peer.offers[offer.grant] = OfferedGrant(offer, os.dup(offer.fd), sent=True)
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
            raise GuestError(f"grant {offer.grant} cannot be offered", str(error), "try again") from None
        with self._state:
            peer = self._peer(name)
            old = peer.offers.pop(offer.grant, None)
            if old is not None:
                os.close(old.fd)
            if len(peer.offers) >= wire.MAX_GRANTS:
                raise GuestError(
                    f"guest {name} takes no more grants",
                    f"an agent holds at most {wire.MAX_GRANTS}",
                    "revoke one of its grants",
                )
            offered = peer.offers[offer.grant] = OfferedGrant(offer, os.dup(offer.fd), sent=False)
            if not peer.greeted:
                return False
        try:
            answer = self._request(peer, Type.GRANT, offer.grant, within, offered=offered, patient=True)
        except GuestError:
            self.withdraw(name, offer.grant)
            raise
        if answer.status:
            self.withdraw(name, offer.grant)
            raise GuestError(
                f"guest {name} did not map grant {offer.grant}",
                answer.text or os.strerror(answer.status),
                "see its log",
            )
        return True

    def request_unmap(self, name: str, grant: str, within: float) -> bool:
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

    def ask(self, name: str, type: Type, within: float, fd: int | None = None, *, patient: bool = False) -> AgentReply:
        """Send a request without a body, SAVE with the file to write into, and wait for the answer; longer with
        patience, while the guest's process is busy or waits for a processor.

        Raises:
            GuestError: it is not connected, did not answer in time, or went away.
        """
        with self._state:
            peer = self._peer(name)
        return self._request(peer, type, "", within, fd=fd, patient=patient)

    def close(self) -> None:
        """Stop listening and disconnect everybody; guests go on, and what they mapped stays mapped."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        os.write(self._wake, b"x")
        self._thread.join()
        self._uffds.close()
        for name in list(self._peers):
            self.unregister(name)
        self._selector.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        os.close(self._woken)
        os.close(self._wake)

    # --- requests ------------------------------------------------------------------------------------------------

    def _peer(self, name: str) -> AgentPeer:
        peer = self._peers.get(name)
        if peer is None:
            raise NotFound(
                f"guest {name} is not registered",
                "it has no memconsole agent",
                f"memconsole guest attach {name} --pid PID",
            )
        return peer

    def _withdraw(self, peer: AgentPeer, grant: str) -> None:
        offered = peer.offers.pop(grant, None)
        if offered is not None:
            os.close(offered.fd)

    def _request(
        self,
        peer: AgentPeer,
        type: Type,
        grant: str,
        within: float,
        *,
        offered: OfferedGrant | None = None,
        fd: int | None = None,
        patient: bool = False,
    ) -> AgentReply:
        patience = Patience(peer.process.pid, within, most=MOST if patient else 1)
        while True:
            with self._state:
                if not peer.greeted or peer.socket is None:
                    raise GuestError(f"guest {peer.name} does not answer", "its agent is not connected", "try again")
                ask = self._is_repeated(peer, type) or self._post(peer, type, grant, offered, fd)
                connection = peer.socket
            if ask is not None:
                break
            # It does not read, or answers nothing. Wait for room, but no longer than it is given.
            if not patience.lasts(partial(self._room, peer, connection)):
                raise self._silent(peer, within)
        if not patience.lasts(ask.answered.wait):
            ask.given_up = True
            raise self._silent(peer, within, ask)
        if ask.answer is None:
            raise GuestError(f"guest {peer.name} did not answer", "its agent disconnected", "try again")
        return ask.answer

    def _room(self, peer: AgentPeer, connection: socket.socket, within: float) -> bool:
        """Whether there is room for another request, or comes within so many seconds, or in a moment."""
        with self._state:
            if len(peer.asked) >= _MAX_UNANSWERED:
                return self._state.wait_for(lambda: len(peer.asked) < _MAX_UNANSWERED, min(within, _ROOM_S))
        return writable(connection, within)

    def _is_repeated(self, peer: AgentPeer, type: Type) -> PendingRequest | None:
        """A REPORT that is unanswered still and that no caller waits for any more: it is not asked for twice.

        So one that hangs owes one report, however often it is asked for one.
        """
        if type is not Type.REPORT:
            return None
        found = next((ask for ask in peer.asked.values() if ask.type is type and ask.given_up), None)
        if found is not None:
            found.given_up = False
        return found

    def _silent(self, peer: AgentPeer, within: float, ask: PendingRequest | None = None) -> GuestError:
        """The error for a guest that does not answer in time; it names what its agent is still at."""
        why = f"its agent said nothing for {within:g} s"
        with self._state:
            before = [other for other in peer.asked.values() if ask is None or other.asked_at < ask.asked_at]
        if before:
            since = time.monotonic() - before[0].asked_at
            why += f"; it has been at {before[0].type.name} for {since:.1f} s"
        return GuestError(f"guest {peer.name} does not answer", why, "use a harder rung: --at-most")

    def _post(
        self, peer: AgentPeer, type: Type, grant: str, offered: OfferedGrant | None = None, fd: int | None = None
    ) -> PendingRequest | None:
        """Send a request, lock held; None when there is no room for it now."""
        if peer.socket is None or len(peer.asked) >= _MAX_UNANSWERED:
            return None
        body = body_of(type, grant, offered)
        fd = offered.fd if offered is not None else fd
        fds = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        ask = PendingRequest(type, grant)
        id = peer.last_id + 1
        try:
            peer.socket.sendmsg([wire.pack(type, id, body)], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return None
        except OSError:
            self._disconnect(peer)
            raise GuestError(f"guest {peer.name} did not answer", "its agent disconnected", "try again") from None
        if offered is not None:
            offered.sent = True
        peer.last_id = id
        peer.asked[id] = ask
        return ask

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            for due in [name for name, at in self._untold.items() if at <= now]:
                self._notify(due)
            waits = [at - now for at in self._untold.values()] + ([self._accept_at - now] if self._accept_at else [])
            for key, _ in self._selector.select(max(0.0, min(waits)) if waits else None):
                if key.fd == self._woken:
                    return
                if key.fileobj is self._listener:
                    with unforeseen.contained("the agents socket", "agents"):
                        self._accept()
                    continue
                peer: AgentPeer = key.data
                if self._serve(peer):
                    self._notify(peer.name)
            if self._accept_at and self._accept_at <= time.monotonic():
                self._accept_at = 0.0
                self._selector.register(self._listener, selectors.EVENT_READ)

    def _serve(self, peer: AgentPeer) -> bool:
        """Serve one packet of a guest; whether its state changed. What was not foreseen ends its connection."""
        changed = unforeseen.attempt(f"the agent of guest {peer.name}", "agents", partial(self._receive, peer))
        if isinstance(changed, MemconsoleError):
            log.warning("guest %s is disconnected: %s", peer.name, changed)
            with self._state:
                self._disconnect(peer)
            return True
        return changed

    def _notify(self, name: str) -> None:
        """Say that a guest's state changed; where that cannot be taken now (a full ledger), say so again later."""
        self._untold.pop(name, None)
        if self._on_change is None:
            return
        with self._state:
            peer = self._peers.get(name)
            mapped = frozenset(peer.mapped) if peer is not None else frozenset()
        said = unforeseen.attempt(f"taking note of guest {name}", "agents", partial(self._on_change, name, mapped))
        if isinstance(said, MemconsoleError):
            log.warning("what guest %s did is not noted yet: %s", name, said)
            self._untold[name] = time.monotonic() + _AGAIN_S

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                log.warning("no agent can connect: %s; trying again in a second", error.strerror)
                self._selector.unregister(self._listener)
                self._accept_at = time.monotonic() + _AGAIN_S
            return  # else it went away before it was let in
        caller = Peer.of(connection)
        pid = caller.pid
        with self._state, contextlib.closing(caller):
            peer = next((peer for peer in self._peers.values() if peer.process.pid == pid), None)
            with contextlib.suppress(Gone):
                # In this order: whoever runs after the number was seen to be the guest's had it then too.
                if peer is not None and stat(pid)[1] == peer.process.start_ticks and caller.is_alive():
                    self._disconnect(peer)
                    connection.setblocking(False)
                    self._selector.register(connection, selectors.EVENT_READ, peer)
                    peer.socket = connection
                    return
        connection.close()

    def _receive(self, peer: AgentPeer) -> bool:
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

    def _take(self, peer: AgentPeer, message: wire.Message, fds: list[int]) -> bool:
        if not isinstance(message.type, Type):
            return False  # of a newer agent, which does without an answer
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
            ask.answer = answers.read(message)
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

    def _handed(self, peer: AgentPeer, message: wire.Message, uffd: int) -> None:
        ask = peer.asked.get(message.id)
        if not peer.greeted or ask is None or ask.handed or len(message.body) < wire.HANDED.size:
            raise BadMessage("an uffd for nothing")
        offered = peer.offers.get(ask.grant)
        if ask.type is not Type.GRANT or (offered is not None and not offered.offer.wants):
            raise BadMessage("a userfaultfd that no call waits for")
        ask.handed = True
        modes, _, address = wire.HANDED.unpack_from(message.body)
        assert peer.socket is not None  # noqa: S101 - this came by it
        kept = offered is not None and self._uffds.keeps
        given = Uffd(peer.name, peer.process, ask.grant, os.dup(uffd) if kept else -1, modes, address)
        self._uffds.take(UffdTransfer(peer, peer.socket, message.id, given))

    def _greet(self, peer: AgentPeer, message: wire.Message) -> bool:
        if peer.greeted:
            raise BadMessage("a HELLO too many or too short")
        peer.mapped = held_by(message)
        peer.greeted = True
        for grant in peer.mapped - peer.offers.keys():
            self._post(peer, Type.UNMAP, grant)
        for grant in peer.offers.keys() & peer.mapped:
            peer.offers[grant].sent = True
        for grant in peer.offers.keys() - peer.mapped:
            if self._post(peer, Type.GRANT, grant, peer.offers[grant]) is None:
                raise BadMessage("it does not read")
        return True

    def _disconnect(self, peer: AgentPeer) -> None:
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
