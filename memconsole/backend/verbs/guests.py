"""``guest start|attach|stop|pause|resume``: who owns regions, and how they come and go."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from memconsole.actions import GuestAttach, GuestHelper, GuestPause, GuestResume, GuestStart, GuestStop, Reserve
from memconsole.backend import needs
from memconsole.backend.custody import suspended
from memconsole.backend.guests.base import STOP_S
from memconsole.backend.guests.commandline import BINARY, with_accelerator, with_agent
from memconsole.backend.handoff.carried_back import Returning
from memconsole.backend.handoff.facets import Handover
from memconsole.backend.handoff.services import unmark
from memconsole.backend.kernel import census, tree
from memconsole.backend.ledger.state import Recorded, StateChange
from memconsole.backend.observe.reach import RegionReaching
from memconsole.backend.peers.handle import Handle, stat
from memconsole.backend.revoke import Ladder, Revoking, suspend_vm
from memconsole.backend.verbs import dma, handoff, services
from memconsole.backend.verbs.common import at_its_manager, free_name, is_vm, known_guest, refuse_adopted
from memconsole.backend.verbs.grants import OFFER_S, GrantOffers, GrantTaking, offer_grant, refuse_beside_strangers
from memconsole.backend.verbs.regions import creation
from memconsole.backend.work import PreparedAction
from memconsole.errors import Gone, MemconsoleError
from memconsole.model import Access, Grant, GrantState, Guest, GuestKind, GuestState, Helper, Rung
from memconsole.units import format_size


class VmStarting(GrantOffers, needs.OwnRegionFds, needs.GuestStarting, needs.DeviceReaching, Protocol):
    """What ``guest start`` needs."""


class HelperCounting(needs.LiveGuests, RegionReaching, Protocol):
    """What ``guest helper`` needs."""


class ProcessAttaching(HelperCounting, needs.GuestStarting, needs.FaultServing, Protocol):
    """What ``guest attach`` needs."""


def _refuse_vmm(work: PreparedAction, action: GuestStart) -> None:
    if action.vmm not in {"canary", "qemu"}:
        work.refuse("NoSuchVmm", f"there is no VMM {action.vmm}", "the VMMs are canary and qemu", "choose one of these")
    elif action.vmm == "qemu" and shutil.which(BINARY) is None:
        work.refuse("NoVmm", f"{BINARY} is not installed", "it is not on the PATH", "apt install qemu-system-x86")
    if action.agent and action.vmm != "qemu":
        work.refuse(
            "NoAgent",
            f"{action.vmm} has no guest agent",
            "only QEMU has a channel for one",
            "say --vmm qemu, or leave it out",
        )


def start(desk: VmStarting, action: GuestStart) -> PreparedAction:
    """Start a VM: its region is made (``create``, ``hold``), ``spawn`` runs it, ``offer`` gives a canary its RAM.

    A device it is given is opened before (``bind``, ``hand``): QEMU lets it reach its RAM itself.
    """
    name = action.name
    work = PreparedAction(name, f"guest {name} runs on {format_size(action.memory)} ({action.vmm})")
    free_name(work, desk, name, region=True, guest=True)
    _refuse_vmm(work, action)
    dma.refuse_handing(work, desk, action)
    creation(work, desk, Reserve(name, action.memory, action.store))
    if work.refusals:
        return work
    now = time.time_ns()
    grant = Grant(
        id=f"g{desk.state.next_grant}",
        region=name,
        guest=name,
        offset=0,
        length=action.memory,
        access=Access.RW,
        state=GrantState.OFFERED,
        gpa=0,
        dma=action.device,
        created_ns=now,
    )
    work.refusals += desk.stores[action.store].grant_refusals(grant)
    refuse_beside_strangers(work, desk, action)
    if work.refusals:
        return work
    dma.hand_device(work, desk, grant)
    kind = GuestKind(action.vmm)
    args = (*(with_agent(desk.directory(name).absolute()) if action.agent else ()), *action.args)
    guest = Guest(name, kind, GuestState.STARTING, None, memory=action.memory, command=args, created_ns=now)
    work.aims = replace(work.aims, guests=(guest,), grants=(grant,))

    def spawn() -> None:
        words = with_accelerator(args) if kind is GuestKind.QEMU else args
        live = desk.start_guest(guest, grant, words)
        running = replace(guest, state=GuestState.RUNNING, pid=live.pid, start_ticks=live.start_ticks, command=words)
        mapped = replace(grant, state=GrantState.MAPPED)
        work.change = replace(work.change, guests=(running,), grants=(mapped,))

    def undo() -> None:
        live = desk.live_guest(name)
        if live is not None:
            live.kill()
        forget(desk, name)

    given = f" and device {action.device}" if action.device is not None else ""
    what = f"start {BINARY} with {name} as its RAM{given}" if kind is GuestKind.QEMU else "start the built-in canary"
    work.step("spawn", f"{what}, and wait until it is up", spawn, undo, "kill it")
    if kind is GuestKind.CANARY:
        offer_grant(work, desk, grant)
        work.subject = name
    return work


def adopt_orphans(desk: needs.GuestStarting, name: str) -> Iterator[Handle]:
    """The processes of a guest that was being started when the control process died; each is the caller's to close."""
    monitor = f"unix:{desk.directory(name) / 'qmp'},server=on,wait=off"
    canary = ("--socket", str(desk.runtime_dir / "agents"), "--name", name)
    for process in census.take().processes.values():
        if process.kernel:
            continue
        with contextlib.suppress(MemconsoleError):
            words = census.command("/", process.pid)
            if monitor in words or words[1:5] == canary:
                yield Handle(process.pid, process.start_ticks)


