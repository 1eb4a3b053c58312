"""The other side of a jump, and what a control process that died in a handoff left behind.

    resume record in custody       it landed: regions are other inodes, VMMs other processes; the ledger learns it
    rehearsal, VMMs ended          it is carried on: they are started from what was saved
    anything else                  it is taken back: sessions are let go of, guests go on, the image is unloaded

After that, adoption is the one after any restart.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from memconsole.actions import Handoff, HandoffRehearse
from memconsole.backend.desk import STOP_S, Desk, custody_name
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.handoff import bootplan, devices, image, manifest, report, verify, vmm
from memconsole.backend.handoff.bootplan import LANDED, MANIFEST, RESUME, STARTED, Moment, Resume, Resumed
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.report import Clock, Progress
from memconsole.backend.state import Change, Intent
from memconsole.backend.steps import point
from memconsole.backend.stores import memfd
from memconsole.errors import BadFile, Gone, GuestError, MemconsoleError, NotFound
from memconsole.model import (
    Carried,
    CarriedDevice,
    Finding,
    Grant,
    Guest,
    GuestKind,
    GuestState,
    HandoffReport,
    HandoffState,
    Region,
    RegionState,
    Severity,
)
from memconsole.native import program

RESUME_S = 120.0
"""Seconds memconsole-resume has to start every VMM of a rehearsal."""
_OK = {0, 4}


@dataclass
class Landing:
    """What a handoff came to: what the ledger learns, what does not match, and the report."""

    change: Change
    report: HandoffReport
    findings: list[Finding] = field(default_factory=list)
    manifest: Manifest | None = None
    moved: frozenset[str] = frozenset()
    clock: Clock | None = None

    @property
    def waiting(self) -> frozenset[str]:
        """The guests that stay paused until it is settled."""
        return (
            frozenset(each.guest.name for each in self.manifest.guests if each.waits) if self.manifest else frozenset()
        )


def landed(desk: Desk) -> bool:
    """Whether memconsole-resume was here, and nobody has taken over yet what it did."""
    return RESUME in desk.custody.names()


def land(desk: Desk, progress: Progress | None = None) -> Landing:
    """What the ledger is to learn after memconsole-resume; ``progress``: of a rehearsal in this very process.

    Raises:
        NotFound: there is no record of a resume. BadFile: it cannot be read.
    """
    arrived = bootplan.moment()
    resume = bootplan.read_resume(_content(desk, RESUME))
    described, findings = _described(desk)
    jumped = resume.mode != "rehearse"
    regions = _regions(desk, restored=jumped)
    guests = {each.guest: each for each in resume.guests}
    known = tuple(_guest(guest, guests.get(guest.name), jumped=jumped) for guest in desk.state.guests.values())
    served = tuple(grant for grant in desk.state.grants.values() if grant.lazy and (jumped or grant.guest in guests))
    change = Change(
        regions=tuple(region for region in regions if region is not None),
        guests=known,
        grants=tuple(replace(grant, lazy=False) for grant in served),
        without_quarantine=tuple(desk.state.quarantine) if jumped else (),
    )
    findings += list(_findings(resume))
    made = _report(desk, described, resume, progress, arrived)
    made = replace(made, notes=(*made.notes, *(_served_no_more(grant) for grant in served)))
    moved = frozenset(each.subject for each in resume.findings if each.id == "pages-moved")
    clock = None if described is None else Clock(described.began, _pairs(described, resume, arrived))
    return Landing(change, made, findings, described, moved, clock)


def settle(desk: Desk, landing: Landing) -> None:
    """Once the ledger knows of it: devices and windows, compare, keep the report, let guests go on that waited, tidy.

    The state of a guest that is not known to be back stays. Who is interrupted here does it again; contents are
    compared once, for guests change them as soon as they go on. Guests whose contents were not asked for do not wait
    until all regions were looked at once more.
    """
    made, described, clock = landing.report, landing.manifest, landing.clock
    before = desk.handoff
    again = before is not None and before.began_ns == made.began_ns and before.state is HandoffState.DONE
    if again and before is not None:
        made = before
    late: dict[str, int] = {}
    waiting: frozenset[str] = frozenset()
    contents = described is not None and any(placed.contents for placed in described.regions)
    if described is not None and clock is not None:
        returned = devices.back(desk, described, clock)
        waiting = returned.waiting
        landing.findings += returned.findings
        made = replace(made, devices=_newest(made.devices, returned.devices), windows=returned.windows or made.windows)
        if not contents:
            late = _let_go_on(desk, described, clock, waiting)
        if not again:
            kept, found = verify.compare(desk, described, landing.moved)
            landing.findings += found
            made = replace(made, regions=kept)
    point("adopt.compared")
    store(desk, replace(made, state=HandoffState.DONE))
    point("adopt.reported")
    if described is not None and clock is not None:
        if contents:
            wrong = {each.name for each in made.regions if each.contents is False}
            held = {grant.guest for grant in desk.state.grants.values() if grant.region in wrong}
            late = _let_go_on(desk, described, clock, waiting | held)
        made = report.held(report.filled(made, late.items(), "its VMM"), waiting)
        store(desk, replace(made, state=HandoffState.DONE))
        devices.settle(desk, described)
    _tidy(desk, landing.report)


def _tidy(desk: Desk, made: HandoffReport) -> None:
    """Drop from custody what nobody needs any more; last of all the record, which becomes the word that it was used."""
    back = {guest.name for guest in made.guests if guest.back}
    for name in desk.custody.names():
        saved = name.removeprefix("state:")
        used = saved != name and (saved in back or desk.live(saved) is not None)
        if used or name.startswith(("session:", "again:", STARTED)):
            desk.custody.drop(name)
            point(f"adopt.dropped.{name}")
    if made.kind == "run":
        fd, payload = desk.custody.get(RESUME)
        desk.custody.put(LANDED, fd, payload)
        os.close(fd)
        point("adopt.said")
    desk.custody.drop(RESUME)


def take_back(desk: Desk, intent: Intent) -> None:
    """Undo what a control process that died did of a handoff, before the jump."""
    for bdf in desk.spaces.quiet:
        with contextlib.suppress(MemconsoleError):
            desk.spaces.restart(bdf)
    for guest in desk.state.guests.values():
        live = desk.live(guest.name)
        if live is None or guest.kind is GuestKind.PROCESS or guest.state is GuestState.PAUSED:
            continue
        with contextlib.suppress(MemconsoleError):
            desk.connected(guest.name)
            if live.state() is not GuestState.RUNNING:
                live.resume()
    for name in desk.custody.names():
        if name.startswith(("session:", "state:", devices.IOVA)) or name == MANIFEST:
            desk.custody.drop(name)
    if not isinstance(intent.action, HandoffRehearse):
        with contextlib.suppress(MemconsoleError):
            image.unload()


def interrupted(desk: Desk, action: Handoff) -> bool:
    """Whether a rehearsal died after it had ended a VMM that it had saved."""
    if not isinstance(action, HandoffRehearse) or MANIFEST not in desk.custody.names():
        return False
    described, _ = _described(desk)
    return described is not None and any(desk.live(each.guest.name) is None for each in described.guests)


def carry_on(desk: Desk) -> Landing:
    """Start what an interrupted rehearsal had ended, and land."""
    described, _ = _described(desk)
    guests = [each.guest for each in described.guests] if described is not None else []
    end(desk, guests)
    revive(desk)
    return land(desk)


def end(desk: Desk, guests: Iterable[Guest]) -> None:
    """Kill the VMMs of guests that were saved; their userfaultfds lead nowhere then."""
    for guest in guests:
        live = desk.live(guest.name)
        if live is not None:
            live.kill(STOP_S)
            desk.part(guest.name)
        for grant in desk.state.grants_of(guest=guest.name):
            desk.uffds.drop(grant.id)


def revive(desk: Desk, plan: str = MANIFEST) -> None:
    """Start every VMM of the manifest, or of another ``plan`` in custody, from what was saved.

    Raises:
        GuestError: nothing could be started.
    """
    words = [program("memconsole-resume"), "--rehearse", "--runtime", str(desk.runtime_dir.absolute()), "--plan", plan]
    done = subprocess.run(words, capture_output=True, text=True, timeout=RESUME_S, check=False)
    if done.returncode not in _OK:
        why = done.stderr.strip().splitlines()
        raise GuestError("the VMMs could not be started again", why[-1] if why else "", "their state is in custody")


def waits(desk: Desk, guest: str) -> bool:
    """Whether a guest was saved and did not come back: its state is in custody."""
    return desk.live(guest) is None and f"state:{guest}" in desk.custody.names()


def again(desk: Desk, guest: Guest) -> Guest:
    """Start one guest that waits from what was saved; who it is now.

    Raises:
        GuestError: it did not come back this time either.
    """
    fd = manifest.memfd("memconsole-plan", bootplan.encode(_alone(desk, guest)))
    try:
        back = _start_alone(desk, guest, fd)
    finally:
        os.close(fd)
    live = desk.live(guest.name)
    if live is not None and desk.connected(guest.name) and live.state() is GuestState.PAUSED:
        try:
            give_back(desk, guest.name)
        except MemconsoleError:
            let_go(desk, guest.name)
            raise
        live.resume()
    return back


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
        (each for each in bootplan.read_resume(_content(desk, RESUME)).guests if each.guest == guest.name), None
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
        plan = bootplan.decode(_content(desk, MANIFEST))
        starts = tuple(each for each in plan.starts if each.guest == guest.name)
        says = tuple(each for each in plan.says if each.guest == guest.name)
    if not starts:
        grants = desk.state.grants_of(guest=guest.name)
        start, say = vmm.anew(desk, guest, grants, f"state:{guest.name}", paused=False)
        starts, says = (start,), (() if say is None else (say,))
    holds = tuple(
        bootplan.Hold(bootplan.MANIFEST_SESSION, token, name) for token, (name, _) in enumerate(starts[0].fds)
    )
    return bootplan.Plan(holds, (), starts, says, bootplan.moment())


def devices_wait(desk: Desk, guest: str) -> bool:
    """Whether devices of a guest are not back since a handoff, and its grants still mean them."""
    described, _ = _described(desk)
    return described is not None and bool(devices.waits(desk, described, guest))


def give_back(desk: Desk, guest: str) -> None:
    """Try again to give a guest its devices and windows as they were.

    Raises:
        GuestError: they still are not; it stays paused. BadFile: the manifest cannot be read.
    """
    described = manifest.read(_content(desk, MANIFEST))
    now = bootplan.moment()
    clock = Clock(described.began, [(described.began, described.written), (now, now)])
    returned = devices.back(desk, described, clock, guest)
    devices.settle(desk, described)
    made = desk.handoff
    if made is not None:
        guests = made.guests
        if not returned.findings:
            guests = tuple(replace(each, back=True, why="") if each.name == guest else each for each in guests)
        store(desk, replace(made, guests=guests, devices=_newest(made.devices, returned.devices)))
    if returned.findings:
        first = returned.findings[0]
        raise GuestError(f"guest {guest} stays paused", first.what, first.remedy)


def take_hold(desk: Desk, guests: Sequence[Guest], *, windows: bool = False) -> None:
    """Adopt the processes of guests that this control process started again; ``windows``: give them those at once."""
    for guest in guests:
        if guest.pid is not None and guest.kind is not GuestKind.PROCESS:
            desk.part(guest.name)
            with contextlib.suppress(Gone):
                desk.adopt_guest(guest, windows=windows)


# --- the report in custody ------------------------------------------------------------------------------------------


def store(desk: Desk, made: HandoffReport) -> None:
    """Show a report, and keep it in custody for the next control process."""
    desk.handoff = made
    fd = manifest.memfd("memconsole-report", msgspec.json.encode(made))
    try:
        desk.custody.put(report.CUSTODY, fd)
    finally:
        os.close(fd)


def stored(desk: Desk) -> HandoffReport | None:
    """The report of the last handoff, as custody holds it."""
    if report.CUSTODY not in desk.custody.names():
        return None
    with contextlib.suppress(msgspec.DecodeError, NotFound):
        return msgspec.json.decode(_content(desk, report.CUSTODY).rstrip(b"\0"), type=HandoffReport)
    return None


def reported(desk: Desk) -> HandoffReport | None:
    """The report, with what guests say of their own blackout; asked until they have said it."""
    made = desk.handoff
    if made is None or made.state is not HandoffState.DONE:
        return made
    waiting = [guest for guest in made.guests if guest.back and guest.kind is GuestKind.CANARY and guest.by != "guest"]
    said = []
    for guest in waiting:
        live = desk.live(guest.name)
        with contextlib.suppress(MemconsoleError):
            if isinstance(live, CanaryGuest) and live.agent():
                restored, blackout_ns = live.blackout()
                if restored and blackout_ns:
                    said.append((guest.name, blackout_ns))
    if said:
        made = report.filled(made, said)
        store(desk, made)
    return made


# --- inside ---------------------------------------------------------------------------------------------------------


def _content(desk: Desk, name: str) -> bytes:
    fd, _ = desk.custody.get(name)
    try:
        return manifest.content(fd)
    finally:
        os.close(fd)


def _described(desk: Desk) -> tuple[Manifest | None, list[Finding]]:
    try:
        return manifest.read(_content(desk, MANIFEST)), []
    except (BadFile, NotFound) as error:
        what = f"the manifest of the handoff is not known: {error.why or error.what}"
        return None, [Finding("manifest-unknown", Severity.WARNING, MANIFEST, what, "custody", error.remedy)]


def _regions(desk: Desk, *, restored: bool) -> Iterator[Region | None]:
    """Every region with the inodes its segments have now."""
    held = set(desk.custody.names())
    for region in desk.state.regions.values():
        names = [custody_name(region.name, index) for index in range(len(region.segments))]
        if not held.issuperset(names):
            yield None
            continue
        fds = [desk.custody.get(name)[0] for name in names]
        try:
            found = replace(region, segments=memfd.segments(fds))
            yield replace(found, state=RegionState.RESTORED) if restored else found
        finally:
            for fd in fds:
                os.close(fd)


def _served_no_more(grant: Grant) -> str:
    """A lazy grant's userfaultfd ended with the process that made it."""
    return f"{grant.id}: {grant.guest} had it lazily; its faults are the kernel's own from now on"


