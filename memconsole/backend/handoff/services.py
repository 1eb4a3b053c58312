"""Services on their way through a handoff: told to save before guests stand still, started again after it.

Custody has a mark of each from before it is told until it runs again (``told:NAME``, a :class:`Told`), and a jump
carries the marks. So whatever dies or fails meanwhile, the control process that finds a mark and no process starts the
service (:mod:`memconsole.backend.upkeep`): one that was still saving when a handoff was taken back, once it has ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from msgspec.structs import replace

from memconsole.actions import GuestAttach, GuestResume
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.guests import programs, service, units
from memconsole.backend.guests.base import GuestDriver, Process, is_process
from memconsole.backend.handoff import bootplan, manifest, stored
from memconsole.backend.handoff.bootplan import ClockReading
from memconsole.backend.handoff.facets import HandoffReporting
from memconsole.backend.handoff.report import Clock
from memconsole.backend.steps import Step
from memconsole.backend.work import PreparedAction
from memconsole.errors import BadFile, GuestError, NotFound
from memconsole.model import Guest, GuestKind, GuestResult, GuestState, HandoffReport, Value
from memconsole.units import format_duration

TOLD = "told:"
"""Before a service's name: the mark that it was told to save for a handoff, and is to be started again."""
LATER_NS = 1_100_000_000
"""How much later than the end of its saving a program that compares seconds may be started."""
WAITS = "it is not started again yet"


class Told(Value, frozen=True):
    """When a service had saved; until then, when it was told to."""

    at: ClockReading


class ServiceSaving(needs.LiveGuests, needs.InCustody, Protocol):
    """Services are told to save."""


class ServiceReporting(needs.LedgerState, HandoffReporting, Protocol):
    """Services run again after a handoff."""


def marked(desk: needs.InCustody) -> list[str]:
    """The services that were told, and do not run again yet."""
    return [name.removeprefix(TOLD) for name in desk.custody.names() if name.startswith(TOLD)]


def when_told(desk: needs.InCustody, name: str) -> Told | None:
    """When a service was told; None where it was not, or where nobody can read it."""
    with contextlib.suppress(NotFound, BadFile):
        fd, payload = desk.custody.get(TOLD + name)
        os.close(fd)
        return payloads.read(TOLD + name, payload, Told)
    return None


def unmark(desk: needs.InCustody, name: str) -> None:
    """A service runs again, or is no guest any more."""
    with contextlib.suppress(NotFound):
        desk.custody.drop(TOLD + name)


def early_by(desk: needs.InCustody, guest: Guest) -> int:
    """Nanoseconds that the host's clock has to go on before a service may be started; 0: it may be.

    A kexec reads the clock anew from the RTC: it may be behind where it was, or in the same second.
    """
    found = when_told(desk, guest.name)
    program = programs.recognised(_words(guest))
    if found is None or program is None or not program.clock:
        return 0
    return max(0, found.at.realtime_ns + LATER_NS - bootplan.moment().realtime_ns)


def _words(guest: Guest) -> tuple[str, ...]:
    """The words by which a guest's program is known: its process's, else those it is started with."""
    return guest.command or (guest.service.command if guest.service is not None else ())


def program_of(guest: Guest) -> programs.Program | None:
    """What is known of a guest's program, as it is told to save."""
    return programs.recognised(_words(guest), guest.service.save_signal if guest.service is not None else "")


def saving(desk: ServiceSaving, work: PreparedAction, guest: Guest) -> Iterator[Step]:
    """The step that tells a service to save; it is started again where the handoff is taken back."""
    name, how = guest.name, guest.service
    if how is None:
        return

    def tell() -> None:
        live = _process(desk, name)
        _mark(desk, name)
        try:
            service.tell(name, how, live)
        except BaseException:
            unmark(desk, name)
            raise

    def undo() -> None:
        live = desk.live_guest(name)
        if not is_process(live) or live.ends(0):
            work.then.append(GuestResume(name))
        # else it is saving: whoever finds its mark starts it once it has ended

    way = how.unit or how.save_signal
    also = f"run `{how.save}`, then " if how.save else ""
    yield Step(f"tell-{name}", f"have {name} save: {also}stop it ({way})", tell, undo, "start it again")


