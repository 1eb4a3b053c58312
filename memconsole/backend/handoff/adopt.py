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

from msgspec.structs import replace

from memconsole.actions import Handoff, HandoffRehearse
from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.handoff import bootplan, devices, image, kept, report, verify
from memconsole.backend.handoff.bootplan import LANDED, MANIFEST, RESUME, STARTED, Moment, Resume, Resumed
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.report import Clock, Progress
from memconsole.backend.state import Change, Intent
from memconsole.backend.steps import point
from memconsole.backend.stores import memfd
from memconsole.errors import Gone, GuestError, MemconsoleError, NotFound
from memconsole.model import (
    Carried,
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

SUSPENDED = b"suspended"
"""What custody says of the state of a guest that was suspended when it was saved."""
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
    resume = bootplan.read_resume(kept.content(desk, RESUME))
    described, findings = kept.described(desk)
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
        made = replace(
            made, devices=kept.newest(made.devices, returned.devices), windows=returned.windows or made.windows
        )
        if not contents:
            late = _let_go_on(desk, described, clock, waiting)
        if not again:
            regions, found = verify.compare(desk, described, landing.moved)
            landing.findings += found
            made = replace(made, regions=regions)
    point("adopt.compared")
    kept.store(desk, replace(made, state=HandoffState.DONE))
    point("adopt.reported")
    if described is not None and clock is not None:
        if contents:
            late = _let_go_on(desk, described, clock, waiting | report.spoiled(made, desk.state.grants.values()))
        made = report.held(report.filled(made, late.items(), "its VMM"), waiting)
        kept.store(desk, replace(made, state=HandoffState.DONE))
        devices.settle(desk, described)
    _tidy(desk, landing.report)


def wait_for_devices(desk: Desk) -> list[str]:
    """The guests that a jump brought here, and whose VMMs are started only once their devices can be given to them.

    One whose memory is not what it was is left to whoever resumes it by hand.
    """
    if not any(name.startswith(devices.IOVA) for name in desk.custody.names()):
        return []
    described, _ = kept.described(desk)
    if described is None or described.report.kind != "run":
        return []
    made = desk.handoff
    spoiled = report.spoiled(made, desk.state.grants.values()) if made is not None else set()
    stopped = [each.guest for each in described.guests if each.guest.kind is GuestKind.QEMU]
    names = [guest.name for guest in stopped if guest.name not in spoiled]
    return [name for name in names if name in desk.state.guests and devices.waits(desk, described, name)]


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


def take_back(desk: Desk, intent: Intent) -> list[str]:
    """Undo what a control process that died did of a handoff, before the jump; the guests that are to be resumed."""
    for bdf in desk.spaces.quiet:
        with contextlib.suppress(MemconsoleError):
            desk.spaces.restart(bdf)
    ended = []
    for guest in desk.state.guests.values():
        live = desk.live(guest.name)
        if live is None or guest.kind is GuestKind.PROCESS or guest.state is GuestState.PAUSED:
            continue
        with contextlib.suppress(MemconsoleError):
            desk.connected(guest.name)
            if isinstance(live, QemuGuest) and live.is_saved() and _was_suspended(desk, guest.name):
                ended.append(guest)
            elif live.state() is GuestState.PAUSED:
                live.resume()
    end(desk, ended)
    again = [guest.name for guest in desk.state.guests.values() if _is_left(desk, guest)]
    for name in desk.custody.names():
        guest_of = name.removeprefix("state:")
        if name.startswith(("session:", devices.IOVA)) or name == MANIFEST or guest_of not in {name, *again}:
            desk.custody.drop(name)
    if not isinstance(intent.action, HandoffRehearse):
        with contextlib.suppress(MemconsoleError):
            image.unload()
    return again


def _was_suspended(desk: Desk, guest: str) -> bool:
    """Whether custody has the state of a guest that was suspended when it was saved."""
    with contextlib.suppress(NotFound):
        fd, payload = desk.custody.get(f"state:{guest}")
        os.close(fd)
        return payload == SUSPENDED
    return False


def _is_left(desk: Desk, guest: Guest) -> bool:
    """Whether a guest was ended because it could not go on from where it was saved."""
    return desk.live(guest.name) is None and _was_suspended(desk, guest.name)


def interrupted(desk: Desk, action: Handoff) -> bool:
    """Whether a rehearsal died after it had ended a VMM that it had saved."""
    if not isinstance(action, HandoffRehearse) or MANIFEST not in desk.custody.names():
        return False
    described, _ = kept.described(desk)
    return described is not None and any(desk.live(each.guest.name) is None for each in described.guests)


def carry_on(desk: Desk) -> Landing:
    """Start what an interrupted rehearsal had ended, and land."""
    described, _ = kept.described(desk)
    guests = [each.guest for each in described.guests] if described is not None else []
    end(desk, guests)
    revive(desk)
    return land(desk)


def end(desk: Desk, guests: Iterable[Guest]) -> None:
    """Kill the VMMs of guests that were saved; their userfaultfds lead nowhere then."""
    for guest in guests:
        live = desk.live(guest.name)
        if live is not None:
            live.kill()
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


def take_hold(desk: Desk, guests: Sequence[Guest], *, windows: bool = False) -> None:
    """Adopt the processes of guests that this control process started again; ``windows``: give them those at once."""
    for guest in guests:
        if guest.pid is not None and guest.kind is not GuestKind.PROCESS:
            desk.part(guest.name)
            with contextlib.suppress(Gone):
                desk.adopt_guest(guest, windows=windows)


# --- inside ---------------------------------------------------------------------------------------------------------


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
        saved = (desk.state.guests[name] for name in kept.saved(desk))
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
