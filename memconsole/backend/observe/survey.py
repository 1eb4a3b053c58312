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

from memconsole import unforeseen
from memconsole.backend.exports.mapped import BlockedMapping, FuseAlias, is_whole, path_of
from memconsole.backend.holdings import Backing
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import dax, host, iomem, iommu, kho, kvm, memory, patient, pci, tree, unixsockets
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.tree import Root
from memconsole.backend.ledger.state import State
from memconsole.backend.managers import libvirt, sessions
from memconsole.backend.observe import findings
from memconsole.backend.observe.mappings import OURS, RegionMapping, backends, region_mappings, stray_mappings
from memconsole.errors import Gone, MemconsoleError, NotFound
from memconsole.model import (
    Faults,
    Finding,
    Grant,
    GrantMapping,
    GrantState,
    Guest,
    GuestKind,
    GuestSeen,
    GuestState,
    HandoffReport,
    Helper,
    Managed,
    Progress,
    Range,
    Region,
    RegionSeen,
    RegionState,
    Snapshot,
    Survival,
    Unread,
    Vcpu,
    Window,
)

T = TypeVar("T")
D = TypeVar("D")
_QEMU = "qemu-system"


class GuestReply(NamedTuple):
    """What a live guest says of itself; of a silent one, what it said at ``answered_ns``, and ``why`` no more."""

    state: GuestState
    agent: bool = False
    progress: Progress | None = None
    vcpus: tuple[Vcpu, ...] | None = None
    answered_ns: int | None = None
    why: str = ""


_SAID = {"paused": GuestState.PAUSED, "pmsuspended": GuestState.SUSPENDED}
"""The states in which a manager's VM does not run, by libvirt's words."""
_UNHEARD = GuestReply(GuestState.SILENT, why="this control process has no connection to it")


class ScanResult(NamedTuple):
    """What the last scan of a region's PFNs found: runs, bytes in huge pages, and bytes that had moved."""

    runs: int
    huge: int
    at_ns: int
    moved: int = 0


class SurveyInput(msgspec.Struct, frozen=True):
    """All that the control process itself brings to a survey; ``exempt`` are processes that hold fds for us.

    ``sessions`` are those of live update that are in custody, as custody calls them.
    """

    state: State = msgspec.field(default_factory=State)
    backings: Mapping[str, tuple[Backing, ...]] = msgspec.field(default_factory=dict)
    answers: Mapping[str, GuestReply] = msgspec.field(default_factory=dict)
    scanned: Mapping[str, ScanResult] = msgspec.field(default_factory=dict)
    exempt: frozenset[int] = frozenset()
    standing: tuple[Finding, ...] = ()
    faces: tuple[FuseAlias, ...] = ()
    shields: tuple[BlockedMapping, ...] = ()
    faults: Mapping[str, Faults] = msgspec.field(default_factory=dict)
    handoff: HandoffReport | None = None
    sessions: tuple[str, ...] = ()


class Readers:
    """Runs readers; what one cannot read becomes a Gap, and so does one that fails in a way that was not foreseen."""

    def __init__(self) -> None:
        self.gaps: list[Unread] = []

    def __call__(self, source: str, reader: Callable[[], T], default: D, *, absent: bool = False) -> T | D:
        """The reader's value, or ``default``; ``absent``: that there is no such source says all there is to know."""
        found = unforeseen.attempt(f"reading {source}", "survey", reader)
        if not isinstance(found, MemconsoleError):
            return found
        if not (absent and isinstance(found, (NotFound, Gone))):
            self.gaps.append(tree.gap(source, found))
        return default


