"""Whether memory is what it was: PFN by PFN for free, by contents where digests were taken before.

memconsole-resume has compared the placement before any guest ran. After a jump it cannot change while the memory is
whole, so it is compared once more; on one kernel pages come and go with the guests, and the early word counts.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from memconsole.backend import needs
from memconsole.backend.custody.names import custody_name
from memconsole.backend.handoff.manifest import Manifest, PreservedRegion
from memconsole.extents import digest_fd
from memconsole.model import Finding, RegionResult, Severity


def compare_regions(
    desk: needs.RegionFrames, manifest: Manifest, moved: Collection[str]
) -> tuple[tuple[RegionResult, ...], list[Finding]]:
    """Every region of a manifest against what is held now; a difference is a finding.

    ``moved`` are the segments (as custody calls them) whose pages memconsole-resume found elsewhere.
    """
    kept, findings = [], []
    for placed in manifest.regions:
        name = placed.region.name
        if not desk.holds_region(name):
            kept.append(RegionResult(name, placed.region.size, placed.runs, placed.preserve_ns, same=False))
            continue
        began = time.monotonic_ns()
        same = not any(custody_name(name, row) in moved for row in range(len(placed.digests)))
        if manifest.report.kind == "run":
            same = same and page_digests(desk, placed) == placed.digests
        took = time.monotonic_ns() - began
        contents = None
        if placed.contents:
            contents = tuple(digest_fd(fd) for fd in desk.fds(name)) == placed.contents
        kept.append(
            RegionResult(
                name,
                placed.region.size,
                placed.runs,
                placed.preserve_ns,
                verify_ns=took,
                same=same,
                contents=contents,
            )
        )
        findings += _differs(name, manifest.report.kind, same=same, contents=contents)
    return tuple(kept), findings


def page_digests(desk: needs.RegionFrames, placed: PreservedRegion) -> tuple[str, ...]:
    """The digests of where a region's pages are now, a segment each."""
    return frame_digests(desk, placed.region.name, len(placed.region.segments))


def frame_digests(desk: needs.RegionFrames, region: str, segments: int) -> tuple[str, ...]:
    """The digests of where the pages of a region of so many segments are now."""
    found = []
    for index in range(segments):
        with desk.segment_frames(region, index) as table:
            found.append(table.digest())
    return tuple(found)


def _differs(name: str, kind: str, *, same: bool, contents: bool | None) -> list[Finding]:
    found = []
    if not same and kind == "run":
        what = f"the pages of region {name} are not in the frames they were in before the jump"
        remedy = "do not trust the contents: compare them with a copy"
        found.append(Finding("handoff-pages-moved", Severity.ERROR, name, what, "/proc/PID/pagemap", remedy))
    if contents is False:
        what = f"the contents of region {name} are not what they were before the guests were stopped"
        remedy = "its guests stay paused: compare the contents with a copy, then resume the guests"
        found.append(Finding("handoff-contents", Severity.ERROR, name, what, "xxh3-128 of the region", remedy))
    return found
