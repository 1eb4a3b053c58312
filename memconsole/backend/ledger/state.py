"""What we meant: the fold of the ledger's records; no I/O, and no word about what the kernel says.

    INTENT  an action was planned and begins; ``aims`` is what it will make, as far as that is known
    DONE    it ended; ``change`` is what it made and what it took away
    FAILED  it ended, and nothing of it is left but what ``change`` says
    EVENT   something happened that no action did
    STATE   all that the records before it amounted to (compaction)

The sequence number of an INTENT is the action's number in the records that follow it, and the numbers of the other
records are those of the events a Snapshot shows.

What a newer memconsole wrote is kept: unknown fields of an entity as long as the entity (:mod:`.newer`), records of an
unknown kind, and changes to tables that are unknown here, in every compaction. An INTENT of an unknown action, or of
one with an unknown argument, is ended by the memconsole that knows it.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from memconsole import decoding, newer
from memconsole.actions import AnyAction
from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.ledger.log import RecordKind
from memconsole.errors import BadFile
from memconsole.model import Event, Finding, Grant, Guest, Quarantine, Region, Severity, Value

EVENTS_KEPT = 1000


class WindowGrant(Value, frozen=True):
    """The revocable right of one guest to map an MMIO window; ``window`` is BDF:BAR."""

    id: str
    window: str
    guest: str
    created_ns: int


class StateChange(Value, frozen=True):
    """Entities put in place (of an older one of the same name) and names taken away.

    ``boot`` is the boot id of the kernel in which all of the ledger is true from now on; empty: as before.
    """

    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()
    grants: tuple[Grant, ...] = ()
    windows: tuple[WindowGrant, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()
    without_regions: tuple[str, ...] = ()
    without_guests: tuple[str, ...] = ()
    without_grants: tuple[str, ...] = ()
    without_windows: tuple[str, ...] = ()
    without_quarantine: tuple[str, ...] = ()
    boot: str = ""


class Intent(Value, frozen=True):
    """An action begins; ``peer`` is who asked."""

    at_ns: int
    action: AnyAction
    subject: str
    peer: str = ""
    aims: StateChange = StateChange()


class UnknownIntent(Value, frozen=True):
    """An action begins that this memconsole does not know, or not with these arguments."""

    at_ns: int
    action: dict[str, Any]
    subject: str
    peer: str = ""
    aims: StateChange = StateChange()

    @property
    def verb(self) -> str:
        """What the action is called."""
        return str(self.action.get("do", "action"))


class DoneRecord(Value, frozen=True):
    """The action ``intent`` ended and changed this."""

    intent: int
    at_ns: int
    text: str
    change: StateChange = StateChange()


class FailedRecord(Value, frozen=True):
    """The action ``intent`` ended in an error; ``change`` is what could not be undone."""

    intent: int
    at_ns: int
    code: str
    text: str
    change: StateChange = StateChange()


class EventRecord(Value, frozen=True):
    """Something no action did."""

    at_ns: int
    kind: str
    subject: str
    text: str
    peer: str = ""
    change: StateChange = StateChange()


class Checkpoint(Value, frozen=True):
    """All of a State, as compaction writes it; no action is under way then."""

    everything: StateChange
    next_grant: int


Record = Intent | DoneRecord | FailedRecord | EventRecord | Checkpoint

T = TypeVar("T")
Recorded = Generator[Record, int, T]
"""What a room below the control process is that has something to record: it yields each record, and goes on with the
record's number once it is in the ledger (:mod:`.writer`)."""

RECORDS: dict[RecordKind, type[Record]] = {
    RecordKind.INTENT: Intent,
    RecordKind.DONE: DoneRecord,
    RecordKind.FAILED: FailedRecord,
    RecordKind.EVENT: EventRecord,
    RecordKind.STATE: Checkpoint,
}
KINDS = {payload: kind for kind, payload in RECORDS.items()}

_TABLES = {"regions": "name", "guests": "name", "grants": "id", "windows": "id", "quarantine": "id"}
"""The tables of a Change, and what names an entity in each."""
_CHANGES = {RecordKind.INTENT: "aims", RecordKind.STATE: "everything"}
"""Where a record has its Change, if not in ``change``."""


class UnknownRecord(NamedTuple):
    """A record that is kept as it is, because something in it is not known here."""

    kind: int
    payload: bytes


