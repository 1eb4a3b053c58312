"""Small dialogs: one of several, yes or no, a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar, cast

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static
from textual.widgets.option_list import Option

from memconsole.views.bound import bound
from memconsole.views.console import Console
from memconsole.views.widgets.bars import line, plain

Result = TypeVar("Result")


class Dialog(ModalScreen[Result], Generic[Result]):
    """The base of dialogs: a box in the middle that Escape closes without a result."""

    AUTO_FOCUS = "*"

    DEFAULT_CSS = """
    Dialog { align: center middle; background: transparent; }
    Dialog > Vertical {
        width: 76; max-width: 96%; height: auto; max-height: 94%; padding: 0 1;
        border: round $primary; border-title-style: bold; border-title-color: $primary; background: $surface;
        border-subtitle-color: $text-muted;
    }
    Dialog Input { background: $panel; }
    Dialog Input:focus { background: $block-cursor-background; }
    Dialog .-buttons { height: 1; margin: 1 0 0 0; align-horizontal: right; }
    Dialog .-buttons Button { margin: 0 0 0 2; min-width: 12; }
    Dialog Button:focus { text-style: bold reverse; }
    Dialog Button:disabled {
        opacity: 1 !important; text-opacity: 1 !important; color: $text-disabled !important;
        background: $panel !important;
    }
    Dialog .-why { color: $error; height: auto; }
    Dialog .-cli { color: $text-muted; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [bound("dialog-close", "cancel", "Close")]

    @property
    def console(self) -> Console:
        """The app."""
        return cast("Console", self.app)

    def action_cancel(self) -> None:
        """Close without a result."""
        self.dismiss(None)


class Typed(Vertical):
    """What has to be typed, exactly, before a button of the dialog works; Enter then presses it.

    Nothing is asked for until :meth:`want`; with ``ahead`` one may type before that.
    """

    DEFAULT_CSS = "Typed { height: auto; } Typed Static { margin: 1 0 0 0; height: auto; }"

    def __init__(self, button: str, *, ahead: bool = False) -> None:
        super().__init__()
        self._button = button
        self._ahead = ahead
        self._word: str | None = None
        self._spared = False

    def compose(self) -> ComposeResult:
        """What is asked, and the line to type on."""
        yield Static(id="ask")
        yield Input(id="typed", compact=True)

    def on_mount(self) -> None:
        """Ask for nothing yet."""
        self.query_one("#ask").display = False
        self.query_one("#typed").display = self._ahead
        if self._ahead:
            self.query_one("#typed").focus()

    def want(self, word: str, lead: str = "type ", after: str = " to confirm") -> None:
        """Ask for a word, between what is said before it and after it."""
        self._word = word
        self.say(line([(lead, ""), (word, "bold $error"), (after, "")]))
        typed = self.query_one("#typed", Input)
        typed.display = True
        typed.focus()
        self._judge(typed.value)

    def say(self, text: Content) -> None:
        """Show a text, and nothing to type on."""
        ask = self.query_one("#ask", Static)
        ask.update(text)
        ask.display = True
        self.query_one("#typed").display = False

    def spare(self) -> None:
        """Ask for nothing: the button works."""
        self._spared = True
        self.query_one("#typed").display = False
        button = self.screen.query_one(self._button, Button)
        button.disabled = False
        button.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """The word must be exactly right."""
        event.stop()
        self._judge(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter presses the button once it works."""
        event.stop()
        button = self.screen.query_one(self._button, Button)
        if not button.disabled:
            button.press()

    def _judge(self, typed: str) -> None:
        self.screen.query_one(self._button, Button).disabled = not self._spared and typed.strip() != self._word


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
            yield OptionList(*(Option(plain(prompt), id=id) for id, prompt in self._options))

    def on_mount(self) -> None:
        """Begin at the present one."""
        ids = [id for id, _ in self._options]
        self.query_one(OptionList).highlighted = ids.index(self._current) if self._current in ids else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take it."""
        self.dismiss(event.option.id)


class Confirm(Dialog[bool]):
    """Yes or no, to some lines of text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bound("confirm-yes", "answer(True)", "Yes"),
        bound("confirm-no", "answer(False)", "No"),
        bound("confirm-left", "app.focus_previous", show=False),
        bound("confirm-right", "app.focus_next", show=False),
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
            yield Static(plain("\n".join(self._lines)))
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
            yield Static(plain(self._help), classes="-cli")
            yield Input(compact=True, restrict=r"[A-Za-z0-9._-]*", max_length=54)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take it, unless it is empty."""
        if event.value.strip("._-"):
            self.dismiss(event.value)
