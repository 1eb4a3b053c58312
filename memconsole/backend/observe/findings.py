"""Differences between what should be and what is, as findings of a Snapshot.

    error    memory is lost, wrong, or reachable by somebody it was not granted to
    warning  memory will be lost, or something we hold has ended
    info     worth knowing

What a host as such cannot do is no finding: that is what gaps and ``doctor`` are for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from memconsole.backend.kernel import kho, pci
from memconsole.backend.observe.mappings import RegionMapping
from memconsole.model import Finding, GrantState, Guest, GuestKind, GuestState, Region, Severity, Snapshot
from memconsole.units import format_size, last_answer

"""States in which a region's frames must not change."""
RUNS_SLOW = 8192
"""Runs of frames from which on the next kernel's boot takes seconds longer (its scans are quadratic in them)."""


def find(snapshot: Snapshot, strays: Iterable[RegionMapping], ours: Collection[int] = ()) -> tuple[Finding, ...]:
    """Every difference in this Snapshot, which has the standing findings already.

    ``strays`` are mappings of regions that no grant accounts for, ``ours`` the processes that hold files for us.
    """
    waiting = {finding.subject for finding in snapshot.findings if finding.id == "guest-aside"}
    told = [guest for guest in snapshot.guests if guest.name not in waiting]
    return (
        *(finding for region in snapshot.regions for finding in _region(region, snapshot)),
        *(finding for guest in told for finding in _guest(guest, snapshot.taken_ns)),
        *_grants(snapshot),
        *_strays(strays),
        *_quarantine(snapshot),
        *_windows(snapshot),
        *_unpreserved(snapshot),
        *_unadopted(snapshot),
        *_sessions(snapshot, ours),
    )


def _region(region: Region, snapshot: Snapshot) -> Iterator[Finding]:
    if region.seen is None:
        if not any(each.id == "region-torn" and each.subject == region.name for each in snapshot.findings):
            yield _lost(region, snapshot)
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
            Severity.WARNING if pinned else Severity.INFO,
            region.name,
            f"{format_size(region.seen.moved)} of region {region.name} moved to other frames between two scans",
            "/proc/self/pagemap, at the last scan and the one before",
            "compare digests: unless parts were emptied, the kernel moved the pages and the contents are whole",
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


def _lost(region: Region, snapshot: Snapshot) -> Finding:
    """Custody does not have a region; a guest that maps it still has its contents."""
    maps = [guest.name for guest in snapshot.guests if guest.seen and {*region.grants} & {*guest.grants}]
    if maps:
        remedy = f"{', '.join(maps)} may still have it mapped: save its contents from inside before the guest ends"
    else:
        remedy = f"its contents are gone; memconsole release {region.name} forgets the name"
    what = f"custody does not hold the memory of region {region.name} any more"
    return Finding("region-lost", Severity.ERROR, region.name, what, "custody", remedy)


def _guest(guest: Guest, taken_ns: int) -> Iterator[Finding]:
    if _is_known(guest) and guest.state is GuestState.SILENT:
        yield Finding(
            "guest-silent",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} does not answer: {last_answer(guest.answered_ns, taken_ns)}",
            f"{guest.its_process}: {guest.silent}",
            _wake(guest),
        )
    if guest.state is GuestState.GONE and guest.ended:
        yield Finding(
            "guest-ended",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} {guest.ended}",
            "the ledger is of another boot: /proc/sys/kernel/random/boot_id",
            _parted(guest),
        )
    elif _is_known(guest) and guest.state is GuestState.GONE:
        yield Finding(
            "guest-gone",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} is gone: {guest.its_process} ended without being stopped"
            if guest.service is None
            else f"service {guest.name} does not run",
            _of_process(guest),
            _parted(guest)
            if guest.service is None
            else f"memconsole guest resume {guest.name} starts it with its grants",
        )
    if _is_known(guest) and guest.state is GuestState.STOPPED:
        yield Finding(
            "guest-stopped",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} has stopped: its process runs, its vCPUs do not",
            f"its own answer: {guest.progress.why}" if guest.progress is not None else "its own answer",
            f"see its log; memconsole guest stop {guest.name} ends it, its regions keep their contents",
        )
    if guest.progress is not None and guest.progress.wrong:
        yield Finding(
            "guest-corrupt",
            Severity.ERROR,
            guest.name,
            f"guest {guest.name} found {guest.progress.wrong:,} wrong bytes in its memory",
            "its own check of its RAM",
            "pause it, and find which other process maps its regions: memconsole reach GUEST",
        )


def _is_known(guest: Guest) -> bool:
    """Whether the ledger has it."""
    return guest.kind is not GuestKind.FOREIGN or guest.adopted


def _parted(guest: Guest) -> str:
    """What to do about a guest that has ended."""
    if guest.adopted:
        return (
            f"memconsole guest let-go {guest.name} ends its grants; its RAM stays in custody until"
            " memconsole release REGION frees it"
        )
    return f"memconsole guest stop {guest.name} ends its grants; its regions keep their contents"


def _of_process(guest: Guest, file: str = "") -> str:
    """Where a guest's process is observed."""
    return f"/proc/{guest.pid}{file}" if guest.pid is not None else "the ledger, which names no process of it"


