"""The tables inside views that are parts of an entity, or that have no command of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec.structs import replace

from memconsole.field import Field, Show, Table
from memconsole.fields import TABLES
from memconsole.model import (
    Device,
    Guest,
    GuestKind,
    NumaCell,
    Region,
    RegionSeen,
    Snapshot,
    ThreadUsage,
    Vcpu,
)
from memconsole.rates import percent, usage_of
from memconsole.units import format_address, format_duration, format_percent, format_size


def _known(show: Show) -> Show:
    return lambda value: "-" if value is None else show(value)


def _size(id: str, title: str, help: str, get: Any) -> Field:
    return Field(id, title, help, get, _known(format_size), "bytes", 8, right=True)


def _address(id: str, title: str, help: str, get: Any) -> Field:
    return Field(
        id, title, help, get, lambda value: "-" if value is None else format_address(value), "address", 14, True
    )


def _of_thread(id: str, title: str, help: str, get: Callable[[ThreadUsage], Any], show: Show, *, width: int) -> Field:
    def of_row(row: VcpuRow) -> Any:
        return None if row.used is None else get(row.used)

    return Field(id, title, help, of_row, _known(show), "", width, right=True, news=False)


MAPPINGS = Table(
    "mappings",
    "Mapped by",
    lambda snapshot: [mapping for grant in snapshot.grants for mapping in grant.seen],
    lambda mapping: f"{mapping.pid}:{mapping.start:x}",
    (
        Field("pid", "PID", "the process that maps it", lambda m: m.pid, width=8, right=True),
        _address("start", "Start", "first address in the process", lambda m: m.start),
        _address("end", "End", "address behind it", lambda m: m.end),
        _size("size", "Size", "bytes mapped", lambda m: m.end - m.start),
        _address("offset", "Offset", "where in the region it begins", lambda m: m.offset),
        Field("perms", "Perms", "as in /proc/PID/maps", lambda m: m.perms, width=5),
    ),
)

SEGMENTS = Table(
    "segments",
    "Segments",
    lambda snapshot: [segment for region in snapshot.regions for segment in region.segments],
    lambda segment: f"{segment.device}:{segment.inode}",
    (
        Field("inode", "Inode", "inode of the memfd", lambda s: s.inode, width=12, right=True),
        Field("device", "Device", "device of the memfd", lambda s: s.device, width=8, right=True),
        _size("size", "Size", "bytes", lambda s: s.size),
    ),
)

RAM = Table(
    "ram",
    "RAM",
    lambda snapshot: [block for guest in snapshot.guests if guest.seen for block in guest.seen.ram],
    lambda block: f"{block.start:x}",
    (
        _address("gpa", "GPA", "guest physical address, where it is known", lambda b: b.gpa),
        _size("size", "Size", "bytes", lambda b: b.size),
        _size("resident", "Resident", "bytes with a frame", lambda b: b.resident),
        _size("huge", "By 2M", "bytes mapped by 2 MiB or more an entry", lambda b: b.huge),
        Field("region", "Region", "region it belongs to, if any", lambda b: b.region or "-", width=18),
        _address("start", "HVA", "address in the process", lambda b: b.start),
        Field("backing", "Backing", "what backs the VMA", lambda b: b.backing or "anonymous", width=24),
    ),
)


class GlanceRow(NamedTuple):
    """A guest, and how long it stood still in the last rehearsal or handoff, where that is known."""

    guest: Guest
    blackout_ns: int | None

    @property
    def name(self) -> str:
        """Its name."""
        return self.guest.name

    @property
    def kind(self) -> GuestKind:
        """What kind of guest it is."""
        return self.guest.kind

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self.guest.pid


def glance_rows(snapshot: Snapshot) -> list[GlanceRow]:
    """The guests with their last blackouts."""
    made = snapshot.handoff.guests if snapshot.handoff is not None else ()
    known = {each.name: each.blackout_ns for each in made}
    return [GlanceRow(guest, known.get(guest.name)) for guest in snapshot.guests]


def _of_guest(field: Field) -> Field:
    """A column of guests for the Overview's rows; names have less room there."""
    get = field.get
    return replace(field, get=lambda row: get(row.guest), width=14 if field.id == "name" else field.width)


