"""Taking over what an earlier control process left: fds from custody, guests by PID, actions it did not end.

region in ledger and custody      taken over, when the memfd is the one the ledger means
region in ledger only             stays lost; the Snapshot says so
region in custody only            taken over by its payload, with a finding: the ledger lost it
guest whose process lives         taken over with its grants; one whose process ended is a finding
unfinished release, revoke,       carried through: what they take away must not come back
  stop, pause, resume
unfinished reserve, map, start,   taken back: nobody was told that they were done
  attach
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import msgspec

from memconsole import actions
from memconsole.backend import steps, verbs
from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.handoff import adopt as handoff
from memconsole.backend.handoff import alone, kept
from memconsole.backend.handoff.adopt import Landing
from memconsole.backend.revoke import aside, halt, move
from memconsole.backend.state import Change, Done, Failed, Happened, Intent, Record
from memconsole.backend.stores import memfd
from memconsole.backend.verbs.grants import OFFER_S
from memconsole.backend.verbs.guests import forget, orphans
from memconsole.backend.verbs.regions import drop_custody
from memconsole.backend.verbs.work import Work
from memconsole.errors import Gone, MemconsoleError
from memconsole.model import Finding, Grant, GrantState, Guest, GuestState, Region, RegionState, Severity

FORWARD = (
    actions.Release,
    actions.Revoke,
    actions.GuestStop,
    actions.GuestPause,
    actions.GuestResume,
    actions.WindowRevoke,
)

Write = Callable[[Record], int]


def adopt(desk: Desk, write: Write) -> list[Finding]:
    """Take over everything; what does not match is a finding. It may die at any of its points, and begins anew."""
    steps.point("adopt.begun")
    halt.release(desk)
    move.finish(desk)
    desk.handoff = kept.stored(desk)
    again: list[str] = []
    landing, found = _landed(desk, write, again)
    steps.point("adopt.landed")
    found += _regions(desk)
    steps.point("adopt.regions")
    desk.uffds.adopt()
    desk.spaces.adopt()
    for guest in desk.state.guests.values():
        with contextlib.suppress(Gone):
            if guest.pid is not None:
                # What waits for its devices gets its windows once they are there.
                desk.adopt_guest(guest, windows=landing is None or guest.name not in landing.waiting)
        steps.point(f"adopt.guest.{guest.name}")
    for number, intent in list(desk.state.unfinished.items()):
        found += _finish(desk, write, number, intent)
    if landing is None and handoff.landed(desk):  # a rehearsal was carried on
        landing = handoff.land(desk)
    if landing is not None:
        handoff.settle(desk, landing)
        found += landing.findings
    for name in [*again, *handoff.wait_for_devices(desk)]:
        found += _bring_back(desk, write, name)
    steps.point("adopt.settled")
    found += _unknown(desk, write)
    aside.tidy(desk)
    desk.uffds.forget()
    desk.spaces.settle()
    steps.point("adopt.done")
    return found


def _landed(desk: Desk, write: Write, again: list[str]) -> tuple[Landing | None, list[Finding]]:
    """The other side of a jump: the ledger learns which inodes its regions, which processes its guests are now.

    A guest that was started alone is added to ``again``: it is to be resumed, once it is taken over.
    """
    if not handoff.landed(desk):
        return None, []
    for number, intent in list(desk.state.unfinished.items()):
        guest = desk.state.guests.get(intent.subject)
        if isinstance(intent.action, actions.GuestResume) and guest is not None:  # alone, long after the landing
            again += _started(desk, write, number, guest)
            return None, []
    try:
        landing = handoff.land(desk)
    except MemconsoleError as error:
        what = f"a handoff landed, and what became of it cannot be read: {error}"
        return None, [Finding("handoff-unread", Severity.ERROR, "handoff", what, "custody", error.remedy)]
    steps.point("adopt.read")
    for number, intent in list(desk.state.unfinished.items()):  # none: the ledger knew already
        if isinstance(intent.action, actions.Handoff):
            back = sum(guest.back for guest in landing.report.guests)
            text = f"{intent.subject} was handed off: {back} of {len(landing.report.guests)} guests are back"
            write(Done(number, time.time_ns(), text, landing.change))
    return landing, []


def _bring_back(desk: Desk, write: Write, name: str) -> Iterator[Finding]:
    """Resume a guest as if somebody had asked for it, unless it has gone on."""
    live = desk.live(name)
    with contextlib.suppress(MemconsoleError):
        desk.connected(name)
        if live is not None and live.state() is not GuestState.PAUSED:
            return
    intent = Intent(time.time_ns(), actions.GuestResume(name), name, "", Change())
    yield from _finish(desk, write, write(intent), intent)


def _started(desk: Desk, write: Write, number: int, guest: Guest) -> list[str]:
    """A guest that an earlier control process started alone and did not see go on; its name, if it is there."""
    try:
        change = Change(guests=(alone.started(desk, guest),))
    except MemconsoleError as error:
        write(Failed(number, time.time_ns(), error.code, str(error)))
        return []
    write(Done(number, time.time_ns(), f"guest {guest.name} is started (carried through after a restart)", change))
    alone.let_go(desk, guest.name)
    return [guest.name]


# --- regions ----------------------------------------------------------------------------------------------------


def _regions(desk: Desk) -> Iterator[Finding]:
    held = set(desk.custody.names())
    for region in desk.state.regions.values():
        names = [custody_name(region.name, index) for index in range(len(region.segments))]
        if not held.issuperset(names):
            continue
        fds = tuple(desk.custody.get(name)[0] for name in names)
        found = [(segment.inode, segment.device) for segment in memfd.segments(fds)]
        if found == [(segment.inode, segment.device) for segment in region.segments]:
            desk.hold(region.name, fds)
            continue
        for fd in fds:
            os.close(fd)
        yield Finding(
            "custody-other",
            Severity.ERROR,
            region.name,
            f"what custody holds as region {region.name} is other memory than the ledger means",
            f"inodes {found}",
            f"memconsole release {region.name} forgets it",
        )


def _unknown(desk: Desk, write: Write) -> Iterator[Finding]:
    """Regions that custody holds and the ledger does not know: memory is never thrown away because a record is."""
    counts: dict[str, int] = {}
    for held in desk.custody.names():
        kind, _, rest = held.partition(":")
        if kind == "region":
            name = rest.rpartition(":")[0]
            counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        if name not in desk.state.regions:
            yield _found(desk, write, name, count)


def _found(desk: Desk, write: Write, name: str, count: int) -> Finding:
    held = [desk.custody.get(custody_name(name, index)) for index in range(count)]
    fds = tuple(fd for fd, _ in held)
    try:
        region = msgspec.json.decode(held[0][1], type=Region)
        known = region.segments == memfd.segments(fds)
    except msgspec.DecodeError:
        known = False
    if not known:
        for fd in fds:
            os.close(fd)
        what, remedy = f"custody holds {name}, which nobody knows", "restart whoever has custody to free it"
        return Finding("custody-unknown", Severity.WARNING, name, what, "custody", remedy)
    desk.hold(name, fds)
    region = msgspec.structs.replace(region, state=RegionState.RESERVED)
    text = f"region {name} was in custody and not in the ledger; it is taken over"
    write(Happened(time.time_ns(), "adopted", name, text, change=Change(regions=(region,))))
    remedy = f"look into it, then map it or release {name}"
    return Finding("region-found", Severity.WARNING, name, text, "custody", remedy)


# --- what was under way -----------------------------------------------------------------------------------------


def _finish(desk: Desk, write: Write, number: int, intent: Intent) -> Iterator[Finding]:
    """Carry an unfinished action through, or take it back."""
    action, work = intent.action, None
    again: list[str] = []
    try:
        if isinstance(action, FORWARD):
            work = verbs.work(desk, action)
            write(_forward(number, action, work))
        else:
            write(_back(desk, number, intent, again))
    except MemconsoleError as error:
        lasting = work.lasting if work is not None else Change()
        write(Failed(number, time.time_ns(), error.code, str(error), lasting))
        yield Finding(
            "action-unfinished",
            Severity.WARNING,
            intent.subject,
            f"{action.spec.title} of {intent.subject} was cut short, and could not be ended: {error}",
            f"ledger record {number}",
            error.remedy or f"try again: {actions.cli_form(action)}",
        )
    else:
        if work is not None and work.after is not None:
            work.after()
    for name in again:
        yield from _bring_back(desk, write, name)


def _forward(number: int, action: actions.Action, work: Work) -> Record:
    now = time.time_ns()
    if work.refusals:
        return Failed(number, now, work.refusals[0].code, work.refusals[0].what)
    steps.run(action.spec.id, work.steps)
    return Done(number, now, f"{work.text} (carried through after a restart)", work.change)


def _back(desk: Desk, number: int, intent: Intent, again: list[str]) -> Record:
    """Take it back; guests that are to be resumed then are added to ``again``."""
    action = intent.action
    if isinstance(action, actions.Handoff):
        if handoff.interrupted(desk, action):
            return _carried_on(desk, number, intent)
        again += handoff.take_back(desk, intent)
    if isinstance(action, actions.GuestStart):
        for handle in orphans(desk, action.name):
            with contextlib.closing(handle):
                handle.kill()
        forget(desk, action.name)
    if isinstance(action, (actions.Reserve, actions.GuestStart)):
        drop_custody(desk, action.name)
    if isinstance(action, actions.Map):
        for grant in intent.aims.grants:
            if grant.dma is not None:
                desk.spaces.unmap(grant)
                grant = msgspec.structs.replace(grant, dma=None)  # noqa: PLW2901 - it is what is left of it
            if _still_mapped(desk, grant):
                text = f"{grant.guest} maps {grant.region} as {grant.id} (found after a restart)"
                return Done(
                    number,
                    time.time_ns(),
                    text,
                    Change(grants=(msgspec.structs.replace(grant, state=GrantState.MAPPED),)),
                )
    return Failed(number, time.time_ns(), "CutShort", "the control process died; what was done of it is undone")


def _carried_on(desk: Desk, number: int, intent: Intent) -> Record:
    landing = handoff.carry_on(desk)
    handoff.take_hold(desk, landing.change.guests)
    text = f"{intent.subject} has rehearsed a handoff (carried through after a restart)"
    return Done(number, time.time_ns(), text, landing.change)


def _still_mapped(desk: Desk, grant: Grant) -> bool:
    """Whether a guest keeps a grant nobody was told of; its agent is asked for it as soon as it connects."""
    live, region = desk.live(grant.guest), desk.state.regions.get(grant.region)
    if live is None or region is None:
        return False
    desk.connected(grant.guest)
    deadline = time.monotonic() + OFFER_S
    while desk.reach(region, grant.offset // memfd.SEGMENT).pids:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
    return False
