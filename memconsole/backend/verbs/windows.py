"""``window map|revoke``: MMIO of a device, granted like memory, as a descriptor: its VFIO file, or the BAR's in sysfs.

Only who has an agent can take one: a process, or a canary. QEMU has devices through VFIO when it starts.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

from memconsole.actions import WindowMap, WindowRevoke
from memconsole.backend import needs
from memconsole.backend.kernel import pci
from memconsole.backend.ledger.state import StateChange, WindowGrant
from memconsole.backend.verbs.common import known_guest
from memconsole.backend.verbs.grants import OFFER_S
from memconsole.backend.work import PreparedAction
from memconsole.errors import Gone, GuestError
from memconsole.model import GuestKind, Unread, Window
from memconsole.units import PAGE, format_address, format_size

_PASSIVE_DRIVERS = {None, *pci.VFIO_CLAIMS, "pci-stub", "uio_pci_generic"}
"""Drivers that do not touch a BAR themselves."""

_CLAIMS = frozenset({"/proc/iomem", "/proc/ioports"})
"""Where it is said which part of the kernel has a window."""


class WindowGranting(needs.MmioWindows, needs.LiveGuests, needs.GrantOffering, needs.DeviceReaching, Protocol):
    """What both need."""


def map(desk: WindowGranting, action: WindowMap) -> PreparedAction:
    """Grant a window: ``offer`` hands its file to the guest."""
    work = PreparedAction(action.window, f"{action.guest} has window {action.window}")
    gaps: list[Unread] = []
    window = _known(work, desk, action.window, gaps)
    guest = known_guest(work, desk, action.guest)
    if window is None or guest is None:
        return work
    _unclaimed(work, window, gaps)
    _refuse(work, desk, window, guest.name)
    if guest.kind in {GuestKind.QEMU, GuestKind.FOREIGN}:
        work.refuse(
            "NoWindows",
            f"guest {guest.name} cannot take a window",
            "QEMU gets devices through VFIO when it starts",
            "memconsole guest start NAME --vmm qemu --device BDF, or attach a process with an agent",
        )
    if work.refusals:
        return work
    grant = WindowGrant(f"g{desk.state.next_grant}", window.id, guest.name, time.time_ns())
    work.aims = work.change = StateChange(windows=(grant,))

    def offer() -> None:
        live = desk.live_guest(guest.name)
        if live is None:
            raise Gone(f"guest {guest.name} is gone", "its process ended", f"memconsole guest stop {guest.name}")
        with desk.window_offer(grant) as shown:
            live.offer(shown, OFFER_S)

    def undo() -> None:
        live = desk.live_guest(guest.name)
        if live is not None:
            live.request_unmap(grant.id, OFFER_S)

    text = f"offer {format_size(window.size)} at {format_address(window.start)} to {guest.name} as {grant.id}"
    work.step("offer", text, offer, undo, "ask the guest to unmap it")
    return work


def revoke(desk: WindowGranting, action: WindowRevoke) -> PreparedAction:
    """Ask a window back; the kernel is asked whether its guest still maps it or holds its file."""
    work = PreparedAction(action.window, f"window {action.window} is taken back")
    grant = desk.state.window_of(action.window)
    window = _known(work, desk, action.window, [])
    if grant is None and window is not None:
        work.refuse(
            "NoSuchGrant", f"window {action.window} is not granted", "no guest has it", "memconsole windows lists them"
        )
    if grant is None or window is None:
        return work

    def cut() -> None:
        live = desk.live_guest(grant.guest)
        refused = ""
        if live is not None:
            with contextlib.suppress(Gone):
                try:
                    desk.connected(live.name)
                    if not live.request_unmap(grant.id, OFFER_S):
                        refused = "it has no agent that would unmap it"
                except GuestError as error:
                    refused = str(error)
        guest = desk.state.guests[grant.guest]
        if desk.reaches_window(guest, window):
            raise GuestError(
                f"guest {grant.guest} still has window {window.id}",
                refused or "it did not unmap it",
                f"have process {guest.pid} unmap it and close the device, or unbind the device's driver",
                code="StillMapped",
            )
        desk.withdraw(grant)

    work.step("cut", f"ask {grant.guest} to unmap it, and check that it did", cut)
    work.change = StateChange(without_windows=(grant.id,))
    return work


def _known(work: PreparedAction, desk: needs.MmioWindows, id: str, gaps: list[Unread]) -> Window | None:
    found = {window.id: window for window in desk.windows(gaps)}
    if id not in found:
        unread = "".join(f"; {gap.source} could not be read: {gap.why}" for gap in gaps)
        remedy = "memconsole windows lists them; an id is BDF:BAR, as 0000:00:04.0:0"
        work.refuse("NoSuchWindow", f"there is no window {id}", f"this host has {len(found)}{unread}", remedy)
    return found.get(id)


def _unclaimed(work: PreparedAction, window: Window, gaps: list[Unread]) -> None:
    """Refuse a window of which it was not read whether a part of the kernel has it."""
    for gap in gaps:
        if gap.source in _CLAIMS:
            what = f"whether the kernel itself uses window {window.id} is not known"
            work.refuse("ClaimsUnread", what, f"{gap.source}: {gap.why}", gap.remedy)


def _refuse(work: PreparedAction, desk: needs.DeviceReaching, window: Window, guest: str) -> None:
    if window.io:
        work.refuse(
            "NotMmio", f"window {window.id} is a range of ports", "ports cannot be mapped", "choose another window"
        )
    elif window.size % PAGE or window.start % PAGE:
        why = "its page holds other registers too"
        work.refuse("BadRange", f"window {window.id} is {window.size} bytes", why, "choose another window")
    driver = window.driver if window.driver not in _PASSIVE_DRIVERS else None
    if window.claimed not in _PASSIVE_DRIVERS or driver is not None:
        work.refuse(
            "Claimed",
            f"window {window.id} is in use",
            f"the kernel's {driver or window.claimed} has it",
            f"echo {window.bdf} > /sys/bus/pci/devices/{window.bdf}/driver/unbind",
        )
    owner = desk.address_spaces.devices.get(window.bdf, guest)
    if owner != guest:
        why = f"guest {owner} has device {window.bdf}, and {guest} could make it write to {owner}'s memory"
        work.refuse(
            "DeviceInUse", f"window {window.id} cannot be given to {guest}", why, f"revoke {owner}'s grants for it"
        )
    holder = desk.state.window_of(window.id)
    if holder is not None:
        remedy = f"memconsole window revoke {window.id}"
        work.refuse("Granted", f"window {window.id} is granted to {holder.guest}", "a window has one guest", remedy)
