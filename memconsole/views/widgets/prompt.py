"""The line at the bottom: a filter, or a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.widgets import Input

if TYPE_CHECKING:
    from textual.suggester import Suggester
    from textual.widget import Widget

    from memconsole.views.widgets.table import VirtualTable


class Prompt(Input):
    """One line to type on; Tab completes, up and down bring former commands back, Escape leaves things as they were."""

    DEFAULT_CSS = """
    Prompt { height: 1; border: none; padding: 0 1; background: $panel; display: none; }
    Prompt { layer: prompt; dock: bottom; margin-bottom: 1; }
    Prompt:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Go", id="prompt-enter"),
        Binding("escape", "cancel", "Cancel", id="prompt-cancel"),
        Binding("tab", "cursor_right", "Complete", id="prompt-complete"),
        Binding("up", "recall(-1)", "Former line", show=False, id="prompt-up"),
        Binding("down", "recall(1)", "Next line", show=False, id="prompt-down"),
    ]

    def __init__(self, completion: Suggester) -> None:
        super().__init__(id="prompt", select_on_focus=False)
        self.table: VirtualTable | None = None
        self._completion = completion
        self._before = ""
        self._back_to: Widget | None = None
        self._history: list[str] = []
        self._at = 0

    def ask(self, table: VirtualTable | None, value: str = "") -> None:
        """Ask for a table's filter, or with None for a command; ``value`` is there to begin with."""
        self.table = table
        self.suggester = self._completion if table is None else None
        self.placeholder = (
            "web   state:mapped   !paused" if table else "reserve web 64M   guest start a   pfn web   audit"
        )
        self._before = value
        self._at = len(self._history)
        if self.screen.focused is not self:
            self._back_to = self.screen.focused
        self._write(value)
        self.display = True
        self.screen.set_focus(self, scroll_visible=False)

    def leave(self) -> None:
        """Hide, and give the keys back."""
        if self.table is None and self.value.strip():
            self._history.append(self.value)
        self.display = False
        if self._back_to is not None:
            self.screen.set_focus(self._back_to, scroll_visible=False)

    def action_cancel(self) -> None:
        """Leave things as they were."""
        if self.table is not None:
            self.table.set_filter(self._before)
        self.value = ""
        self.leave()

    def action_recall(self, by: int) -> None:
        """Bring a former command back."""
        if self.table is None and self._history:
            self._at = min(max(self._at + by, 0), len(self._history))
            self._write(self._history[self._at] if self._at < len(self._history) else "")

    def _write(self, value: str) -> None:
        self.value = value
        self.cursor_position = len(value)