def saved(desk: ServiceSaving, guest: Guest) -> Iterator[Step]:
    """The step that waits until a service has saved, which is when its process has ended."""
    name, how = guest.name, guest.service
    if how is None:
        return

    def do() -> None:
        live = _process(desk, name)
        if not live.ends(how.within):
            why = f"its process {live.pid} has not ended within {how.within:g} s"
            remedy = (
                f"nothing is lost: it is started again once it has; give it more time (--within), or see {name}'s log"
            )
            raise GuestError(f"service {name} has not saved", why, remedy)
        _mark(desk, name)

    yield Step(f"saved-{name}", f"wait until {name} has saved and ended, {how.within:g} s at most", do)


def _process(desk: ServiceSaving, name: str) -> Process:
    live: GuestDriver | None = desk.live_guest(name)
    if not is_process(live):
        raise NotFound(f"service {name} is gone", "its process ended", f"memconsole guest resume {name}")
    return live


def _mark(desk: needs.InCustody, name: str) -> None:
    fd = manifest.memfd("memconsole-told", b"")
    try:
        payloads.put(desk.custody, TOLD + name, fd, Told(bootplan.moment()))
    finally:
        os.close(fd)


def results(desk: needs.LedgerState, guests: Iterable[Guest]) -> tuple[GuestResult, ...]:
    """The services of a handoff, as its report begins with them."""
    grants = desk.state.grants_of
    return tuple(
        GuestResult(each.name, each.kind, sum(grant.length for grant in grants(guest=each.name)), why=WAITS)
        for each in guests
    )


def report_back(desk: ServiceReporting, name: str, pid: int | None, told: Told | None, why: str = "") -> None:
    """Have the report of the handoff say that a service runs again, or ``why`` it does not."""
    if told is None:
        return
    described, _ = stored.stored_manifest(desk)
    now = bootplan.moment()
    began = (described.began, described.written) if described is not None else (told.at, now)
    blackout = None if why else Clock(told.at, [began, (now, now)]).between(told.at, now)

    def changed(made: HandoffReport) -> HandoffReport:
        guests = tuple(
            replace(each, back=not why, pid=pid, blackout_ns=blackout, by="" if why else "its process", why=why)
            if each.name == name and each.kind is GuestKind.PROCESS
            else each
            for each in made.guests
        )
        return replace(made, guests=guests)

    stored.amend_report(desk, changed)


def why_early(guest: Guest, early: int) -> GuestError:
    """Why a service is not started yet: it would take its saved memory for one of the future."""
    return GuestError(
        f"service {guest.name} is not started: it would begin without its data",
        f"this host's clock is {format_duration(early)} behind the moment at which it saved, and it compares them",
        f"set the clock (chronyc makestep); it is started by itself then, or by memconsole guest resume {guest.name}",
        code="ClockBehind",
    )


def runs(guest: Guest, state: GuestState) -> bool:
    """Whether a guest is a service that can be told to save."""
    return guest.service is not None and not guest.is_user and state is GuestState.RUNNING


def due(desk: ServiceSaving, tried: Collection[str]) -> GuestAttach | GuestResume | None:
    """What is to be done for a service that does not run: start it after a handoff, or take hold of its unit's process.

    ``tried``: those for which it was done, and which somebody has to look after.
    """
    waiting = set(marked(desk))
    for guest in desk.state.guests.values():
        live = desk.live_guest(guest.name)
        if guest.service is None or (is_process(live) and not live.ends(0)):
            continue
        if guest.name in waiting:
            if guest.name not in tried and not early_by(desk, guest):
                return GuestResume(guest.name)
        elif guest.service.unit and (pid := units.process(guest.service.unit)) is not None:
            return GuestAttach(guest.name, pid)
    return None