class State(msgspec.Struct):
    """What the ledger means, by name; ``unfinished`` are actions whose end it does not know, by number.

    ``boot`` is the boot id of the kernel in which its inodes and processes are meant.
    """

    regions: dict[str, Region] = msgspec.field(default_factory=dict)
    guests: dict[str, Guest] = msgspec.field(default_factory=dict)
    grants: dict[str, Grant] = msgspec.field(default_factory=dict)
    windows: dict[str, WindowGrant] = msgspec.field(default_factory=dict)
    quarantine: dict[str, Quarantine] = msgspec.field(default_factory=dict)
    unfinished: dict[int, Intent] = msgspec.field(default_factory=dict)
    events: list[Event] = msgspec.field(default_factory=list)
    next_grant: int = 1
    boot: str = ""
    rests: dict[tuple[str, str], Any] = msgspec.field(default_factory=dict)
    """What a newer memconsole wrote of an entity and this one does not know, by table and name."""
    whole_rest: dict[str, Any] = msgspec.field(default_factory=dict)
    """The same of the record that opened the ledger."""
    unknown: list[UnknownRecord] = msgspec.field(default_factory=list)
    unknown_intents: dict[int, UnknownIntent] = msgspec.field(default_factory=dict)

    def apply_record(self, seq: int, record: Record) -> State:
        """The state after one more record; this one stays as it is."""
        following = copy.copy(self)
        for name in (*_TABLES, "unfinished", "rests", "unknown_intents"):
            setattr(following, name, dict(getattr(self, name)))
        following.events = list(self.events)
        following.take(seq, record)
        return following

    def encode(self, record: Record) -> bytes:
        """A record's payload: entities keep what the ledger has of them and is not known here."""
        place = _CHANGES.get(KINDS[type(record)], "change")
        change = getattr(record, place)
        left: dict[str, Any] = dict(self.whole_rest) if isinstance(record, Checkpoint) else {}
        inside: dict[str, Any] = dict(left.get(place, {}))
        for table, key in _TABLES.items():
            names = [getattr(entity, key) for entity in getattr(change, table)]
            rests = {at: self.rests[table, name] for at, name in enumerate(names) if (table, name) in self.rests}
            if rests:
                inside[table] = newer.Rests(rests, [])
        return newer.encode(record, left | {place: inside} if inside else left or None)

    def compacted(self) -> list[tuple[int, bytes]]:
        """The records that stand for all there were, as kinds and payloads; no action is under way then."""
        whole = self.checkpoint()
        return [(RecordKind.STATE, self.encode(whole)), *self.unknown]

    def findings(self) -> Iterator[Finding]:
        """What the ledger holds that only a newer memconsole knows."""
        if self.unknown:
            yield Finding(
                "ledger-unknown",
                Severity.WARNING,
                "ledger",
                f"the ledger has {len(self.unknown)} records that only a newer memconsole knows",
                "of kinds " + ", ".join(str(kind) for kind in sorted({each.kind for each in self.unknown})),
                "start the memconsole that wrote them; until then they are kept",
            )
        for number, intent in self.unknown_intents.items():
            yield Finding(
                "action-unfinished",
                Severity.WARNING,
                intent.subject,
                f"{intent.verb} of {intent.subject} was interrupted, and this memconsole does not know that action",
                f"ledger record {number}",
                "start the memconsole that began it: it finishes the action",
            )

    def take(self, seq: int, record: Record | UnknownIntent) -> None:
        """Fold one record in, in place."""
        match record:
            case UnknownIntent():
                self.unknown_intents[seq] = record
                self._count(record.aims)
            case Intent():
                self.unfinished[seq] = record
                self._count(record.aims)
            case DoneRecord():
                self._change(record.change)
                self._ended(seq, record.intent, record.at_ns, record.text)
            case FailedRecord():
                self._change(record.change)
                self._ended(seq, record.intent, record.at_ns, f"failed: {record.text}")
                self.rests = {at: each for at, each in self.rests.items() if at[1] in getattr(self, at[0])}
            case EventRecord():
                self._change(record.change)
                self._event(Event(seq, record.at_ns, record.kind, record.subject, record.text, record.peer))
            case Checkpoint():
                self._change(record.everything)
                self.next_grant = max(self.next_grant, record.next_grant)

    def grants_of(self, *, region: str | None = None, guest: str | None = None) -> list[Grant]:
        """The grants on a region, of a guest, or both."""
        return [
            grant
            for grant in self.grants.values()
            if (region is None or grant.region == region) and (guest is None or grant.guest == guest)
        ]

    def window_of(self, window: str) -> WindowGrant | None:
        """The grant of an MMIO window, if it is granted."""
        return next((grant for grant in self.windows.values() if grant.window == window), None)

    def checkpoint(self) -> Checkpoint:
        """The record that stands for all of this."""
        everything = StateChange(
            tuple(self.regions.values()),
            tuple(self.guests.values()),
            tuple(self.grants.values()),
            tuple(self.windows.values()),
            tuple(self.quarantine.values()),
            boot=self.boot,
        )
        return Checkpoint(everything, self.next_grant)

    def _change(self, change: StateChange) -> None:
        self._count(change)
        self.boot = change.boot or self.boot
        self.regions.update((region.name, region) for region in change.regions)
        self.guests.update((guest.name, guest) for guest in change.guests)
        self.grants.update((grant.id, grant) for grant in change.grants)
        self.windows.update((grant.id, grant) for grant in change.windows)
        self.quarantine.update((kept.id, kept) for kept in change.quarantine)
        for table in _TABLES:
            for name in getattr(change, f"without_{table}"):
                getattr(self, table).pop(name, None)
                self.rests.pop((table, name), None)

    def _count(self, change: StateChange) -> None:
        """An id is never given twice, not even one of an action that failed."""
        ids = [*(grant.id for grant in change.grants), *(grant.id for grant in change.windows)]
        self.next_grant = max([self.next_grant, *(int(id[1:]) + 1 for id in ids if id[1:].isdecimal())])

    def _ended(self, seq: int, intent: int, at_ns: int, text: str) -> None:
        unknown = self.unknown_intents.pop(intent, None)
        if unknown is not None:
            self._event(Event(seq, at_ns, unknown.verb, unknown.subject, text, unknown.peer))
        begun = self.unfinished.pop(intent, None)
        if begun is not None:
            self._event(Event(seq, at_ns, begun.action.spec.id, begun.subject, text, begun.peer))

    def _event(self, event: Event) -> None:
        self.events.append(event)
        del self.events[:-EVENTS_KEPT]


