"""What devices reach by kernel truth, against what their guests were granted: findings.

    dma-lost           a grant is for a device that nobody holds any more: it reaches nothing
    dma-missing        pages of a grant that the device's page tables lack
    dma-writable       pages a device may write to, and its guest may only read
    dma-unknown        pages in the tables that no grant accounts for: the device reaches them
    dma-elsewhere      pages that lead to other frames than the region has (its file was punched under the device)
                       (where a VMM fills the address space, :mod:`.filled` compares by frame: no page is elsewhere)
    dma-outside        a target that is no region's memory, no window of a device and no MSI: a kexec would not keep it
    frame-shared       a device reaches frames of a region that is not its guest's
    device-shared      a device of a guest is not alone in its IOMMU group: the others reach the same memory
    device-interrupts  interrupts are not remapped: a device of a guest can send the host any of them

Page tables are compared where the kernel shows them (:mod:`~memconsole.backend.kernel.iommu`), frames for regions up to
``FRAMES_MAX``; what is not compared is not claimed. Devices that others have by VFIO are looked at where a kexec could
find them at work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from memconsole.backend import needs
from memconsole.backend.dma import vmm_check
from memconsole.backend.dma.frame_owners import WINDOW, Owners
from memconsole.backend.kernel import iommu, kho, pci, tree, vtd
from memconsole.backend.kernel.pci import Function
from memconsole.backend.stores import files
from memconsole.errors import NotFound, Silent
from memconsole.extents import Extent, ExtentTable, Flag, Part
from memconsole.model import Access, Finding, Grant, Severity
from memconsole.units import PAGE, format_address, format_size

FRAMES_MAX = 4 << 30
"""Bytes of a region up to which its frames are read for each look: tens of milliseconds."""
TARGETS_MAX = 10_000
"""Runs of frames that no grant accounts for of which it is asked whose they are."""
_RUN_MAX = (1 << 32) - 1
_VFIO = "vfio-pci"
_REACH = Flag.PRESENT | Flag.READ | Flag.WRITE

Frames = Mapping[str, Part | None]
"""Where the region of each grant has its pages: those of a table that are the grant's; None where they are not read."""


class Checking(vmm_check.Owning, needs.Borrowed, needs.DeviceReaching, Protocol):
    """What is compared: grants, address spaces and memory."""


def device_findings(desk: Checking) -> tuple[Finding, ...] | None:
    """The findings about the devices of guests, and of others by VFIO; None while an action changes what they reach.

    Raises:
        Denied, KernelRefused, BadFile: the devices of this host cannot be listed, or IOMMUs or memory not be read.
    """
    state = desk.state
    given = _device_grants(desk)
    # Functions and IOMMUs that cannot be read are gaps of the survey, in the Snapshot that these findings stand in.
    functions = pci.functions(desk.root, []) if tree.exists(desk.root, "/sys/bus/pci/devices") else ()
    held = desk.address_spaces.devices
    others = [each.device for each in functions if each.device.driver == _VFIO and each.device.bdf not in held]
    others = others if others and kho.survival(desk.root).luo else []
    if state.unfinished:
        return None
    if not (given or others):
        return ()
    devices = {bdf for _, bdf in given}
    found: list[Finding] = [
        *_lost_devices(given, held),
        *_shared_groups(functions, devices),
        *_interrupts(desk.root, devices),
    ]
    with contextlib.ExitStack() as opened:
        look = _TableReader(desk, functions, opened)
        for (guest, bdf), grants in given.items():
            if guest in desk.address_spaces.vmm_filled:
                found += _vmm_filled(look, guest, bdf, grants)
            elif held.get(bdf) == guest and (table := look.device_table(bdf)) is not None:
                frames = {grant.id: look.grant_part(grant) for grant in grants}
                found += table_findings(bdf, grants, table, frames, look.owners)
        for device in others:
            if (table := look.device_table(device.bdf)) is not None:
                found += _targets(device.bdf, table.rows(0, TARGETS_MAX), look.owners(), set())
    return tuple(found) if desk.state is state else None


