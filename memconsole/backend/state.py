"""What we meant: the fold of the ledger's records; no I/O, and no word about what the kernel says.

    INTENT  an action was planned and begins; ``aims`` is what it will make, as far as that is known
    DONE    it ended; ``change`` is what it made and what it took away
    FAILED  it ended, and nothing of it is left but what ``change`` says
    EVENT   something happened that no action did
    STATE   all that the records before it amounted to (compaction)

The sequence number of an INTENT is the action's number in the records that follow it, and the numbers of the other
records are those of the events a Snapshot shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import msgspec

from memconsole.actions import AnyAction
from memconsole.backend import ledger
from memconsole.backend.ledger import Kind
from memconsole.errors import BadFile
from memconsole.model import Event, Grant, Guest, Quarantine, Region, Value

EVENTS_KEPT = 1000


class WindowGrant(Value, frozen=True):
    """The revocable right of one guest to map an MMIO window; ``window`` is BDF:BAR."""

    id: str
    window: str
    guest: str
    created_ns: int


class Change(Value, frozen=True):
    """Entities put in place (of an older one of the same name) and names taken away."""

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


class Intent(Value, frozen=True):
    """An action begins; ``peer`` is who asked."""

    at_ns: int
    action: AnyAction
    subject: str
    peer: str = ""
    aims: Change = Change()


class Done(Value, frozen=True):
    """The action ``intent`` ended and changed this."""

    intent: int
    at_ns: int
    text: str
    change: Change = Change()


class Failed(Value, frozen=True):
    """The action ``intent`` ended in an error; ``change`` is what could not be undone."""

    intent: int
    at_ns: int
    code: str
    text: str
    change: Change = Change()


class Happened(Value, frozen=True):
    """Something no action did."""

    at_ns: int
    kind: str
    subject: str
    text: str
    peer: str = ""
    change: Change = Change()


class Whole(Value, frozen=True):
    """All of a State, as compaction writes it; no action is under way then."""

    everything: Change
    next_grant: int


Record = Intent | Done | Failed | Happened | Whole

RECORDS: dict[Kind, type[Record]] = {
    Kind.INTENT: Intent,
    Kind.DONE: Done,
    Kind.FAILED: Failed,
    Kind.EVENT: Happened,
    Kind.STATE: Whole,
}
KINDS = {payload: kind for kind, payload in RECORDS.items()}


class State(msgspec.Struct):
    """What the ledger means, by name; ``unfinished`` are actions whose end it does not know, by number."""

    regions: dict[str, Region] = msgspec.field(default_factory=dict)
    guests: dict[str, Guest] = msgspec.field(default_factory=dict)
    grants: dict[str, Grant] = msgspec.field(default_factory=dict)
    windows: dict[str, WindowGrant] = msgspec.field(default_factory=dict)
    quarantine: dict[str, Quarantine] = msgspec.field(default_factory=dict)
    unfinished: dict[int, Intent] = msgspec.field(default_factory=dict)
    events: list[Event] = msgspec.field(default_factory=list)
    next_grant: int = 1

    def after(self, seq: int, record: Record) -> State:
        """The state after one more record; this one stays as it is."""
        following = copy.copy(self)
        for name in ("regions", "guests", "grants", "windows", "quarantine", "unfinished"):
            setattr(following, name, dict(getattr(self, name)))
        following.events = list(self.events)
        following.take(seq, record)
        return following

    def take(self, seq: int, record: Record) -> None:
        """Fold one record in, in place."""
        match record:
            case Intent():
                self.unfinished[seq] = record
                self._count(record.aims)
            case Done():
                self._change(record.change)
                self._ended(seq, record.intent, record.at_ns, record.text)
            case Failed():
                self._change(record.change)
                self._ended(seq, record.intent, record.at_ns, f"failed: {record.text}")
            case Happened():
                self._change(record.change)
                self._event(Event(seq, record.at_ns, record.kind, record.subject, record.text, record.peer))
            case Whole():
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

    def whole(self) -> Whole:
        """The record that stands for all of this."""
        everything = Change(
            tuple(self.regions.values()),
            tuple(self.guests.values()),
            tuple(self.grants.values()),
            tuple(self.windows.values()),
            tuple(self.quarantine.values()),
        )
        return Whole(everything, self.next_grant)

    def _change(self, change: Change) -> None:
        self._count(change)
        self.regions.update((region.name, region) for region in change.regions)
        self.guests.update((guest.name, guest) for guest in change.guests)
        self.grants.update((grant.id, grant) for grant in change.grants)
        self.windows.update((grant.id, grant) for grant in change.windows)
        self.quarantine.update((kept.id, kept) for kept in change.quarantine)
        for name in change.without_regions:
            self.regions.pop(name, None)
        for name in change.without_guests:
            self.guests.pop(name, None)
        for name in change.without_grants:
            self.grants.pop(name, None)
        for name in change.without_windows:
            self.windows.pop(name, None)
        for name in change.without_quarantine:
            self.quarantine.pop(name, None)

    def _count(self, change: Change) -> None:
        """An id is never given twice, not even one of an action that failed."""
        ids = [*(grant.id for grant in change.grants), *(grant.id for grant in change.windows)]
        self.next_grant = max([self.next_grant, *(int(id[1:]) + 1 for id in ids)])

    def _ended(self, seq: int, intent: int, at_ns: int, text: str) -> None:
        begun = self.unfinished.pop(intent, None)
        if begun is not None:
            self._event(Event(seq, at_ns, begun.action.spec.id, begun.subject, text, begun.peer))

    def _event(self, event: Event) -> None:
        self.events.append(event)
        del self.events[:-EVENTS_KEPT]


def decode(record: ledger.Record) -> Record:
    """A ledger record as a value.

    Raises:
        BadFile: a record of a kind, or with a payload, that this memconsole does not know.
    """
    try:
        return msgspec.json.decode(record.payload, type=RECORDS[Kind(record.kind)])
    except (ValueError, msgspec.DecodeError) as error:
        raise BadFile(
            f"ledger record {record.seq} is not known", str(error), "use the memconsole that wrote it"
        ) from error


def fold(records: Iterable[ledger.Record]) -> State:
    """What all the records of a ledger amount to.

    Raises:
        BadFile: see :func:`decode`.
    """
    state = State()
    for record in records:
        state.take(record.seq, decode(record))
    return state
