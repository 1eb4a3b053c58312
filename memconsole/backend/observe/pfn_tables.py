"""PFN maps of regions and guests, scanned when asked for and kept for as long as nothing seems to have changed.

region:NAME             by offset in the region, whoever maps it
frames:preserved        by frame, what is in KHO's tree of pages to hand over
domain:GROUP            by IOVA, as the IOMMU translates for the devices of a group
guest:NAME, ours        by gpa, as its own page tables see its grants; by hva where no grant has a gpa
guest:NAME, foreign     by hva, over the mappings that look like its RAM
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec.structs import replace

from memconsole.backend import needs
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import host, iommu, kvm, pagemap, patient, procmaps
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.pagemap import Span
from memconsole.backend.kernel.tree import Root
from memconsole.backend.observe.mappings import region_mappings
from memconsole.backend.observe.reach import RegionReaching
from memconsole.backend.observe.survey import ScanResult
from memconsole.errors import Gone, NotFound
from memconsole.model import Guest, GuestKind, Segment
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

FRESH_S = 2.0
"""Seconds a table is believed while its memory's resident size stays the same."""


class _Seen(NamedTuple):
    """A part of a process's memory; ``pfn`` is its first frame, where that is not seen but follows from the file."""

    span: Span
    pfn: int | None = None


@dataclass
class _CachedTable:
    table: ExtentTable
    token: Hashable
    at: float


class Scanning(needs.LiveGuests, needs.Borrowed, needs.Backed, RegionReaching, needs.HostTree, Protocol):
    """What PFN maps are made of."""


