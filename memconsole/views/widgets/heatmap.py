"""The map of an address space: a cell a glyph, from the whole down to one page; what colours it is a layer.

A line is ``ADDRESS CELLS MINIMAP``. The glyph says what most pages of the cell are, the colour says it again. A cell
with a bookmark is underlined, and ``'`` stands behind the address of its line. The minimap is the whole map from top
to bottom, the part on the screen inverted. Counting is done by the native core for what is on the screen; a line is
painted again only when something on it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from memconsole.views.bound import bound
from memconsole.views.widgets.layers import Layer
from memconsole.views.widgets.pagegrid import ALL_LOOKS, OUTSIDE, TONES, Axis, Block, Grid, Marks

GUTTER = 15
EDGE = 1
ZOOM_BITS = 3
WIDEST = 256
STEP = 16
GLYPHS = [look.glyph for look in ALL_LOOKS]


class MapLine(NamedTuple):
    """All that is on a line: where its row begins (-1 is no row), its cells and how many there may be, the cursor's
    column or -1, the minimap, and the columns of bookmarks.
    """

    page: int
    cells: bytes
    width: int
    cursor: int
    edge: int
    thumb: bool
    booked: tuple[int, ...] = ()


class Styles(NamedTuple):
    """The theme's colours, looked up once; looks of one colour have one tone, the first such look."""

    plain: Style
    address: Style
    booked: Style
    cursor: Style
    looks: list[Style]
    tones: list[int]


