"""The service ``io.memconsole``: Varlink calls to a Source, by role, each answered or refused before its deadline.

epoll loop ── received ─→ role ─→ method ─┬─ fresh Snapshot, events, introspection: answered on the spot
                                          ├─ Pool "read": survey, PFN tables
                                          ├─ Pool "plan": plans, which may look at files for long: readers do not wait
                                          └─ Pool "act":  applied Actions, with who asked
              streams (more): one tick looks for news, every subscriber takes what it lacks when it has taken the rest
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import msgspec

import memconsole
from memconsole import action_input, decoding, unforeseen
from memconsole.actions import Action
from memconsole.backend.peers.peer import Peer, Rate
from memconsole.backend.wire import inline, named, parameters, protocol, systemd_metrics
from memconsole.backend.wire.call import Call, log
from memconsole.backend.wire.families import PARTS
from memconsole.backend.wire.loop import Loop, PeerConnection
from memconsole.backend.wire.pool import Pool
from memconsole.backend.wire.protocol import INTERFACE, SERVICE, VarlinkCall
from memconsole.backend.wire.roles import Role, Roles
from memconsole.backend.wire.shared_survey import SharedSnapshot, SharedSurvey
from memconsole.backend.wire.streams import Streams
from memconsole.errors import Denied, MemconsoleError, NotFound, Refused
from memconsole.model import Outcome, Part, Snapshot
from memconsole.source import Source

READ_S = 30.0
ACT_S = 900.0
DENIALS_EVERY_S = 60.0
DENIALS = 20
"""Denials that are recorded within that time, of all users together: whoever has 65536 uids is one of them."""
_BACKTICKED = re.compile(r"`([^`]*)`")


class ServiceSource(Source, Protocol):
    """A Source that is told who asks, and whose ``events`` wait for nothing: the loop's own thread calls them."""

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        """See :class:`Source`; ``peer`` goes into the ledger."""

    def open_readonly(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        """Read-only fds of a region's segments, in order, which the caller closes; it becomes an event."""

    def denied(self, peer: str, what: str) -> None:
        """Record as an event that a peer was denied something."""


@dataclass(frozen=True)
class Method:
    """How a method is served: its parameters, the role it needs, and what answers it."""

    parameters: type[msgspec.Struct]
    role: Role
    serve: Callable[[Service, Call, Any], None]


@dataclass
class CallResult:
    """What a worker found: JSON parameters and descriptors."""

    parameters: bytes
    fds: tuple[int, ...] = ()
    read_up: bool = False
    """What was lent to the connection is read to its end."""


@dataclass(eq=False)
class Service:
    """The speaker of Varlink on the control socket, over one Source."""

    loop: Loop
    source: ServiceSource
    roles: Roles
    end: bytes = b"\0"
    _denials: Rate = field(default_factory=lambda: Rate(1, DENIALS, DENIALS_EVERY_S))
    _held: list[tuple[Call, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read = Pool("memconsole-read", 4, 256)
        self._think = Pool("memconsole-plan", 2, 128)
        self._act = Pool("memconsole-act", 4, 64)
        # One at a time is taken, and none waits behind those who read tables or the past.
        self._look = Pool("memconsole-survey", 1, 1)
        self.survey = SharedSurvey(self.loop, self._look, self.source.snapshot)
        self._streams = Streams(self.loop, self._read, self.survey, self.source)

    def farewell(self) -> None:
        """Tell subscribers that the service ends."""
        self._streams.end()

    def close(self, within: float) -> None:
        """Wait, once the loop has ended, for what is still under way."""
        self._act.close(within)
        self._think.close(within)
        self._look.close(within)
        self._read.close(within)

    # --- the loop's side ------------------------------------------------------------------------------------------

    def opened(self, connection: PeerConnection) -> None:
        """Nothing is said until the peer calls."""

    def closed(self, connection: PeerConnection) -> None:
        """Forget a subscriber."""
        if connection.streaming:
            self._streams.closed(connection)

    def refuse(self, connection: PeerConnection, code: str, why: str) -> None:
        """Name the bound of the loop that a peer ran into."""
        self.loop.peers.line(logging.WARNING, connection.peer, "refused %s: %s: %s", connection.peer, code, why)
        Call(connection, "", more=False, oneway=False).fail(
            Refused("the connection is closed", why, "see the interface's description", code=code)
        )

    def received(self, connection: PeerConnection, message: bytes) -> None:
        """Serve one call."""
        try:
            request = decoding.json(message, VarlinkCall, what="the call")
        except decoding.Undecodable as error:
            self.refuse(connection, "NotVarlink", f"this is no call: {error.why}")
            connection.finish()
            return
        call = Call(connection, request.method, bool(request.more and not request.oneway), bool(request.oneway))
        method = self.METHODS.get(request.method)
        try:
            if method is None:
                self._unknown(call)
            elif method.role and (role := self.roles.of(connection.peer)) < method.role:
                self._deny(call, role)
            else:
                if method.serve is not Service._read_descriptor:
                    connection.lend(())
                given = decoding.json(protocol.given(request.parameters), method.parameters, what=request.method)
                method.serve(self, call, given)
        except decoding.Undecodable as error:
            call.reject(f"{SERVICE}.InvalidParameter", {"parameter": _parameter(error.why)})
        except Exception as error:  # noqa: BLE001 - one call's fault must not end the service; fail() logs it
            call.fail(error)

    def _unknown(self, call: Call) -> None:
        interface, _, _ = call.method.rpartition(".")
        if interface in self.DESCRIPTIONS:
            call.reject(f"{SERVICE}.MethodNotFound", {"method": call.method})
        else:
            call.reject(f"{SERVICE}.InterfaceNotFound", {"interface": interface or call.method})

    def _deny(self, call: Call, role: Role) -> None:
        peer = call.connection.peer
        what = call.method.rpartition(".")[2]
        self.record_denial(peer, what)
        role_name = "a viewer" if role is Role.VIEWER else "neither operator nor viewer"
        raise Denied(
            f"{what} is denied", f"user {peer.uid} is {role_name}", "ask an operator, or join the operators' group"
        )

    def record_denial(self, peer: Peer, what: str) -> None:
        """Have a denial recorded; of one user once a minute, and few of all, so that they cannot flood the ledger."""
        if self._denials.take(peer.uid):
            log.warning("denied %s to %s", what, peer)
            who = peer.who()
            self.read(lambda: self.source.denied(who, what))

    def read(self, job: Callable[[], None]) -> bool:
        """Run a job among the reading calls; false if too many wait."""
        return self._read.submit(job)

    def each(self, seconds: float, what: Callable[[Snapshot], None], parts: Collection[Part] = ()) -> None:
        """Have ``what`` called with a Snapshot every so many seconds; an error is logged once, not each time."""
        complaint = ""

        def begin() -> None:
            self.survey.get(taken, parts)

        def taken(found: SharedSnapshot | MemconsoleError) -> None:
            if not self.read(lambda: job(found)):
                self.loop.later(seconds, begin)

        def done(found: SharedSnapshot | MemconsoleError) -> None:
            if isinstance(found, MemconsoleError):
                raise found
            what(found.snapshot)

        def job(found: SharedSnapshot | MemconsoleError) -> None:
            nonlocal complaint
            said = unforeseen.attempt("what is done every while", "job", partial(done, found))
            if said is not None and str(said) != complaint:
                log.warning("%s", said)
            complaint = "" if said is None else str(said)
            self.loop.call(lambda: self.loop.later(seconds, begin))

        self.loop.call(begin)

    # --- methods --------------------------------------------------------------------------------------------------

    def _get_info(self, call: Call, _: parameters.Nothing) -> None:
        info = {
            "vendor": "memconsole",
            "product": "memconsole",
            "version": memconsole.__version__,
            "url": "https://varlink.org/" + INTERFACE,
            "interfaces": list(self.DESCRIPTIONS),
        }
        call.answer(msgspec.json.encode(info))

    def _describe(self, call: Call, p: parameters.Interface) -> None:
        description = self.DESCRIPTIONS.get(p.interface)
        if description is not None:
            call.answer(msgspec.json.encode({"description": description()}))
        else:
            call.reject(f"{SERVICE}.InterfaceNotFound", {"interface": p.interface})

    def _hello(self, call: Call, p: parameters.Hello) -> None:
        if p.protocol != protocol.PROTOCOL:
            raise protocol.version_mismatch(protocol.PROTOCOL, p.protocol)
        call.connection.inline = bool(p.inline)
        role = self.roles.of(call.connection.peer)
        reason = self.source.read_only or ("" if role is Role.OPERATOR else "your user is a viewer: it cannot act")
        hello = {"protocol": protocol.PROTOCOL, "version": memconsole.__version__, "label": self.source.label}
        call.answer(msgspec.json.encode({**hello, "role": role.name.lower(), "read_only": reason}))

    def _get_snapshot(self, call: Call, p: parameters.Wanted) -> None:
        taken = self.survey.latest(p.parts or ())
        if taken is not None:
            self._send_snapshot(call, taken, p.known)
            return
        self._hold(call, READ_S)

        def then(found: SharedSnapshot | MemconsoleError) -> None:
            if isinstance(found, SharedSnapshot):
                self._send_snapshot(call, found, p.known)
            else:
                call.fail(found)

        self.survey.get(then, p.parts or ())

    def _send_snapshot(self, call: Call, taken: SharedSnapshot, known: int | None) -> None:
        if taken.generation == known:
            call.answer(b'{"generation":%d}' % taken.generation)
        else:
            call.answer(b'{"generation":%d,"snapshot":%b}' % (taken.generation, taken.encoded))

    def _get_extents(self, call: Call, p: parameters.Key) -> None:
        def work() -> CallResult:
            table = self.source.extents(p.key, p.at_ns)
            try:
                # What a client gets must not be a way to change what another gets.
                fd = os.open(f"/proc/self/fd/{table.fd}", os.O_RDONLY | os.O_CLOEXEC)
                about = {"fd": 0, "rows": len(table), "page_size": table.page_size}
                if p.at_ns is not None:
                    about["scanned_ns"] = table.scanned_ns
                return CallResult(msgspec.json.encode(about), (fd,))
            finally:
                table.close()

        self._work(call, self._read, READ_S, work)

    def _get_frame(self, call: Call, p: parameters.Frame) -> None:
        def work() -> CallResult:
            return CallResult(msgspec.json.encode({"frame": self.source.frame(p.pfn)}))

        self._work(call, self._read, READ_S, work)

    def _open_region(self, call: Call, p: parameters.Region) -> None:
        peer = call.connection.peer.who()

        def work() -> CallResult:
            fds = self.source.open_readonly(p.region, peer=peer)
            about = {"fds": list(range(len(fds))), "sizes": [os.fstat(fd).st_size for fd in fds]}
            return CallResult(msgspec.json.encode(about), fds)

        self._work(call, self._read, READ_S, work)

    def _read_descriptor(self, call: Call, p: parameters.Place) -> None:
        lent = call.connection.lent
        if not 0 <= p.fd < len(lent):
            what = f"the last answer left {len(lent)} descriptors to be read"
            raise NotFound(what, f"{p.fd} is not one of them", "call what answers with descriptors again")
        fd, last = os.dup(lent[p.fd]), p.fd == len(lent) - 1

        def work() -> CallResult:
            try:
                part = inline.part(fd, p.at)
                return CallResult(msgspec.json.encode(part), read_up=last and part.ends)
            finally:
                os.close(fd)

        try:
            self._work(call, self._read, READ_S, work)
        except Refused:
            os.close(fd)
            raise

    def _plan(self, call: Call, p: parameters.Planned) -> None:
        action = action_input.decode(p.action)
        after = tuple(action_input.decode(each) for each in p.after or ())
        role = self.roles.of(call.connection.peer)

        def work() -> CallResult:
            if role is not Role.OPERATOR:
                for each in (*after, action):
                    named.check(each)
            return CallResult(msgspec.json.encode({"plan": self.source.plan(action, after)}))

        self._work(call, self._think, READ_S, work)

    def _apply(self, call: Call, p: parameters.Applied) -> None:
        action = action_input.decode(p.action)
        peer = call.connection.peer.who()

        def work() -> CallResult:
            try:
                return CallResult(msgspec.json.encode({"outcome": self.source.apply(action, peer=peer)}))
            finally:
                self.loop.call(self._applied)

        self._work(call, self._act, ACT_S, work)

    def _applied(self) -> None:
        self.survey.outdate()
        self._streams.news()

    def _events(self, call: Call, p: parameters.After) -> None:
        if call.more:
            self._streams.listen(call, p.after or 0)
        else:
            call.answer(msgspec.json.encode({"events": self.source.events(p.after or 0)}))

    def _history(self, call: Call, p: parameters.After) -> None:
        def work() -> CallResult:
            return CallResult(msgspec.json.encode({"times": self.source.history(p.after or 0)}))

        self._work(call, self._read, READ_S, work)

    def _get_past(self, call: Call, p: parameters.At) -> None:
        def work() -> CallResult:
            return CallResult(msgspec.json.encode({"snapshot": self.source.at(p.at_ns)}))

        self._work(call, self._read, READ_S, work)

    def _watch(self, call: Call, p: parameters.Every) -> None:
        if call.more:
            self._streams.watch(call, max(p.every_ms or 1000, 250) / 1000, p.parts or ())
        else:
            self._get_snapshot(call, parameters.Wanted(parts=p.parts))

    def _doctor(self, call: Call, _: parameters.Nothing) -> None:
        def work() -> CallResult:
            from memconsole.backend.diagnose.doctor import doctor

            return CallResult(msgspec.json.encode({"capabilities": doctor()}))

        self._work(call, self._read, READ_S, work)

    def _metrics(self, call: Call, told: Callable[[Snapshot], list[bytes]]) -> None:
        if not call.more:
            call.reject(f"{SERVICE}.ExpectedMore", {})
            return
        self._hold(call, READ_S)

        def taken(found: SharedSnapshot | MemconsoleError) -> None:
            if isinstance(found, MemconsoleError):
                call.fail(found)
            elif not self.read(lambda: job(found.snapshot)):
                call.fail(Refused(f"{call.method} must wait", "too many calls wait already", "try again", code="Busy"))

        def job(snapshot: Snapshot) -> None:
            answer = unforeseen.attempt(call.method, "call", partial(told, snapshot))
            self.loop.call(lambda: done(answer))

        def done(answer: list[bytes] | MemconsoleError) -> None:
            with self.loop.contained(call.connection):
                call.fail(answer) if isinstance(answer, MemconsoleError) else call.answer_each(answer)

        self.survey.get(taken, PARTS)

    def _list_metrics(self, call: Call, _: parameters.Nothing) -> None:
        self._metrics(call, systemd_metrics.listed)

    def _describe_metrics(self, call: Call, _: parameters.Nothing) -> None:
        self._metrics(call, systemd_metrics.described)

    # --- what may block -------------------------------------------------------------------------------------------

    def _hold(self, call: Call, seconds: float) -> None:
        """Have a call answered within so many seconds, by an error if need be."""
        call.connection.busy = True
        if not self._held:
            self.loop.later(self.loop.limits.looked_after_s, self._expire)
        self._held.append((call, time.monotonic() + seconds, seconds))

    def _expire(self) -> None:
        """Forget the calls that were answered, and answer those whose time is over."""
        now = time.monotonic()
        over = [held for held in self._held if held[0].open and held[1] <= now]
        self._held = [held for held in self._held if held[0].open and held[1] > now]
        if self._held:
            self.loop.later(self.loop.limits.looked_after_s, self._expire)
        for call, _, seconds in over:
            call.fail(
                Refused(
                    f"no answer to {call.method} within {seconds:g} s",
                    "it is still under way",
                    "check the events before you repeat it",
                    code="Deadline",
                )
            )

    def _work(self, call: Call, pool: Pool, seconds: float, work: Callable[[], CallResult]) -> None:
        def job() -> None:
            if not call.connection.open and not call.oneway and pool is not self._act:
                return  # nobody is left to read it
            answer = unforeseen.attempt(call.method, "call", work)
            if call.connection.inline and isinstance(answer, CallResult) and answer.fds:
                answer = unforeseen.attempt(call.method, "call", partial(_with_parts, answer))
            if not self.loop.call(lambda: self._finish(call, answer)) and isinstance(answer, CallResult):
                for fd in answer.fds:
                    os.close(fd)

        if pool.submit(job):
            self._hold(call, seconds)
        else:
            raise Refused(f"{call.method} must wait", "too many calls wait already", "try again", code="Busy")

    def _finish(self, call: Call, answer: CallResult | MemconsoleError) -> None:
        with self.loop.contained(call.connection):
            if isinstance(answer, CallResult):
                if answer.read_up:
                    call.connection.lend(())
                call.answer(answer.parameters, answer.fds)
            else:
                call.fail(answer)

    METHODS: ClassVar[dict[str, Method]] = {
        f"{SERVICE}.GetInfo": Method(parameters.Nothing, Role.NOBODY, _get_info),
        f"{SERVICE}.GetInterfaceDescription": Method(parameters.Interface, Role.NOBODY, _describe),
        f"{INTERFACE}.Hello": Method(parameters.Hello, Role.VIEWER, _hello),
        f"{INTERFACE}.GetSnapshot": Method(parameters.Wanted, Role.VIEWER, _get_snapshot),
        f"{INTERFACE}.GetExtents": Method(parameters.Key, Role.VIEWER, _get_extents),
        f"{INTERFACE}.GetFrame": Method(parameters.Frame, Role.VIEWER, _get_frame),
        f"{INTERFACE}.OpenRegion": Method(parameters.Region, Role.OPERATOR, _open_region),
        f"{INTERFACE}.ReadDescriptor": Method(parameters.Place, Role.VIEWER, _read_descriptor),
        f"{INTERFACE}.Plan": Method(parameters.Planned, Role.VIEWER, _plan),
        f"{INTERFACE}.Apply": Method(parameters.Applied, Role.OPERATOR, _apply),
        f"{INTERFACE}.Events": Method(parameters.After, Role.VIEWER, _events),
        f"{INTERFACE}.Watch": Method(parameters.Every, Role.VIEWER, _watch),
        f"{INTERFACE}.History": Method(parameters.After, Role.VIEWER, _history),
        f"{INTERFACE}.GetPast": Method(parameters.At, Role.VIEWER, _get_past),
        f"{INTERFACE}.Doctor": Method(parameters.Nothing, Role.VIEWER, _doctor),
        f"{systemd_metrics.INTERFACE}.List": Method(parameters.Nothing, Role.VIEWER, _list_metrics),
        f"{systemd_metrics.INTERFACE}.Describe": Method(parameters.Nothing, Role.VIEWER, _describe_metrics),
    }
    DESCRIPTIONS: ClassVar[dict[str, Callable[[], str]]] = {
        SERVICE: lambda: protocol.SERVICE_DESCRIPTION,
        INTERFACE: protocol.description,
        systemd_metrics.INTERFACE: lambda: systemd_metrics.DESCRIPTION,
    }


def _with_parts(answer: CallResult) -> CallResult:
    """An answer with the first part of what each of its descriptors holds, and with those that hold more."""
    with contextlib.ExitStack() as undo:
        for fd in answer.fds:
            undo.callback(os.close, fd)
        first = [inline.part(fd, 0) for fd in answer.fds]
        whole = answer.parameters[:-1] + b',"inline":' + msgspec.json.encode(first) + b"}"
        if all(part.ends for part in first):
            return CallResult(whole)
        undo.pop_all()
    return CallResult(whole, answer.fds)


def _parameter(message: str) -> str:
    """The parameter a validation error is about (``$.key``, or the field it names)."""
    names = _BACKTICKED.findall(message)
    at = next((name.removeprefix("$.") for name in names if name.startswith("$.")), None)
    return at or (names[-1] if names else message)