def helper(desk: HelperCounting, action: GuestHelper) -> PreparedAction:
    """Count a process, and what it forks, as its guest's: ``note`` writes it down; nothing of the process changes."""
    work = PreparedAction(action.name, f"process {action.pid} works for guest {action.name}")
    guest = known_guest(work, desk, action.name)
    if action.pid in desk.exempt_processes:
        work.refuse(
            "Itself", f"process {action.pid} is memconsole itself", "it holds every region", "name another process"
        )
    command = _attachable(work, action.pid)
    if guest is None or work.refusals:
        return work

    def note() -> None:
        with contextlib.closing(Handle(action.pid)) as handle:
            made = Helper(handle.pid, handle.start_ticks, command)
        others = tuple(each for each in guest.helpers if each.pid != action.pid and _helper_lives(each))
        work.change = StateChange(guests=(replace(guest, helpers=(*others, made)),))

    text = f"count process {action.pid} ({' '.join(command)[:60]}) and what it forks as guest {guest.name}"
    work.step("note", text, note)
    return work


def _helper_lives(each: Helper) -> bool:
    with contextlib.suppress(MemconsoleError):
        return stat(each.pid)[1] == each.start_ticks
    return False


def attach(desk: ProcessAttaching, action: GuestAttach) -> PreparedAction:
    """Take a process as a guest, or in the place of one that is gone: ``join`` takes hold; nothing of it changes."""
    work = PreparedAction(action.name, f"process {action.pid} is guest {action.name}")
    gone = _ended_guest(desk, action.name)
    if gone is None:
        free_name(work, desk, action.name, region=False, guest=True)
    taken = next((guest for guest in desk.state.guests.values() if guest.pid == action.pid), None)
    if taken is not None and desk.live_guest(taken.name) is not None:
        work.refuse(
            "AlreadyGuest",
            f"process {action.pid} is guest {taken.name} already",
            "a process is one guest",
            f"use the name {taken.name}",
        )
    if action.pid in desk.exempt_processes:
        work.refuse(
            "Itself", f"process {action.pid} is memconsole itself", "it holds every region", "attach another process"
        )
    command = _attachable(work, action.pid)
    how = services.described(work, action, action.pid) if action.is_service and not work.refusals else None
    if work.refusals:
        return work

    if gone is not None:
        _rejoin_step(work, desk, action.pid, replace(gone, command=command, service=how or gone.service))
        return work

    def join() -> None:
        live = desk.attach_guest(action.name, action.pid)
        guest = Guest(
            action.name,
            GuestKind.PROCESS,
            GuestState.RUNNING,
            live.pid,
            live.start_ticks,
            command=command,
            created_ns=time.time_ns(),
            service=how,
        )
        work.change = StateChange(guests=(guest,))

    text = f"take process {action.pid} ({' '.join(command)[:60]}) as guest {action.name}"
    work.step("join", text, join, lambda: desk.remove_guest(action.name), "detach it")
    return work


