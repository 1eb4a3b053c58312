"""The report of a handoff: its phases as they pass, each guest's blackout, and all of it as a picture of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from msgspec.structs import replace

from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import ClockReading, Resume
from memconsole.backend.handoff.manifest import Manifest
from memconsole.model import Grant, GuestKind, GuestResult, HandoffReport, HandoffState, Phase

CUSTODY = "report"
"""What the report of the last handoff is called in custody."""

BEFORE = (
    ("check", "check every condition"),
    ("load", "load the next kernel"),
    ("preserve", "preserve the regions while guests run"),
    ("place", "record where every page is"),
    ("iova", "record where the devices' page tables lead"),
    ("tell", "have services save, and end"),
    ("stream", "take the state of libvirt's guests while they run; each stands still at its end"),
    ("pause", "stop the guests"),
    ("save", "save vCPU and device state of the guests"),
    ("quiesce", "switch bus mastering off for the devices"),
    ("manifest", "preserve state, ledger and manifest"),
    ("jump", "boot the next kernel"),
)
"""The phases on this side, in order."""
BLACKOUT = frozenset({"stream", "pause", "save", "quiesce", "manifest", "jump", "end", "early"})


class ReportWriter:
    """A report that is being made; ``show`` gets it whole each time it changes."""

    def __init__(self, report: HandoffReport, show: Callable[[HandoffReport], None]) -> None:
        self._show = show
        self._began = time.monotonic_ns()
        self.report = report
        show(report)

    def now(self) -> int:
        """Nanoseconds since it began."""
        return time.monotonic_ns() - self._began

    def phase(self, id: str, text: str) -> None:
        """The phase of this name begins, unless it is the present one; the one before it ends."""
        if self.report.phases and self.report.phases[-1].id == id:
            return
        now = self.now()
        # a rehearsal reads where pages are while guests stand still
        still = any(phase.blackout for phase in self.report.phases)
        begun = Phase(id, text, now, blackout=still or id in BLACKOUT)
        self._put(replace(self.report, phases=(*_ended(self.report.phases, now), begun)))

    def fail(self, why: str) -> None:
        """The last phase ends, and so does the handoff."""
        phases = _ended(self.report.phases, self.now())
        self._put(replace(self.report, phases=phases, state=HandoffState.FAILED, why=why))

    def _put(self, report: HandoffReport) -> None:
        self.report = report
        self._show(report)


class Clock:
    """Nanoseconds since a handoff began, of moments under either kernel."""

    def __init__(self, began: ClockReading, pairs: Sequence[tuple[ClockReading, ClockReading]]) -> None:
        self._began = began
        self._pairs = pairs

    def at(self, moment: ClockReading) -> int:
        """Since it began."""
        return self.between(self._began, moment)

    def now(self) -> int:
        """Since it began, until now."""
        return self.at(bootplan.moment())

    def between(self, start: ClockReading, stop: ClockReading) -> int:
        """From one moment to another."""
        return bootplan.between(start, stop, self._pairs)


def phase(id: str, text: str, start: int, end: int, *, blackout: bool = True) -> Phase:
    """A phase that has passed."""
    return Phase(id, text, start, max(start, end), blackout)


def guest_results(
    guests: Iterable[GuestResult], manifest: Manifest, resume: Resume, clock: Clock
) -> Iterator[GuestResult]:
    """What became of each guest; its blackout as it looked from outside, until it says itself."""
    moments = {each.guest: each.at for each in resume.guests}
    stopped = {each.guest.name: each for each in manifest.guests}
    told = {each.guest for each in resume.guests if each.told}
    for guest in guests:
        if guest.kind is GuestKind.PROCESS or (guest.kind is GuestKind.FOREIGN and guest.name not in told):
            yield _started_later(guest, resume)
            continue
        now = guest_result(guest, resume)
        if now.back and now.name in stopped:
            was = stopped[now.name]
            now = replace(now, blackout_ns=clock.between(was.at, moments[now.name]) + was.stood_ns, by="its VMM")
        yield now


def _started_later(guest: GuestResult, resume: Resume) -> GuestResult:
    """One that the control process, or libvirt, starts; one in the fast lane that was not started takes the other."""
    why = next((each.why for each in resume.guests if each.guest == guest.name), "")
    if guest.kind is GuestKind.PROCESS or not why:
        return guest
    return replace(guest, lane=f"restored by libvirt, for memconsole-resume did not start it: {why}")


def guest_result(guest: GuestResult, resume: Resume) -> GuestResult:
    """A guest as the resume left it: back, or why not."""
    now = next((each for each in resume.guests if each.guest == guest.name), None)
    if now is None or now.state == "held":
        return replace(guest, back=False, why=now.why if now is not None else "its VMM was not started")
    return replace(guest, back=True, pid=now.pid, why="")


def _ended(phases: tuple[Phase, ...], now: int) -> tuple[Phase, ...]:
    if not phases or phases[-1].end_ns is not None:
        return phases
    return (*phases[:-1], replace(phases[-1], end_ns=now))


def with_blackouts(report: HandoffReport, blackouts: Iterable[tuple[str, int]], by: str = "guest") -> HandoffReport:
    """A report with the blackouts of guests, as they say themselves, or who ``by`` names."""
    said = dict(blackouts)
    guests = tuple(
        replace(guest, blackout_ns=said[guest.name], by=by) if guest.back and guest.name in said else guest
        for guest in report.guests
    )
    return report if guests == report.guests else replace(report, guests=guests)


def with_waiting(report: HandoffReport, waiting: Collection[str]) -> HandoffReport:
    """A report in which guests whose devices are not back are not back either."""
    guests = tuple(
        replace(guest, back=False, blackout_ns=None, by="", why="it is paused until its devices are back")
        if guest.name in waiting
        else guest
        for guest in report.guests
    )
    return replace(report, guests=guests)


def spoiled_guests(report: HandoffReport, grants: Iterable[Grant]) -> set[str]:
    """The guests that have grants of regions whose pages are elsewhere, or whose contents are others."""
    wrong = {each.name for each in report.regions if each.same is False or each.contents is False}
    return {grant.guest for grant in grants if grant.region in wrong}


def longest(report: HandoffReport) -> GuestResult | None:
    """The guest that stood still the longest."""
    known = [guest for guest in report.guests if guest.blackout_ns is not None]
    return max(known, key=lambda guest: guest.blackout_ns or 0, default=None)