GLANCE = Table(
    "guests",
    "Guests",
    glance_rows,
    lambda row: str(row.name),
    (
        *(_of_guest(field) for field in TABLES["guests"].fields),
        Field(
            "blackout",
            "Blackout",
            "how long it stood still in the last rehearsal or handoff",
            lambda row: row.blackout_ns,
            _known(format_duration),
            "time",
            8,
            right=True,
        ),
    ),
    lambda row: TABLES["guests"].plain(row.guest),
)


class VcpuRow(NamedTuple):
    """A vCPU, what its thread uses, where that was asked for and is known, and the CPUs its manager pins it to."""

    vcpu: Vcpu
    used: ThreadUsage | None
    pinned: str | None = None


def vcpus(guest: Guest) -> list[VcpuRow]:
    """A guest's vCPUs with what their threads use."""
    usage = usage_of(guest)
    used = {(each.index, each.tid): each for each in usage.vcpus} if usage is not None else {}
    known = guest.seen.vcpus or () if guest.seen is not None else ()
    pinned = {each.tid: each.cpus for each in guest.managed.vcpus} if guest.managed is not None else {}
    return [VcpuRow(vcpu, used.get((vcpu.index, vcpu.tid or 0)), pinned.get(vcpu.tid)) for vcpu in known]


VCPUS = Table(
    "vcpus",
    "vCPUs",
    lambda snapshot: [row for guest in snapshot.guests for row in vcpus(guest)],
    lambda row: str(row.vcpu.index),
    (
        Field("index", "vCPU", "its number", lambda r: r.vcpu.index, width=6, right=True),
        Field("tid", "Thread", "the thread that runs it", lambda r: r.vcpu.tid, width=10, right=True),
        Field("name", "Name", "what its VMM calls the thread", lambda r: r.used and r.used.name, width=14),
        _of_thread("cpu", "CPU %", "CPU it keeps busy, of one CPU", percent, format_percent, width=6),
        _of_thread("cpu_time", "CPU time", "CPU time since it started", lambda t: t.cpu_ns, format_duration, width=8),
        _of_thread("affinity", "CPUs", "CPUs it may run on", lambda t: t.cpus, str, width=10),
        Field("nodes", "Nodes", "NUMA nodes of those CPUs", lambda r: r.used and r.used.nodes, width=6),
        Field("pinned", "Pinned", "CPUs its manager pins it to", lambda r: r.pinned or None, width=8),
    ),
    lambda row: row.vcpu,
)


class CellRow(NamedTuple):
    """A NUMA cell of a guest's, and the region that is its RAM, at ``gpa``, where it was adopted."""

    cell: NumaCell
    region: Region | None = None
    gpa: int | None = None

    @property
    def seen(self) -> RegionSeen | None:
        """What the kernel says of its RAM."""
        return self.region.seen if self.region is not None else None


def cells(snapshot: Snapshot, guest: Guest) -> list[CellRow]:
    """A guest's NUMA cells; QEMU calls the block of each after its number."""
    managed = guest.managed.cells if guest.managed is not None else ()
    regions = {region.name: region for region in snapshot.regions if region.block} if managed else {}
    grants = [grant for grant in snapshot.grants if grant.guest == guest.name and grant.region in regions]
    found = {regions[each.region].block: each for each in sorted(grants, key=lambda each: -each.offset)}
    rows = []
    for cell in managed:
        grant = found.get(f"ram-node{cell.id}")
        rows.append(CellRow(cell, regions[grant.region], grant.gpa) if grant is not None else CellRow(cell))
    return rows


def passed_through(snapshot: Snapshot, guest: Guest) -> list[Device]:
    """The PCI functions that a guest has: by its manager's word, by a window of it, or by VFIO."""
    named = set(guest.managed.host_devices) if guest.managed is not None else set()
    named |= {window.bdf for window in snapshot.windows if window.guest == guest.name}
    return [each for each in snapshot.devices if each.bdf in named or (guest.pid and guest.pid in each.holders)]