def _wake(guest: Guest) -> str:
    """What to do about a guest that does not answer."""
    if guest.pid is None:
        return "see its log; its memory stays where it is"
    return (
        f"find what blocks it: kill -CONT {guest.pid} if a signal stopped it, else see its log and"
        f" /proc/{guest.pid}/stack; its memory stays where it is"
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
                _of_process(guest, "/maps"),
                f"its log may say why; memconsole revoke {grant.id} takes the grant back",
            )
        if grant.faults is not None and not grant.faults.served:
            yield Finding(
                "faults-unserved",
                Severity.WARNING,
                grant.id,
                f"{grant.guest} is blocked: no handler serves its page faults in {grant.region}",
                "custody has its userfaultfd",
                f"start the control process that has {grant.region}: it continues where the last one stopped",
            )
        if grant.faults is not None and grant.faults.refused:
            yield Finding(
                "faults-refused",
                Severity.WARNING,
                grant.id,
                f"{grant.guest} waits: no memory for {grant.faults.refused:,} of its page faults in {grant.region}",
                "fallocate",
                f"free memory, or memconsole revoke {grant.id}; each fault is tried again",
            )


def _strays(strays: Iterable[RegionMapping]) -> Iterator[Finding]:
    found: dict[tuple[str, int], int] = {}
    files: dict[tuple[str, int], set[str]] = {}
    for over in strays:
        found[over.region, over.pid] = found.get((over.region, over.pid), 0) + over.vma.size
        files.setdefault((over.region, over.pid), set()).update(filter(None, [over.through]))
    for (region, pid), size in found.items():
        through = "".join(f", through {path} of the mount" for path in sorted(files[region, pid]))
        yield Finding(
            "mapping-unknown",
            Severity.ERROR,
            region,
            f"process {pid} maps {format_size(size)} of region {region} without a grant",
            f"/proc/{pid}/maps{through}",
            f"if it belongs to a guest: memconsole guest helper GUEST --pid {pid}; else see what it is"
            f" (/proc/{pid}/exe): revoking the grant of its giver takes the region away and keeps the contents",
        )


def _quarantine(snapshot: Snapshot) -> Iterator[Finding]:
    for kept in snapshot.quarantine:
        yield Finding(
            "frames-quarantined",
            Severity.WARNING,
            kept.region,
            f"{format_size(kept.size)} of old frames of region {kept.region} are pinned since {kept.id} was revoked",
            f"/proc/kpageflags: {kept.why}",
            f"find what {kept.guest} handed them to (pipes, io_uring, devices): they stay unused until the pin drops",
        )


def _windows(snapshot: Snapshot) -> Iterator[Finding]:
    for window in snapshot.windows:
        if window.grant is not None and window.claimed not in {None, *pci.VFIO_CLAIMS}:
            yield Finding(
                "window-claimed",
                Severity.ERROR,
                window.id,
                f"window {window.id} is granted to {window.guest}, and the kernel's {window.claimed} uses it too",
                "/proc/iomem",
                f"memconsole window revoke {window.id}, or unbind the driver",
            )


_WITH_LIBVIRT = "{} before the next kernel writes its RAM to disk; or migrate it to another host"


def _unadopted(snapshot: Snapshot) -> Iterator[Finding]:
    """Adopted guests with shared RAM that custody does not hold: a memory module was plugged in since, say.

    An nvdimm is a file that stays where it is.
    """
    for guest in snapshot.guests:
        blocks = guest.seen.ram if guest.adopted and guest.seen is not None else ()
        stays = {each.source for each in guest.managed.modules} if guest.managed is not None else set()
        files = [each for each in blocks if each.backing.startswith("/") and each.backing not in stays]
        more = [each for each in files if each.region is None]
        if not more:
            continue
        size = sum(each.size for each in more)
        yield Finding(
            "ram-not-adopted",
            Severity.WARNING,
            guest.name,
            f"guest {guest.name} has {format_size(size)} of RAM that custody does not hold",
            _of_process(guest, "/maps"),
            f"memconsole guest adopt {guest.name} takes what was plugged in since",
        )


def _unpreserved(snapshot: Snapshot) -> Iterator[Finding]:
    """VMs on a host that could hand them over, whose RAM nobody would preserve."""
    for guest in snapshot.guests if snapshot.survival.luo else ():
        carried = guest.adopted and guest.managed is not None  # what keeps it from that, a handoff's check says
        if guest.kind is GuestKind.FOREIGN and guest.memory and not carried:
            yield Finding(
                "ram-not-preserved",
                Severity.WARNING,
                guest.name,
                f"guest {guest.name} has {format_size(guest.memory)} of RAM that "
                + ("no handoff carries: no manager would start it again" if guest.adopted else "belongs to no region"),
                _of_process(guest, "/maps"),
                _WITH_LIBVIRT.format(guest.managed.by_virsh("managedsave"))
                if guest.managed is not None
                else "memconsole guest start NAME --vmm qemu gives it a region; or pass one as memory-backend-file",
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
            f"{who} holds live update session {session.name} outside custody",
            f"/proc/{holders[0]}/fd: anon_inode:[luo_session] {session.name}",
            f"keep {who} running as long as what the session preserved is needed",
        )
