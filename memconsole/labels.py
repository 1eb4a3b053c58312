"""Tables of extents whose pages carry a label: whose they are, on which node, who reaches them.

A label is a number below 2^16, told by the table's maker; 0 is no label. Labelled tables are made for a picture and
never leave the process. A range of frames has the frame itself as its page; a map by address has its frames labelled
by a table of frames (:func:`classified`), so that every map of the console is coloured by one mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from memconsole import native
from memconsole.extents import Extent, ExtentTable, Flag, Part
from memconsole.native import ffi, lib
from memconsole.units import PAGE

SHIFT: int = lib.MC_LABEL_SHIFT
MOST = 1 << (32 - SHIFT)
"""Labels there are."""
LOOKS = 64
"""Looks that :func:`count_looks` tells apart."""
SMALL_HOLE = 4096
"""Pages: a hole up to this long is shown as one; a longer one takes no room."""
_LONGEST = 1 << 31


def label_of(extent: Extent | None) -> int:
    """The label of a row; 0 of none."""
    return 0 if extent is None else extent.flags >> SHIFT


def painted(ranges: Iterable[tuple[int, int, int]], *, page_size: int = PAGE) -> ExtentTable:
    """A table of frames out of ranges (first frame, frames, label); what two claim is of the one that begins first.

    Raises:
        UsageError: a range beyond any address space.
    """
    plain, parts, at = [], [], 0
    for begin, frames, label in sorted(ranges):
        first, end = max(begin, at), begin + frames
        plain += [Extent(at, at, min(_LONGEST, end - at), int(Flag.PRESENT)) for at in range(first, end, _LONGEST)]
        if first < end:
            parts.append((first, end - first, label))
            at = end
    with ExtentTable.from_rows(plain, page_size=page_size) as rows:
        return ExtentTable.of_parts(
            (Part(rows, first, frames, first, add=_flags(label)) for first, frames, label in parts),
            page_size=page_size,
        )


def labelled(table: ExtentTable, label: int) -> ExtentTable:
    """The same rows with one label, and of their flags PRESENT and SWAP alone."""
    keep = Flag.PRESENT | Flag.SWAP
    part = Part(table, table.first, table.end - table.first, table.first, keep=keep, add=_flags(label))
    return ExtentTable.of_parts([part], page_size=table.page_size)


def overlaid(under: ExtentTable, over: ExtentTable) -> ExtentTable:
    """The rows of ``over``, and those of ``under`` where it has none."""
    return _made("tables cannot be laid over each other", lib.mc_table_overlay, under, over)


def stacked(tables: Sequence[ExtentTable]) -> ExtentTable:
    """All of several tables, each laid over those before it; they are closed by it.

    They are laid over each other in pairs, so that ten thousand cost little more than the rows they have.
    """
    left = list(tables) or [ExtentTable.from_rows(())]
    while len(left) > 1:
        pairs = [left[at : at + 2] for at in range(0, len(left), 2)]
        left = []
        for pair in pairs:
            if len(pair) == 1:
                left.append(pair[0])
                continue
            left.append(overlaid(*pair))
            for each in pair:
                each.close()
    return left[0]


def classified(table: ExtentTable, frames: ExtentTable) -> ExtentTable:
    """The present rows of a table, every page with the label that its frame has in ``frames``."""
    return _made("frames cannot be told apart", lib.mc_table_label, table, frames)


def flagged(table: ExtentTable, flag: Flag) -> ExtentTable:
    """The present rows of a table, labelled 2 where they have the flag, else 1."""
    return _made("pages cannot be told apart by a flag", lib.mc_table_flagged, table, int(flag))


def blocks(table: ExtentTable, without: Container[int] = ()) -> list[tuple[int, int]]:
    """Where a table has anything: runs of pages (first, pages), small holes (:data:`SMALL_HOLE`) within them.

    Rows whose label is in ``without`` are holes.
    """
    runs: list[tuple[int, int]] = []
    for row in table:
        if label_of(row) in without:
            continue
        end = row.offset + row.count
        if runs and row.offset - runs[-1][1] <= SMALL_HOLE:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((row.offset, end))
    return [(first, end - first) for first, end in runs]


def count_looks(
    table: ExtentTable, span: tuple[int, int, int], looks: bytes, loud: int = 0
) -> tuple[bytes, Sequence[int]]:
    """The look of each cell of a span (first page, pages, cells of one size), and how many of its pages have it.

    ``looks`` has the look of each label (below :data:`LOOKS`; look 0 is nothing); a cell has the look that most of its
    pages have, and one whose bit is in ``loud`` already with a single page.

    Raises:
        UsageError: no cells, or a look that cannot be.
    """
    first, pages, cells = span
    look, most = ffi.new("uint8_t[]", max(cells, 1)), ffi.new("uint64_t[]", max(cells, 1))
    what = "a range cannot be divided into cells"
    with ffi.from_buffer(looks) as buffer:
        native.call(
            what, lib.mc_bin_labels, table.handle, first, pages, cells, ffi.cast("uint8_t *", buffer), len(looks), loud,
            look, most,
        )  # fmt: skip
    return bytes(ffi.buffer(look)), ffi.unpack(most, cells)


def _flags(label: int) -> Flag:
    return Flag(label << SHIFT)


def _made(what: str, function: Callable[..., int], table: ExtentTable, other: ExtentTable | int) -> ExtentTable:
    out = ffi.new("struct mc_table **")
    native.call(what, lib.mc_table_new, out, table.page_size)
    made = ExtentTable(out[0])
    try:
        by = other if isinstance(other, int) else other.handle
        native.call(what, function, made.handle, table.handle, by)
    except BaseException:
        made.close()
        raise
    return made
