"""The app's line of questions: filters, commands, and the dialogs about a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual import events
from textual.widgets import Input

from memconsole import exporting
from memconsole.errors import MemconsoleError, UsageError
from memconsole.redaction import Redactor
from memconsole.views.commands import run_line
from memconsole.views.lining import Lining
from memconsole.views.screens.columns import Columns
from memconsole.views.screens.dialogs import Pick
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.prompt import Prompt
from memconsole.views.widgets.table import VirtualTable

if TYPE_CHECKING:
    from memconsole.views.console import Console
    from memconsole.views.view import View


class Prompting(Lining):
    """An App that asks on its line, and in dialogs, what a table is to show and what is to be done."""

    @property
    def view(self) -> View:
        """The view in front."""
        raise NotImplementedError

    def on_choosing_changed(self) -> None:
        """What the title says of the table may differ."""
        self.before_frame(self.show_state)

    def on_choosing_wanted(self, event: VirtualTable.Wanted) -> None:
        """Ask for a filter, a column to sort by, the columns to show, what to copy, or the file to write to."""
        table = cast("VirtualTable", event.table)
        ask = {
            "filter": self._ask_filter,
            "columns": self._ask_columns,
            "sort": self._ask_order,
            "copy": self._ask_copy,
            "export": self._ask_export,
        }
        ask[event.what](table)

    def _ask_filter(self, table: VirtualTable) -> None:
        self.query_one(Prompt).ask(table, table.rows.filter_text)

    def _ask_columns(self, table: VirtualTable) -> None:
        def show(names: list[str] | None) -> None:
            if names:
                table.set_columns(names)

        self.push_screen(Columns(table.table.fields, table.rows.fields, table.usual), show)

    def _ask_order(self, table: VirtualTable) -> None:
        rows = table.rows

        def order(id: str | None) -> None:
            if id is not None:
                field = next((field for field in table.table.fields if field.id == id), None)
                table.sort_by(field)

        options = [(field.id, f"{field.title:<14} {fit(field.help, 40)}") for field in rows.fields]
        current = rows.sort_field.id if rows.sort_field else ""
        self.push_screen(Pick("Sort by", [*options, ("none", "as the snapshot has them")], current), order)

    def _ask_copy(self, table: VirtualTable) -> None:
        offered = table.copies()

        def copy(id: str | None) -> None:
            text = next((text for each, _, text in offered if each == id), "")
            table.copy(text)

        options = [
            (id, fit(f"{title:<14} {text}", 58) if id.startswith("cell-") else title) for id, title, text in offered
        ]
        self.push_screen(Pick("Copy", options, "row"), copy)

    def _ask_export(self, table: VirtualTable) -> None:
        line = f"export {table.table.id}.csv"
        self.query_one(Prompt).ask(None, line)

    def export_table(self, path: str, *, redact: bool) -> None:
        """Write the rows and columns that the table in front shows to a file, as its name ends.

        Raises:
            UsageError: there is no table here, or the name has no format.
            BadFile: the file is there, or cannot be written.
        """
        table = self.view.current_table
        if table is None or self.snapshot is None:
            raise UsageError("there is no table here", "an export writes the rows of a table", "open one: :regions")
        write = exporting.FORMATS[exporting.format_of(path)]
        rows = table.shown_items
        if redact:
            redactor = Redactor()
            redactor.learn(self.snapshot)
            rows = redactor.value(rows)
        exporting.write(path, write(table.rows.fields, rows))
        told = f"{len(rows):,} rows" + (", names redacted" if redact else "")
        self.notify(told, title=f"✔ Written to {path}", markup=False)

    def action_command(self) -> None:
        """Ask for a command."""
        self.query_one(Prompt).ask(None)

    def on_input_changed(self, event: Input.Changed) -> None:
        """A filter works while it is typed."""
        if isinstance(event.input, Prompt) and event.input.table is not None and event.input.display:
            event.input.table.try_filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, or do what the command says; one that says nothing stays to be corrected."""
        prompt = event.input
        if not isinstance(prompt, Prompt):
            return
        prompt.leave()
        try:
            if prompt.table is None:
                run_line(cast("Console", self), event.value)
            else:
                prompt.table.set_filter(event.value)
        except MemconsoleError as error:
            title = "✖ Command" if prompt.table is None else "✖ Filter"
            self.notify(str(error), title=title, severity="error", markup=False)
            prompt.ask(prompt.table, event.value, again=True)

    async def hand_on(self, event: events.Key | events.Paste) -> None:
        """Take what is pasted where nothing is typed for a command (``:``) or a filter (``/``); Enter is left to do."""
        if not isinstance(event, events.Paste) or isinstance(self.focused, Input):
            await super().hand_on(event)
            return
        text = next(iter(event.text.strip().splitlines()), "")
        table = self.view.current_table if self.screen is self.screen_stack[0] else None
        if text.startswith(":") and self.screen is self.screen_stack[0]:
            self.query_one(Prompt).ask(None, text[1:])
        elif text.startswith("/") and table is not None:
            self.query_one(Prompt).ask(table, text[1:])
            table.try_filter(text[1:])
        elif text:
            why = "a text that begins with : is taken for a command, with / for a filter"
            self.notify(why, title="Nothing here takes what was pasted", markup=False)
