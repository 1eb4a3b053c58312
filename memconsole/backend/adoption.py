"""Taking over what an earlier control process left: fds from custody, guests by PID, actions it did not end.

region in ledger and custody      taken over; with a finding where it is another memfd than the ledger means
region in ledger only             stays lost; the Snapshot says so
region in custody only            taken over by its payload, else as it is, with a finding: the ledger lost it
region partly in custody          stays where it is, with a finding: nothing of it is thrown away
ledger of another boot            regions are known by name and size, guests have ended (:mod:`.boots`)
handoff whose record is unread    left unfinished, with a finding: states, manifest and record stay in custody
guest between two QEMUs           brought to where it should run (:mod:`.verbs.relocate`)
guest whose process lives         taken over with its grants; one whose process ended is a finding
unfinished release, revoke,       carried through: what they take away must not come back
  stop, let-go, pause, resume
adopted guest a jump brought     its RAM and image are put where libvirt looks; libvirt is asked nothing before it is up
unfinished reserve, map, start,   taken back: nobody was told that they were done
  attach, adopt
unfinished move                   ended where its contents are, as the ledger has it (:mod:`.revoke.move`)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import msgspec

from memconsole import actions, newer
from memconsole.backend import needs, steplog, steps, verbs
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.handoff import carried_back, clocks, report, restart_one, stored
from memconsole.backend.handoff import landing as handoff
from memconsole.backend.handoff.facets import QuietSpaces
from memconsole.backend.handoff.landing import Landing
from memconsole.backend.handoff.powers import HOST, Powers
from memconsole.backend.ledger import boots
from memconsole.backend.ledger.state import DoneRecord, EventRecord, FailedRecord, Intent, Record, Recorded, StateChange
from memconsole.backend.peers.patience import Patience
from memconsole.backend.revoke import move, stop_processes, suspend_vm
from memconsole.backend.stores import files
from memconsole.backend.verbs import relocate
from memconsole.backend.verbs.adopt import drop_unfinished
from memconsole.backend.verbs.arenas import held_regions, note
from memconsole.backend.verbs.grants import OFFER_S
from memconsole.backend.verbs.guests import adopt_orphans, forget
from memconsole.backend.verbs.regions import drop_custody
from memconsole.backend.work import PreparedAction
from memconsole.errors import BadFile, Gone, KernelRefused, MemconsoleError
from memconsole.model import Finding, Grant, GrantState, Guest, GuestState, Region, RegionState, Segment, Severity
from memconsole.units import PAGE

FORWARD = (
    actions.Release,
    actions.Revoke,
    actions.GuestStop,
    actions.GuestLetGo,
    actions.GuestPause,
    actions.GuestResume,
    actions.WindowRevoke,
)

LOOK_S = 0.02
"""Seconds between two looks whether a guest has let go of a mapping."""


class FaultBroker(needs.FaultBroker, Protocol):
    """The userfaultfds, as a start takes them over."""

    def adopt(self) -> list[Finding]:
        """Take over those in custody; what cannot be read is a finding."""

    def forget_ended(self) -> None:
        """Let go of those that no grant means."""


class AddressSpaces(QuietSpaces, Protocol):
    """The address spaces, as a start takes them over."""

    def adopt(self) -> list[Finding]:
        """Take over those in custody; what cannot be read is a finding."""


class AdoptionDesk(verbs.VerbDesk, Protocol):
    """What a start needs: all that verbs do, for it ends what they began, and what is taken over besides."""

    @property
    def userfaults(self) -> FaultBroker:
        """What guests handed over to have their faults served, or to be barred."""

    @property
    def address_spaces(self) -> AddressSpaces:
        """The address spaces in which devices reach memory."""


def adopt_all(desk: AdoptionDesk, powers: Powers = HOST) -> Recorded[list[Finding]]:
    """Take over everything; what does not match is a finding. It may die at any of its points, and begins anew."""
    with steplog.running("adopt"):
        return (yield from _adopt(desk, powers))


def _adopt(desk: AdoptionDesk, powers: Powers) -> Recorded[list[Finding]]:
    steps.passed("adopt.begun")
    found, by_itself = _adopt_stores(desk)
    steps.passed("adopt.stores")
    if not handoff.has_landed(desk):
        found += yield from boots.record_reboot(desk)
    stop_processes.continue_stopped(desk)
    move.finish_moves(desk)
    unread: list[Finding] = []
    try:
        desk.handoff = stored.stored_report(desk)
    except BadFile as error:
        unread.append(payloads.unknown("report", error))
    again: list[str] = []
    landing, of_it = yield from _adopt_landing(desk, again)
    unread += of_it
    is_unread = landing is None and handoff.has_landed(desk)
    steps.passed("adopt.landed")
    found += [*unread, *(yield from boots.record_reboot(desk, boots.UNREAD))]
    found += yield from _adopt_regions(desk)
    steps.passed("adopt.regions")
    found += desk.userfaults.adopt()
    found += desk.address_spaces.adopt()
    _guests(desk, landing.waiting if landing is not None else frozenset())
    yield from relocate.settle(desk)
    steps.passed("adopt.moves")
    for number, intent in list(desk.state.unfinished.items()):
        if not (
            is_unread and isinstance(intent.action, actions.HandoffAction)
        ):  # a memconsole that can read it ends it
            found += yield from _finish_action(desk, number, intent, powers)
    if landing is None and not is_unread and handoff.has_landed(desk):  # a rehearsal was carried on
        landing = handoff.land(desk)
    if landing is not None:
        carried_back.spend_all(desk, landing.told)
        handoff.reconcile(desk, landing)
        found += landing.findings
    spoiled = report.spoiled_guests(desk.handoff, desk.state.grants.values()) if desk.handoff is not None else set()
    carried_back.offer_all(desk, spoiled)
    for name in [*again, *(() if is_unread else handoff.start_waiting_guests(desk))]:
        found += yield from _bring_back(desk, name, powers)
    steps.passed("adopt.settled")
    found += yield from _unknown_regions(desk, by_itself)
    found += payloads.unknown_kinds(desk.custody)
    suspend_vm.drop_stale_states(desk)
    desk.userfaults.forget_ended()
    found += _reconcile_devices(desk)
    if desk.handoff is not None:
        clocks.begin_clocks(desk)
    steps.passed("adopt.done")
    return found


def _guests(desk: AdoptionDesk, waiting: Collection[str]) -> None:
    """Take hold of the guests' processes; those that are ``waiting`` for their devices get their windows with them."""
    for guest in desk.state.guests.values():
        with steplog.suppressed(f"guest {guest.name} is taken over", Gone):
            if guest.pid is not None:
                desk.adopt_guest(guest, windows=guest.name not in waiting)
        steps.passed(f"adopt.guest.{guest.name}")


