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

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from memconsole.fields import Field, Table
from memconsole.views.looks import glyphs, look
from memconsole.views.painting import Sheet
from memconsole.views.widgets.rowset import RowSet

GUTTER = 2
GAP = 2
LEAST = 6
KEPT_STRIPS = 1024
CURSORS = (" ", "▹", "▸")
"""No cursor, a cursor where keys do not go, and one where they do."""
TRENDS = {0: " ", 1: "↑", -1: "↓", 2: "•"}
PLAIN = ("", "", "")
STYLE = itemgetter(1)
TONES = ("good", "warn", "bad", "dim", "calm")


class Column(NamedTuple):
    """A field in its place on the screen."""

    field: Field
    x: int
    width: int


class Line(NamedTuple):
    """What a painted line depends on: the entity, what it was before, the cursor on it, and the layout."""

    item: Any
    before: Any
    cursor: int
    layout: int


def printable(text: str) -> str:
    """The text without what a terminal would obey: a process may call itself anything."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "·" for char in text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly ``width`` cells, cut with an ellipsis where it is longer."""
    text = printable(text)
    length = len(text) if text.isascii() else cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * (width - length) + text if right else text + " " * (width - length)


class VirtualTable(Sheet, can_focus=True):
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
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", id="open"),
        Binding("up,k", "move(-1)", "Up", show=False, id="up"),
        Binding("down,j", "move(1)", "Down", show=False, id="down"),
        Binding("pageup", "page(-1)", "Page up", show=False, id="page-up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="page-down"),
        Binding("home,g", "first", "First row", show=False, id="first"),
        Binding("end,G", "last", "Last row", show=False, id="last"),
        Binding("left,h", "sideways(-1)", "Columns left", show=False, id="columns-left"),
        Binding("right,l", "sideways(1)", "Columns right", show=False, id="columns-right"),
        Binding("slash", "filter", "Filter", id="filter"),
        Binding("s", "pick_sort", "Sort", id="sort"),
        Binding("less_than_sign", "sort_next(-1)", "Sort by the column left", show=False, id="sort-left"),
        Binding("greater_than_sign", "sort_next(1)", "Sort by the column right", show=False, id="sort-right"),
        Binding("i", "reverse", "Reverse the order", show=False, id="reverse"),
        Binding("c", "columns", "Columns", id="columns"),
        Binding("y", "copy_text", "Copy row", show=False, id="copy"),
        Binding("Y", "copy_json", "Copy row as JSON", show=False, id="copy-json"),
    ]

    class Opened(Message):
        """The operator opened a row."""

        def __init__(self, table: VirtualTable, item: Any) -> None:
            super().__init__()
            self.table = table
            self.item = item

        @property
        def control(self) -> VirtualTable:
            """The table it happened in."""
            return self.table

    class Wanted(Message):
        """The operator wants a dialog about the table: ``filter``, ``sort`` or ``columns``."""

        def __init__(self, table: VirtualTable, what: str) -> None:
            super().__init__()
            self.table = table
            self.what = what

    class Changed(Message):
        """Rows, order, filter or the focus changed: what a title says about the table may differ."""

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
        self.rows = RowSet(table, table.pick(columns))
        self.empty = empty
        self.cursor = 0
        self._key: str | None = None
        self._left = 1
        self._layout_number = 0
        self._columns: tuple[Column, ...] = ()
        self._layout_for: tuple[int, int] = (-1, -1)
        self._width = 0
        self._strips: LRUCache[tuple[str, int], tuple[Line, Strip]] = LRUCache(KEPT_STRIPS)
        self._painted: dict[int, Line | None] = {}
        self._style_table: dict[str, Style] = {}
        self._mixed: dict[tuple[bool, tuple[str, ...]], Style] = {}
        self.virtual_size = Size(0, 1)

    # --- what is shown ------------------------------------------------------------------------------------------

    @property
    def selected(self) -> Any | None:
        """The entity under the cursor, or None in an empty table."""
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    def load(self, items: Sequence[Any]) -> None:
        """Show the entities of a new Snapshot; repaints the lines that differ."""
        length = len(self.rows)
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
        """Show only the rows that this filter finds; see :mod:`memconsole.views.widgets.rowset`."""
        if text != self.rows.filter_text:
            self.rows.filter(text)
            self._reordered()

    def set_sort(self, field: Field | None, *, reverse: bool = False) -> None:
        """Order the rows by a field, or as the Snapshot has them."""
        self.rows.sort(field, reverse=reverse)
        self._relayout()
        self._reordered()

    def set_columns(self, names: Sequence[str]) -> None:
        """Show these fields, in the table's own order."""
        self.rows.show([field for field in self.table.fields if field.id in names])
        self._left = 1
        self._relayout()
        self._reordered()

    def _reordered(self) -> None:
        self._follow()
        self._repaint(everything=True)

    def _follow(self) -> None:
        """Keep the cursor on its entity, else near where it was."""
        self.virtual_size = Size(0, len(self.rows) + 1)
        self._scroll_update(self.virtual_size)  # not only with the layout, when it is too late for this frame
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

    def refresh_row(self, row: int) -> None:
        """Repaint the line a row is on."""
        y = row + 1 - self.scroll_offset.y
        if 0 < y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _relayout(self) -> None:
        self._layout_for = (-1, -1)

    def _repaint(self, *, everything: bool) -> None:
        if everything:
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
        """Look at the room and the colours there are, if they may have changed."""
        width = self.scrollable_content_region.width
        if self._layout_for == (width, self._left):
            return
        self._layout_for = (width, self._left)
        names = ("header", "sorted", "key", "cursor", "mark", "changed", *TONES)
        styles = {name: self.get_component_rich_style(f"table--{name}", partial=True) for name in names}
        styles["base"] = self.rich_style
        columns = self._columns_for(width)
        if (columns, styles, self.size.width) != (self._columns, self._style_table, self._width):
            self._columns, self._style_table, self._width = columns, styles, self.size.width
            self._mixed.clear()
            self._layout_number += 1

    def _columns_for(self, width: int) -> tuple[Column, ...]:
        """The columns that have room, the first one always; what is left over goes to columns of text."""
        fields = self.rows.fields
        chosen = [fields[0], *fields[self._left :]]
        room = width - GUTTER
        widths: list[int] = []
        for field in chosen:
            wanted = max(field.width + glyphs(field.id), len(field.title) + 2 * (field is self.rows.sort_field))
            if widths and room < min(LEAST, wanted):
                break
            widths.append(min(wanted, max(room, LEAST)))
            room -= widths[-1] + GAP
        shown = chosen[: len(widths)]
        spare = room + GAP
        stretchy = [index for index, field in enumerate(shown) if not field.right and field.width > LEAST]
        if spare > 0 and stretchy and len(shown) == len(chosen):
            total = sum(shown[index].width for index in stretchy)
            for index in stretchy:
                widths[index] += spare * shown[index].width // total
        x = GUTTER
        columns = []
        for field, cells in zip(shown, widths, strict=True):
            columns.append(Column(field, x, cells))
            x += cells + GAP
        return tuple(columns)

    def _line(self, y: int) -> Line | None:
        row = self.scroll_offset.y + y - 1
        if not 0 <= row < len(self.rows):
            return None
        key = self.rows.key(row)
        on = 0 if row != self.cursor else 2 if self.has_focus else 1
        before = self.rows.before.get(key, self)
        return Line(self.rows[row], before, on, self._layout_number)

    def render_line(self, y: int) -> Strip:
        """One line of the table: the header, a row, or an empty one."""
        styles, width = self._style_table, self.size.width
        if y == 0:
            return self._header(styles, width)
        line = self._line(y)
        self._painted[y] = line
        if line is None:
            text = f"  {self._nothing()}" if y == 1 and not len(self.rows) else ""
            return Strip([Segment(fit(text, width), styles["base"] + styles["dim"])], width)
        key = self.rows.key(self.scroll_offset.y + y - 1)
        kept = self._strips.get((key, line.cursor))
        # identity, not equality: an equal line of another object would keep a dead object alive in the cache
        if kept is not None and all(was is now for was, now in zip(kept[0], line, strict=True)):
            return kept[1]
        strip = self._row(key, line, width)
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
        for index, (field, _, cells) in enumerate(columns):
            sorted_here = field is self.rows.sort_field
            title = f"{field.title} {'▼' if self.rows.reverse else '▲'}" if sorted_here else field.title
            style = styles["base"] + styles["sorted"] if sorted_here else base
            gap = "◂ " if index == 0 and more_left else " " * GAP
            segments += [Segment(fit(title, cells, right=field.right), style), Segment(gap, base)]
        strip = Strip(segments).adjust_cell_length(width, base)
        if more_right:
            strip = Strip([*strip.crop(0, width - 1), Segment("▸", styles["base"] + styles["sorted"])], width)
        return strip

    def _row(self, key: str, line: Line, width: int) -> Strip:
        item, before, cursor, _ = line
        touched = before is not None and before is not self
        mark = "+" if before is None else "•" if touched else " "
        on, plain = cursor == 2, self._style(cursor == 2, ())
        parts = [(CURSORS[cursor], self._style(on, ("calm",))), (mark, self._style(on, ("mark",)))]
        for index, (field, _, cells) in enumerate(self._columns):
            value = field.get(item)
            glyph, tone = look(field.id, value)
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
            self.post_message(self.Opened(self, self.selected))

    def action_filter(self) -> None:
        """Ask for a filter."""
        self.post_message(self.Wanted(self, "filter"))
        self.warm()

    def warm(self) -> None:
        """Make the searchable text a little at a time, so that the first key of a filter finds it made."""
        if self.rows.warm(200):
            self.set_timer(0.005, self.warm)

    def action_pick_sort(self) -> None:
        """Ask which column to sort by."""
        self.post_message(self.Wanted(self, "sort"))

    def action_sort_next(self, by: int) -> None:
        """Sort by the next column, or the one before."""
        fields = self.rows.fields
        at = fields.index(self.rows.sort_field) if self.rows.sort_field in fields else (-1 if by > 0 else len(fields))
        at = min(max(at + by, 0), len(fields) - 1)
        self.set_sort(fields[at], reverse=self.rows.reverse)

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.set_sort(self.rows.sort_field, reverse=not self.rows.reverse)

    def action_columns(self) -> None:
        """Ask which columns to show."""
        self.post_message(self.Wanted(self, "columns"))

    def action_copy_text(self) -> None:
        """Copy the row as it is shown, tab-separated (OSC 52)."""
        if self.selected is not None:
            self._copy("\t".join(field.text(self.selected) for field in self.rows.fields))

    def action_copy_json(self) -> None:
        """Copy the whole entity as JSON (OSC 52)."""
        if self.selected is not None:
            self._copy(msgspec.json.encode(self.selected).decode())

    def _copy(self, text: str) -> None:
        self.app.copy_to_clipboard(text)
        self.notify(fit(text.replace("\t", "  "), 60).rstrip(), title="Copied", timeout=2)

    def on_click(self, event: events.Click) -> None:
        """A click chooses a row, a double click opens it, a click on a title sorts by it."""
        if event.y == 0:
            for column in self._columns:
                if column.x <= event.x < column.x + column.width:
                    again = column.field is self.rows.sort_field
                    self.set_sort(column.field, reverse=again and not self.rows.reverse)
            return
        row = self.scroll_offset.y + event.y - 1
        if row < len(self.rows):
            self._move_to(row)
            if event.chain == 2:
                self.action_open()
