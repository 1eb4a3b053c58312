"""What a Snapshot says of custody, of devices and of guests that wait, beside what the survey finds.

A host where none of these is costs nothing: their rooms are entered only where there is something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from memconsole.actions import GuestAdopt, HandoffAction
from memconsole.backend import needs
from memconsole.backend.custody.holder import MEMORY
from memconsole.backend.custody.systemd import ENTRY
from memconsole.backend.kernel import tree
from memconsole.errors import BadFile, Gone
from memconsole.model import Access, Finding, GuestState, Severity
from memconsole.units import format_size

if TYPE_CHECKING:
    from memconsole.backend.dma.check import Checking
    from memconsole.backend.holdings import Backing
    from memconsole.backend.ledger.state import State


class WaitingGuests(needs.LiveGuests, needs.RuntimeFiles, needs.InCustody, needs.LastHandoff, Protocol):
    """What guests that wait are known by."""


class Guard(Protocol):
    """What keeps an ordinary kexec from beginning."""

    @property
    def why_not(self) -> str:
        """Why it cannot; empty when it does."""


class Mount(Protocol):
    """The mount, to look at."""

    @property
    def pid(self) -> int | None:
        """The process that serves it."""

    def findings(self) -> tuple[Finding, ...]:
        """What of it does not show what the ledger means."""

    def ping(self) -> None:
        """Ask its server whether it is there; Gone, Silent."""


class Guarded(needs.LedgerState, needs.NotedArenas, Protocol):
    """What is known without asking."""

    @property
    def guard(self) -> Guard | None:
        """The guard, where guests outlive this process."""

    @property
    def mount(self) -> Mount | None:
        """The mount, if there is one."""


class Surviving(needs.HostTree, needs.InCustody, Protocol):
    """What custody holds on this host."""


class Handing(needs.LedgerState, needs.HostTree, Protocol):
    """Whether devices reach memory."""

    @property
    def hands_devices(self) -> bool:
        """Whether a VMM has a device that memconsole opened."""


def known_findings(desk: Guarded) -> tuple[Finding, ...]:
    """What this process knows to be wrong without asking anybody."""
    return (
        *desk.state.findings(),
        *_unguarded(desk),
        *(desk.mount.findings() if desk.mount is not None else ()),
        *(desk.noted.findings() if desk.noted is not None else ()),
    )


def sessions_in_custody(desk: Surviving) -> tuple[str, ...]:
    """The sessions of live update that are in custody."""
    if desk.custody.survives and tree.exists(desk.root, "/dev/liveupdate"):
        with contextlib.suppress(Gone):
            return tuple(name for name in desk.custody.names() if name.startswith(("session:", "incoming:")))
    return ()


def custody_findings(desk: needs.InCustody) -> tuple[Finding, ...]:
    """That what holds the memory is no more, and so does not outlive this process; or that another does by now."""
    try:
        desk.custody.check()
    except Gone as error:
        what = f"custody is lost, and only this process holds the regions: {error.what}"
        remedy = "memconsole copy REGION FILE saves a region that no guest maps; then restart the control process"
        return (Finding("custody-gone", Severity.ERROR, "custody", what, error.why, remedy),)
    remedy = "find out who killed the keeper (ausearch, journalctl)"
    replaced = tuple(
        Finding("custody-replaced", Severity.WARNING, "custody", what, "custody", remedy)
        for what in desk.custody.troubles()
    )
    replaced += _unprotected(desk)
    lost = [name for name in desk.custody.lost if name.startswith((*MEMORY, ENTRY))]
    if not lost:
        return replaced
    what = f"{desk.custody.label} lost {', '.join(lost)}"
    remedy = "memconsole audit names its regions and guests; restart the control process once they are not missed"
    return (*replaced, Finding("custody-lost", Severity.ERROR, "custody", what, "custody", remedy))


def _unprotected(desk: needs.InCustody) -> tuple[Finding, ...]:
    """That the keeper may be ended for want of memory, or held up by it."""
    missing = desk.custody.unguarded()
    if not missing:
        return ()
    observed = f"the {desk.custody.label}, is not protected: {'; '.join(missing)}"
    remedy = (
        "start the service with CAP_SYS_RESOURCE and CAP_IPC_LOCK, as systemd/memconsole.service does; "
        "the keeper that runs stays as it is until it holds nothing and ends"
    )
    return (Finding("custody-unguarded", Severity.WARNING, "custody", observed, "its own status", remedy),)


def truncated_regions(state: State, backings: Mapping[str, tuple[Backing, ...]]) -> Iterator[Finding]:
    """Regions whose files are shorter than they were made: a guest that writes to one by descriptor can do that.

    To forbid it (F_SEAL_SHRINK) would forbid revoke too, whose last resort is to take the frames from everybody.
    """
    for name, backing in backings.items():
        region = state.regions.get(name)
        if region is None or len(backing) != len(region.segments):
            continue
        lost = sum(max(0, made.size - now.size) for made, now in zip(region.segments, backing, strict=True))
        if lost:
            guests = sorted({grant.guest for grant in state.grants_of(region=name) if grant.access is Access.RW})
            who = f"guest {', '.join(guests)}" if guests else "a guest that had it before"
            what = f"region {name} lost its last {format_size(lost)}: {who} truncated it, and it cannot grow again"
            rest = f"memconsole copy {name} FILE saves what is left" if lost < region.size else "nothing of it is left"
            remedy = f"{rest}; memconsole release {name} forgets it; reserve a new region"
            yield Finding("region-truncated", Severity.ERROR, name, what, "fstat of its segments", remedy)


def _unguarded(desk: Guarded) -> tuple[Finding, ...]:
    """That an ordinary kexec would be done, and end the guests."""
    if desk.guard is None or not desk.guard.why_not:
        return ()
    what = "systemctl kexec would end the guests here: the guard cannot be installed"
    remedy = "use memconsole handoff run; make the directory writable, then restart the control process"
    return (Finding("kexec-unguarded", Severity.WARNING, "host", what, desk.guard.why_not, remedy),)


def has_devices(desk: Handing) -> bool:
    """Whether a guest, or another process, has a device by which it reaches memory."""
    return (
        desk.hands_devices
        or any(grant.dma is not None for grant in desk.state.grants.values())
        or tree.exists(desk.root, "/sys/bus/pci/drivers/vfio-pci")
    )


def device_findings(desk: Checking) -> tuple[Finding, ...] | None:
    """Where devices reach other memory than the ledger grants them, or a kexec would keep; None while that changes."""
    from memconsole.backend.dma import check

    return check.device_findings(desk)


def waiting_guests(desk: WaitingGuests) -> tuple[Finding, ...]:
    """The guests that gave their RAM back by ending, and those that a handoff left in custody."""
    between = _between(desk)
    if not desk.state.guests:
        return between
    with contextlib.suppress(Gone):  # that nobody has custody any more is a finding of its own
        return (*between, *_suspended(desk), *_left_by_handoff(desk))
    return between


def _between(desk: WaitingGuests) -> tuple[Finding, ...]:
    """The guests whose RAM was on its way into files when somebody was killed."""
    if any(isinstance(intent.action, GuestAdopt) for intent in desk.state.unfinished.values()):
        return ()
    from memconsole.backend.stores import ramfiles

    if not ramfiles.domains():
        return ()
    from memconsole.backend.guests import moves

    return tuple(moves.findings(desk.runtime_dir))


def _suspended(desk: WaitingGuests) -> Iterator[Finding]:
    """The guests that gave their RAM back, and wait for it."""
    from memconsole.backend.custody import payloads, suspended

    waiting = [guest for guest in desk.state.guests.values() if guest.state is GuestState.GONE and guest.pid is None]
    for guest in waiting:
        try:
            kept = suspended.read(desk.custody, guest.name)
        except BadFile as error:
            yield payloads.unknown(f"{suspended.STATE}:{guest.name}", error)
            continue
        if kept is not None:
            what = (
                f"{guest.name} was saved and stopped to free region {kept.region}; its device state is held in custody"
            )
            remedy = f"memconsole map {kept.region} {guest.name}, then memconsole guest resume {guest.name}"
            yield Finding("guest-aside", Severity.INFO, guest.name, what, f"{suspended.STATE}:{guest.name}", remedy)


def _left_by_handoff(desk: WaitingGuests) -> Iterator[Finding]:
    """The guests that did not come back from a handoff, each with why; what they are is in custody."""
    state = desk.state
    if any(isinstance(intent.action, HandoffAction) for intent in state.unfinished.values()):
        return
    whys = {each.name: each.why for each in desk.handoff.guests} if desk.handoff is not None else {}
    for name in desk.custody.names():
        kind, _, guest = name.partition(":")
        if kind in {"state", "carried"} and guest in state.guests and desk.live_guest(guest) is None:
            what = f"guest {guest} did not come back from a handoff: {whys.get(guest) or 'its VMM was not started'}"
            remedy = f"memconsole guest resume {guest} tries again; its state and its regions are in custody until then"
            yield Finding("handoff-guest-held", Severity.ERROR, guest, what, "custody", remedy)
