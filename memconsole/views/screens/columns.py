"""Which columns of a table are shown, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from memconsole.field import Field
from memconsole.views.bound import bound
from memconsole.views.screens.dialogs import Dialog
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.fitting import fit


class Columns(Dialog[list[str]]):
    """The fields of a table: those that are shown with their number, in their order, then the others.

    The first field names the row: it is always shown, and first.
    """

    DEFAULT_CSS = """
    Columns OptionList, Columns OptionList:focus { border: none; height: auto; max-height: 18; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("columns-take", "take", "Show these", priority=True),
        bound("columns-toggle", "show_or_hide", "Show or hide"),
        bound("columns-left-one", "shift(-1)", "Further left"),
        bound("columns-right-one", "shift(1)", "Further right"),
        bound("columns-defaults", "defaults", "As they were"),
    ]

    def __init__(self, fields: Sequence[Field], shown: Sequence[Field], usual: Sequence[Field]) -> None:
        super().__init__()
        self._fields = fields
        self._usual = usual
        self._shown = [field for field in shown if field is not fields[0]]

    def compose(self) -> ComposeResult:
        """The fields."""
        with Vertical() as box:
            box.border_title = "Columns"
            box.border_subtitle = "space: show or hide   J K: move   d: defaults   enter: done"
            yield OptionList()

    def on_mount(self) -> None:
        """List them."""
        self._list(0)

    @property
    def _order(self) -> list[Field]:
        return [*self._shown, *(field for field in self._fields[1:] if field not in self._shown)]

    def _list(self, at: int) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(self._line(number, field), id=field.id) for number, field in enumerate(self._order))
        options.highlighted = min(max(at, 0), len(self._order) - 1)

    def _line(self, number: int, field: Field) -> Content:
        shown = number < len(self._shown)
        mark = f"✔ {number + 2:>2}" if shown else "·  -"
        style = "" if shown else "$text-muted"
        return line(
            [(f"{mark} ", "bold $success" if shown else style), (f"{field.title:<12} {fit(field.help, 50)}", style)]
        )

    @property
    def _at(self) -> int:
        return self.query_one(OptionList).highlighted or 0

    def action_show_or_hide(self) -> None:
        """Show the field, as the last column, or hide it."""
        field = self._order[self._at]
        if field in self._shown:
            self._shown.remove(field)
        else:
            self._shown.append(field)
        self._list(self._at)

    def action_shift(self, by: int) -> None:
        """Move a column that is shown."""
        at, to = self._at, self._at + by
        if at < len(self._shown) and 0 <= to < len(self._shown):
            self._shown[at], self._shown[to] = self._shown[to], self._shown[at]
            self._list(to)

    def action_defaults(self) -> None:
        """Show what is shown where nothing was chosen."""
        self._shown = [field for field in self._usual if field is not self._fields[0]]
        self._list(0)

    def action_take(self) -> None:
        """Show these."""
        self.dismiss([self._fields[0].id, *(field.id for field in self._shown)])
