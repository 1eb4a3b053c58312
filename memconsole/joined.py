"""What belongs together: a guest's memory with the frames, windows and IOVAs behind it; a frame with all who reach it.

Everything here is a function of a Snapshot and of tables of extents (``region:NAME``, ``guest:NAME``,
``domain:GROUP``), so that it is the same of this host, of another one, and of a file. What a table would have said and
could not be had is named beside the answer, never left out in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec.structs import replace

from memconsole.errors import MemconsoleError, NotFound, UsageError
from memconsole.model import Domain, FrameState, Grant, Guest, Range, Region, Snapshot, Unread, Value
from memconsole.units import PAGE, format_address, parse_address

if TYPE_CHECKING:
    from memconsole.extents import Extent, ExtentTable

SPANS_MAX = 10_000
"""Rows of a guest's joined view: more than anybody reads; it says when there are more."""
_IDENTITY = "identity"


class TableSource(Protocol):
    """Where tables come from: a Source."""

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The table of a key, or of a time in the past, which the caller closes."""

    def frame(self, pfn: int) -> FrameState:
        """What the kernel says of a frame."""


class Reacher(Value, frozen=True):
    """One who reaches a frame: ``address`` is its own for it (an HVA, an IOVA), in bytes."""

    kind: str
    who: str
    how: str
    address: int | None = None
    grant: str | None = None


class Frame(Value, frozen=True):
    """A frame: what it is (``where``, outermost first), whose, and everybody who reaches it; addresses in bytes.

    ``state`` is what the kernel says of it.
    """

    pfn: int
    where: tuple[str, ...] = ()
    region: str | None = None
    offset: int | None = None
    guests: tuple[tuple[str, int], ...] = ()
    reached: tuple[Reacher, ...] = ()
    unseen: tuple[Unread, ...] = ()
    state: FrameState | None = None


class Span(Value, frozen=True):
    """A part of a guest's memory, bytes: ``kind`` is ram, window, or iova where a device reaches what is no grant's.

    ``iovas`` are BDF, IOVA and access of the devices that reach these frames; ``note`` is what is not as it should be.
    """

    kind: str
    size: int
    gpa: int | None = None
    pfn: int | None = None
    hva: int | None = None
    what: str = ""
    offset: int | None = None
    grant: str | None = None
    iovas: tuple[tuple[str, int, str], ...] = ()
    note: str = ""


class Joined(Value, frozen=True):
    """A guest on one page; ``more``: there are more spans than are listed."""

    guest: str
    spans: tuple[Span, ...]
    more: bool = False
    unseen: tuple[Unread, ...] = ()


class _OpenTables:
    """Tables that were asked for, each once, with what could not be had."""

    def __init__(self, tables: TableSource, stack: contextlib.ExitStack) -> None:
        self._tables = tables
        self._stack = stack
        self._known: dict[str, ExtentTable | None] = {}
        self.gaps: list[Unread] = []

    def __call__(self, key: str) -> ExtentTable | None:
        if key not in self._known:
            try:
                self._known[key] = self._stack.enter_context(contextlib.closing(self._tables.extents(key)))
            except MemconsoleError as error:
                self._known[key] = None
                self.gaps.append(Unread(key, error.why or error.what, error.remedy))
        return self._known[key]


def resolve_target(snapshot: Snapshot, tables: TableSource, target: str) -> Joined | Frame:
    """What a target's text means: GUEST, a PFN, or ADDRESS@ of a device (BDF), a guest or a region.

    Raises:
        UsageError: it is none of these. NotFound: there is no such thing, or nothing is there.
    """
    address, at, of = target.rpartition("@")
    if at:
        return frame_reachers(snapshot, tables, frame_at(snapshot, tables, parse_address(address), of))
    if any(guest.name == target for guest in snapshot.guests):
        return joined_guest(snapshot, tables, target)
    try:
        pfn = int(target, 0)
    except ValueError:
        known = "write GUEST, a PFN, or ADDRESS@DEVICE, ADDRESS@GUEST, ADDRESS@REGION"
        raise UsageError(
            f"{target!r} cannot be looked up", "it is neither a guest nor a page frame number", known
        ) from None
    if not 0 <= pfn < 1 << 52:
        raise UsageError(
            f"there is no frame {target}",
            "a page frame number has at most 52 bits",
            "write PFN, not a physical address",
        )
    return frame_reachers(snapshot, tables, pfn)


def table_key(snapshot: Snapshot, target: str) -> str:
    """The table key a name means: one with its kind (``region:NAME``) as it is, a bare name where it is unambiguous.

    A guest and the region that is its RAM often have one name: the guest is meant, whose map has the region's frames.

    Raises:
        NotFound: no region or guest has the name.
        UsageError: both have it, and the region is not the guest's.
    """
    if target.startswith(("region:", "guest:", "domain:", "frames:")):
        return target
    keys = [f"region:{region.name}" for region in snapshot.regions if region.name == target]
    keys += [f"guest:{guest.name}" for guest in snapshot.guests if guest.name == target]
    if not keys:
        raise NotFound(
            f"there is no region or guest {target!r}", "none has this name", "see memconsole regions, memconsole guests"
        )
    if len(keys) > 1 and (target, target) not in {(grant.region, grant.guest) for grant in snapshot.grants}:
        raise UsageError(
            f"{target!r} is ambiguous", "a region and a guest have this name", f"write {' or '.join(keys)}"
        )
    return keys[-1]


# --- from a frame to all who reach it ---------------------------------------------------------------------------


def frame_reachers(snapshot: Snapshot, tables: TableSource, pfn: int) -> Frame:
    """Everybody who reaches a frame: processes, devices, the kernel."""
    with contextlib.ExitStack() as stack:
        opened = _OpenTables(tables, stack)
        address = pfn * PAGE
        ranges = [each for each in snapshot.iomem if each.start <= address < each.end]
        where = tuple(each.name for each in ranges)
        reached = [*_kernel(snapshot, address, ranges)]
        region, offset, guests = _in_regions(snapshot, opened, pfn, reached)
        if region is None:
            guests = _in_guests(snapshot, opened, pfn, reached)
        reached += _devices(snapshot, opened, pfn)
        ram = any(each.is_ram for each in ranges)
        if region is None and not guests and ram:
            why = "the frame belongs to no region and no VM: other processes that map it are not searched"
            opened.gaps.append(Unread("processes", why, "page-types -a counts its mappings"))
        state = _state(tables, pfn, opened.gaps) if ram else None
        return Frame(pfn, where, region, offset, tuple(guests), tuple(reached), tuple(opened.gaps), state)


def _state(tables: TableSource, pfn: int, gaps: list[Unread]) -> FrameState | None:
    """What the kernel says of a frame; of the past it is not recorded."""
    try:
        return tables.frame(pfn)
    except MemconsoleError as error:
        if error.code != "NotRecorded":
            gaps.append(Unread("/proc/kpageflags", error.why or error.what, error.remedy))
        return None


def frame_lines(frame: Frame) -> list[str]:
    """A frame in a few lines: what it is, and whose."""
    lines = [
        f"PFN {frame.pfn:#x}, physical address {format_address(frame.pfn * PAGE)}: {' > '.join(frame.where) or '-'}"
    ]
    if frame.region is not None:
        lines.append(f"region {frame.region}, offset {format_address(frame.offset or 0)}")
    lines += [f"guest {name}, at {format_address(address)}" for name, address in frame.guests]
    if frame.state is not None:
        lines.append(f"flags {' '.join(frame.state.flags) or 'none'}; mapped {frame.state.mapped} times")
    return lines


def _kernel(snapshot: Snapshot, address: int, ranges: Sequence[Range]) -> Iterator[Reacher]:
    if any(each.is_ram for each in ranges):
        inner = ranges[-1].name
        own = f"its own: {inner}" if inner.startswith("Kernel") else "maps all of its memory"
        yield Reacher("kernel", "kernel", own)
    for window in snapshot.windows:
        if window.io or not window.start <= address < window.start + window.size:
            continue
        if window.claimed is not None:
            yield Reacher("kernel", window.claimed, f"has window {window.id}")
        yield Reacher("device", window.bdf, f"it is its window {window.id}", address - window.start)
        for pid in window.holders:
            yield Reacher("process", str(pid), f"maps window {window.id}")
        if window.guest is not None:
            yield Reacher("guest", window.guest, f"window {window.id}", None, window.grant)


def _in_regions(
    snapshot: Snapshot, opened: _OpenTables, pfn: int, reached: list[Reacher]
) -> tuple[str | None, int | None, list[tuple[str, int]]]:
    """The first region that has a frame, where, and as which page of which guests; who maps it is added."""
    first: tuple[str, int] | None = None
    guests: list[tuple[str, int]] = []
    for region in snapshot.regions:
        table = opened(f"region:{region.name}") if region.seen is not None else None
        page = None if table is None else table.lookup_pfn(pfn)
        if page is None:
            continue
        offset = page * PAGE
        first = first or (region.name, offset)
        grants = [
            grant
            for grant in snapshot.grants
            if grant.region == region.name and grant.offset <= offset < grant.offset + grant.length
        ]
        for grant in grants:
            if grant.gpa is not None:
                guests.append((grant.guest, grant.gpa + offset - grant.offset))
            reached += _mapped(grant, offset)
        known = {mapping.pid for grant in snapshot.grants if grant.region == region.name for mapping in grant.seen}
        for pid in region.seen.mappers if region.seen else ():
            if pid not in known:
                reached.append(Reacher("process", str(pid), f"maps parts of region {region.name} without a grant"))
    return (*(first or (None, None)), guests)


def _mapped(grant: Grant, offset: int) -> Iterator[Reacher]:
    for mapping in grant.seen:
        if mapping.offset <= offset < mapping.offset + mapping.end - mapping.start:
            how = f"guest {grant.guest} maps region {grant.region}, {mapping.perms}"
            yield Reacher("process", str(mapping.pid), how, mapping.start + offset - mapping.offset, grant.id)
    if not grant.seen:
        yield Reacher("guest", grant.guest, f"may map region {grant.region} ({grant.access})", None, grant.id)


def _in_guests(snapshot: Snapshot, opened: _OpenTables, pfn: int, reached: list[Reacher]) -> list[tuple[str, int]]:
    """The VMs that are not ours whose RAM has a frame, by HVA."""
    found = []
    for guest in snapshot.guests:
        table = opened(f"guest:{guest.name}") if guest.kind == "foreign" else None
        page = None if table is None else table.lookup_pfn(pfn)
        if page is not None:
            reached.append(Reacher("process", str(guest.pid), f"RAM of VM {guest.name}", page * PAGE))
            found.append((guest.name, page * PAGE))
    return found


def _devices(snapshot: Snapshot, opened: _OpenTables, pfn: int) -> Iterator[Reacher]:
    """The devices that reach a frame: by page tables, or because nothing confines them."""
    for domain in snapshot.domains:
        if domain.why_not.startswith(_IDENTITY):
            for bdf in domain.devices:
                yield Reacher("device", bdf, "not confined: an IOVA is the physical address", pfn * PAGE)
        elif (page := _lookup(opened, domain, pfn)) is not None:
            table = opened(f"domain:{domain.group}")
            access = "" if table is None else access_of(table[table.lookup(page) or 0])
            for bdf in domain.devices:
                yield Reacher("device", bdf, f"IOMMU group {domain.group}, {access}", page * PAGE)
    if snapshot.devices and not snapshot.domains:
        yield Reacher("device", "any", "no IOMMU confines the devices of this host", pfn * PAGE)


def _lookup(opened: _OpenTables, domain: Domain, pfn: int) -> int | None:
    if domain.mapped == 0 or not domain.devices:
        return None
    table = opened(f"domain:{domain.group}")
    return None if table is None else table.lookup_pfn(pfn)


def access_of(row: Extent) -> str:
    """What a row of a device's address space allows: r, w, rw."""
    from memconsole.extents import Flag

    return ("r" if row.flags & Flag.READ else "") + ("w" if row.flags & Flag.WRITE else "")


