"""Where pages are: tables of extents over the native core.

An :class:`ExtentTable` is columns of numbers. When it leaves the process it becomes a sealed memfd of them (layout:
native/sealed.c), which is passed by fd, copied by the receiver, and stored byte for byte. Offsets, pfns and counts are
in pages, never bytes. Absent pages have no row: ``pages`` says how many pages a table covers, and what no row holds is
absent. Rows that continue each other are always merged.
"""

from memconsole.extents.digests import digest_fd, digest_region
from memconsole.extents.rows import Bins, ChangeKind, Extent, Flag, Folded, PageChange, Stats, Tally
from memconsole.extents.table import ExtentTable, Part

__all__ = [
    "Bins",
    "ChangeKind",
    "Extent",
    "ExtentTable",
    "Flag",
    "Folded",
    "PageChange",
    "Part",
    "Stats",
    "Tally",
    "digest_fd",
    "digest_region",
]
