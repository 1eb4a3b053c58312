"""Whose frames are: the memory of regions, the windows of devices, anything else.

All that is known is one table by frame, so that a run of frames is cut at every owner's end by a merge, not page by
page and region by region.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from memconsole.extents import Extent, ExtentTable, Part

WINDOW = ""
"""The owner of a device's window."""


class Owners:
    """The owners of frames at one moment; a context manager.

    ``tables`` are those of owners by name, whose rows are where they have which frames.
    """

    def __init__(self, tables: Iterable[tuple[str, ExtentTable]]) -> None:
        self._names: list[str] = []
        self._bases: list[int] = []
        parts: list[Part] = []
        at = 0
        for name, table in tables:
            span = table.end - table.first
            self._names.append(name)
            self._bases.append(at)
            parts.append(Part(table, table.first, span, at))
            at += span + 1  # no row of one owner goes on in the next one's
        with ExtentTable.of_parts(parts) as known:
            self._frames = known.by_frame()

    def pieces(self, runs: Sequence[Extent]) -> Iterator[tuple[str | None, Extent]]:
        """The pieces of runs, in order, each with its owner's name; None: of nobody known."""
        parts: list[Part] = []
        at = 0
        for run in runs:
            parts.append(Part(self._frames, run.pfn, run.count, at))
            at += run.count + 1
        with ExtentTable.of_parts(parts) as known:
            rows = iter(known)
            row = next(rows, None)
            for run, part in zip(runs, parts, strict=True):
                done = 0
                while row is not None and row.offset < part.to + run.count:
                    begin = row.offset - part.to
                    if begin > done:
                        yield None, _piece(run, done, begin)
                    done = begin + row.count
                    yield self._owner(row.pfn), _piece(run, begin, done)
                    row = next(rows, None)
                if done < run.count:
                    yield None, _piece(run, done, run.count)

    def close(self) -> None:
        """Give the memory back."""
        self._frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _owner(self, page: int) -> str:
        return self._names[bisect.bisect_right(self._bases, page) - 1]


def _piece(run: Extent, begin: int, end: int) -> Extent:
    return Extent(run.offset + begin, run.pfn + begin, end - begin, run.flags)
