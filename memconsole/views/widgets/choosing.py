"""What an operator chooses in a table, and takes out of it: marked rows, and copies of a row or of them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec
from textual.binding import BindingType
from textual.message import Message

from memconsole import escaping, exporting
from memconsole.escaping import escape
from memconsole.field import Table
from memconsole.views.bound import bound
from memconsole.views.painting import Sheet
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.rowset import RowSet

WARM_S = 0.3
"""After so long the rows of a long table that came in are made ready for a filter."""
WARM_ROWS, WARM_EVERY_S = 100, 0.005


class Choosing(Sheet):
    """A table's rows, one under the cursor, any number marked; an action is for the marked ones where there are any."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bound("mark", "mark", "Mark", tooltip="mark the row; an action takes all marked rows"),
        bound("mark-range", "mark_range", "Mark to here", show=False, tooltip="mark from the last mark"),
        bound("mark-all", "mark_all", "Mark all", show=False, tooltip="mark every row the filter shows"),
        bound("mark-invert", "mark_others", "Invert marks", show=False, tooltip="mark the others instead"),
        bound("copy", "copy_text", "Copy row", show=False, tooltip="copy the row, or the marked ones"),
        bound("copy-json", "copy_json", "Copy row as JSON", show=False),
        bound("copy-any", "copy_any", "Copy", show=False, tooltip="copy a cell, the row, or the table"),
        bound("export", "export", "Export", show=False, tooltip="write what is shown to a file"),
    ]

    table: Table
    rows: RowSet
    cursor: int

    class Wanted(Message):
        """The operator wants a dialog about the table: ``filter``, ``sort``, ``columns``, ``copy`` or ``export``."""

        def __init__(self, table: Choosing, what: str) -> None:
            super().__init__()
            self.table = table
            self.what = what

    class Changed(Message):
        """Rows, order, filter, marks or the focus changed: what a title says about the table may differ."""

    def warm(self) -> None:
        """Make the searchable text a little at a time between keys, so that the first of a filter finds it made."""
        self.painter.behind_frame(self._warm_some)

    def _warm_some(self) -> None:
        if self.is_attached and self.rows.warm(WARM_ROWS):
            self.set_timer(WARM_EVERY_S, self.warm)

    @property
    def selected(self) -> Any | None:
        """The entity under the cursor, or None in an empty table."""
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    @property
    def chosen(self) -> list[Any]:
        """The marked entities that are shown, in the order they are; where none is marked, the one under the cursor."""
        marked = [self.rows[row] for row in range(len(self.rows)) if self.rows.is_marked(row)]
        if marked or self.rows.marked:
            return marked
        return [self.selected] if self.selected is not None else []

    def action_move(self, by: int) -> None:
        """Move the cursor by rows."""
        raise NotImplementedError

    def clear_marks(self) -> None:
        """Mark nothing."""
        self._mark((), keep=False)

    def action_mark(self) -> None:
        """Mark the row, or take its mark away, and go to the next one."""
        if len(self.rows):
            self.rows.toggle(self.cursor)
            self._marked()
            self.action_move(1)

    def action_mark_range(self) -> None:
        """Mark the rows from the last one that was marked to the cursor."""
        if len(self.rows):
            first = self.rows.last_marked
            start = self.cursor if first is None else first
            self._mark(range(min(start, self.cursor), max(start, self.cursor) + 1))

    def action_mark_all(self) -> None:
        """Mark every row that is shown."""
        self._mark(range(len(self.rows)))

    def action_mark_others(self) -> None:
        """Mark the rows that are shown and not marked, instead of those that are."""
        others = [row for row in range(len(self.rows)) if not self.rows.is_marked(row)]
        self._mark(others, keep=False)

    def _mark(self, rows: Iterable[int], *, keep: bool = True) -> None:
        self.rows.mark(rows, keep=keep)
        self._marked()

    def _marked(self) -> None:
        self.refresh()
        self.post_message(self.Changed())

    def action_copy_text(self) -> None:
        """Copy the row, or the marked ones, as shown, tab-separated (OSC 52)."""
        self.copy("\n".join(self.line_of(item) for item in self.chosen))

    def line_of(self, item: Any) -> str:
        """An entity as it is shown, tab-separated."""
        return "\t".join(escape(field.text(item)) for field in self.rows.fields)

    def action_copy_json(self) -> None:
        """Copy the whole entity, or the marked ones, a line each, as JSON (OSC 52)."""
        self.copy("\n".join(escaping.json(msgspec.json.encode(item).decode()) for item in self.chosen))

    def action_copy_any(self) -> None:
        """Ask what to copy: a cell, the row, the table."""
        if self.selected is not None:
            self.post_message(self.Wanted(self, "copy"))

    def action_export(self) -> None:
        """Ask for the file that what is shown is written to."""
        self.post_message(self.Wanted(self, "export"))

    @property
    def shown_items(self) -> list[Any]:
        """The entities that are shown, in the order they are."""
        return [self.rows[row] for row in range(len(self.rows))]

    def copies(self) -> list[tuple[str, str, str]]:
        """What can be copied: an id, what it is, and its text."""
        item, fields = self.selected, self.rows.fields
        if item is None:
            return []
        cells = [(f"cell-{field.id}", field.title, escape(field.text(item))) for field in fields]
        table = exporting.text(fields, self.shown_items)
        return [
            *cells,
            ("row", "The row, tab-separated", self.line_of(item)),
            ("table", f"The table, {len(self.rows):,} rows", table),
            ("csv", "The table as CSV", exporting.as_csv(fields, self.shown_items)),
        ]

    def copy(self, text: str) -> None:
        """Put a text on the clipboard (OSC 52), and say so."""
        if text:
            self.app.copy_to_clipboard(text)
            lines = text.rstrip("\n").count("\n") + 1
            told = f"{lines:,} lines" if lines > 1 else fit(text.replace("\t", "  "), 60).rstrip()
            self.notify(told, title="Copied", timeout=2, markup=False)
