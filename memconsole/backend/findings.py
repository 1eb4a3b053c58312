"""Differences between what should be and what is, as findings of a Snapshot.

    error    memory is lost, wrong, or reachable by somebody it was not granted to
    warning  memory will be lost, or something we hold has ended
    info     worth knowing

What a host as such cannot do is no finding: that is what gaps and ``doctor`` are for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from memconsole.backend.kernel import kho, pci
from memconsole.model import Finding, GrantState, Guest, GuestKind, GuestState, Region, RegionState, Severity, Snapshot
from memconsole.units import format_size

if TYPE_CHECKING:
    from memconsole.backend.survey import Over

_STILL = frozenset({RegionState.FROZEN, RegionState.PRESERVED})
"""States in which a region's frames must not change."""
RUNS_SLOW = 8192
"""Runs of frames from which on the next kernel's boot takes seconds longer (its scans are quadratic in them)."""


def find(snapshot: Snapshot, strays: Iterable[Over], ours: Collection[int] = ()) -> tuple[Finding, ...]:
    """Every difference in this Snapshot, which has the standing findings already.

    ``strays`` are mappings of regions that no grant accounts for, ``ours`` the processes that hold files for us.
    """
    waiting = {finding.subject for finding in snapshot.findings if finding.id == "guest-aside"}
    return (
        *(finding for region in snapshot.regions for finding in _region(region, snapshot)),
        *(finding for guest in snapshot.guests if guest.name not in waiting for finding in _guest(guest)),
        *_grants(snapshot),
        *_strays(strays),
        *_quarantine(snapshot),
        *_windows(snapshot),
        *_unpreserved(snapshot),
        *_sessions(snapshot, ours),
    )


def _region(region: Region, snapshot: Snapshot) -> Iterator[Finding]:
    if region.seen is None:
        yield Finding(
            "region-lost",
            Severity.ERROR,
            region.name,
            f"nobody holds the memory of region {region.name} any more",
            "custody",
            f"its contents are gone: memconsole release {region.name}",
        )
        return
    if region.seen.runs is not None and region.seen.runs > RUNS_SLOW and snapshot.survival.luo:
        yield Finding(
            "region-fragmented",
            Severity.WARNING,
            region.name,
            f"region {region.name} lies in {region.seen.runs:,} runs of frames: a kexec with it boots slowly",
            "/proc/self/pagemap",
            "reserve it anew where transparent huge pages are allowed (shmem_enabled=advise) or with --page-size 2M",
        )
    if region.seen.moved:
        pinned = any(grant.region == region.name and grant.dma is not None for grant in snapshot.grants)
        yield Finding(
            "region-moved",
            Severity.WARNING if pinned or region.state in _STILL else Severity.INFO,
            region.name,
            f"{format_size(region.seen.moved)} of region {region.name} came to lie in other frames between two scans",
            "/proc/self/pagemap, at the last scan and the one before",
            "if nobody emptied parts of it, the kernel moved them and the contents are whole: compare digests",
        )
    if region.page_size > snapshot.host.page_size and snapshot.survival.luo:
        yield Finding(
            "region-not-preserved",
            Severity.WARNING if region.grants else Severity.INFO,
            region.name,
            f"region {region.name} would not survive a kexec: its pages come from the hugetlb pool",
            "live update preserves no hugetlb memory",
            "reserve it with 4K pages; transparent huge pages bring the same speed",
        )


def _guest(guest: Guest) -> Iterator[Finding]:
    if guest.kind is not GuestKind.FOREIGN and guest.state is GuestState.GONE:
        yield Finding(
            "guest-gone",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} is gone: its process {guest.pid} ended without being stopped",
            f"/proc/{guest.pid}",
            f"memconsole guest stop {guest.name} ends its grants; its regions keep their contents",
        )
    if guest.kind is not GuestKind.FOREIGN and guest.state is GuestState.STOPPED:
        yield Finding(
            "guest-stopped",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} cannot go on: its process runs, its vCPUs do not",
            f"its own answer: {guest.progress.why}" if guest.progress is not None else "its own answer",
            f"memconsole guest stop {guest.name}, and look into its log",
        )
    if guest.progress is not None and guest.progress.wrong:
        yield Finding(
            "guest-corrupt",
            Severity.ERROR,
            guest.name,
            f"guest {guest.name} found {guest.progress.wrong:,} wrong bytes in its memory",
            "its own check of its RAM",
            "look who else maps its regions; keep it paused while you look",
        )


