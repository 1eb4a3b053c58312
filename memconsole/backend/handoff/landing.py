"""The other side of a jump, and what a control process that died in a handoff left behind.

    resume record in custody       it landed: regions are other inodes, VMMs other processes; the ledger learns it
    rehearsal, VMMs ended          it is carried on: they are started from what was saved
    anything else                  it is taken back: sessions are let go of, guests go on, the image is unloaded

After that, adoption is the one after any restart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from memconsole.actions import HandoffAction, HandoffRehearse
from memconsole.backend import needs, steplog
from memconsole.backend.custody.names import LANDED
from memconsole.backend.guests.base import is_qemu
from memconsole.backend.handoff import bootplan, devices, report, stored, verify
from memconsole.backend.handoff.bootplan import MANIFEST, RESUME, STARTED, ClockReading, Resume, Resumed
from memconsole.backend.handoff.cargo import take_back
from memconsole.backend.handoff.facets import Handover
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.powers import Powers
from memconsole.backend.handoff.report import Clock, ReportWriter
from memconsole.backend.ledger import boots
from memconsole.backend.ledger.state import Intent, StateChange
from memconsole.backend.steps import passed
from memconsole.errors import Gone, MemconsoleError, NotFound
from memconsole.model import (
    Finding,
    Grant,
    Guest,
    GuestKind,
    GuestResult,
    GuestState,
    HandoffReport,
    HandoffState,
    RegionState,
    Severity,
)

SUSPENDED = b"suspended"
"""What custody says of the state of a guest that was suspended when it was saved."""


@dataclass
class Landing:
    """What a handoff came to: what the ledger learns, what does not match, and the report.

    ``told``: the guests that memconsole-resume had go on, whatever became of them: what each was saved as is behind it.
    """

    change: StateChange
    report: HandoffReport
    findings: list[Finding] = field(default_factory=list)
    manifest: Manifest | None = None
    moved: frozenset[str] = frozenset()
    clock: Clock | None = None
    told: frozenset[str] = frozenset()

    @property
    def waiting(self) -> frozenset[str]:
        """The guests that stay paused until it is settled."""
        return (
            frozenset(each.guest.name for each in self.manifest.guests if each.waits) if self.manifest else frozenset()
        )


def has_landed(desk: needs.InCustody) -> bool:
    """Whether memconsole-resume was here, and nobody has taken over yet what it did."""
    return RESUME in desk.custody.names()


def land(desk: Handover, progress: ReportWriter | None = None) -> Landing:
    """What the ledger is to learn after memconsole-resume; ``progress``: of a rehearsal in this very process.

    Raises:
        NotFound: there is no record of a resume. BadFile: it cannot be read.
    """
    arrived = bootplan.moment()
    resume = bootplan.read_resume(stored.stored_content(desk, RESUME))
    described, findings = stored.stored_manifest(desk)
    jumped = resume.mode != "rehearse"
    regions = [region for region in boots.regions_found(desk) if region is not None]
    guests = {each.guest: each for each in resume.guests}
    known = tuple(_guest_entry(guest, guests.get(guest.name), jumped=jumped) for guest in desk.state.guests.values())
    served = tuple(grant for grant in desk.state.grants.values() if grant.lazy and (jumped or grant.guest in guests))
    change = StateChange(
        regions=tuple(replace(region, state=RegionState.RESTORED) if jumped else region for region in regions),
        guests=known,
        grants=tuple(replace(grant, lazy=False) for grant in served),
        without_quarantine=tuple(desk.state.quarantine) if jumped else (),
        boot=boots.boot_id(desk.root),
    )
    findings += list(_findings(resume))
    made = _report(desk, described, resume, progress, arrived)
    made = replace(made, notes=(*made.notes, *(_served_no_more(grant) for grant in served)))
    moved = frozenset(each.subject for each in resume.findings if each.id == "pages-moved")
    clock = None if described is None else Clock(described.began, _clock_pairs(described, resume, arrived))
    told = frozenset(each.guest for each in resume.guests if each.told)
    return Landing(change, made, findings, described, moved, clock, told)


def reconcile(desk: Handover, landing: Landing) -> None:
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
        returned = devices.rebuild_devices(desk, described, clock)
        waiting = returned.waiting
        landing.findings += returned.findings
        made = replace(
            made,
            devices=stored.newest_devices(made.devices, returned.devices),
            windows=returned.windows or made.windows,
        )
        if not contents:
            late = _resume_guests(desk, described, clock, waiting)
        if not again:
            regions, found = verify.compare_regions(desk, described, landing.moved)
            landing.findings += found
            made = replace(made, regions=regions)
    passed("adopt.compared")
    stored.store_report(desk, replace(made, state=HandoffState.DONE))
    passed("adopt.reported")
    if described is not None and clock is not None:
        if contents:
            late = _resume_guests(
                desk, described, clock, waiting | report.spoiled_guests(made, desk.state.grants.values())
            )
        made = report.with_waiting(report.with_blackouts(made, late.items(), "its VMM"), waiting)
        stored.store_report(desk, replace(made, state=HandoffState.DONE))
        devices.reconcile(desk, described)
    _tidy(desk, landing.report)


def start_waiting_guests(desk: Handover) -> list[str]:
    """The guests that a jump brought here, and whose VMMs are started only once their devices can be given to them.

    One whose memory is not what it was is left to whoever resumes it by hand.
    """
    if not any(name.startswith(devices.IOVA) for name in desk.custody.names()):
        return []
    described, _ = stored.stored_manifest(desk)
    if described is None or described.report.kind != "run":
        return []
    made = desk.handoff
    spoiled = report.spoiled_guests(made, desk.state.grants.values()) if made is not None else set()
    stopped = [each.guest for each in described.guests if each.guest.kind is GuestKind.QEMU]
    names = [guest.name for guest in stopped if guest.name not in spoiled]
    return [name for name in names if name in desk.state.guests and devices.missing_devices(desk, described, name)]


def _tidy(desk: Handover, made: HandoffReport) -> None:
    """Drop from custody what nobody needs any more; last of all the record, which becomes the word that it was used."""
    back = {guest.name for guest in made.guests if guest.back}
    for name in desk.custody.names():
        saved = name.removeprefix("state:")
        used = saved != name and (saved in back or desk.live_guest(saved) is not None)
        if used or name.startswith(("session:", "again:", STARTED)):
            desk.custody.drop(name)
            passed(f"adopt.dropped.{name}")
    if made.kind == "run":
        fd, payload = desk.custody.get(RESUME)
        desk.custody.put(LANDED, fd, payload)
        os.close(fd)
        passed("adopt.said")
    desk.custody.drop(RESUME)


def undo_handoff(desk: Handover, intent: Intent, powers: Powers) -> list[str]:
    """Undo what a control process that died did of a handoff, before the jump; the guests that are to be resumed."""
    with steplog.suppressed("what the handoff left in arenas is taken back", MemconsoleError):
        take_back(desk)  # before anybody goes on: it means the guests as they stand still
    for bdf in desk.address_spaces.quiesced:
        with steplog.suppressed(f"the bus is given back to device {bdf}", MemconsoleError):
            desk.address_spaces.restart(bdf)
    ended = []
    for guest in desk.state.guests.values():
        live = desk.live_guest(guest.name)
        if live is None or not _is_vm(guest) or guest.state is GuestState.PAUSED:
            continue
        with steplog.suppressed(f"guest {guest.name} runs again where it was", MemconsoleError):
            desk.connected(guest.name)
            if is_qemu(live) and live.is_saved() and _was_suspended(desk, guest.name):
                ended.append(guest)
            elif live.state() is GuestState.PAUSED:
                live.resume()
    end_guests(desk, ended)
    again = [guest.name for guest in desk.state.guests.values() if _is_left(desk, guest)]
    for name in desk.custody.names():
        guest_of = name.removeprefix("state:")
        if name.startswith(("session:", devices.IOVA)) or name == MANIFEST or guest_of not in {name, *again}:
            desk.custody.drop(name)
    if not isinstance(intent.action, HandoffRehearse):
        with steplog.suppressed("the image is unloaded", MemconsoleError):
            powers.unload()
    return again


def _was_suspended(desk: needs.InCustody, guest: str) -> bool:
    """Whether custody has the state of a guest that was suspended when it was saved."""
    with contextlib.suppress(NotFound):
        fd, payload = desk.custody.get(f"state:{guest}")
        os.close(fd)
        return payload == SUSPENDED
    return False


def _is_left(desk: Handover, guest: Guest) -> bool:
    """Whether a guest was ended because it could not go on from where it was saved."""
    return desk.live_guest(guest.name) is None and _was_suspended(desk, guest.name)


def interrupted(desk: Handover, action: HandoffAction) -> bool:
    """Whether a rehearsal died after it had ended a VMM that it had saved."""
    if not isinstance(action, HandoffRehearse) or MANIFEST not in desk.custody.names():
        return False
    described, _ = stored.stored_manifest(desk)
    return described is not None and any(desk.live_guest(each.guest.name) is None for each in described.guests)


def carry_on(desk: Handover, powers: Powers) -> Landing:
    """Start what an interrupted rehearsal had ended, and land."""
    described, _ = stored.stored_manifest(desk)
    guests = [each.guest for each in described.guests] if described is not None else []
    end_guests(desk, guests)
    powers.revive(desk.runtime_dir, MANIFEST)
    return land(desk)


def end_guests(desk: Handover, guests: Iterable[Guest]) -> None:
    """Kill the VMMs of guests that were saved; their userfaultfds lead nowhere then."""
    for guest in guests:
        live = desk.live_guest(guest.name)
        if live is not None:
            live.kill()
            desk.remove_guest(guest.name)
        for grant in desk.state.grants_of(guest=guest.name):
            desk.userfaults.drop_uffd(grant.id)


def adopt_processes(desk: Handover, guests: Sequence[Guest], *, windows: bool = False) -> None:
    """Adopt the processes of guests that this control process started again; ``windows``: give them those at once."""
    for guest in guests:
        if guest.pid is not None and _is_vm(guest):
            desk.remove_guest(guest.name)
            with steplog.suppressed(f"guest {guest.name} is taken over", Gone):
                desk.adopt_guest(guest, windows=windows)


# --- inside ---------------------------------------------------------------------------------------------------------


def _is_vm(guest: Guest) -> bool:
    """Whether memconsole runs it."""
    return guest.kind in {GuestKind.CANARY, GuestKind.QEMU}


def _served_no_more(grant: Grant) -> str:
    """A lazy grant's userfaultfd ended with the process that made it."""
    return f"{grant.id}: {grant.guest} had it lazily; the kernel serves its faults from now on"