class HeatMap(Widget, can_focus=True):
    """A map with a cursor on one page; the arrow keys go from cell to cell, zooming keeps the page."""

    ALLOW_SELECT = False
    help_title = "The map"
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "heatmap--address",
        "heatmap--booked",
        "heatmap--cursor",
        *(f"heatmap--{tone}" for tone in TONES),
    }
    DEFAULT_CSS = """
    HeatMap { height: 1fr; width: 1fr; }
    HeatMap .heatmap--address { color: $text-muted; }
    HeatMap .heatmap--booked { text-style: underline bold; }
    HeatMap .heatmap--cursor { text-style: reverse bold; }
    HeatMap .heatmap--plain { color: $foreground; }
    HeatMap .heatmap--dim { color: $text-muted; }
    HeatMap .heatmap--calm { color: $primary; }
    HeatMap .heatmap--good { color: $success; }
    HeatMap .heatmap--second { color: $secondary; }
    HeatMap .heatmap--rise { color: $warning; }
    HeatMap .heatmap--warn { color: $warning; text-style: bold; }
    HeatMap .heatmap--bad { color: $error; text-style: bold; }
    HeatMap .heatmap--news { color: $accent; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("pfn.left", "move(-1, 0)", "Left", show=False),
        bound("pfn.right", "move(1, 0)", "Right", show=False),
        bound("pfn.up", "move(0, -1)", "Up", show=False),
        bound("pfn.down", "move(0, 1)", "Down", show=False),
        bound("pfn.page-up", "page(-1)", "Page up", show=False),
        bound("pfn.page-down", "page(1)", "Page down", show=False),
        bound("pfn.first", "edge(-1)", "First page", show=False),
        bound("pfn.last", "edge(1)", "Last page", show=False),
        bound("pfn.zoom-in", "zoom(1)", "Zoom in"),
        bound("pfn.zoom-out", "zoom(-1)", "Zoom out"),
        bound("pfn.whole", "whole", "Page/whole"),
        bound("pfn.next-kind", "kind(1)", "Next kind"),
        bound("pfn.previous-kind", "kind(-1)", "Previous kind", show=False),
        bound("pfn.next-run", "run(1)", "Next run", show=False),
        bound("pfn.previous-run", "run(-1)", "Previous run", show=False),
        bound("pfn.marks", "marks", "Marks", show=False),
    ]

    def __init__(self, moved: Callable[[], None]) -> None:
        """``moved`` is called when the cursor, its cell or the glyphs' meaning differ: at once, so that what is said of
        them is painted in the same frame (a message would come a frame later).
        """
        super().__init__()
        self._moved = moved
        self.cursor = 0
        self.show_marks = True
        self._layer: Layer | None = None
        self._marks: Marks | None = None
        self._axis = Axis(())
        self._grid = Grid(self._axis, 1, 1)
        self._is_whole = True
        self._page_size = 0
        self._top = 0
        self._rows: list[tuple[int, bytes]] = []
        self._overview = b""
        self._overviews: WeakKeyDictionary[Layer, tuple[int, Marks | None, bytes]] = WeakKeyDictionary()
        self._lines: list[MapLine] = []
        self._colours: Styles | None = None
        self._booked: tuple[int, ...] = ()

    # --- what is shown ----------------------------------------------------------------------------------------------

    def show(self, layer: Layer, blocks: Sequence[Block], page_size: int, marks: Marks | None = None) -> None:
        """Show a layer, whose table must stay open until the next call; marks name what changed with it.

        The same blocks as before keep cursor and zoom; other blocks are shown whole.
        """
        axis = Axis(blocks)
        self._layer, self._marks, self._page_size = layer, marks, page_size
        if axis.blocks != self._axis.blocks:
            self._overviews.clear()
            self._begin(axis)
        self._count_overview()
        self._count()
        self._moved()

    def book(self, pages: Iterable[int]) -> None:
        """Mark the cells of these pages as places that are remembered."""
        booked, self._booked = self._booked, tuple(sorted(pages))
        if booked != self._booked:
            self._repaint()

    def clear(self) -> None:
        """Show nothing; the table may be closed afterwards."""
        self._layer = self._marks = None
        self._begin(Axis(()))
        self._overview = b""
        self._count()

    @property
    def cell(self) -> tuple[int, int]:
        """The first page of the cell under the cursor, and how many pages it has."""
        return self._grid.cell_at(self.cursor) if self._axis.blocks else (0, 0)

    @property
    def cell_pages(self) -> int:
        """The pages of a whole cell: the zoom."""
        return self._grid.cell

    def go_to_page(self, page: int) -> None:
        """Put the cursor on a page (the nearest one the map has), and the page on the screen."""
        if not self._axis.blocks:
            return
        self.cursor = self._axis.clamp(page)
        if self._reveal():
            self._count()
        else:
            self._repaint()
        self._moved()

    # --- keys -------------------------------------------------------------------------------------------------------

    def action_move(self, columns: int, rows: int) -> None:
        """Go so many cells to the right and down; from the end of a row to the next one."""
        if not self._axis.blocks:
            return
        row, column = self._grid.place(self.cursor)
        if rows:
            self.go_to_page(self._grid.page(min(max(row + rows, 0), self._grid.rows - 1), column))
        else:
            first, pages = self._grid.cell_at(self.cursor)
            slot = self._axis.slot(first) + (pages if columns > 0 else -1)
            for page, _ in self._axis.pieces(slot, 1) if slot >= 0 else ():
                self.go_to_page(self._grid.cell_at(page)[0])

    def action_page(self, way: int) -> None:
        """Go a screen up or down."""
        self.action_move(0, way * max(1, self.size.height - 1))

    def action_edge(self, way: int) -> None:
        """Go to the first or the last page."""
        if self._axis.blocks:
            self.go_to_page(self._axis.blocks[0].page if way < 0 else self._axis.blocks[-1].end - 1)

    def action_zoom(self, way: int) -> None:
        """Make cells eight times smaller or larger, no larger than shows the whole; the cursor stays on its page."""
        whole = self._whole().cell
        if way > 0:
            self._zoom(max(1, self._grid.cell >> ZOOM_BITS))
        else:
            self._zoom(min(whole, self._grid.cell << ZOOM_BITS))

    def action_whole(self) -> None:
        """Between single pages and the whole map."""
        self._zoom(self._whole().cell if self._grid.cell == 1 else 1)

    def action_kind(self, way: int) -> None:
        """Go to the nearest page of another kind."""
        if self._layer is not None and self._axis.blocks:
            self._go_or_ring(self._layer.next_kind(self._axis, self.cursor, way))

    def action_run(self, way: int) -> None:
        """Go to the next run of frames, or the end of the one before."""
        if self._layer is not None and self._axis.blocks:
            self._go_or_ring(self._layer.next_run(self._axis, self.cursor, way))

    def action_marks(self) -> None:
        """Show or hide what changed with the last scan."""
        self.show_marks = not self.show_marks
        self._count_overview()
        self._count()

    def _go_or_ring(self, page: int | None) -> None:
        if page is None:
            self.app.bell()
        else:
            self.go_to_page(page)

    # --- mouse ------------------------------------------------------------------------------------------------------

    def on_click(self, event: events.Click) -> None:
        """Put the cursor where the mouse points; on the minimap, go there."""
        if not self._axis.blocks:
            return
        column, line = event.x - GUTTER, event.y
        if column == self._grid.width:
            height = max(1, self.size.height)
            for page, _ in self._axis.pieces(self._axis.pages * line // height, 1):
                self.go_to_page(page)
        elif 0 <= column < self._grid.width and self._top + line < self._grid.rows:
            self.go_to_page(self._grid.page(self._top + line, column))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Go three rows down."""
        event.stop()
        self.action_move(0, 3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Go three rows up."""
        event.stop()
        self.action_move(0, -3)

    # --- layout -----------------------------------------------------------------------------------------------------

    @staticmethod
    def cells_for(width: int) -> int:
        """How many cells a row has in so many columns: a multiple of 16, so that rows begin at round addresses."""
        room = min(WIDEST, max(8, width - GUTTER - EDGE))
        return room // STEP * STEP or 8

    @classmethod
    def width_for(cls, width: int) -> int:
        """How many of so many columns the map fills."""
        return GUTTER + cls.cells_for(width) + EDGE

    def on_resize(self) -> None:
        """Lay the map out anew; the cursor stays on its page, and what was whole stays whole."""
        self._lay(self._whole().cell if self._is_whole else self._grid.cell)
        self._count_overview()
        self._count()
        self._moved()

    def _whole(self) -> Grid:
        return Grid.fit(self._axis, self.cells_for(self.size.width), max(1, self.size.height))

    def _begin(self, axis: Axis) -> None:
        """Lay out other blocks, whole, the cursor on their first page."""
        self._axis = axis
        self.cursor = axis.blocks[0].page if axis.blocks else 0
        self._grid, self._top, self._is_whole = self._whole(), 0, True

    def _lay(self, cell: int) -> None:
        """Cut the map into cells of this size, the cursor's page on the line it was on."""
        line = self._cursor_line
        whole = self._whole()
        self._is_whole = cell == whole.cell
        self._grid = whole if self._is_whole else Grid(self._axis, whole.width, cell)
        if self._axis.blocks:
            self._top = self._clamped(self._grid.place(self.cursor)[0] - line)
            self._reveal()

    def _zoom(self, cell: int) -> None:
        self._lay(cell)
        self._count()
        self._moved()

    @property
    def _cursor_line(self) -> int:
        return self._grid.place(self.cursor)[0] - self._top if self._axis.blocks else 0

    def _clamped(self, top: int) -> int:
        return min(max(0, top), max(0, self._grid.rows - self.size.height))

    def _reveal(self) -> bool:
        """Bring the cursor's row onto the screen, half a screen further or in the middle; says whether it was not."""
        height = max(1, self.size.height)
        line = self._cursor_line
        if 0 <= line < height:
            return False
        row, half = self._top + line, height // 2
        if -half <= line < height + half:
            self._top = self._clamped(self._top + (half if line > 0 else -half))
        if not self._top <= row < self._top + height:
            self._top = self._clamped(row - half)
        return True

    # --- counting and painting --------------------------------------------------------------------------------------

    def _draw(self, ranges: list[tuple[int, int, int]]) -> bytearray:
        if self._layer is None:
            return bytearray()
        cells = self._layer.draw(ranges)
        if self._marks is not None and self.show_marks:
            self._marks.draw(cells, ranges)
        return cells

    def _count(self) -> None:
        """Count the cells on the screen."""
        height = self.size.height
        cells = bytes(self._draw(list(self._grid.ranges(self._top, height)) if self._layer else []))
        self._rows, at = [], 0
        for row in range(self._top, min(self._top + height, self._grid.rows) if cells else 0):
            page, pages = self._grid.row(row)
            number = -(-pages // self._grid.cell)
            self._rows.append((page, cells[at : at + number]))
            at += number
        self._repaint()

    def _count_overview(self) -> None:
        """Count the minimap, once for each layer: in as many cells as there are lines, of each the most telling look.

        It goes through the whole map, which takes milliseconds where there are a million extents.
        """
        height, pages = self.size.height, self._axis.pages
        layer, marks = self._layer, self._marks if self.show_marks else None
        if layer is None or not pages:
            self._overview = b""
            return
        known = self._overviews.get(layer)
        if known is None or known[:2] != (height, marks):
            known = self._overviews[layer] = (height, marks, self._overview_of(height, pages))
        self._overview = known[2]

    def _overview_of(self, height: int, pages: int) -> bytes:
        found = bytearray()
        for line in range(height):
            slot = pages * line // height
            slots = max(1, pages * (line + 1) // height - slot)
            found.append(max(self._draw([(first, n, 1) for first, n in self._axis.pieces(slot, slots)]), default=0))
        return bytes(found)

    def _thumb(self) -> range:
        """The lines of the minimap that stand for what is on the screen."""
        height, pages = self.size.height, self._axis.pages
        if not self._rows:
            return range(0)
        first = self._axis.slot(self._rows[0][0])
        page, count = self._grid.row(self._top + len(self._rows) - 1)
        return range(first * height // pages, (self._axis.slot(page) + count - 1) * height // pages + 1)

    def _repaint(self) -> None:
        """Say anew what is on every line, and refresh the lines where that differs from what was."""
        cursor_row, cursor_column = self._grid.place(self.cursor) if self._axis.blocks else (-1, -1)
        thumb = self._thumb()
        places = [self._grid.place(page) for page in self._booked if self._axis.holds(page)]
        lines = [
            MapLine(
                *(self._rows[y] if y < len(self._rows) else (-1, b"")),
                self._grid.width,
                cursor_column if cursor_row == self._top + y else -1,
                self._overview[y] if y < len(self._overview) else OUTSIDE,
                y in thumb,
                tuple(column for row, column in places if row == self._top + y),
            )
            for y in range(self.size.height)
        ]
        before, self._lines = self._lines, lines
        width = self.size.width
        regions = [
            Region(0, y, width, 1) for y, line in enumerate(lines) if y >= len(before) or line != before[y]
        ]  # fmt: skip
        if regions:
            self.refresh(*regions)

    def notify_style_update(self) -> None:
        """Forget the colours of the theme before."""
        super().notify_style_update()
        self._colours = None

    def _styles_now(self) -> Styles:
        if self._colours is None:
            get = self.get_component_rich_style
            looks = [get(f"heatmap--{look.tone}") for look in ALL_LOOKS]
            self._colours = Styles(
                self.rich_style,
                get("heatmap--address"),
                get("heatmap--booked", partial=True),
                get("heatmap--cursor", partial=True),
                looks,
                [looks.index(look) for look in looks],
            )
        return self._colours

    def render_line(self, y: int) -> Strip:
        """One line: address, cells, minimap."""
        styles = self._styles_now()
        width = self.size.width
        if y >= len(self._lines):
            return Strip.blank(width, styles.plain)
        line = self._lines[y]
        address = f"{line.page * self._page_size:#{GUTTER - 1}x}" if line.page >= 0 else " " * (GUTTER - 1)
        segments = [Segment(address + ("'" if line.booked else " "), styles.address)]
        cells, at = line.cells, 0
        for column in sorted(each for each in {*line.booked, line.cursor} if 0 <= each < len(cells)):
            style = styles.looks[cells[column]]
            style = style + styles.booked if column in line.booked else style
            style = style + styles.cursor if column == line.cursor else style
            segments += self._cells(cells[at:column], styles)
            segments.append(Segment(GLYPHS[cells[column]], style))
            at = column + 1
        segments += self._cells(cells[at:], styles)
        segments.append(Segment(" " * (line.width - len(cells)), styles.plain))
        edge = styles.looks[line.edge]
        segments.append(Segment(GLYPHS[line.edge], edge + styles.cursor if line.thumb else edge))
        return Strip(segments, GUTTER + line.width + EDGE).adjust_cell_length(width, styles.plain)

    @staticmethod
    def _cells(cells: bytes, styles: Styles) -> list[Segment]:
        return [
            Segment("".join([GLYPHS[look] for look in run]), styles.looks[tone])
            for tone, run in groupby(cells, styles.tones.__getitem__)
        ]
