"""``map`` and ``revoke``: the right of one guest to reach a range of a region, given and taken back.

Who may have what:

* A segment of a region has one grant at most, be it of a part and only to read (``Shared``): it is handed out as a file
  descriptor, which reaches all of its segment.
* In one guest, two grants do not overlap in guest physical addresses (``Overlap``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import msgspec

from memconsole.actions import GuestStart, Map, Revoke
from memconsole.backend import needs
from memconsole.backend.ledger.state import Recorded, StateChange
from memconsole.backend.revoke import Ladder, Revoking, suspend_vm
from memconsole.backend.stores import adopted, files
from memconsole.backend.verbs import dma, user_files
from memconsole.backend.verbs.common import is_vm, known_guest, known_region
from memconsole.backend.work import PreparedAction
from memconsole.errors import Gone, GuestError
from memconsole.model import (
    Access,
    Grant,
    GrantState,
    Guest,
    GuestKind,
    GuestState,
    Region,
    Rung,
)
from memconsole.units import exact_size, format_address, format_duration, format_size

OFFER_S = 5.0
"""Seconds a guest has to map what it is offered."""
GPA_LIMIT = 1 << 52
RUNGS = {
    Rung.ASK: "ask its guest to unmap it (a QEMU: to be saved and end)",
    Rung.PROTECT: "protect its mapping through its userfaultfd",
    Rung.COPY: "move the contents to fresh frames and empty the old file",
    Rung.KILL: "kill the processes that still reach it",
}


class GrantOffers(needs.LiveGuests, needs.GrantOffering, needs.FaultServing, Protocol):
    """What handing a grant to its guest needs."""


class GrantMaking(GrantOffers, needs.RegionFds, needs.DeviceReaching, Protocol):
    """What ``map`` needs."""


class GrantTaking(Revoking, needs.DeviceReaching, Protocol):
    """What ``revoke`` needs."""


def map(desk: GrantMaking, action: Map) -> PreparedAction:
    """Grant a range: ``offer`` hands it to the guest, which maps it now or when its agent connects."""
    work = PreparedAction("", "")
    region = known_region(work, desk, action.region)
    again = user_files.owner_again(desk.state, region, action.guest) if region is not None else None
    guest = again or known_guest(work, desk, action.guest)
    if region is None or guest is None:
        return work
    if again is not None:
        work.change = msgspec.structs.replace(work.change, guests=(again,))
    length = region.size - action.offset if action.length is None else action.length
    _in_range(work, region, action.offset, length, action.gpa)
    back = guest.kind is GuestKind.QEMU and suspend_vm.is_saved(desk, guest.name)
    if not back and guest.service is None:
        _alive(work, desk, guest)
    _access(work, desk, region, action.access)
    _own_memory(work, region)
    if guest.kind in {GuestKind.QEMU, GuestKind.FOREIGN} and not back:
        work.refuse(
            "FixedRam",
            f"guest {guest.name} takes no more memory",
            "QEMU gets its RAM when it starts, and has no memslot for more",
            "start it again with the memory it needs",
        )
    grant = Grant(
        id=f"g{desk.state.next_grant}",
        region=region.name,
        guest=guest.name,
        offset=action.offset,
        length=length,
        access=action.access,
        state=GrantState.OFFERED,
        gpa=action.gpa,
        dma=action.dma,
        created_ns=time.time_ns(),
        lazy=action.lazy,
    )
    _apart(work, desk, grant)
    _alone(work, desk, grant)
    work.refusals += desk.store_of(region.name).grant_refusals(grant)
    if grant.dma is not None:
        dma.refuse_device(work, desk, grant, grant.dma)
    if back:
        suspend_vm.grant_saved_guest(work, desk, grant, region)
    if work.refusals or back:
        return work
    if grant.dma is not None:
        dma.attach_device(work, desk, grant, grant.dma)
    offer_grant(work, desk, grant)
    if grant.dma is not None:
        dma.reach_grant(work, desk, grant, grant.dma)
    return work


def offer_grant(work: PreparedAction, desk: GrantOffers, grant: Grant) -> None:
    """The step that hands a grant to its guest; ``work.change`` gets the grant as the guest took it."""
    work.subject = grant.id
    work.aims = msgspec.structs.replace(work.aims, grants=(grant,))

    def do() -> None:
        live = desk.live_guest(grant.guest)
        fresh = (each for each in work.change.guests if each.name == grant.guest)
        guest = desk.state.guests.get(grant.guest) or next(fresh, None)
        if guest is not None and guest.service is not None and (live is None or live.state() is GuestState.GONE):
            when = "" if guest.is_user else " when it is started"
            work.text = f"{grant.guest} may map {grant.region} ({grant.access}) as {grant.id}{when}"
            work.change = msgspec.structs.replace(work.change, grants=(grant,))
            return
        if live is None:
            raise Gone(f"guest {grant.guest} is gone", "its process ended", f"stop guest {grant.guest}")
        with desk.grant_offer(grant) as offered:
            mapped = live.offer(offered, OFFER_S)
        if mapped and grant.lazy and not desk.userfaults.has_uffd(grant.id):
            live.request_unmap(grant.id, OFFER_S)
            why = "its kernel or its agent has no userfaultfd for this mapping"
            raise GuestError(f"guest {grant.guest} cannot map lazily", why, "leave --lazy out", code="NotLazy")
        made = msgspec.structs.replace(grant, state=GrantState.MAPPED if mapped else GrantState.OFFERED)
        work.change = msgspec.structs.replace(work.change, grants=(made,))
        if not work.text:
            how = "maps" if mapped else "may map"
            part = f"{format_size(grant.length)} of {grant.region}"
            work.text = f"{grant.guest} {how} {part} ({grant.access}) as {grant.id}"

    def undo() -> None:
        live = desk.live_guest(grant.guest)
        if live is not None:
            live.request_unmap(grant.id, OFFER_S)

    at = "" if grant.gpa is None else f" at gpa {format_address(grant.gpa)}"
    at += ", its pages filled when first touched," if grant.lazy else ""
    region = desk.state.regions.get(grant.region)
    size = region.segments[_segment(grant)].size if region is not None else grant.length
    reaches = f"; its file descriptor reaches all {format_size(size)} of the segment" if grant.length < size else ""
    work.step(
        "offer",
        f"offer {format_size(grant.length)} of {grant.region} from {format_address(grant.offset)}, {grant.access},"
        f" to {grant.guest}{at} as {grant.id}{reaches}",
        do,
        undo,
        "ask the guest to unmap it",
    )


# --- what map refuses -------------------------------------------------------------------------------------------


def _own_memory(work: PreparedAction, region: Region) -> None:
    if region.store == adopted.NAME:
        what = f"region {region.name} cannot be mapped into another guest"
        why = "it is RAM that another program made, and could not be taken back"
        work.refuse("Adopted", what, why, f"memconsole copy {region.name} FILE has its contents")


def _in_range(work: PreparedAction, region: Region, offset: int, length: int, gpa: int | None) -> None:
    page = region.page_size
    remedy = f"it has {exact_size(region.size)} in pages of {exact_size(page)}"
    if offset < 0 or length <= 0 or offset + length > region.size:
        what = f"{length} bytes from {offset} are not in region {region.name}"
        work.refuse("BadRange", what, f"it ends at {region.size}", remedy)
    elif offset % page or length % page:
        work.refuse("BadRange", f"{length} bytes from {offset} are not whole pages", "a grant is made of pages", remedy)
    elif offset // files.SEGMENT != (offset + length - 1) // files.SEGMENT:
        size = exact_size(files.SEGMENT)
        why = f"a region is made of segments of {size}, and a grant lies in one"
        work.refuse("BadRange", f"{length} bytes from {offset} lie in two segments", why, "make a grant for each")
    if gpa is not None and (gpa < 0 or gpa % page or gpa + max(length, 0) > GPA_LIMIT):
        why = f"it is a multiple of {exact_size(page)} below {exact_size(GPA_LIMIT)}"
        work.refuse("BadRange", f"gpa {gpa:#x} is out of range", why, "choose another --gpa")


def _alive(work: PreparedAction, desk: needs.LiveGuests, guest: Guest) -> None:
    live = desk.live_guest(guest.name)
    with contextlib.suppress(GuestError):
        if live is None or live.state() is GuestState.GONE:
            work.refuse("GuestGone", f"guest {guest.name} is gone", "its process ended", f"stop guest {guest.name}")


def _access(work: PreparedAction, desk: needs.RegionFds, region: Region, access: Access) -> None:
    if not desk.holds_region(region.name):
        work.refuse(
            "RegionLost",
            f"the memory of region {region.name} is lost",
            "custody does not hold it",
            "memconsole audit says what can still be kept",
        )
    elif access is Access.RW:
        sealed = {"write", "future_write"} & {name for fd in desk.fds(region.name) for name in files.seals(fd)}
        if sealed:
            work.refuse(
                "AccessTooWide",
                f"region {region.name} cannot be written to",
                f"its memfd is sealed: {', '.join(sorted(sealed))}",
                "map it with --access ro",
            )


def _apart(work: PreparedAction, desk: needs.LedgerState, grant: Grant) -> None:
    for other in desk.state.grants.values():
        if (other.region, _segment(other)) == (grant.region, _segment(grant)):
            work.refuse(
                "Shared",
                f"{format_size(other.length)} of it is granted to {other.guest} already ({other.id})",
                "a file descriptor reaches all of its segment",
                f"reserve a region of its own, or memconsole revoke {other.id} first",
            )
        if (
            other.guest == grant.guest
            and grant.gpa is not None
            and other.gpa is not None
            and grant.gpa < other.gpa + other.length
            and other.gpa < grant.gpa + grant.length
        ):
            work.refuse(
                "Overlap",
                f"{grant.guest} has {other.id} in the same guest physical addresses",
                f"{other.id} is {format_size(other.length)} of {other.region} from {format_address(other.offset)}"
                f" at gpa {format_address(other.gpa)}",
                "choose another --gpa",
            )


def _alone(work: PreparedAction, desk: needs.RegionFds, grant: Grant) -> None:
    """A process that memconsole did not start gets no file that reaches what another guest was granted, or more."""
    guest = desk.state.guests.get(grant.guest)
    if guest is not None and not is_vm(guest) and desk.store_of(grant.region).VMS_ONLY:
        what = f"guest {grant.guest} cannot map region {grant.region}"
        why = "a descriptor of it reaches all of this host's memory, and the guest is no VM of this service"
        work.refuse("NoVm", what, why, "give it a region of another store")
        return
    for why in shared_device(desk, grant):
        remedy = "give it a region of another store, or of an arena of its own"
        work.refuse("Shared", f"guest {grant.guest} cannot map region {grant.region}", why, remedy)


def shared_device(desk: needs.RegionFds, grant: Grant) -> Iterator[str]:
    """What speaks against a grant of a piece of a device; its file reaches all other pieces, and cannot be cut."""
    region = desk.state.regions.get(grant.region)
    wholes = {each.whole for each in region.segments if each.whole} if region is not None else set()
    for other in desk.state.grants.values():
        theirs = desk.state.regions.get(other.region)
        if theirs is None or other.region == grant.region or wholes.isdisjoint(each.whole for each in theirs.segments):
            continue
        strangers = [
            guest.name
            for name in (grant.guest, other.guest)
            if (guest := desk.state.guests.get(name)) is not None and not is_vm(guest)
        ]
        if strangers:
            yield (
                f"a descriptor of it reaches all of its device, {other.region} of {other.guest} ({other.id}) too, and"
                f" {strangers[0]} is no VM of this service"
            )


def refuse_beside_strangers(work: PreparedAction, desk: needs.Stored, action: GuestStart) -> None:
    """Refuse RAM of a store in which a process has a file that would reach it, too."""
    if desk.stores[action.store].CUTS:
        return
    for grant in desk.state.grants.values():
        guest, region = desk.state.guests.get(grant.guest), desk.state.regions.get(grant.region)
        if region is not None and region.store == action.store and guest is not None and not is_vm(guest):
            what = f"guest {action.name} cannot have its RAM in the {action.store} store"
            why = f"{guest.name}, which is no VM of this service, has a descriptor of it ({grant.id})"
            work.refuse("Shared", what, why, f"memconsole revoke {grant.id}, or leave --store out")
            return


def _segment(grant: Grant) -> int:
    return grant.offset // files.SEGMENT


# --- revoke -----------------------------------------------------------------------------------------------------


def revoke(desk: GrantTaking, action: Revoke) -> PreparedAction:
    """Take a grant back: from devices first; then ``cut`` climbs the ladder (:mod:`memconsole.backend.revoke`)."""
    work = PreparedAction(action.grant, "")
    grant = desk.state.grants.get(action.grant)
    if grant is None:
        known = ", ".join(sorted(desk.state.grants)) or "none"
        work.refuse(
            "NoSuchGrant", f"there is no grant {action.grant}", f"grants: {known}", "memconsole grants lists them"
        )
        return work
    if not action.within > 0:
        work.refuse(
            "BadDeadline",
            f"a rung cannot take {action.within} seconds",
            "a rung needs more time than that",
            "write --within 5",
        )
        return work
    if desk.state.regions[grant.region].store == adopted.NAME:
        _end_adopted(work, desk, grant)
        return work
    ladder = Ladder(desk, grant, action.within, action.at_most)

    def cut() -> Recorded[None]:
        report = yield from ladder.climb()
        work.revoke = report
        work.change = ladder.change()
        took = format_duration(report.took_ns)
        work.text = f"{grant.id} ({grant.region} to {grant.guest}) is {report.outcome} after {report.rung}, in {took}"

    part = f"{format_size(grant.length)} of {grant.region}"
    dma.cut_grants(work, desk, [grant])
    work.step("cut", f"take {part} back from {grant.guest}: {_rungs(desk, grant, action.at_most)}", cut)
    return work


def _rungs(desk: GrantTaking, grant: Grant, at_most: Rung) -> str:
    """What is tried, in words; of a file that cannot be cut nothing takes the pages but the end of who has it."""
    cuts = desk.store_of(grant.region).CUTS
    order = list(RUNGS)[: list(RUNGS).index(at_most) + 1]
    said = ", else ".join(RUNGS[rung] for rung in order if cuts or rung in {Rung.ASK, Rung.KILL})
    alone = "" if cuts else "; no other rung takes a mapping of this store away"
    return f"{said}; the contents stay{alone}"


def _end_adopted(work: PreparedAction, desk: GrantTaking, grant: Grant) -> None:
    """The grant of RAM that another program made: it ends when nobody maps the RAM any more, and not before."""
    region = desk.state.regions[grant.region]
    if desk.holds_region(region.name) and (pids := desk.region_reach(region).pids):
        who = ", ".join(str(pid) for pid in pids)
        what = f"{grant.id} cannot be taken back: {grant.region} is RAM that {grant.guest} made itself"
        why = f"process {who} has it; to take its pages would end the guest"
        remedy = f"memconsole guest let-go {grant.guest}, or shut the guest down first"
        work.refuse("Adopted", what, why, remedy)
        return
    work.text = f"{grant.id} ({grant.region} to {grant.guest}) has ended: no process has that RAM any more"
    work.step("end", f"end {grant.id}: no process maps {grant.region}; its contents stay", lambda: None)
    work.change = StateChange(without_grants=(grant.id,))