def _reconcile_devices(desk: AdoptionDesk) -> Iterator[Finding]:
    """Let go of what devices reach and no grant means; that it cannot be is a finding, and the service starts."""
    try:
        desk.address_spaces.reconcile()
    except KernelRefused as error:
        what = f"devices may reach more than their guests were granted: {error.what}"
        remedy = (
            "memconsole domains shows what they reach; stop the guests that have devices, then start the service again"
        )
        yield Finding("devices-unsettled", Severity.ERROR, "devices", what, error.why, remedy)


def _adopt_landing(desk: AdoptionDesk, again: list[str]) -> Recorded[tuple[Landing | None, list[Finding]]]:
    """The other side of a jump: the ledger learns which inodes its regions, which processes its guests are now.

    A guest that was started alone is added to ``again``: it is to be resumed, once it is taken over.
    """
    if not handoff.has_landed(desk):
        return None, []
    for number, intent in list(desk.state.unfinished.items()):
        guest = desk.state.guests.get(intent.subject)
        if isinstance(intent.action, actions.GuestResume) and guest is not None:  # alone, long after the landing
            again += yield from _adopt_restarted(desk, number, guest)
            return None, []
    try:
        landing = handoff.land(desk)
    except MemconsoleError as error:
        what = f"the record of the last handoff cannot be read: {error}"
        return None, [Finding("handoff-unread", Severity.ERROR, "handoff", what, "custody", error.remedy)]
    steps.passed("adopt.read")
    for number, intent in list(desk.state.unfinished.items()):  # none: the ledger knew already
        if isinstance(intent.action, actions.HandoffAction):
            back = sum(guest.back for guest in landing.report.guests)
            text = f"{intent.subject} was handed off: {back} of {len(landing.report.guests)} guests are back"
            yield DoneRecord(number, time.time_ns(), text, landing.change)
    return landing, []


