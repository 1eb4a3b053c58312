"""One typed field model: what the tables of the Snapshot are called, measured and written as.

Columns of the console, ``--fields`` and plain listings of the command line, CSV and the reference in the docs all
come from here. A :class:`Field` takes its value from an entity (``get``), and says how it is shown (``show``); sorting
uses the value, never the text.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from memconsole.errors import UsageError
from memconsole.model import Grant, Snapshot, Window
from memconsole.units import format_address, format_duration, format_size

Get = Callable[[Any], Any]
Show = Callable[[Any], str]


def _text(value: Any) -> str:
    """Plain text; what is not known is ``-``."""
    if value is None or value in {"", ()}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def _or_dash(show: Show) -> Show:
    return lambda value: "-" if value is None else show(value)


class Field(msgspec.Struct, frozen=True):
    """One column: ``unit`` as a person reads it, ``width`` in cells, numbers to the right."""

    id: str
    title: str
    help: str
    get: Get
    show: Show = _text
    unit: str = ""
    width: int = 10
    right: bool = False
    default: bool = True

    def text(self, item: Any) -> str:
        """The entity's value as it is shown."""
        return self.show(self.get(item))

    def sort_key(self, item: Any) -> tuple[bool, Any]:
        """A key that sorts by value, with the unknown last."""
        value = self.get(item)
        return (value is None, "" if value is None else value)


class Table(msgspec.Struct, frozen=True):
    """A table of the Snapshot; its id names the command and the view, ``rows`` its entities, ``key`` their name."""

    id: str
    title: str
    rows: Callable[[Snapshot], Sequence[Any]]
    key: Callable[[Any], str]
    fields: tuple[Field, ...] = ()

    def pick(self, names: str | None) -> tuple[Field, ...]:
        """The fields named in a comma-separated list, ``all`` for every one, or the default ones.

        Raises:
            UsageError: a name that is no field of this table.
        """
        if not names:
            return tuple(item for item in self.fields if item.default)
        if names == "all":
            return self.fields
        known = {item.id: item for item in self.fields}
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UsageError(f"{self.id} has no field {unknown[0]!r}", "", f"its fields: {', '.join(known)}")
        return tuple(known[name] for name in wanted)


def _size(id: str, title: str, help: str, get: Get, *, width: int = 8, default: bool = True) -> Field:
    return Field(id, title, help, get, _or_dash(format_size), "bytes", width, right=True, default=default)


def _number(id: str, title: str, help: str, get: Get, *, width: int = 6, default: bool = True) -> Field:
    return Field(id, title, help, get, _or_dash(lambda value: f"{value:,}"), "", width, right=True, default=default)


def _address(id: str, title: str, help: str, get: Get, *, default: bool = True) -> Field:
    return Field(id, title, help, get, _or_dash(format_address), "address", 14, right=True, default=default)


def _moment(id: str, title: str, help: str, get: Get, *, default: bool = False) -> Field:
    return Field(id, title, help, get, lambda value: _clock(value) if value else "-", "UTC", 20, default=default)


