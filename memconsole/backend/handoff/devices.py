"""Devices on the way into the next kernel: quiet during the jump, and afterwards as they were.

    before   iova-BDF       where its page tables lead, recorded while guests run: only grants change them
             quiesce-BDF    the bus is taken from it once its guest stands still; undone by giving it back
    after    vfio-pci has it again ─ attached, still quiet ─ every grant of its guest mapped at the same IOVA ─ its
             tables compared page by page with what was recorded ─ the bus given back ─ the windows ─ its guest goes on

The table of a device is an ExtentTable in custody, ``iova:BDF``, by IOVA page. It is read from the kernel's own page
tables where they are shown (``kernel``), else made of the grants and their regions' frames (``ledger``). It stays in
custody while the device is not back.

A device is not reset before the jump, for that could not be undone; vfio-pci resets it afterwards, if it can be.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from memconsole.backend import steps
from memconsole.backend.dma import vfio, vmm_check
from memconsole.backend.handoff import luo
from memconsole.backend.handoff.facets import DeviceReturn, DeviceTables, QuietDevices
from memconsole.backend.handoff.manifest import Manifest, PreservedDevice
from memconsole.backend.kernel import iommu, pci, tree
from memconsole.backend.stores import files
from memconsole.errors import KernelRefused, MemconsoleError, Refused
from memconsole.extents import ChangeKind, Extent, ExtentTable, Flag, PageChange
from memconsole.model import (
    Access,
    DeviceResult,
    Finding,
    Grant,
    Guest,
    GuestKind,
    Severity,
    WindowResult,
)
from memconsole.units import PAGE, format_address, format_size

if TYPE_CHECKING:
    from memconsole.backend import needs
    from memconsole.backend.handoff.powers import Powers
    from memconsole.backend.handoff.report import Clock

IOVA = "iova:"
"""Before a device's BDF: what its table is called in custody."""
WINDOW_S = 5.0
"""Seconds a guest has to map a window."""
_POINT = "handoff-back"


# --- before the jump ------------------------------------------------------------------------------------------------


def granted_devices(desk: needs.LedgerState) -> dict[str, str]:
    """The devices that grants are for, with their guests, in the order in which they were given."""
    grants = sorted(desk.state.grants.values(), key=lambda grant: grant.created_ns)
    return {grant.dma: grant.guest for grant in grants if grant.dma is not None}


def cannot_preserve(desk: QuietDevices, bdf: str, powers: Powers) -> str:
    """Why this kernel cannot hand a device over as it is, tried in a throw-away session; empty where it can."""
    probe = luo.session_name(f"probe-{threading.get_native_id()}")
    try:
        with desk.address_spaces.borrowed_fds(bdf) as (device, iommufd), powers.create(probe) as session:
            refused = []
            for token, (what, fd) in enumerate((("iommufd", iommufd), ("VFIO device", device)), 1):
                try:
                    session.preserve(fd, token)
                except KernelRefused as error:
                    refused.append(f"PRESERVE_FD of its {what}: {errno.errorcode.get(error.errno, error.errno)}")
            return ", ".join(refused)
    except MemconsoleError as error:
        return str(error)


def preserved_device(desk: DeviceTables, bdf: str, guest: str, why: str | None) -> PreservedDevice:
    """Put where a device's tables lead into custody; ``why`` the kernel cannot preserve it, None if it need not.

    Raises:
        NotFound, KernelRefused, BadFile: neither the kernel nor the regions can be read.
    """
    table, source = device_table(desk, bdf, guest)
    with table:
        desk.custody.put(IOVA + bdf, table.fd)
        return PreservedDevice(bdf, guest, IOVA + bdf, source, table.stats().present, len(table), why == "", why or "")


def device_table(desk: DeviceTables, bdf: str, guest: str, source: str = "") -> tuple[ExtentTable, str]:
    """Where a device's tables lead now, and who says so: ``kernel`` or ``ledger``; ``source``: who is to be asked.

    Raises:
        NotFound, KernelRefused, BadFile: who is asked does not know.
    """
    if source != "ledger":
        try:
            table = iommu.table(desk.root, pci.iommu_group(desk.root, bdf))
            if guest not in desk.address_spaces.vmm_filled:
                return table, "kernel"
            with table:
                return ExtentTable.from_rows(_in_ram(desk, guest, table)), "kernel"
        except tree.UNREADABLE:
            if source:
                raise
    grants = [grant for grant in desk.state.grants_of(guest=guest) if grant.dma is not None]
    return ExtentTable.from_rows(row for grant in grants for row in _meant(desk, grant)), "ledger"


def _meant(desk: DeviceTables, grant: Grant) -> Iterator[Extent]:
    """Where a region has a grant's pages, by IOVA."""
    index, offset = divmod(grant.offset, files.SEGMENT)
    first, end = offset // PAGE, (offset + grant.length) // PAGE
    flags = Flag.PRESENT | Flag.READ | (Flag.WRITE if grant.access is Access.RW else 0)
    with desk.segment_frames(grant.region, index) as table:
        for row in table:
            start, stop = max(row.offset, first), min(row.offset + row.count, end)
            if start < stop:
                iova = (grant.gpa or 0) // PAGE + start - first
                yield Extent(iova, row.pfn + start - row.offset, stop - start, flags)


