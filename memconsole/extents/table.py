"""The table itself: an object over the native core's ``struct mc_table``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from memconsole import native
from memconsole.errors import UsageError
from memconsole.extents.opening import open_source, whole
from memconsole.extents.rows import Bins, Extent, Flag, Folded, PageChange, Stats, Tally, change_of
from memconsole.native import ffi, lib
from memconsole.units import PAGE

NO_PAGE = (1 << 64) - 1
"""No page at all, as the native core says it."""


class Part(NamedTuple):
    """Pages ``first``..``first + pages`` of a table, to become those from ``to`` on.

    Of their flags those in ``keep`` stay (None: all), and those in ``add`` are added.
    """

    table: ExtentTable
    first: int
    pages: int
    to: int
    keep: Flag | None = None
    add: Flag | None = None


class ExtentTable:
    """An immutable table of extents; a context manager, closed at the latest with its last reference."""

    def __init__(self, handle: Any) -> None:
        """Takes over a native table; use the class methods."""
        self._table = ffi.gc(handle, lib.mc_table_free)
        self._lock = threading.Lock()
        self.scanned_ns = 0
        """When it was scanned, ns since the epoch; 0: nobody says."""

    # --- how tables come to be

    @classmethod
    def _build(cls, what: str, fill: Callable[[Any], None], page_size: int) -> Self:
        out = ffi.new("struct mc_table **")
        native.call(what, lib.mc_table_new, out, page_size)
        table = cls(out[0])
        try:
            fill(table._table)
        except BaseException:
            table.close()
            raise
        return table

    @classmethod
    def scan(cls, pid: int, start: int, length: int, *, base: int = 0, root: str = "/proc") -> Self:
        """What ``length`` bytes of a process from address ``start`` on are; the page at ``start`` has offset ``base``.

        On kernels without PAGEMAP_SCAN (before 6.7) no row has HUGE.

        Raises:
            Gone: no such process, or it ended meanwhile. Denied: no CAP_SYS_ADMIN. UsageError: not whole pages, or
            beyond the address space. Source: /proc/PID/pagemap.
        """
        what = f"the memory of process {pid} cannot be scanned"
        fd = open_source(f"{root}/{pid}/pagemap", what)
        try:
            return cls.scan_pagemap(fd, start, length, base=base, what=what)
        finally:
            os.close(fd)

    @classmethod
    def scan_pagemap(
        cls, fd: int, start: int, length: int, *, base: int = 0, what: str = "a pagemap cannot be scanned"
    ) -> Self:
        """The same over an open pagemap, which stays the caller's; it names one process for ever, a pid does not."""

        def fill(table: Any) -> None:
            numbers = (whole("start", start, what), whole("length", length, what), whole("base", base, what))
            native.call(what, lib.mc_scan_pagemap, table, fd, *numbers)

        return cls._build(what, fill, os.sysconf("SC_PAGESIZE"))

    @classmethod
    def scan_fd(cls, fd: int, size: int) -> Self:
        """What the first ``size`` bytes of a memfd hold, whoever maps it: offsets are pages of the file.

        Holes are not filled; swapped pages are brought in. Only PRESENT, FILE and HUGE are ever set. Maps 1 GiB at a
        time in this process.

        Raises:
            Denied: no CAP_SYS_ADMIN. UsageError: not whole pages. KernelRefused: not a file that can be mapped.
        """
        what = "the pages of a file cannot be scanned"
        pagemap = open_source("/proc/self/pagemap", what)

        def fill(table: Any) -> None:
            native.call(what, lib.mc_scan_fd, table, pagemap, fd, whole("size", size, what))

        try:
            return cls._build(what, fill, os.sysconf("SC_PAGESIZE"))
        finally:
            os.close(pagemap)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Extent],
        *,
        first: int | None = None,
        pages: int | None = None,
        page_size: int = PAGE,
    ) -> Self:
        """A table of these rows, in any order; it covers ``first``..``first + pages``, by default just the rows.

        A row without PRESENT and SWAP is absent: it counts towards what is covered and leaves no row.

        Raises:
            UsageError: rows overlap, lie outside what is covered, or have impossible numbers.
        """
        what = "these rows are not a table"
        ordered = sorted(rows)
        begin = first if first is not None else ordered[0].offset if ordered else 0
        end = max((row.offset + row.count for row in ordered), default=begin) if pages is None else begin + pages
        kept = [row for row in ordered if row.flags]
        try:
            columns = [
                ffi.new(f"{kind}[]", [row[index] for row in kept])
                for index, kind in enumerate(("uint64_t", "uint64_t", "uint32_t", "uint32_t"))
            ]
        except OverflowError as error:
            raise UsageError(what, str(error)) from None

        def fill(table: Any) -> None:
            native.call(what, lib.mc_table_cover, table, whole("first", begin, what), whole("end", end - begin, what))
            native.call(what, lib.mc_table_append, table, len(kept), *columns)

        return cls._build(what, fill, page_size)

    @classmethod
    def concat(cls, tables: Iterable[ExtentTable]) -> Self:
        """One table of the rows of several that do not overlap, in any order; it covers what they cover together.

        Raises:
            UsageError: they overlap, have different page sizes, or there are none.
        """
        what = "tables cannot be joined"
        handles = [table.handle for table in tables]
        if not handles:
            raise UsageError(what, "the list of tables is empty")

        def fill(table: Any) -> None:
            native.call(what, lib.mc_table_concat, table, ffi.new("struct mc_table *[]", handles), len(handles))

        return cls._build(what, fill, handles[0].page_size)

    @classmethod
    def of_parts(cls, parts: Iterable[Part], *, page_size: int = PAGE) -> Self:
        """One table of ranges of others, each moved to another page, in the order of where they come to be.

        It covers all of every part, whether there is a row or not.

        Raises:
            UsageError: parts overlap or are out of order, or page sizes differ.
        """

        def fill(table: Any) -> None:
            what = "parts of tables cannot be joined"
            for part in parts:
                numbers = [whole("page", number, what) for number in (part.first, part.pages, part.to)]
                keep = (1 << 32) - 1 if part.keep is None else part.keep
                native.call(what, lib.mc_table_part, table, part.table.handle, *numbers, keep, part.add or 0)
                native.call(what, lib.mc_table_cover, table, part.to, part.pages)

        return cls._build("a table cannot be made", fill, page_size)

    def by_frame(self) -> ExtentTable:
        """The same present pages turned round: a row's offset is a frame, its pfn the page that is in it.

        Of several pages in one frame one is kept. It covers from the first to the last frame.

        Raises:
            UsageError: a page is beyond 55 bits.
        """
        what = "a table cannot be turned round"

        def fill(table: Any) -> None:
            native.call(what, lib.mc_table_by_frame, table, self.handle)

        return ExtentTable._build(what, fill, self.page_size)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """The table an fd holds, from a copy: whoever made it may still have it mapped. The fd stays the caller's.

        Raises:
            BadFile: truncated, corrupt, foreign, or of another version.
        """
        out = ffi.new("struct mc_table **")
        native.call("this is not a table of extents", lib.mc_table_open, out, fd)
        return cls(out[0])

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The table :meth:`to_bytes` wrote.

        Raises:
            BadFile: truncated, corrupt, foreign, or of another version.
        """
        out = ffi.new("struct mc_table **")
        with ffi.from_buffer(data) as buffer:
            native.call("this is not a table of extents", lib.mc_table_load, out, buffer, len(buffer))
        return cls(out[0])

    def share(self) -> ExtentTable:
        """The same table once more, in the same memfd, for somebody else in this process to close.

        Raises:
            KernelRefused: for lack of file descriptors.
        """
        out = ffi.new("struct mc_table **")
        native.call("a table cannot be shared", lib.mc_table_share, out, self._sealed())
        same = ExtentTable(out[0])
        same.scanned_ns = self.scanned_ns
        return same

    # --- what a table is

    @property
    def handle(self) -> Any:
        """The native ``struct mc_table *``, for callers of the core."""
        if self._table is None:
            raise ValueError("the table is closed")
        return self._table

    def close(self) -> None:
        """Gives the memory and the fd back; closing twice is fine, any other use afterwards is a ValueError."""
        if self._table is not None:
            ffi.release(self._table)
            self._table = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._table is None:
            return "<ExtentTable closed>"
        return f"<ExtentTable {len(self)} rows over {self.pages} pages>"

    def _sealed(self) -> Any:
        """The native table in its memfd, which is made at the first call; who still uses the old one keeps it."""
        with self._lock:
            if self.handle.fd < 0:
                out = ffi.new("struct mc_table **")
                native.call("a table of extents cannot be sealed", lib.mc_table_seal, out, self.handle)
                self._table = ffi.gc(out[0], lib.mc_table_free)
            return self._table

    @property
    def fd(self) -> int:
        """The sealed memfd; it stays the table's, so dup it to keep it.

        Raises:
            KernelRefused: it cannot be made, for example for lack of file descriptors.
        """
        return int(self._sealed().fd)

    @property
    def page_size(self) -> int:
        """Bytes a page."""
        return int(self.handle.page_size)

    @property
    def pages(self) -> int:
        """How many pages the table covers, present or not."""
        return int(self.handle.pages)

    @property
    def first(self) -> int:
        """The first page covered."""
        return int(self.handle.first)

    @property
    def end(self) -> int:
        """The page behind the last one covered."""
        return int(self.handle.end)

    def to_bytes(self) -> bytes:
        """The table's bytes, as in its memfd."""
        table = self._sealed()
        return bytes(ffi.buffer(table.map, table.mapped))

    # --- rows

    def __len__(self) -> int:
        return int(self.handle.rows)

    def __getitem__(self, index: int) -> Extent:
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        table = self._table
        return Extent(table.offset[row], table.pfn[row], table.count[row], table.flags[row])

    def rows(self, start: int = 0, stop: int | None = None) -> list[Extent]:
        """Rows ``start`` up to but not including ``stop``, cut to what there is."""
        table = self.handle
        start, stop, _ = slice(start, stop).indices(len(self))
        n = stop - start
        if n <= 0:  # an empty table may have no columns at all
            return []
        columns = (ffi.unpack(column + start, n) for column in (table.offset, table.pfn, table.count, table.flags))
        return list(map(Extent._make, zip(*columns, strict=True)))

    def __iter__(self) -> Iterator[Extent]:
        for start in range(0, len(self), 4096):
            yield from self.rows(start, start + 4096)

    # --- questions

    def lookup(self, page: int) -> int | None:
        """The row that holds a page, or None when the page is absent or not covered."""
        table = self.handle
        row = lib.mc_lookup(table, page) if 0 <= page < NO_PAGE else -1
        return int(row) if row >= 0 else None

    def lookup_pfn(self, pfn: int) -> int | None:
        """The lowest page in frame ``pfn``, or None; asked often, the rows are sorted by frame."""
        if not 0 <= pfn < NO_PAGE:
            return None
        page = ffi.new("uint64_t *")
        with self._lock:
            native.call("frames cannot be sorted", lib.mc_lookup_pfn, self.handle, pfn, page)
        return int(page[0]) if page[0] != NO_PAGE else None

    def bin(self, first_page: int, pages: int, cells: int) -> Bins:
        """Pages ``first_page``..``first_page + pages`` counted into ``cells`` cells for a heat map.

        Cell i begins at ``first_page + pages * i // cells``; what is neither present nor swapped in it is absent.

        Raises:
            UsageError: a negative number, or no cells.
        """
        what = "a range cannot be divided into cells"
        first_page, pages = whole("first page", first_page, what), whole("pages", pages, what)
        if not 0 < cells < 1 << 32:
            raise UsageError(what, f"{cells} cells")
        columns = [ffi.new("uint64_t[]", cells) for _ in Bins._fields]
        native.call(what, lib.mc_bin, self.handle, first_page, pages, cells, *columns)
        return Bins(*(ffi.unpack(column, cells) for column in columns))

    def diff(self, other: ExtentTable) -> list[PageChange]:
        """What ``other``, a later table of the same space, sees differently, in order of offset.

        Raises:
            UsageError: page sizes differ.
        """
        changes = ffi.new("struct mc_changes *")
        try:
            native.call("tables cannot be compared", lib.mc_diff, self.handle, other.handle, changes)
            return [change_of(changes.change[row]) for row in range(changes.rows)]
        finally:
            lib.mc_changes_free(changes)

    def diff_count(
        self, other: ExtentTable, ranges: Sequence[tuple[int, int]], most: int
    ) -> tuple[list[Tally], list[PageChange], int]:
        """What ``other`` sees differently, counted for each range of pages (first, end; in order and apart).

        What lies in no range follows as changes, ``most`` of them at most, and how many pages it all is.

        Raises:
            UsageError: page sizes differ, ranges overlap or are out of order.
        """
        outside, tallies = ffi.new("struct mc_changes *"), ffi.new("struct mc_tally[]", len(ranges))
        bounds = ffi.new("uint64_t[]", [bound for each in ranges for bound in each])
        what = "tables cannot be compared"
        try:
            native.call(what, lib.mc_diff_count, self.handle, other.handle, bounds, len(ranges), tallies, outside)
            counted = [Tally(each.vanished, each.moved, each.widened) for each in tallies]
            changes = [change_of(outside.change[row]) for row in range(min(most, outside.rows))]
            return counted, changes, int(outside.pages)
        finally:
            lib.mc_changes_free(outside)

    def stats(self) -> Stats:
        """Pages by kind, and the number of rows."""
        table = self.handle
        stats = ffi.new("struct mc_stats *")
        lib.mc_stats(table, stats)
        absent = table.pages - stats.present - stats.swapped
        return Stats(table.pages, stats.present, stats.swapped, absent, stats.huge, table.rows)

    def digest(self) -> str:
        """xxh3-128 of where every present page is (offset, pfn), as hex; flags and the splitting of runs do not count.

        Two tables of a region have the same digest exactly when every present page has the same frame in both.
        """
        digest = ffi.new("uint8_t[16]")
        lib.mc_placement(self.handle, digest)
        return bytes(ffi.buffer(digest)).hex()

    # --- joined on request

    def page_flags(self, *, root: str = "/proc") -> list[int]:
        """The KPF bits that any frame of a row has, a row each; three times the cost of a scan.

        Raises:
            Denied: not root. Source: /proc/kpageflags.
        """
        return self._folded(f"{root}/kpageflags", 0, len(self))[0]

    def join_page_counts(self, start: int = 0, stop: int | None = None, *, root: str = "/proc") -> list[Folded]:
        """How often the frames of rows ``start``..``stop`` are mapped, folded a row (``least`` and ``most``).

        Raises:
            Denied: not root. Source: /proc/kpagecount.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        columns = self._folded(f"{root}/kpagecount", start, max(stop - start, 0))
        return list(map(Folded._make, zip(*columns, strict=True)))

    def _folded(self, path: str, start: int, rows: int) -> list[list[int]]:
        """A u64 a frame, folded over each of so many rows: a list for each field of :class:`Folded`."""
        table = self.handle
        what = f"{path} cannot be read"
        columns = [ffi.new("uint64_t[]", rows) for _ in Folded._fields]
        fd = open_source(path, what)
        try:
            native.call(what, lib.mc_join, table, fd, start, rows, *columns)
        finally:
            os.close(fd)
        return [ffi.unpack(column, rows) for column in columns]
