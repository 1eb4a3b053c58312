"""The pane beside the rows of a wide terminal: everything that is known of the row under the cursor."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from memconsole.field import Table
from memconsole.views.widgets.facts import Lines, facts_of, laid_out

WIDTH = 46
FROM = 160
"""Columns of a terminal from which the pane stands beside the rows."""


class Pane(Lines):
    """Facts about one row, each in full; what does not fit below is said to be missing."""

    DEFAULT_CSS = f"""
    Pane {{ dock: right; width: {WIDTH}; height: 1fr; padding: 0 1; border-left: solid $border; display: none; }}
    """

    def tell(self, table: Table, item: Any | None) -> None:
        """Show a row of a table, or that there is none."""
        width, height = WIDTH - 3, max(self.size.height, 3)
        if item is None:
            self.show_lines([Content.styled("no row is chosen", "$text-muted")])
            return
        head = Content.styled(f"{table.title}: {table.key(item)}", "bold $primary")
        lines = [head.truncate(width, ellipsis=True), *laid_out(facts_of(table.fields, item, None), width)]
        if len(lines) > height:
            more = Content.styled(f"… {len(lines) - height + 1} more lines; Enter shows all", "$text-muted")
            lines = [*lines[: height - 1], more]
        self.show_lines(lines)
