"""What devices reach by kernel truth, against what their guests were granted: findings.

    dma-lost       a grant is for a device that nobody holds any more: it reaches nothing
    dma-missing    pages of a grant that the device's page tables lack
    dma-unknown    pages in the tables that no grant accounts for: the device reaches them
    dma-elsewhere  pages that lead to other frames than the region has (its file was punched under the device)
                   (where a VMM fills the address space, :mod:`.filled` compares by frame: no page is elsewhere)
    device-shared  a device of a guest is not alone in its IOMMU group: the others reach the same memory

Page tables are compared where the kernel shows them (:mod:`~memconsole.backend.kernel.vtd`), frames for regions up to
``FRAMES_MAX``; what is not compared is not claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memconsole.backend.dma import filled
from memconsole.backend.kernel import iommu, pci, tree, vtd
from memconsole.backend.stores import memfd
from memconsole.errors import NotFound
from memconsole.model import Finding, Grant, Severity
from memconsole.units import PAGE, format_address, format_size

if TYPE_CHECKING:
    from memconsole.backend.desk import Desk

FRAMES_MAX = 4 << 30
"""Bytes of a region up to which its frames are read for each look: tens of milliseconds."""
_BRIDGE = 0x06


class Run(NamedTuple):
    """Pages from ``page`` on that lead to frames from ``pfn`` on; numbers of 4 KiB pages."""

    page: int
    pfn: int
    pages: int


def check(desk: Desk) -> tuple[Finding, ...]:
    """The findings about every device that the ledger grants memory for; none while an action is under way.

    Raises:
        Denied, KernelRefused, BadFile: the devices of this host cannot be read.
    """
    state = desk.state
    given: dict[tuple[str, str], list[Grant]] = {}
    for grant in state.grants.values():
        if grant.dma is not None:
            given.setdefault((grant.guest, grant.dma), [])
    by_vmm = desk.spaces.filled
    for bdf, guest in desk.spaces.devices.items():
        if guest in by_vmm:  # it has what it was handed, also when its grants are gone
            given.setdefault((guest, bdf), [])
    if state.unfinished or not given:
        return ()
    for (guest, _), grants in given.items():
        grants += [grant for grant in state.grants_of(guest=guest) if grant.dma is not None]
    found: list[Finding] = [*_lost(given, desk.spaces.devices), *_shared(desk.root, {bdf for _, bdf in given})]
    for (guest, bdf), grants in given.items():
        if guest in by_vmm:
            found += _filled(desk, guest, bdf, grants)
        elif desk.spaces.devices.get(bdf) == guest and (runs := _runs(desk.root, bdf)) is not None:
            frames = {grant.id: _frames(desk, grant) for grant in grants}
            found += compare(bdf, grants, runs, frames)
    return tuple(found) if desk.state is state else ()


def compare(
    bdf: str, grants: Sequence[Grant], runs: Sequence[Run], frames: Mapping[str, Sequence[Run] | None]
) -> Iterator[Finding]:
    """What a device's page tables say, against grants with a GPA and their frames by IOVA page (None: not read)."""
    evidence = f"{vtd.DEBUGFS}/{bdf}"
    known = 0
    for grant in grants:
        first, pages = (grant.gpa or 0) // PAGE, grant.length // PAGE
        inside = [_cut(run, first, pages) for run in runs if run.page < first + pages and first < run.page + run.pages]
        covered = sum(run.pages for run in inside)
        known += covered
        if covered < pages:
            what = f"device {bdf} lacks {format_size((pages - covered) * PAGE)} of {grant.id}: its DMA there fails"
            remedy = f"memconsole revoke {grant.id}, and map it again"
            yield Finding("dma-missing", Severity.WARNING, grant.id, what, evidence, remedy)
        meant = frames[grant.id]
        if meant is not None and (wrong := covered - _same(inside, meant)):
            what = f"device {bdf} finds other frames than region {grant.region} has in {format_size(wrong * PAGE)}"
            remedy = f"revoke {grant.id}, and map it again: somebody emptied parts of the region under the device"
            yield Finding("dma-elsewhere", Severity.ERROR, grant.id, what, evidence, remedy)
    total = sum(run.pages for run in runs)
    if total > known:
        outside = next(run for run in runs if not any(_inside(run, grant) for grant in grants))
        what = f"device {bdf} reaches {format_size((total - known) * PAGE)} that no grant accounts for"
        evidence = f"{evidence}: IOVA {format_address(outside.page * PAGE)} leads to PFN {outside.pfn:#x}"
        remedy = "revoke the device's grants: that closes it"
        yield Finding("dma-unknown", Severity.ERROR, bdf, what, evidence, remedy)


