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
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from memconsole.backend.desk import Desk
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.state import Change
from memconsole.backend.verbs.work import Work
from memconsole.errors import GuestError, MemconsoleError, NotFound
from memconsole.model import Access, Finding, Grant, GrantState, Guest, GuestState, Region, Severity, Value

if TYPE_CHECKING:
    from memconsole.backend.guests.qemu import QemuGuest

_KIND, _PLAN = "aside", "aside-plan"


class Aside(Value, frozen=True):
    """What a state in custody is of: the region that is the guest's RAM, and whether it was paused before."""

    region: str
    paused: bool


def ask(desk: Desk, live: QemuGuest, grant: Grant, within: float) -> None:
    """Save a QEMU and have it quit.

    Raises:
        GuestError, Gone, Refused: it cannot be saved, does not answer, or does not quit in time; it goes on as it was.
    """
    from memconsole.backend.handoff import bootplan, manifest, vmm

    if not desk.custody.resumes:
        why = f"its state would be with {desk.custody.label}, and only from the keeper it is started again"
        raise GuestError(f"guest {live.name} cannot be saved", why)
    deadline = time.monotonic() + within
    live.await_answer(within)
    if live.passes_through():
        raise GuestError(f"guest {live.name} cannot be saved", "a device is passed through to it (VFIO)")
    if live.state() is GuestState.SUSPENDED:  # QEMU 10 aborts when one that was saved so is to go on
        raise GuestError(f"guest {live.name} cannot be saved", "it is suspended to RAM", f"guest resume {live.name}")
    if why := vmm.incapable(desk, live):
        raise GuestError(f"guest {live.name} cannot be saved", why)
    guest = desk.state.guests[live.name]
    kept = Aside(grant.region, paused=guest.state is GuestState.PAUSED)
    try:
        # One may be saved whose state custody does not have, because a control process died: it is saved again.
        if _kept(desk, live.name) is None or not live.is_saved():
            state = manifest.memfd(f"memconsole-state-{live.name}", b"")
            with contextlib.closing(os.fdopen(state, "rb")):
                vmm.save(live, state, deadline - time.monotonic())
                pass_by("aside", "saved")
                desk.custody.put(f"{_KIND}:{live.name}", state, msgspec.json.encode(kept))
        start, say = vmm.revival(desk, guest, [grant], f"{_KIND}:{live.name}", paused=kept.paused)
        holds = tuple(bootplan.Hold("aside", token, name) for token, (name, _) in enumerate(start.fds))
        plan = bootplan.Plan(holds, (), (start,), () if say is None else (say,), bootplan.moment())
        with contextlib.closing(os.fdopen(manifest.memfd("memconsole-plan", bootplan.encode(plan)), "rb")) as file:
            desk.custody.put(f"{_PLAN}:{live.name}", file.fileno())
        pass_by("aside", "held")
        live.quit(max(0.1, deadline - time.monotonic()))
    except MemconsoleError:
        with contextlib.suppress(MemconsoleError):
            if not kept.paused:
                live.resume()
        drop(desk, live.name)
        raise


def waits(desk: Desk, guest: str) -> bool:
    """Whether a guest gave its RAM back, and can be started again."""
    if not {f"{_KIND}:{guest}", f"{_PLAN}:{guest}"} <= set(desk.custody.names()):
        return False
    live = desk.live(guest)
    return live is None or live.state() is GuestState.GONE


def put_aside(desk: Desk, guest: Guest) -> Guest:
    """A guest that waits, as the ledger has it."""
    desk.part(guest.name)
    return replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)


def give(work: Work, desk: Desk, grant: Grant, region: Region) -> None:
    """``map`` to a guest that waits: the step that makes the grant, or why it cannot be."""
    kept = _kept(desk, grant.guest)
    whole = grant.offset == 0 and grant.length == region.size
    if kept is None or grant.region != kept.region or not whole or grant.access is not Access.RW or grant.lazy:
        what = f"guest {grant.guest} waits for another memory than this"
        name = kept.region if kept is not None else region.name
        work.refuse("OtherRam", what, f"its RAM is all of {name}, to write", f"memconsole map {name} {grant.guest}")
        return
    made = replace(grant, gpa=0)
    work.subject = grant.id
    work.aims = replace(work.aims, grants=(made,))
    work.text = f"{grant.guest} has {grant.region} again as {grant.id}; memconsole guest resume {grant.guest} starts it"

    def do() -> None:
        work.change = replace(work.change, grants=(made,))

    work.step("offer", f"give {grant.guest} its RAM {grant.region} again as {grant.id}", do)


def again(desk: Desk, guest: Guest) -> Work:
    """``guest resume`` of a guest that waits: ``again`` starts it from what was saved."""
    from memconsole.backend.handoff import alone

    work = Work(guest.name, f"guest {guest.name} goes on")
    kept = _kept(desk, guest.name)
    grants = [grant for grant in desk.state.grants_of(guest=guest.name) if kept and grant.region == kept.region]
    if kept is None or not grants:
        region = kept.region if kept is not None else "REGION"
        remedy = f"memconsole map {region} {guest.name}, then resume it"
        work.refuse("NoRam", f"guest {guest.name} has no RAM", "it gave it back", remedy)
        return work

    def do() -> None:
        plan, _ = desk.custody.get(f"{_PLAN}:{guest.name}")
        with contextlib.closing(os.fdopen(plan, "rb")):
            back = alone.start_alone(desk, guest, plan)
        drop(desk, guest.name)
        if kept.paused:
            back = replace(back, state=GuestState.PAUSED)
        work.change = Change(guests=(back,), grants=(replace(grants[0], state=GrantState.MAPPED),))

    work.step("again", f"start {guest.name} on {kept.region} from what was saved when it gave that back", do)
    return work


def drop(desk: Desk, guest: str) -> None:
    """Forget what was saved of a guest, if anything was."""
    for kind in (_KIND, _PLAN):
        with contextlib.suppress(NotFound):
            desk.custody.drop(f"{kind}:{guest}")


def tidy(desk: Desk) -> None:
    """Forget what was saved of guests that are no more, or that run."""
    for name in desk.custody.names():
        kind, _, guest = name.partition(":")
        if kind in {_KIND, _PLAN} and not (guest in desk.state.guests and waits(desk, guest)):
            drop(desk, guest)


def findings(desk: Desk) -> tuple[Finding, ...]:
    """The guests that wait."""
    waiting = [guest for guest in desk.state.guests.values() if guest.state is GuestState.GONE and guest.pid is None]
    found = []
    for guest in waiting:
        kept = _kept(desk, guest.name)
        if kept is not None:
            what = f"guest {guest.name} gave its RAM {kept.region} back and waits: what it is besides is in custody"
            remedy = f"memconsole map {kept.region} {guest.name}, then memconsole guest resume {guest.name}"
            found.append(Finding("guest-aside", Severity.INFO, guest.name, what, f"{_KIND}:{guest.name}", remedy))
    return tuple(found)


def _kept(desk: Desk, guest: str) -> Aside | None:
    try:
        fd, payload = desk.custody.get(f"{_KIND}:{guest}")
    except NotFound:
        return None
    os.close(fd)
    return msgspec.json.decode(payload, type=Aside)
