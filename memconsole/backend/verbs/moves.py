"""``move``: a region's contents go to another store, under the same name, and its guests keep their grants.

    ask       guests with an agent unmap it                                     undo: it is offered again
    suspend   a QEMU whose RAM it is is saved and ends                          it is resumed in any case
    move      copied, compared by digest, meant by the ledger, the old emptied  (:mod:`memconsole.backend.revoke.move`)
    offer     guests that were asked are offered it again

Nobody reaches it while it is copied: who does and cannot be asked refuses the move by name.
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple, Protocol

import msgspec

from memconsole.actions import GuestResume, Move
from memconsole.backend import needs
from memconsole.backend.guests.base import GuestDriver, Qemu, is_qemu
from memconsole.backend.ledger.state import Recorded
from memconsole.backend.revoke import Revoking, move, suspend_vm
from memconsole.backend.stores import adopted, base, memfd
from memconsole.backend.stores.base import Store
from memconsole.backend.verbs.common import known_region
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import Grant, GrantState, GuestKind, GuestState, Region, RevokeOutcome
from memconsole.units import PAGE, format_duration, format_size

_LOOK_S = 0.02


class RegionMoving(Revoking, needs.OwnRegionFds, needs.GrantOffering, Protocol):
    """What ``move`` needs."""


class _Holder(NamedTuple):
    """A guest that reaches the region and can give it back."""

    grant: Grant
    live: GuestDriver


def move_region(desk: RegionMoving, action: Move) -> PreparedAction:
    """Have a region live in another store: ``ask``, ``suspend``, ``move``, ``offer``, as far as there is who to ask."""
    work = PreparedAction(action.region, "")
    region = known_region(work, desk, action.region)
    if region is None:
        return work
    target = _target(work, desk, region, action)
    if target is None:
        return work
    grants = desk.state.grants_of(region=region.name)
    _takes_grants(work, region, target, grants)
    holders = [each for grant in grants if (each := _holder(desk, grant)) is not None]
    if not work.refusals:
        _others(work, desk, region, holders)
    if work.refusals:
        return work
    agents = [each for each in holders if not is_qemu(each.live)]
    for each in agents:
        _ask(work, desk, each, action.within)
    for each in holders:
        if is_qemu(each.live):
            _suspend(work, desk, each.grant, each.live, action.within)
    _move(work, desk, region, target, action)
    if agents:
        who = ", ".join(each.grant.guest for each in agents)
        work.step("offer", f"offer {region.name} to {who} again", partial(_offer, work, desk, agents, action.within))
    return work


# --- what it refuses --------------------------------------------------------------------------------------------


def _target(work: PreparedAction, desk: RegionMoving, region: Region, action: Move) -> Store | None:
    what = f"region {region.name} cannot be moved to the {action.store} store"
    target = desk.stores.get(action.store)
    if target is None:
        work.refuse(
            "NoSuchStore", f"there is no store {action.store}", f"stores: {', '.join(desk.stores)}", "choose one"
        )
    elif region.store == action.store:
        why = f"its store is {action.store} already"
        work.refuse("SameStore", what, why, "choose another store")
    elif region.store == adopted.NAME:
        why = "it is RAM that another program made and keeps"
        work.refuse("Adopted", what, why, f"memconsole copy {region.name} FILE has its contents")
    elif not desk.holds_region(region.name):
        why = "its memory is lost: custody does not hold it"
        work.refuse("RegionLost", what, why, "memconsole audit says what can still be kept")
    elif not target.CUTS:
        why = "who has a descriptor of another region there could reach this one, and it cannot be taken away"
        work.refuse("NoCopy", what, why, f"memconsole copy {region.name} FILE has its contents")
    elif len(region.segments) != 1:
        why = f"it is made of {len(region.segments)} segments, and a move has one"
        work.refuse("TooLarge", what, why, "reserve regions of 512G at most for what is to be moved")
    else:
        for each in target.reserve_refusals(region.size, PAGE, None, promised=desk.promised_bytes(), root=desk.root):
            remedy = each.remedy if each.code != "BadSize" else "reserve one of a size that this store has, and copy it"
            work.refuse(each.code, what, f"{each.what}: {each.why}", remedy)
        if not desk.store_of(region.name).CUTS:
            _copied_first(work, desk, region, what)
        return target
    return None


def _copied_first(work: PreparedAction, desk: RegionMoving, region: Region, what: str) -> None:
    """Refuse where there is no memory for the copy by which a device is read."""
    ordinary = base.named(desk.stores, memfd.NAME)
    for each in ordinary.reserve_refusals(region.size, PAGE, None, promised=desk.promised_bytes(), root=desk.root):
        if not any(refusal.code == each.code for refusal in work.refusals):
            work.refuse(each.code, what, f"it is read from a copy in ordinary memory, and {each.why}", each.remedy)


def _takes_grants(work: PreparedAction, region: Region, target: Store, grants: list[Grant]) -> None:
    for grant in grants:
        for each in target.grant_refusals(grant):
            what = f"region {region.name} cannot be moved to the {target.NAME} store: {grant.id} is granted so"
            work.refuse(each.code, what, f"{each.what}: {each.why}", f"memconsole revoke {grant.id}, then move it")
        if grant.dma is not None and not any(each.code == "NoDma" for each in work.refusals):
            what = f"region {region.name} cannot be moved: device {grant.dma} reaches it"
            work.refuse(
                "Pinned", what, "what a device reaches is pinned", f"memconsole revoke {grant.id}, then move it"
            )


def _holder(desk: RegionMoving, grant: Grant) -> _Holder | None:
    """The guest of a grant, where it can be asked to give it back and has it again afterwards."""
    live = desk.live_guest(grant.guest)
    if live is None:
        return None
    if live.kind is GuestKind.QEMU:
        gone = live.state() is GuestState.GONE
        return _Holder(grant, live) if is_qemu(live) and grant.id == live.ram and not gone else None
    return _Holder(grant, live) if desk.connected(grant.guest, patient=False) else None


def _others(work: PreparedAction, desk: RegionMoving, region: Region, holders: list[_Holder]) -> None:
    """Refuse while somebody reaches it who cannot be asked."""
    askable = {each.live.pid for each in holders}
    reach = desk.region_reach(region)
    pids = sorted(set(reach.pids) - askable)
    if not pids:
        return
    owners = {guest.pid: guest for guest in desk.state.guests.values() if guest.pid is not None}
    guest = next((owners[pid] for pid in pids if pid in owners), None)
    remedy = f"have process {pids[0]} unmap it"
    if guest is not None and guest.service is not None:
        remedy = f"end the service (systemctl stop, or {guest.service.save_signal}), move it, then"
        remedy += f" memconsole guest resume {guest.name}: its grant stays"
    elif guest is not None:
        remedy = f"have {guest.name} unmap it, or memconsole revoke {desk.state.grants_of(guest=guest.name)[0].id}"
        remedy += f"; map it again afterwards: memconsole map {region.name} {guest.name}"
    work.refuse(
        "StillMapped",
        f"region {region.name} cannot be moved while it is used",
        f"processes {', '.join(map(str, pids))} reach it and have no agent to give it back",
        remedy,
    )


# --- steps ------------------------------------------------------------------------------------------------------


def _ask(work: PreparedAction, desk: RegionMoving, holder: _Holder, within: float) -> None:
    grant = holder.grant

    def do() -> None:
        if not holder.live.request_unmap(grant.id, within):
            why = "its agent says that it cannot unmap it"
            raise GuestError(f"guest {grant.guest} does not give {grant.region} back", why, "see its log")

    def undo() -> None:
        _offer_one(desk, holder, within)

    work.step(
        f"ask-{grant.id}",
        f"ask {grant.guest} to unmap {grant.region} ({grant.id}); it runs on without it",
        do,
        undo,
        "offer it again",
    )


def _suspend(work: PreparedAction, desk: RegionMoving, grant: Grant, live: Qemu, within: float) -> None:
    name = grant.guest
    work.note = f"{name} is started again from its saved state afterwards, whether or not the region was moved"

    def do() -> None:
        guest = desk.state.guests[name]
        suspend_vm.suspend_guest(desk, live, grant, within)
        entry = suspend_vm.suspended_entry(desk, guest)
        work.lasting = msgspec.structs.replace(work.lasting, guests=(entry,))
        work.change = msgspec.structs.replace(work.change, guests=(entry,))
        work.then.append(GuestResume(name))

    work.step("suspend", f"save {name} and have it end: it cannot unmap what it runs on", do)


def _move(work: PreparedAction, desk: RegionMoving, region: Region, target: Store, action: Move) -> None:
    size = format_size(region.size)

    def do() -> Recorded[None]:
        began = time.monotonic_ns()
        _nobody_reaches(desk, region, action.within)
        moved = yield from move.move_region(desk, region, target, PAGE)
        took = format_duration(time.monotonic_ns() - began)
        work.text = (
            f"region {region.name} is in the {target.NAME} store: {size} copied in {took}, digest {moved.digest}"
        )
        if moved.end.outcome is RevokeOutcome.QUARANTINED:
            work.text += f"; {moved.end.note}: memconsole audit names them"

    work.step(
        "move",
        f"copy {size} from the {region.store} store to the {target.NAME} store, with a digest of the contents before"
        f" and after, then free the old memory: {size} more are needed until then; the contents are read three times",
        do,
    )


def _nobody_reaches(desk: RegionMoving, region: Region, within: float) -> None:
    """Bar the region's files on the mount, and see that nobody has it; those who have just unmapped it may linger."""
    deadline = time.monotonic() + within
    mount = desk.mount
    grants = desk.state.grants_of(region=region.name)
    for grant in grants:
        if mount is not None:
            mount.block_access(grant)
    while (pids := desk.region_reach(region).pids) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    opened = next(filter(None, (mount.why_open(grant) for grant in grants)), "") if mount is not None else ""
    if pids or opened:
        why = f"processes {', '.join(map(str, pids))} reach it" if pids else opened
        what = f"region {region.name} cannot be moved while it is used"
        raise GuestError(what, why, "have them unmap and close it, and try again", code="StillMapped")


def _offer(work: PreparedAction, desk: RegionMoving, holders: list[_Holder], within: float) -> None:
    """Guests that do not map it again keep their grants: the region has been moved, and is whole."""
    made = []
    for each in holders:
        try:
            mapped = _offer_one(desk, each, within)
        except MemconsoleError as error:
            mapped = False
            work.text += f"; {each.grant.guest} did not map it again: {error}"
        state = GrantState.MAPPED if mapped else GrantState.OFFERED
        made.append(msgspec.structs.replace(each.grant, state=state))
    work.change = msgspec.structs.replace(work.change, grants=tuple(made))


def _offer_one(desk: RegionMoving, holder: _Holder, within: float) -> bool:
    with desk.grant_offer(holder.grant) as offered:
        return holder.live.offer(offered, within)