def _device_grants(desk: needs.DeviceReaching) -> dict[tuple[str, str], list[Grant]]:
    """The grants for devices of each guest, by guest and device."""
    given: dict[tuple[str, str], list[Grant]] = {}
    for grant in desk.state.grants.values():
        if grant.dma is not None:
            given.setdefault((grant.guest, grant.dma), [])
    for bdf, guest in desk.address_spaces.devices.items():
        if guest in desk.address_spaces.vmm_filled:  # it has what it was handed, also when its grants are gone
            given.setdefault((guest, bdf), [])
    for (guest, _), grants in given.items():
        grants += [grant for grant in desk.state.grants_of(guest=guest) if grant.dma is not None]
    return given


def table_findings(
    bdf: str, grants: Sequence[Grant], table: ExtentTable, frames: Frames, owners: Callable[[], Owners]
) -> Iterator[Finding]:
    """The findings about a device, whose page tables are given, of a guest with these grants."""
    differences = compare_tables(grants, table, frames)
    yield from difference_findings(bdf, grants, differences)
    if differences.unknown:
        owned = {grant.region for grant in grants}
        yield from _targets(bdf, differences.unknown, owners(), owned)


class Differences(NamedTuple):
    """Pages by grant that a device lacks, finds elsewhere, or may write to and should not; and what is no grant's.

    ``unknown`` are the first ``TARGETS_MAX`` runs of these, ``strange`` the pages of all.
    """

    missing: dict[str, int]
    elsewhere: dict[str, int]
    writable: dict[str, int]
    unknown: list[Extent]
    strange: int


def compare_tables(grants: Sequence[Grant], table: ExtentTable, frames: Frames) -> Differences:
    """What a device's page tables say, against grants with a GPA and the frames of their regions."""
    grants = sorted(grants, key=_first)
    ranges = [(_first(grant), _first(grant) + _pages(grant)) for grant in grants]
    with ExtentTable.of_parts(_granted_parts(grants, frames, table)) as meant, _without_leaf_sizes(table) as reached:
        counted, outside, strange = meant.diff_count(reached, ranges, TARGETS_MAX)
    tallies = {grant.id: tally for grant, tally in zip(grants, counted, strict=True)}
    missing = {id: tally.vanished for id, tally in tallies.items()}
    for grant in grants:
        if frames[grant.id] is None:
            missing[grant.id] = _pages(grant) - _present(table, grant)
    return Differences(
        missing,
        {id: tally.moved for id, tally in tallies.items()},
        {id: tally.widened for id, tally in tallies.items()},
        [Extent(run.offset, run.new_pfn, run.count, run.new_flags) for run in outside],
        strange,
    )


def difference_findings(bdf: str, grants: Sequence[Grant], found: Differences) -> Iterator[Finding]:
    """Differences as findings."""
    evidence = f"IOMMU page tables of {bdf}"
    again = "and map it again"
    for grant in grants:
        if pages := found.missing[grant.id]:
            what = f"device {bdf} lacks {format_size(pages * PAGE)} of {grant.id}: its DMA there fails"
            remedy = f"memconsole revoke {grant.id}, {again}"
            yield Finding("dma-missing", Severity.WARNING, grant.id, what, evidence, remedy)
        if pages := found.elsewhere[grant.id]:
            what = (
                f"device {bdf} reaches other frames than those of region {grant.region} in {format_size(pages * PAGE)}"
            )
            remedy = f"memconsole revoke {grant.id}, {again}: parts of the region were emptied while the device had it"
            yield Finding("dma-elsewhere", Severity.ERROR, grant.id, what, evidence, remedy)
        if pages := found.writable[grant.id]:
            what = f"device {bdf} may write to {format_size(pages * PAGE)} of {grant.id}, which is granted read-only"
            yield Finding("dma-writable", Severity.ERROR, grant.id, what, evidence, f"memconsole revoke {grant.id}")
    if found.unknown:
        size = format_size(found.strange * PAGE)
        what = f"device {bdf} reaches {size} that no grant accounts for"
        remedy = "revoke the device's grants: that closes it"
        yield Finding("dma-unknown", Severity.ERROR, bdf, what, f"{evidence}: {_where(found.unknown[0])}", remedy)


