"""How each kind of VMM is saved, and started again by the boot plan."""

from __future__ import annotations

import os
from collections.abc import Sequence

from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.guests.base import Guest as LiveGuest
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.handoff.bootplan import Say, Start
from memconsole.backend.stores import memfd
from memconsole.errors import GuestError
from memconsole.model import Grant, Guest

SAY_MS = 60_000


def incapable(live: LiveGuest) -> str:
    """What a VMM lacks to be carried; empty where it lacks nothing.

    Raises:
        GuestError, Gone: it does not answer.
    """
    if isinstance(live, QemuGuest) and live.passes_through():
        return "its QEMU cannot save the device that is passed through to it (VFIO)"
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
    segments = [(grant.id, custody_name(grant.region, grant.offset // memfd.SEGMENT)) for grant in grants]
    if isinstance(live, CanaryGuest):
        restart = live.restart((desk.runtime_dir / "agents").absolute(), state, segments, paused=paused)
    elif isinstance(live, QemuGuest) and segments:
        restart = live.restart(state, segments[0][1], paused=paused)
    else:
        raise GuestError(f"guest {guest.name} cannot be started again", "it has no RAM of ours", "stop it first")
    directory = str(desk.directory(guest.name).absolute())
    start = Start(guest.name, restart.words, directory, f"{directory}/log", restart.fds)
    if not restart.lines:
        return start, None
    return start, Say(guest.name, restart.socket, restart.lines, SAY_MS)