def _guest(guest: Guest, back: Resumed | None, *, jumped: bool) -> Guest:
    """A guest as the process it is now; one that is no more has none."""
    if back is not None and back.state != "held":
        return replace(guest, pid=back.pid, start_ticks=back.start_ticks)
    if back is None and not jumped:
        return guest
    return replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)


def _findings(resume: Resume) -> Iterator[Finding]:
    for each in resume.findings:
        if each.id == "guest-held":
            continue  # for as long as it waits: see verbs/handoff.py
        severity = Severity.WARNING if each.id in _LESSER else Severity.ERROR
        remedy = _REMEDIES.get(each.id, "its regions and its state are in custody")
        yield Finding(f"handoff-{each.id}", severity, each.subject, f"{each.subject}: {each.text}", "resume", remedy)


def _saved(desk: Desk) -> list[str]:
    """The guests whose state is in custody, of those the ledger knows."""
    return [name for name in desk.state.guests if f"state:{name}" in desk.custody.names()]


_LESSER = {"name-taken", "session-unfinished", "session-kept"}
_REMEDIES = {
    "plan-broken": "resume guests by hand, or release their regions: everything is in custody",
    "session-kept": "it is closed when nothing that came in it is in custody any more",
    "session-unfinished": "it is closed when nothing that came in it is in custody any more",
}
_RESUME = {
    "keeper": "start the keeper",
    "planned": "read the boot plan",
    "retrieved": "take everything into custody",
    "verified": "compare where every page is",
    "started": "start the VMMs",
    "resumed": "let the guests go on",
    "finished": "finish the sessions",
}