def survey(meant: SurveyInput, root: Root = "/") -> Snapshot:
    """The Snapshot of the host below ``root``, with findings and gaps.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: this is no host (no /proc/meminfo, no uname).
    """
    read = Readers()
    census = read("/proc", lambda: census_of.take(root, closed=meant.exempt), Census(root, {}, ()))
    read.gaps.extend(census.gaps())
    state = meant.state
    overs = region_mappings(census, state.regions.values(), meant.faces, meant.shields)
    seen = _by_grant(state, overs)
    shown = {(face.region, face.path) for face in meant.faces}
    state = _as_mapped(state, seen)
    mappers: dict[str, set[int]] = defaultdict(set)
    for over in overs:
        mappers[over.region].add(over.pid)
    astray, helpers = _astray(state, overs, census, read)
    of_region, of_guest = _index(state)
    functions = read("/sys/bus/pci/devices", lambda: pci.functions(root, read.gaps), (), absent=True)
    openers = read("/proc/PID/fd", lambda: pci.openers(census, read.gaps), {})
    addresses = read("/proc/iomem", lambda: iomem.iomem(root), ())
    snapshot = Snapshot(
        taken_ns=time.time_ns(),
        host=host.host(root),
        memory=memory.memory(root, read.gaps),
        survival=_survival(meant, census, read),
        regions=tuple(
            _region(region, of_region[region.name], meant, mappers[region.name]) for region in state.regions.values()
        ),
        guests=_guests(replace(meant, state=state), census, of_guest, helpers, read),
        grants=tuple(
            replace(
                grant,
                seen=seen.get(grant.id, ()),
                faults=meant.faults.get(grant.id),
                export="file" if _is_file(grant, state, shown) else "fd",
            )
            for grant in state.grants.values()
        ),
        quarantine=tuple(state.quarantine.values()),
        devices=tuple(replace(function.device, holders=openers.get(function.device.bdf, ())) for function in functions),
        windows=granted_windows(state, census, read, functions, addresses),
        iommus=read("/sys/class/iommu", lambda: iommu.units(root, read.gaps), ()),
        domains=read("/sys/kernel/iommu_groups", lambda: iommu.domains(root, read.gaps), ()),
        iomem=addresses,
        firmware=read("/sys/firmware/memmap", lambda: iomem.firmware(root, read.gaps), ()),
        dax=read("/sys/bus/dax/devices", lambda: dax.dax(root, read.gaps), (), absent=True),
        events=tuple(state.events),
        handoff=meant.handoff,
    )
    snapshot = replace(snapshot, gaps=tuple(read.gaps), findings=meant.standing)
    found = findings.find(snapshot, astray, meant.exempt)
    return replace(snapshot, findings=(*meant.standing, *found))


def _guests(
    meant: SurveyInput,
    census: Census,
    grants: Mapping[str, list[Grant]],
    helpers: Mapping[str, tuple[Helper, ...]],
    read: Readers,
) -> tuple[Guest, ...]:
    """Our guests, then those that run here without us."""
    state, domains = meant.state, _domains(census.root, read)
    alive = [guest.pid for guest in state.guests.values() if guest.pid in census.processes]
    machines = _machines(census, alive, domains)
    ours = (
        _with_helpers(_guest(guest, grants[guest.name], meant, machines, read), helpers.get(guest.name, ()))
        for guest in state.guests.values()
    )
    return (*ours, *foreign_guests(census, state, read, domains))


def _survival(meant: SurveyInput, census: Census, read: Readers) -> Survival:
    found = read("/sys/kernel/debug/kho", lambda: kho.survival(census.root), Survival())
    if not found.luo:
        return found
    from memconsole.backend.kernel.handover import outgoing

    sessions = read("/proc/PID/fd", lambda: outgoing.sessions(census, census.root, meant.exempt), ())
    held = {name.partition(":")[2]: name for name in meant.sessions}
    return replace(found, sessions=tuple(replace(each, custody=held.get(each.name, "")) for each in sessions))


def _is_file(grant: Grant, state: State, shown: Collection[tuple[str, str]]) -> bool:
    region = state.regions.get(grant.region)
    return region is not None and is_whole(grant, region) and (region.name, path_of(grant, state)) in shown


# --- who maps what ----------------------------------------------------------------------------------------------


def _by_grant(state: State, overs: Iterable[RegionMapping]) -> dict[str, tuple[GrantMapping, ...]]:
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


def _astray(
    state: State, overs: Sequence[RegionMapping], census: Census, read: Readers
) -> tuple[list[RegionMapping], dict[str, tuple[Helper, ...]]]:
    """The mappings that nothing accounts for, and by guest the processes that its VMM has handed its memory to."""
    found = stray_mappings(state, overs, census)
    if not found or not tree.live(census.root):
        return found, {}
    working = backends(state, found, census, lambda: read("sock_diag", unixsockets.peers, {}))
    helpers: dict[str, tuple[Helper, ...]] = defaultdict(tuple)
    for process, guest in sorted(working.items()):
        command = read(
            f"/proc/{process.pid}/cmdline", partial(census_of.command, census.root, process.pid), (), absent=True
        )
        helpers[guest] = (*helpers[guest], Helper(*process, command))
    return stray_mappings(state, overs, census, working), helpers


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


