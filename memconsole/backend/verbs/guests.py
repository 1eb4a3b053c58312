"""``guest start|attach|stop|pause|resume``: who owns regions, and how they come and go."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from functools import partial

from msgspec.structs import replace

from memconsole.actions import GuestAttach, GuestPause, GuestResume, GuestStart, GuestStop, Reserve
from memconsole.backend.desk import STOP_S, Desk
from memconsole.backend.guests.base import Guest as LiveGuest
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.guests.handle import Handle
from memconsole.backend.guests.process import ProcessGuest
from memconsole.backend.guests.qemu import BINARY, Devices, QemuGuest
from memconsole.backend.kernel import census
from memconsole.backend.revoke import Ladder, aside
from memconsole.backend.state import Change
from memconsole.backend.verbs import dma, handoff
from memconsole.backend.verbs.common import free_name, is_vm, known_guest
from memconsole.backend.verbs.grants import OFFER_S, offer
from memconsole.backend.verbs.regions import creation
from memconsole.backend.verbs.work import Work
from memconsole.errors import Gone, GuestError, MemconsoleError
from memconsole.model import Access, Grant, GrantState, Guest, GuestKind, GuestState, Rung
from memconsole.units import format_size


def start(desk: Desk, action: GuestStart) -> Work:
    """Start a VM: its region is made (``create``, ``hold``), ``spawn`` runs it, ``offer`` gives a canary its RAM.

    A device it is given is opened before (``bind``, ``hand``): QEMU lets it reach its RAM itself.
    """
    name = action.name
    work = Work(name, f"guest {name} runs on {format_size(action.memory)} ({action.vmm})")
    free_name(work, desk, name, region=True, guest=True)
    if action.vmm not in {"canary", "qemu"}:
        work.refuse("NoSuchVmm", f"there is no VMM {action.vmm}", "canary and qemu are known", "choose one of these")
    elif action.vmm == "qemu" and shutil.which(BINARY) is None:
        work.refuse("NoVmm", f"{BINARY} is not installed", "it is not on the PATH", "apt install qemu-system-x86")
    creation(work, desk, Reserve(name, action.memory))
    dma.refuse_handing(work, desk, action)
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
    dma.hand(work, desk, grant)
    kind = GuestKind(action.vmm)
    guest = Guest(name, kind, GuestState.STARTING, None, memory=action.memory, command=action.args, created_ns=now)
    work.aims = replace(work.aims, guests=(guest,), grants=(grant,))

    def spawn() -> None:
        directory = desk.directory(name)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            live = _spawn(desk, guest, grant, action.args)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        desk.meet(live)
        running = replace(guest, state=GuestState.RUNNING, pid=live.pid, start_ticks=live.start_ticks)
        mapped = replace(grant, state=GrantState.MAPPED)
        work.change = replace(work.change, guests=(running,), grants=(mapped,))

    def undo() -> None:
        live = desk.live(name)
        if live is not None:
            live.kill()
        forget(desk, name)

    given = f" and device {action.device}" if action.device is not None else ""
    what = f"start {BINARY} with {name} as its RAM{given}" if kind is GuestKind.QEMU else "start the built-in canary"
    work.step("spawn", f"{what}, and wait until it is up", spawn, undo, "kill it")
    if kind is GuestKind.CANARY:
        offer(work, desk, grant)
        work.subject = name
    return work


def _spawn(desk: Desk, guest: Guest, grant: Grant, args: tuple[str, ...]) -> LiveGuest:
    directory = desk.directory(guest.name)
    if guest.kind is GuestKind.CANARY:
        return CanaryGuest.start(guest.name, desk.hub, directory, args=args)
    with contextlib.ExitStack() as stack:
        ram = stack.enter_context(desk.offered(grant))
        devices = Devices(*stack.enter_context(desk.spaces.handed(guest.name))) if grant.dma is not None else None
        return QemuGuest.start(guest.name, ram, directory, args=args, devices=devices)


def orphans(desk: Desk, name: str) -> Iterator[Handle]:
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


def attach(desk: Desk, action: GuestAttach) -> Work:
    """Take a process as a guest, or in the place of one that is gone: ``join`` takes hold; nothing of it changes."""
    work = Work(action.name, f"process {action.pid} is guest {action.name}")
    gone = _gone(desk, action.name)
    if gone is None:
        free_name(work, desk, action.name, region=False, guest=True)
    taken = next((guest for guest in desk.state.guests.values() if guest.pid == action.pid), None)
    if taken is not None and desk.live(taken.name) is not None:
        work.refuse("AlreadyGuest", f"process {action.pid} is guest {taken.name} already", "", "use that name")
    if action.pid in desk.exempt:
        work.refuse("Itself", f"process {action.pid} is memconsole itself", "it holds every region", "attach another")
    command = _attachable(work, action.pid)
    if work.refusals:
        return work

    if gone is not None:
        again = replace(gone, command=command)
        grants = desk.state.grants_of(guest=gone.name)
        work.text = f"process {action.pid} is guest {gone.name} again, with {len(grants)} grants"

        def rejoin() -> None:
            with contextlib.closing(Handle(action.pid)) as handle:
                found = replace(again, pid=handle.pid, start_ticks=handle.start_ticks, state=GuestState.RUNNING)
            desk.part(gone.name)
            for grant in grants:
                desk.uffds.drop(grant.id)
            desk.adopt_guest(found)
            offered = tuple(replace(grant, state=GrantState.OFFERED) for grant in grants)
            work.change = Change(guests=(found,), grants=offered)

        had = ", ".join(grant.id for grant in grants) or "no grant"
        text = f"take process {action.pid} ({' '.join(command)[:60]}) as guest {gone.name}, which ended; it gets {had}"
        work.step("join", text, rejoin, lambda: desk.part(gone.name), "let it go")
        return work

    def join() -> None:
        live = ProcessGuest.attach(action.name, action.pid, desk.hub)
        desk.meet(live)
        guest = Guest(
            action.name,
            GuestKind.PROCESS,
            GuestState.RUNNING,
            live.pid,
            live.start_ticks,
            command=command,
            created_ns=time.time_ns(),
        )
        work.change = Change(guests=(guest,))

    text = f"take process {action.pid} ({' '.join(command)[:60]}) as guest {action.name}"
    work.step("join", text, join, lambda: desk.part(action.name), "let it go")
    return work


def _gone(desk: Desk, name: str) -> Guest | None:
    """The process guest of this name, if its process ended."""
    guest = desk.state.guests.get(name)
    if guest is None or guest.kind is not GuestKind.PROCESS:
        return None
    live = desk.live(name)
    return guest if live is None or live.state() is GuestState.GONE else None


def _attachable(work: Work, pid: int) -> tuple[str, ...]:
    """The words a process was started with, or a refusal."""
    try:
        process = census.process("/", pid) if pid > 0 else None
        if process is not None and process.kernel:
            work.refuse("NotAProcess", f"{pid} is a thread of the kernel", "it maps no memory", "attach another")
        elif process is not None and process.state not in "ZX":
            return census.command("/", pid)
    except Gone:
        process = None
    if process is None or not process.kernel:
        work.refuse("NoSuchProcess", f"there is no process {pid}", "it ended, or never was", "look with ps")
    return ()


def stop(desk: Desk, action: GuestStop) -> Work:
    """End a guest. A VM: ``end`` stops it. A process: each of its grants is asked back (``cut-gN``), then ``part``."""
    work = Work(action.name, f"guest {action.name} is stopped; its regions keep their contents")
    guest = known_guest(work, desk, action.name)
    if guest is None:
        return work
    live = desk.live(guest.name)
    grants = desk.state.grants_of(guest=guest.name)
    windows = [grant for grant in desk.state.windows.values() if grant.guest == guest.name]
    if is_vm(guest):
        dma.cut(work, desk, grants)
        if live is not None:
            work.step("end", f"end process {guest.pid}, by force after {STOP_S:g} s", partial(live.stop, STOP_S))
    else:
        if windows:
            what = f"guest {guest.name} has window {windows[0].window}"
            work.refuse("Granted", what, "", f"memconsole window revoke {windows[0].window}")
            return work
        work.text = f"process {guest.pid} is let go; its grants ended"
        dma.cut(work, desk, grants)
        for grant in grants:
            work.step(f"cut-{grant.id}", f"ask {grant.id} ({grant.region}) back", partial(_cut, work, desk, grant))
    work.step("part", "let go of it, and remove its sockets and log", lambda: forget(desk, guest.name))
    work.change = Change(
        without_guests=(guest.name,),
        without_grants=tuple(grant.id for grant in grants),
        without_windows=tuple(grant.id for grant in windows),
    )
    return work


def _cut(work: Work, desk: Desk, grant: Grant) -> None:
    Ladder(desk, grant, OFFER_S, Rung.ASK).climb()
    desk.withdraw(grant)
    work.lasting = replace(work.lasting, without_grants=(*work.lasting.without_grants, grant.id))


def forget(desk: Desk, name: str) -> None:
    """Let go of a guest, of what it saved at a handoff, and remove what lies in its directory."""
    desk.part(name)
    aside.drop(desk, name)
    handoff.give_up(desk, name)
    shutil.rmtree(desk.directory(name), ignore_errors=True)


def pause(desk: Desk, action: GuestPause) -> Work:
    """Stop its vCPUs (a process: SIGSTOP)."""
    return _switch(desk, action.name, GuestState.PAUSED)


def resume(desk: Desk, action: GuestResume) -> Work:
    """Let it go on, wake it; one that did not come back from a handoff, or gave its RAM back, is started again."""
    guest = desk.state.guests.get(action.name)
    if guest is not None and aside.waits(desk, guest.name):
        return aside.again(desk, guest)
    if guest is not None and handoff.waits(desk, guest.name):
        return handoff.again(desk, guest)
    return _switch(desk, action.name, GuestState.RUNNING)


def _switch(desk: Desk, name: str, new: GuestState) -> Work:
    pausing = new is GuestState.PAUSED
    still = {GuestState.PAUSED, GuestState.SUSPENDED}
    work = Work(name, f"guest {name} is paused" if pausing else f"guest {name} goes on")
    guest = known_guest(work, desk, name)
    if guest is None:
        return work
    live = desk.live(name)
    state = _state(desk, live) if live is not None else GuestState.GONE
    if live is None or state is GuestState.GONE:
        work.refuse("GuestGone", f"guest {name} is gone", "its process ended", f"memconsole guest stop {name}")
        return work
    if state not in ({GuestState.RUNNING} if pausing else still):
        remedy = f"memconsole guest resume {name}" if state in still else f"memconsole guest pause {name}"
        why = f"it is not {'running' if pausing else 'paused'}"
        work.refuse("NotRunning" if pausing else "NotPaused", f"guest {name} is {state}", why, remedy)
        return work
    if not pausing and handoff.devices_wait(desk, name):
        handoff.give_back(desk, work, guest)
    do, undo = (live.pause, live.resume) if pausing else (live.resume, live.pause)
    text = f"stop the vCPUs of {name}" if pausing else f"let {name} go on"
    if not is_vm(guest):
        text = f"stop process {guest.pid} (SIGSTOP)" if pausing else f"continue process {guest.pid} (SIGCONT)"
    work.step("pause" if pausing else "resume", text, do, undo, "resume it" if pausing else "pause it")
    work.change = Change(guests=(replace(guest, state=new),))
    return work


def _state(desk: Desk, live: LiveGuest) -> GuestState:
    try:
        return live.state()
    except GuestError:
        if not desk.connected(live.name):
            raise
        return live.state()
