"""Kernel truth beside what we meant: the Snapshot of a host in one call.

    census (one pass over all processes) ──┬─ who maps our regions ─→ Region.seen, Grant.seen, strays
                                           ├─ VMs ─→ Guest.seen, foreign guests
                                           └─ who maps BARs ─→ Window.holders
    State (what we meant), Backing (our own fds), Answer (what live guests say) ─→ everything else of an entity

What cannot be read is a Gap with the reader's own reason; where the two sides differ, :mod:`findings` says so.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from memconsole.backend import findings
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import dax, host, iomem, iommu, kho, kvm, memory, pci, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.backend.state import State
from memconsole.errors import Gone, NotFound
from memconsole.model import (
    Faults,
    Finding,
    Gap,
    Grant,
    GrantMapping,
    GrantState,
    Guest,
    GuestKind,
    GuestSeen,
    GuestState,
    HandoffReport,
    Progress,
    Range,
    Region,
    RegionSeen,
    RegionState,
    Snapshot,
    Survival,
    Window,
)

T = TypeVar("T")
D = TypeVar("D")
_QEMU = "qemu-system"
OURS = "/memfd:memconsole:"
"""How the memfd store names its segments."""
Object = tuple[int, int]
"""A file by (st_dev, st_ino), as its mappings show it."""


class Face(NamedTuple):
    """Another file through which a region's frames are mapped; ``base`` is where in the region it begins, in bytes.

    Its mappings show this device and inode, and a path with ``path`` in it.
    """

    region: str
    device: int
    inode: int
    base: int
    path: str


class Shield(NamedTuple):
    """A mapping that is there and leads nowhere: every access waits for an answer that is never given."""

    pid: int
    start_ticks: int
    start: int
    end: int


class Backing(NamedTuple):
    """One segment of a region as our own fd shows it (fstat, F_GET_SEALS, /proc/self/fd); sizes in bytes."""

    device: int
    inode: int
    size: int
    resident: int
    seals: tuple[str, ...]
    retrieved: bool = False


class Answer(NamedTuple):
    """What a live guest says of itself."""

    state: GuestState
    agent: bool = False
    progress: Progress | None = None


class Scanned(NamedTuple):
    """What the last scan of a region's PFNs found: runs, bytes in huge pages, and bytes that had moved."""

    runs: int
    huge: int
    at_ns: int
    moved: int = 0


class Meant(msgspec.Struct, frozen=True):
    """All that the control process itself brings to a survey; ``exempt`` are processes that hold fds for us.

    ``sessions`` are those of live update that are in custody, as custody calls them.
    """

    state: State = msgspec.field(default_factory=State)
    backings: Mapping[str, tuple[Backing, ...]] = msgspec.field(default_factory=dict)
    answers: Mapping[str, Answer] = msgspec.field(default_factory=dict)
    scanned: Mapping[str, Scanned] = msgspec.field(default_factory=dict)
    exempt: frozenset[int] = frozenset()
    standing: tuple[Finding, ...] = ()
    faces: tuple[Face, ...] = ()
    shields: tuple[Shield, ...] = ()
    faults: Mapping[str, Faults] = msgspec.field(default_factory=dict)
    handoff: HandoffReport | None = None
    sessions: tuple[str, ...] = ()


class Over(NamedTuple):
    """A VMA over a region: ``offset`` of its start in the region, in bytes."""

    region: str
    pid: int
    vma: Vma
    offset: int

    def overlaps(self, grant: Grant) -> bool:
        """Whether it reaches into a grant's range."""
        return (
            self.region == grant.region
            and self.offset < grant.offset + grant.length
            and grant.offset < self.offset + self.vma.size
        )


class Readers:
    """Runs readers; what one cannot read becomes a Gap."""

    def __init__(self) -> None:
        self.gaps: list[Gap] = []

    def __call__(self, source: str, reader: Callable[[], T], default: D, *, absent: bool = False) -> T | D:
        """The reader's value, or ``default``; ``absent``: that there is no such source says all there is to know."""
        try:
            return reader()
        except tree.UNREADABLE as error:
            if not (absent and isinstance(error, (NotFound, Gone))):
                self.gaps.append(tree.gap(source, error))
            return default