class PfnTables:
    """The PFN maps of one control process; every method may be called from any thread.

    Who wants a table waits for its own scan, and for no other.
    """

    def __init__(self, desk: Scanning) -> None:
        self._desk = desk
        self._lock = threading.Lock()  # of what is kept: never held over a scan
        self._making: dict[str, threading.Lock] = {}
        self._kept: dict[str, _CachedTable] = {}
        self._files: dict[str, tuple[Segment, ...]] = {}
        self._strangers: dict[str, Guest] = {}
        self.scanned: dict[str, ScanResult] = {}

    def get(self, key: str) -> ExtentTable:
        """The table of a key, which the caller closes.

        Raises:
            NotFound: no such region or guest, or it has no memory mapped. Denied: PFNs are not shown to this user.
            Gone: the process ended. Silent: its memory map is locked, so that nothing of it is seen.
        """
        kind, _, name = key.partition(":")
        if kind not in _MAKE or not name:
            keys = "a key is region:NAME, guest:NAME, domain:GROUP or frames:preserved"
            raise NotFound(f"there is no PFN map {key!r}", keys, "memconsole regions and memconsole guests list them")
        token = self._token(kind, name)
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                kept = self._kept.get(key)
                if kept is not None and kept.token == token and time.monotonic() - kept.at <= FRESH_S:
                    return kept.table.share()
            scanned = time.time_ns()
            table = _MAKE[kind](self, name)
            table.scanned_ns = scanned
            with self._lock:
                kept = self._kept.pop(key, None)
                if kept is not None:
                    kept.table.close()
                self._kept[key] = _CachedTable(table, token, time.monotonic())
                return table.share()

    def scanned_since(self, known: Mapping[str, int]) -> list[tuple[str, ExtentTable]]:
        """The tables that were scanned after what is known of their key, ns since the epoch; the caller closes them."""
        with self._lock:
            later = {key: each.table for key, each in self._kept.items() if each.table.scanned_ns > known.get(key, 0)}
            return [(key, table.share()) for key, table in later.items()]

    def forget(self) -> None:
        """Drop what is kept of regions and guests that are no more."""
        state = self._desk.state
        with self._lock:
            for key in list(self._kept):
                kind, _, name = key.partition(":")
                if kind in {"region", "guest"} and name not in (state.regions if kind == "region" else state.guests):
                    self._kept.pop(key).table.close()
                    self._making.pop(key, None)
            self._files = {name: files for name, files in self._files.items() if name in state.regions}
            self.scanned = {name: found for name, found in self.scanned.items() if name in state.regions}

    def close(self) -> None:
        """Close every table kept; those handed out stay open."""
        with self._lock:
            for kept in self._kept.values():
                kept.table.close()
            self._kept.clear()

    def _token(self, kind: str, name: str) -> Hashable:
        """What differs when the memory behind a table certainly changed."""
        if kind in {"domain", "frames"}:
            return tuple(self._desk.state.grants.values())
        if kind == "guest":
            guest = self._known_guest(name)
            return guest.process, tuple(self._desk.state.grants_of(guest=name))
        if name not in self._desk.state.regions:
            raise NotFound(f"there is no region {name}", "none has this name", "memconsole regions lists them")
        return self._desk.backings().get(name)

    def _region(self, name: str) -> ExtentTable:
        from memconsole.extents import ExtentTable, Part

        tables: list[ExtentTable] = []
        page = host.page_size(self._desk.root)
        try:
            store = self._desk.store_of(name)
            with self._desk.borrowed_fds(name) as fds:
                for fd, segment in zip(fds, self._desk.state.regions[name].segments, strict=True):
                    tables.append(store.frames(fd, segment.size))
            if len(tables) == 1:
                table = tables.pop()
            else:
                sizes = [each.pages for each in tables]
                places = zip(tables, sizes, itertools.accumulate(sizes, initial=0), strict=False)
                table = ExtentTable.of_parts([Part(each, 0, size, at) for each, size, at in places], page_size=page)
        finally:
            for each in tables:
                each.close()
        stats = table.stats()
        moved = self._moved(name, table) * table.page_size
        with self._lock:
            self.scanned[name] = ScanResult(stats.runs, stats.huge * table.page_size, time.time_ns(), moved)
        return table

    def _moved(self, name: str, table: ExtentTable) -> int:
        """Pages of a region that lay in other frames at any scan, since it is in these files, than at the one before.

        What became part of a huge page was copied there by the kernel, and does not count.
        """
        from memconsole.extents import ChangeKind, Flag

        files = self._desk.state.regions[name].segments
        with self._lock:
            kept, before = self._kept.get(f"region:{name}"), self._files.get(name)
            self._files[name] = files
            if kept is None or before != files:
                return 0
            earlier = self.scanned[name].moved // table.page_size if name in self.scanned else 0
            last = kept.table.share()
        with last:
            return earlier + sum(
                change.count
                for change in last.diff(table)
                if change.kind is ChangeKind.MOVED and not change.new_flags & ~change.old_flags & Flag.HUGE
            )

    def _domain(self, group: str) -> ExtentTable:
        return iommu.table(self._desk.root, group)

    def _frames(self, what: str) -> ExtentTable:
        """The frames in KHO's tree, each as the page of its own number."""
        from memconsole.backend.kernel import handover
        from memconsole.extents import Extent, ExtentTable, Flag

        tree = handover.live("out").preserved if what == "preserved" else None
        if tree is None:
            raise NotFound(
                f"there is no table of frames {what!r}",
                "KHO's tree of preserved pages cannot be read" if what == "preserved" else "none has this name",
                "memconsole inspect shows what this kernel hands over",
            )
        return ExtentTable.from_rows(Extent(run.pfn, run.pfn, run.count, int(Flag.PRESENT)) for run in tree.runs)

    def _known_guest(self, name: str) -> Guest:
        guest = self._desk.state.guests.get(name) or self._stranger(name)
        if guest is None or guest.pid is None:
            raise NotFound(f"there is no guest {name}", "none has this name", "memconsole guests lists them")
        return guest

    def _stranger(self, name: str) -> Guest | None:
        """A VM of others, as it was called when all processes were last looked at: again only if that one has ended."""
        known = self._strangers.get(name)
        if known is None or _alive(self._look(known), known) is None:
            self._strangers = {each.name: each for each in self._desk.foreign_guests()}
        return self._strangers.get(name)

    def _look(self, guest: Guest) -> Census:
        """A guest's process as it is now, and no other: a host may have thousands."""
        return census_of.take(self._desk.root, closed=self._desk.exempt_processes, among=(guest.pid or 0,))

    def _guest(self, name: str) -> ExtentTable:
        guest = self._known_guest(name)
        from memconsole.extents import ExtentTable

        task, parts = self._parts(guest)
        if not parts:
            why, remedy = "it has no grant that it mapped", f"memconsole map REGION {name}"
            if guest.kind is GuestKind.FOREIGN:
                why, remedy = "its process maps nothing that is a VM's RAM", "look again once the VM has begun"
            raise NotFound(f"guest {name} has no memory mapped", why, remedy)
        if all(part.pfn is None for part in parts):
            return pagemap.scan(guest.pid or 0, [part.span for part in parts], task)
        with contextlib.ExitStack() as stack:
            tables = [
                stack.enter_context(
                    pagemap.scan(guest.pid or 0, [part.span], task)
                    if part.pfn is None
                    else _derived(part.span, part.pfn)
                )
                for part in parts
            ]
            return ExtentTable.concat(tables)

    def _parts(self, guest: Guest) -> tuple[int, list[_Seen]]:
        """A thread of the guest's process that lives, and the parts of its memory."""
        census = self._look(guest)
        process = _alive(census, guest)
        if process is None:
            raise Gone(
                f"guest {guest.name} is gone",
                f"{guest.its_process} ended",
                f"memconsole guest stop {guest.name} ends its grants",
            )
        if process.pid in census.hidden:
            process = _with_maps(self._desk.root, process)
            census.processes[process.pid] = process
        page = host.page_size(self._desk.root)
        if guest.kind is GuestKind.FOREIGN and not guest.adopted:
            ram = kvm.guest_ram(process)
            return process.task, [_Seen(Span(vma.start, vma.size, vma.start // page)) for vma in ram]
        state = self._desk.state
        grants = state.grants_of(guest=guest.name)
        by_gpa = any(grant.gpa is not None for grant in grants)
        parts: list[_Seen] = []
        for over in region_mappings(census, state.regions.values(), self._desk.fuse_aliases):
            if over.pid != process.pid:
                continue
            derived = self._desk.store_of(over.region).DERIVED
            for grant in filter(over.overlaps, grants):
                start = max(over.offset, grant.offset)
                end = min(over.offset + over.vma.size, grant.offset + grant.length)
                at = over.vma.start + start - over.offset
                pfn = (over.vma.offset + start - over.offset) // page if derived else None
                if by_gpa and grant.gpa is not None:
                    parts.append(_Seen(Span(at, end - start, (grant.gpa + start - grant.offset) // page), pfn))
                elif not by_gpa:
                    parts.append(_Seen(Span(at, end - start, at // page), pfn))
        return process.task, _apart(parts, page)


def _alive(census: Census, guest: Guest) -> Process | None:
    """The process of a guest; none where it ended, and another has its number."""
    process = census.processes.get(guest.pid or 0)
    return process if process is not None and process.id == guest.process else None


def _with_maps(root: Root, process: Process) -> Process:
    """A process that a census did not see whole, with its mappings: what was not seen is not absent.

    Raises:
        Gone, Denied, KernelRefused: they are not shown. Silent: the lock of its memory map is held.
    """
    return replace(process, maps=patient.call(process.pid, lambda pid: procmaps.raw(root, pid, process.task)))


def _apart(parts: Sequence[_Seen], page: int) -> list[_Seen]:
    """The parts without those that show a page of the table a second time (a process may map a range twice)."""
    found: list[_Seen] = []
    for part in sorted(parts, key=lambda part: part.span.base):
        if not found or part.span.base >= found[-1].span.base + found[-1].span.length // page:
            found.append(part)
    return found


def _derived(span: Span, pfn: int) -> ExtentTable:
    """What no page table shows to anybody: frames one after the other."""
    from memconsole.extents import Extent, ExtentTable, Flag

    flags = int(Flag.PRESENT | Flag.FILE | Flag.DERIVED)
    return ExtentTable.from_rows([Extent(span.base, pfn, span.length // PAGE, flags)])


_MAKE = {
    "region": PfnTables._region,  # noqa: SLF001 - its own
    "guest": PfnTables._guest,  # noqa: SLF001
    "domain": PfnTables._domain,  # noqa: SLF001
    "frames": PfnTables._frames,  # noqa: SLF001
}