def _rejoin_step(work: PreparedAction, desk: ProcessAttaching, pid: int, again: Guest) -> None:
    """``join`` takes a process in the place of one that ended; what that one was granted is offered to it."""
    grants = desk.state.grants_of(guest=again.name)
    work.text = f"process {pid} is guest {again.name} again, with {len(grants)} grants"

    def rejoin() -> None:
        with contextlib.closing(Handle(pid)) as handle:
            now = {"pid": handle.pid, "start_ticks": handle.start_ticks}
            found = replace(again, **now, state=GuestState.RUNNING, ended="")
        desk.remove_guest(again.name)
        for grant in grants:
            desk.userfaults.drop_uffd(grant.id)
        desk.adopt_guest(found)
        offered = tuple(replace(grant, state=GrantState.OFFERED) for grant in grants)
        work.change = StateChange(guests=(found,), grants=offered)

    had = ", ".join(grant.id for grant in grants) or "no grant"
    text = f"take process {pid} ({' '.join(again.command)[:60]}) as guest {again.name}, which ended; it gets {had}"
    work.step("join", text, rejoin, lambda: desk.remove_guest(again.name), "detach it")


def _ended_guest(desk: needs.LiveGuests, name: str) -> Guest | None:
    """The process guest of this name, if its process ended."""
    guest = desk.state.guests.get(name)
    if guest is None or guest.kind is not GuestKind.PROCESS:
        return None
    live = desk.live_guest(name)
    return guest if live is None or live.state() is GuestState.GONE else None


def _attachable(work: PreparedAction, pid: int) -> tuple[str, ...]:
    """The words a process was started with, or a refusal."""
    leader = _leader(pid)
    if leader is not None and leader != pid:
        work.refuse(
            "NotAProcess",
            f"{pid} is a thread of process {leader}",
            "a guest is a whole process",
            f"attach process {leader}",
        )
        return ()
    try:
        process = census.process("/", pid) if pid > 0 else None
        if process is not None and process.kernel:
            work.refuse(
                "NotAProcess",
                f"{pid} is a thread of the kernel",
                "a kernel thread maps no memory",
                "attach another process",
            )
        elif process is not None and process.state not in "ZX":
            return census.command("/", pid, process.task)
    except Gone:
        process = None
    if process is None or not process.kernel:
        work.refuse("NoSuchProcess", f"there is no process {pid}", "it ended, or never existed", "find its PID with ps")
    return ()


def _leader(pid: int) -> int | None:
    """The process that a PID, or the number of a thread, belongs to (/proc/PID/status:Tgid); None where there is none.

    The kernel shows a thread below /proc as it shows a process, and does not list it.
    """
    try:
        rows = tree.text(tree.read("/", f"/proc/{pid}/status")).splitlines() if pid > 0 else []
    except tree.UNREADABLE:
        return None
    found = next((row.partition(":")[2].strip() for row in rows if row.startswith("Tgid:")), "")
    return int(found) if found.isdecimal() else None


def stop(desk: GrantTaking, action: GuestStop) -> PreparedAction:
    """End a guest. A VM: ``end`` stops it. A process: each of its grants is asked back (``cut-gN``), then ``part``."""
    work = PreparedAction(action.name, f"guest {action.name} is stopped; its regions keep their contents")
    guest = known_guest(work, desk, action.name)
    if guest is None:
        return work
    remedy = f"{at_its_manager(guest, 'shutdown')}; memconsole guest let-go {guest.name} undoes its adoption"
    if refuse_adopted(work, guest, "stopped", remedy):
        return work
    live = desk.live_guest(guest.name)
    grants = desk.state.grants_of(guest=guest.name)
    windows = [grant for grant in desk.state.windows.values() if grant.guest == guest.name]
    if is_vm(guest):
        dma.cut_grants(work, desk, grants)
        if live is not None:
            process = "its process" if guest.pid is None else f"process {guest.pid}"
            work.step("end", f"end {process}, by force after {STOP_S:g} s", partial(live.stop, STOP_S))
    else:
        if windows:
            what = f"guest {guest.name} has window {windows[0].window}"
            work.refuse("Granted", what, "", f"memconsole window revoke {windows[0].window}")
            return work
        work.text = f"guest {guest.name} is a guest no more; its grants ended"
        dma.cut_grants(work, desk, grants)
        for grant in grants:
            work.step(
                f"cut-{grant.id}",
                f"ask the guest to unmap {grant.id} ({grant.region})",
                partial(_cut_grant, work, desk, grant),
            )
    work.step("part", "stop watching it, and remove its sockets and log", lambda: forget(desk, guest.name))
    work.change = StateChange(
        without_guests=(guest.name,),
        without_grants=tuple(grant.id for grant in grants),
        without_windows=tuple(grant.id for grant in windows),
    )
    return work