def decode(record: ledger_log.Record) -> Record | UnknownIntent:
    """A ledger record as a value; fields that are not known are passed over.

    Raises:
        BadFile: a record of a kind, or with a payload, that this memconsole does not know.
    """
    what, remedy = f"ledger record {record.seq}", "use the memconsole that wrote it"
    kind = next((known for known in RECORDS if known == record.kind), None)
    if kind is None:
        raise BadFile(
            f"{what} cannot be read", f"it is of kind {record.kind}, which this memconsole does not know", remedy
        )
    try:
        return decoding.json(record.payload, RECORDS[kind], what=what, remedy=remedy)
    except decoding.Undecodable as error:
        if kind is not RecordKind.INTENT or error.fault != "unfit":
            raise
        intent = decoding.json(record.payload, UnknownIntent, what=what, remedy=remedy)
        if not _is_unknown(intent.action):
            raise
        return intent


def fold(records: Iterable[ledger_log.Record]) -> State:
    """What all the records of a ledger amount to.

    Raises:
        BadFile: a record of a known kind whose payload is not known; see :func:`decode`.
    """
    state = State()
    for record in records:
        if record.kind not in RecordKind.__members__.values():
            state.unknown.append(UnknownRecord(record.kind, record.payload))
            continue
        decoded = decode(record)
        state.take(record.seq, decoded)
        left = newer.rest(record.payload, decoded)
        if left is not None:
            _keep(state, record, decoded, left)
    return state


def _is_unknown(action: dict[str, Any]) -> bool:
    """Whether it is the action of an INTENT that does not fit, and not the rest of the record."""
    try:
        decoding.convert(action, AnyAction, what="the action")
    except decoding.Undecodable:
        return "do" in action
    return False


def _keep(state: State, record: ledger_log.Record, decoded: Record | UnknownIntent, left: dict[str, Any]) -> None:
    """Keep what is left of a record: of entities with them, of unknown tables by a record of its own."""
    kind = RecordKind(record.kind)
    place = _CHANGES.get(kind, "change")
    inside = dict(left.get(place, {}))
    change = getattr(decoded, place)
    for table, key in _TABLES.items():
        if table in inside:
            for at, each in inside.pop(table).by_place.items():
                state.rests[table, getattr(getattr(change, table)[at], key)] = each
    if kind is RecordKind.STATE:
        state.whole_rest = {name: each for name, each in left.items() if name != place} | {place: inside}
    elif kind is not RecordKind.INTENT and inside:
        bare = msgspec.structs.replace(decoded, **{place: StateChange()})
        state.unknown.append(UnknownRecord(record.kind, newer.encode(bare, {place: inside})))
