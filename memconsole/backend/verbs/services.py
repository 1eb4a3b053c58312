"""``guest service``, and ``guest resume`` of one that does not run: guests known by a unit or a command."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from typing import Protocol

from msgspec.structs import replace

from memconsole.actions import GuestAttach, GuestService
from memconsole.backend import needs
from memconsole.backend.guests import service, units
from memconsole.backend.guests.base import is_process
from memconsole.backend.handoff import services as saved
from memconsole.backend.handoff.facets import HandoffReporting
from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import EventRecord, Recorded, StateChange
from memconsole.backend.peers.handle import Handle
from memconsole.backend.verbs import users
from memconsole.backend.verbs.common import free_name
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import GrantState, Guest, GuestKind, GuestState, Service

CLOCK_S = 5.0
"""Seconds a start waits for the host's clock to be past the moment at which the service saved."""
_LOOK_S = 0.05


class ServiceStarting(needs.GuestStarting, needs.FaultServing, needs.GrantFiles, HandoffReporting, Protocol):
    """What starting a service needs."""


def described(work: PreparedAction, action: GuestService | GuestAttach, pid: int | None = None) -> Service | None:
    """How a guest is saved and started, by what an Action says of it; or refusals.

    Of a process that runs (``pid``), what is not said is as it is: its words, its user, its directory.
    """
    number = service.signal_of(action.save_signal) if action.save_signal else service.signal_of("SIGTERM")
    if number is None:
        work.refuse(
            "NoSuchSignal",
            f"there is no signal {action.save_signal}",
            "signal(7) has none of this name",
            "choose another",
        )
        return None
    if action.unit and action.exec:
        work.refuse("TwoWays", "a service is a unit or a command", "both were named", "leave one of them out")
        return None
    if not action.within > 0:
        work.refuse(
            "BadDeadline",
            f"a service cannot save in {action.within} seconds",
            "it needs more time",
            "write --within 60",
        )
        return None
    made = Service(
        unit=action.unit,
        save_signal=number.name,
        save=action.save,
        ready=action.ready,
        within=action.within,
    )
    try:
        if action.unit:
            return _of_unit(made, action)
        return _of_command(work, made, action, pid)
    except MemconsoleError as error:
        work.refuse("NoService", error.what, error.why, error.remedy)
    except (KeyError, ValueError) as error:
        work.refuse(
            "NoService", "the service cannot be described", str(error), "name a user of this host, and close quotes"
        )
    return None


def _of_unit(made: Service, action: GuestService | GuestAttach) -> Service:
    found = units.shown(action.unit, "LoadState", "User", "Group")
    if found.get("LoadState") != "loaded":
        why = f"systemd says {found.get('LoadState') or 'nothing'} of it"
        raise GuestError(f"there is no unit {action.unit}", why, "systemctl list-unit-files lists them")
    user = getattr(action, "user", "") or found.get("User", "")
    return replace(made, **_of_user(user)) if user else made


def _of_command(
    work: PreparedAction, made: Service, action: GuestService | GuestAttach, pid: int | None
) -> Service | None:
    words = tuple(shlex.split(action.exec))
    if pid is None:
        if not words:
            work.refuse("NoCommand", "a service is a unit or a command", "none was named", "say --unit U or --exec CMD")
            return None
        user = getattr(action, "user", "")
        return replace(made, command=words, **(_of_user(user) if user else {}))
    status = census.status("/", pid)
    group = os.stat(f"/proc/{pid}").st_gid  # noqa: PTH116 - of the process, as the kernel shows it
    at = os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115
    return replace(made, command=words or census.command("/", pid), user=status.uid, group=group, directory=at)


def _of_user(user: str) -> dict[str, int]:
    found = users.user(user)
    return {"user": found.uid, "group": found.gid}


def add(desk: ServiceStarting, action: GuestService) -> PreparedAction:
    """Have a unit or a command as a guest: ``note`` takes hold of its process, if it runs; nothing is started."""
    work = PreparedAction(action.name, f"service {action.name} is a guest")
    free_name(work, desk, action.name, region=False, guest=True)
    how = described(work, action)
    if how is None or work.refusals:
        return work
    guest = Guest(action.name, GuestKind.PROCESS, GuestState.GONE, None, created_ns=time.time_ns(), service=how)
    work.change = StateChange(guests=(guest,))

    def note() -> None:
        pid = units.process(how.unit) if how.unit else None
        if pid is None:
            work.text += f", and does not run; memconsole guest resume {guest.name} starts it"
            return
        live = desk.attach_guest(guest.name, pid)
        words = census.command("/", pid)
        now = replace(guest, pid=pid, start_ticks=live.start_ticks, state=GuestState.RUNNING, command=words)
        work.change = StateChange(guests=(now,))

    what = f"unit {how.unit}" if how.unit else shlex.join(how.command)[:60]
    work.step("note", f"take {what} as guest {guest.name}", note, lambda: desk.remove_guest(guest.name), "forget it")
    return work