def survey(meant: Meant, root: Root = "/") -> Snapshot:
    """The Snapshot of the host below ``root``, with findings and gaps.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: this is no host (no /proc/meminfo, no uname).
    """
    read = Readers()
    census = read("/proc", lambda: census_of.take(root, closed=meant.exempt), Census(root, {}, ()))
    read.gaps.extend(census.gaps())
    state = meant.state
    overs = mappings(census, state.regions.values(), meant.faces, meant.shields)
    seen = _by_grant(state, overs)
    state = _as_mapped(state, seen)
    mappers: dict[str, set[int]] = defaultdict(set)
    for over in overs:
        mappers[over.region].add(over.pid)
    of_region, of_guest = _index(state)
    ours = tuple(_guest(guest, of_guest[guest.name], meant, census, read) for guest in state.guests.values())
    functions = read("/sys/bus/pci/devices", lambda: pci.functions(root), (), absent=True)
    openers = read("/proc/PID/fd", lambda: pci.openers(census), {})
    addresses = read("/proc/iomem", lambda: iomem.iomem(root), ())
    snapshot = Snapshot(
        taken_ns=time.time_ns(),
        host=host.host(root),
        memory=memory.memory(root),
        survival=_survival(meant, census, read),
        regions=tuple(
            _region(region, of_region[region.name], meant, mappers[region.name]) for region in state.regions.values()
        ),
        guests=(*ours, *foreign(census, state, read)),
        grants=tuple(
            replace(grant, seen=seen.get(grant.id, ()), faults=meant.faults.get(grant.id))
            for grant in state.grants.values()
        ),
        quarantine=tuple(state.quarantine.values()),
        devices=tuple(replace(function.device, holders=openers.get(function.device.bdf, ())) for function in functions),
        windows=windows(state, census, read, addresses),
        iommus=read("/sys/class/iommu", lambda: iommu.units(root), ()),
        domains=read("/sys/kernel/iommu_groups", lambda: iommu.domains(root), ()),
        iomem=addresses,
        firmware=read("/sys/firmware/memmap", lambda: iomem.firmware(root), ()),
        dax=read("/sys/bus/dax/devices", lambda: dax.dax(root), (), absent=True),
        events=tuple(state.events),
        handoff=meant.handoff,
    )
    snapshot = replace(snapshot, gaps=tuple(read.gaps), findings=meant.standing)
    found = findings.find(snapshot, strays(state, overs), meant.exempt)
    return replace(snapshot, findings=(*meant.standing, *found))


def _survival(meant: Meant, census: Census, read: Readers) -> Survival:
    found = read("/sys/kernel/debug/kho", lambda: kho.survival(census.root), Survival())
    if not found.luo:
        return found
    from memconsole.backend.kernel.handover import outgoing

    sessions = read("/proc/PID/fd", lambda: outgoing.sessions(census, census.root, meant.exempt), ())
    held = {name.partition(":")[2]: name for name in meant.sessions}
    return replace(found, sessions=tuple(replace(each, custody=held.get(each.name, "")) for each in sessions))


# --- who maps what ----------------------------------------------------------------------------------------------


def mappings(
    census: Census, regions: Iterable[Region], faces: Iterable[Face] = (), shields: Iterable[Shield] = ()
) -> list[Over]:
    """Every VMA of every process through which it reaches a region, by its segments or by other faces of it."""
    faces = tuple(faces)
    of: dict[Object, tuple[str, int]] = {}
    for region in regions:
        base = 0
        for segment in region.segments:
            of[segment.device, segment.inode] = (region.name, base)
            base += segment.size
        of.update(((face.device, face.inode), (face.region, face.base)) for face in faces if face.region == region.name)
    blind = {(shield.pid, shield.start, shield.end): shield.start_ticks for shield in shields}
    found = []
    if of:
        for pid, vma in census.mappings(of.keys(), *{face.path for face in faces}):
            name, base = of[vma.device, vma.inode]
            if blind.get((pid, vma.start, vma.end)) != census.processes[pid].start_ticks:
                found.append(Over(name, pid, vma, base + vma.offset))
    return found