CELLS = Table(
    "cells",
    "NUMA cells",
    lambda snapshot: [row for guest in snapshot.guests for row in cells(snapshot, guest)],
    lambda row: str(row.cell.id),
    (
        Field("id", "Cell", "the NUMA node as the guest sees it", lambda r: r.cell.id, width=4, right=True),
        _size("size", "Size", "bytes", lambda r: r.cell.size),
        Field("cpus", "vCPUs", "its vCPUs", lambda r: r.cell.cpus, width=8),
        Field("region", "Region", "its RAM, once it is adopted", lambda r: r.region and r.region.name, width=24),
        _address("gpa", "GPA", "where it begins for the guest", lambda r: r.gpa),
        _size("resident", "Resident", "bytes in memory", lambda r: r.seen and r.seen.resident),
        Field("runs", "Runs", "runs of frames, once its map was looked at", lambda r: r.seen and r.seen.runs, width=6),
    ),
    lambda row: row.cell,
)

MODULES = Table(
    "modules",
    "Memory devices",
    lambda snapshot: [each for guest in snapshot.guests if guest.managed for each in guest.managed.modules],
    lambda module: f"{module.model}:{module.gpa}:{module.size}",
    (
        Field("model", "Model", "dimm, nvdimm, virtio-mem, virtio-pmem", lambda m: m.model, width=12),
        _address("gpa", "GPA", "guest physical address, where it is known", lambda m: m.gpa),
        _size("size", "Size", "bytes", lambda m: m.size),
        Field("node", "Cell", "the NUMA node as the guest sees it", lambda m: m.node, width=4, right=True),
        Field("source", "Source", "file or device behind it", lambda m: m.source, width=30),
    ),
)

DISKS = Table(
    "disks",
    "Disks",
    lambda snapshot: [disk for guest in snapshot.guests if guest.managed for disk in guest.managed.disks],
    lambda disk: disk.target,
    (
        Field("target", "Disk", "its name on the guest's bus", lambda d: d.target, width=8),
        Field("source", "Source", "file, device or volume behind it", lambda d: d.source, width=60),
    ),
)

RESERVED = Table(
    "reserved",
    "Reserved IOVA",
    lambda snapshot: [(domain.group, item) for domain in snapshot.domains for item in domain.reserved],
    lambda pair: f"{pair[0]}:{pair[1].start:x}",
    (
        Field("group", "Group", "IOMMU group", lambda p: p[0], width=5, right=True),
        _address("start", "Start", "first IOVA", lambda p: p[1].start),
        _address("end", "End", "IOVA behind it", lambda p: p[1].end),
        _size("size", "Size", "bytes", lambda p: p[1].end - p[1].start),
        Field("kind", "Kind", "msi, direct, reserved", lambda p: p[1].kind, width=20),
    ),
)

IOMMUS = Table(
    "iommus",
    "IOMMUs",
    lambda snapshot: snapshot.iommus,
    lambda iommu: iommu.name,
    (
        Field("name", "IOMMU", "its name", lambda i: i.name, width=12),
        Field("kind", "Kind", "vendor or driver of the unit", lambda i: i.kind, width=14),
        Field(
            "devices", "Devices", "number of devices it translates for", lambda i: len(i.devices), width=8, right=True
        ),
        Field("detail", "Detail", "version and capabilities", lambda i: i.detail or "-", width=40),
    ),
)

IOMEM = Table(
    "iomem",
    "Physical address map",
    lambda snapshot: snapshot.iomem,
    lambda item: f"{item.start:x}-{item.end:x}:{item.depth}:{item.name}",
    (
        Field("name", "What", "owner of the range", lambda r: "  " * r.depth + r.name, width=34),
        _address("start", "Start", "first physical address", lambda r: r.start),
        _address("end", "End", "address behind it", lambda r: r.end),
        _size("size", "Size", "bytes", lambda r: r.end - r.start),
    ),
)

GAPS = Table(
    "gaps",
    "What could not be read",
    lambda snapshot: snapshot.gaps,
    lambda gap: gap.source,
    (
        Field("source", "Source", "what could not be read", lambda g: g.source, width=30),
        Field("why", "Why", "why not", lambda g: g.why, width=34),
        Field("remedy", "Remedy", "what to do about it", lambda g: g.remedy or "-", width=44),
    ),
)