def _report(
    desk: Desk, described: Manifest | None, resume: Resume, progress: Progress | None, arrived: Moment
) -> HandoffReport:
    if described is None:
        release = os.uname().release
        kind = "rehearse" if resume.mode == "rehearse" else "run"
        made = HandoffReport(kind, HandoffState.DONE, time.time_ns(), to_kernel=release)  # type: ignore[arg-type]
        saved = (desk.state.guests[name] for name in _saved(desk))
        guests = tuple(report.come(Carried(each.name, each.kind, each.memory), resume) for each in saved)
        unknown = "the manifest could not be read: what went before the jump is not known"
        notes = (unknown, *(f"{each.subject}: {each.text}" for each in resume.findings))
        return replace(made, guests=guests, notes=notes)
    clock = Clock(described.began, _pairs(described, resume, arrived))
    base = progress.report if progress is not None else described.report
    phases = [phase for phase in base.phases if phase.id not in {"early", "adopt"}]
    begun = clock.at(resume.phases[0].at) if resume.phases else clock.at(described.written)
    if progress is None:
        written = clock.at(described.written)
        phases[-1] = replace(phases[-1], end_ns=written)
        if resume.mode != "rehearse":
            # the next kernel's clock began with it
            booted = max(written, begun - resume.phases[0].at.boottime_ns) if resume.phases else written
            phases += [
                report.phase("jump", "preserve them, leave this kernel", written, booted),
                report.phase("boot", "the next kernel boots, up to memconsole-resume", booted, begun),
            ]
    last = begun
    for each in resume.phases[1:]:
        now = clock.at(each.at)
        blackout = each.name != "finished"
        phases.append(report.phase(each.name, _RESUME.get(each.name, each.name), last, now, blackout=blackout))
        last = now
    now = clock.at(bootplan.moment())
    phases.append(report.phase("adopt", "the control process takes over", clock.at(arrived), now, blackout=False))
    return replace(
        base,
        phases=tuple(phases),
        to_kernel=os.uname().release,
        guests=tuple(report.carried(base.guests, described, resume, clock)),
        notes=tuple(f"{each.subject}: {each.text}" for each in resume.findings),
        state=HandoffState.RUNNING,
    )


def _pairs(described: Manifest, resume: Resume, arrived: Moment) -> list[tuple[Moment, Moment]]:
    pairs = [(described.began, described.written)]
    if resume.phases:
        pairs.append((resume.phases[0].at, arrived))
    return pairs


def _let_go_on(desk: Desk, described: Manifest, clock: Clock, held: Collection[str]) -> dict[str, int]:
    """Resume the guests that waited, but for those that are held; for how long each stood still, in ns."""
    late: dict[str, int] = {}
    for stopped in described.guests:
        name = stopped.guest.name
        live = desk.live(name)
        if live is None or not stopped.waits or name in held:
            continue
        with contextlib.suppress(MemconsoleError):
            desk.connected(name)
            if live.state() is GuestState.PAUSED:
                live.resume()
                point(f"adopt.goes-on.{name}")
                late[name] = clock.between(stopped.at, bootplan.moment())
    return late


def _newest(before: Iterable[CarriedDevice], now: Iterable[CarriedDevice]) -> tuple[CarriedDevice, ...]:
    """The devices of a report, those that were looked at again as they are now."""
    found = {each.bdf: each for each in before}
    return tuple((found | {each.bdf: each for each in now}).values())