def _bring_back(desk: AdoptionDesk, name: str, powers: Powers) -> Recorded[list[Finding]]:
    """Resume a guest as if somebody had asked for it, unless it has gone on."""
    live = desk.live_guest(name)
    with steplog.suppressed(f"{name} says whether it has gone on", MemconsoleError):
        desk.connected(name)
        if live is not None and live.state() is not GuestState.PAUSED:
            return []
    intent = Intent(time.time_ns(), actions.GuestResume(name), name, "", StateChange())
    number = yield intent
    return (yield from _finish_action(desk, number, intent, powers))


def _adopt_restarted(desk: AdoptionDesk, number: int, guest: Guest) -> Recorded[list[str]]:
    """A guest that an earlier control process started alone and did not see go on; its name, if it is there."""
    try:
        change = StateChange(guests=(restart_one.restarted_guest(desk, guest),))
    except MemconsoleError as error:
        yield FailedRecord(number, time.time_ns(), error.code, str(error))
        return []
    yield DoneRecord(number, time.time_ns(), f"guest {guest.name} is started (carried through after a restart)", change)
    restart_one.drop_saved_state(desk, guest.name)
    return [guest.name]


# --- regions ----------------------------------------------------------------------------------------------------


def _adopt_stores(desk: AdoptionDesk) -> tuple[list[Finding], frozenset[str]]:
    """Put the regions that stores know by themselves into custody, where it lacks them; their names."""
    told: list[Finding] = []
    names = set()
    for store in desk.stores.values():
        found, wrong = store.found(held_regions(desk)) if store.may_know() else ([], [])
        told += wrong
        for each in found:
            for index, fd in enumerate(each.fds):
                payloads.put(desk.custody, custody_name(each.region.name, index), fd, each.region)
                os.close(fd)
            names.add(each.region.name)
    note(desk)
    return told, frozenset(names)


def _adopt_regions(desk: AdoptionDesk) -> Recorded[list[Finding]]:
    """Take hold of every region of the ledger; what custody holds in its place is kept, and said."""
    held = set(desk.custody.names())
    told = []
    for region in list(desk.state.regions.values()):
        names = [custody_name(region.name, index) for index in range(len(region.segments))]
        there = [name for name in names if name in held]
        if len(there) < len(names):
            if there:
                told.append(_torn_region(region, there))
            continue
        fds = tuple(desk.custody.get(name)[0] for name in names)
        found = _segments(desk, region.store, fds)
        desk.hold_region(region.name, fds)
        if [_segment_file(each) for each in found] != [_segment_file(each) for each in region.segments]:
            told.append((yield from _other_memory(region, found)))
    return told


def _segments(desk: AdoptionDesk, store: str, fds: Sequence[int]) -> tuple[Segment, ...]:
    known = desk.stores.get(store)  # none, of a newer memconsole or of RAM that was adopted: it is a file
    return files.segments(fds) if known is None else known.segments(fds)


def _segment_file(segment: Segment) -> tuple[int, int]:
    """What a segment is in this boot, whatever its length: a release that was cut short may have emptied it."""
    return segment.inode, segment.device


def _torn_region(region: Region, there: list[str]) -> Finding:
    what = (
        f"custody holds {len(there)} of the {len(region.segments)} segments of region {region.name}: the rest is lost"
    )
    remedy = f"what is left stays in custody until memconsole release {region.name} gives it up"
    return Finding("region-torn", Severity.ERROR, region.name, what, ", ".join(there), remedy)


