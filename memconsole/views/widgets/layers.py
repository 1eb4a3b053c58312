"""What a map is coloured by: a layer gives every cell a look, says what its looks mean, and finds what is different.

A map is an address space, some layers over it, a cursor and a zoom (``HeatMap``); maps of guests, of the host and of
IOMMU domains differ in their layers and in what is said of the page under the cursor. No terminal here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from memconsole import labels
from memconsole.extents import ExtentTable
from memconsole.views.widgets.pagegrid import (
    ABSENT,
    ALL_LOOKS,
    LOOKS,
    RUNS,
    Axis,
    CellLook,
    cell_looks,
    next_kind,
    next_run,
    next_unlike,
)

Ranges = Iterable[tuple[int, int, int]]
"""First page, pages, cells: all cells of a range are of one size."""


class Layer(Protocol):
    """A way to colour a map."""

    @property
    def title(self) -> str:
        """What it shows, in a word or two."""

    @property
    def legend(self) -> Sequence[CellLook]:
        """Its looks, in order; one that needs no word has no title."""

    def draw(self, ranges: Ranges) -> bytearray:
        """The look of every cell, as an index into ``ALL_LOOKS``."""

    def next_kind(self, axis: Axis, page: int, way: int) -> int | None:
        """The nearest page of another kind after (``way`` 1) or before (-1) a page."""

    def next_run(self, axis: Axis, page: int, way: int) -> int | None:
        """The first page of the next run, or the last page of the one before."""


class PresenceLayer:
    """What pages are: absent, small, huge, swapped; by how much of a cell they fill."""

    title = "page size"
    legend: Sequence[CellLook] = LOOKS[1:]

    def __init__(self, table: ExtentTable) -> None:
        self._table = table

    def draw(self, ranges: Ranges) -> bytearray:
        """What most of a cell's pages are, and how full it is."""
        return cell_looks(self._table, ranges)

    def next_kind(self, axis: Axis, page: int, way: int) -> int | None:
        """The nearest page of another kind."""
        return next_kind(self._table, axis, page, way)

    def next_run(self, axis: Axis, page: int, way: int) -> int | None:
        """The next run of frames."""
        return next_run(self._table, axis, page, way)


class RunsLayer(PresenceLayer):
    """How many runs of frames a cell is in."""

    title = "runs"
    legend: Sequence[CellLook] = (LOOKS[ABSENT], *RUNS)

    def draw(self, ranges: Ranges) -> bytearray:
        """How many rows touch a cell."""
        return cell_looks(self._table, ranges, by_runs=True)


class Meaning(NamedTuple):
    """A look of a layer, and what it means in this one."""

    look: int
    title: str
    loud: bool = False
    """Whether one page of it stands for a whole cell."""
    part: int | None = None
    """The look of a cell of which less than half is so; of a loud one."""
    brief: str = ""
    """What a legend of one line calls it, where that is not the title."""

    def rows(self) -> Iterator[tuple[int, str, str]]:
        """Its rows in a legend: look, title, and the word for a legend of one line."""
        word = self.brief or self.title
        if self.part is not None:
            yield self.part, f"{self.title}, a part of it", ""
            yield self.look, f"{self.title}, half of it or more", word
        else:
            yield self.look, self.title, word


class LabelLayer:
    """The pages of a labelled table by what their label means; a page without a row has the first meaning.

    ``kinds`` maps labels to meanings (by index); a label that it lacks has the first.
    """

    def __init__(
        self, title: str, table: ExtentTable, meanings: Sequence[Meaning], kinds: Mapping[int, int] | Sequence[int]
    ) -> None:
        self.title = title
        self._table = table
        self._meanings = tuple(meanings)[: labels.LOOKS]
        pairs = kinds.items() if isinstance(kinds, Mapping) else enumerate(kinds)
        by_label = dict(pairs)
        self._kinds = bytes(by_label.get(label, 0) for label in range(max(by_label, default=0) + 1))
        self._loud = sum(1 << index for index, each in enumerate(self._meanings) if each.loud)
        self._shown = bytes(each.look for each in self._meanings).ljust(256, b"\0")
        self._parts = {index: each.part for index, each in enumerate(self._meanings) if each.part is not None}
        self.legend = [
            ALL_LOOKS[look]._replace(title=title, brief=brief)
            for each in self._meanings
            if each.title
            for look, title, brief in each.rows()
        ]

    def draw(self, ranges: Ranges) -> bytearray:
        """What most of a cell's pages mean; what is loud already with one."""
        found = bytearray()
        for first, pages, cells in ranges:
            kinds, most = labels.count_looks(self._table, (first, pages, cells), self._kinds, self._loud)
            looks = kinds.translate(self._shown)
            if self._parts and any(kind in self._parts for kind in set(kinds)):
                half = pages // cells / 2
                looks = bytes(
                    self._parts.get(kind, look) if have < half else look
                    for kind, look, have in zip(kinds, looks, most, strict=True)
                )
            found += looks
        return found

    def next_kind(self, axis: Axis, page: int, way: int) -> int | None:
        """The nearest page of another meaning."""
        here = self._counted(page, 1)[0]
        return next_unlike(lambda first, pages: self._counted(first, pages) == (here, pages), axis, page, way)

    def _counted(self, first: int, pages: int) -> tuple[int, int]:
        kinds, most = labels.count_looks(self._table, (first, pages, 1), self._kinds, self._loud)
        return kinds[0], most[0]

    def next_run(self, axis: Axis, page: int, way: int) -> int | None:
        """The next run of frames."""
        return next_run(self._table, axis, page, way)
