"""A control process, of this host or another, as a Source: plain blocking sockets, one a call under way."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from memconsole import decoding
from memconsole.actions import Action
from memconsole.backend.wire import inline, protocol, remote
from memconsole.backend.wire.dialing import CONNECT_S, Local, Place
from memconsole.backend.wire.inline import InlinePart, InlineSegment, OpenSegment, Segment
from memconsole.backend.wire.protocol import INTERFACE, SERVICE, VarlinkReply
from memconsole.errors import MemconsoleError, NoControl, Refused, UsageError, WireError
from memconsole.model import Capability, Event, FrameState, Outcome, Part, Plan, Snapshot

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

READ_S = 35.0
ACT_S = 905.0
MAX_REPLY = 1 << 30
_RECEIVE = 1 << 20
_CONTROL = socket.CMSG_SPACE(4 * protocol.MAX_FDS)
_IDLE = 4

T = TypeVar("T")


class Greeting(msgspec.Struct, frozen=True):
    """What the service says of itself and of this user."""

    protocol: int
    version: str
    label: str
    role: str
    read_only: str


class _Snapshot(msgspec.Struct, frozen=True):
    generation: int
    snapshot: Snapshot | None = None


class _Plan(msgspec.Struct, frozen=True):
    plan: Plan


class _Outcome(msgspec.Struct, frozen=True):
    outcome: Outcome


class _Events(msgspec.Struct, frozen=True):
    events: tuple[Event, ...]


class _Times(msgspec.Struct, frozen=True):
    times: list[int]


class _Past(msgspec.Struct, frozen=True):
    snapshot: Snapshot


class _Extents(msgspec.Struct, frozen=True):
    fd: int
    scanned_ns: int = 0
    inline: tuple[InlinePart, ...] = ()


class _Frame(msgspec.Struct, frozen=True):
    frame: FrameState


class _Segments(msgspec.Struct, frozen=True):
    fds: list[int]
    inline: tuple[InlinePart, ...] = ()


class _Info(msgspec.Struct, frozen=True):
    version: str


class _Capabilities(msgspec.Struct, frozen=True):
    capabilities: tuple[Capability, ...]


class ClientConnection:
    """One connection, for one call at a time."""

    def __init__(self, place: Place, *, first: bool = False) -> None:
        self._inbox = bytearray()
        self._fds: list[int] = []
        self._line = place.dial(first=first)
        self._sock = self._line.sock

    @property
    def greets_within(self) -> float:
        """Seconds within which the service greets."""
        return self._line.greets_within

    def greeted(self) -> None:
        """The service greeted."""
        self._line.greeted()

    def call(
        self, method: str, parameters: Any, within: float, *, acting: bool = False
    ) -> tuple[msgspec.Raw, list[int]]:
        """The parameters of the reply, and the fds beside it, which are the caller's.

        Raises:
            NoControl: the service went away (``ControlDied``) or gave no answer in time (``NoAnswer``).
            MemconsoleError: what the service raised.
        """
        self.send(method, parameters)
        reply, fds = self.receive(method, within, acting=acting)
        return reply.parameters, fds

    def send(self, method: str, parameters: Any, *, more: bool = False) -> None:
        """Send a call; a peer that hung up may have said why, which :meth:`receive` finds."""
        call = {"method": method if "." in method else f"{INTERFACE}.{method}", "parameters": parameters}
        data = msgspec.json.encode({**call, "more": True} if more else call) + b"\0"
        try:
            self._sock.settimeout(CONNECT_S)
            self._sock.sendall(data)
        except TimeoutError:
            raise self._line.silent(method, CONNECT_S) from None
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, method: str, within: float | None, *, acting: bool = False) -> tuple[VarlinkReply, list[int]]:
        """The next reply to ``method`` and its fds; errors as :meth:`call`."""
        raw = self._message(method, within, acting=acting)
        try:
            reply = decoding.json(raw, VarlinkReply, what=f"the answer to {method}", limit=MAX_REPLY)
        except decoding.Undecodable as error:
            raise WireError(error.what, error.why) from None
        if reply.error is not None:
            raise protocol.error_of(reply.error, reply.parameters)
        fds, self._fds = self._fds, []
        return msgspec.structs.replace(reply, parameters=protocol.given(reply.parameters)), fds

    def _message(self, method: str, within: float | None, *, acting: bool) -> bytes:
        deadline = None if within is None else time.monotonic() + within
        while (end := self._inbox.find(0)) < 0:
            if len(self._inbox) > MAX_REPLY:
                raise WireError(f"an endless answer to {method}", f"more than {MAX_REPLY} bytes")
            try:
                self._line.wait(deadline)
                data = self._read()
            except TimeoutError:
                raise self._line.silent(method, within or 0) from None
            except ConnectionResetError:
                data = b""
            if not data:
                raise self._line.gone(method, acting=acting)
            self._inbox += data
        message = bytes(memoryview(self._inbox)[:end])
        del self._inbox[: end + 1]
        return message

    def _read(self) -> bytes:
        # socket.recv_fds of Python 3.11 does not pass its flags on, and would leave the fds inheritable
        data, controls, flags, _ = self._sock.recvmsg(_RECEIVE, _CONTROL, socket.MSG_CMSG_CLOEXEC)
        for _, _, fds in controls:
            self._fds += memoryview(fds)[: len(fds) // 4 * 4].cast("i")
        if flags & socket.MSG_CTRUNC:
            raise WireError("file descriptors were lost", f"more than {protocol.MAX_FDS} in one answer, or none free")
        return data

    @property
    def clean(self) -> bool:
        """Whether another call can be made on it: the peer is there and nothing is left from the last."""
        if self._inbox or self._fds:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close it and every fd nobody took."""
        self._line.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


