"""What a device reaches in an address space that its VMM fills, against what the VMM may let it reach.

Where its RAM lies in the guest, and what it leaves out (the PC's hole below 1 MiB, a hotplugged BAR), the VMM decides;
what counts is to which frames an IOVA leads: those of the regions its guest was granted, or memory of the VMM's own
(its firmware, and what else is in its guest's address space).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from memconsole.backend import needs
from memconsole.backend.kernel import census, pagemap, patient, procmaps
from memconsole.backend.observe.reach import Faces
from memconsole.errors import MemconsoleError, Silent
from memconsole.model import Finding, Grant, Severity
from memconsole.units import PAGE, format_address, format_size

if TYPE_CHECKING:
    from memconsole.extents import Extent

Frames = Sequence[tuple[int, int]]
"""Runs of frames: the first PFN, and how many."""


def compare(
    bdf: str, grants: Sequence[Grant], runs: Sequence[Extent], granted: Frames, own: Frames
) -> Iterator[Finding]:
    """What a device's page tables say, against the frames its guest was granted and those of its VMM."""
    evidence = f"IOMMU page tables of {bdf}"
    known = merged(granted)
    if grants and not any(_outside(run, known) < run.count for run in runs):
        names = ", ".join(grant.id for grant in grants)
        what = f"device {bdf} reaches nothing of {names}: its VMM has not mapped it"
        yield Finding("dma-missing", Severity.WARNING, bdf, what, evidence, "see the guest's log")
    known = merged([*granted, *own])
    strange = [(run, pages) for run in runs if (pages := _outside(run, known))]
    if strange:
        run = strange[0][0]
        size = format_size(sum(pages for _, pages in strange) * PAGE)
        what = f"device {bdf} reaches {size} that is neither granted to its guest nor its VMM's"
        evidence = f"{evidence}: IOVA {format_address(run.offset * PAGE)} leads to PFN {run.pfn:#x} and on"
        yield Finding(
            "dma-unknown",
            Severity.ERROR,
            bdf,
            what,
            evidence,
            "shut its guest down from inside: that closes the device",
        )


class Owning(needs.LiveGuests, Faces, Protocol):
    """What says which frames are a VMM's own."""


def own_frames(desk: Owning, guest: str) -> Frames | None:
    """The frames of all that a VMM maps and that is no region; None where it has ended, or is not shown.

    Raises:
        Silent: it has its memory map locked.
    """
    known = desk.state.guests.get(guest)
    live = desk.live_guest(guest)
    if known is None or known.pid is None or live is None:
        return None
    regions = {(each.device, each.inode) for region in desk.state.regions.values() for each in region.segments}
    regions |= {(face.device, face.inode) for face in desk.fuse_aliases}
    try:
        return patient.call(known.pid, partial(_frames_beside, regions))
    except Silent:
        raise
    except MemconsoleError:
        return None


def _frames_beside(regions: Collection[tuple[int, int]], pid: int) -> Frames:
    """The frames of what a process maps, but for mappings of these files (st_dev, st_ino)."""
    from memconsole.extents import ExtentTable

    found: list[tuple[int, int]] = []
    task = census.task("/", pid)
    with pagemap.opened(pid, task) as pages:
        for vma in procmaps.vmas("/", pid, task):
            if (vma.device, vma.inode) not in regions and not vma.path.startswith("[v"):
                with ExtentTable.scan_pagemap(pages, vma.start, vma.size) as table:
                    found += [(row.pfn, row.count) for row in table if row.pfn]
    return found


def merged(frames: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of frames in order, as PFN and the PFN behind the last."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(frames):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], first + count))
        else:
            found.append((first, first + count))
    return found


def within(run: Extent, known: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of a run leads to frames that are known (:func:`merged`), as PFN and the PFN behind the last."""
    from bisect import bisect_right

    end = run.pfn + run.count
    for first, last in known[max(0, bisect_right(known, (run.pfn, end)) - 1) :]:
        if first >= end:
            break
        if last > run.pfn:
            yield max(first, run.pfn), min(last, end)


def _outside(run: Extent, known: Sequence[tuple[int, int]]) -> int:
    """How many pages of a run lead to frames that are not known."""
    return run.count - sum(last - first for first, last in within(run, known))
