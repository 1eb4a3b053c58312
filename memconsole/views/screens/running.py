"""A macro before it runs: its parameters, then every step's plan; it runs only from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Input, Label, Static

from memconsole import macros
from memconsole.macros import Macro, StepResult
from memconsole.model import Danger
from memconsole.views.screens.acting import plan_lines
from memconsole.views.screens.dialogs import Dialog
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines

if TYPE_CHECKING:
    from memconsole.views.app import ConsoleApp


class MacroForm(Dialog[dict[str, str]]):
    """A macro's parameters."""

    DEFAULT_CSS = """
    MacroForm .-row { height: 1; }
    MacroForm .-row Label { width: 13; color: $secondary; }
    MacroForm .-row Input { width: 26; }
    MacroForm .-row .-help { width: 1fr; margin: 0 0 0 1; color: $text-muted; }
    """

    def __init__(self, macro: Macro) -> None:
        super().__init__()
        self._macro = macro

    def compose(self) -> ComposeResult:
        """A row for each parameter."""
        with Vertical() as box:
            box.border_title = f"Macro {self._macro.name}"
            yield Static(Content(self._macro.title), classes="-cli")
            for index, (name, param) in enumerate(self._macro.params.items()):
                with Horizontal(classes="-row"):
                    yield Label(Content(name + ("*" if param.default is None else "")))
                    yield Input(param.default or "", id=f"param-{index}", compact=True)
                    yield Static(Content(param.help), classes="-help")
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button("Plan", id="plan", variant="primary", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Plan or cancel."""
        if event.button.id == "plan":
            self.on_input_submitted()
        else:
            self.dismiss(None)

    def on_input_submitted(self) -> None:
        """Go on, or to the first parameter that is missing."""
        given = {}
        for index, (name, param) in enumerate(self._macro.params.items()):
            editor = self.query_one(f"#param-{index}", Input)
            if editor.value:
                given[name] = editor.value
            elif param.default is None:
                editor.focus()
                return
        self.dismiss(given)


def step_lines(results: Sequence[StepResult]) -> list[Content]:
    """Every step with its plan, or why it has none."""
    lines: list[Content] = []
    for result in results:
        lines.append(line([(f"{result.number:>2} ", "bold $primary"), (result.cli or result.text, "bold")]))
        if result.note:
            lines.append(line([(f"   {result.note}", "$text-muted")]))
        if result.error:
            lines.append(line([(f"   ✖ {result.code}: {result.error}", "$error")]))
        if result.plan is not None:
            lines += [Content("   ") + each for each in plan_lines(result.plan)]
    return lines


class MacroPlan(Dialog[bool]):
    """Every step's plan as things are now; a macro that destroys wants its name typed."""

    DEFAULT_CSS = """
    MacroPlan VerticalScroll { height: auto; max-height: 16; scrollbar-size-vertical: 1; }
    MacroPlan #ask { height: auto; margin: 1 0 0 0; }
    """

    class Planned(Message):
        """The source has planned every step."""

        def __init__(self, results: Sequence[StepResult]) -> None:
            super().__init__()
            self.results = results

    def __init__(self, macro: Macro, given: Mapping[str, str]) -> None:
        super().__init__()
        self._macro = macro
        self._given = given

    def compose(self) -> ComposeResult:
        """The steps, the name to type, the buttons."""
        with Vertical() as box:
            box.border_title = f"Run macro {self._macro.name}"
            yield Static(Content(self._macro.title), classes="-cli")
            with VerticalScroll():
                yield Lines()
            yield Static(id="ask")
            yield Input(id="name", disabled=True, compact=True)
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button("Run", id="run", variant="success", disabled=True, compact=True)

    def on_mount(self) -> None:
        """Ask for the plans."""
        self.query_one("#name").display = False
        self.query_one("#ask").display = False
        self.query_one(Lines).say([Content.styled("planning…", "$text-muted")])
        self._ask()

    @work(thread=True, group="plan", exclusive=True)
    def _ask(self) -> None:
        source = cast("ConsoleApp", self.app).source
        self.post_message(self.Planned(list(macros.dry_run(self._macro, source, self._given))))

    def on_macro_plan_planned(self, event: Planned) -> None:
        """Show the plans; it may be run even if a step is refused now, as an earlier one may lift that."""
        self.query_one(Lines).say(step_lines(event.results))
        run = self.query_one("#run", Button)
        if any(result.plan is not None and result.plan.danger is Danger.DESTROYS for result in event.results):
            ask, name = self.query_one("#ask", Static), self.query_one("#name", Input)
            ask.update(line([("it destroys: type ", ""), (self._macro.name, "bold $error"), (" to run it", "")]))
            ask.display = name.display = True
            name.disabled = False
            name.focus()
        else:
            run.disabled = False
            run.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """The name must be exactly right."""
        self.query_one("#run", Button).disabled = event.value != self._macro.name

    def on_input_submitted(self) -> None:
        """Enter runs it when the name is right."""
        if not self.query_one("#run", Button).disabled:
            self.dismiss(True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Run it or let it be."""
        self.dismiss(event.button.id == "run")
