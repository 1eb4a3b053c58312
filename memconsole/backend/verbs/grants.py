"""``map`` and ``revoke``: the right of one guest to reach a range of a region, given and taken back.

Who may have what:

* A frame belongs to one guest: a range that one guest was granted is granted to no other, not even to read
  (``Shared``). Parts of a region that do not overlap may go to several guests.
* In one guest, two grants overlap neither in the region nor in guest physical addresses (``Overlap``).

The ladder of a revoke, mildest rung first; after each the kernel is asked who still reaches the range, and the ladder
ends when nobody does:

    ask    the guest's agent unmaps the range and closes its fd
    kill   every process the kernel shows to reach it is killed: the guest, its children, whoever was sent the fd
"""

from __future__ import annotations

import contextlib
import time

import msgspec

from memconsole.actions import Map, Revoke
from memconsole.backend.desk import Desk
from memconsole.backend.guests.handle import Handle
from memconsole.backend.kernel import tree
from memconsole.backend.reach import Reach
from memconsole.backend.state import Change
from memconsole.backend.stores import memfd
from memconsole.backend.verbs.common import known_guest, known_region, not_frozen
from memconsole.backend.verbs.work import Work
from memconsole.errors import Gone, GuestError, MemconsoleError
from memconsole.model import (
    Access,
    Grant,
    GrantState,
    Guest,
    GuestKind,
    GuestState,
    Region,
    RevokeOutcome,
    RevokeReport,
    Rung,
)
from memconsole.units import exact_size, format_address, format_duration, format_size

OFFER_S = 5.0
"""Seconds a guest has to map what it is offered."""
GPA_LIMIT = 1 << 52
_LOOK_S = 0.02


def map(desk: Desk, action: Map) -> Work:
    """Grant a range: ``offer`` hands it to the guest, which maps it now or when its agent connects."""
    work = Work("", "")
    region = known_region(work, desk, action.region)
    guest = known_guest(work, desk, action.guest)
    if region is None or guest is None:
        return work
    length = region.size - action.offset if action.length is None else action.length
    not_frozen(work, region, "mapped")
    _in_range(work, region, action.offset, length, action.gpa)
    _alive(work, desk, guest)
    _access(work, desk, region, action.access)
    if action.dma is not None:
        _no_dma(work, desk, action.dma)
    if guest.kind is GuestKind.QEMU:
        work.refuse(
            "FixedRam",
            f"guest {guest.name} takes no more memory",
            "QEMU gets its RAM when it starts, and has no slot for more",
            "start it with the memory it needs",
        )
    grant = Grant(
        id=f"g{desk.state.next_grant}",
        region=region.name,
        guest=guest.name,
        offset=action.offset,
        length=length,
        access=action.access,
        state=GrantState.OFFERED,
        gpa=action.gpa,
        created_ns=time.time_ns(),
    )
    _apart(work, desk, grant)
    if not work.refusals:
        offer(work, desk, grant)
    return work


def offer(work: Work, desk: Desk, grant: Grant) -> None:
    """The step that hands a grant to its guest; ``work.change`` gets the grant as the guest took it."""
    work.subject = grant.id
    work.aims = msgspec.structs.replace(work.aims, grants=(grant,))

    def do() -> None:
        live = desk.live(grant.guest)
        if live is None:
            raise Gone(f"guest {grant.guest} is gone", "its process ended", f"stop guest {grant.guest}")
        with desk.offered(grant) as offered:
            mapped = live.offer(offered, OFFER_S)
        made = msgspec.structs.replace(grant, state=GrantState.MAPPED if mapped else GrantState.OFFERED)
        work.change = msgspec.structs.replace(work.change, grants=(made,))
        if not work.text:
            how = "maps" if mapped else "may map"
            part = f"{format_size(grant.length)} of {grant.region}"
            work.text = f"{grant.guest} {how} {part} ({grant.access}) as {grant.id}"

    def undo() -> None:
        live = desk.live(grant.guest)
        if live is not None:
            live.ask_unmap(grant.id, OFFER_S)

    at = "" if grant.gpa is None else f" at gpa {format_address(grant.gpa)}"
    work.step(
        "offer",
        f"offer {format_size(grant.length)} of {grant.region} from {format_address(grant.offset)}, {grant.access},"
        f" to {grant.guest}{at} as {grant.id}",
        do,
        undo,
        "ask for it back",
    )


# --- what map refuses -------------------------------------------------------------------------------------------