def _in_ram(desk: DeviceTables, guest: str, table: ExtentTable) -> Iterator[Extent]:
    """What of the rows leads to memory that a guest was granted; what else its VMM shows it is new with each VMM."""
    frames = vmm_check.merged(
        (row.pfn, row.count)
        for grant in desk.state.grants_of(guest=guest)
        if grant.dma is not None
        for row in _meant(desk, grant)
    )
    for row in table:
        for first, last in vmm_check.within(row, frames):
            yield Extent(row.offset + first - row.pfn, first, last - first, row.flags)


def differences(was: ExtentTable, now: ExtentTable) -> list[PageChange]:
    """What leads elsewhere, or may be used otherwise; how large the pages are that lead there does not count."""
    changes = was.diff(now)
    return [
        each for each in changes if each.kind is not ChangeKind.FLAGS or (each.old_flags ^ each.new_flags) & ~Flag.HUGE
    ]


# --- after it -------------------------------------------------------------------------------------------------------


class RebuiltDevices(NamedTuple):
    """What became of the devices and windows: for the report, what does not match, and whose guests must wait."""

    devices: tuple[DeviceResult, ...]
    windows: tuple[WindowResult, ...]
    findings: tuple[Finding, ...]
    waiting: frozenset[str]


def missing_devices(desk: QuietDevices, described: Manifest, guest: str) -> list[PreservedDevice]:
    """The devices of a guest that are not back yet, and that its grants still mean."""
    return [each for each in described.devices if each.guest == guest and _is_away(desk, each)]


def _is_away(desk: QuietDevices, each: PreservedDevice) -> bool:
    """Whether a device is not back, though a grant means it."""
    back = desk.address_spaces.devices.get(each.bdf) == each.guest and each.bdf not in desk.address_spaces.quiesced
    return not back and granted_devices(desk).get(each.bdf) == each.guest and each.table in desk.custody.names()


def rebuild_devices(desk: DeviceReturn, described: Manifest, clock: Clock, only: str | None = None) -> RebuiltDevices:
    """Rebuild every device that was recorded (``only`` a guest's), and give every window again.

    It may be done again by whoever is interrupted. A device that does not come back as it was stays quiet.
    """
    devices, windows, findings, waiting = [], [], [], set()
    names, meant = desk.custody.names(), granted_devices(desk)
    carried = {stopped.guest.name for stopped in described.guests}
    for each in described.devices:
        if each.table not in names or meant.get(each.bdf) != each.guest or only not in {None, each.guest}:
            continue
        if _is_handed(desk, each.guest) and desk.live_guest(each.guest) is None:
            continue  # it is, by :func:`hand_devices`, before its VMM is started
        made, found = _device(desk, each, kept=described.report.kind == "rehearse")
        if found is None and (each.guest not in carried or desk.live_guest(each.guest) is not None):
            desk.address_spaces.restart(each.bdf)  # else its guest is not back, and it stays quiet until it is
            made = replace(made, back_ns=clock.now())
        devices.append(made)
        if found is not None:
            findings.append(found)
            waiting.add(each.guest)
    for grant in described.windows:
        if grant.id in desk.state.windows and only in {None, grant.guest}:
            if described.report.kind == "rehearse" and grant.guest not in carried:
                continue  # its process goes on meanwhile
            window, found = _window(desk, grant.id)
            windows.append(window)
            if found is not None:
                findings.append(found)
                waiting.add(grant.guest)
    return RebuiltDevices(tuple(devices), tuple(windows), tuple(findings), frozenset(waiting))


def _device(desk: DeviceTables, each: PreservedDevice, *, kept: bool) -> tuple[DeviceResult, Finding | None]:
    how = "kept" if kept else "preserved" if each.preserved else "rebuilt"
    made = DeviceResult(each.bdf, each.guest, each.pages, each.runs, each.source, how, each.quiesced_ns, why=each.why)
    try:
        _rebuild(desk, each)
        changes = _differences(desk, each)
    except MemconsoleError as error:
        what = f"device {each.bdf} of guest {each.guest} is not back: {error}"
        remedy = f"{error.remedy or 'look at dmesg'}; then: memconsole guest resume {each.guest}"
        return replace(made, why=str(error)), Finding("handoff-device", Severity.ERROR, each.bdf, what, "vfio", remedy)
    steps.passed(f"{_POINT}.compared")
    if changes:
        pages = sum(change.count for change in changes)
        why = f"{format_size(pages * PAGE)} differ: {_change_text(changes[0])}"
        what = f"device {each.bdf} of guest {each.guest} leads elsewhere than before: {why}"
        first = "see the guest's log" if _is_handed(desk, each.guest) else "revoke its grants, map them again"
        remedy = f"the device stays quiet: {first}, then: memconsole guest resume {each.guest}"
        where = "the IOMMU's page tables" if each.source == "kernel" else "the regions' frames"
        return (
            replace(made, same=False, why=why),
            Finding("handoff-iova", Severity.ERROR, each.bdf, what, where, remedy),
        )
    return replace(made, same=True), None


