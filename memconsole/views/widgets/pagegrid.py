"""A PFN map cut into rows of cells: where a page stands, what a cell is, where the next kind begins; no terminal.

A map speaks of *blocks*, ranges of pages with nothing between them (a guest's RAM below and above the PCI hole; the
VMAs of a process). A grid lays them out in rows of ``width`` cells of ``cell`` pages; every block begins a row of its
own, so that a row is always one range of addresses, and a hole between blocks takes no room.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from memconsole.extents import Extent, ExtentTable, Flag

HUGE_PAGES = 512
"""Base pages of a huge page, of which no cell shall hold a part only."""


class Block(NamedTuple):
    """A run of pages of the map's space: its first page, how many, and what it is called."""

    page: int
    pages: int
    label: str = ""

    @property
    def end(self) -> int:
        """The first page behind it."""
        return self.page + self.pages


class Axis:
    """Blocks in order of pages; ``pages`` in all. Where blocks overlap, the later one loses what both claim."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks: list[Block] = []
        end = 0
        for block in sorted(blocks):
            page = max(block.page, end)
            if page < block.end:
                self.blocks.append(Block(page, block.end - page, block.label))
                end = block.end
        self._pages = [block.page for block in self.blocks]
        self._slots = [0, *accumulate(block.pages for block in self.blocks)]
        self.pages = self._slots[-1]

    def index(self, page: int) -> int:
        """The block that holds a page, or the last one that begins before it."""
        return max(0, bisect_right(self._pages, page) - 1)

    def clamp(self, page: int) -> int:
        """The page itself where a block holds it, else the nearest page that one holds."""
        index = self.index(page)
        block = self.blocks[index]
        if page < block.end:
            return max(page, block.page)
        if index + 1 < len(self.blocks) and self.blocks[index + 1].page - page < page - block.end + 1:
            return self.blocks[index + 1].page
        return block.end - 1

    def holds(self, page: int) -> bool:
        """Whether a block holds the page."""
        return bool(self.blocks) and self.clamp(page) == page

    def slot(self, page: int) -> int:
        """How many pages of the blocks stand before this one."""
        index = self.index(page)
        return self._slots[index] + page - self.blocks[index].page

    def pieces(self, slot: int, slots: int) -> Iterator[tuple[int, int]]:
        """The page ranges (first, pages) of so many slots."""
        index = max(0, bisect_right(self._slots, slot) - 1)
        while slots > 0 and index < len(self.blocks):
            into = slot - self._slots[index]
            pages = min(slots, self.blocks[index].pages - into)
            yield self.blocks[index].page + into, pages
            slot, slots, index = slot + pages, slots - pages, index + 1


class Grid:
    """An axis in ``rows`` rows of ``width`` cells of ``cell`` pages."""

    def __init__(self, axis: Axis, width: int, cell: int) -> None:
        self.axis = axis
        self.width = width
        self.cell = cell
        self.span = width * cell
        self._starts = [0, *accumulate(-(-block.pages // self.span) for block in axis.blocks)]
        self.rows = self._starts[-1]

    @classmethod
    def fit(cls, axis: Axis, width: int, height: int) -> Grid:
        """The grid with the smallest cells that shows all in ``height`` rows, if any does.

        A cell is a power of two of pages; below a huge page also one and a half of it, so that little stays empty.
        """
        largest = max((block.pages for block in axis.blocks), default=1)
        cell = 1
        while True:
            for size in (cell, cell * 3 // 2) if 1 < cell < HUGE_PAGES else (cell,):
                grid = cls(axis, width, size)
                if grid.rows <= height or grid.span >= largest:
                    return grid
            cell *= 2

    def place(self, page: int) -> tuple[int, int]:
        """The row and the column of the cell that holds a page of a block."""
        index = self.axis.index(page)
        row, rest = divmod(page - self.axis.blocks[index].page, self.span)
        return self._starts[index] + row, rest // self.cell

    def row(self, row: int) -> tuple[int, int]:
        """The first page of a row, and how many pages it has."""
        index = bisect_right(self._starts, row) - 1
        block = self.axis.blocks[index]
        page = block.page + (row - self._starts[index]) * self.span
        return page, min(self.span, block.end - page)

    def cell_at(self, page: int) -> tuple[int, int]:
        """The first page of the cell that holds this one, and how many pages the cell has."""
        first, pages = self.row(self.place(page)[0])
        start = page - (page - first) % self.cell
        return start, min(self.cell, first + pages - start)

    def page(self, row: int, column: int) -> int:
        """The first page of a cell; beyond the end of its row, of the row's last cell."""
        first, pages = self.row(min(max(row, 0), self.rows - 1))
        return first + min(column, (pages - 1) // self.cell) * self.cell

    def ranges(self, row: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """What to count for so many rows, in order: first page, pages, cells; all cells of a range are of one size."""
        end = min(row + rows, self.rows)
        while row < end:
            index = bisect_right(self._starts, row) - 1
            stop = min(end, self._starts[index + 1])
            page = self.row(row)[0]
            last, pages = self.row(stop - 1)
            whole, rest = divmod(last + pages - page, self.cell)
            if whole:
                yield page, whole * self.cell, whole
            if rest:
                yield page + whole * self.cell, rest, 1
            row = stop


# --- what a cell is -------------------------------------------------------------------------------------------------


class PageKind(enum.Enum):
    """What a page is."""

    ABSENT = "absent"
    SMALL = "4K pages"
    HUGE = "huge pages"
    SWAP = "swapped"


def kind_of(extent: Extent | None) -> PageKind:
    """The kind of the pages of a row; None is no row."""
    if extent is None:
        return PageKind.ABSENT
    if extent.flags & Flag.SWAP:
        return PageKind.SWAP
    return PageKind.HUGE if extent.flags & Flag.HUGE else PageKind.SMALL


class CellLook(NamedTuple):
    """How a cell of a category is drawn: its name, its glyph, what the legend calls it, its tone (a style of the map).

    ``brief`` is for a legend of one line, where it stands for this glyph and those before it that have none.
    """

    id: str
    glyph: str
    title: str
    brief: str = ""
    tone: str = "plain"


LOOKS = (
    CellLook("outside", " ", ""),
    CellLook("absent", "·", "absent", "absent", "dim"),
    CellLook("thin", "░", "4K pages, under half of it", "", "calm"),
    CellLook("half", "▒", "4K pages, half of it or more", "", "calm"),
    CellLook("full", "▓", "4K pages, all of it", "4K by fill", "calm"),
    CellLook("part-huge", "▄", "huge pages, a part of it", "", "good"),
    CellLook("huge", "█", "huge pages, all of it", "huge by fill", "good"),
    CellLook("swap", "s", "swapped", "swap", "warn"),
    CellLook("moved", "*", "moved to another frame", "moved", "bad"),
    CellLook("came", "+", "came since the last scan", "came", "news"),
    CellLook("gone", "-", "gone since the last scan", "gone", "bad"),
)
OUTSIDE, ABSENT, THIN, HALF, FULL, PART_HUGE, HUGE, SWAP, MOVED, CAME, GONE = range(len(LOOKS))
_RUN_TONES = ("good", "good", "calm", "calm", "calm", "rise", "rise", "bad", "bad", "bad")
RUNS = tuple(
    CellLook(f"runs{digit}", str(digit), f"{1 << digit} or more runs", "", tone)
    for digit, tone in enumerate(_RUN_TONES)
)
FIRST_RUNS = len(LOOKS)
USES = (
    CellLook("use-ram", "·", "RAM of no region and no VM", "RAM", "dim"),
    CellLook("use-kernel", "k", "the kernel itself", "kernel", "warn"),
    CellLook("use-firmware", "f", "kept by firmware", "firmware", "rise"),
    CellLook("use-scratch", "c", "KHO scratch", "scratch", "news"),
    CellLook("use-preserved", "p", "preserved, of no region", "preserved", "good"),
    CellLook("use-region", "█", "a region", "region", "calm"),
    CellLook("use-guest", "▓", "RAM of a VM of others", "other VM", "good"),
    CellLook("use-persistent", "d", "persistent memory, DAX", "DAX", "second"),
    CellLook("use-window", "w", "a BAR", "BAR", "second"),
    CellLook("use-granted", "W", "a BAR granted to a guest", "granted BAR", "news"),
    CellLook("use-mmio", "m", "other MMIO", "MMIO", "second"),
    CellLook("use-bus", " ", "space of a bus, or nothing", "hole"),
    CellLook("use-region-part", "▄", "a region, a part of it", "", "calm"),
    CellLook("use-guest-part", "░", "RAM of a VM of others, a part of it", "", "good"),
)
FIRST_USE = FIRST_RUNS + len(RUNS)
_LETTER_TONES = ("calm", "good", "warn", "news", "second", "bad")
LETTERS = tuple(
    CellLook(f"letter-{letter}", letter, letter, "", _LETTER_TONES[number % len(_LETTER_TONES)])
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
)
FIRST_LETTER = FIRST_USE + len(USES)
NUMBERS = tuple(
    CellLook(f"number-{number}", str(number), str(number), "", _LETTER_TONES[number % len(_LETTER_TONES)])
    for number in range(10)
)
FIRST_NUMBER = FIRST_LETTER + len(LETTERS)
ANSWERS = (
    CellLook("answer-yes", "█", "yes", "yes", "good"),
    CellLook("answer-no", "░", "no", "no", "calm"),
    CellLook("answer-bad", "!", "no, and it should", "wrong", "bad"),
    CellLook("answer-odd", "?", "yes, and nothing accounts for it", "unaccounted", "warn"),
    CellLook("answer-apart", "x", "reserved", "reserved", "second"),
    CellLook("answer-elsewhere", "*", "elsewhere", "elsewhere", "bad"),
)
YES, NO, BAD, ODD, APART, ELSEWHERE = range(FIRST_NUMBER + len(NUMBERS), FIRST_NUMBER + len(NUMBERS) + len(ANSWERS))
ALL_LOOKS = LOOKS + RUNS + USES + LETTERS + NUMBERS + ANSWERS
TONES = tuple(dict.fromkeys(look.tone for look in ALL_LOOKS))


class Counts(NamedTuple):
    """Pages of one range by kind, and the rows (runs) that touch it."""

    pages: int
    present: int
    swapped: int
    huge: int
    runs: int


def count(table: ExtentTable, first: int, pages: int) -> Counts:
    """The pages of a range by kind."""
    bins = table.bin(first, pages, 1)
    return Counts(pages, bins.present[0], bins.swapped[0], bins.huge[0], bins.runs[0])


def cell_looks(table: ExtentTable, ranges: Iterable[tuple[int, int, int]], *, by_runs: bool = False) -> bytearray:
    """The look of every cell of ranges (first page, pages, cells) as an index into :data:`ALL_LOOKS`.

    A cell shows what most of its present or swapped pages are, and how full it is; ``by_runs``, how many rows touch it.
    """
    found = bytearray()
    for first, pages, cells in ranges:
        bins = table.bin(first, pages, cells)
        if by_runs:
            found += bytes(
                ABSENT if runs == 0 else FIRST_RUNS + min(9, runs.bit_length() - 1) for runs in bins.runs
            )  # fmt: skip
            continue
        size = pages // cells
        half = size / 2
        found += bytes(
            ABSENT
            if not here and not swapped
            else SWAP
            if swapped > here - huge and swapped > huge
            else (HUGE if huge == size else PART_HUGE)
            if huge and huge >= here - huge
            else FULL
            if here == size
            else HALF
            if here >= half
            else THIN
            for here, swapped, huge in zip(bins.present, bins.swapped, bins.huge, strict=True)
        )
    return found


# --- what changed ---------------------------------------------------------------------------------------------------


class Marks:
    """Where one scan differs from the one before: pages that moved to another frame, came, or are gone.

    Kept as an ExtentTable, so that marks are found and counted like pages: a row's ``pfn`` is the frame the page had,
    its flags are PRESENT where the page moved, PRESENT and HUGE where it is gone, SWAP where it came.
    """

    def __init__(self, old: ExtentTable, new: ExtentTable) -> None:
        totals = {MOVED: 0, CAME: 0, GONE: 0}
        rows = []
        for change in old.diff(new):
            was, stays = change.old_flags & Flag.PRESENT, change.new_flags & Flag.PRESENT
            if was and stays and change.old_pfn != change.new_pfn:
                kind, flags = MOVED, Flag.PRESENT
            elif was and not stays:
                kind, flags = GONE, Flag.PRESENT | Flag.HUGE
            elif stays and not was:
                kind, flags = CAME, Flag.SWAP
            else:
                continue
            totals[kind] += change.count
            rows.append(Extent(change.offset, change.old_pfn, change.count, flags))
        self._table = ExtentTable.from_rows(rows)
        self.moved, self.came, self.gone = totals[MOVED], totals[CAME], totals[GONE]

    def draw(self, cells: bytearray, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Mark the cells (as :func:`cell_looks` gave them for the same ranges) that hold a change."""
        at = 0
        for first, pages, number in ranges:
            bins = self._table.bin(first, pages, number)
            for index, (there, came, gone) in enumerate(zip(bins.present, bins.swapped, bins.huge, strict=True), at):
                if there or came:
                    cells[index] = MOVED if there > gone else CAME if came else GONE
            at += number

    def at(self, page: int) -> tuple[str, int] | None:
        """What happened to a page (``moved``, ``came`` or ``gone``) and the frame it had, or None."""
        row = self._table.lookup(page)
        if row is None:
            return None
        extent = self._table[row]
        kind = CAME if extent.flags & Flag.SWAP else GONE if extent.flags & Flag.HUGE else MOVED
        return LOOKS[kind].id, extent.pfn + page - extent.offset


# --- searching ------------------------------------------------------------------------------------------------------


Alike = Callable[[int, int], bool]
"""Whether all of so many pages from a page on are of one kind."""


def _reach(alike: Alike, page: int, pages: int, way: int) -> int:
    """How many of the ``pages`` from ``page`` on (``way`` 1) or back (-1), itself included, are of this kind.

    Gallops: the ranges looked at double, then halve, so that every row is counted about three times.
    """
    known, step = 0, 1
    while known < pages:
        step = min(step, pages - known)
        first = page + known if way > 0 else page - known - step + 1
        if alike(first, step):
            known += step
            step *= 2
        elif step == 1:
            break
        else:
            pages = known + step - 1
            step = max(1, step // 2)
    return known


def next_unlike(alike: Alike, axis: Axis, page: int, way: int) -> int | None:
    """The nearest page after (``way`` 1) or before (-1) this one that is not alike, or None when all are."""
    index = axis.index(page)
    while 0 <= index < len(axis.blocks):
        block = axis.blocks[index]
        room = block.end - page if way > 0 else page - block.page + 1
        reach = _reach(alike, page, room, way)
        if reach < room:
            return page + way * reach
        index += way
        if 0 <= index < len(axis.blocks):
            page = axis.blocks[index].page if way > 0 else axis.blocks[index].end - 1
    return None


def next_kind(table: ExtentTable, axis: Axis, page: int, way: int) -> int | None:
    """The nearest page after (``way`` 1) or before (-1) this one of another kind, or None when all are alike."""
    kind = kind_of(_row_of(table, page))

    def alike(first: int, pages: int) -> bool:
        counts = count(table, first, pages)
        have = {
            PageKind.ABSENT: pages - counts.present - counts.swapped,
            PageKind.SMALL: counts.present - counts.huge,
            PageKind.HUGE: counts.huge,
            PageKind.SWAP: counts.swapped,
        }
        return have[kind] == pages

    return next_unlike(alike, axis, page, way)


def next_run(table: ExtentTable, axis: Axis, page: int, way: int) -> int | None:
    """The first page of the next row or hole (``way`` 1), or the last page of the one before (-1); None at the end."""
    rows: Sequence[int] = range(len(table))
    behind = bisect_right(rows, page, key=lambda row: table[row].offset)
    inside = behind > 0 and page < (last := table[behind - 1]).offset + last.count
    index = axis.index(page)
    block = axis.blocks[index]
    if way > 0:
        stops = [block.end]
        if inside:
            stops.append(last.offset + last.count)
        elif behind < len(table):
            stops.append(table[behind].offset)
        found = min(stop for stop in stops if stop > page)
    else:
        stops = [block.page - 1]
        if inside:
            stops.append(last.offset - 1)
        elif behind:
            stops.append(last.offset + last.count - 1)
        found = max(stop for stop in stops if stop < page)
    if axis.holds(found):
        return found
    index += way
    if not 0 <= index < len(axis.blocks):
        return None
    return axis.blocks[index].page if way > 0 else axis.blocks[index].end - 1


def _row_of(table: ExtentTable, page: int) -> Extent | None:
    row = table.lookup(page)
    return None if row is None else table[row]