def _region(region: Region, grants: Sequence[Grant], meant: SurveyInput, mappers: Collection[int]) -> Region:
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


class _Machines(NamedTuple):
    """What was read of the processes that are guests."""

    census: Census
    answers: Mapping[int, kvm.Machine | MemconsoleError]
    domains: Mapping[int, Managed]

    def managed(self, pid: int) -> Managed | None:
        """What the manager that runs this process says of it."""
        answer = self.answers.get(pid)
        return libvirt.of_process(self.domains, pid, answer.command) if isinstance(answer, kvm.Machine) else None

    def of(self, pid: int) -> kvm.Machine:
        answer = self.answers[pid]
        if isinstance(answer, MemconsoleError):
            raise answer
        return answer


def _machines(census: Census, pids: Iterable[int | None], domains: Mapping[int, Managed]) -> _Machines:
    """All are read in one go, so that those that do not answer are waited for once."""

    def one(pid: int) -> kvm.Machine | MemconsoleError:
        read = partial(kvm.machine, census, census.processes[pid])
        return unforeseen.attempt(f"reading /proc/{pid}", "survey", read)

    return _Machines(census, patient.each([pid for pid in pids if pid is not None], one), domains)


def _guest(guest: Guest, grants: Sequence[Grant], meant: SurveyInput, machines: _Machines, read: Readers) -> Guest:
    answer = meant.answers.get(guest.name, _UNHEARD)
    process = machines.census.processes.get(guest.pid) if guest.pid is not None else None
    managed = machines.managed(guest.pid) if process is not None and guest.pid is not None else None
    if process is None or process.id != guest.process or process.state in "ZX":
        process = None
        answer = GuestReply(GuestState.RUNNING if guest.is_user else GuestState.GONE)  # a user does not end
    if guest.adopted and managed is not None:
        said = _SAID.get(managed.state, answer.state) if answer.state is GuestState.RUNNING else answer.state
        answer = answer._replace(state=said, vcpus=_managed_vcpus(managed) or None)
    state = meant.state
    return replace(
        guest,
        state=answer.state,
        grants=tuple(grant.id for grant in grants),
        windows=tuple(grant.window for grant in state.windows.values() if grant.guest == guest.name),
        agent=answer.agent,
        progress=answer.progress,
        answered_ns=answer.answered_ns,
        silent=_reason(answer, process),
        managed=managed or (guest.managed if guest.adopted else None),
        seen=_with_vcpus(guest, answer, _guest_seen(guest, grants, meant, machines, read)) if process else None,
    )


def _with_helpers(guest: Guest, helpers: tuple[Helper, ...]) -> Guest:
    seen = guest.seen
    return guest if seen is None or not helpers else replace(guest, seen=replace(seen, helpers=helpers))


def _with_vcpus(guest: Guest, answer: GuestReply, seen: GuestSeen | None) -> GuestSeen | None:
    """Of a QEMU without KVM the kernel shows no vCPUs: then its own word counts, or nothing is known."""
    if seen is None or seen.vcpus or guest.kind not in {GuestKind.QEMU, GuestKind.FOREIGN}:
        return seen
    return replace(seen, vcpus=answer.vcpus)


def _reason(answer: GuestReply, process: Process | None) -> str:
    """Why a guest is silent, as far as it can be seen; empty of one that answers."""
    if answer.state is not GuestState.SILENT:
        return ""
    stopped = process is not None and process.state in "Tt"
    return "; ".join(filter(None, [answer.why, "a signal or a tracer has stopped its process" if stopped else ""]))


def _guest_seen(
    guest: Guest, grants: Sequence[Grant], meant: SurveyInput, machines: _Machines, read: Readers
) -> GuestSeen | None:
    """The guest's process, with those of its mappings that are regions, each with the gpa it was granted; of one that
    somebody else started, with all that is RAM.
    """
    process = machines.census.processes[guest.pid or 0]
    machine = read(f"/proc/{process.pid}", lambda: machines.of(process.pid), None)
    if machine is None:
        return None
    state = meant.state
    of = {
        (segment.device, segment.inode): (region, segment.start)
        for name in {grant.region for grant in grants}
        if (region := state.regions.get(name)) is not None
        for segment in region.segments
    }
    of.update(
        ((face.device, face.inode), (state.regions[face.region], 0))
        for face in meant.faces
        if any(grant.region == face.region for grant in grants)
    )
    blocks = []
    for vma, block in zip(machine.vmas, machine.seen.ram, strict=True):
        found = of.get((vma.device, vma.inode))
        if found is not None:
            region, start = found
            blocks.append(replace(block, region=region.name, gpa=_gpa(grants, region.name, vma.offset - start)))
        elif guest.adopted:
            blocks.append(block)
    return replace(machine.seen, ram=tuple(blocks))