def strays(state: State, overs: Iterable[Over]) -> list[Over]:
    """The mappings no grant accounts for; what an action under way is about to grant counts as granted."""
    aims = [intent.aims for intent in state.unfinished.values()]
    pids = {guest.pid: guest.name for guest in state.guests.values()}
    granted: dict[tuple[str, str], list[Grant]] = defaultdict(list)
    for grant in (*state.grants.values(), *(grant for change in aims for grant in change.grants)):
        granted[grant.guest, grant.region].append(grant)
    return [
        over
        for over in overs
        if not any(over.overlaps(grant) for grant in granted[pids.get(over.pid, ""), over.region])
    ]


def _by_grant(state: State, overs: Iterable[Over]) -> dict[str, tuple[GrantMapping, ...]]:
    grants: dict[tuple[str, int | None], list[Grant]] = defaultdict(list)
    for grant in state.grants.values():
        guest = state.guests.get(grant.guest)
        grants[grant.region, guest.pid if guest else None].append(grant)
    found: dict[str, tuple[GrantMapping, ...]] = {}
    for over in overs:
        for grant in grants[over.region, over.pid]:
            if over.overlaps(grant):
                vma = over.vma
                mapping = GrantMapping(over.pid, vma.start, vma.end, over.offset, vma.perms)
                found[grant.id] = (*found.get(grant.id, ()), mapping)
    return found


def _as_mapped(state: State, seen: Mapping[str, tuple[GrantMapping, ...]]) -> State:
    """The state in which a grant that its guest maps is mapped, whether or not an agent said so."""
    now = {
        id: replace(grant, state=GrantState.MAPPED)
        for id, grant in state.grants.items()
        if grant.state is GrantState.OFFERED and id in seen
    }
    return replace(state, grants=state.grants | now) if now else state


# --- entities ---------------------------------------------------------------------------------------------------


def _index(state: State) -> tuple[Mapping[str, list[Grant]], Mapping[str, list[Grant]]]:
    """The grants of each region and of each guest."""
    of_region: dict[str, list[Grant]] = defaultdict(list)
    of_guest: dict[str, list[Grant]] = defaultdict(list)
    for grant in state.grants.values():
        of_region[grant.region].append(grant)
        of_guest[grant.guest].append(grant)
    return of_region, of_guest


def _region(region: Region, grants: Sequence[Grant], meant: Meant, mappers: Collection[int]) -> Region:
    backings = meant.backings.get(region.name)
    seen = None
    if backings is not None:
        scanned = meant.scanned.get(region.name)
        seen = RegionSeen(
            resident=sum(backing.resident for backing in backings),
            seals=backings[0].seals if backings else (),
            retrieved=bool(backings) and all(backing.retrieved for backing in backings),
            mappers=tuple(sorted(mappers)),
            runs=scanned.runs if scanned else None,
            huge=scanned.huge if scanned else None,
            scanned_ns=scanned.at_ns if scanned else None,
            moved=scanned.moved if scanned else 0,
        )
    mapped = region.state is RegionState.RESERVED and any(grant.state is GrantState.MAPPED for grant in grants)
    return replace(
        region,
        state=RegionState.MAPPED if mapped else region.state,
        grants=tuple(grant.id for grant in grants),
        seen=seen,
    )


def _guest(guest: Guest, grants: Sequence[Grant], meant: Meant, census: Census, read: Readers) -> Guest:
    answer = meant.answers.get(guest.name, Answer(guest.state))
    process = census.processes.get(guest.pid) if guest.pid is not None else None
    if process is None or process.start_ticks != guest.start_ticks or process.state in "ZX":
        process = None
        answer = Answer(GuestState.GONE)
    state = meant.state
    return replace(
        guest,
        state=answer.state,
        grants=tuple(grant.id for grant in grants),
        windows=tuple(grant.window for grant in state.windows.values() if grant.guest == guest.name),
        agent=answer.agent,
        progress=answer.progress,
        seen=_guest_seen(grants, meant, census, process, read) if process else None,
    )


