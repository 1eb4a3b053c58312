"""What would be so after some Actions that are not done: a desk on which the next one is planned.

    desk as it is → verbs.prepare(action) → what the ledger would say → the desk with that over it → the next action ...

Only what planning reads is foreseen: what the ledger means, whether memory is held, what guests say of themselves, who
maps what. An Action that is refused changes nothing. A handoff is judged by what is there: what would only have been
made by then is left out of its plan, and named.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec.structs import replace

from memconsole.actions import Action, GuestAttach, GuestHelper, GuestResume, GuestStop, HandoffAction, Move, Revoke
from memconsole.backend import verbs
from memconsole.backend.custody.names import custody_name
from memconsole.backend.ledger.state import EventRecord, State, StateChange
from memconsole.backend.observe.reach import RegionReach
from memconsole.backend.revoke import suspend_vm
from memconsole.backend.stores import base, files
from memconsole.model import Grant, GrantState, Guest, GuestKind, GuestState, Helper, Region, Segment

if TYPE_CHECKING:
    from memconsole.backend.guests.base import GuestDriver
    from memconsole.backend.stores.base import Store
    from memconsole.backend.work import PreparedAction


class Foreseen(msgspec.Struct, frozen=True):
    """What some Actions would change: the whole state of the ledger, and of everything else only what differs.

    ``made`` and ``gone`` are names of regions; ``freed`` are PIDs that would map nothing any more, by region; ``says``
    is what guests would say of themselves, None for one that would have no process; ``devices`` is BDF to guest;
    ``saved`` is what custody would hold of guests that were saved, by its name there.
    """

    state: State
    made: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    guests: frozenset[str] = frozenset()
    promised: int = 0
    freed: Mapping[str, frozenset[int]] = {}
    says: Mapping[str, GuestState | None] = {}
    devices: Mapping[str, str | None] = {}
    saved: Mapping[str, bytes] = {}


class ForeseenGuest:
    """A guest as it would be; what it does is not asked for before it is there."""

    def __init__(self, guest: Guest, state: GuestState, live: GuestDriver | None) -> None:
        self.name = guest.name
        self.kind = guest.kind
        self.pid = guest.pid
        self._state = state
        self._live = live

    def state(self) -> GuestState:
        """What it would say."""
        return self._state

    def agent(self) -> bool:
        """Whether its agent would be connected."""
        return self._live.agent() if self._live is not None else self.kind is GuestKind.CANARY

    def __getattr__(self, name: str) -> Any:
        """What else it has, or what a step of a plan would have it do once it is there."""
        return getattr(self._live, name) if self._live is not None else _not_yet


def _not_yet(*_: object) -> None:
    """What a step has a guest do that is not there.

    Raises:
        RuntimeError: always; such steps are shown and never run.
    """
    raise RuntimeError("a guest that is only foreseen was asked to do something")


class _Over:
    """Something that is there, with attributes of its own in front of it."""

    def __init__(self, below: Any, **over: Any) -> None:
        self._below = below
        self.__dict__.update(over)

    def __getattr__(self, name: str) -> Any:
        """What nothing is in front of."""
        return getattr(self._below, name)


class ForeseenDesk:
    """A desk with what is foreseen over it."""

    def __init__(self, desk: verbs.VerbDesk, foreseen: Foreseen) -> None:
        self._desk = desk
        self.foreseen = foreseen

    def __getattr__(self, name: str) -> Any:
        """What nothing is foreseen of."""
        return getattr(self._desk, name)

    @property
    def state(self) -> State:
        """What the ledger would mean."""
        return self.foreseen.state

    @property
    def custody(self) -> Any:
        """Custody, with the names that it would hold."""
        below = self._desk.custody
        lost = tuple(custody_name(name, 0)[:-1] for name in self.foreseen.gone)
        names = [name for name in below.names() if not name.startswith(lost)] if lost else list(below.names())
        names += [*(custody_name(name, 0) for name in self.foreseen.made), *self.foreseen.saved]

        def get(name: str) -> tuple[int, bytes]:
            saved = self.foreseen.saved.get(name)
            return below.get(name) if saved is None else (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), saved)

        return _Over(below, names=lambda: names, get=get)

    @property
    def address_spaces(self) -> Any:
        """The address spaces, with the devices that would be attached."""
        below = self._desk.address_spaces
        devices = {**below.devices, **self.foreseen.devices}
        return _Over(below, devices={bdf: guest for bdf, guest in devices.items() if guest is not None})

    def holds_region(self, region: str) -> bool:
        """Whether its memory would be held."""
        if region in self.foreseen.gone:
            return False
        return region in self.foreseen.made or self._desk.holds_region(region)

    def fds(self, region: str) -> tuple[int, ...]:
        """Its descriptors: none of a region that is not there yet, which nothing has sealed."""
        return () if region in self.foreseen.made else self._desk.fds(region)

    def store_of(self, region: str) -> Store:
        """Its store."""
        return base.named(self._desk.stores, self.state.regions[region].store)

    def promised_bytes(self) -> int:
        """Bytes that would be reserved without frames: those of regions that are not there yet are counted whole."""
        return self._desk.promised_bytes() + self.foreseen.promised

    def region_reach(
        self, region: Region, segment: int | None = None, among: Collection[int] | None = None
    ) -> RegionReach:
        """Who would reach a region: who does, without those whose grants would have ended."""
        if region.name in self.foreseen.made:
            return RegionReach((), ())
        found = self._desk.region_reach(region, segment, among)
        freed = self.foreseen.freed.get(region.name, frozenset())
        mapped = tuple(each for each in found.mapped if each.pid not in freed)
        return RegionReach(mapped, tuple(each for each in found.held if each[0] not in freed), found.unseen)

    def live_guest(self, guest: str) -> Any:
        """A guest as it would be."""
        if guest not in self.foreseen.says:
            return self._desk.live_guest(guest)
        says = self.foreseen.says[guest]
        if says is None or guest not in self.state.guests:
            return None
        below = None if guest in self.foreseen.guests else self._desk.live_guest(guest)
        return ForeseenGuest(self.state.guests[guest], says, below)

    def state_of(self, live: Any) -> GuestState:
        """What a guest would say of itself."""
        return live.state() if isinstance(live, ForeseenGuest) else self._desk.state_of(live)

    def connected(self, guest: str, *, patient: bool = True) -> bool:
        """Whether its agent would be connected."""
        live = self.live_guest(guest)
        return live.agent() if isinstance(live, ForeseenGuest) else self._desk.connected(guest, patient=patient)


def desk_after(desk: verbs.VerbDesk, before: Sequence[Action]) -> verbs.VerbDesk:
    """The desk as it would be once these Actions are done, in order; to plan on, and for nothing else."""
    found = desk
    for action in before:
        if isinstance(action, HandoffAction):  # guests come back from it as they went
            continue
        work = verbs.prepare(found, action)
        if not work.refusals:
            found = _over(desk, _after(found, action, work))
    return found


def for_handoff(desk: verbs.VerbDesk) -> tuple[verbs.VerbDesk, str]:
    """The desk that a handoff is planned on after others, and what its plan leaves out, in a sentence."""
    if not isinstance(desk, ForeseenDesk):
        return desk, ""
    foreseen = desk.foreseen
    absent = tuple(foreseen.guests - {name for name, says in foreseen.says.items() if says is None})
    made = tuple(foreseen.made)
    grants = [each.id for each in foreseen.state.grants.values() if each.region in made or each.guest in absent]
    left = StateChange(without_regions=made, without_guests=absent, without_grants=tuple(grants))
    there = replace(foreseen, state=_folded(foreseen.state, left), made=frozenset(), guests=frozenset(), promised=0)
    names = ", ".join(sorted({*made, *absent}))
    note = f"what is not there yet ({names}) is judged when it runs" if names else ""
    return _over(desk._desk, there), note  # noqa: SLF001 - of one's own kind


def _over(desk: verbs.VerbDesk, foreseen: Foreseen) -> verbs.VerbDesk:
    return cast("verbs.VerbDesk", ForeseenDesk(desk, foreseen))


def _folded(state: State, change: StateChange) -> State:
    return state.apply_record(0, EventRecord(0, "foreseen", "", "", change=change))


def _after(desk: verbs.VerbDesk, action: Action, work: PreparedAction) -> Foreseen:
    """What would be so after one more Action that is not refused."""
    before = desk.foreseen if isinstance(desk, ForeseenDesk) else Foreseen(desk.state)
    change = _change(desk, action, work)
    ended = {name: desk.state.grants[name] for name in change.without_grants if name in desk.state.grants}
    made = [region for region in change.regions if region.name not in desk.state.regions]
    sizes = sum(region.size for region in made)
    without = frozenset(change.without_regions)
    return Foreseen(
        _folded(desk.state, change),
        made=(before.made | {region.name for region in made}) - without,
        gone=(before.gone | without) - {region.name for region in change.regions},
        guests=(before.guests | _new_guests(desk, change)) - set(change.without_guests),
        promised=before.promised + sizes,
        freed=_freed(desk, before, ended.values()),
        says={**before.says, **_said(change, work)},
        devices={**before.devices, **_attached(desk, change, ended.values())},
        saved=_saved(desk, before, action, ended.values()),
    )


def _change(desk: verbs.VerbDesk, action: Action, work: PreparedAction) -> StateChange:
    """What the ledger would say, as far as it is known before the first step."""
    match action:
        case Revoke():
            grant = desk.state.grants[action.grant]
            guest = desk.state.guests.get(grant.guest)
            ends = guest is not None and guest.kind is GuestKind.QEMU
            waits = (replace(guest, pid=None, start_ticks=None, state=GuestState.GONE),) if guest and ends else ()
            return StateChange(guests=waits, without_grants=(grant.id,))
        case Move():
            return StateChange(regions=(replace(desk.state.regions[action.region], store=action.store),))
        case GuestAttach():
            known = desk.state.guests.get(action.name)
            if known is not None:
                return StateChange(guests=(replace(known, pid=action.pid, state=GuestState.RUNNING, ended=""),))
            return StateChange(guests=(Guest(action.name, GuestKind.PROCESS, GuestState.RUNNING, action.pid),))
        case GuestHelper():
            guest = desk.state.guests[action.name]
            return StateChange(guests=(replace(guest, helpers=(*guest.helpers, Helper(action.pid, 0))),))
        case GuestResume():
            return StateChange(guests=(replace(desk.state.guests[action.name], state=GuestState.RUNNING),))
    change, aims = work.change, work.aims
    return replace(
        change,
        regions=tuple(_with_segments(region) for region in (*aims.regions, *change.regions)),
        guests=tuple(_running(guest) for guest in (*aims.guests, *change.guests)),
        grants=tuple(replace(grant, state=GrantState.MAPPED) for grant in (*aims.grants, *change.grants)),
    )


def _with_segments(region: Region) -> Region:
    starts = range(0, region.size, files.SEGMENT)
    return replace(region, segments=tuple(Segment(0, 0, min(files.SEGMENT, region.size - start)) for start in starts))


def _running(guest: Guest) -> Guest:
    return replace(guest, state=GuestState.RUNNING) if guest.state is GuestState.STARTING else guest


def _new_guests(desk: verbs.VerbDesk, change: StateChange) -> set[str]:
    return {guest.name for guest in change.guests if guest.name not in desk.state.guests}


def _said(change: StateChange, work: PreparedAction) -> dict[str, GuestState | None]:
    said: dict[str, GuestState | None] = dict.fromkeys(change.without_guests)
    for guest in change.guests:
        waits = guest.state is GuestState.GONE and not work.change.guests
        said[guest.name] = None if waits else guest.state
    return said


def _freed(desk: verbs.VerbDesk, before: Foreseen, ended: Collection[Grant]) -> dict[str, frozenset[int]]:
    freed = dict(before.freed)
    for grant in ended:
        guest = desk.state.guests.get(grant.guest)
        if guest is not None:
            pids = {guest.pid, *(helper.pid for helper in guest.helpers)} - {None}
            freed[grant.region] = freed.get(grant.region, frozenset()) | cast("set[int]", pids)
    return freed


def _attached(desk: verbs.VerbDesk, change: StateChange, ended: Collection[Grant]) -> dict[str, str | None]:
    found: dict[str, str | None] = {grant.dma: grant.guest for grant in change.grants if grant.dma is not None}
    gone = {grant.id for grant in ended}
    for grant in ended:
        others = [each for each in desk.state.grants_of(guest=grant.guest) if each.id not in gone]
        if grant.dma is not None and all(each.dma != grant.dma for each in others):
            found[grant.dma] = None
    return found


def _saved(desk: verbs.VerbDesk, before: Foreseen, action: Action, ended: Collection[Grant]) -> dict[str, bytes]:
    """What custody would hold of the QEMUs that are saved and end, because their RAM is taken back."""
    found = dict(before.saved)
    if isinstance(action, GuestResume | GuestStop):
        found = {name: payload for name, payload in found.items() if name.partition(":")[2] != action.name}
    for grant in ended if isinstance(action, Revoke) and desk.custody.resumes else ():
        guest = desk.state.guests.get(grant.guest)
        if guest is not None and guest.kind is GuestKind.QEMU:
            found |= suspend_vm.entries_of(guest, grant)
    return found
