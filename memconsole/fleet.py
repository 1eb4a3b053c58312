"""Many hosts as one Source: each asked by a thread of its own, so that none waits for another; its last answer stands.

In the joined Snapshot an entity is called ``HOST/NAME``, its references likewise; an Action on one goes to its host.
What is one host's alone (its physical addresses, IOMMU groups, handoff, history) is not joined: it is seen on the host.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec.structs import replace

from memconsole import __version__, actions, readiness, unforeseen
from memconsole.actions import Action
from memconsole.arguments import ArgumentKind
from memconsole.errors import Gone, MemconsoleError, NotFound, Refused
from memconsole.field import Field, Table, number_field, or_dash, size_field
from memconsole.model import Event, FrameState, Host, Memory, Outcome, Part, Plan, Refusal, Severity, Snapshot
from memconsole.model.base import Value
from memconsole.readiness import Verdict
from memconsole.source import ReadOnly, Source, nothing_at
from memconsole.units import format_age

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

SILENT = 3
"""Intervals without an answer after which a host is silent."""
SLOWEST_S = 30.0
"""Seconds between two tries of a host that fails, at the most."""
SEPARATOR = "/"
_NS = 1_000_000_000
_NAMED = {ArgumentKind.REGION, ArgumentKind.GUEST, ArgumentKind.GRANT, ArgumentKind.WINDOW, ArgumentKind.BDF}

CLOSERS = 32
CLOCK_OFF_S = 60
"""Seconds by which a host's clock may be another than this one's until that is said: an answer may be as old."""


class HostState(enum.StrEnum):
    """How a host answers: ``silent`` is one that did and is late, ``recorded`` a snapshot file."""

    CONNECTING = "connecting"
    LIVE = "live"
    SILENT = "silent"
    LOST = "lost"
    RECORDED = "recorded"


class HostRow(Value, frozen=True):
    """A host as the Hosts view shows it; ``age_ns`` is that of its last answer, ``why`` what keeps it from another.

    None of what is not known. ``reason`` is the first one of a host that is not ready for a handoff, and what is said
    of a clock that is off.
    """

    host: str
    state: HostState
    kernel: str | None = None
    guests: int | None = None
    regions: int | None = None
    memory: int | None = None
    available: int | None = None
    ready: Verdict = Verdict.UNKNOWN
    reason: str = ""
    errors: int | None = None
    warnings: int | None = None
    age_ns: int | None = None
    why: str = ""


HOSTS = Table(
    "hosts",
    "Hosts",
    lambda _: (),
    lambda row: str(row.host),
    (
        Field("host", "Host", "its name, as it was given", lambda h: h.host, width=16),
        Field("state", "State", "connecting, live, silent, lost, recorded", lambda h: str(h.state), width=10),
        Field("age", "Age", "age of its last answer", lambda h: h.age_ns, or_dash(format_age), "time", 6, right=True),
        Field("ready", "Ready", "for a handoff: ready, refused, unknown", lambda h: str(h.ready), width=8),
        number_field("guests", "Guests", "guests on it", lambda h: h.guests),
        size_field("memory", "Memory", "bytes of memory", lambda h: h.memory),
        size_field("available", "Available", "bytes available to new processes", lambda h: h.available, width=9),
        number_field("errors", "Errors", "findings that are errors", lambda h: h.errors),
        number_field("warnings", "Warnings", "findings that are warnings", lambda h: h.warnings, width=8),
        Field("kernel", "Kernel", "its kernel's release", lambda h: h.kernel, width=18),
        Field(
            "why",
            "Why",
            "why it does not answer or is not ready; a clock that is off",
            lambda h: h.why or h.reason,
            width=48,
        ),
        number_field("regions", "Regions", "regions on it", lambda h: h.regions, width=7),
    ),
)
"""The hosts; their rows are those of a :class:`Fleet`."""


class Pair(msgspec.Struct, frozen=True):
    """An entity and the host that it is on."""

    host: str
    item: Any


def with_host(table: Table) -> Table:
    """A table of :class:`Pair`, with the host as its first column; its rows are not a Snapshot's."""

    def of_item(get: Callable[[Any], Any], pair: Pair) -> Any:
        return get(pair.item)

    fields = (replace(field, get=partial(of_item, field.get)) for field in table.fields)
    first = Field("host", "Host", "the host it is on", lambda pair: pair.host, width=16)
    return replace(
        table,
        rows=lambda _: (),
        key=lambda pair: f"{pair.host}{SEPARATOR}{table.key(pair.item)}",
        fields=(first, *fields),
    )


