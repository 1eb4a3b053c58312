"""Small dialogs: which column to sort by, which columns to show, yes or no, a name, and the keys that work here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, SelectionList, Static
from textual.widgets.option_list import Option

from memconsole.fields import Field
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.table import fit

Result = TypeVar("Result")


class Dialog(ModalScreen[Result], Generic[Result]):
    """The base of dialogs: a box in the middle that Escape closes without a result."""

    AUTO_FOCUS = "*"

    DEFAULT_CSS = """
    Dialog { align: center middle; background: $background 60%; }
    Dialog:ansi { background: ansi_default; }
    Dialog > Vertical {
        width: 76; max-width: 96%; height: auto; max-height: 94%; padding: 0 1;
        border: round $primary; border-title-style: bold; border-title-color: $primary; background: $surface;
    }
    Dialog Input { background: $panel; }
    Dialog Input:focus { background: $block-cursor-background; }
    Dialog .-buttons { height: 1; margin: 1 0 0 0; align-horizontal: right; }
    Dialog .-buttons Button { margin: 0 0 0 2; min-width: 12; }
    Dialog Button:focus { text-style: bold reverse; }
    Dialog .-why { color: $error; height: auto; }
    Dialog .-cli { color: $text-muted; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Close", id="dialog-close")]

    def action_cancel(self) -> None:
        """Close without a result."""
        self.dismiss(None)


class Pick(Dialog[str]):
    """One of several."""

    DEFAULT_CSS = """
    Pick > Vertical { width: 64; }
    Pick OptionList, Pick OptionList:focus { border: none; height: auto; background: $surface; }
    """

    def __init__(self, title: str, options: Sequence[tuple[str, str]], current: str = "") -> None:
        super().__init__()
        self._title = title
        self._options = options
        self._current = current

    def compose(self) -> ComposeResult:
        """The options."""
        with Vertical() as box:
            box.border_title = self._title
            yield OptionList(*(Option(Content(prompt), id=id) for id, prompt in self._options))

    def on_mount(self) -> None:
        """Begin at the present one."""
        ids = [id for id, _ in self._options]
        self.query_one(OptionList).highlighted = ids.index(self._current) if self._current in ids else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take it."""
        self.dismiss(event.option.id)


class Columns(Dialog[list[str]]):
    """Which fields of a table to show."""

    DEFAULT_CSS = """
    Columns SelectionList, Columns SelectionList:focus {
        border: none; height: auto; max-height: 18; background: $surface;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "take", "Show these", id="columns-take", priority=True)]

    def __init__(self, fields: Sequence[Field], shown: Sequence[Field]) -> None:
        super().__init__()
        self._fields = fields
        self._shown = shown

    def compose(self) -> ComposeResult:
        """A box for each field; the first is the row's name and always shown."""
        with Vertical() as box:
            box.border_title = "Columns"
            box.border_subtitle = "space: show or hide   enter: done"
            yield SelectionList[str](
                *(
                    (Content(f"{field.title:<12} {field.help}"), field.id, field in self._shown)
                    for field in self._fields[1:]
                )
            )

    def action_take(self) -> None:
        """Show what is ticked."""
        self.dismiss([self._fields[0].id, *self.query_one(SelectionList).selected])


class Confirm(Dialog[bool]):
    """Yes or no, to some lines of text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", id="confirm-yes"),
        Binding("n", "answer(False)", "No", id="confirm-no"),
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    def __init__(self, title: str, lines: Sequence[str], yes: str) -> None:
        super().__init__()
        self._title = title
        self._lines = lines
        self._yes = yes

    def compose(self) -> ComposeResult:
        """The question; No has the focus."""
        with Vertical() as box:
            box.border_title = self._title
            box.border_subtitle = "y: yes   n: no"
            yield Static(Content("\n".join(self._lines)))
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="no", compact=True)
                yield Button(self._yes, id="yes", variant="error", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer."""
        self.action_answer(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Answer."""
        self.dismiss(yes)


class AskName(Dialog[str]):
    """A name for something new; what is typed is checked by ``allowed``."""

    def __init__(self, title: str, help: str) -> None:
        super().__init__()
        self._title = title
        self._help = help

    def compose(self) -> ComposeResult:
        """One line to type on."""
        with Vertical() as box:
            box.border_title = self._title
            yield Static(Content(self._help), classes="-cli")
            yield Input(compact=True, restrict=r"[A-Za-z0-9._-]*", max_length=54)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take it, unless it is empty."""
        if event.value.strip("._-"):
            self.dismiss(event.value)


class KeyHelp(NamedTuple):
    """One line of help: the keys, what they do, why not here (if so), and the id by which they are remapped."""

    keys: str
    text: str
    why: str
    id: str


class Help(Dialog[None]):
    """The keys that work here, where they come from, and why some do not."""

    DEFAULT_CSS = "Help > Vertical { width: 76; height: 94%; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,q", "cancel", "Close", show=False, id="help-close"),
    ]

    def __init__(self, groups: Sequence[tuple[str, Sequence[KeyHelp]]]) -> None:
        super().__init__()
        self._groups = groups

    def compose(self) -> ComposeResult:
        """A heading for each place, a line for each key: keys, what they do, why not."""
        with Vertical() as box:
            box.border_title = "Keys that work here"
            box.border_subtitle = "the word at the right remaps a key in console.toml   Escape closes"
            with VerticalScroll():
                yield Lines()

    def on_mount(self) -> None:
        """Write the lines."""
        lines: list[Content] = []
        for title, keys in self._groups:
            lines += [Content("")] * bool(lines) + [Content.styled(title, "bold $primary")]
            for key in keys:
                style = "$text-disabled" if key.why else ""
                parts = [
                    (f"  {key.keys:<12} ", "bold $accent"),
                    (fit(key.text, 40), style),
                    (f" {key.id}", "$text-muted"),
                ]
                lines.append(line(parts))
                if key.why:
                    lines.append(line([(" " * 15 + f"✖ {key.why}", "$warning")]))
        lines += [
            Content(""),
            Content.styled("Marks", "bold $primary"),
            line(
                [
                    ("  +  ", "bold $accent"),
                    ("new since the last refresh     ", ""),
                    ("•", "bold $accent"),
                    ("  changed", ""),
                ]
            ),
            line(
                [
                    ("  ↑ ↓", "bold $accent"),
                    ("  rose, fell                   ", ""),
                    ("▸", "$primary"),
                    ("  the cursor", ""),
                ]
            ),
            Content(""),
            Content.styled("Filter", "bold $primary"),
            Content("  web           in any shown column      size:64M   in one field"),
            Content("  !paused       rows without it          several words: all of them"),
        ]
        self.query_one(Lines).say(lines)
