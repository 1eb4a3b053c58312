"""The line at the bottom: a filter, or a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual.binding import BindingType
from textual.message import Message
from textual.suggester import Suggester

from memconsole import where
from memconsole.views.bound import bound
from memconsole.views.completing import Completion, Completions
from memconsole.views.remembering import Memory
from memconsole.views.widgets.hinted import Hinted

if TYPE_CHECKING:
    from textual.widget import Widget

    from memconsole.views.widgets.table import VirtualTable

Complete = Callable[[str], Completions]


class FirstWord(Suggester):
    """Suggests the first of the completions, behind the cursor."""

    def __init__(self, complete: Complete) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._complete = complete

    async def get_suggestion(self, value: str) -> str | None:
        """The line with its last word completed, or None."""
        found = self._complete(value)
        lines = (found.line(number) for number in range(len(found.words)))
        return next((each for each in lines if each.startswith(value) and each != value), None)


class Prompt(Hinted):
    """One line to type on. Tab and shift+Tab go through its completions, up and down through former lines that have
    what was typed in them; Escape leaves things as they were.
    """

    DEFAULT_CSS = """
    Prompt { height: 1; border: none; padding: 0 1; background: $panel; display: none; }
    Prompt { layer: prompt; dock: bottom; margin-bottom: 1; }
    Prompt:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("prompt-enter", "submit", "Go"),
        bound("prompt-cancel", "cancel", "Cancel"),
        bound("prompt-complete", "complete(1)", "Complete"),
        bound("prompt-complete-back", "complete(-1)", "Complete with the word before", show=False),
        bound("prompt-up", "recall(1)", "Former line", show=False),
        bound("prompt-search", "recall(1)", "Search former lines", show=False),
        bound("prompt-down", "recall(-1)", "Next line", show=False),
    ]

    class Helped(Message):
        """Other completions, or another one of them, stand to be shown; None: the prompt was left."""

        def __init__(self, found: Completions | None, at: int | None = None) -> None:
            super().__init__()
            self.found = found
            self.at = at

    def __init__(self, complete: Complete, memory: Memory) -> None:
        super().__init__(id="prompt", select_on_focus=False)
        self.table: VirtualTable | None = None
        self._complete_command = complete
        self._memory = memory
        self._before = ""
        self._back_to: Widget | None = None
        self._found = Completions("", ())
        self._found_for = ""
        self._at: int | None = None
        self._written: str | None = None
        """What the prompt itself wrote last, by a completion or a former line: that begins no new search."""
        self._recalled: list[str] = []
        self._recall_at = 0

    def ask(self, table: VirtualTable | None, value: str = "", *, again: bool = False) -> None:
        """Ask for a table's filter, or with None for a command; ``value`` is there to begin with.

        With ``again`` it is to be corrected: Escape still leaves what was before it was asked for first.
        """
        self.table = table
        self.suggester = FirstWord(self._known)
        self.hint(
            "web   state:mapped   size>1G   !paused   (a | b)"
            if table
            else "reserve web 64M   guest start a   pfn web   audit   handoff check"
        )
        if not again:
            self._before = value
        if self.screen.focused is not self:
            self._back_to = self.screen.focused
        self._write(value)
        self.display = True
        self.screen.set_focus(self, scroll_visible=False)
        self._seek(value)

    def leave(self) -> None:
        """Hide, and give the keys back."""
        if self.table is None:
            self._memory.add_line(self.value)
        self.display = False
        self.post_message(self.Helped(None))
        if self._back_to is not None:
            self.screen.set_focus(self._back_to, scroll_visible=False)

    def action_cancel(self) -> None:
        """Leave things as they were."""
        if self.table is not None:
            self.table.try_filter(self._before)
        self.value = ""
        self.leave()

    # --- completions ------------------------------------------------------------------------------------------------

    def _complete(self, text: str) -> Completions:
        if self.table is None:
            return self._complete_command(text)
        lines = where.completions(text, self.table.table.fields, self.table.rows.items)
        before = text[: max(text.rfind(char) for char in " ()|!") + 1]
        helps = {f"{field.id}:": field.help for field in self.table.table.fields}
        words = (each.removeprefix(before) for each in lines)
        return Completions(before, [Completion(word, helps.get(word, "")) for word in words])

    def _known(self, text: str) -> Completions:
        """The completions of a line, which were mostly looked for already."""
        return self._found if text == self._found_for else self._complete(text)

    def watch_value(self, value: str) -> None:
        """Look for completions of what is typed; what was completed or recalled goes through those there are."""
        if self.is_attached and self.display and value != self._written:
            self._seek(value)

    def _seek(self, text: str) -> None:
        self._written = None
        self._found, self._found_for, self._at = self._complete(text), text, None
        self._recalled, self._recall_at = [], 0
        self.post_message(self.Helped(self._found, None))

    def action_complete(self, by: int) -> None:
        """Complete with the next word, or the one before; a word that is the only one is done with it."""
        if not self._found.words:
            return
        count = len(self._found.words)
        self._at = (0 if by > 0 else count - 1) if self._at is None else (self._at + by) % count
        self._write(self._found.line(self._at))
        self.post_message(self.Helped(self._found, self._at))

    def action_recall(self, by: int) -> None:
        """Bring back a former line that has what was typed in it."""
        if self.table is not None:
            return
        if not self._recalled:
            self._recalled = [self.value, *(each for each in self._memory.find_lines(self.value) if each != self.value)]
        self._recall_at = min(max(self._recall_at + by, 0), len(self._recalled) - 1)
        self._write(self._recalled[self._recall_at])

    def _write(self, value: str) -> None:
        self._written = value
        self.value = value
        self.cursor_position = len(value)
