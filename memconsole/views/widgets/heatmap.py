"""The heat map of a PFN map: a cell a glyph, from the whole guest down to one page.

A line is ``ADDRESS CELLS MINIMAP``. The glyph says what most pages of the cell are, the colour says it again. The
minimap is the whole map from top to bottom, the part on the screen inverted. Counting is done by the native core for
what is on the screen; a line is painted again only when something on it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from memconsole.extents import ExtentTable
from memconsole.views.widgets.pagegrid import ALL_LOOKS, OUTSIDE, Axis, Block, Grid, Marks, looks, next_kind, next_run

GUTTER = 15
EDGE = 1
ZOOM_BITS = 3
WIDEST = 256
GLYPHS = [look.glyph for look in ALL_LOOKS]
Search = Callable[[ExtentTable, Axis, int, int], int | None]


class Line(NamedTuple):
    """All that is on a line: where its row begins (-1 is no row), its cells, the cursor's column or -1, the minimap."""

    page: int
    cells: bytes
    cursor: int
    edge: int
    thumb: bool


class Styles(NamedTuple):
    """The theme's colours, looked up once; looks of one colour have one tone, the first such look."""

    plain: Style
    address: Style
    cursor: Style
    looks: list[Style]
    tones: list[int]


class HeatMap(Widget, can_focus=True):
    """A PFN map with a cursor on one page; the arrow keys go from cell to cell, zooming keeps the page."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "heatmap--address",
        "heatmap--cursor",
        *(f"heatmap--{look.id}" for look in ALL_LOOKS),
    }
    DEFAULT_CSS = """
    HeatMap { height: 1fr; width: 1fr; }
    HeatMap .heatmap--address { color: $text-muted; }
    HeatMap .heatmap--cursor { text-style: reverse bold; }
    HeatMap .heatmap--outside { color: $foreground; }
    HeatMap .heatmap--absent { color: $foreground 40%; }
    HeatMap .heatmap--thin { color: $primary; }
    HeatMap .heatmap--half { color: $primary; }
    HeatMap .heatmap--full { color: $primary; }
    HeatMap .heatmap--part-huge { color: $success; }
    HeatMap .heatmap--huge { color: $success; }
    HeatMap .heatmap--swap { color: $warning; text-style: bold; }
    HeatMap .heatmap--moved { color: $error; text-style: bold; }
    HeatMap .heatmap--came { color: $accent; text-style: bold; }
    HeatMap .heatmap--gone { color: $error; text-style: bold; }
    HeatMap .heatmap--runs0, HeatMap .heatmap--runs1 { color: $success; }
    HeatMap .heatmap--runs2, HeatMap .heatmap--runs3, HeatMap .heatmap--runs4 { color: $primary; }
    HeatMap .heatmap--runs5, HeatMap .heatmap--runs6 { color: $warning; }
    HeatMap .heatmap--runs7, HeatMap .heatmap--runs8, HeatMap .heatmap--runs9 { color: $error; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1, 0)", "Left", show=False, id="pfn.left"),
        Binding("right", "move(1, 0)", "Right", show=False, id="pfn.right"),
        Binding("up", "move(0, -1)", "Up", show=False, id="pfn.up"),
        Binding("down", "move(0, 1)", "Down", show=False, id="pfn.down"),
        Binding("pageup", "page(-1)", "Page up", show=False, id="pfn.page-up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="pfn.page-down"),
        Binding("home", "edge(-1)", "First page", show=False, id="pfn.first"),
        Binding("end", "edge(1)", "Last page", show=False, id="pfn.last"),
        Binding("plus,equals_sign,enter", "zoom(1)", "Zoom in", key_display="+", id="pfn.zoom-in"),
        Binding("minus", "zoom(-1)", "Zoom out", key_display="-", id="pfn.zoom-out"),
        Binding("z", "whole", "Page/whole", id="pfn.whole"),
        Binding("n", "kind(1)", "Next kind", id="pfn.next-kind"),
        Binding("N", "kind(-1)", "Previous kind", show=False, id="pfn.previous-kind"),
        Binding("full_stop", "run(1)", "Next run", show=False, key_display=".", id="pfn.next-run"),
        Binding("comma", "run(-1)", "Previous run", show=False, key_display=",", id="pfn.previous-run"),
        Binding("f", "runs", "Fragments", id="pfn.fragments"),
        Binding("v", "marks", "Marks", show=False, id="pfn.marks"),
    ]

    def __init__(self, moved: Callable[[], None]) -> None:
        """``moved`` is called when the cursor, its cell or the glyphs' meaning differ: at once, so that what is said of
        them is painted in the same frame (a message would come a frame later).
        """
        super().__init__()
        self._moved = moved
        self.cursor = 0
        self.by_runs = False
        self.show_marks = True
        self._table: ExtentTable | None = None
        self._marks: Marks | None = None
        self._axis = Axis(())
        self._grid = Grid(self._axis, 1, 1)
        self._is_whole = True
        self._page_size = 0
        self._top = 0
        self._rows: list[tuple[int, bytes]] = []
        self._overview = b""
        self._lines: list[Line] = []
        self._colours: Styles | None = None

    # --- what is shown ----------------------------------------------------------------------------------------------

    def show(self, table: ExtentTable, blocks: Sequence[Block], marks: Marks | None = None) -> None:
        """Show a table, which must stay open until the next call; marks name what changed with it.

        The same blocks as before keep cursor and zoom; other blocks are shown whole.
        """
        axis = Axis(blocks)
        self._table, self._marks, self._page_size = table, marks, table.page_size
        if axis.blocks != self._axis.blocks:
            self._begin(axis)
        self._count_overview()
        self._count()
        self._moved()

    def clear(self) -> None:
        """Show nothing; the table may be closed afterwards."""
        self._table = self._marks = None
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

    def look_at(self, page: int) -> int:
        """The look (see ``pagegrid.ALL_LOOKS``) the cell of a page has on the screen; OUTSIDE if it is not there."""
        row, column = self._grid.place(page)
        line = row - self._top
        return self._rows[line][1][column] if 0 <= line < len(self._rows) else OUTSIDE

    def go(self, page: int) -> None:
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
            self.go(self._grid.page(min(max(row + rows, 0), self._grid.rows - 1), column))
        else:
            first, pages = self._grid.cell_at(self.cursor)
            slot = self._axis.slot(first) + (pages if columns > 0 else -1)
            for page, _ in self._axis.pieces(slot, 1) if slot >= 0 else ():
                self.go(self._grid.cell_at(page)[0])

    def action_page(self, way: int) -> None:
        """Go a screen up or down."""
        self.action_move(0, way * max(1, self.size.height - 1))

    def action_edge(self, way: int) -> None:
        """Go to the first or the last page."""
        if self._axis.blocks:
            self.go(self._axis.blocks[0].page if way < 0 else self._axis.blocks[-1].end - 1)

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
        self._seek(next_kind, way)

    def action_run(self, way: int) -> None:
        """Go to the next run of frames, or the end of the one before."""
        self._seek(next_run, way)

    def action_runs(self) -> None:
        """Show how many runs a cell has, or again what it is made of."""
        self.by_runs = not self.by_runs
        self._count_overview()
        self._count()
        self._moved()

    def action_marks(self) -> None:
        """Show or hide what changed with the last scan."""
        self.show_marks = not self.show_marks
        self._count_overview()
        self._count()

    def _seek(self, search: Search, way: int) -> None:
        if self._table is None or not self._axis.blocks:
            return
        page = search(self._table, self._axis, self.cursor, way)
        if page is None:
            self.app.bell()
        else:
            self.go(page)

    # --- mouse ------------------------------------------------------------------------------------------------------

    def on_click(self, event: events.Click) -> None:
        """Put the cursor where the mouse points; on the minimap, go there."""
        if not self._axis.blocks:
            return
        column, line = event.x - GUTTER, event.y
        if column == self._grid.width:
            height = max(1, self.size.height)
            for page, _ in self._axis.pieces(self._axis.pages * line // height, 1):
                self.go(page)
        elif 0 <= column < self._grid.width and self._top + line < self._grid.rows:
            self.go(self._grid.page(self._top + line, column))

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
        """How many cells a row has in so many columns: a power of two, so that rows begin at round addresses."""
        room = min(WIDEST, max(8, width - GUTTER - EDGE))
        return 1 << (room.bit_length() - 1)

    @classmethod
    def width_for(cls, width: int) -> int:
        """How many of so many columns the map fills."""
        return GUTTER + cls.cells_for(width) + EDGE

    def on_resize(self) -> None:
        """Lay the map out anew; the cursor stays on its page, and what was whole stays whole."""
        self._lay(self._whole().cell if self._is_whole else self._grid.cell)
        self._count_overview()
        self._count()

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
        if self._table is None:
            return bytearray()
        cells = looks(self._table, ranges, by_runs=self.by_runs)
        if self._marks is not None and self.show_marks and not self.by_runs:
            self._marks.draw(cells, ranges)
        return cells

    def _count(self) -> None:
        """Count the cells on the screen."""
        height = self.size.height
        cells = bytes(self._draw(list(self._grid.ranges(self._top, height)) if self._table else []))
        self._rows, at = [], 0
        for row in range(self._top, min(self._top + height, self._grid.rows) if cells else 0):
            page, pages = self._grid.row(row)
            number = -(-pages // self._grid.cell)
            self._rows.append((page, cells[at : at + number]))
            at += number
        self._repaint()

    def _count_overview(self) -> None:
        """Count the minimap: the whole map in as many cells as there are lines, of each the most telling look."""
        height, pages = self.size.height, self._axis.pages
        overview = bytearray()
        for line in range(height if pages else 0):
            slot = pages * line // height
            slots = max(1, pages * (line + 1) // height - slot)
            overview.append(max(self._draw([(first, n, 1) for first, n in self._axis.pieces(slot, slots)]), default=0))
        self._overview = bytes(overview)

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
        lines = [
            Line(
                *(self._rows[y] if y < len(self._rows) else (-1, b"")),
                cursor_column if cursor_row == self._top + y else -1,
                self._overview[y] if y < len(self._overview) else OUTSIDE,
                y in thumb,
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
            looks = [get(f"heatmap--{look.id}") for look in ALL_LOOKS]
            self._colours = Styles(
                self.rich_style,
                get("heatmap--address"),
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
        address = f"{line.page * self._page_size:#{GUTTER - 1}x} " if line.page >= 0 else " " * GUTTER
        segments = [Segment(address, styles.address)]
        cells = line.cells
        if line.cursor < 0:
            segments += self._cells(cells, styles)
        else:
            under = cells[line.cursor]
            segments += self._cells(cells[: line.cursor], styles)
            segments.append(Segment(GLYPHS[under], styles.looks[under] + styles.cursor))
            segments += self._cells(cells[line.cursor + 1 :], styles)
        segments.append(Segment(" " * (self._grid.width - len(cells)), styles.plain))
        edge = styles.looks[line.edge]
        segments.append(Segment(GLYPHS[line.edge], edge + styles.cursor if line.thumb else edge))
        return Strip(segments, GUTTER + self._grid.width + EDGE).adjust_cell_length(width, styles.plain)

    @staticmethod
    def _cells(cells: bytes, styles: Styles) -> list[Segment]:
        return [
            Segment("".join([GLYPHS[look] for look in run]), styles.looks[tone])
            for tone, run in groupby(cells, styles.tones.__getitem__)
        ]