def _gpa(grants: Sequence[Grant], region: str, offset: int) -> int | None:
    for grant in grants:
        if grant.region == region and grant.gpa is not None and grant.offset <= offset < grant.offset + grant.length:
            return grant.gpa + offset - grant.offset
    return None


def _domains(root: Root, read: Readers) -> Mapping[int, Managed]:
    users = read(sessions.USERS, lambda: sessions.domains(root, read.gaps), {}, absent=True)
    return {**users, **read(libvirt.STATUS, lambda: libvirt.domains(root, read.gaps), {}, absent=True)}


def foreign_guests(
    census: Census, state: State, read: Readers | None = None, domains: Mapping[int, Managed] | None = None
) -> tuple[Guest, ...]:
    """VMs that run here without us: processes that hold a VM's fd, and QEMU without KVM.

    One that another manager runs is called as it is called there, unless that is the name of a guest already.
    """
    read = read or Readers()
    ours = {guest.pid for guest in state.guests.values()}
    starting = any(intent.aims.guests for intent in state.unfinished.values())
    wanted = []
    for process in census.processes.values():
        if process.pid in ours or process.kernel or process.state in "ZX":
            continue
        if starting and process.holds(OURS):
            continue  # it is ours in a moment
        if process.holds("anon_inode:kvm-vm") or (process.maps and process.comm.startswith(_QEMU)):
            wanted.append(process.pid)
    machines = _machines(census, wanted, _domains(census.root, read) if domains is None else domains)
    taken = set(state.guests)
    found = []
    for pid in wanted:
        machine = read(f"/proc/{pid}", partial(machines.of, pid), None, absent=True)
        if machine is not None:
            found.append(_machine(machine, machines.managed(pid), taken, stopped=census.processes[pid].state == "T"))
            taken.add(found[-1].name)
    return tuple(found)


def _machine(machine: kvm.Machine, managed: Managed | None, taken: Collection[str], *, stopped: bool) -> Guest:
    emulator = machine.seen.comm.startswith(_QEMU)
    word = "qemu" if emulator else re.sub(r"[^A-Za-z0-9._-]", "-", machine.seen.comm)
    said = managed.state if managed is not None else ""
    vcpus = machine.seen.vcpus or _managed_vcpus(managed)
    return Guest(
        name=managed.name if managed is not None and managed.name not in taken else f"{word}-{machine.pid}",
        kind=GuestKind.FOREIGN,
        state=GuestState.PAUSED if stopped else _SAID.get(said, GuestState.RUNNING),
        pid=machine.pid,
        start_ticks=machine.start_ticks,
        memory=machine.memory,
        command=machine.command,
        seen=replace(machine.seen, vcpus=vcpus or (None if emulator else ())),
        managed=managed,
    )


def _managed_vcpus(managed: Managed | None) -> tuple[Vcpu, ...]:
    """The vCPUs of a VM without KVM, of which the kernel shows none, as its manager knows them."""
    return tuple(Vcpu(each.index, each.tid) for each in managed.vcpus) if managed is not None else ()


def granted_windows(
    state: State,
    census: Census,
    read: Readers,
    functions: Sequence[pci.Function],
    addresses: tuple[Range, ...] = (),
) -> tuple[Window, ...]:
    """The BARs of functions with who maps them and whom they are granted to; ``addresses`` as iomem reads them."""
    root = census.root
    if not functions:
        return ()
    addresses = addresses or read("/proc/iomem", lambda: iomem.iomem(root), ())
    ports = read("/proc/ioports", lambda: iomem.ioports(root), ())
    holders = read("/proc/PID/maps", lambda: pci.holders(census, functions, read.gaps), {})
    granted = {grant.window: grant for grant in state.windows.values()}
    return tuple(
        replace(window, grant=granted[window.id].id, guest=granted[window.id].guest) if window.id in granted else window
        for window in pci.windows(functions, addresses, ports, holders)
    )
