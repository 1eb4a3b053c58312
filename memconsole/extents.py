"""Where pages are: tables of extents over the native core.

An :class:`ExtentTable` is columns of numbers. When it leaves the process it becomes a sealed memfd of them (layout:
native/sealed.c), which is passed by fd, mapped in place and stored byte for byte. Offsets, pfns and counts are in
pages, never bytes. Absent pages have no row: ``pages`` says how many pages a table covers, and what no row holds is
absent. Rows that continue each other are always merged.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from memconsole import native
from memconsole.errors import Denied, Gone, KernelRefused, UsageError
from memconsole.native import ffi, lib
from memconsole.units import PAGE

NO_PAGE = (1 << 64) - 1
HEADER, ROW = 64, 24
"""Bytes of a sealed table's header, and of a row."""


class Flag(enum.IntFlag):
    """What an extent is; no flag at all is an absent page (bits of /proc/PID/pagemap, HUGE from PAGEMAP_SCAN).

    READ and WRITE are what a device may do, in tables of its address space.
    """

    PRESENT = lib.MC_PRESENT
    SWAP = lib.MC_SWAP
    FILE = lib.MC_FILE
    EXCLUSIVE = lib.MC_EXCLUSIVE
    SOFT_DIRTY = lib.MC_SOFT_DIRTY
    UFFD_WP = lib.MC_UFFD_WP
    HUGE = lib.MC_HUGE
    READ = lib.MC_READ
    WRITE = lib.MC_WRITE


class Extent(NamedTuple):
    """A run of pages in consecutive frames; for a swapped one ``pfn`` is swap type + slot * 32."""

    offset: int
    pfn: int
    count: int  # type: ignore[assignment]  # the field's own word; nobody counts equal members of a row
    flags: int


class Bins(NamedTuple):
    """Pages of each cell by kind, and the number of rows that touch it (a row over two cells counts in both)."""

    present: Sequence[int]
    swapped: Sequence[int]
    huge: Sequence[int]
    runs: Sequence[int]


class Stats(NamedTuple):
    """Pages by kind (``pages`` = present + swapped + absent; huge ones are present too), and rows."""

    pages: int
    present: int
    swapped: int
    absent: int
    huge: int
    runs: int


class ChangeKind(enum.StrEnum):
    """``moved``: another frame or swap slot; ``flags``: same place, other flags, or swapped out or in."""

    MOVED = "moved"
    APPEARED = "appeared"
    VANISHED = "vanished"
    FLAGS = "flags"


class Change(NamedTuple):
    """A run of pages that two tables see differently; pfn and flags are 0 on the side that has no row."""

    kind: ChangeKind
    offset: int
    count: int  # type: ignore[assignment]
    old_pfn: int
    new_pfn: int
    old_flags: int
    new_flags: int


class Tally(NamedTuple):
    """Pages of a range that a later table lacks; has in another frame, or alone; may write to, and they could not."""

    vanished: int
    moved: int
    widened: int


class Folded(NamedTuple):
    """A value of every frame of an extent, folded: bits set in any, in every frame; the least, the largest value."""

    any: int
    every: int
    least: int
    most: int