def _where(run: Extent) -> str:
    return f"IOVA {format_address(run.offset * PAGE)} leads to PFN {run.pfn:#x}"


def _targets(bdf: str, runs: Sequence[Extent], owners: Owners, owned: set[str]) -> Iterator[Finding]:
    """Whose frames they are that a device reaches and no grant says so."""
    shared: dict[str, Extent] = {}
    outside: list[Extent] = []
    for owner, run in owners.pieces(runs):
        if owner is None:
            outside.append(run)
        elif owner != WINDOW and owner not in owned:
            shared.setdefault(owner, run)
    evidence = f"IOMMU page tables of {bdf}"
    for region, run in shared.items():
        where = f"{evidence}: {_where(run)}"
        what = f"device {bdf} reaches frames of region {region}, which its guest was not granted"
        yield Finding(
            "frame-shared",
            Severity.ERROR,
            bdf,
            what,
            where,
            f"take the device from its holder: revoke its grants, or unbind its driver; {region} keeps its contents",
        )
    if outside:
        size = format_size(sum(run.count for run in outside) * PAGE)
        where = f"{evidence}: {_where(outside[0])}"
        what = f"{size} that device {bdf} reaches belong to no region, window or MSI"
        remedy = (
            "stop the device before a handoff, or grant the memory: memconsole map REGION GUEST --gpa GPA --dma BDF"
        )
        yield Finding("dma-outside", Severity.WARNING, bdf, what, where, remedy)


def _granted_parts(grants: Sequence[Grant], frames: Frames, table: ExtentTable) -> Iterator[Part]:
    """What the table should be; where frames were not read, what it is."""
    for grant in grants:
        first, pages = _first(grant), _pages(grant)
        access = _REACH if grant.access is Access.RW else Flag.PRESENT | Flag.READ
        part = frames[grant.id]
        if part is None:
            yield Part(table, first, pages, first, _REACH)
        else:
            yield part._replace(pages=pages, to=first, keep=Flag(0), add=access)


def _without_leaf_sizes(table: ExtentTable) -> ExtentTable:
    """The table without what says how large its leaves are."""
    span = table.end - table.first
    return ExtentTable.of_parts([Part(table, table.first, span, table.first, _REACH)] if span else [])


def _present(table: ExtentTable, grant: Grant) -> int:
    with ExtentTable.of_parts([Part(table, _first(grant), _pages(grant), 0)]) as part:
        return part.stats().present


def _first(grant: Grant) -> int:
    return (grant.gpa or 0) // PAGE


def _pages(grant: Grant) -> int:
    return grant.length // PAGE