def _other_memory(region: Region, found: tuple[Segment, ...]) -> Recorded[Finding]:
    """Custody's word counts: what it holds under a region's name was put there as that region."""
    what = f"custody holds other memory as region {region.name} than the ledger names; custody's memory is used"
    size = sum(segment.size for segment in found)
    change = StateChange(regions=(msgspec.structs.replace(region, size=size, segments=found),))
    yield EventRecord(time.time_ns(), "adopted", region.name, what, change=change)
    evidence = f"inodes {[each.inode for each in found]} of {size} bytes; ledger: "
    evidence += f"{[each.inode for each in region.segments]} of {region.size}"
    remedy = f"check its contents (memconsole pfn {region.name}) before a guest uses it"
    return Finding("custody-other", Severity.ERROR, region.name, what, evidence, remedy)


def _unknown_regions(desk: AdoptionDesk, by_itself: Collection[str] = ()) -> Recorded[list[Finding]]:
    """Regions that custody holds and the ledger does not know: memory is never thrown away because a record is."""
    found: dict[str, set[str]] = {}
    for held in desk.custody.names():
        kind, _, rest = held.partition(":")
        if kind == "region":
            found.setdefault(rest.rpartition(":")[0], set()).add(held)
    moving = relocate.regions_on_their_way(desk)
    told = []
    for name, held_as in found.items():
        if name not in desk.state.regions and name not in moving:
            where = "its arena" if name in by_itself else "custody"
            told.append((yield from _adopt_found(desk, name, held_as, where)))
    return told


def _adopt_found(desk: AdoptionDesk, name: str, held_as: set[str], where: str) -> Recorded[Finding]:
    wanted = [custody_name(name, index) for index in range(len(held_as))]
    held = [desk.custody.get(each) for each in wanted] if held_as == set(wanted) else []
    fds = tuple(fd for fd, _ in held)
    segments: tuple[Segment, ...] = ()
    try:
        region = payloads.read(name, held[0][1] if held else b"", Region)
        segments = _segments(desk, region.store, fds)
        whole = bool(segments) and all(each.size and each.size % PAGE == 0 for each in segments)
    except BadFile:
        whole = False
    if not whole:
        for fd in fds:
            os.close(fd)
        what = f"custody holds something as region {name} that the ledger does not know and that is not a whole region"
        remedy = "nothing need be done: custody keeps it as it is; find the program that stored it there"
        return Finding("custody-unknown", Severity.WARNING, name, what, ", ".join(sorted(held_as)), remedy)
    desk.hold_region(name, fds)
    taken = msgspec.structs.replace(
        region, size=sum(each.size for each in segments), state=RegionState.RESERVED, segments=segments
    )
    left = newer.rest(held[0][1], region)
    if left is not None:
        desk.state.rests["regions", name] = left
    text = f"region {name} was in {where} and not in the ledger; the ledger has it now"
    yield EventRecord(time.time_ns(), "adopted", name, text, change=StateChange(regions=(taken,)))
    remedy = f"check its contents, then map it: memconsole map {name} GUEST"
    return Finding("region-found", Severity.WARNING, name, text, where, remedy)


# --- what was under way -----------------------------------------------------------------------------------------


def _finish_action(desk: AdoptionDesk, number: int, intent: Intent, powers: Powers) -> Recorded[list[Finding]]:
    """Carry an unfinished action through, or take it back."""
    action, work = intent.action, None
    again: list[str] = []
    told: list[Finding] = []
    try:
        if isinstance(action, FORWARD):
            work = verbs.prepare(desk, action)
            yield (yield from _forward(number, action, work))
        else:
            yield _undo_action(desk, number, intent, again, powers)
    except MemconsoleError as error:
        lasting = work.lasting if work is not None else StateChange()
        yield FailedRecord(number, time.time_ns(), error.code, str(error), lasting)
        what = f"{action.spec.title} of {intent.subject} was interrupted and cannot be finished: {error}"
        remedy = error.remedy or f"try again: {actions.cli_form(action)}"
        told.append(
            Finding("action-unfinished", Severity.WARNING, intent.subject, what, f"ledger record {number}", remedy)
        )
    else:
        if work is not None and work.after is not None:
            work.after()
    for name in again:
        told += yield from _bring_back(desk, name, powers)
    return told


