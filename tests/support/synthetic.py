"""Synthetic hosts: deterministic Snapshots of any size, and a Source over one that tests can steer.

Nothing here reads a clock, a host or a random device: the same arguments give the same values for ever. The parts of a
Snapshot agree with each other (a grant names a region and a guest that exist, a guest's PFN map is made of its
regions' maps), so that whatever joins them finds what it would find on a host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from memconsole.actions import Action, cli_form, fields
from memconsole.errors import Refused
from memconsole.model import (
    Access,
    Condition,
    Danger,
    Device,
    Domain,
    Effect,
    Event,
    Faults,
    Finding,
    FrameState,
    Grant,
    GrantMapping,
    GrantState,
    Guest,
    GuestKind,
    GuestSeen,
    GuestState,
    Host,
    HostUsage,
    HugePool,
    Iommu,
    Memory,
    Node,
    Outcome,
    Part,
    Plan,
    Progress,
    RamBlock,
    Range,
    Refusal,
    Region,
    RegionSeen,
    RegionState,
    Reserved,
    RevokeOutcome,
    RevokeReport,
    Rung,
    Segment,
    Severity,
    Snapshot,
    TableRef,
    ThreadUsage,
    Unread,
    Usage,
    Vcpu,
    Window,
)
from memconsole.source import no_map_at, nothing_at
from support.synthetic_frames import extents_of, pages_of, rows_of

if TYPE_CHECKING:
    from memconsole.extents import Extent, ExtentTable

NOW_NS = 1_790_000_000_000_000_000
"""The frozen clock: 2026-09-21 14:13:20 UTC."""

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
HVA_BASE = 0x7F0000000000


# --- Snapshots ----------------------------------------------------------------------------------------------------


class _Held:
    """Regions as they are reserved for guests that are known by name: grants, RAM and what each guest holds."""

    def __init__(self, names: Sequence[str]) -> None:
        self.pids = {name: 4000 + 7 * i for i, name in enumerate(names)}
        self.regions: list[Region] = []
        self.grants: list[Grant] = []
        self._ram: dict[str, list[RamBlock]] = {}

    def reserve(self, number: int, name: str, size: int, owner: str | None) -> None:
        granted = self._grant(number, name, size, owner) if owner is not None else None
        self.regions.append(_region(number, name, size, granted, self.pids.get(owner or "")))

    def _grant(self, number: int, name: str, size: int, owner: str) -> str:
        ram, hva = self._ram.setdefault(owner, []), HVA_BASE + (number << 40)
        gpa = sum(block.size for block in ram)
        mapping = GrantMapping(self.pids[owner], hva, hva + size, 0, "rw-s")
        self.grants.append(
            Grant(
                f"g{number + 1}", name, owner, 0, size, Access.RW, GrantState.MAPPED, gpa,
                created_ns=NOW_NS - 3_500_000_000_000, seen=(mapping,), lazy=number == 1,
                faults=_faults(size) if number == 1 else None,
            )
        )  # fmt: skip
        resident, backing = size // 10 * 9, f"/memfd:{name} (deleted)"
        ram.append(RamBlock(hva, size, resident, gpa, name, backing, 0, resident, resident // 4 * 3, True))
        return self.grants[-1].id

    def guests(self, beats: int) -> tuple[Guest, ...]:
        ids: dict[str, list[str]] = {}
        for grant in self.grants:
            ids.setdefault(grant.guest, []).append(grant.id)
        return tuple(
            _guest(i, name, pid, tuple(self._ram.get(name, ())), tuple(ids.get(name, ())), beats)
            for i, (name, pid) in enumerate(self.pids.items())
        )


def _region(number: int, name: str, size: int, grant: str | None, pid: int | None) -> Region:
    """A region; of one that is granted the guest of this PID has touched nine tenths."""
    return Region(
        name=name,
        store="memfd",
        size=size,
        page_size=PAGE if number % 4 else 2 * MIB,
        state=RegionState.MAPPED if grant is not None else RegionState.RESERVED,
        node=number % 2,
        created_ns=NOW_NS - 3_600_000_000_000 + number * 1_000_000,
        segments=(Segment(inode=100 + number, device=1, size=size),),
        grants=(grant,) if grant is not None else (),
        seen=RegionSeen(
            resident=size // 10 * 9 if grant is not None else 0,
            seals=("grow", "seal"),
            mappers=(pid,) if pid is not None else (),
            runs=extents_of(size) if grant is not None else None,
            huge=size // 2 if grant is not None else None,
            scanned_ns=NOW_NS if grant is not None else None,
        ),
    )


_MEMORY = Memory(
    total=4 * TIB,
    free=TIB,
    available=2 * TIB,
    shmem=2 * TIB,
    huge_shmem=TIB,
    shmem_thp="advise",
    nodes=(Node(0, 2 * TIB, GIB * 600, "0-31"), Node(1, 2 * TIB, GIB * 424, "32-63")),
    pools=(HugePool(2 * MIB, 1024, 512), HugePool(GIB, 16, 4)),
)
_IOMEM = (
    Range(0x1000, 0x9F000, "System RAM"),
    Range(0x100000, 0xBFFE0000, "System RAM"),
    Range(0x1000000, 0x2000000, "Kernel code", 1),
    Range(0xFE000000, 0xFF000000, "PCI Bus 0000:00"),
    Range(0x100000000, 0x40000000000, "System RAM"),
)


def _domain(group: int, devices: Collection[Device]) -> Domain:
    """A domain; of every other one the kernel shows the page tables."""
    shown = group % 2 == 0
    return Domain(
        group=group,
        kind=("DMA-FQ", "identity", "DMA", "blocked")[group % 4],
        iommu="dmar0",
        devices=tuple(d.bdf for d in devices if d.group == group),
        reserved=(Reserved(0xFEE00000, 0xFEF00000, "msi"),),
        mapped=group * 16 * MIB if shown else None,
        extents=group * 3 if shown else None,
        why_not="" if shown else "the kernel shows no page tables of this domain",
    )


def _finding(number: int, subject: str) -> Finding:
    return Finding(
        ("GrantNotMapped", "GuestGone")[number % 2],
        (Severity.WARNING, Severity.ERROR)[number % 2],
        subject,
        "the ledger and the kernel differ",
        "/proc/PID/maps",
        "revoke the grant, or start the guest again",
    )


def snapshot(
    regions: int = 10,
    guests: int = 3,
    *,
    windows: int = 6,
    domains: int = 4,
    events: int = 8,
    findings: int = 2,
    beats: int = 1000,
    big: bool = False,
) -> Snapshot:
    """A host with so many of each; region ``i`` belongs to guest ``i % guests``; ``beats`` moves what is live.

    With ``big`` there is one guest more, ``big``, whose region ``big-ram`` is 1 TiB.
    """
    names = [f"{('web', 'db', 'cache')[i % 3]}{i}" for i in range(guests)]
    held = _Held(names)
    for i in range(regions):
        owner = names[i % guests] if guests and i % 7 != 6 else None
        name = f"{owner}-ram{i // guests}" if owner is not None else f"spare{i}"
        held.reserve(i, name, (64 << (i % 5)) * MIB, owner)
    if big:
        names.append("big")
        held.pids["big"] = 3999
        held.reserve(regions, "big-ram", TIB, "big")
    made_guests = held.guests(beats)
    devices, made_windows = _devices(windows)
    granted = [f"region:{region.name}" for region in held.regions if region.grants]
    return Snapshot(
        taken_ns=NOW_NS,
        host=Host("host1", "7.3.4-synthetic", "x86_64", "7d0c1e52-0b9f-4a53-9a1c", 64, PAGE, 86_400.0, "0"),
        memory=_MEMORY,
        regions=tuple(held.regions),
        guests=made_guests,
        grants=tuple(held.grants),
        devices=devices,
        windows=made_windows,
        iommus=(Iommu("dmar0", "intel-iommu", tuple(d.bdf for d in devices), "version 1:0"),),
        domains=tuple(_domain(i, devices) for i in range(domains)),
        iomem=_IOMEM,
        findings=tuple(_finding(i, names[i % len(names)] if names else "host1") for i in range(findings)),
        gaps=(Unread("/sys/kernel/debug/iommu", "not mounted", "mount -t debugfs none /sys/kernel/debug"),),
        events=tuple(
            Event(i + 1, NOW_NS - (events - i) * 1_000_000_000, "reserve", r.name, f"reserved {r.name}", "root (pid 1)")
            for i, r in zip(range(events), held.regions, strict=False)
        ),
        tables=tuple(TableRef(key, 0, PAGE) for key in [*granted, *(f"guest:{g.name}" for g in made_guests)]),
    )


def big_snapshot() -> Snapshot:
    """10,000 regions, 1,000 guests, and a guest ``big`` of 1 TiB (its table has 1,000,000 extents)."""
    return snapshot(9_999, 999, windows=200, domains=64, events=1000, findings=50, big=True)


def with_usage(shown: Snapshot, seconds: float = 0) -> Snapshot:
    """The Snapshot with what was used until so many seconds later: guest ``i`` keeps ``0.25 * i`` CPUs busy."""
    past = round(seconds * 1e9)

    def used(pid: int, start_ticks: int, busy: float) -> Usage:
        return Usage(
            pid, start_ticks, 10**12 + past, age_ns=7_200 * 10**9 + past, user_ns=10**10 + round(past * busy),
            system_ns=10**9, threads=5, read=round(seconds * busy * MIB), written=0, cpus="0-3", nodes=(0,),
        )  # fmt: skip

    def of_guest(number: int, guest: Guest) -> Guest:
        if guest.seen is None or guest.pid is None or guest.start_ticks is None:
            return guest
        mine = used(guest.pid, guest.start_ticks, 0.25 * number)
        vcpus = tuple(
            ThreadUsage(vcpu.index, vcpu.tid, f"CPU {vcpu.index}/KVM", round(past * 0.25 * number), "0-3", (0,))
            for vcpu in guest.seen.vcpus or ()
            if vcpu.tid is not None
        )
        return msgspec.structs.replace(
            guest, seen=msgspec.structs.replace(guest.seen, usage=msgspec.structs.replace(mine, vcpus=vcpus))
        )

    host = HostUsage(
        10**12 + past, user_ns=10**12 + 16 * past, system_ns=10**11, idle_ns=10**13 + 48 * past, guest_ns=10**11,
        load=(16.25, 12.5, 8.0), service=used(900, 70, 0.05), service_rss=48 * MIB,
    )  # fmt: skip
    guests = tuple(of_guest(number, guest) for number, guest in enumerate(shown.guests))
    return msgspec.structs.replace(shown, usage=host, guests=guests)


def _guest(number: int, name: str, pid: int, ram: tuple[RamBlock, ...], grants: tuple[str, ...], beats: int) -> Guest:
    kind = (GuestKind.CANARY, GuestKind.QEMU, GuestKind.PROCESS)[number % 3]
    vcpus = 2 if kind is not GuestKind.PROCESS else 0
    return Guest(
        name=name,
        kind=kind,
        state=GuestState.PAUSED if number % 11 == 10 else GuestState.RUNNING,
        pid=pid,
        start_ticks=1000 + number,
        memory=sum(block.size for block in ram),
        command=("guest", name),
        grants=grants,
        agent=kind is not GuestKind.QEMU,
        created_ns=NOW_NS - 3_550_000_000_000,
        progress=Progress("kvm", beats + number, beats * 16, 0, 1_200_000, 0) if kind is GuestKind.CANARY else None,
        seen=GuestSeen(
            comm=("canary", "qemu-system-x86", "valkey-server")[number % 3],
            uid=1000 + number,
            rss=sum(block.resident for block in ram) + 8 * MIB,
            threads=4,
            vcpus=tuple(Vcpu(i, pid + 1 + i) for i in range(vcpus)),
            ram=ram,
        ),
    )


def _devices(windows: int) -> tuple[tuple[Device, ...], tuple[Window, ...]]:
    devices: list[Device] = []
    made: list[Window] = []
    for i in range(windows):
        number, bar = divmod(i, 2)
        bdf = f"0000:{number // 32:02x}:{number % 32:02x}.0"
        if bar == 0:
            driver = ("vfio-pci", "nvme", "virtio-pci")[number % 3]
            devices.append(Device(bdf, 0x1234, 0x11E8 + number, 0x010802, driver, number % 4, number % 2))
        made.append(
            Window(
                id=f"{bdf}:{bar * 2}",
                bdf=bdf,
                bar=bar * 2,
                start=0xC0 if bar else 0xFE000000 + number * MIB,
                size=64 if bar else MIB,
                io=bool(bar),
                wide=not bar,
                driver=devices[-1].driver,
                claimed=None if devices[-1].driver == "vfio-pci" else devices[-1].driver,
            )
        )
    return tuple(devices), tuple(made)


def _faults(size: int) -> Faults:
    """A lazy grant of which a quarter was touched."""
    pages = size // 4 // (2 * MIB)
    return Faults(True, pages, pages // 3, size // 4, 37, 0, pages * 140_000, 2_700_000, 2 * MIB)


# --- the Source ---------------------------------------------------------------------------------------------------


class SyntheticSource:
    """A Source over one Snapshot, which tests change with :meth:`show`; ``applied`` lists the Actions in order.

    ``refuse`` makes every plan carry these refusals; that of a handoff has ``conditions`` and ``kernels``, this one and
    the next. ``fail`` makes the named methods raise; ``on_apply`` turns the Snapshot into the one after an Action
    (without it an Action only leaves an event). A table replaced with :meth:`show_rows` is what the next
    :meth:`extents` returns. ``recorded`` is the history, oldest first,
    ``recorded_rows`` the PFN maps in it: when each was scanned, and its rows.
    """

    def __init__(
        self,
        shown: Snapshot | None = None,
        *,
        read_only: str = "",
        on_apply: Callable[[Action, Snapshot], Snapshot] | None = None,
    ) -> None:
        self._snapshot = snapshot() if shown is None else shown
        self._read_only = read_only
        self._rows: dict[str, Sequence[Extent]] = {}
        self._on_apply = on_apply
        self.applied: list[Action] = []
        self.calls: list[str] = []
        self.asked_for: list[frozenset[Part]] = []
        self.refuse: tuple[Refusal, ...] = ()
        self.conditions: tuple[Condition, ...] = ()
        self.kernels: tuple[str, str] = ("", "")
        self.fail: dict[str, Exception] = {}
        self.recorded: list[Snapshot] = []
        self.recorded_rows: dict[str, list[tuple[int, Sequence[Extent]]]] = {}
        self.closed = False

    @property
    def label(self) -> str:
        """Always ``synthetic``."""
        return "synthetic"

    @property
    def read_only(self) -> str:
        """The reason given when it was made."""
        return self._read_only

    def show(self, shown: Snapshot) -> None:
        """Make this the present Snapshot."""
        self._snapshot = shown

    def show_rows(self, key: str, rows: Sequence[Extent]) -> None:
        """Make these the PFN map of ``key``."""
        self._rows[key] = rows

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """The present Snapshot, the same object until :meth:`show` or :meth:`apply`."""
        self._called("snapshot")
        self.asked_for.append(frozenset(parts))
        return self._snapshot

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """A new table of the rows shown for ``key``, else of those the Snapshot implies; the caller closes it.

        Of a time, the rows that were recorded until then.
        """
        from memconsole.extents import ExtentTable

        self._called("extents")
        if at_ns is not None:
            until = [each for each in self.recorded_rows.get(key, ()) if each[0] <= at_ns]
            if not until:
                raise no_map_at(key, at_ns)
            table = ExtentTable.from_rows(until[-1][1])
            table.scanned_ns = until[-1][0]
            return table
        shown = self._rows.get(key)
        if shown is not None:
            return ExtentTable.from_rows(shown)
        return ExtentTable.from_rows(rows_of(self._snapshot, key), first=0, pages=pages_of(self._snapshot, key))

    def frame(self, pfn: int) -> FrameState:
        """A page of shared memory that one process maps."""
        self._called("frame")
        return FrameState(pfn, ("uptodate", "lru", "active", "mmap", "swapbacked"), 1)

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """Two effects with their undo, the ``refuse``-d refusals, and the name to type where it destroys."""
        self._called("plan")
        spec = action.spec
        subject = _subject(action)
        return Plan(
            action=spec.id,
            cli=cli_form(action),
            danger=spec.danger,
            effects=(
                Effect(f"{spec.id}.prepare", f"prepare to {spec.id} {subject}", f"forget {subject}"),
                Effect(f"{spec.id}.commit", f"{spec.id} {subject}", f"undo {spec.id} {subject}"),
            ),
            refusals=self.refuse,
            conditions=self.conditions if spec.id == "handoff-run" else (),
            confirm=subject if spec.danger is Danger.DESTROYS else None,
            from_kernel=self.kernels[0] if spec.id == "handoff-run" else "",
            to_kernel=self.kernels[1] if spec.id == "handoff-run" else "",
        )

    def apply(self, action: Action) -> Outcome:
        """Record the Action and leave an event; raises what the plan refuses."""
        self._called("apply")
        plan = self.plan(action)
        if plan.refusals:
            first = plan.refusals[0]
            raise Refused(first.what, first.why, first.remedy, code=first.code)
        self.applied.append(action)
        subject = _subject(action)
        before = self._snapshot if self._on_apply is None else self._on_apply(action, self._snapshot)
        seq = max((event.seq for event in before.events), default=0) + 1
        event = Event(seq, NOW_NS + seq, action.spec.id, subject, f"{action.spec.title}: {subject}", "test")
        self._snapshot = msgspec.structs.replace(before, events=(*before.events, event))
        report = (
            RevokeReport(subject, Rung.ASK, RevokeOutcome.CUT, 1_000_000, (Rung.ASK,))
            if action.spec.id == "revoke"
            else None
        )
        return Outcome(action.spec.id, subject, f"{action.spec.id} {subject}", plan.effects, 1_000_000, report)

    def events(self, after: int) -> Sequence[Event]:
        """The Snapshot's events above ``after``."""
        self._called("events")
        return tuple(event for event in self._snapshot.events if event.seq > after)

    def history(self, after: int = 0) -> Sequence[int]:
        """The times of ``recorded``, oldest first."""
        self._called("history")
        return [shown.taken_ns for shown in self.recorded if shown.taken_ns > after]

    def at(self, time_ns: int) -> Snapshot:
        """The last of ``recorded`` until then."""
        self._called("at")
        found = [shown for shown in self.recorded if shown.taken_ns <= time_ns]
        if not found:
            raise nothing_at(self.history())
        return found[-1]

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def _subject(action: Action) -> str:
    """The value of an Action's first field: what it works on."""
    return str(getattr(action, fields(type(action))[0].name))
