"""What is painted of a frame: of each line the widgets in front, and of what these show the cells that differ.

Textual's compositor renders all of every widget within the rectangle around what changed, those behind others as well,
and writes a widget's whole part of a line when one cell of it is another. Here the lines that changed are rendered,
of the widgets that are seen there, and what the terminal has already is not written again.

A *piece* is what one widget has of a line: (first column, column behind the last one).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from memconsole.views.private import Composed, Update, WholeUpdate

_SINGLE = re.compile(
    r"[ -~\u00a1-\u00ac\u00ae-\u02ff\u0391-\u03c9\u2010-\u2027\u2030-\u205e\u2190-\u21ff\u2500-\u25fc\u2800-\u28ff]*"
)
"""Texts of which every character is a cell, whatever stands before it."""


class Seen(NamedTuple):
    """A widget's piece of a line, and where the widget is."""

    begin: int
    end: int
    widget: Widget
    region: Region


class Piece(NamedTuple):
    """What is to be painted at a place of a line."""

    line: int
    column: int
    strip: Strip


class Picture:
    """What the terminal shows, as far as that is known: by line, the pieces that were written last."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[tuple[int, int], Strip]] = {}

    def forget(self) -> None:
        """Something else was written: nothing is known."""
        self._lines.clear()

    def note(self, piece: Piece) -> Strip | None:
        """Take it that a piece is written; returns what was there, if that is one piece of the same columns."""
        line = self._lines.setdefault(piece.line, {})
        key = (piece.column, piece.column + piece.strip.cell_length)
        before = line.get(key)
        if before is None:
            for other in [each for each in line if each[0] < key[1] and key[0] < each[1]]:
                del line[other]
        line[key] = piece.strip
        return before

    def change(self, piece: Piece, console: Console) -> str:
        """What has to be written for a piece to be there."""
        before = self.note(piece)
        column, strip = (piece.column, piece.strip) if before is None else difference(before, piece)
        return f"\x1b[{piece.line + 1};{column + 1}H{strip.render(console)}" if strip.cell_length else ""


def difference(before: Strip, piece: Piece) -> tuple[int, Strip]:
    """The part of a piece that differs from what was there, and its column; an empty Strip where none does."""
    if before is piece.strip:
        return piece.column, Strip([], 0)
    old, new = list(before), list(piece.strip)
    if old == new:
        return piece.column, Strip([], 0)
    if not all(_SINGLE.fullmatch(text) for text, _, _ in [*old, *new]):
        return piece.column, piece.strip
    head = _alike(old, new)
    tail = _alike(old[head:][::-1], new[head:][::-1])
    column = piece.column + sum(len(text) for text, _, _ in new[:head])
    old, new = old[head : len(old) - tail], new[head : len(new) - tail]
    if old and new and old[0].style == new[0].style:
        same = _alike(old[0].text, new[0].text)
        column += same
        old[0], new[0] = _cut(old[0], same), _cut(new[0], same)
    if old and new and old[-1].style == new[-1].style:
        same = _alike(old[-1].text[::-1], new[-1].text[::-1])
        new[-1] = Segment(new[-1].text[: len(new[-1].text) - same], new[-1].style)
    return column, Strip(new, sum(len(text) for text, _, _ in new))


def _alike(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of their first items are the same."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _cut(segment: Segment, cells: int) -> Segment:
    return Segment(segment.text[cells:], segment.style)


class Changed(Update):
    """The pieces of a frame."""

    def __init__(self, pieces: Sequence[Piece], picture: Picture) -> None:
        self.pieces = pieces
        self._picture = picture

    def render_segments(self, console: Console) -> str:
        """What the terminal is sent."""
        return "".join([self._picture.change(piece, console) for piece in self.pieces])


class Whole(WholeUpdate):
    """All of a frame, whatever the terminal shows."""

    def __init__(self, lines: Sequence[Mapping[int, Strip]], region: Region, picture: Picture) -> None:
        super().__init__([line.values() for line in lines], region)
        self._lines = lines
        self._picture = picture

    def render_segments(self, console: Console) -> str:
        """What the terminal is sent."""
        self._picture.forget()
        for number, line in enumerate(self._lines):
            for column, strip in line.items():
                self._picture.note(Piece(number, column, strip))
        return super().render_segments(console)


class Sparing(Composed):
    """A compositor of which all that write to one terminal share a Picture."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self._picture = picture
        self._seen_of: object = None
        self._seen: list[list[Seen]] = []

    def compose_whole(self) -> WholeUpdate:
        """All of the screen."""
        return Whole(self.compose(range(self.size.height)), self.size.region, self._picture)

    def compose_changed(self, spans: Collection[tuple[int, int, int]]) -> Update:
        """What is in these spans: line, first column, column behind the last one."""
        lines = {line: list(group) for line, group in groupby(spans, key=lambda span: span[0])}
        wanted = {
            line: [
                piece
                for piece in self.seen()[line]
                if any(begin < piece.end and piece.begin < end for _, begin, end in within)
            ]
            for line, within in lines.items()
        }
        return Changed([*self._rendered(wanted)], self._picture)

    def compose(self, lines: Collection[int]) -> list[dict[int, Strip]]:
        """The strips of these lines, by column; nothing of others."""
        found: list[dict[int, Strip]] = [{} for _ in range(self.size.height)]
        for line, column, strip in self._rendered({line: self.seen()[line] for line in lines}):
            found[line][column] = strip
        return found

    def seen(self) -> list[list[Seen]]:
        """Which widget is in front where: of every line its pieces, from left to right."""
        if self._seen_of is not self.visible_widgets:
            self._seen_of, self._seen = self.visible_widgets, self._look()
        return self._seen

    def _look(self) -> list[list[Seen]]:
        width, height = self.size
        lines: list[list[Seen]] = [[] for _ in range(height)]
        holes = [[(0, width)] for _ in range(height)]
        for widget, (region, clip) in self.visible_widgets.items():  # those in front come first
            left, right = region.intersection(clip).column_span
            for line in region.intersection(clip).intersection(self.size.region).line_range:
                free = []
                for begin, end in holes[line]:
                    first, last = max(begin, left), min(end, right)
                    if first < last:
                        lines[line].append(Seen(first, last, widget, region))
                        free += [hole for hole in ((begin, first), (last, end)) if hole[0] < hole[1]]
                    else:
                        free.append((begin, end))
                holes[line] = free
        return [sorted(pieces, key=lambda piece: piece.begin) for pieces in lines]

    @staticmethod
    def _rendered(wanted: Mapping[int, Sequence[Seen]]) -> Iterator[Piece]:
        """The pieces with what they show, in their order."""
        needed: dict[Widget, tuple[Region, list[int]]] = {}
        for line, pieces in wanted.items():
            for piece in pieces:
                rows = needed.setdefault(piece.widget, (piece.region, []))[1]
                if not rows or rows[-1] != line:
                    rows.append(line)
        rendered: dict[tuple[Widget, int], Strip] = {}
        for widget, (region, rows) in needed.items():
            for first, number in _runs(rows):
                strips = widget.render_lines(Region(0, first - region.y, region.width, number))
                rendered.update(((widget, first + index), strip) for index, strip in enumerate(strips))
        for line, pieces in wanted.items():
            for begin, end, widget, region in pieces:
                strip = rendered[widget, line]
                if end - begin != strip.cell_length:
                    strip = strip.crop(begin - region.x, end - region.x)
                yield Piece(line, begin, strip)


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Rows that follow each other: the first one, and how many."""
    for _, group in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        run = [row for _, row in group]
        yield run[0], len(run)