def _cut_grant(work: PreparedAction, desk: Revoking, grant: Grant) -> Recorded[None]:
    yield from Ladder(desk, grant, OFFER_S, Rung.ASK).climb()
    desk.withdraw(grant)
    work.lasting = replace(work.lasting, without_grants=(*work.lasting.without_grants, grant.id))


def forget(desk: suspend_vm.SuspendedGuests, name: str) -> None:
    """Let go of a guest, of what it saved at a handoff, and remove what lies in its directory."""
    desk.remove_guest(name)
    suspended.drop(desk.custody, name)
    unmark(desk, name)
    handoff.discard_saved_guest(desk, name)
    shutil.rmtree(desk.directory(name), ignore_errors=True)


def pause(desk: Handover, action: GuestPause) -> PreparedAction:
    """Stop its vCPUs (a process: SIGSTOP)."""
    return _switch(desk, action.name, GuestState.PAUSED)


class GuestResuming(Handover, Returning, services.ServiceStarting, Protocol):
    """What ``guest resume`` needs."""


def resume(desk: GuestResuming, action: GuestResume) -> PreparedAction:
    """Let it go on, wake it; one that did not come back from a handoff, or gave its RAM back, is started again."""
    guest = desk.state.guests.get(action.name)
    if guest is not None and suspend_vm.is_saved(desk, guest.name):
        return suspend_vm.restart_saved_guest(desk, guest)
    if guest is not None and handoff.is_saved(desk, guest.name):
        return handoff.restart_saved_guest(desk, guest)
    if guest is not None and guest.adopted and handoff.is_carried(desk, guest.name):
        return handoff.restart_carried(desk, guest)
    if guest is not None and services.starts(desk, guest):
        return services.start(desk, guest)
    return _switch(desk, action.name, GuestState.RUNNING)


def _switch(desk: Handover, name: str, new: GuestState) -> PreparedAction:
    pausing = new is GuestState.PAUSED
    still = {GuestState.PAUSED, GuestState.SUSPENDED}
    work = PreparedAction(name, f"guest {name} is paused" if pausing else f"guest {name} runs")
    guest = known_guest(work, desk, name)
    if guest is None:
        return work
    verb, done = ("suspend", "paused") if pausing else ("resume", "resumed")
    if refuse_adopted(work, guest, done, at_its_manager(guest, verb)):
        return work
    live = desk.live_guest(name)
    state = desk.state_of(live) if live is not None else GuestState.GONE
    if live is None or state is GuestState.GONE:
        work.refuse("GuestGone", f"guest {name} is gone", "its process ended", f"memconsole guest stop {name}")
        return work
    if state not in ({GuestState.RUNNING} if pausing else still):
        remedy = f"memconsole guest resume {name}" if state in still else f"memconsole guest pause {name}"
        why = f"it is not {'running' if pausing else 'paused'}"
        work.refuse("NotRunning" if pausing else "NotPaused", f"guest {name} is {state}", why, remedy)
        return work
    if not pausing and handoff.awaits_devices(desk, name):
        handoff.reattach_devices(desk, work, guest)
    do, undo = (live.pause, live.resume) if pausing else (live.resume, live.pause)
    text = f"stop the vCPUs of {name}" if pausing else f"run the vCPUs of {name}"
    if not is_vm(guest):
        text = f"stop process {guest.pid} (SIGSTOP)" if pausing else f"continue process {guest.pid} (SIGCONT)"
    if not pausing:
        work.after = partial(handoff.watch_clocks, desk)
    work.step("pause" if pausing else "resume", text, do, undo, "resume it" if pausing else "pause it")
    work.change = StateChange(guests=(replace(guest, state=new),))
    return work
