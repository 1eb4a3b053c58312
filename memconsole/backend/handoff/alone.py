"""A guest that a handoff left waiting, or that was set aside: started again alone, from what was saved of it."""

from __future__ import annotations

import contextlib
import os

from msgspec.structs import replace

from memconsole.backend.desk import Desk
from memconsole.backend.handoff import bootplan, devices, kept, manifest, vmm
from memconsole.backend.handoff.adopt import revive, take_hold
from memconsole.backend.handoff.bootplan import MANIFEST, RESUME, Moment
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.report import Clock
from memconsole.errors import BadFile, GuestError, MemconsoleError, NotFound
from memconsole.model import Carried, Guest, GuestKind, GuestState


def waits(desk: Desk, guest: str) -> bool:
    """Whether a guest was saved and did not come back: its state is in custody."""
    return desk.live(guest) is None and f"state:{guest}" in desk.custody.names()


def again(desk: Desk, guest: Guest) -> Guest:
    """Start one guest that waits from what was saved; who it is now. What it waited for there it waits for still.

    Raises:
        GuestError: it did not come back this time either.
        NotFound, Denied, KernelRefused, Refused: a device that its VMM is to be given cannot be had.
    """
    described, _ = kept.described(desk)
    devices.hand(desk, described, guest)
    fd = manifest.memfd("memconsole-plan", bootplan.encode(_alone(desk, guest)))
    try:
        return _start_alone(desk, guest, fd)
    finally:
        os.close(fd)


def go_on(desk: Desk, guest: str) -> None:
    """Let a guest that was started again go on, with its devices and windows as they were.

    Raises:
        GuestError: they are not; it stays paused.
    """
    live = desk.live(guest)
    if live is None or (live.kind is not GuestKind.QEMU and not desk.connected(guest)):
        return
    if live.state() is GuestState.PAUSED:
        described, _ = kept.described(desk)
        try:
            if described is not None:  # else there was no jump, or what was recorded before it is not known
                _give_back(desk, guest, described)
        except MemconsoleError:
            let_go(desk, guest)
            raise
        live.resume()


def start_alone(desk: Desk, guest: Guest, plan: int) -> Guest:
    """Start one guest by a boot plan (an fd); who it is now.

    Raises:
        GuestError: it did not come back. BadFile: what became of it cannot be read.
    """
    back = _start_alone(desk, guest, plan)
    desk.custody.drop(RESUME)
    return back


def _start_alone(desk: Desk, guest: Guest, plan: int) -> Guest:
    """The same; the record of it stays, so that whoever comes after a control process that dies now knows of it."""
    name = f"again:{guest.name}"
    try:
        desk.custody.put(name, plan)
        with contextlib.suppress(NotFound):
            desk.custody.drop(RESUME)  # it would say that all of this was done
        revive(desk, name)
    finally:
        desk.custody.drop(name)
    back = started(desk, guest)
    take_hold(desk, [back])
    return back


def started(desk: Desk, guest: Guest) -> Guest:
    """Who a guest is that was started again alone; what it was started from stays until the ledger knows.

    Raises:
        GuestError: it did not come back.
    """
    found = next(
        (each for each in bootplan.read_resume(kept.content(desk, RESUME)).guests if each.guest == guest.name), None
    )
    if found is None or found.state == "held":
        desk.custody.drop(RESUME)
        why = found.why if found is not None else "the boot plan does not know it"
        raise GuestError(f"guest {guest.name} did not come back", why, f"look into {desk.directory(guest.name)}/log")
    return replace(guest, pid=found.pid, start_ticks=found.start_ticks, state=GuestState.RUNNING)


def let_go(desk: Desk, guest: str) -> None:
    """Drop what a guest was started from, once the ledger knows who it is."""
    for name in (f"state:{guest}", RESUME):
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)


def _alone(desk: Desk, guest: Guest) -> bootplan.Plan:
    """A plan for one guest: as the boot plan has it, or by the ledger where there is none, or of another version."""
    starts: tuple[bootplan.Start, ...] = ()
    says: tuple[bootplan.Say, ...] = ()
    with contextlib.suppress(BadFile, NotFound):
        plan = bootplan.decode(kept.content(desk, MANIFEST))
        starts = tuple(each for each in plan.starts if each.guest == guest.name)
        says = tuple(each for each in plan.says if each.guest == guest.name)
    if not starts:
        grants = desk.state.grants_of(guest=guest.name)
        start, say = vmm.anew(desk, guest, grants, f"state:{guest.name}", paused=True)
        starts, says = (start,), (() if say is None else (say,))
    holds = tuple(
        bootplan.Hold(bootplan.MANIFEST_SESSION, token, name) for token, (name, _) in enumerate(starts[0].fds)
    )
    return bootplan.Plan(holds, (), starts, says, bootplan.moment())


def devices_wait(desk: Desk, guest: str) -> bool:
    """Whether devices of a guest are not back since a handoff, and its grants still mean them."""
    described, _ = kept.described(desk)
    return described is not None and bool(devices.waits(desk, described, guest))


def give_back(desk: Desk, guest: str) -> None:
    """Try again to give a guest its devices and windows as they were.

    Raises:
        GuestError: they still are not; it stays paused. BadFile: the manifest cannot be read.
    """
    _give_back(desk, guest, manifest.read(kept.content(desk, MANIFEST)))


def _give_back(desk: Desk, guest: str, described: Manifest) -> None:
    now = bootplan.moment()
    clock = Clock(described.began, [(described.began, described.written), (now, now)])
    returned = devices.back(desk, described, clock, guest)
    devices.settle(desk, described)
    made = desk.handoff
    if made is not None:
        guests = made.guests
        if not returned.findings:
            stopped = {each.guest.name: each.at for each in described.guests}
            guests = tuple(_come(desk, each, clock, stopped) if each.name == guest else each for each in guests)
        kept.store(desk, replace(made, guests=guests, devices=kept.newest(made.devices, returned.devices)))
    if returned.findings:
        first = returned.findings[0]
        raise GuestError(f"guest {guest} stays paused", first.what, first.remedy)


def _come(desk: Desk, guest: Carried, clock: Clock, stopped: dict[str, Moment]) -> Carried:
    """A guest of the report that is back later than the others."""
    live = desk.live(guest.name)
    back = replace(guest, back=True, why="", pid=live.pid if live is not None else guest.pid)
    if back.blackout_ns is None and guest.name in stopped:
        back = replace(back, blackout_ns=clock.between(stopped[guest.name], bootplan.moment()), by="its VMM")
    return back