def _guest_entry(guest: Guest, back: Resumed | None, *, jumped: bool) -> Guest:
    """A guest as the process it is now; one that is no more has none."""
    if back is not None and back.state != "held":
        return replace(guest, pid=back.pid, start_ticks=back.start_ticks, ended="")
    if back is None and not jumped:
        return guest
    return replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)


def _findings(resume: Resume) -> Iterator[Finding]:
    for each in resume.findings:
        if each.id == "guest-held":
            continue  # for as long as it waits: see verbs/handoff.py
        severity = Severity.WARNING if each.id in _LESSER else Severity.ERROR
        remedy = _REMEDIES.get(each.id, "memconsole guest resume NAME tries again: regions and state are in custody")
        yield Finding(f"handoff-{each.id}", severity, each.subject, f"{each.subject}: {each.text}", "resume", remedy)


_LESSER = {"device-busy", "name-taken", "session-unfinished", "session-kept"}
_REMEDIES = {
    "device-busy": "have that program close it before the next handoff",
    "plan-broken": "memconsole guest resume NAME starts each guest: everything is in custody",
    "session-kept": "nothing need be done: it is closed once custody holds nothing that came in it",
    "session-unfinished": "nothing need be done: it is closed once custody holds nothing that came in it",
}
_RESUME = {
    "device": "wait until another process closes /dev/liveupdate",
    "keeper": "start the keeper",
    "planned": "read the boot plan",
    "retrieved": "take everything into custody",
    "verified": "compare where every page is",
    "started": "start the VMMs",
    "resumed": "resume the guests",
    "finished": "finish the sessions",
}


