"""How each kind of VMM is saved, and started again by the boot plan."""

from __future__ import annotations

import os
from collections.abc import Sequence

from memconsole.backend import needs
from memconsole.backend.custody.names import custody_name
from memconsole.backend.dma import address_spaces
from memconsole.backend.guests.base import GuestDriver as LiveGuest
from memconsole.backend.guests.base import Restart, is_canary, is_qemu
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.handoff.bootplan import MonitorLines, Start
from memconsole.backend.handoff.facets import VmmRestarting
from memconsole.backend.stores import files
from memconsole.errors import GuestError
from memconsole.model import Grant, Guest, GuestKind, GuestState

SAY_MS = 60_000


def why_not_savable(desk: needs.DeviceReaching, live: LiveGuest) -> str:
    """What a VMM lacks to be carried; empty where it lacks nothing.

    Raises:
        GuestError, Gone: it does not answer.
    """
    if not is_qemu(live):
        return ""
    if live.passes_through():
        if live.name not in desk.address_spaces.vmm_filled:
            return "its QEMU has a device of this host (VFIO) that is not in custody"
        if live.state() is not GuestState.SUSPENDED:
            return "its QEMU saves a device passed through to it (VFIO) only while its guest is suspended to RAM"
    if not live.shares():
        return "its QEMU cannot leave shared RAM out of a migration (x-ignore-shared)"
    return ""


def save(live: LiveGuest, fd: int, within: float) -> None:
    """Have a VMM write what it is besides its RAM into a file.

    Raises:
        GuestError, Gone: it cannot, or not in time; it stands still all the same.
    """
    if not (is_canary(live) or is_qemu(live)):
        raise GuestError(
            f"guest {live.name} cannot be saved",
            f"a guest of kind {live.kind} cannot be",
            "shut it down from inside first",
        )
    live.save(fd, within)
    os.lseek(fd, 0, os.SEEK_SET)  # whoever goes on reads from there, through this same open file


def restart_of_live(
    desk: VmmRestarting, guest: Guest, grants: Sequence[Grant], state: str, *, paused: bool
) -> tuple[Start, MonitorLines | None]:
    """How a live VMM is started again from its state in custody; it must still live when this is asked.

    Raises:
        GuestError, Gone: it does not answer.
    """
    live = desk.live_guest(guest.name)
    segments = _segments(grants)
    if is_qemu(live) and segments:
        return _planned_start(desk, guest, live.restart(state, segments[0][1], paused=paused))
    if is_canary(live):
        return restart_of_ledger(desk, guest, grants, state, paused=paused)
    raise GuestError(
        f"guest {guest.name} cannot be started again", "its RAM is no region", "shut it down from inside first"
    )


def restart_of_ledger(
    desk: VmmRestarting, guest: Guest, grants: Sequence[Grant], state: str, *, paused: bool
) -> tuple[Start, MonitorLines | None]:
    """The same by what the ledger knows of a guest, whose VMM may be gone.

    Raises:
        GuestError: it is no VM, or has no RAM.
    """
    segments = _segments(grants)
    if guest.kind is GuestKind.CANARY:
        agents = (desk.runtime_dir / "agents").absolute()
        return _planned_start(desk, guest, CanaryGuest.again(guest.name, agents, state, segments, paused=paused))
    if guest.kind is GuestKind.QEMU and segments:
        directory, ram = desk.directory(guest.name).absolute(), segments[0][1]
        handed = address_spaces.custody_names(guest.name, [grant.dma for grant in grants if grant.dma is not None])
        found = QemuGuest.again(
            guest.name, guest.memory, directory, guest.command, state, ram, devices=handed, paused=paused
        )
        return _planned_start(desk, guest, found)
    raise GuestError(
        f"guest {guest.name} cannot be started again", "its RAM is no region", "shut it down from inside first"
    )


def _segments(grants: Sequence[Grant]) -> list[tuple[str, str]]:
    """Each grant, with what its segment is called in custody."""
    return [(grant.id, custody_name(grant.region, grant.offset // files.SEGMENT)) for grant in grants]


def _planned_start(desk: VmmRestarting, guest: Guest, restart: Restart) -> tuple[Start, MonitorLines | None]:
    directory = str(desk.directory(guest.name).absolute())
    start = Start(guest.name, restart.words, directory, f"{directory}/log", restart.fds)
    if not restart.lines:
        return start, None
    return start, MonitorLines(guest.name, restart.socket, restart.lines, SAY_MS)
