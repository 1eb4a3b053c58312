"""How each kind of VMM is saved, and started again by the boot plan."""

from __future__ import annotations

import os
from collections.abc import Sequence

from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.dma import spaces
from memconsole.backend.guests.base import Guest as LiveGuest
from memconsole.backend.guests.base import Restart
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.handoff.bootplan import Say, Start
from memconsole.backend.stores import memfd
from memconsole.errors import GuestError
from memconsole.model import Grant, Guest, GuestKind, GuestState

SAY_MS = 60_000


def incapable(desk: Desk, live: LiveGuest) -> str:
    """What a VMM lacks to be carried; empty where it lacks nothing.

    Raises:
        GuestError, Gone: it does not answer.
    """
    if isinstance(live, QemuGuest) and live.passes_through():
        if live.name not in desk.spaces.filled:
            return "its QEMU has a device of this host (VFIO) that is in nobody's custody"
        if live.state() is not GuestState.SUSPENDED:
            return "its QEMU saves a device passed through to it (VFIO) only while its guest is suspended to RAM"
    if isinstance(live, QemuGuest) and not live.shares():
        return "its QEMU cannot leave shared RAM out of a migration (x-ignore-shared)"
    return ""


def save(live: LiveGuest, fd: int, within: float) -> None:
    """Have a VMM write what it is besides its RAM into a file.

    Raises:
        GuestError, Gone: it cannot, or not in time; it stands still all the same.
    """
    if not isinstance(live, (CanaryGuest, QemuGuest)):
        raise GuestError(f"guest {live.name} cannot be saved", f"it is a {live.kind}", "stop it first")
    live.save(fd, within)
    os.lseek(fd, 0, os.SEEK_SET)  # whoever goes on reads from there, through this same open file


def revival(desk: Desk, guest: Guest, grants: Sequence[Grant], state: str, *, paused: bool) -> tuple[Start, Say | None]:
    """How a live VMM is started again from its state in custody; it must still live when this is asked.

    Raises:
        GuestError, Gone: it does not answer.
    """
    live = desk.live(guest.name)
    segments = _segments(grants)
    if isinstance(live, QemuGuest) and segments:
        return _planned(desk, guest, live.restart(state, segments[0][1], paused=paused))
    if isinstance(live, CanaryGuest):
        return anew(desk, guest, grants, state, paused=paused)
    raise GuestError(f"guest {guest.name} cannot be started again", "it has no RAM of ours", "stop it first")


def anew(desk: Desk, guest: Guest, grants: Sequence[Grant], state: str, *, paused: bool) -> tuple[Start, Say | None]:
    """The same by what the ledger knows of a guest, whose VMM may be gone.

    Raises:
        GuestError: it is no VM, or has no RAM.
    """
    segments = _segments(grants)
    if guest.kind is GuestKind.CANARY:
        agents = (desk.runtime_dir / "agents").absolute()
        return _planned(desk, guest, CanaryGuest.again(guest.name, agents, state, segments, paused=paused))
    if guest.kind is GuestKind.QEMU and segments:
        directory, ram = desk.directory(guest.name).absolute(), segments[0][1]
        handed = spaces.names(guest.name, [grant.dma for grant in grants if grant.dma is not None])
        found = QemuGuest.again(
            guest.name, guest.memory, directory, guest.command, state, ram, devices=handed, paused=paused
        )
        return _planned(desk, guest, found)
    raise GuestError(f"guest {guest.name} cannot be started again", "it has no RAM of ours", "stop it")


def _segments(grants: Sequence[Grant]) -> list[tuple[str, str]]:
    """Each grant, with what its segment is called in custody."""
    return [(grant.id, custody_name(grant.region, grant.offset // memfd.SEGMENT)) for grant in grants]


def _planned(desk: Desk, guest: Guest, restart: Restart) -> tuple[Start, Say | None]:
    directory = str(desk.directory(guest.name).absolute())
    start = Start(guest.name, restart.words, directory, f"{directory}/log", restart.fds)
    if not restart.lines:
        return start, None
    return start, Say(guest.name, restart.socket, restart.lines, SAY_MS)