def _open(path: str, what: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(what, f"{path} does not exist", "list the processes again") from None
    except PermissionError:
        raise Denied(what, f"{path} may not be read by this user", "run as root") from None
    except OSError as error:
        raise KernelRefused(path, error.errno or 0, what=what) from None


def _whole(name: str, value: int, what: str) -> int:
    if not 0 <= value < 1 << 63:
        raise UsageError(what, f"{name} {value} is negative or beyond any address space")
    return value


def _kind(change: Any) -> ChangeKind:
    if not change.old_flags:
        return ChangeKind.APPEARED
    if not change.new_flags:
        return ChangeKind.VANISHED
    if (change.old_flags ^ change.new_flags) & (Flag.PRESENT | Flag.SWAP) or change.old_pfn == change.new_pfn:
        return ChangeKind.FLAGS
    return ChangeKind.MOVED


def _change(c: Any) -> Change:
    return Change(_kind(c), c.offset, c.count, c.old_pfn, c.new_pfn, c.old_flags, c.new_flags)


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
        fd = _open(f"{root}/{pid}/pagemap", what)
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
            numbers = (_whole("start", start, what), _whole("length", length, what), _whole("base", base, what))
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
        pagemap = _open("/proc/self/pagemap", what)

        def fill(table: Any) -> None:
            native.call(what, lib.mc_scan_fd, table, pagemap, fd, _whole("size", size, what))

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
            native.call(what, lib.mc_table_cover, table, _whole("first", begin, what), _whole("end", end - begin, what))
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
            raise UsageError(what, "there are none")

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
                numbers = [_whole("page", number, what) for number in (part.first, part.pages, part.to)]
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
        """The table an fd holds: mapped in place when sealed, as tables are, else copied; the fd stays the caller's.

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
    def nbytes(self) -> int:
        """Size of the memfd in bytes: 64 + 24 a row."""
        return HEADER + ROW * len(self)

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
        """The lowest page in frame ``pfn``, or None; the first call sorts the rows by frame."""
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
        first_page, pages = _whole("first page", first_page, what), _whole("pages", pages, what)
        if not 0 < cells < 1 << 32:
            raise UsageError(what, f"{cells} cells")
        columns = [ffi.new("uint64_t[]", cells) for _ in Bins._fields]
        native.call(what, lib.mc_bin, self.handle, first_page, pages, cells, *columns)
        return Bins(*(ffi.unpack(column, cells) for column in columns))

    def diff(self, other: ExtentTable) -> list[Change]:
        """What ``other``, a later table of the same space, sees differently, in order of offset.

        Raises:
            UsageError: page sizes differ.
        """
        changes = ffi.new("struct mc_changes *")
        try:
            native.call("tables cannot be compared", lib.mc_diff, self.handle, other.handle, changes)
            return [_change(changes.change[row]) for row in range(changes.rows)]
        finally:
            lib.mc_changes_free(changes)

    def diff_count(
        self, other: ExtentTable, ranges: Sequence[tuple[int, int]], most: int
    ) -> tuple[list[Tally], list[Change], int]:
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
            changes = [_change(outside.change[row]) for row in range(min(most, outside.rows))]
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

    def join_page_flags(self, start: int = 0, stop: int | None = None, *, root: str = "/proc") -> list[Folded]:
        """The KPF bits of the frames of rows ``start``..``stop``, folded a row; three times the cost of a scan.

        Raises:
            Denied: not root. Source: /proc/kpageflags.
        """
        return self._join(f"{root}/kpageflags", start, stop)

    def join_page_counts(self, start: int = 0, stop: int | None = None, *, root: str = "/proc") -> list[Folded]:
        """How often the frames of rows ``start``..``stop`` are mapped, folded a row (``least`` and ``most``).

        Raises:
            Denied: not root. Source: /proc/kpagecount.
        """
        return self._join(f"{root}/kpagecount", start, stop)

    def _join(self, path: str, start: int, stop: int | None) -> list[Folded]:
        table = self.handle
        what = f"{path} cannot be read"
        start, stop, _ = slice(start, stop).indices(len(self))
        n = max(stop - start, 0)
        columns = [ffi.new("uint64_t[]", n) for _ in Folded._fields]
        fd = _open(path, what)
        try:
            native.call(what, lib.mc_join, table, fd, start, n, *columns)
        finally:
            os.close(fd)
        return list(map(Folded._make, zip(*(ffi.unpack(column, n) for column in columns), strict=True)))


def digest_region(fd: int, offset: int, length: int, threads: int = 0) -> str:
    """xxh3-128 over the xxh3-128 of each 2 MiB of ``length`` bytes from ``offset`` on, as hex.

    ``threads`` 0 is one a CPU this process may use. A hole counts as the zeros it reads as and is not filled.

    Raises:
        UsageError: beyond the end of the file. KernelRefused: it cannot be read.
    """
    what = "a digest cannot be made"
    digest = ffi.new("uint8_t[16]")
    offset, length = _whole("offset", offset, what), _whole("length", length, what)
    threads = threads or min(len(os.sched_getaffinity(0)), 256)
    if not 0 < threads <= 256:
        raise UsageError(what, f"{threads} threads")
    native.call(what, lib.mc_digest, fd, offset, length, threads, digest)
    return bytes(ffi.buffer(digest)).hex()


def digest_fd(fd: int, threads: int = 0) -> str:
    """:func:`digest_region` of a whole file."""
    return digest_region(fd, 0, os.fstat(fd).st_size, threads)
