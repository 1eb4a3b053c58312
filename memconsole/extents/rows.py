"""What a row of a table of extents is, and what tables say of rows: values alone."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

from memconsole.native import lib


class Flag(enum.IntFlag):
    """What an extent is; no flag at all is an absent page (bits of /proc/PID/pagemap, HUGE from PAGEMAP_SCAN).

    READ and WRITE are what a device may do, in tables of its address space. DERIVED: no page table was seen to have it;
    where the page lies follows from what was mapped (memory without struct pages).
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
    DERIVED = lib.MC_DERIVED


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


class PageChange(NamedTuple):
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


def _kind(change: Any) -> ChangeKind:
    if not change.old_flags:
        return ChangeKind.APPEARED
    if not change.new_flags:
        return ChangeKind.VANISHED
    if (change.old_flags ^ change.new_flags) & (Flag.PRESENT | Flag.SWAP) or change.old_pfn == change.new_pfn:
        return ChangeKind.FLAGS
    return ChangeKind.MOVED


def change_of(c: Any) -> PageChange:
    """A native ``struct mc_change``."""
    return PageChange(_kind(c), c.offset, c.count, c.old_pfn, c.new_pfn, c.old_flags, c.new_flags)
