"""A table of any length: only the rows in sight are formatted, only the lines that changed are painted.

``render_line`` builds line y from the row at ``scroll_offset.y + y - 1`` (line 0 is the header). The first column stays
when the others scroll sideways. A row's strip is kept as long as its entity, its entity before the last refresh,
its cursor and the layout are the same; those four are also what a painted line is compared by.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.cache import LRUCache
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from memconsole.errors import UsageError
from memconsole.field import Field, Table
from memconsole.views.bound import bound
from memconsole.views.looks import value_look
from memconsole.views.remembering import Layout
from memconsole.views.widgets.choosing import WARM_S, Choosing
from memconsole.views.widgets.columns import GAP, GUTTER, Column, columns_for
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.rowset import RowSet

KEPT_STRIPS = 1024
CURSORS = (" ", "▹", "▸", "■", "◇", "◆")
"""No cursor, a cursor where keys do not go, and one where they do; the same of a marked row."""
MARKED = 3
TRENDS = {0: " ", 1: "↑", -1: "↓", 2: "•"}
PLAIN = ("", "", "")
STYLE = itemgetter(1)
TONES = ("good", "warn", "bad", "dim", "calm")


class TableLine(NamedTuple):
    """What a painted line depends on: the entity, what it was before, the cursor on it, and the layout."""

    item: Any
    before: Any
    cursor: int
    layout: int


class VirtualTable(Choosing, can_focus=True):
    """The rows of one ``fields.Table``, with a cursor that stays on its entity through refresh, sort and filter."""

    DEFAULT_CSS = """
    VirtualTable { overflow-x: hidden; overflow-y: auto; scrollbar-size-vertical: 1; height: 1fr; }
    VirtualTable > .table--header { color: $secondary; text-style: bold; }
    VirtualTable > .table--sorted { color: $accent; text-style: bold; }
    VirtualTable > .table--key { text-style: bold; }
    VirtualTable > .table--cursor { background: $block-cursor-background; text-style: bold; }
    VirtualTable > .table--mark { color: $accent; text-style: bold; }
    VirtualTable > .table--changed { color: $accent; text-style: bold; }
    VirtualTable > .table--good { color: $success; }
    VirtualTable > .table--warn { color: $warning; }
    VirtualTable > .table--bad { color: $error; }
    VirtualTable > .table--dim { color: $text-muted; }
    VirtualTable > .table--calm { color: $primary; }
    VirtualTable:ansi > .table--cursor { text-style: bold reverse; background: ansi_default; color: ansi_default; }
    VirtualTable:nocolor > .table--cursor { text-style: bold reverse; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "table--header",
        "table--sorted",
        "table--key",
        "table--cursor",
        "table--mark",
        "table--changed",
        *(f"table--{tone}" for tone in TONES),
    }
    ALLOW_SELECT = False
    BARE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("open", "open", "Open"),
        bound("up", "move(-1)", "Up", show=False),
        bound("down", "move(1)", "Down", show=False),
        bound("page-up", "page(-1)", "Page up", show=False),
        bound("page-down", "page(1)", "Page down", show=False),
        bound("first", "first", "First row", show=False),
        bound("last", "last", "Last row", show=False),
        bound("columns-left", "sideways(-1)", "Columns left", show=False),
        bound("columns-right", "sideways(1)", "Columns right", show=False),
        bound("filter", "filter", "Filter"),
        bound("sort", "pick_sort", "Sort"),
        bound("sort-left", "sort_next(-1)", "Sort by the column left", show=False),
        bound("sort-right", "sort_next(1)", "Sort by the column right", show=False),
        bound("reverse", "reverse", "Reverse the order", show=False),
        bound("columns", "columns", "Columns"),
    ]

    class RowOpened(Message):
        """The operator opened a row."""

        def __init__(self, table: VirtualTable, item: Any) -> None:
            super().__init__()
            self.table = table
            self.item = item

        @property
        def control(self) -> VirtualTable:
            """The table it happened in."""
            return self.table

    class Chosen(Message):
        """The cursor went to another row."""

        def __init__(self, table: VirtualTable) -> None:
            super().__init__()
            self.table = table

    class Arranged(Message):
        """The operator chose other columns, or another order."""

        def __init__(self, table: VirtualTable) -> None:
            super().__init__()
            self.table = table

    def __init__(
        self,
        table: Table,
        *,
        columns: str | None = None,
        empty: str = "nothing here",
        stay_on_top: bool = False,
        **kwargs: Any,
    ) -> None:
        """With ``stay_on_top`` a cursor on the first row stays on it whatever comes in; ``empty`` stands for no row."""
        super().__init__(**kwargs)
        self._stay_on_top = stay_on_top
        self.table = table
        self.usual = table.pick(columns)
        """The columns that are shown where none were chosen."""
        self.rows = RowSet(table, self.usual)
        self.empty = empty
        self.complaint = ""
        self.cursor = 0
        self._key: str | None = None
        self._left = 1
        self._layout_number = 0
        self._columns: tuple[Column, ...] = ()
        self._layout_for: tuple[int, int] = (-1, -1)
        self._width = 0
        self._top, self._wide, self._keyed = 0, 0, False
        self._strips: LRUCache[tuple[str, int], tuple[TableLine, Strip]] = LRUCache(KEPT_STRIPS)
        self._painted: dict[int, TableLine | None] = {}
        self._style_table: dict[str, Style] = {}
        self._mixed: dict[tuple[bool, tuple[str, ...]], Style] = {}
        self.virtual_size = Size(0, 1)

    # --- what is shown ------------------------------------------------------------------------------------------

    @property
    def help_title(self) -> str:
        """What the help calls its keys."""
        return self.table.title

    def load(self, items: Sequence[Any]) -> None:
        """Show the entities of a new Snapshot; repaints the lines that differ."""
        length = len(self.rows)
        if not self.rows.loaded and len(items) > KEPT_STRIPS:
            self.set_timer(WARM_S, self.warm)
        if self.rows.load(items):
            self._follow()
            self._repaint(everything=length != len(self.rows))

    def forget(self) -> None:
        """Begin anew: the next entities are those of another subject, none of them new or changed."""
        self.rows = RowSet(self.table, self.rows.fields)
        self.cursor, self._key = 0, None

    def find(self, key: str) -> bool:
        """Put the cursor on an entity; says whether it is shown."""
        row = self.rows.row_of(key)
        if row is not None:
            self._move_to(row)
        return row is not None

    def set_filter(self, text: str) -> None:
        """Show only the rows that this filter finds; see :mod:`memconsole.where`.

        Raises:
            UsageError: it is none; the one before stays.
        """
        if text != self.rows.filter_text:
            self.rows.filter(text)
            self._reordered()
        self._complain("")

    def try_filter(self, text: str) -> None:
        """Show what a filter finds as it is typed; while it is none, the last one stays, and ``complaint`` says why."""
        try:
            self.set_filter(text)
        except UsageError as error:
            self._complain(str(error))

    def _complain(self, text: str) -> None:
        if text != self.complaint:
            self.complaint = text
            self.post_message(self.Changed())

    def set_sort(self, field: Field | None, *, reverse: bool = False) -> None:
        """Order the rows by a field, or as the Snapshot has them."""
        self.rows.sort(field, reverse=reverse)
        self._relayout()
        self._reordered()
        self.post_message(self.Arranged(self))

    def sort_by(self, field: Field | None) -> None:
        """Order the rows by a field; the other way round where they are ordered by it already."""
        again = field is self.rows.sort_field
        largest_first = field is not None and field.largest_first
        self.set_sort(field, reverse=not self.rows.reverse if again else largest_first)

    def set_columns(self, names: Sequence[str]) -> None:
        """Show these fields, in this order; names that are no fields are left out, the first field is never missing."""
        known = {field.id: field for field in self.table.fields}
        found = [known[name] for name in names if name in known]
        self.rows.show(found or self.table.fields[:1])
        self._left = 1
        self._relayout()
        self._reordered()
        self.post_message(self.Arranged(self))

    def lay_out_as(self, layout: Layout) -> None:
        """Show columns and order as they were chosen before."""
        if layout.columns:
            self.set_columns(layout.columns)
        by = next((field for field in self.table.fields if field.id == layout.sort), None)
        if by is not None:
            self.set_sort(by, reverse=layout.reverse)

    @property
    def layout_now(self) -> Layout:
        """The columns and the order there are."""
        rows = self.rows
        by = rows.sort_field.id if rows.sort_field is not None else ""
        return Layout(tuple(field.id for field in rows.fields), by, rows.reverse)

    def _reordered(self) -> None:
        self._follow()
        self._repaint(everything=True)

    def _follow(self) -> None:
        """Keep the cursor on its entity, else near where it was."""
        self.virtual_size = Size(0, len(self.rows) + 1)
        self.lay_scrollbars()
        row = self.rows.row_of(self._key) if self._key is not None else None
        self._move_to(min(self.cursor, max(len(self.rows) - 1, 0)) if row is None else row, keep=row is None)

    def _move_to(self, row: int, *, keep: bool = False) -> None:
        """Put the cursor on a row; with ``keep`` the entity it belongs to stays the one that is looked for."""
        old, self.cursor = self.cursor, row
        if self._stay_on_top and row == 0:
            self._key = None
        elif len(self.rows) and not (keep and self.rows.filter_text):
            self._key = self.rows.key(row)
        page = max(self.size.height - 1, 1)
        top = self.scroll_offset.y
        if row < top:
            self.scroll_to(y=row, animate=False)
        elif row >= top + page:
            self.scroll_to(y=row - page + 1, animate=False)
        if old != row:
            self.refresh_row(old)
            self.refresh_row(row)
            self.post_message(self.Chosen(self))

    def refresh_row(self, row: int) -> None:
        """Repaint the line a row is on."""
        y = row + 1 - self.scroll_offset.y
        if 0 < y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _relayout(self) -> None:
        self._layout_for = (-1, -1)

    def _repaint(self, *, everything: bool) -> None:
        if everything or not self.size.width:  # all of one that comes to the front is painted
            self.refresh()
        else:
            self._lay_out()
            for y in range(1, self.size.height):
                if self._painted.get(y) != self._line(y):
                    self.refresh(Region(0, y, self.size.width, 1))
        self.post_message(self.Changed())

    # --- lines --------------------------------------------------------------------------------------------------

    def notify_style_update(self) -> None:
        """Look at the colours again; what was made with the old ones is kept if they are the same."""
        self._relayout()
        super().notify_style_update()

    def on_resize(self) -> None:
        """Keep the cursor in sight."""
        self._relayout()
        self._move_to(self.cursor, keep=True)

    def watch_has_focus(self, has_focus: bool) -> None:
        """Show whether keys go here."""
        super().watch_has_focus(has_focus)
        self.refresh_row(self.cursor)
        if has_focus:
            self.post_message(self.Changed())

    def render_lines(self, crop: Region) -> list[Strip]:
        """Some lines; the columns are laid out once for all of them."""
        self._lay_out()
        return super().render_lines(crop)

    def _lay_out(self) -> None:
        """Look at where the lines are, and at the room and the colours there are, if they may have changed."""
        self._top, self._wide, self._keyed = self.scroll_offset.y, self.size.width, self.has_focus
        width = self.scrollable_content_region.width
        if self._layout_for == (width, self._left):
            return
        self._layout_for = (width, self._left)
        names = ("header", "sorted", "key", "cursor", "mark", "changed", *TONES)
        styles = {name: self.get_component_rich_style(f"table--{name}", partial=True) for name in names}
        styles["base"] = self.rich_style
        columns = columns_for(self.rows.fields, self._left, width, self.rows.sort_field)
        if (columns, styles, self._wide) != (self._columns, self._style_table, self._width):
            self._columns, self._style_table, self._width = columns, styles, self._wide
            self._mixed.clear()
            self._layout_number += 1

    def _line(self, y: int) -> TableLine | None:
        row = self._top + y - 1
        if not 0 <= row < len(self.rows):
            return None
        key = self.rows.key(row)
        on = (0 if row != self.cursor else 2 if self._keyed else 1) + MARKED * self.rows.is_marked(row)
        before = self.rows.before.get(key, self)
        return TableLine(self.rows[row], before, on, self._layout_number)

    def render_line(self, y: int) -> Strip:
        """One line of the table: the header, a row, or an empty one."""
        styles, width = self._style_table, self._wide
        if y == 0:
            return self._header(styles, width)
        line = self._line(y)
        self._painted[y] = line
        if line is None:
            text = f"  {self._nothing()}" if y == 1 and not len(self.rows) else ""
            return Strip([Segment(fit(text, width), styles["base"] + styles["dim"])], width)
        key = self.rows.key(self._top + y - 1)
        kept = self._strips.get((key, line.cursor))
        # identity, not equality: an equal line of another object would keep a dead object alive in the cache
        if kept is not None and all(was is now for was, now in zip(kept[0], line, strict=True)):
            return kept[1]
        strip = self._row(key, line, width)
        self._strips.discard((key, line.cursor))  # without it the cache keeps what it has
        self._strips[(key, line.cursor)] = (line, strip)
        return strip

    def _nothing(self) -> str:
        if self.rows.total:
            return f"none of {self.rows.total:,} rows matches {self.rows.filter_text!r}; Escape clears the filter"
        return self.empty if self.rows.loaded else "waiting for the first snapshot"

    def _header(self, styles: dict[str, Style], width: int) -> Strip:
        columns, fields = self._columns, self.rows.fields
        base = styles["base"] + styles["header"]
        more_left = self._left > 1
        more_right = self._left + len(columns) - 1 < len(fields)
        segments = [Segment(" " * GUTTER, base)]
        for index, (field, x, cells) in enumerate(columns):
            sorted_here = field is self.rows.sort_field
            title = f"{field.title} {'▼' if self.rows.reverse else '▲'}" if sorted_here else field.title
            style = styles["base"] + styles["sorted"] if sorted_here else base
            gap = "◂ " if index == 0 and more_left else " " * GAP
            room = min(cells, width - more_right - x)  # the last cell says that there are more columns
            segments += [Segment(fit(title, room, right=field.right), style), Segment(gap, base)]
        strip = Strip(segments).adjust_cell_length(width, base)
        if more_right:
            strip = Strip([*strip.crop(0, width - 1), Segment("▸", styles["base"] + styles["sorted"])], width)
        return strip

    def _row(self, key: str, line: TableLine, width: int) -> Strip:
        item, before, cursor, _ = line
        touched = before is not None and before is not self and self.rows.is_news(key)
        mark = "+" if before is None else "•" if touched else " "
        on = cursor % MARKED == MARKED - 1
        plain = self._style(on, ())
        parts = [
            (CURSORS[cursor], self._style(on, ("mark" if cursor >= MARKED else "calm",))),
            (mark, self._style(on, ("mark",))),
        ]
        for index, (field, _, cells) in enumerate(self._columns):
            value = field.get(item)
            glyph, tone = value_look(field.id, value)
            text = f"{glyph} {field.show(value)}" if glyph else field.show(value)
            trend = self.rows.changed(key, field) if touched else 0
            names = (tone, "" if index else "key", "changed" if trend else "")
            style = plain if names == PLAIN else self._style(on, names)
            parts.append((fit(text, cells, right=field.right), style))
            parts.append((TRENDS[trend] + " " * (GAP - 1), self._style(on, ("mark",)) if trend else plain))
        segments = [Segment("".join([text for text, _ in run]), style) for style, run in groupby(parts, STYLE)]
        return Strip(segments).adjust_cell_length(width, plain)

    def _style(self, cursor: bool, names: tuple[str, ...]) -> Style:
        """The style of some component classes, on the cursor's row or off it; equal ones are the same object."""
        style = self._mixed.get((cursor, names))
        if style is None:
            styles = self._style_table
            style = styles["base"] + styles["cursor"] if cursor else styles["base"]
            for name in filter(None, names):
                style += styles[name]
            style = self._mixed[(cursor, names)] = next((each for each in self._mixed.values() if each == style), style)
        return style

    # --- keys and mouse -----------------------------------------------------------------------------------------

    def action_move(self, by: int) -> None:
        """Move the cursor by rows."""
        if len(self.rows):
            self._move_to(min(max(self.cursor + by, 0), len(self.rows) - 1))

    def action_page(self, by: int) -> None:
        """Move the cursor by pages."""
        self.action_move(by * max(self.size.height - 2, 1))

    def action_first(self) -> None:
        """Go to the first row."""
        self.action_move(-len(self.rows))

    def action_last(self) -> None:
        """Go to the last row."""
        self.action_move(len(self.rows))

    def action_sideways(self, by: int) -> None:
        """Scroll the columns behind the first one."""
        fields = self.rows.fields
        if by > 0 and self._left + len(self._columns) - 1 >= len(fields):
            return
        left = min(max(self._left + by, 1), len(fields) - 1)
        if left != self._left:
            self._left = left
            self.refresh()

    def action_open(self) -> None:
        """Open the row under the cursor."""
        if self.selected is not None:
            self.post_message(self.RowOpened(self, self.selected))

    def action_filter(self) -> None:
        """Ask for a filter."""
        self.post_message(self.Wanted(self, "filter"))
        self.warm()

    def action_pick_sort(self) -> None:
        """Ask which column to sort by."""
        self.post_message(self.Wanted(self, "sort"))

    def action_sort_next(self, by: int) -> None:
        """Sort by the next column, or the one before."""
        fields = self.rows.fields
        at = fields.index(self.rows.sort_field) if self.rows.sort_field in fields else (-1 if by > 0 else len(fields))
        at = min(max(at + by, 0), len(fields) - 1)
        self.set_sort(fields[at], reverse=fields[at].largest_first)

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.set_sort(self.rows.sort_field, reverse=not self.rows.reverse)

    def action_columns(self) -> None:
        """Ask which columns to show."""
        self.post_message(self.Wanted(self, "columns"))

    def on_click(self, event: events.Click) -> None:
        """A click chooses a row, a double click opens it, a click on a title sorts by it."""
        if event.y == 0:
            for column in self._columns:
                if column.x <= event.x < column.x + column.width:
                    self.sort_by(column.field)
            return
        row = self.scroll_offset.y + event.y - 1
        if row < len(self.rows):
            self._move_to(row)
            if event.chain == 2:
                self.action_open()