def _rebuild(desk: QuietDevices, each: PreservedDevice) -> None:
    """Bind, attach and map as it was; what is there already stays, and what a VMM maps is its own."""
    if _is_handed(desk, each.guest):
        return
    if desk.address_spaces.devices.get(each.bdf) != each.guest:
        _bind(desk, each.bdf)
        steps.passed(f"{_POINT}.bound")
        desk.address_spaces.attach(each.guest, each.bdf, quiet=True)
        steps.passed(f"{_POINT}.attached")
    for grant in desk.state.grants_of(guest=each.guest):
        if grant.dma is None:
            continue
        try:
            desk.address_spaces.map(grant)
        except KernelRefused as error:
            if error.code != "IovaTaken":  # by whoever was interrupted here, or for another device of the guest
                raise
    steps.passed(f"{_POINT}.mapped")


def hand_devices(desk: QuietDevices, described: Manifest | None, guest: Guest) -> None:
    """Open what a VMM that is started again is to be given; devices that were recorded are quiet until they are back.

    Raises:
        NotFound, Denied, KernelRefused, Refused: a device cannot be had.
    """
    meant = (
        [bdf for bdf, owner in granted_devices(desk).items() if owner == guest.name]
        if _is_handed(desk, guest.name)
        else []
    )
    if not meant:
        return
    recorded = {each.bdf for each in described.devices} if described is not None else set()
    desk.address_spaces.close(guest.name)
    for bdf in meant:
        _bind(desk, bdf)
        desk.address_spaces.hand_device(guest.name, bdf, quiet=bdf in recorded)
    steps.passed(f"{_POINT}.handed")


def _is_handed(desk: needs.LedgerState, guest: str) -> bool:
    """Whether a guest's VMM confines its devices itself."""
    known = desk.state.guests.get(guest)
    return known is not None and known.kind is GuestKind.QEMU


def _bind(desk: needs.HostTree, bdf: str) -> None:
    driver = vfio.driver(desk.root, bdf)
    if driver is None:
        vfio.bind(desk.root, bdf)
    elif driver != vfio.DRIVER:
        remedy = f"echo {bdf} > /sys/bus/pci/devices/{bdf}/driver/unbind"
        raise Refused(f"device {bdf} is in use", f"the kernel's {driver} has it", remedy, code="DeviceInUse")


def _differences(desk: DeviceTables, each: PreservedDevice) -> list[PageChange]:
    fd, _ = desk.custody.get(each.table)
    try:
        was = ExtentTable.from_fd(fd)
    finally:
        os.close(fd)
    with was:
        now, _ = device_table(desk, each.bdf, each.guest, each.source)
        with now:
            return differences(was, now)


def _change_text(change: PageChange) -> str:
    at = f"IOVA {format_address(change.offset * PAGE)}"
    if change.kind is ChangeKind.VANISHED:
        return f"{at} led to PFN {change.old_pfn:#x}, and leads nowhere"
    if change.kind is ChangeKind.APPEARED:
        return f"{at} led nowhere, and leads to PFN {change.new_pfn:#x}"
    if change.kind is ChangeKind.MOVED:
        return f"{at} led to PFN {change.old_pfn:#x}, and leads to {change.new_pfn:#x}"
    return f"{at} may be written where it could only be read, or only read where it could be written"


def _window(desk: DeviceReturn, id: str) -> tuple[WindowResult, Finding | None]:
    grant = desk.state.windows[id]
    made = WindowResult(grant.window, grant.guest, id)
    guest, live = desk.state.guests[grant.guest], desk.live_guest(grant.guest)
    if live is None:
        why = "its process ended" if guest.kind is GuestKind.PROCESS else "its guest is not back"
        return replace(made, why=why), None
    try:
        desk.connected(grant.guest)
        with desk.window_offer(grant) as offer:
            given = live.offer(offer, WINDOW_S)
        return replace(made, back=given, why="" if given else "the guest gets it as soon as its agent connects"), None
    except MemconsoleError as error:
        what = f"guest {grant.guest} did not get window {grant.window} again: {error}"
        remedy = f"memconsole window revoke {grant.window}, map it again, then: memconsole guest resume {grant.guest}"
        return (
            replace(made, why=str(error)),
            Finding("handoff-window", Severity.ERROR, grant.window, what, "sysfs", remedy),
        )


def reconcile(desk: QuietDevices, described: Manifest) -> None:
    """Let go of the tables of devices that are back, or that nobody means any more."""
    for each in described.devices:
        if each.table in desk.custody.names() and not _is_away(desk, each):
            desk.custody.drop(each.table)
