"""The tables inside views that are parts of an entity, or that have no command of their own."""

from __future__ import annotations

from typing import Any

from memconsole.fields import Field, Show, Table
from memconsole.units import format_address, format_size


def _known(show: Show) -> Show:
    return lambda value: "-" if value is None else show(value)


def _size(id: str, title: str, help: str, get: Any) -> Field:
    return Field(id, title, help, get, _known(format_size), "bytes", 8, right=True)


def _address(id: str, title: str, help: str, get: Any) -> Field:
    return Field(
        id, title, help, get, lambda value: "-" if value is None else format_address(value), "address", 14, True
    )


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
        Field("region", "Region", "the region it is, where it is ours", lambda b: b.region or "-", width=18),
        _address("start", "HVA", "address in the process", lambda b: b.start),
        Field("backing", "Backing", "what backs the VMA", lambda b: b.backing or "anonymous", width=24),
    ),
)

VCPUS = Table(
    "vcpus",
    "vCPUs",
    lambda snapshot: [vcpu for guest in snapshot.guests if guest.seen for vcpu in guest.seen.vcpus],
    lambda vcpu: str(vcpu.index),
    (
        Field("index", "vCPU", "its number", lambda v: v.index, width=6, right=True),
        Field("tid", "Thread", "the thread that runs it", lambda v: v.tid or "-", width=10, right=True),
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
        Field("kind", "Kind", "who made it", lambda i: i.kind, width=14),
        Field("devices", "Devices", "how many it translates for", lambda i: len(i.devices), width=8, right=True),
        Field("detail", "Detail", "version and capabilities", lambda i: i.detail or "-", width=40),
    ),
)

IOMEM = Table(
    "iomem",
    "Physical address map",
    lambda snapshot: snapshot.iomem,
    lambda item: f"{item.start:x}-{item.end:x}:{item.depth}:{item.name}",
    (
        Field("name", "What", "who has the range", lambda r: "  " * r.depth + r.name, width=34),
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
