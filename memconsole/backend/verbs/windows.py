"""``window map|revoke``: MMIO of a device, granted like memory, as a descriptor: its VFIO file, or the BAR's in sysfs.

Only who has an agent can take one: a process, or a canary. QEMU has devices through VFIO when it starts.
"""

from __future__ import annotations

import contextlib
import time

from memconsole.actions import WindowMap, WindowRevoke
from memconsole.backend.desk import Desk
from memconsole.backend.kernel import pci
from memconsole.backend.state import Change, WindowGrant
from memconsole.backend.verbs.common import known_guest
from memconsole.backend.verbs.grants import OFFER_S
from memconsole.backend.verbs.work import Work
from memconsole.errors import Gone, GuestError
from memconsole.model import GuestKind, Window
from memconsole.units import PAGE, format_address, format_size

_PASSIVE_DRIVERS = {None, *pci.VFIO_CLAIMS, "pci-stub", "uio_pci_generic"}
"""Drivers that do not touch a BAR themselves."""


def map(desk: Desk, action: WindowMap) -> Work:
    """Grant a window: ``offer`` hands its file to the guest."""
    work = Work(action.window, f"{action.guest} has window {action.window}")
    window = _known(work, desk, action.window)
    guest = known_guest(work, desk, action.guest)
    if window is None or guest is None:
        return work
    _refuse(work, desk, window, guest.name)
    if guest.kind is GuestKind.QEMU:
        work.refuse(
            "NoWindows",
            f"guest {guest.name} cannot take a window",
            "QEMU gets devices through VFIO when it starts",
            "start QEMU with -device vfio-pci, or attach a process with an agent",
        )
    if work.refusals:
        return work
    grant = WindowGrant(f"g{desk.state.next_grant}", window.id, guest.name, time.time_ns())
    work.aims = work.change = Change(windows=(grant,))

    def offer() -> None:
        live = desk.live(guest.name)
        if live is None:
            raise Gone(f"guest {guest.name} is gone", "its process ended", f"stop guest {guest.name}")
        with desk.shown(grant) as shown:
            live.offer(shown, OFFER_S)

    def undo() -> None:
        live = desk.live(guest.name)
        if live is not None:
            live.ask_unmap(grant.id, OFFER_S)

    text = f"offer {format_size(window.size)} at {format_address(window.start)} to {guest.name} as {grant.id}"
    work.step("offer", text, offer, undo, "ask for it back")
    return work


def revoke(desk: Desk, action: WindowRevoke) -> Work:
    """Ask a window back; the kernel is asked whether its guest still maps it or holds its file."""
    work = Work(action.window, f"window {action.window} is taken back")
    grant = desk.state.window_of(action.window)
    window = _known(work, desk, action.window)
    if grant is None and window is not None:
        work.refuse("NoSuchGrant", f"window {action.window} is granted to nobody", "", "memconsole windows")
    if grant is None or window is None:
        return work

    def cut() -> None:
        live = desk.live(grant.guest)
        refused = ""
        if live is not None:
            with contextlib.suppress(Gone):
                try:
                    desk.connected(live.name)
                    if not live.ask_unmap(grant.id, OFFER_S):
                        refused = "it has no agent that would unmap it"
                except GuestError as error:
                    refused = str(error)
        guest = desk.state.guests[grant.guest]
        if desk.reaches_window(guest, window):
            raise GuestError(
                f"guest {grant.guest} still has window {window.id}",
                refused or "it did not let go of it",
                f"end process {guest.pid}, or unbind the device",
                code="StillMapped",
            )
        desk.withdraw(grant)

    work.step("cut", f"ask {grant.guest} to unmap it, and look whether it did", cut)
    work.change = Change(without_windows=(grant.id,))
    return work


def _known(work: Work, desk: Desk, id: str) -> Window | None:
    found = {window.id: window for window in desk.windows()}
    if id not in found:
        remedy = "memconsole windows lists them; an id is BDF:BAR, as 0000:00:04.0:0"
        work.refuse("NoSuchWindow", f"there is no window {id}", f"this host has {len(found)}", remedy)
    return found.get(id)


def _refuse(work: Work, desk: Desk, window: Window, guest: str) -> None:
    if window.io:
        work.refuse("NotMmio", f"window {window.id} is a range of ports", "ports cannot be mapped", "choose another")
    elif window.size % PAGE or window.start % PAGE:
        why = "its page holds other registers too"
        work.refuse("BadRange", f"window {window.id} is {window.size} bytes", why, "choose another")
    driver = window.driver if window.driver not in _PASSIVE_DRIVERS else None
    if window.claimed not in _PASSIVE_DRIVERS or driver is not None:
        work.refuse(
            "Claimed",
            f"window {window.id} is in use",
            f"the kernel's {driver or window.claimed} has it",
            f"echo {window.bdf} > /sys/bus/pci/devices/{window.bdf}/driver/unbind",
        )
    owner = desk.spaces.devices.get(window.bdf, guest)
    if owner != guest:
        why = f"guest {owner} has device {window.bdf}, which would do what {guest} tells it in {owner}'s memory"
        work.refuse(
            "DeviceInUse", f"window {window.id} cannot be given to {guest}", why, f"revoke {owner}'s grants for it"
        )
    holder = desk.state.window_of(window.id)
    if holder is not None:
        remedy = f"memconsole window revoke {window.id}"
        work.refuse("Granted", f"window {window.id} is granted to {holder.guest}", "", remedy)