def _in_range(work: Work, region: Region, offset: int, length: int, gpa: int | None) -> None:
    page = region.page_size
    remedy = f"it has {exact_size(region.size)} in pages of {exact_size(page)}"
    if offset < 0 or length <= 0 or offset + length > region.size:
        what = f"{length} bytes from {offset} are not in region {region.name}"
        work.refuse("BadRange", what, f"it ends at {region.size}", remedy)
    elif offset % page or length % page:
        work.refuse("BadRange", f"{length} bytes from {offset} are not whole pages", "a grant is made of pages", remedy)
    elif offset // memfd.SEGMENT != (offset + length - 1) // memfd.SEGMENT:
        size = exact_size(memfd.SEGMENT)
        why = f"a region is made of segments of {size}, a grant lies in one"
        work.refuse("BadRange", f"{length} bytes from {offset} lie in two segments", why, "make a grant for each")
    if gpa is not None and (gpa < 0 or gpa % page or gpa + max(length, 0) > GPA_LIMIT):
        why = f"it is a multiple of {exact_size(page)} below {exact_size(GPA_LIMIT)}"
        work.refuse("BadRange", f"gpa {gpa:#x} cannot be", why, "choose another --gpa")


def _alive(work: Work, desk: Desk, guest: Guest) -> None:
    live = desk.live(guest.name)
    with contextlib.suppress(GuestError):
        if live is None or live.state() is GuestState.GONE:
            work.refuse("GuestGone", f"guest {guest.name} is gone", "its process ended", f"stop guest {guest.name}")


def _access(work: Work, desk: Desk, region: Region, access: Access) -> None:
    if not desk.has(region.name):
        work.refuse("RegionLost", f"the memory of region {region.name} is lost", "", f"release {region.name}")
    elif access is Access.RW:
        sealed = {"write", "future-write"} & {name for fd in desk.fds(region.name) for name in memfd.seals(fd)}
        if sealed:
            work.refuse(
                "AccessTooWide",
                f"region {region.name} cannot be written to",
                f"its memfd is sealed: {', '.join(sorted(sealed))}",
                "map it with --access ro",
            )


def _apart(work: Work, desk: Desk, grant: Grant) -> None:
    for other in desk.state.grants.values():
        same_frames = other.region == grant.region and _meet(other.offset, other.length, grant.offset, grant.length)
        if other.guest != grant.guest:
            if same_frames:
                work.refuse(
                    "Shared",
                    f"a part of it is granted to {other.guest} already ({other.id})",
                    "a frame belongs to one guest",
                    f"memconsole revoke {other.id}, or map another range",
                )
        elif same_frames or (
            grant.gpa is not None and other.gpa is not None and _meet(other.gpa, other.length, grant.gpa, grant.length)
        ):
            where = "range" if same_frames else "guest physical addresses"
            work.refuse(
                "Overlap",
                f"{grant.guest} has {other.id} in the same {where}",
                f"{other.id} is {format_size(other.length)} of {other.region} from {format_address(other.offset)}"
                + ("" if other.gpa is None else f" at gpa {format_address(other.gpa)}"),
                "choose another --offset or --gpa",
            )


def _meet(a: int, a_length: int, b: int, b_length: int) -> bool:
    return a < b + b_length and b < a + a_length


def _no_dma(work: Work, desk: Desk, bdf: str) -> None:
    """Mapping for a device needs the device, an IOMMU that confines it, and iommufd; then it is still to be built."""
    device = f"/sys/bus/pci/devices/{bdf}"
    if not tree.exists(desk.root, device):
        work.refuse("NoSuchDevice", f"there is no device {bdf}", "", "memconsole windows lists the devices")
    elif not tree.exists(desk.root, f"{device}/iommu_group"):
        work.refuse(
            "NoIommu",
            f"device {bdf} cannot be given memory",
            "no IOMMU confines it: it would reach all of the host's memory",
            "boot with intel_iommu=on or amd_iommu=on, with VT-d or AMD-Vi enabled in the firmware",
        )
    elif not tree.exists(desk.root, "/dev/iommu"):
        why = "this kernel offers no /dev/iommu (CONFIG_IOMMUFD)"
        work.refuse("NoIommu", f"device {bdf} cannot be given memory", why, "modprobe iommufd")
    else:
        why = "this memconsole does not map memory for devices"
        work.refuse("NoIommu", f"device {bdf} cannot be given memory", why, "leave --dma out")


# --- revoke -----------------------------------------------------------------------------------------------------