# --- from an address to its frame -------------------------------------------------------------------------------


def frame_at(snapshot: Snapshot, tables: TableSource, address: int, of: str) -> int:
    """The frame behind an IOVA of a device, a GPA (HVA where none is known) of a guest, or an offset of a region.

    Raises:
        NotFound: there is no such device, guest or region, or nothing is there.
        UsageError: two have the name.
    """
    key, word = _space(snapshot, of)
    if not key:
        return address // PAGE
    said = address
    key, address = _granted_at(snapshot, key, address)
    with contextlib.closing(tables.extents(key)) as table:
        row = table.lookup(address // PAGE)
        if row is None:
            raise NotFound(
                f"{word} {format_address(said)} of {of} leads nowhere",
                "no frame is mapped there",
                "memconsole reach GUEST lists what is mapped",
            )
        return table[row].pfn + address // PAGE - table[row].offset


def _granted_at(snapshot: Snapshot, key: str, address: int) -> tuple[str, int]:
    """A guest's GPA as an offset of the region it was granted there, whoever maps it; any other address as it is."""
    for grant in snapshot.grants:
        if key == f"guest:{grant.guest}" and grant.gpa is not None and 0 <= address - grant.gpa < grant.length:
            return f"region:{grant.region}", grant.offset + address - grant.gpa
    return key, address


def _space(snapshot: Snapshot, of: str) -> tuple[str, str]:
    """The key of an address space and what its addresses are called; no key where an address is the physical one.

    A name alone is a device's, else a guest's, else a region's; ``guest:NAME`` and ``region:NAME`` say which.
    """
    found = {f"device:{each.bdf}": f"domain:{each.group}" for each in snapshot.devices}
    found |= {f"guest:{guest.name}": f"guest:{guest.name}" for guest in snapshot.guests}
    found |= {f"region:{region.name}": f"region:{region.name}" for region in snapshot.regions}
    names = [name for name in (of, f"device:{of}", f"guest:{of}", f"region:{of}") if name in found]
    if not names:
        raise NotFound(
            f"there is no device, guest or region {of}",
            "none has this name",
            "memconsole devices, guests, regions list them",
        )
    key, word = found[names[0]], "IOVA" if names[0].startswith("device:") else "address"
    domain = next((each for each in snapshot.domains if f"domain:{each.group}" == key), None)
    unconfined = key == "domain:None" or (domain is not None and domain.why_not.startswith(_IDENTITY))
    return ("", word) if unconfined else (key, word)


# --- a guest on one page ----------------------------------------------------------------------------------------


class _Space(NamedTuple):
    bdf: str
    table: ExtentTable


def joined_guest(snapshot: Snapshot, tables: TableSource, name: str, *, most: int = SPANS_MAX) -> Joined:
    """A guest's memory by GPA with its frames, windows and IOVAs.

    Raises:
        NotFound: there is no such guest.
    """
    found = next((each for each in snapshot.guests if each.name == name), None)
    if found is None:
        raise NotFound(f"there is no guest {name}", "none has this name", "memconsole guests lists them")
    with contextlib.ExitStack() as stack:
        opened = _OpenTables(tables, stack)
        spaces = _spaces(snapshot, opened, found)
        grants = [grant for grant in snapshot.grants if grant.guest == name]
        spans: list[Span] = []
        for part in _parts(snapshot, opened, found, grants, spaces):
            if len(spans) >= most:
                return Joined(name, tuple(spans), more=True, unseen=tuple(opened.gaps))
            spans.append(part)
        return Joined(name, tuple(spans), unseen=tuple(opened.gaps))


def _spaces(snapshot: Snapshot, opened: _OpenTables, found: Guest) -> list[_Space]:
    """The address spaces of the devices a guest was granted memory for, or has by VFIO."""
    bdfs = {grant.dma for grant in snapshot.grants if grant.guest == found.name and grant.dma is not None}
    bdfs |= {device.bdf for device in snapshot.devices if found.pid in device.holders}
    spaces = []
    for bdf in sorted(bdfs):
        group = next((device.group for device in snapshot.devices if device.bdf == bdf), None)
        table = None if group is None else opened(f"domain:{group}")
        if table is not None:
            spaces.append(_Space(bdf, table))
    return spaces


def _parts(
    snapshot: Snapshot, opened: _OpenTables, found: Guest, grants: Sequence[Grant], spaces: Sequence[_Space]
) -> Iterator[Span]:
    regions = {region.name: region for region in snapshot.regions}
    for grant in sorted(grants, key=lambda grant: (grant.gpa is None, grant.gpa or grant.offset)):
        yield from _granted(regions.get(grant.region), opened, grant, spaces)
    if found.kind == "foreign":
        yield from _foreign(opened, found, spaces)
    for window in snapshot.windows:
        if window.guest == found.name or found.pid in window.holders:
            note = "" if window.guest == found.name else "mapped without a grant"
            what = f"{window.id} {window.driver or ''}".rstrip()
            yield Span("window", window.size, None, window.start // PAGE, what=what, grant=window.grant, note=note)
    if found.kind != "foreign":
        yield from _strays(grants, spaces)


def _granted(region: Region | None, opened: _OpenTables, grant: Grant, spaces: Sequence[_Space]) -> Iterator[Span]:
    """A grant by what its region's frames and its devices' tables say: a span where all of them go on alike."""
    table = opened(f"region:{grant.region}") if region is not None and region.seen is not None else None
    whole = Span("ram", grant.length, grant.gpa, None, what=grant.region, offset=grant.offset, grant=grant.id)
    if table is None:
        yield replace(whole, note="its frames are not shown")
        return
    first, end = grant.offset // PAGE, (grant.offset + grant.length) // PAGE
    base = None if grant.gpa is None else grant.gpa // PAGE
    at = first
    while at < end:
        row, stop = _run(table, at, end)
        pfn = None if row is None else row.pfn + at - row.offset
        iovas, notes = [], []
        for space in spaces if base is not None and grant.dma is not None else ():
            iova = base + at - first if base is not None else 0
            there, until = _run(space.table, iova, iova + stop - at)
            stop = min(stop, at + until - iova)
            if there is None:
                notes.append(f"{space.bdf} does not reach it")
            elif pfn is not None and there.pfn + iova - there.offset != pfn:
                notes.append(f"{space.bdf} finds PFN {there.pfn + iova - there.offset:#x}")
            else:
                iovas.append((space.bdf, iova * PAGE, access_of(there)))
        yield replace(
            whole,
            size=(stop - at) * PAGE,
            gpa=None if base is None else (base + at - first) * PAGE,
            pfn=pfn,
            hva=_hva(grant, at * PAGE),
            offset=at * PAGE,
            iovas=tuple(iovas),
            note="; ".join([*([] if row else ["absent"]), *notes]),
        )
        at = stop


def _run(table: ExtentTable, page: int, end: int) -> tuple[Extent | None, int]:
    """The row that holds a page, or None, and the page behind what goes on alike, at most ``end``."""
    row = table.lookup(page)
    if row is not None:
        return table[row], min(end, table[row].offset + table[row].count)
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if table[middle].offset <= page else (low, middle)
    return None, min(end, table[low].offset) if low < len(table) else end


def _hva(grant: Grant, offset: int) -> int | None:
    for mapping in grant.seen:
        if mapping.offset <= offset < mapping.offset + mapping.end - mapping.start:
            return mapping.start + offset - mapping.offset
    return None


def _foreign(opened: _OpenTables, found: Guest, spaces: Sequence[_Space]) -> Iterator[Span]:
    table = opened(f"guest:{found.name}")
    for row in table or ():
        iovas = [
            (space.bdf, page * PAGE, access_of(space.table[space.table.lookup(page) or 0]))
            for space in spaces
            if (page := space.table.lookup_pfn(row.pfn)) is not None
        ]
        hva = row.offset * PAGE
        yield Span("ram", row.count * PAGE, None, row.pfn, hva=hva, what="its own memory", iovas=tuple(iovas))


def _strays(grants: Sequence[Grant], spaces: Sequence[_Space]) -> Iterator[Span]:
    """What devices reach outside of every grant."""
    granted = sorted(
        (grant.gpa // PAGE, (grant.gpa + grant.length) // PAGE) for grant in grants if grant.gpa is not None
    )
    for space in spaces:
        for row in space.table:
            at, end = row.offset, row.offset + row.count
            for first, stop in [*granted, (end, end)]:
                if at < min(first, end):
                    size, iova = (min(first, end) - at) * PAGE, (space.bdf, at * PAGE, access_of(row))
                    pfn, note = row.pfn + at - row.offset, "no grant accounts for it"
                    yield Span("iova", size, None, pfn, what=f"DMA of {space.bdf}", iovas=(iova,), note=note)
                at = max(at, stop)