def _forward(number: int, action: actions.Action, work: PreparedAction) -> Recorded[Record]:
    now = time.time_ns()
    if work.refusals:
        return FailedRecord(number, now, work.refusals[0].code, work.refusals[0].what)
    yield from steps.run(action.spec.id, work.steps)
    return DoneRecord(number, now, f"{work.text} (carried through after a restart)", work.change)


def _undo_action(desk: AdoptionDesk, number: int, intent: Intent, again: list[str], powers: Powers) -> Record:
    """Take it back; guests that are to be resumed then are added to ``again``."""
    action = intent.action
    if isinstance(action, actions.HandoffAction):
        if handoff.interrupted(desk, action):
            return _carried_on(desk, number, intent, powers)
        again += handoff.undo_handoff(desk, intent, powers)
    if isinstance(action, actions.GuestStart):
        for handle in adopt_orphans(desk, action.name):
            with contextlib.closing(handle):
                handle.kill()
        forget(desk, action.name)
    if isinstance(action, (actions.Reserve, actions.GuestStart)):
        drop_custody(desk, action.name)
        desk.stores[action.store].discard(action.name)
    if isinstance(action, actions.GuestAdopt):
        drop_unfinished(desk, intent.aims.guests, relocate.regions_on_their_way(desk))
    found = None
    if isinstance(action, actions.Move):
        found = _moved_all_the_same(desk, number, action, again)
    elif isinstance(action, actions.Map):
        found = _mapped_all_the_same(desk, number, intent)
    if found is not None:
        return found
    return FailedRecord(
        number, time.time_ns(), "CutShort", "the control process died; the steps done so far were undone"
    )


def _moved_all_the_same(desk: AdoptionDesk, number: int, action: actions.Move, again: list[str]) -> Record | None:
    """What is to be recorded of a move whose contents have arrived; a QEMU that was saved for it is to be resumed."""
    grants = desk.state.grants_of(region=action.region)
    again += [grant.guest for grant in grants if suspend_vm.is_saved(desk, grant.guest)]
    region = desk.state.regions.get(action.region)
    if region is None or region.store != action.store:
        desk.stores[action.store].drop_fresh(action.region, 0)  # custody did not have it yet
        return None
    text = f"region {region.name} is in the {region.store} store (carried through after a restart)"
    return DoneRecord(number, time.time_ns(), text, StateChange())


def _mapped_all_the_same(desk: AdoptionDesk, number: int, intent: Intent) -> Record | None:
    """What is to be recorded of a grant that its guest keeps; None where there is none."""
    for grant in intent.aims.grants:
        if grant.dma is not None:
            desk.address_spaces.unmap(grant)
            grant = msgspec.structs.replace(grant, dma=None)  # noqa: PLW2901 - it is what is left of it
        if _still_mapped(desk, grant):
            text = f"{grant.guest} maps {grant.region} as {grant.id} (found after a restart)"
            return DoneRecord(
                number,
                time.time_ns(),
                text,
                StateChange(grants=(msgspec.structs.replace(grant, state=GrantState.MAPPED),)),
            )
    return None


def _carried_on(desk: AdoptionDesk, number: int, intent: Intent, powers: Powers) -> Record:
    landing = handoff.carry_on(desk, powers)
    handoff.adopt_processes(desk, landing.change.guests)
    text = f"{intent.subject} has rehearsed a handoff (carried through after a restart)"
    return DoneRecord(number, time.time_ns(), text, landing.change)


def _still_mapped(desk: AdoptionDesk, grant: Grant) -> bool:
    """Whether a guest keeps a grant nobody was told of; its agent is asked for it as soon as it connects."""
    live, region = desk.live_guest(grant.guest), desk.state.regions.get(grant.region)
    if live is None or region is None:
        return False
    desk.connected(grant.guest)

    def is_gone(within: float) -> bool:
        time.sleep(min(within, LOOK_S))
        return not desk.region_reach(region, grant.offset // files.SEGMENT).pids

    return not Patience(live.pid, OFFER_S).lasts(is_gone)