def revoke(desk: Desk, action: Revoke) -> Work:
    """Take a grant back: one step, ``cut``, which climbs the ladder and ends when the kernel says nobody reaches it."""
    work = Work(action.grant, "")
    grant = desk.state.grants.get(action.grant)
    if grant is None:
        known = ", ".join(sorted(desk.state.grants)) or "none"
        work.refuse("NoSuchGrant", f"there is no grant {action.grant}", f"grants: {known}", "memconsole grants")
        return work
    if not action.within > 0:
        work.refuse("BadDeadline", f"{action.within} seconds", "a rung needs time", "write --within 5")
        return work
    ladder = Ladder(desk, grant, action.within, action.at_most)

    def cut() -> None:
        report = ladder.climb()
        work.revoke = report
        work.change = ladder.change()
        took = format_duration(report.took_ns)
        work.text = f"{grant.id} ({grant.region} to {grant.guest}) is {report.outcome} after {report.rung}, in {took}"

    rungs = "ask its guest" if action.at_most is not Rung.KILL else "ask its guest, then kill whoever still reaches it"
    part = f"{format_size(grant.length)} of {grant.region}"
    work.step("cut", f"take {part} back from {grant.guest}: {rungs}; the contents stay", cut)
    return work


class Ladder:
    """One climb: asks, kills if it may, and after each rung believes the kernel only."""

    def __init__(self, desk: Desk, grant: Grant, within: float, at_most: Rung) -> None:
        self._desk = desk
        self._grant = grant
        self._region = desk.state.regions[grant.region]
        self._within = within
        self._at_most = at_most
        self._refused = ""
        self._killed: set[int] = set()

    def climb(self) -> RevokeReport:
        """Climb until nobody reaches the range.

        Raises:
            GuestError: somebody still does (``StillMapped``), and no harder rung is allowed or left.
        """
        began = time.monotonic_ns()
        tried = []
        for rung in (Rung.ASK, Rung.KILL):
            if rung is Rung.KILL and self._at_most is not Rung.KILL:
                break
            tried.append(rung)
            reach = self._ask() if rung is Rung.ASK else self._kill()
            if not reach.pids:
                outcome = RevokeOutcome.QUARANTINED if reach.unseen else RevokeOutcome.CUT
                took = time.monotonic_ns() - began
                return RevokeReport(self._grant.id, rung, outcome, took, tuple(tried), reach.unseen or self._note())
        raise GuestError(
            f"{self._grant.id} is still mapped: {reach}",
            self._refused or "they did not let go of it",
            f"memconsole revoke {self._grant.id} --at-most kill"
            if self._at_most is not Rung.KILL
            else "look at /proc/PID/stack of these processes",
            code="StillMapped",
        )

    def change(self) -> Change:
        """What the ledger says after the climb: a guest that was killed is no guest any more."""
        state = self._desk.state
        dead = [guest.name for guest in state.guests.values() if guest.pid in self._killed]
        grants = {self._grant.id} | {grant.id for name in dead for grant in state.grants_of(guest=name)}
        windows = [grant.id for grant in state.windows.values() if grant.guest in dead]
        self._desk.withdraw(self._grant)
        for name in dead:
            self._desk.part(name)
        return Change(without_grants=tuple(sorted(grants)), without_guests=tuple(dead), without_windows=tuple(windows))

    def _ask(self) -> Reach:
        live = self._desk.live(self._grant.guest)
        if live is None:
            self._refused = "its guest is gone"
            return self._look(0)
        try:
            self._desk.connected(live.name)
            agreed = live.ask_unmap(self._grant.id, self._within)
            if not agreed:
                self._refused = f"guest {self._grant.guest} has no agent that would unmap it"
        except MemconsoleError as error:
            agreed = False
            self._refused = str(error)
        return self._look(self._within if agreed else 0)

    def _kill(self) -> Reach:
        deadline = time.monotonic() + self._within
        while (reach := self._look(0)).pids and time.monotonic() < deadline:
            for pid in reach.pids:
                self._end(pid, max(0.1, deadline - time.monotonic()))
        return reach

    def _end(self, pid: int, within: float) -> None:
        if pid == 1:
            raise GuestError("the first process reaches it", "it is never killed", "stop what it started")
        owner = next((guest for guest in self._desk.state.guests.values() if guest.pid == pid), None)
        live = self._desk.live(owner.name) if owner else None
        self._killed.add(pid)
        if live is not None:
            live.kill(within)
            return
        with contextlib.suppress(Gone), contextlib.closing(Handle(pid)) as handle:
            handle.kill(within)

    def _look(self, within: float) -> Reach:
        """Who reaches the range, once nobody does or the time is over: what was unmapped just now may linger."""
        deadline = time.monotonic() + within
        grant = self._grant
        while True:
            reach = self._desk.reach(self._region, grant.offset, grant.length, without=grant.id)
            if not reach.pids or time.monotonic() >= deadline:
                return reach
            time.sleep(_LOOK_S)

    def _note(self) -> str:
        if not self._killed:
            return ""
        return f"killed {', '.join(str(pid) for pid in sorted(self._killed))}" + (
            f": {self._refused}" if self._refused else ""
        )