def _report(
    desk: Handover, described: Manifest | None, resume: Resume, progress: ReportWriter | None, arrived: ClockReading
) -> HandoffReport:
    if described is None:
        release = os.uname().release
        kind = "rehearse" if resume.mode == "rehearse" else "run"
        made = HandoffReport(kind, HandoffState.DONE, time.time_ns(), to_kernel=release)  # type: ignore[arg-type]
        saved = (desk.state.guests[name] for name in stored.saved_guests(desk))
        guests = tuple(report.guest_result(GuestResult(each.name, each.kind, each.memory), resume) for each in saved)
        unknown = "the manifest cannot be read: what happened before the jump is not known"
        notes = (unknown, *(f"{each.subject}: {each.text}" for each in resume.findings))
        return replace(made, guests=guests, notes=notes)
    clock = Clock(described.began, _clock_pairs(described, resume, arrived))
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
                report.phase("jump", "leave this kernel", written, booted),
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
        guests=tuple(report.guest_results(base.guests, described, resume, clock)),
        notes=tuple(f"{each.subject}: {each.text}" for each in resume.findings),
        state=HandoffState.RUNNING,
    )


def _clock_pairs(described: Manifest, resume: Resume, arrived: ClockReading) -> list[tuple[ClockReading, ClockReading]]:
    pairs = [(described.began, described.written)]
    if resume.phases:
        pairs.append((resume.phases[0].at, arrived))
    return pairs


def _resume_guests(desk: Handover, described: Manifest, clock: Clock, held: Collection[str]) -> dict[str, int]:
    """Resume the guests that waited, but for those that are held; for how long each stood still, in ns."""
    late: dict[str, int] = {}
    for stopped in described.guests:
        name = stopped.guest.name
        live = desk.live_guest(name)
        if live is None or not stopped.waits or name in held:
            continue
        with steplog.suppressed(f"{name} goes on", MemconsoleError):
            desk.connected(name)
            if live.state() is GuestState.PAUSED:
                live.resume()
                passed(f"adopt.goes-on.{name}")
                late[name] = clock.between(stopped.at, bootplan.moment())
    return late