def _guest_seen(
    grants: Sequence[Grant], meant: Meant, census: Census, process: Process, read: Readers
) -> GuestSeen | None:
    """The guest's process, with those of its mappings that are regions of ours, each with the gpa it was granted."""
    machine = read(f"/proc/{process.pid}", lambda: kvm.machine(census, process), None)
    if machine is None:
        return None
    state = meant.state
    of = {
        (segment.device, segment.inode): region
        for name in {grant.region for grant in grants}
        if (region := state.regions.get(name)) is not None
        for segment in region.segments
    }
    of.update(
        ((face.device, face.inode), state.regions[face.region])
        for face in meant.faces
        if any(grant.region == face.region for grant in grants)
    )
    blocks = []
    for vma, block in zip(machine.vmas, machine.seen.ram, strict=True):
        region = of.get((vma.device, vma.inode))
        if region is not None:
            blocks.append(replace(block, region=region.name, gpa=_gpa(grants, region.name, vma.offset)))
    return replace(machine.seen, ram=tuple(blocks))


def _gpa(grants: Sequence[Grant], region: str, offset: int) -> int | None:
    for grant in grants:
        if grant.region == region and grant.gpa is not None and grant.offset <= offset < grant.offset + grant.length:
            return grant.gpa + offset - grant.offset
    return None


def foreign(census: Census, state: State, read: Readers | None = None) -> tuple[Guest, ...]:
    """VMs that run here without us: processes that hold a VM's fd, and QEMU without KVM."""
    read = read or Readers()
    ours = {guest.pid for guest in state.guests.values()}
    starting = any(intent.aims.guests for intent in state.unfinished.values())
    found = []
    for process in census.processes.values():
        if process.pid in ours or process.kernel or process.state in "ZX":
            continue
        if starting and process.holds(OURS):
            continue  # it is ours in a moment
        if process.holds("anon_inode:kvm-vm") or (process.maps and process.comm.startswith(_QEMU)):
            machine = read(f"/proc/{process.pid}", partial(kvm.machine, census, process), None, absent=True)
            if machine is not None:
                found.append(_machine(machine, paused=process.state == "T"))
    return tuple(found)


def _machine(machine: kvm.Machine, *, paused: bool) -> Guest:
    word = "qemu" if machine.seen.comm.startswith(_QEMU) else re.sub(r"[^A-Za-z0-9._-]", "-", machine.seen.comm)
    return Guest(
        name=f"{word}-{machine.pid}",
        kind=GuestKind.FOREIGN,
        state=GuestState.PAUSED if paused else GuestState.RUNNING,
        pid=machine.pid,
        start_ticks=machine.start_ticks,
        memory=machine.memory,
        command=machine.command,
        seen=machine.seen,
    )


def windows(state: State, census: Census, read: Readers, addresses: tuple[Range, ...] = ()) -> tuple[Window, ...]:
    """The BARs of this host with who maps them and whom they are granted to; ``addresses`` as iomem reads them."""
    root = census.root
    functions = read("/sys/bus/pci/devices", lambda: pci.functions(root), (), absent=True)
    if not functions:
        return ()
    addresses = addresses or read("/proc/iomem", lambda: iomem.iomem(root), ())
    ports = read("/proc/ioports", lambda: iomem.ioports(root), ())
    holders = read("/proc/PID/maps", lambda: pci.holders(census, functions), {})
    granted = {grant.window: grant for grant in state.windows.values()}
    return tuple(
        replace(window, grant=granted[window.id].id, guest=granted[window.id].guest) if window.id in granted else window
        for window in pci.windows(functions, addresses, ports, holders)
    )