def _filled(desk: Desk, guest: str, bdf: str, grants: Sequence[Grant]) -> list[Finding]:
    found: list[Finding] = []
    for _ in range(2):  # the guest may have moved something between the looks
        runs, own = _runs(desk.root, bdf), filled.own_frames(desk, guest)
        frames = [_frames(desk, grant) for grant in grants]
        if runs is None or own is None or None in frames:
            return []
        granted = [(run.pfn, run.pages) for each in frames for run in each or ()]
        found = list(filled.compare(bdf, grants, runs, granted, own))
        if not found:
            break
    return found


def _lost(given: Iterable[tuple[str, str]], attached: Mapping[str, str]) -> Iterator[Finding]:
    for guest, bdf in given:
        if attached.get(bdf) != guest:
            what = f"guest {guest} was granted memory for device {bdf}, and nobody holds the device"
            remedy = f"revoke the grants of {guest}, and map them again with --dma {bdf}"
            yield Finding("dma-lost", Severity.WARNING, bdf, what, "custody", remedy)


def _shared(root: tree.Root, devices: set[str]) -> Iterator[Finding]:
    known = [function.device for function in pci.functions(root)]
    for device in known:
        if device.bdf not in devices:
            continue
        beside = [
            each.bdf
            for each in known
            if each.group == device.group and each.bdf != device.bdf and each.class_code >> 16 != _BRIDGE
        ]
        if beside:
            what = f"device {device.bdf} is not isolated: {', '.join(beside)} shares IOMMU group {device.group} with it"
            remedy = "give nothing else of this group away, or move the device to a slot with ACS"
            where = f"/sys/kernel/iommu_groups/{device.group}/devices"
            yield Finding("device-shared", Severity.WARNING, device.bdf, what, where, remedy)


def _runs(root: tree.Root, bdf: str) -> list[Run] | None:
    """What a device's tables lead to; None where the kernel does not show them, or they are too many."""
    try:
        with vtd.table(root, bdf, vtd.Budget(iommu.LEAVES_MAX)) as found:
            return [Run(row.offset, row.pfn, row.count) for row in found]
    except (*tree.UNREADABLE, vtd.TooMany):
        return None


def _frames(desk: Desk, grant: Grant) -> list[Run] | None:
    """Where the region has a grant's pages, by IOVA page."""
    from memconsole.extents import ExtentTable

    region = desk.state.regions[grant.region]
    if region.size > FRAMES_MAX:
        return None
    index, offset = divmod(grant.offset, memfd.SEGMENT)
    try:
        with (
            desk.borrowed(grant.region) as fds,
            ExtentTable.scan_fd(fds[index], region.segments[index].size) as table,
        ):
            base = ((grant.gpa or 0) - offset) // PAGE
            return [Run(base + row.offset, row.pfn, row.count) for row in table]
    except NotFound:
        return None


def _cut(run: Run, first: int, pages: int) -> Run:
    """The part of a run that lies in a range of pages."""
    start, end = max(run.page, first), min(run.page + run.pages, first + pages)
    return Run(start, run.pfn + start - run.page, end - start)


def _inside(run: Run, grant: Grant) -> bool:
    first = (grant.gpa or 0) // PAGE
    return first <= run.page and run.page + run.pages <= first + grant.length // PAGE


def _same(runs: Sequence[Run], meant: Sequence[Run]) -> int:
    """How many pages lead to the same frames in both, each sorted by page."""
    same = at = 0
    for run in runs:
        while at < len(meant) and meant[at].page + meant[at].pages <= run.page:
            at += 1
        for other in meant[at:]:
            if other.page >= run.page + run.pages:
                break
            if other.pfn - other.page == run.pfn - run.page:
                same += min(run.page + run.pages, other.page + other.pages) - max(run.page, other.page)
    return same