def starts(desk: needs.LiveGuests, guest: Guest) -> bool:
    """Whether a guest is a service that does not run."""
    live = desk.live_guest(guest.name)
    return guest.service is not None and (live is None or live.state() is GuestState.GONE)


def start(desk: ServiceStarting, guest: Guest) -> PreparedAction:
    """Start a service: ``start`` runs it with its grants, ``ready`` waits until it answers."""
    work = PreparedAction(guest.name, f"guest {guest.name} runs")
    how = guest.service
    if how is None or not (how.unit or how.command):
        work.refuse(
            "NoCommand",
            f"service {guest.name} cannot be started",
            "the ledger names neither a unit nor a command for it",
            "start it, then memconsole guest attach NAME --pid PID",
        )
        return work
    told = saved.when_told(desk, guest.name)

    def run() -> Recorded[None]:
        try:
            _await_clock(desk, guest)
            yield from _run_unit(desk, work, guest, how) if how.unit else _run_command(desk, work, guest, how)
        except MemconsoleError as error:
            saved.report_back(desk, guest.name, None, told, str(error))
            raise
        saved.unmark(desk, guest.name)

    def ready() -> None:
        live = desk.live_guest(guest.name)
        if not is_process(live):
            return
        try:
            service.await_ready(guest.name, how, live, desk.directory(guest.name) / "log")
        except MemconsoleError as error:
            saved.report_back(desk, guest.name, live.pid, told, str(error))
            raise
        saved.report_back(desk, guest.name, live.pid, told)

    what = f"systemctl start {how.unit}" if how.unit else f"start {shlex.join(how.command)[:60]}"
    grants = ", ".join(grant.id for grant in desk.state.grants_of(guest=guest.name)) or "no grant"
    work.step("start", f"{what} with {grants}", run)
    work.step("ready", f"wait until {guest.name} answers", ready)
    return work


def _await_clock(desk: ServiceStarting, guest: Guest) -> None:
    """Wait for the clock, where the program starts cold otherwise.

    Raises:
        GuestError: it is too far behind to wait for (``ClockBehind``).
    """
    while early := saved.early_by(desk, guest):
        if early > CLOCK_S * 1e9:
            raise saved.why_early(guest, early)
        time.sleep(min(_LOOK_S, early / 1e9))


def _run_unit(desk: ServiceStarting, work: PreparedAction, guest: Guest, how: Service) -> Recorded[None]:
    if desk.mount is not None:
        desk.mount.sync()
    yield from _joined(desk, work, guest, units.start(how.unit, how.within))


def _run_command(desk: ServiceStarting, work: PreparedAction, guest: Guest, how: Service) -> Recorded[None]:
    """Its process is the guest's, and its files are its user's, before it is the program."""
    with service.GatedStart(how, desk.directory(guest.name) / "log") as gate:
        yield from _joined(desk, work, guest, gate.pid)
        if desk.mount is not None:
            desk.mount.sync()
        gate.open()


def _joined(desk: ServiceStarting, work: PreparedAction, guest: Guest, pid: int) -> Recorded[None]:
    with contextlib.closing(Handle(pid)) as handle:
        words = guest.service.command if guest.service is not None else ()
        now = replace(
            guest,
            pid=pid,
            start_ticks=handle.start_ticks,
            state=GuestState.RUNNING,
            ended="",
            command=words or census.command("/", pid),
        )
    grants = desk.state.grants_of(guest=guest.name)
    desk.remove_guest(guest.name)
    for grant in grants:
        desk.userfaults.drop_uffd(grant.id)
    desk.adopt_guest(now)
    offered = tuple(replace(grant, state=GrantState.OFFERED) for grant in grants)
    change = StateChange(guests=(now,), grants=offered)
    work.change = work.lasting = change
    text = f"guest {guest.name} is process {pid}, with {len(grants)} grants"
    yield EventRecord(time.time_ns(), "started", guest.name, text, change=change)
