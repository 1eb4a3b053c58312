"""What a command said, and the lines that sessions did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from memconsole.commandlog import CommandLine
from memconsole.units import format_time
from memconsole.views.bound import bound
from memconsole.views.screens.dialogs import Dialog
from memconsole.views.widgets.bars import line, plain
from memconsole.views.widgets.facts import Lines

SHOWN = 5000
"""Lines of a command's text that are shown; copying has them all."""


class Output(Dialog[None]):
    """The text that a command wrote."""

    DEFAULT_CSS = "Output > Vertical { width: 96%; height: 94%; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("output-copy", "copy", "Copy"),
        bound("output-close", "cancel", "Close", show=False),
    ]

    def __init__(self, title: str, text: str, code: int) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._code = code

    def compose(self) -> ComposeResult:
        """The text."""
        with Vertical() as box:
            box.border_title = plain(self._title).markup
            box.border_subtitle = f"exit code {self._code}   c: copy   Escape: close"
            with VerticalScroll():
                yield Lines()

    def on_mount(self) -> None:
        """Write the lines."""
        found = self._text.splitlines() or ["it said nothing"]
        lines = [plain(each) for each in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(line([(f"{len(found) - SHOWN:,} more lines: c copies them all", "$text-muted")]))
        self.query_one(Lines).show_lines(lines)
        self.query_one(VerticalScroll).focus()

    def action_copy(self) -> None:
        """Copy the text (OSC 52)."""
        self.app.copy_to_clipboard(self._text)
        self.notify(f"{len(self._text.splitlines()):,} lines", title="Copied", timeout=2, markup=False)


class Said(Dialog[tuple[str, Sequence[CommandLine]]]):
    """The command lines that were done, the last one first; ``("line", ...)`` takes one up again, ``("macro", ...)``
    makes a macro of the marked ones, in the order they were done, or of all of this session.
    """

    DEFAULT_CSS = """
    Said > Vertical { width: 96%; height: 94%; }
    Said OptionList, Said OptionList:focus { border: none; height: 1fr; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("said-take", "take", "Type it again", priority=True),
        bound("said-mark", "mark", "Mark"),
        bound("said-macro", "macro", "Make a macro"),
        bound("said-copy", "copy", "Copy"),
    ]

    def __init__(self, lines: Sequence[CommandLine], session: str) -> None:
        super().__init__()
        self._lines = list(reversed(lines))
        self._session = session
        self._marked: set[int] = set()

    def compose(self) -> ComposeResult:
        """A line each."""
        with Vertical() as box:
            box.border_title = "Command lines"
            box.border_subtitle = "enter: type it again   space: mark   m: make a macro   c: copy"
            yield OptionList(*(Option(self._shown(number)) for number in range(len(self._lines))))

    def on_mount(self) -> None:
        """Begin at the last one."""
        self.query_one(OptionList).highlighted = 0 if self._lines else None

    def _shown(self, number: int) -> Content:
        each = self._lines[number]
        now = "this session" if each.session == self._session else each.session
        return line(
            [
                ("■ " if number in self._marked else "  ", "bold $accent"),
                (f"{format_time(each.at_ns)[:19]} {now:<18} ", "$text-muted"),
                ("✔ " if each.code == 0 else f"✖{each.code} ", "$success" if each.code == 0 else "$error"),
                (each.line, ""),
            ]
        )

    @property
    def _at(self) -> int | None:
        return self.query_one(OptionList).highlighted

    def action_mark(self) -> None:
        """Mark the line, or no longer, and go to the next one."""
        at = self._at
        if at is not None:
            self._marked ^= {at}
            options = self.query_one(OptionList)
            options.replace_option_prompt_at_index(at, self._shown(at))
            options.action_cursor_down()

    @property
    def _chosen(self) -> list[CommandLine]:
        """The marked lines, else those of this session, in the order they were done."""
        own = [number for number, each in enumerate(self._lines) if each.session == self._session]
        return [self._lines[number] for number in sorted(self._marked or own, reverse=True)]

    def action_take(self) -> None:
        """Take the line up again."""
        if self._at is not None:
            self.dismiss(("line", [self._lines[self._at]]))

    def action_macro(self) -> None:
        """Make a macro."""
        if self._chosen:
            self.dismiss(("macro", self._chosen))

    def action_copy(self) -> None:
        """Copy the marked lines, or those of this session (OSC 52)."""
        text = "\n".join(each.line for each in self._chosen)
        if text:
            self.app.copy_to_clipboard(text)
            self.notify(f"{len(self._chosen):,} lines", title="Copied", timeout=2, markup=False)
