"""A guest that a handoff left waiting, or that was set aside: started again alone, from what was saved of it."""

from __future__ import annotations

import contextlib
import os

from msgspec.structs import replace

from memconsole.backend import needs, steplog
from memconsole.backend.handoff import bootplan, devices, manifest, save_restore, stored
from memconsole.backend.handoff.bootplan import MANIFEST, RESUME, ClockReading
from memconsole.backend.handoff.facets import Handover
from memconsole.backend.handoff.landing import adopt_processes
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.powers import HOST, Powers
from memconsole.backend.handoff.report import Clock
from memconsole.errors import BadFile, GuestError, MemconsoleError, NotFound
from memconsole.model import Guest, GuestKind, GuestResult, GuestState, HandoffReport


def is_saved(desk: Handover, guest: str) -> bool:
    """Whether a guest was saved and did not come back: its state is in custody."""
    return desk.live_guest(guest) is None and f"state:{guest}" in desk.custody.names()


def restart_saved_guest(desk: Handover, guest: Guest, powers: Powers = HOST) -> Guest:
    """Start one guest that waits from what was saved; who it is now. What it waited for there it waits for still.

    Raises:
        GuestError: it did not come back this time either.
        NotFound, Denied, KernelRefused, Refused: a device that its VMM is to be given cannot be had.
    """
    described, _ = stored.stored_manifest(desk)
    devices.hand_devices(desk, described, guest)
    fd = manifest.memfd("memconsole-plan", bootplan.encode(_boot_plan(desk, guest)))
    try:
        return _start_alone(desk, guest, fd, powers)
    finally:
        os.close(fd)


def resume_guest(desk: Handover, guest: str) -> None:
    """Let a guest that was started again go on, with its devices and windows as they were.

    Raises:
        GuestError: they are not; it stays paused.
    """
    live = desk.live_guest(guest)
    if live is None or (live.kind is not GuestKind.QEMU and not desk.connected(guest)):
        return
    if live.state() is GuestState.PAUSED:
        described, _ = stored.stored_manifest(desk)
        try:
            if described is not None:  # else there was no jump, or what was recorded before it is not known
                _reattach_devices(desk, guest, described)
        except MemconsoleError:
            drop_saved_state(desk, guest)
            raise
        live.resume()


def start_alone(desk: Handover, guest: Guest, plan: int, powers: Powers = HOST) -> Guest:
    """Start one guest by a boot plan (an fd); who it is now.

    Raises:
        GuestError: it did not come back. BadFile: what became of it cannot be read.
    """
    back = _start_alone(desk, guest, plan, powers)
    desk.custody.drop(RESUME)
    return back


def _start_alone(desk: Handover, guest: Guest, plan: int, powers: Powers) -> Guest:
    """The same; the record of it stays, so that whoever comes after a control process that dies now knows of it."""
    name = f"again:{guest.name}"
    try:
        desk.custody.put(name, plan)
        with contextlib.suppress(NotFound):
            desk.custody.drop(RESUME)  # it would say that all of this was done
        powers.revive(desk.runtime_dir, name)
    finally:
        desk.custody.drop(name)
    back = restarted_guest(desk, guest)
    adopt_processes(desk, [back])
    return back


def restarted_guest(desk: Handover, guest: Guest) -> Guest:
    """Who a guest is that was started again alone; what it was started from stays until the ledger knows.

    Raises:
        GuestError: it did not come back.
    """
    found = next(
        (each for each in bootplan.read_resume(stored.stored_content(desk, RESUME)).guests if each.guest == guest.name),
        None,
    )
    if found is None or found.state == "held":
        desk.custody.drop(RESUME)
        why = found.why if found is not None else "the boot plan has no entry for it"
        raise GuestError(f"guest {guest.name} did not come back", why, f"see {desk.directory(guest.name)}/log")
    return replace(guest, pid=found.pid, start_ticks=found.start_ticks, state=GuestState.RUNNING, ended="")


def drop_saved_state(desk: needs.InCustody, guest: str) -> None:
    """Drop what a guest was started from, once the ledger knows who it is."""
    for name in (f"state:{guest}", RESUME):
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)


def _boot_plan(desk: Handover, guest: Guest) -> bootplan.BootPlan:
    """A plan for one guest: as the boot plan has it, or by the ledger where there is none, or of another version."""
    starts: tuple[bootplan.Start, ...] = ()
    says: tuple[bootplan.MonitorLines, ...] = ()
    with steplog.suppressed(f"the boot plan is read for {guest.name}", BadFile, NotFound):
        plan = bootplan.decode(stored.stored_content(desk, MANIFEST))
        starts = tuple(each for each in plan.starts if each.guest == guest.name)
        says = tuple(each for each in plan.says if each.guest == guest.name)
    if not starts:
        grants = desk.state.grants_of(guest=guest.name)
        start, say = save_restore.restart_of_ledger(desk, guest, grants, f"state:{guest.name}", paused=True)
        starts, says = (start,), (() if say is None else (say,))
    holds = tuple(
        bootplan.Hold(bootplan.MANIFEST_SESSION, token, name) for token, (name, _) in enumerate(starts[0].fds)
    )
    return bootplan.BootPlan(holds, (), starts, says, bootplan.moment())


def awaits_devices(desk: Handover, guest: str) -> bool:
    """Whether devices of a guest are not back since a handoff, and its grants still mean them."""
    described, _ = stored.stored_manifest(desk)
    return described is not None and bool(devices.missing_devices(desk, described, guest))


def reattach_devices(desk: Handover, guest: str) -> None:
    """Try again to give a guest its devices and windows as they were.

    Raises:
        GuestError: they still are not; it stays paused. BadFile: the manifest cannot be read.
    """
    _reattach_devices(desk, guest, manifest.read(stored.stored_content(desk, MANIFEST)))


def _reattach_devices(desk: Handover, guest: str, described: Manifest) -> None:
    now = bootplan.moment()
    clock = Clock(described.began, [(described.began, described.written), (now, now)])
    returned = devices.rebuild_devices(desk, described, clock, guest)
    devices.reconcile(desk, described)
    stopped = {each.guest.name: each.at for each in described.guests}

    def settled(made: HandoffReport) -> HandoffReport:
        guests = made.guests
        if not returned.findings:
            guests = tuple(_late_result(desk, each, clock, stopped) if each.name == guest else each for each in guests)
        return replace(made, guests=guests, devices=stored.newest_devices(made.devices, returned.devices))

    stored.amend_report(desk, settled)
    if returned.findings:
        first = returned.findings[0]
        raise GuestError(f"guest {guest} stays paused", first.observed, first.remedy)


def _late_result(desk: Handover, guest: GuestResult, clock: Clock, stopped: dict[str, ClockReading]) -> GuestResult:
    """A guest of the report that is back later than the others."""
    live = desk.live_guest(guest.name)
    back = replace(guest, back=True, why="", pid=live.pid if live is not None else guest.pid)
    if back.blackout_ns is None and guest.name in stopped:
        back = replace(back, blackout_ns=clock.between(stopped[guest.name], bootplan.moment()), by="its VMM")
    return back