def _clock(ns: int) -> str:
    moment = datetime.datetime.fromtimestamp(ns // 1_000_000_000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _iovas(found: Sequence[tuple[str, int, str]]) -> str:
    return ", ".join(f"{bdf} {format_address(iova)} {access}" for bdf, iova, access in found) or "-"


def _window_kind(window: Window) -> str:
    return ("io" if window.io else "mem") + ("64" if window.wide else "") + (" p" if window.prefetchable else "")


REGIONS = Table(
    "regions",
    "Regions",
    lambda snapshot: snapshot.regions,
    lambda region: str(region.name),
    (
        Field("name", "Name", "what the region is called", lambda r: r.name, width=18),
        Field("state", "State", "reserved, mapped, frozen, preserved, restored", lambda r: str(r.state), width=10),
        _size("size", "Size", "bytes set aside", lambda r: r.size),
        _size("resident", "Resident", "bytes with a frame (fstat of the memfd)", lambda r: r.seen and r.seen.resident),
        _size("page_size", "Page", "page size of the store", lambda r: r.page_size, width=5),
        Field("store", "Store", "where its frames live", lambda r: r.store, width=6),
        _number("runs", "Runs", "physically contiguous runs, once scanned", lambda r: r.seen and r.seen.runs, width=8),
        _size(
            "huge", "Huge", "bytes mapped by huge pages, once scanned", lambda r: r.seen and r.seen.huge, default=False
        ),
        Field("grants", "Grants", "grants on it", lambda r: r.grants, width=12),
        _size(
            "preserved",
            "KHO",
            "bytes the kernel hands over, in KHO's tree of pages, while a session is open",
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
        _size(
            "moved",
            "Moved",
            "bytes that were in other frames at the scan before",
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
        _moment("created", "Created", "when it was reserved", lambda r: r.created_ns),
    ),
)

GUESTS = Table(
    "guests",
    "Guests",
    lambda snapshot: snapshot.guests,
    lambda guest: str(guest.name),
    (
        Field("name", "Name", "what the guest is called", lambda g: g.name, width=18),
        Field("kind", "Kind", "canary, qemu, process; foreign: a VM not of ours", lambda g: str(g.kind), width=8),
        Field("state", "State", "running, paused, stopped, gone", lambda g: str(g.state), width=8),
        Field("pid", "PID", "its process", lambda g: g.pid, width=8, right=True),
        _size("memory", "Memory", "bytes of guest RAM", lambda g: g.memory),
        _size("rss", "RSS", "bytes its process has in place (/proc/PID/stat)", lambda g: g.seen and g.seen.rss),
        _number("vcpus", "vCPUs", "vCPU file descriptors it holds", lambda g: g.seen and len(g.seen.vcpus), width=5),
        Field("grants", "Grants", "grants it holds", lambda g: g.grants, width=10),
        _number("beats", "Beats", "a canary's own count", lambda g: g.progress and g.progress.beats, width=12),
        _number("wrong", "Wrong", "wrong bytes a canary found", lambda g: g.progress and g.progress.wrong, width=5),
        Field(
            "gap",
            "Gap",
            "longest pause a canary noticed",
            lambda g: g.progress and g.progress.gap_ns,
            _or_dash(format_duration),
            "time",
            8,
            right=True,
        ),
        Field(
            "runs_as",
            "Runs as",
            "whether a canary runs in KVM",
            lambda g: g.progress and g.progress.runs_as,
            width=8,
            default=False,
        ),
        Field("agent", "Agent", "whether it answers requests to unmap", lambda g: g.agent, width=5, default=False),
        Field("comm", "Process", "name of its process", lambda g: g.seen and g.seen.comm, width=16, default=False),
        Field("command", "Command", "how it was started", lambda g: " ".join(g.command), width=40, default=False),
    ),
)


def _lazy(grant: Grant) -> str:
    if grant.faults is None:
        return "yes" if grant.lazy else ""
    return "served" if grant.faults.served else "nobody serves it"


GRANTS = Table(
    "grants",
    "Grants",
    lambda snapshot: snapshot.grants,
    lambda grant: str(grant.id),
    (
        Field("id", "Grant", "its id", lambda g: g.id, width=6),
        Field("region", "Region", "what it is a part of", lambda g: g.region, width=12),
        Field("guest", "Guest", "who may map it", lambda g: g.guest, width=12),
        Field("state", "State", "offered, mapped, revoked", lambda g: str(g.state), width=8),
        _size("length", "Length", "bytes granted", lambda g: g.length),
        _size(
            "present",
            "WSS",
            "working set of a lazy grant: bytes put in place when they were first touched",
            lambda g: g.faults and g.faults.present,
        ),
        _number(
            "faults", "Faults/s", "page faults served in the last second", lambda g: g.faults and g.faults.rate, width=8
        ),
        Field("access", "Access", "ro or rw", lambda g: str(g.access), width=6),
        _address("gpa", "GPA", "guest physical address", lambda g: g.gpa),
        _address("offset", "Offset", "where in the region it begins", lambda g: g.offset, default=False),
        Field("export", "Export", "how the process reaches it", lambda g: g.export, width=6, default=False),
        _number("mappings", "VMAs", "mappings the kernel shows", lambda g: len(g.seen), width=5),
        Field("dma", "DMA", "device it is also mapped for", lambda g: g.dma, width=12, default=False),
        Field(
            "lazy", "Lazy", "whether its pages come when first touched, and somebody serves that", _lazy, default=False
        ),
        _number(
            "minor",
            "Minor",
            "faults on pages that the region had",
            lambda g: g.faults and g.faults.minor,
            default=False,
        ),
        _number(
            "missing",
            "Missing",
            "faults on pages that it had not",
            lambda g: g.faults and g.faults.missing,
            default=False,
        ),
        Field(
            "slowest",
            "Slowest",
            "longest time a fault was served in",
            lambda g: g.faults and g.faults.longest_ns,
            _or_dash(format_duration),
            "time",
            8,
            right=True,
            default=False,
        ),
        _moment("created", "Created", "when it was granted", lambda g: g.created_ns),
    ),
)

QUARANTINE = Table(
    "quarantine",
    "Quarantine",
    lambda snapshot: snapshot.quarantine,
    lambda kept: str(kept.id),
    (
        Field("id", "Grant", "the grant that was revoked", lambda q: q.id, width=6),
        Field("region", "Region", "whose old frames they are", lambda q: q.region, width=18),
        Field("guest", "Guest", "who had the grant", lambda q: q.guest, width=18),
        _size("size", "Size", "bytes that are nobody's", lambda q: q.size),
        _moment("since", "Since", "when the grant was revoked", lambda q: q.since_ns, default=True),
        Field("why", "Why", "what holds them", lambda q: q.why, width=48),
    ),
)

WINDOWS = Table(
    "windows",
    "MMIO windows",
    lambda snapshot: snapshot.windows,
    lambda window: str(window.id),
    (
        Field("id", "Window", "BDF:BAR", lambda w: w.id, width=14),
        _address("start", "Start", "physical address, or port", lambda w: w.start),
        _size("size", "Size", "bytes", lambda w: w.size),
        Field("kind", "Kind", "mem or io; p prefetchable, 64 wide", _window_kind, width=8),
        Field("driver", "Driver", "kernel driver of the device", lambda w: w.driver, width=14),
        Field(
            "claimed", "Claimed by", "who the kernel says has the range (/proc/iomem)", lambda w: w.claimed, width=18
        ),
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
        _size("mapped", "Mapped", "bytes of IOVA that lead somewhere", lambda d: d.mapped),
        _number("extents", "Extents", "runs of IOVA", lambda d: d.extents, width=8),
        _number("reserved", "Reserved", "reserved IOVA ranges", lambda d: len(d.reserved), width=8),
        Field("why_not", "Note", "why its page tables are not shown", lambda d: d.why_not, width=32),
    ),
)

DEVICES = Table(
    "devices",
    "PCI devices",
    lambda snapshot: snapshot.devices,
    lambda device: str(device.bdf),
    (
        Field("bdf", "Device", "PCI address", lambda d: d.bdf, width=12),
        Field("id", "Id", "vendor:device", lambda d: f"{d.vendor:04x}:{d.device:04x}", width=9),
        Field("class", "Class", "PCI class", lambda d: f"{d.class_code:06x}", width=6),
        Field("driver", "Driver", "kernel driver", lambda d: d.driver, width=16),
        Field("group", "Group", "IOMMU group", lambda d: d.group, width=5, right=True),
        Field("holders", "Held by", "processes that have it by VFIO (PID)", lambda d: d.holders, width=12),
        Field("bridge", "Behind", "the bridge it is behind", lambda d: d.bridge, width=12),
        Field("node", "Node", "NUMA node", lambda d: d.node if d.node >= 0 else None, width=4, right=True),
    ),
)

SPANS = Table(
    "spans",
    "Memory, frames, windows and IOVAs",
    lambda _: (),
    lambda span: f"{span.kind}:{span.grant}:{span.offset}:{span.gpa}:{span.hva}:{span.pfn}:{span.iovas}",
    (
        Field("kind", "Kind", "ram, window, iova", lambda s: s.kind, width=6),
        _address("gpa", "GPA", "guest physical address", lambda s: s.gpa),
        _size("size", "Size", "bytes that go on alike", lambda s: s.size),
        Field("pfn", "PFN", "its first frame", lambda s: s.pfn, _or_dash(hex), "", 10, right=True),
        Field("iovas", "IOVA", "where devices reach it, and how", lambda s: s.iovas, _iovas, "", 34),
        Field("what", "What", "region, window, or who reaches it", lambda s: s.what, width=20),
        Field("note", "Note", "what is not as it should be", lambda s: s.note, width=30),
        _address("offset", "Offset", "where in the region", lambda s: s.offset),
        _address("hva", "HVA", "address in its process", lambda s: s.hva),
        Field("grant", "Grant", "by which grant", lambda s: s.grant, width=6),
    ),
)

REACHED = Table(
    "reachers",
    "Who reaches it",
    lambda _: (),
    lambda reacher: f"{reacher.kind}:{reacher.who}:{reacher.address}:{reacher.how}",
    (
        Field("kind", "Who", "process, guest, device, kernel", lambda r: r.kind, width=8),
        Field("who", "Name", "PID, BDF, driver", lambda r: r.who, width=14),
        _address("address", "Address", "its own for it: HVA, IOVA", lambda r: r.address),
        Field("grant", "Grant", "by which grant", lambda r: r.grant, width=6),
        Field("how", "How", "by what it reaches it", lambda r: r.how, width=48),
    ),
)

FINDINGS = Table(
    "findings",
    "Findings",
    lambda snapshot: snapshot.findings,
    lambda finding: f"{finding.id} {finding.subject}",
    (
        Field("severity", "Severity", "error, warning, info", lambda f: str(f.severity), width=8),
        Field("id", "Finding", "its name", lambda f: f.id, width=22),
        Field("subject", "Subject", "what it is about", lambda f: f.subject, width=18),
        Field("what", "What", "what differs", lambda f: f.what, width=48),
        Field("evidence", "Evidence", "where that was read", lambda f: f.evidence, width=32, default=False),
        Field("remedy", "Remedy", "what to do", lambda f: f.remedy, width=40),
    ),
)

EVENTS = Table(
    "events",
    "Events",
    lambda snapshot: snapshot.events,
    lambda event: str(event.seq),
    (
        Field("seq", "#", "order", lambda e: e.seq, width=6, right=True),
        _moment("at", "Time (UTC)", "when", lambda e: e.at_ns, default=True),
        Field("kind", "Kind", "what kind of thing happened", lambda e: e.kind, width=14),
        Field("subject", "Subject", "to what", lambda e: e.subject, width=18),
        Field("text", "What happened", "in words", lambda e: e.text, width=60),
        Field("peer", "Asked by", "who asked", lambda e: e.peer, width=16),
    ),
)

TABLES: Mapping[str, Table] = {
    table.id: table for table in (REGIONS, GUESTS, GRANTS, QUARANTINE, WINDOWS, DOMAINS, DEVICES, FINDINGS, EVENTS)
}
