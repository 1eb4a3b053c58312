"""One typed field model: what the tables of the Snapshot are called, measured and written as.

Columns of the console, ``--columns`` and plain listings of the command line, CSV and the reference in the docs all
come from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memconsole.device_fields import DEVICES
from memconsole.field import (
    Field,
    Table,
    address_field,
    moment_field,
    number_field,
    or_dash,
    size_field,
)
from memconsole.guest_fields import GUESTS
from memconsole.model import Grant, Region, Window, worst_first
from memconsole.units import format_address, format_duration


def _iovas(found: Sequence[tuple[str, int, str]]) -> str:
    return ", ".join(f"{bdf} {format_address(iova)} {access}" for bdf, iova, access in found) or "-"


def _window_kind(window: Window) -> str:
    return ("io" if window.io else "mem") + ("64" if window.wide else "") + (" p" if window.prefetchable else "")


def _owner(region: Region) -> str | None:
    return f"{region.file.user}:{region.file.group}" if region.file is not None else None


def _mode(region: Region) -> str | None:
    return f"{region.file.mode:04o}" if region.file is not None else None


REGIONS = Table(
    "regions",
    "Regions",
    lambda snapshot: snapshot.regions,
    lambda region: str(region.name),
    (
        Field("name", "Name", "what the region is called", lambda r: r.name, width=18),
        Field("state", "State", "reserved, mapped, frozen, preserved, restored", lambda r: str(r.state), width=10),
        size_field("size", "Size", "bytes set aside", lambda r: r.size),
        size_field(
            "resident", "Resident", "bytes with a frame (fstat of the memfd)", lambda r: r.seen and r.seen.resident
        ),
        size_field("page_size", "Page", "page size of the store", lambda r: r.page_size, width=5),
        Field("store", "Store", "where its frames live", lambda r: r.store, width=6),
        number_field(
            "runs", "Runs", "physically contiguous runs, once scanned", lambda r: r.seen and r.seen.runs, width=8
        ),
        size_field(
            "huge", "Huge", "bytes mapped by huge pages, once scanned", lambda r: r.seen and r.seen.huge, default=False
        ),
        Field("grants", "Grants", "grants on it", lambda r: r.grants, width=12),
        size_field(
            "preserved",
            "KHO",
            "bytes the kernel would hand over now, by KHO; - while no session is open",
            lambda r: r.seen and r.seen.preserved,
        ),
        Field(
            "retrieved",
            "Retrieved",
            "whether its file came from the kernel before",
            lambda r: ("yes" if r.seen.retrieved else "no") if r.seen else None,
            width=9,
            default=False,
        ),
        Field("mappers", "Mapped by", "processes that map it (PID)", lambda r: r.seen and r.seen.mappers, width=14),
        size_field(
            "moved",
            "Moved",
            "bytes that are in other frames than at the scan before; - until a second one",
            lambda r: r.seen and r.seen.moved,
            default=False,
        ),
        Field(
            "seals",
            "Seals",
            "seals of its memfd (F_GET_SEALS)",
            lambda r: r.seen and r.seen.seals,
            width=14,
            default=False,
        ),
        Field("node", "Node", "NUMA node it was taken from", lambda r: r.node, width=4, right=True, default=False),
        Field("block", "Block", "what its adopted guest's QEMU calls it", lambda r: r.block, width=9, default=False),
        Field("path", "Path", "which file it is, below files/", lambda r: r.file and r.file.path, default=False),
        Field("owner", "Owner", "user and group of that file (numbers)", _owner, width=11, default=False),
        Field("mode", "Mode", "permissions of that file", _mode, width=4, default=False),
        moment_field("created", "Created", "when it was reserved", lambda r: r.created_ns),
    ),
)


def _lazy(grant: Grant) -> str:
    if grant.faults is None:
        return "yes" if grant.lazy else ""
    return "served" if grant.faults.served else "no handler"


GRANTS = Table(
    "grants",
    "Grants",
    lambda snapshot: snapshot.grants,
    lambda grant: str(grant.id),
    (
        Field("id", "Grant", "its id", lambda g: g.id, width=6),
        Field("region", "Region", "region it is part of", lambda g: g.region, width=12),
        Field("guest", "Guest", "guest that may map it", lambda g: g.guest, width=12),
        Field("state", "State", "offered, mapped, revoked", lambda g: str(g.state), width=8),
        size_field("length", "Length", "bytes granted", lambda g: g.length),
        size_field(
            "present",
            "WSS",
            "working set of a lazy grant: bytes that got frames when first touched",
            lambda g: g.faults and g.faults.present,
        ),
        number_field(
            "faults", "Faults/s", "page faults served in the last second", lambda g: g.faults and g.faults.rate, width=8
        ),
        Field("access", "Access", "ro or rw", lambda g: str(g.access), width=6),
        address_field("gpa", "GPA", "guest physical address", lambda g: g.gpa),
        address_field("offset", "Offset", "where in the region it begins", lambda g: g.offset, default=False),
        Field("export", "Export", "how the process reaches it", lambda g: g.export, width=6, default=False),
        number_field("mappings", "VMAs", "mappings the kernel shows", lambda g: len(g.seen), width=5),
        Field("dma", "DMA", "device it is also mapped for", lambda g: g.dma, width=12, default=False),
        Field(
            "lazy",
            "Lazy",
            "whether pages get frames when first touched, and whether a handler serves the faults",
            _lazy,
            default=False,
        ),
        number_field(
            "minor",
            "Minor",
            "faults on pages that were resident in the region",
            lambda g: g.faults and g.faults.minor,
            default=False,
        ),
        number_field(
            "missing",
            "Missing",
            "faults on pages that were not resident yet",
            lambda g: g.faults and g.faults.missing,
            default=False,
        ),
        Field(
            "slowest",
            "Slowest",
            "longest time a fault was served in",
            lambda g: g.faults and g.faults.longest_ns,
            or_dash(format_duration),
            "time",
            8,
            right=True,
            default=False,
        ),
        moment_field("created", "Created", "when it was granted", lambda g: g.created_ns),
    ),
)

QUARANTINE = Table(
    "quarantine",
    "Quarantine",
    lambda snapshot: snapshot.quarantine,
    lambda kept: str(kept.id),
    (
        Field("id", "Grant", "the grant that was revoked", lambda q: q.id, width=6),
        Field("region", "Region", "region the frames belonged to", lambda q: q.region, width=18),
        Field("guest", "Guest", "guest that had the grant", lambda q: q.guest, width=18),
        size_field("size", "Size", "bytes that no region or guest may use", lambda q: q.size),
        moment_field("since", "Since", "when the grant was revoked", lambda q: q.since_ns, default=True),
        Field("why", "Why", "what pins them", lambda q: q.why, width=48),
    ),
)

WINDOWS = Table(
    "windows",
    "MMIO windows",
    lambda snapshot: snapshot.windows,
    lambda window: str(window.id),
    (
        Field("id", "Window", "BDF:BAR", lambda w: w.id, width=14),
        address_field("start", "Start", "physical address, or port", lambda w: w.start),
        size_field("size", "Size", "bytes", lambda w: w.size),
        Field("kind", "Kind", "mem or io; p prefetchable, 64 wide", _window_kind, width=8),
        Field("driver", "Driver", "kernel driver of the device", lambda w: w.driver, width=14),
        Field("claimed", "Claimed by", "owner of the range in /proc/iomem", lambda w: w.claimed, width=18),
        Field("holders", "Mapped by", "processes that map it (PID)", lambda w: w.holders, width=12),
        Field("guest", "Guest", "guest it is granted to", lambda w: w.guest, width=12),
    ),
)


DOMAINS = Table(
    "domains",
    "IOMMU domains",
    lambda snapshot: snapshot.domains,
    lambda domain: str(domain.group),
    (
        Field("group", "Group", "IOMMU group", lambda d: d.group, width=5, right=True),
        Field("kind", "Type", "DMA, DMA-FQ, identity, blocked", lambda d: d.kind, width=9),
        Field("iommu", "IOMMU", "the unit that translates", lambda d: d.iommu, width=8),
        Field("devices", "Devices", "functions attached to it", lambda d: d.devices, width=28),
        size_field("mapped", "Mapped", "bytes of IOVA that are mapped", lambda d: d.mapped),
        number_field("extents", "Extents", "runs of IOVA", lambda d: d.extents, width=8),
        number_field("reserved", "Reserved", "reserved IOVA ranges", lambda d: len(d.reserved), width=8),
        Field("why_not", "Note", "why its page tables are not shown", lambda d: d.why_not, width=32),
    ),
)

SPANS = Table(
    "spans",
    "Memory, frames, windows and IOVAs",
    lambda _: (),
    lambda span: f"{span.kind}:{span.grant}:{span.offset}:{span.gpa}:{span.hva}:{span.pfn}:{span.iovas}",
    (
        Field("kind", "Kind", "ram, window, iova", lambda s: s.kind, width=6),
        address_field("gpa", "GPA", "guest physical address", lambda s: s.gpa),
        size_field("size", "Size", "bytes of the span", lambda s: s.size),
        Field("pfn", "PFN", "its first frame", lambda s: s.pfn, or_dash(hex), "", 10, right=True),
        Field("iovas", "IOVA", "where devices reach it, and how", lambda s: s.iovas, _iovas, "", 34),
        Field("what", "What", "region, window, or process, device or guest", lambda s: s.what, width=20),
        Field("note", "Note", "what is wrong", lambda s: s.note, width=30),
        address_field("offset", "Offset", "where in the region", lambda s: s.offset),
        address_field("hva", "HVA", "address in its process", lambda s: s.hva),
        Field("grant", "Grant", "by which grant", lambda s: s.grant, width=6),
    ),
)

REACHED = Table(
    "reachers",
    "Reached by",
    lambda _: (),
    lambda reacher: f"{reacher.kind}:{reacher.who}:{reacher.address}:{reacher.how}",
    (
        Field("kind", "Who", "process, guest, device, kernel", lambda r: r.kind, width=8),
        Field("who", "Name", "PID, BDF, driver", lambda r: r.who, width=14),
        address_field("address", "Address", "its own address: HVA, IOVA", lambda r: r.address),
        Field("grant", "Grant", "by which grant", lambda r: r.grant, width=6),
        Field("how", "How", "by what it reaches it", lambda r: r.how, width=48),
    ),
)

FINDINGS = Table(
    "findings",
    "Findings",
    lambda snapshot: worst_first(snapshot.findings),
    lambda finding: f"{finding.id} {finding.subject}",
    (
        Field("severity", "Severity", "error, warning, info", lambda f: str(f.severity), width=8),
        Field("id", "Finding", "its name", lambda f: f.id, width=22),
        Field("subject", "Subject", "what it is about", lambda f: f.subject, width=18),
        Field("observed", "Observed", "what was observed", lambda f: f.observed, width=48),
        Field("risk", "Risk", "what it leads to", lambda f: f.risk, width=40, default=False),
        Field("remedy", "Remedy", "what to do", lambda f: f.remedy, width=40),
        Field("evidence", "Evidence", "where it was observed", lambda f: f.evidence, width=32, default=False),
        Field("requirement", "Requirement", "what should be", lambda f: f.requirement, width=40, default=False),
    ),
)

EVENTS = Table(
    "events",
    "Events",
    lambda snapshot: snapshot.events,
    lambda event: str(event.seq),
    (
        Field("seq", "#", "order", lambda e: e.seq, width=6, right=True),
        moment_field("at", "Time (UTC)", "when", lambda e: e.at_ns, default=True),
        Field("kind", "Kind", "what kind of thing happened", lambda e: e.kind, width=14),
        Field("subject", "Subject", "to what", lambda e: e.subject, width=18),
        Field("text", "What happened", "in words", lambda e: e.text, width=60),
        Field("peer", "Asked by", "user and process that asked", lambda e: e.peer, width=16),
    ),
)

TABLES: Mapping[str, Table] = {
    table.id: table for table in (REGIONS, GUESTS, GRANTS, QUARANTINE, WINDOWS, DOMAINS, DEVICES, FINDINGS, EVENTS)
}
