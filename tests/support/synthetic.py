"""Synthetic hosts: deterministic Snapshots of any size, and a Source over one that tests can steer.

Nothing here reads a clock, a host or a random device: the same arguments give the same values for ever. The parts of a
Snapshot agree with each other (a grant names a region and a guest that exist, a guest's PFN map is made of its
regions' maps), so that whatever joins them finds what it would find on a host.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from memconsole.actions import Action, cli_form, fields
from memconsole.errors import MemconsoleError, NotFound, Refused
from memconsole.model import (
    Access,
    Danger,
    Device,
    Domain,
    Effect,
    Event,
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
    Host,
    HugePool,
    Iommu,
    Memory,
    Node,
    Outcome,
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
    Vcpu,
    Window,
)
from memconsole.source import nothing_at

if TYPE_CHECKING:
    from memconsole.extents import Extent, ExtentTable

NOW_NS = 1_790_000_000_000_000_000
"""The frozen clock: 2026-09-21 14:13:20 UTC."""

PAGE = 4096
HUGE_PAGES = 512
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
HVA_BASE = 0x7F0000000000

PRESENT, SWAP, FILE, EXCLUSIVE, HUGE = 1, 2, 4, 8, 64  # memconsole.extents.Flag, which needs the native core


# --- Snapshots ----------------------------------------------------------------------------------------------------


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
    made_regions: list[Region] = []
    made_grants: list[Grant] = []
    ram: dict[str, list[RamBlock]] = {name: [] for name in names}
    held: dict[str, list[str]] = {name: [] for name in names}
    pids = {name: 4000 + 7 * i for i, name in enumerate(names)}

    def reserve(number: int, name: str, size: int, owner: str | None) -> None:
        grants: tuple[str, ...] = ()
        if owner is not None:
            gpa = sum(block.size for block in ram[owner])
            hva = HVA_BASE + (number << 40)
            mapping = GrantMapping(pids[owner], hva, hva + size, 0, "rw-s")
            grants = (f"g{number + 1}",)
            made_grants.append(
                Grant(
                    grants[0], name, owner, 0, size, Access.RW, GrantState.MAPPED, gpa,
                    created_ns=NOW_NS - 3_500_000_000_000, seen=(mapping,), lazy=number == 1,
                    faults=_faults(size) if number == 1 else None,
                )
            )  # fmt: skip
            held[owner].append(grants[0])
            ram[owner].append(RamBlock(hva, size, size // 10 * 9, gpa, name, f"/memfd:{name} (deleted)"))
        made_regions.append(
            Region(
                name=name,
                store="memfd",
                size=size,
                page_size=PAGE if number % 4 else 2 * MIB,
                state=RegionState.MAPPED if owner is not None else RegionState.RESERVED,
                node=number % 2,
                created_ns=NOW_NS - 3_600_000_000_000 + number * 1_000_000,
                segments=(Segment(inode=100 + number, device=1, size=size),),
                grants=grants,
                seen=RegionSeen(
                    resident=size // 10 * 9 if owner is not None else 0,
                    seals=("grow", "seal"),
                    mappers=(pids[owner],) if owner is not None else (),
                    runs=_extents_of(size) if owner is not None else None,
                    huge=size // 2 if owner is not None else None,
                    scanned_ns=NOW_NS if owner is not None else None,
                ),
            )
        )

    for i in range(regions):
        owner = names[i % guests] if guests and i % 7 != 6 else None
        name = f"{owner}-ram{i // guests}" if owner is not None else f"spare{i}"
        reserve(i, name, (64 << (i % 5)) * MIB, owner)
    if big:
        names.append("big")
        pids["big"] = 3999
        ram["big"], held["big"] = [], []
        reserve(regions, "big-ram", TIB, "big")

    made_guests = tuple(
        _guest(i, name, pids[name], tuple(ram[name]), tuple(held[name]), beats) for i, name in enumerate(names)
    )
    devices, made_windows = _devices(windows)
    return Snapshot(
        taken_ns=NOW_NS,
        host=Host("host1", "7.3.4-synthetic", "x86_64", "7d0c1e52-0b9f-4a53-9a1c", 64, PAGE, 86_400.0, "0"),
        memory=Memory(
            total=4 * TIB,
            free=TIB,
            available=2 * TIB,
            shmem=2 * TIB,
            huge_shmem=TIB,
            shmem_thp="advise",
            nodes=(Node(0, 2 * TIB, GIB * 600, "0-31"), Node(1, 2 * TIB, GIB * 424, "32-63")),
            pools=(HugePool(2 * MIB, 1024, 512), HugePool(GIB, 16, 4)),
        ),
        regions=tuple(made_regions),
        guests=made_guests,
        grants=tuple(made_grants),
        devices=devices,
        windows=made_windows,
        iommus=(Iommu("dmar0", "intel-iommu", tuple(d.bdf for d in devices), "version 1:0"),),
        domains=tuple(
            Domain(
                group=i,
                kind=("DMA-FQ", "identity", "DMA", "blocked")[i % 4],
                iommu="dmar0",
                devices=tuple(d.bdf for d in devices if d.group == i),
                reserved=(Reserved(0xFEE00000, 0xFEF00000, "msi"),),
                mapped=i * 16 * MIB if i % 2 == 0 else None,
                extents=i * 3 if i % 2 == 0 else None,
                why_not="" if i % 2 == 0 else "the kernel shows no page tables of this domain",
            )
            for i in range(domains)
        ),
        iomem=(
            Range(0x1000, 0x9F000, "System RAM"),
            Range(0x100000, 0xBFFE0000, "System RAM"),
            Range(0x1000000, 0x2000000, "Kernel code", 1),
            Range(0xFE000000, 0xFF000000, "PCI Bus 0000:00"),
            Range(0x100000000, 0x40000000000, "System RAM"),
        ),
        findings=tuple(
            Finding(
                f"{('GrantNotMapped', 'GuestGone')[i % 2]}",
                (Severity.WARNING, Severity.ERROR)[i % 2],
                names[i % len(names)] if names else "host1",
                "the ledger and the kernel differ",
                "/proc/PID/maps",
                "revoke the grant, or start the guest again",
            )
            for i in range(findings)
        ),
        gaps=(Gap("/sys/kernel/debug/iommu", "not mounted", "mount -t debugfs none /sys/kernel/debug"),),
        events=tuple(
            Event(i + 1, NOW_NS - (events - i) * 1_000_000_000, "reserve", r.name, f"reserved {r.name}", "root (pid 1)")
            for i, r in zip(range(events), made_regions, strict=False)
        ),
        tables=tuple(
            TableRef(key, 0, PAGE)
            for key in [f"region:{r.name}" for r in made_regions if r.grants] + [f"guest:{g.name}" for g in made_guests]
        ),
    )


def big_snapshot() -> Snapshot:
    """10,000 regions, 1,000 guests, and a guest ``big`` of 1 TiB (its table has 1,000,000 extents)."""
    return snapshot(9_999, 999, windows=200, domains=64, events=1000, findings=50, big=True)


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


# --- PFN maps -----------------------------------------------------------------------------------------------------


def _faults(size: int) -> Faults:
    """A lazy grant of which a quarter was touched."""
    pages = size // 4 // (2 * MIB)
    return Faults(True, pages, pages // 3, size // 4, 37, 0, pages * 140_000, 2_700_000, 2 * MIB)


def _extents_of(size: int) -> int:
    """How many extents the map of a region of this size has."""
    return 1_000_000 if size == TIB else max(1, size // (2 * MIB)) * 2


def region_rows(name: str, size: int, *, shift: int = 0) -> Iterator[Extent]:
    """The PFN map of a region: 2 MiB chunks, three of five huge, the others cut into 4 KiB runs, swap and holes.

    They begin at page ``shift``; of a region of 1 TiB they are 1,000,000. No extent's frames continue another's.
    """
    from memconsole.extents import Extent

    rng = random.Random(zlib.crc32(name.encode()))
    chunks = size // (HUGE_PAGES * PAGE)
    wanted = _extents_of(size)
    done = 0
    for chunk in range(chunks):
        offset = shift + chunk * HUGE_PAGES
        if chunk % 5 in {0, 2, 3} and chunk < chunks - 1:
            done += 1
            pfn = (1 << 20) + (rng.getrandbits(16) << 10)
            yield Extent(offset, pfn, HUGE_PAGES, PRESENT | FILE | EXCLUSIVE | HUGE)
            continue
        pieces = min(HUGE_PAGES, max(1, wanted * (chunk + 1) // chunks - done))
        length = HUGE_PAGES // pieces
        done += pieces
        for piece in range(pieces):
            count = length if piece < pieces - 1 else HUGE_PAGES - length * (pieces - 1)
            dice = rng.getrandbits(24)
            there = max(1, count // 2) if dice & 0x30 == 0 else count  # the rest is absent, and has no row
            if dice & 15 == 1:
                yield Extent(offset, (dice >> 4) << 15, there, SWAP)
            else:
                yield Extent(offset, (1 << 27) + (dice << 10), there, PRESENT | FILE)
            offset += count


def _ram_of(shown: Snapshot, key: str) -> list[tuple[str, int, int]]:
    """The parts (region, bytes, first page) the PFN map of ``region:NAME`` or ``guest:NAME`` is made of."""
    kind, _, name = key.partition(":")
    for region in shown.regions if kind == "region" else ():
        if region.name == name:
            return [(name, region.size, 0)]
    for guest in shown.guests if kind == "guest" else ():
        if guest.name == name and guest.seen is not None:
            return [(str(block.region), block.size, (block.gpa or 0) // PAGE) for block in guest.seen.ram]
    raise NotFound(f"there is no {key}", "", "see memconsole regions and memconsole guests")


def rows_of(shown: Snapshot, key: str) -> Iterator[Extent]:
    """The extents of ``region:NAME`` by offset, or of ``guest:NAME`` by gpa, as the Snapshot lays them out.

    Raises:
        NotFound: the Snapshot has no such region or guest.
    """
    for name, size, shift in _ram_of(shown, key):
        yield from region_rows(name, size, shift=shift)


def pages_of(shown: Snapshot, key: str) -> int:
    """How many pages that map covers."""
    return sum(size for _, size, _ in _ram_of(shown, key)) // PAGE


# --- the Source ---------------------------------------------------------------------------------------------------


class SyntheticSource:
    """A Source over one Snapshot, which tests change with :meth:`show`; ``applied`` lists the Actions in order.

    ``refuse`` makes every plan carry these refusals; ``fail`` makes the named methods raise; ``on_apply`` turns the
    Snapshot into the one after an Action (without it an Action only leaves an event). A table replaced with
    :meth:`show_rows` is what the next :meth:`extents` returns. ``recorded`` is the history, oldest first.
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
        self.refuse: tuple[Refusal, ...] = ()
        self.fail: dict[str, MemconsoleError] = {}
        self.recorded: list[Snapshot] = []
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

    def snapshot(self) -> Snapshot:
        """The present Snapshot, the same object until :meth:`show` or :meth:`apply`."""
        self._called("snapshot")
        return self._snapshot

    def extents(self, key: str) -> ExtentTable:
        """A new table of the rows shown for ``key``, else of those the Snapshot implies; the caller closes it."""
        from memconsole.extents import ExtentTable

        self._called("extents")
        shown = self._rows.get(key)
        if shown is not None:
            return ExtentTable.from_rows(shown)
        return ExtentTable.from_rows(rows_of(self._snapshot, key), first=0, pages=pages_of(self._snapshot, key))

    def plan(self, action: Action) -> Plan:
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
            confirm=subject if spec.danger is Danger.DESTROYS else None,
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
