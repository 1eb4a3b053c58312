"""A QEMU gives its RAM back by ending: it cannot unmap what it runs on. What it is besides its RAM is kept.

    saved    its vCPUs stand still; custody holds its state (``aside:GUEST``) and how to start it (``aside-plan:GUEST``)
    ended    it quit by itself: nobody maps the region, whose contents stay where they are

``map`` gives such a guest its region again, and ``guest resume`` starts it from what was saved, as after a handoff.
What somebody else wrote to the region meanwhile is what it finds there.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Protocol

import msgspec
from msgspec.structs import replace

from memconsole.backend import needs, steplog
from memconsole.backend.custody import payloads, suspended
from memconsole.backend.guests import commandline
from memconsole.backend.guests.base import Qemu
from memconsole.backend.handoff.facets import Handover, VmmRestarting
from memconsole.backend.handoff.powers import HOST, Powers
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import Access, Grant, GrantState, Guest, GuestState, Region


class SuspendedGuests(needs.LiveGuests, needs.InCustody, Protocol):
    """What guests that gave their RAM back are known by."""


class GuestSuspending(VmmRestarting, needs.InCustody, Protocol):
    """What a QEMU is saved with."""


def suspend_guest(desk: GuestSuspending, live: Qemu, grant: Grant, within: float) -> None:
    """Save a QEMU and have it quit.

    Raises:
        GuestError, Gone, Refused: it cannot be saved, does not answer, or does not quit in time; it goes on as it was.
    """
    from memconsole.backend.handoff import bootplan, manifest, save_restore

    if not desk.custody.resumes:
        why = f"{desk.custody.label} has custody, and a VM is started again only from the keeper"
        raise GuestError(f"guest {live.name} cannot be saved", why)
    deadline = time.monotonic() + within
    live.await_answer(within)
    if live.passes_through():
        raise GuestError(f"guest {live.name} cannot be saved", "a device is passed through to it (VFIO)")
    if live.state() is GuestState.SUSPENDED:  # QEMU 10 aborts when one that was saved so is to go on
        raise GuestError(
            f"guest {live.name} cannot be saved", "it is suspended to RAM", f"memconsole guest resume {live.name}"
        )
    if why := save_restore.why_not_savable(desk, live):
        raise GuestError(f"guest {live.name} cannot be saved", why)
    guest = desk.state.guests[live.name]
    kept = suspended.SuspendedGuest(grant.region, paused=guest.state is GuestState.PAUSED)
    try:
        # One may be saved whose state custody does not have, because a control process died: it is saved again.
        if suspended.read(desk.custody, live.name) is None or not live.is_saved():
            state = manifest.memfd(f"memconsole-state-{live.name}", b"")
            with contextlib.closing(os.fdopen(state, "rb")):
                save_restore.save(live, state, deadline - time.monotonic())
                pass_by("aside", "saved")
                payloads.put(desk.custody, f"{suspended.STATE}:{live.name}", state, kept)
        start, say = save_restore.restart_of_live(
            desk, guest, [grant], f"{suspended.STATE}:{live.name}", paused=kept.paused
        )
        holds = tuple(bootplan.Hold("aside", token, name) for token, (name, _) in enumerate(start.fds))
        plan = bootplan.BootPlan(holds, (), (start,), () if say is None else (say,), bootplan.moment())
        with contextlib.closing(os.fdopen(manifest.memfd("memconsole-plan", bootplan.encode(plan)), "rb")) as file:
            desk.custody.put(f"{suspended.PLAN}:{live.name}", file.fileno())
        pass_by("aside", "held")
        live.quit(max(0.1, deadline - time.monotonic()))
    except MemconsoleError:
        with steplog.suppressed(f"{live.name} runs on: it was not saved", MemconsoleError):
            if not kept.paused:
                live.resume()
        suspended.drop(desk.custody, live.name)
        raise


def entries_of(guest: Guest, grant: Grant) -> dict[str, bytes]:
    """What custody holds of a guest once its RAM was taken back, as payloads by name."""
    kept = suspended.SuspendedGuest(grant.region, paused=guest.state is GuestState.PAUSED)
    return {f"{suspended.STATE}:{guest.name}": msgspec.json.encode(kept), f"{suspended.PLAN}:{guest.name}": b""}


def is_saved(desk: SuspendedGuests, guest: str) -> bool:
    """Whether a guest gave its RAM back, and can be started again."""
    if not {f"{suspended.STATE}:{guest}", f"{suspended.PLAN}:{guest}"} <= set(desk.custody.names()):
        return False
    live = desk.live_guest(guest)
    return live is None or live.state() is GuestState.GONE


def suspended_entry(desk: needs.LiveGuests, guest: Guest) -> Guest:
    """A guest that waits, as the ledger has it."""
    desk.remove_guest(guest.name)
    return replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)


def grant_saved_guest(work: PreparedAction, desk: needs.InCustody, grant: Grant, region: Region) -> None:
    """``map`` to a guest that waits: the step that makes the grant, or why it cannot be."""
    kept = suspended.read(desk.custody, grant.guest)
    whole = grant.offset == 0 and grant.length == region.size
    if kept is None or grant.region != kept.region or not whole or grant.access is not Access.RW or grant.lazy:
        what = f"guest {grant.guest} waits for other memory"
        name = kept.region if kept is not None else region.name
        work.refuse("OtherRam", what, f"its RAM is all of {name}, read-write", f"memconsole map {name} {grant.guest}")
        return
    made = replace(grant, gpa=0)
    work.subject = grant.id
    work.aims = replace(work.aims, grants=(made,))
    work.text = f"{grant.guest} has {grant.region} again as {grant.id}; memconsole guest resume {grant.guest} starts it"

    def do() -> None:
        work.change = replace(work.change, grants=(made,))

    work.step("offer", f"give {grant.guest} its RAM {grant.region} again as {grant.id}", do)


def restart_saved_guest(desk: Handover, guest: Guest, powers: Powers = HOST) -> PreparedAction:
    """``guest resume`` of a guest that waits: ``again`` starts it from what was saved."""
    from memconsole.backend.handoff import restart_one

    work = PreparedAction(guest.name, f"guest {guest.name} runs")
    kept = suspended.read(desk.custody, guest.name)
    grants = [grant for grant in desk.state.grants_of(guest=guest.name) if kept and grant.region == kept.region]
    if kept is None or not grants:
        region = kept.region if kept is not None else "REGION"
        remedy = f"memconsole map {region} {guest.name}, then resume it"
        work.refuse("NoRam", f"guest {guest.name} has no RAM", "it was saved and stopped to free it", remedy)
        return work

    def do() -> None:
        plan = _plan_of(desk, guest.name, desk.state.regions[kept.region])
        try:
            back = restart_one.start_alone(desk, guest, plan, powers)
        finally:
            os.close(plan)
        suspended.drop(desk.custody, guest.name)
        if kept.paused:
            back = replace(back, state=GuestState.PAUSED)
        work.change = StateChange(guests=(back,), grants=(replace(grants[0], state=GrantState.MAPPED),))

    work.step("again", f"start {guest.name} on {kept.region} from its saved state", do)
    return work


def _plan_of(desk: needs.InCustody, guest: str, region: Region) -> int:
    """How a guest is started on its region where that is now: it may have gone to another store meanwhile."""
    from memconsole.backend.handoff import bootplan, manifest

    held, _ = desk.custody.get(f"{suspended.PLAN}:{guest}")
    with contextlib.closing(os.fdopen(held, "rb")):
        plan = bootplan.decode(os.pread(held, os.fstat(held).st_size, 0))
    start = region.segments[0].start
    starts = tuple(replace(each, words=tuple(commandline.placed(each.words, start))) for each in plan.starts)
    return manifest.memfd("memconsole-plan", bootplan.encode(plan._replace(starts=starts)))


def drop_stale_states(desk: SuspendedGuests) -> None:
    """Forget what was saved of guests that are no more, or that run."""
    for name in desk.custody.names():
        kind, _, guest = name.partition(":")
        if kind in {suspended.STATE, suspended.PLAN} and not (guest in desk.state.guests and is_saved(desk, guest)):
            suspended.drop(desk.custody, guest)