class _TableReader:
    """The tables of regions and devices, read when they are asked for, closed with the look that asked."""

    def __init__(self, desk: Checking, functions: Sequence[Function], opened: contextlib.ExitStack) -> None:
        self.desk = desk
        self._opened = opened
        self._groups = {function.device.bdf: function.device.group for function in functions}
        self._tables: dict[tuple[str, int], ExtentTable | None] = {}
        self._bars = [bar for function in functions for bar in function.bars if not bar.io]
        self._owners: Owners | None = None

    def grant_part(self, grant: Grant) -> Part | None:
        """A grant's pages in the table of its segment; None where it is not read."""
        index, offset = divmod(grant.offset, files.SEGMENT)
        table = self._segment(grant.region, index)
        return None if table is None else Part(table, offset // PAGE, grant.length // PAGE, 0)

    def owners(self) -> Owners:
        """Whose frames are, as far as regions are read."""
        if self._owners is None:
            with ExtentTable.from_rows(self._windows()) as windows:
                known = [(WINDOW, windows)]
                for name, region in self.desk.state.regions.items():
                    tables = (self._segment(name, index) for index in range(len(region.segments)))
                    known += [(name, table) for table in tables if table is not None]
                self._owners = self._opened.enter_context(Owners(known))
        return self._owners

    def _windows(self) -> Iterator[Extent]:
        """The frames of every window, one window's behind the other's."""
        at = 0
        for bar in self._bars:
            first, end = bar.start // PAGE, -(-(bar.start + bar.size) // PAGE)
            for pfn in range(first, end, _RUN_MAX):
                count = min(_RUN_MAX, end - pfn)
                yield Extent(at, pfn, count, Flag.PRESENT)
                at += count

    def device_table(self, bdf: str) -> ExtentTable | None:
        """A device's address space as it is now; None where the kernel does not show it, or it is too much."""
        group = self._groups.get(bdf)
        if group is None:
            return None
        try:
            table = iommu.table(self.desk.root, str(group), vtd.Budget(iommu.LEAVES_MAX))
        except (*tree.UNREADABLE, vtd.TooMany):
            return None
        return self._opened.enter_context(table)

    def _segment(self, name: str, index: int) -> ExtentTable | None:
        key = name, index
        if key not in self._tables:
            self._tables[key] = self._scan(name, index)
        return self._tables[key]

    def _scan(self, name: str, index: int) -> ExtentTable | None:
        region = self.desk.state.regions[name]
        if region.size > FRAMES_MAX:
            return None
        try:
            with self.desk.borrowed_fds(name) as fds:
                frames = self.desk.store_of(name).frames(fds[index], region.segments[index].size)
                return self._opened.enter_context(frames)
        except NotFound:
            return None


def _vmm_filled(look: _TableReader, guest: str, bdf: str, grants: Sequence[Grant]) -> list[Finding]:
    """A device whose address space a VMM fills; looked at twice, for its guest may have moved something meanwhile."""
    parts = [look.grant_part(grant) for grant in grants]
    granted = [(row.pfn, row.count) for part in parts if part is not None for row in _rows(part)]
    found: list[Finding] = []
    for _ in range(2):
        table = look.device_table(bdf)
        try:
            own = vmm_check.own_frames(look.desk, guest)
        except Silent as error:
            what = f"what device {bdf} reaches is not known: {error.what}"
            return [Finding("dma-unseen", Severity.WARNING, bdf, what, error.why, error.remedy)]
        if table is None or own is None or None in parts:
            return []
        found = list(vmm_check.compare(bdf, grants, list(table), granted, own))
        if not found:
            break
    return found


def _rows(part: Part) -> list[Extent]:
    with ExtentTable.of_parts([part]) as table:
        return table.rows()


def _lost_devices(given: Iterable[tuple[str, str]], attached: Mapping[str, str]) -> Iterator[Finding]:
    for guest, bdf in given:
        if attached.get(bdf) != guest:
            what = f"guest {guest} was granted memory for device {bdf}, and the device is not in custody"
            remedy = f"revoke the grants of {guest}, and map them again with --dma {bdf}"
            yield Finding("dma-lost", Severity.WARNING, bdf, what, "custody", remedy)


def _shared_groups(functions: Sequence[Function], devices: set[str]) -> Iterator[Finding]:
    known = [function.device for function in functions]
    for device in known:
        if device.bdf not in devices:
            continue
        beside = [
            each.bdf
            for each in known
            if each.group == device.group and each.bdf != device.bdf and not pci.is_bridge(each)
        ]
        if beside:
            what = f"device {device.bdf} is not isolated: it shares IOMMU group {device.group} with {', '.join(beside)}"
            remedy = "give no other device of this group to a guest, or move the device to a slot with ACS"
            where = f"/sys/kernel/iommu_groups/{device.group}/devices"
            yield Finding("device-shared", Severity.WARNING, device.bdf, what, where, remedy)


def _interrupts(root: tree.Root, devices: set[str]) -> Iterator[Finding]:
    """Devices of guests where an IOMMU of Intel or AMD remaps no interrupts: their chips would be named IR-..."""
    kinds = {unit.kind for unit in iommu.units(root, [])} if devices else set()
    if not kinds & {"intel-iommu", "amd-iommu"} or b" IR-" in tree.read(root, "/proc/interrupts"):
        return
    for bdf in sorted(devices):
        what = f"device {bdf} can send the host any interrupt: interrupts are not remapped"
        remedy = "enable interrupt remapping in the firmware, and boot without intremap=off"
        where = "/proc/interrupts: no chip of it is IR-..."
        yield Finding("device-interrupts", Severity.WARNING, bdf, what, where, remedy)
