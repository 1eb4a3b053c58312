"""A macro from its parameters to its end: every step's plan, one step at a time, and what became of it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Static

from memconsole import macro_run, macros, unforeseen
from memconsole.arguments import ActionField, Arg, ArgumentKind
from memconsole.errors import MemconsoleError
from memconsole.macro_run import Decision, StepResult
from memconsole.macros import Macro
from memconsole.model import Danger, Plan
from memconsole.views.bound import bound
from memconsole.views.screens.acting import FieldForm, hanging, plan_lines
from memconsole.views.screens.dialogs import Dialog, Typed
from memconsole.views.widgets.bars import line, plain
from memconsole.views.widgets.facts import Lines

Way = Literal["run", "step"]
"""How a macro is run: all of it, or a step at a time."""


class MacroForm(FieldForm[dict[str, str]]):
    """A macro's parameters, each as the argument that it stands for."""

    def __init__(self, macro: Macro) -> None:
        stands_for = macros.fields_of(macro)
        fields = [
            ActionField(name, _arg(stands_for.get(name), param.help), param.default is None, None)
            for name, param in macro.params.items()
        ]
        given = {name: param.default for name, param in macro.params.items() if param.default is not None}
        super().__init__(f"Macro {macro.name}", fields, given)
        self._macro = macro

    def built(self, texts: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """The values that were given."""
        macro_run.settings_for(self._macro, texts)
        settings = [word for name, value in texts.items() for word in ("--set", f"{name}={value}")]
        return dict(texts), shlex.join(["memconsole", "macro", "run", self._macro.name, *settings])


def _arg(field: ActionField | None, help: str) -> Arg:
    """How a parameter is written: as the argument that it stands for, or as text."""
    if field is None:
        return Arg(ArgumentKind.TEXT, help)
    return Arg(field.arg.kind, help or field.arg.help, choices=field.arg.choices)


def step_lines(results: Sequence[StepResult]) -> list[Content]:
    """Every step with its plan, or with what became of it."""
    lines: list[Content] = []
    for result in results:
        mark, style = _mark(result)
        head = [(f"{result.number:>2} ", "bold $primary"), (mark, style), (result.cli or result.text, "bold")]
        lines.append(line(head))
        notes = [result.note, result.outcome.text if result.outcome is not None else ""]
        lines += [each for note in notes for each in hanging("   ", note, "$text-muted")]
        if result.error:
            lines += hanging("   ", f"{result.code}: {result.error}", "$error")
        if result.ran is not None:
            lines += [line([(f"   {each}", "$text-muted")]) for each in result.ran.text.splitlines()]
        if result.plan is not None:
            lines += [Content("   ") + each for each in plan_lines(result.plan)]
    return lines


def _mark(result: StepResult) -> tuple[str, str]:
    """Whether a step was done, failed or was not begun; nothing for one that is only planned."""
    if result.error:
        return "✖ ", "bold $error"
    if result.skipped:
        return "- not begun: ", "$warning"
    return ("✔ ", "bold $success") if result.outcome is not None or result.ran is not None else ("", "")


class MacroPlan(Dialog[Way]):
    """Every step's plan, as if those before it had been done; a macro that destroys wants its name typed."""

    DEFAULT_CSS = """
    MacroPlan VerticalScroll { height: auto; max-height: 16; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [bound("macro-step", "step", "Step through")]

    class StepsPlanned(Message):
        """The source has planned every step."""

        def __init__(self, results: Sequence[StepResult]) -> None:
            super().__init__()
            self.results = results

    def __init__(self, macro: Macro, given: Mapping[str, str], steps: Collection[int] = ()) -> None:
        super().__init__()
        self._macro = macro
        self._given = given
        self._steps = steps

    def compose(self) -> ComposeResult:
        """The steps, the name to type, the buttons."""
        with Vertical() as box:
            box.border_title = plain(f"Run macro {self._macro.name}").markup
            box.border_subtitle = "ctrl+t: a step at a time"
            yield Static(plain(self._macro.title), classes="-cli")
            with VerticalScroll():
                yield Lines()
            yield Typed("#run")
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button("Step through", id="step", compact=True)
                yield Button("Run", id="run", variant="success", disabled=True, compact=True)

    def on_mount(self) -> None:
        """Ask for the plans."""
        self.query_one(Lines).show_lines([Content.styled("planning…", "$text-muted")])
        self.query_one(VerticalScroll).focus()  # where Enter does nothing: the plan is to be seen before it is answered
        self._ask()

    @work(thread=True, group="plan", exclusive=True, description="plan")
    def _ask(self) -> None:
        source = self.console.source
        planned = unforeseen.attempt(
            "the plan", "console", lambda: list(macro_run.dry_run(self._macro, source, self._given, self._steps))
        )
        if isinstance(planned, MemconsoleError):
            failed = StepResult(0, self._macro.name, error=str(planned), code=planned.code)
            self.post_message(self.StepsPlanned([failed]))
        else:
            self.post_message(self.StepsPlanned(planned))

    def on_macro_plan_steps_planned(self, event: StepsPlanned) -> None:
        """Show the plans; it may be run even if a step is refused now: others may change what it is refused for."""
        self.query_one(Lines).show_lines(step_lines(event.results))
        if macro_run.destroys(event.results):
            self.query_one(Typed).want(self._macro.name, "it destroys: type ", " to run it")
        else:
            self.query_one(Typed).spare()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Run it, step through it, or let it be."""
        if event.button.id in {"run", "step"}:
            self.dismiss(event.button.id)  # type: ignore[arg-type]
        else:
            self.dismiss(None)

    def action_step(self) -> None:
        """A step at a time: each is asked for with its own plan, and its own name where it destroys."""
        self.dismiss("step")


class MacroStepAsked(Dialog[Decision]):
    """One step of a macro with its plan as things are by now: done, left out, or the end of the macro."""

    DEFAULT_CSS = """
    MacroStepAsked VerticalScroll { height: auto; max-height: 14; scrollbar-size-vertical: 1; }
    """

    def __init__(self, title: str, text: str, plan: Plan | None) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._plan = plan
        destroys = plan is not None and plan.danger is Danger.DESTROYS
        self._confirm = (plan.confirm or "yes") if destroys and plan is not None and not plan.refusals else ""

    def compose(self) -> ComposeResult:
        """The step, its plan, the name to type, the buttons."""
        refused = self._plan is not None and bool(self._plan.refusals)
        with Vertical() as box:
            box.border_title = plain(self._title).markup
            yield Static(plain(self._plan.cli if self._plan is not None else self._text), classes="-cli")
            with VerticalScroll():
                yield Lines()
            if self._confirm:
                yield Typed("#do")
            with Horizontal(classes="-buttons"):
                yield Button("Stop here", id="stop", compact=True)
                yield Button("Leave out", id="skip", compact=True)
                yield Button("Do it", id="do", variant="success", disabled=refused or bool(self._confirm), compact=True)

    def on_mount(self) -> None:
        """Show the plan."""
        if self._plan is not None:
            self.query_one(Lines).show_lines(plan_lines(self._plan) or [Content("nothing would change")])
        if self._confirm:
            self.query_one(Typed).want(self._confirm)
        else:
            do = self.query_one("#do", Button)
            (self.query_one("#skip", Button) if do.disabled else do).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do it, leave it out, or stop."""
        self.dismiss(cast("Decision", event.button.id))

    def action_cancel(self) -> None:
        """Escape ends the macro here."""
        self.dismiss("stop")


class MacroEnd(Dialog[bool]):
    """What became of every step of a macro that did not come to its end, and the rest of it, to be run again."""

    DEFAULT_CSS = "MacroEnd VerticalScroll { height: auto; max-height: 18; scrollbar-size-vertical: 1; }"

    def __init__(self, title: str, results: Sequence[StepResult], again: str) -> None:
        super().__init__()
        self._title = title
        self._results = results
        self._again = again

    def compose(self) -> ComposeResult:
        """The steps, the command that runs the rest, the buttons."""
        with Vertical() as box:
            box.border_title = plain(self._title).markup
            with VerticalScroll():
                yield Lines()
            if self._again:
                yield Static(line([("the rest: $ ", "$success"), (self._again, "$text-muted")]), classes="-cli")
            with Horizontal(classes="-buttons"):
                yield Button("Close", id="close", compact=True)
                if self._again:
                    yield Button("Run the rest again", id="again", variant="warning", compact=True)

    def on_mount(self) -> None:
        """Show what became of the steps."""
        self.query_one(Lines).show_lines(step_lines(self._results))
        self.query_one("#close", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Close, or plan the rest."""
        self.dismiss(event.button.id == "again")