def hosted(table: Table) -> Table:
    """A table of a joined Snapshot, with the host as its first column; what has one in its name is shown without."""
    first = Field("host", "Host", "the host it is on", lambda item: split(_place(item))[0], width=16)

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return split(value)[1]
        return tuple(split(each)[1] for each in value) if isinstance(value, tuple) else value

    def of_name(get: Callable[[Any], Any], item: Any) -> Any:
        return shown(get(item))

    named = {"name", "grants", "id", "region", "guest", "subject", "bdf", "windows"} - (
        {"id"} if table.id == "findings" else set()
    )
    fields = [replace(f, get=partial(of_name, f.get)) if f.id in named else f for f in table.fields if f.id != "seq"]
    return replace(table, fields=(first, *fields))


def _place(item: Any) -> str:
    """What of a joined entity has its host in it."""
    for name in ("name", "bdf", "subject", "id"):
        if (found := getattr(item, name, None)) is not None:
            return str(found)
    return ""


def split(name: str) -> tuple[str, str]:
    """The host and the name that make a joined name; no host, where there is none in it."""
    host, separator, rest = name.partition(SEPARATOR)
    return (host, rest) if separator else ("", name)


def joined(host: str, found: Snapshot, last: tuple[Snapshot, Snapshot] | None = None) -> Snapshot:
    """A host's Snapshot with its host in every name, without what is not joined.

    ``last`` is the Snapshot before and what became of it: an entity that is the same object in both is not made again.
    """

    def at(name: str | None) -> Any:
        return None if name is None else f"{host}{SEPARATOR}{name}"

    def all_at(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{host}{SEPARATOR}{name}" for name in names)

    def every(name: str, make: Callable[[Any], Any]) -> tuple[Any, ...]:
        items = getattr(found, name)
        if last is None:
            return tuple(map(make, items))
        was, then = getattr(last[0], name), getattr(last[1], name)
        if items is was:
            return cast("tuple[Any, ...]", then)
        made = dict(zip(map(id, was), then, strict=True))
        return tuple(made.get(id(item)) or make(item) for item in items)

    def of_grant(each: Any) -> Any:
        return replace(each, id=at(each.id), region=at(each.region), guest=at(each.guest))

    def of_window(each: Any) -> Any:
        return replace(each, id=at(each.id), bdf=at(each.bdf), grant=at(each.grant), guest=at(each.guest))

    return replace(
        found,
        regions=every("regions", lambda each: replace(each, name=at(each.name), grants=all_at(each.grants))),
        guests=every(
            "guests",
            lambda each: replace(each, name=at(each.name), grants=all_at(each.grants), windows=all_at(each.windows)),
        ),
        grants=every("grants", of_grant),
        quarantine=every("quarantine", of_grant),
        devices=every("devices", lambda each: replace(each, bdf=at(each.bdf), bridge=at(each.bridge))),
        windows=every("windows", of_window),
        findings=every("findings", lambda each: replace(each, subject=at(each.subject))),
        events=every("events", lambda each: replace(each, seq=each.at_ns, subject=at(each.subject))),
        iommus=(), domains=(), iomem=(), firmware=(), dax=(), gaps=(), tables=(),
        handoff=None, readiness=None, usage=None,
    )  # fmt: skip


class Member:
    """A host of a fleet: how it is opened, and what it said last."""

    def __init__(
        self,
        name: str,
        opened: Callable[[], Source],
        *,
        recorded: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.name = name
        self._clock = clock
        self._ahead_ns = 0
        self.recorded = recorded
        self.source: Source | None = None
        self.snapshot: Snapshot | None = None
        self.joined: Snapshot | None = None
        self._last: tuple[Snapshot, Snapshot] | None = None
        self.error: MemconsoleError | None = None
        self.answered = 0.0
        self.settled = threading.Event()
        """Set once it answered or failed."""
        self._opened = opened
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, parts: Collection[Part], *, join: bool) -> None:
        """Take its Snapshot, opening it first where that is to be done; what fails is kept as its error."""
        found = unforeseen.attempt(f"the survey of {self.name}", "console", partial(self._taken, parts))
        if isinstance(found, MemconsoleError):
            self.error = found
        else:
            if join and found is not self.snapshot:
                self.joined = joined(self.name, found, self._last)
                self._last = found, self.joined
            self._ahead_ns = found.taken_ns - self._clock()
            self.snapshot, self.error, self.answered = found, None, time.monotonic()
        self.settled.set()

    def _taken(self, parts: Collection[Part]) -> Snapshot:
        source = self.source
        if source is None:
            source = self._opened()
            with self._lock:
                self.source = None if self._closed else source
            if self._closed:
                source.close()
                raise Gone(f"{self.name} is not asked any more", "the hosts were closed", "ask again")
        return source.snapshot(parts)

    def close(self) -> None:
        """Close it, if it is open; one that is being opened is closed by the thread that opens it."""
        with self._lock:
            self._closed = True
            found, self.source = self.source, None
        if found is not None:
            found.close()

    def row(self, silent_s: float) -> HostRow:
        """What the Hosts view shows of it; it is silent where its last answer is older than so many seconds."""
        snapshot, error = self.snapshot, self.error
        if snapshot is None:
            state = HostState.LOST if error is not None else HostState.CONNECTING
            return HostRow(self.name, state, why=str(error or ""))
        age = time.monotonic() - self.answered
        state = HostState.LIVE if age <= silent_s else HostState.SILENT
        if self.recorded:
            state, age = HostState.RECORDED, max(0.0, (self._clock() - snapshot.taken_ns) / _NS)
        elif error is not None:
            state = HostState.LOST
        verdict = readiness.verdict(snapshot.readiness)
        held_up = "" if verdict is Verdict.READY else readiness.sentence(snapshot.readiness)
        severities = [finding.severity for finding in snapshot.findings]
        return HostRow(
            self.name, state, snapshot.host.kernel, len(snapshot.guests), len(snapshot.regions),
            snapshot.memory.total, snapshot.memory.available, verdict,
            "; ".join(filter(None, (held_up, self._clock_said()))),
            severities.count(Severity.ERROR), severities.count(Severity.WARNING), int(age * _NS), str(error or ""),
        )  # fmt: skip

    def _clock_said(self) -> str:
        """What is said of a host's clock that is another than this one's; empty where it is not."""
        off = abs(self._ahead_ns)
        if self.recorded or off <= CLOCK_OFF_S * _NS:
            return ""
        return f"its clock is {format_age(off)} {'ahead of' if self._ahead_ns > 0 else 'behind'} this host's"


class Fleet:
    """Many hosts as one Source; see the top."""

    def __init__(self, members: Sequence[Member], *, interval: float = 1.0, read_only: str = "") -> None:
        self.members = {member.name: member for member in members}
        self._interval = interval
        self._read_only = read_only
        self._parts: frozenset[Part] = frozenset()
        self._over = threading.Event()
        self._last: tuple[tuple[Snapshot | None, ...], Snapshot] | None = None
        self._threads: list[threading.Thread] = []

    def start(self, *, once: bool = False) -> None:
        """Begin to ask every host: every interval until it is closed, or once, for :meth:`wait`."""
        for number, member in enumerate(self.members.values()):
            share = number / len(self.members)
            thread = unforeseen.thread(f"memconsole-{member.name}", partial(self._follow, member, share, once=once))
            self._threads.append(thread)
            thread.start()

    def _follow(self, member: Member, share: float, *, once: bool) -> None:
        """Ask a host; from the second time on the hosts share the interval out among them, not all at one moment."""
        pause, later = self._interval, share * self._interval
        while not self._over.is_set():
            member.ask(self._parts, join=not once)
            if once or (member.recorded and member.error is None):
                return
            pause = self._interval if member.error is None else min(2 * pause, SLOWEST_S)
            self._over.wait(pause + later)
            later = 0.0

    def wait(self, within: float) -> None:
        """Wait until every host answered or failed, for so many seconds at the most."""
        deadline = time.monotonic() + within
        for member in self.members.values():
            member.settled.wait(max(0.0, deadline - time.monotonic()))

    def hosts(self) -> list[HostRow]:
        """A row a host, in the order they were given."""
        return [member.row(max(SILENT * self._interval, SILENT)) for member in self.members.values()]

    def verdicts(self) -> Counter[Verdict]:
        """How many hosts are ready for a handoff, refuse one, or are not known to be either."""
        shown = (member.snapshot for member in self.members.values())
        return Counter(readiness.verdict(each.readiness) if each is not None else Verdict.UNKNOWN for each in shown)

    def source_of(self, host: str) -> Source:
        """The Source of one host, which stays the fleet's.

        Raises:
            NotFound: there is no such host, or it never answered.
        """
        member = self.members.get(host)
        if member is None:
            raise NotFound(f"there is no host {host!r}", f"the hosts are {', '.join(self.members)}", "name one of them")
        if member.source is None:
            why = str(member.error or "it was not reached yet")
            raise NotFound(f"{host} did not answer", why, f"try it alone: memconsole --host {host}")
        return member.source

    def opened(self, host: str) -> Source:
        """One host's Source for a console of its own: without its actions where the fleet has none.

        Raises:
            NotFound: see :meth:`source_of`.
        """
        found = self.source_of(host)
        return ReadOnly(found, self._read_only) if self._read_only else found

    @property
    def label(self) -> str:
        """The first ones by name, and how many more there are."""
        names, more = list(self.members)[:3], len(self.members) - 3
        return ", ".join(names) + (f" and {more:,} more" if more > 0 else "")

    @property
    def read_only(self) -> str:
        """Why no Action can be applied here."""
        return self._read_only

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """What the hosts said last, joined; nobody is waited for."""
        self._parts = frozenset(parts)
        found = tuple(member.joined for member in self.members.values())
        last = self._last
        if last is not None and all(old is new for old, new in zip(last[0], found, strict=True)):
            return last[1]
        made = _sum([each for each in found if each is not None], f"{len(self.members):,} hosts")
        self._last = found, made
        return made

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The PFN map of a host's region or guest."""
        kind, _, name = key.partition(":")
        host, name = split(name)
        return self.source_of(host).extents(f"{kind}:{name}", at_ns)

    def frame(self, pfn: int) -> FrameState:
        """Nothing: each host has frames of its own.

        Raises:
            NotFound: always.
        """
        raise NotFound(f"there is no one frame {pfn:#x}", "each host has frames of its own", "open the host first")

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """The plan of the action's host."""
        try:
            host, there = self._there(action)
            plan = self.source_of(host).plan(there, [self._there(each)[1] for each in after])
        except MemconsoleError as error:
            return actions.refused_plan(action, Refusal(error.code, error.what, error.why, error.remedy))
        cli = plan.cli.replace("memconsole ", f"memconsole --host {host} ", 1)
        confirm = None if plan.confirm is None else f"{host}{SEPARATOR}{plan.confirm}"
        return replace(plan, cli=cli, confirm=confirm, subject=f"{host}{SEPARATOR}{plan.subject}")

    def apply(self, action: Action) -> Outcome:
        """Have the action's host do it."""
        if self._read_only:
            raise Refused(f"{action.spec.title} is refused here", self._read_only, "open it without", code="ReadOnly")
        host, there = self._there(action)
        outcome = self.source_of(host).apply(there)
        return replace(outcome, subject=f"{host}{SEPARATOR}{outcome.subject}", text=f"{host}: {outcome.text}")

    def _there(self, action: Action) -> tuple[str, Action]:
        """The host of an action, by the names in it, and the action as that host knows it."""
        values = {
            field.name: split(value)
            for field in actions.fields(type(action))
            if field.arg.kind in _NAMED and isinstance(value := getattr(action, field.name), str) and value
        }
        hosts = {host for host, _ in values.values()}
        if len(hosts) != 1 or "" in hosts:
            many = f"it names things of {len(hosts)} hosts" if len(hosts) > 1 else "no host is named in it"
            raise Refused(
                f"{action.spec.title} is done on one host", many, "name HOST/NAME, or open the host and do it there",
                code="OneHost",
            )  # fmt: skip
        return hosts.pop(), replace(action, **{name: rest for name, (_, rest) in values.items()})

    def events(self, after: int) -> Sequence[Event]:
        """What the joined Snapshot has, by time: ``seq`` is when it happened."""
        return [event for event in self.snapshot(self._parts).events if event.seq > after]

    def history(self, after: int = 0) -> Sequence[int]:  # noqa: ARG002 - there is none
        """Nothing: each host has its own."""
        return ()

    def at(self, time_ns: int) -> Snapshot:  # noqa: ARG002 - there is none
        """Nothing.

        Raises:
            NotFound: always.
        """
        raise nothing_at(())

    def close(self) -> None:
        """Ask nobody any more, and close the hosts that are open."""
        self._over.set()
        with ThreadPoolExecutor(CLOSERS) as pool:
            list(pool.map(Member.close, self.members.values()))


def _sum(found: Sequence[Snapshot], label: str) -> Snapshot:
    """Snapshots that were joined, as one."""

    def every(name: str) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(getattr(each, name) for each in found))

    kernels = {each.host.kernel for each in found}
    cpus = sum(each.host.cpus for each in found)
    host = Host(label, kernels.pop() if len(kernels) == 1 else "", "", "", cpus, 4096, 0.0, __version__)
    events: dict[int, Event] = {}
    for event in sorted(every("events"), key=lambda event: event.seq):
        seq = event.seq
        while seq in events:
            seq += 1
        events[seq] = event if seq == event.seq else replace(event, seq=seq)
    return Snapshot(
        taken_ns=max((each.taken_ns for each in found), default=time.time_ns()),
        host=host,
        memory=Memory(*(sum(getattr(each.memory, name) for each in found) for name in ("total", "free", "available"))),
        regions=every("regions"), guests=every("guests"), grants=every("grants"), quarantine=every("quarantine"),
        devices=every("devices"), windows=every("windows"), findings=every("findings"), events=tuple(events.values()),
    )  # fmt: skip