class Client:
    """A Source over a control socket, that at a path or of another place; calls of several threads run side by side.

    Raises:
        NoControl: nothing answers; ``code`` says why: ``NoSocket``, ``StaleSocket``, ``NoAnswer``, or as ``remote`` has
            it.
        Denied: this user may not open the socket, or is neither operator nor viewer.
        WireError: the service is of another version (``ProtocolVersion``).
    """

    def __init__(self, place: str | os.PathLike[str] | Place) -> None:
        self._place: Place = Local(Path(place)) if isinstance(place, (str, os.PathLike)) else place
        self._idle: list[ClientConnection] = []
        self._lock = threading.Lock()
        self._latest: _Snapshot | None = None
        self._knows_parts = True
        connection, self._greeting = self._open(first=True)
        self._put_back(connection)

    @property
    def label(self) -> str:
        """The socket's path, or the host."""
        return self._place.label

    @property
    def version(self) -> str:
        """The version of memconsole that answers."""
        return self._greeting.version

    @property
    def read_only(self) -> str:
        """Why this user may only look, or nothing."""
        return self._greeting.read_only

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """See :class:`Source`; one that did not change since the last call is not sent again.

        A service that does not know of parts yet gives one without.
        """
        latest = self._latest
        known = latest.generation if latest is not None else None
        taken = self._take_snapshot(known, parts)
        if taken.snapshot is None:
            if latest is None:
                raise WireError(
                    "the answer has no snapshot", "the service sent none", "upgrade the older of client and service"
                )
            taken = latest
        self._latest = taken
        assert taken.snapshot is not None  # noqa: S101 - what is kept always has one
        return taken.snapshot

    def _take_snapshot(self, known: int | None, parts: Collection[Part]) -> _Snapshot:
        if parts and self._knows_parts:
            try:
                return self._ask("GetSnapshot", {"known": known, "parts": sorted(parts)}, _Snapshot)
            except UsageError as error:
                if error.code != "InvalidParameter":
                    raise
                self._knows_parts = False
        return self._ask("GetSnapshot", {"known": known}, _Snapshot)

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """See :class:`Source`; a table that came as a descriptor is mapped, never copied."""
        from memconsole.extents import ExtentTable

        with self._lent() as connection:
            asked = {"key": key} if at_ns is None else {"key": key, "at_ns": at_ns}
            raw, fds = connection.call("GetExtents", asked, READ_S)
            try:
                answer = _read(raw, _Extents)
                if not self._place.descriptors:
                    what = f"the PFN map of {key}"
                    (segment,) = _inline(connection, answer.inline, 1, what)
                    table = ExtentTable.from_bytes(inline.whole(segment, what))
                elif not 0 <= answer.fd < len(fds):
                    raise WireError("the answer has no table", f"fd {answer.fd} of {len(fds)}")
                else:
                    table = ExtentTable.from_fd(fds[answer.fd])
                table.scanned_ns = answer.scanned_ns
                return table
            finally:
                for fd in fds:
                    os.close(fd)

    def frame(self, pfn: int) -> FrameState:
        """See :class:`Source`."""
        return self._ask("GetFrame", {"pfn": pfn}, _Frame).frame

    def open_region(self, region: str) -> list[int]:
        """Read-only fds of a region's segments, in order, which the caller closes; operators only.

        Raises:
            NotFound: there is no such region, or its memory is lost.
            Refused: descriptors do not come from there (``NoDescriptors``); :meth:`segments` reads the contents.
        """
        if not self._place.descriptors:
            raise Refused(
                f"region {region} of {self.label} cannot be mapped here",
                "descriptors do not travel between hosts",
                f"copy its contents: memconsole --host {self.label} copy {region} FILE",
                code="NoDescriptors",
            )
        raw, fds = self._call("OpenRegion", {"region": region})
        with contextlib.ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            _counted(_read(raw, _Segments), len(fds))
            undo.pop_all()
        return fds

    @contextlib.contextmanager
    def segments(self, region: str) -> Iterator[Sequence[Segment]]:
        """A region's segments, in order, to be read while the context lasts; operators only.

        Raises:
            NotFound: there is no such region, or its memory is lost.
        """
        if self._place.descriptors:
            fds = self.open_region(region)
            try:
                yield [OpenSegment(fd) for fd in fds]
            finally:
                for fd in fds:
                    os.close(fd)
            return
        with self._lent() as connection:
            raw, _ = connection.call("OpenRegion", {"region": region}, READ_S)
            answer = _read(raw, _Segments)
            _counted(answer, len(answer.inline))
            yield _inline(connection, answer.inline, len(answer.fds), f"region {region}")

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """See :class:`Source`."""
        before = {"after": list(after)} if after else {}
        return self._ask("Plan", {"action": action, **before}, _Plan).plan

    def apply(self, action: Action) -> Outcome:
        """See :class:`Source`; an action is sent once, on a line that was just seen to stand, never again by itself."""
        with self._lent() as connection:
            raw, _ = connection.call("Apply", {"action": action}, ACT_S, acting=True)
            return _read(raw, _Outcome).outcome

    def events(self, after: int) -> Sequence[Event]:
        """See :class:`Source`."""
        return self._ask("Events", {"after": after}, _Events).events

    def history(self, after: int = 0) -> Sequence[int]:
        """See :class:`Source`."""
        return self._ask("History", {"after": after}, _Times).times

    def at(self, time_ns: int) -> Snapshot:
        """See :class:`Source`."""
        return self._ask("GetPast", {"at_ns": time_ns}, _Past).snapshot

    def doctor(self) -> tuple[Capability, ...]:
        """What the host can do, by what the control process may see."""
        return self._ask("Doctor", {}, _Capabilities).capabilities

    def follow(self, after: int) -> Generator[Event, None, None]:
        """The events above ``after``, and every new one as it happens; ends with the service, by its error."""
        for reply in self._stream("Events", {"after": after}):
            yield from _read(reply, _Events).events

    def watch(self, every: float = 1.0, parts: Collection[Part] = ()) -> Generator[Snapshot, None, None]:
        """A Snapshot with these parts now and every so many seconds; only what changed is sent."""
        from memconsole.backend.wire import delta

        last: tuple[int, Snapshot] | None = None
        wanted = {"parts": sorted(parts)} if parts else {}  # which an older service refuses
        for reply in self._stream("Watch", {"every_ms": int(every * 1000), **wanted}):
            last = delta.advance(last, _read(reply, delta.Watched))
            yield last[1]

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # --- connections ----------------------------------------------------------------------------------------------

    def _open(self, *, first: bool = False) -> tuple[ClientConnection, Greeting]:
        connection = ClientConnection(self._place, first=first)
        try:
            greeting = self._greet(connection)
            connection.greeted()
        except BaseException:
            connection.close()
            raise
        return connection, greeting

    def _greet(self, connection: ClientConnection) -> Greeting:
        hello = {"protocol": protocol.PROTOCOL}
        if self._place.descriptors:
            return _read(connection.call("Hello", hello, connection.greets_within)[0], Greeting)
        try:
            raw, _ = connection.call("Hello", {**hello, "inline": True}, connection.greets_within)
        except UsageError:  # it knows no such parameter
            info = _read(connection.call(f"{SERVICE}.GetInfo", {}, READ_S)[0], _Info)
            raise remote.older(self.label, info.version) from None
        except WireError as error:
            raise error if error.code == "ProtocolVersion" else remote.babble(self.label, error) from None
        return _read(raw, Greeting)

    def _take(self) -> ClientConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._open()[0]
            if connection.clean:
                return connection
            connection.close()

    def _put_back(self, connection: ClientConnection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    @contextlib.contextmanager
    def _lent(self) -> Iterator[ClientConnection]:
        """A connection for one call after the other; kept for later ones, unless it failed."""
        connection = self._take()
        try:
            yield connection
        except NoControl:
            connection.close()
            raise
        except MemconsoleError:
            self._put_back(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._put_back(connection)

    def _call(self, method: str, parameters: Any) -> tuple[msgspec.Raw, list[int]]:
        with self._lent() as connection:
            return connection.call(method, parameters, READ_S)

    def _ask(self, method: str, parameters: Any, kind: type[T]) -> T:
        raw, fds = self._call(method, parameters)
        for fd in fds:
            os.close(fd)
        return _read(raw, kind)

    def _stream(self, method: str, parameters: Any) -> Iterator[msgspec.Raw]:
        connection, _ = self._open()
        try:
            connection.send(method, parameters, more=True)
            more = True
            while more:
                reply, _ = connection.receive(method, None)
                more = bool(reply.continues)
                yield reply.parameters
        finally:
            connection.close()


def _read(raw: msgspec.Raw, kind: type[T]) -> T:
    try:
        return decoding.json(raw, kind, what="an answer of the control process", limit=MAX_REPLY)
    except decoding.Undecodable as error:
        raise WireError(
            error.what,
            error.why,
            "upgrade the older of client and service, then restart the service",
        ) from None


def _counted(answer: _Segments, came: int) -> None:
    """Nothing, for an answer that names as many segments as came."""
    if answer.fds != list(range(came)):
        raise WireError(
            "the answer lacks segments",
            f"{came} came",
            "upgrade the older of client and service, then restart the service",
        )


def _inline(
    connection: ClientConnection, parts: Sequence[InlinePart], count: int, what: str
) -> tuple[InlineSegment, ...]:
    """What the descriptors of the last answer hold, by the first part of each."""
    if len(parts) != count:
        raise WireError(f"{what} did not come", f"{len(parts)} first parts of {count}")

    def ask(fd: int, at: int) -> InlinePart:
        return _read(connection.call("ReadDescriptor", {"fd": fd, "at": at}, READ_S)[0], InlinePart)

    return tuple(InlineSegment(first, partial(ask, fd), what) for fd, first in enumerate(parts))