def _grants(snapshot: Snapshot) -> Iterator[Finding]:
    guests = {guest.name: guest for guest in snapshot.guests}
    for grant in snapshot.grants:
        guest = guests.get(grant.guest)
        if grant.state is GrantState.MAPPED and guest is not None and guest.seen is not None and not grant.seen:
            yield Finding(
                "grant-unmapped",
                Severity.WARNING,
                grant.id,
                f"guest {guest.name} said it mapped {grant.region} ({grant.id}), and does not map it",
                f"/proc/{guest.pid}/maps",
                f"memconsole revoke {grant.id}, or restart the guest",
            )
        if grant.faults is not None and not grant.faults.served:
            yield Finding(
                "faults-unserved",
                Severity.WARNING,
                grant.id,
                f"nobody serves the page faults of {grant.guest} in {grant.region}: it waits where it faults",
                "custody has its userfaultfd",
                f"memconsole revoke {grant.id}, or start the control process that has {grant.region}",
            )
        if grant.faults is not None and grant.faults.refused:
            yield Finding(
                "faults-refused",
                Severity.WARNING,
                grant.id,
                f"no memory could be had for {grant.faults.refused:,} page faults of {grant.guest} in {grant.region}",
                "fallocate",
                f"each is tried again: free memory, or memconsole revoke {grant.id}",
            )


def _strays(strays: Iterable[Over]) -> Iterator[Finding]:
    found: dict[tuple[str, int], int] = {}
    for over in strays:
        found[over.region, over.pid] = found.get((over.region, over.pid), 0) + over.vma.size
    for (region, pid), size in found.items():
        yield Finding(
            "mapping-unknown",
            Severity.ERROR,
            region,
            f"process {pid} maps {format_size(size)} of region {region} without a grant",
            f"/proc/{pid}/maps",
            f"end process {pid}, or revoke the grant of whoever gave it the region",
        )


def _quarantine(snapshot: Snapshot) -> Iterator[Finding]:
    for kept in snapshot.quarantine:
        yield Finding(
            "frames-quarantined",
            Severity.WARNING,
            kept.region,
            f"{format_size(kept.size)} of old frames of region {kept.region} are pinned since {kept.id} was revoked",
            f"/proc/kpageflags: {kept.why}",
            f"they are nobody's until the pin drops: end what {kept.guest} handed them to (pipes, io_uring, devices)",
        )


def _windows(snapshot: Snapshot) -> Iterator[Finding]:
    for window in snapshot.windows:
        if window.grant is not None and window.claimed not in {None, *pci.VFIO_CLAIMS}:
            yield Finding(
                "window-claimed",
                Severity.ERROR,
                window.id,
                f"window {window.id} is granted to {window.guest}, and the kernel's {window.claimed} has it too",
                "/proc/iomem",
                f"memconsole window revoke {window.id}, or unbind the driver",
            )


def _unpreserved(snapshot: Snapshot) -> Iterator[Finding]:
    """VMs on a host that could hand them over, whose RAM nobody would preserve."""
    for guest in snapshot.guests if snapshot.survival.luo else ():
        if guest.kind is GuestKind.FOREIGN and guest.memory:
            yield Finding(
                "ram-not-preserved",
                Severity.WARNING,
                guest.name,
                f"guest {guest.name} would not survive a kexec: its {format_size(guest.memory)} of RAM are no region",
                f"/proc/{guest.pid}/maps",
                "start it with memconsole guest start, or give it a region as memory-backend-file",
            )


def _sessions(snapshot: Snapshot, ours: Collection[int]) -> Iterator[Finding]:
    """Sessions that somebody else holds alone; systemd, itself such a holder, names its own."""
    for session in snapshot.survival.sessions:
        holders = [pid for pid in session.holders if pid not in ours]
        if session.custody or not holders or session.name.startswith(kho.SYSTEMDS):
            continue
        who = f"process {', '.join(map(str, holders))}"
        yield Finding(
            "session-outside-custody",
            Severity.WARNING,
            session.name,
            f"session {session.name} of live update is {who}'s: what it preserved is lost when that ends",
            f"/proc/{holders[0]}/fd: anon_inode:[luo_session] {session.name}",
            f"end {who}: what memconsole handoff preserves is in custody",
        )
