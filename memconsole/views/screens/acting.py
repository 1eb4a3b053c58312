"""The way of an Action: a form for its arguments, then its plan, then a yes (and a typed name where it destroys)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widgets import Button, Input, Label, Select, Static

from memconsole import actions
from memconsole.actions import Action, Field, Kind
from memconsole.errors import MemconsoleError
from memconsole.model import Danger, Plan, Refusal, Snapshot
from memconsole.views.screens.dialogs import Dialog
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines

if TYPE_CHECKING:
    from memconsole.views.app import ConsoleApp

Answer = Literal["apply", "options"]
WIDTH = 70
"""Cells of a dialog's text."""


def names_of(kind: Kind, snapshot: Snapshot | None) -> list[str]:
    """What exists of a kind of argument, to complete from."""
    if snapshot is None:
        return []
    return {
        Kind.REGION: [region.name for region in snapshot.regions],
        Kind.GUEST: [guest.name for guest in snapshot.guests],
        Kind.GRANT: [grant.id for grant in snapshot.grants],
        Kind.WINDOW: [window.id for window in snapshot.windows],
        Kind.BDF: [device.bdf for device in snapshot.devices],
    }.get(kind, [])


class Form(Dialog[Action]):
    """The arguments of an action, each checked as it is typed, and the command that does the same."""

    DEFAULT_CSS = """
    Form VerticalScroll { height: auto; max-height: 16; scrollbar-size-vertical: 1; }
    Form .-row { height: 1; }
    Form .-row Label { width: 13; color: $secondary; }
    Form .-row Input, Form .-row Select { width: 26; }
    Form .-row Select { height: 1; }
    Form .-row Select SelectCurrent { background: $panel; }
    Form .-row .-help { width: 1fr; margin: 0 0 0 1; color: $text-muted; }
    Form .-row.-bad .-help { color: $error; }
    Form .-cli { margin: 1 0 0 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "submit", "Go on", id="form-submit"),
        Binding("down", "app.focus_next", show=False, id="form-next"),
        Binding("up", "app.focus_previous", show=False, id="form-previous"),
    ]

    def __init__(self, cls: type[Action], given: Mapping[str, str]) -> None:
        super().__init__()
        self._cls = cls
        self._fields = actions.fields(cls)
        self._given = given

    @property
    def console(self) -> ConsoleApp:
        """The app."""
        return cast("ConsoleApp", self.app)

    def compose(self) -> ComposeResult:
        """A row for each argument: its name, its value, what it is."""
        with Vertical() as box:
            box.border_title = self._cls.spec.title
            box.border_subtitle = "Tab: next   Enter: plan it"
            with VerticalScroll(can_focus=False):
                for field in self._fields:
                    with Horizontal(classes="-row", id=f"row-{field.name}"):
                        mark = "*" if field.required else ""
                        yield Label(field.name.replace("_", " ") + mark)
                        yield self._editor(field)
                        yield Static(Content(field.arg.help), classes="-help")
            yield Static(classes="-cli", id="cli")
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button("Plan", id="plan", variant="primary", compact=True)

    def _editor(self, field: Field) -> Input | Select[str]:
        shown = self._given.get(field.name, "")
        if not shown and not field.required and field.default is not None:
            shown = actions.write_value(field, field.default)
        id = f"arg-{field.name}"
        choices = ("no", "yes") if field.arg.kind is Kind.FLAG else field.arg.choices
        if choices:
            return Select([(choice, choice) for choice in choices], value=shown, allow_blank=False, id=id, compact=True)
        names = names_of(field.arg.kind, self.console.snapshot)
        return Input(shown, id=id, compact=True, suggester=SuggestFromList(names) if names else None)

    def on_mount(self) -> None:
        """Begin at the first argument that has no value."""
        empty = next((each for each in self.query(Input) if not each.value), None)
        (empty or self.query_one("#plan", Button)).focus()
        self._check()

    def _texts(self) -> dict[str, str]:
        """What was written, without what was left out."""
        texts = {}
        for field in self._fields:
            editor = self.query_one(f"#arg-{field.name}")
            text = str(editor.value).strip() if isinstance(editor, Input | Select) else ""
            if text:
                texts[field.name] = text
        return texts

    def _check(self) -> Action | None:
        """The Action as it stands; wrong arguments say why in their row."""
        texts = self._texts()
        for field in self._fields:
            row = self.query_one(f"#row-{field.name}")
            why = ""
            if field.name in texts:
                try:
                    actions.read_value(field, texts[field.name])
                except MemconsoleError as error:
                    why = error.remedy or error.what
            row.set_class(bool(why), "-bad")
            row.query_one(".-help", Static).update(Content(f"✖ {why}" if why else field.arg.help))
        cli = self.query_one("#cli", Static)
        try:
            action = actions.build(self._cls.spec.id, texts)
        except MemconsoleError as error:
            cli.update(line([("✖ ", "$error"), (error.what, "$text-muted")]))
            return None
        cli.update(line([("$ ", "$success"), (actions.cli_form(action), "$text-muted")]))
        return action

    def on_input_changed(self) -> None:
        """Check as one types."""
        self._check()

    def on_select_changed(self) -> None:
        """Likewise."""
        self._check()

    def on_input_submitted(self) -> None:
        """Enter plans it."""
        self.action_submit()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Plan or cancel."""
        if event.button.id == "plan":
            self.action_submit()
        else:
            self.dismiss(None)

    def action_submit(self) -> None:
        """Go on to the plan, or to the first argument that is missing or wrong."""
        action = self._check()
        if action is not None:
            self.dismiss(action)
            return
        texts = self._texts()
        bad = [f.name for f in self._fields if self.query_one(f"#row-{f.name}").has_class("-bad")]
        missing = [field.name for field in self._fields if field.required and field.name not in texts]
        for name in (*bad, *missing):
            self.query_one(f"#arg-{name}").focus()
            return


def plan_lines(plan: Plan) -> list[Content]:
    """A plan in lines: its effects in order with their undo, or the refusals with their remedies."""
    lines: list[Content] = []
    for refusal in plan.refusals:
        lines += _hanging("✖ ", f"{refusal.code}: {refusal.what}", "bold $error")
        lines += _hanging("  ", refusal.why, "$text-muted")
        lines += _hanging("  ▸ ", refusal.remedy, "")
    for number, effect in enumerate(plan.effects, 1):
        lines += _hanging(f"{number:>2} ", effect.text, "$text-disabled" if plan.refusals else "")
        lines += _hanging("   undo: ", effect.undo, "$text-muted")
    return lines


def _hanging(lead: str, text: str, style: str) -> list[Content]:
    """Text behind a lead, its further lines below its first one; nothing for no text."""
    wrapped = textwrap.wrap(text, WIDTH - len(lead))
    leads = [lead] + [" " * len(lead)] * len(wrapped)
    return [line([(before, "bold $primary"), (part, style)]) for before, part in zip(leads, wrapped, strict=False)]


class Confirmation(Dialog[Answer]):
    """What an Action would do, in order; it is applied only from here.

    The plan is asked for in a thread. An action that destroys wants the name typed; one that is refused stays undone.
    """

    DEFAULT_CSS = """
    Confirmation VerticalScroll { height: auto; max-height: 14; scrollbar-size-vertical: 1; margin: 1 0 0 0; }
    Confirmation #ask { margin: 1 0 0 0; height: auto; }
    Confirmation.-destroys > Vertical { border: round $error; border-title-color: $error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("o", "options", "Options", id="plan-options")]

    class Planned(Message):
        """The source has made its plan."""

        def __init__(self, plan: Plan) -> None:
            super().__init__()
            self.plan = plan

    def __init__(self, action: Action) -> None:
        super().__init__()
        self._action = action
        self._plan: Plan | None = None

    @property
    def console(self) -> ConsoleApp:
        """The app."""
        return cast("ConsoleApp", self.app)

    def compose(self) -> ComposeResult:
        """The command, the plan, the name to type, the buttons."""
        spec = self._action.spec
        destroys = spec.danger is Danger.DESTROYS
        self.set_class(destroys, "-destroys")
        with Vertical() as box:
            box.border_title = f"✖ {spec.title}" if destroys else spec.title
            yield Static(line([("$ ", "$success"), (actions.cli_form(self._action), "$text-muted")]), classes="-cli")
            with VerticalScroll():
                yield Lines()
            yield Static(id="ask")
            yield Input(id="name", disabled=True, compact=True)
            with Horizontal(classes="-buttons"):
                yield Button("Options", id="options", compact=True)
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(
                    "Apply", id="apply", variant="error" if destroys else "success", disabled=True, compact=True
                )

    def on_mount(self) -> None:
        """Ask for the plan."""
        self.query_one("#name").display = False
        self.query_one(Lines).say([Content.styled("planning…", "$text-muted")])
        self.query_one("#cancel", Button).focus()
        self._ask()

    @work(thread=True, group="plan", exclusive=True)
    def _ask(self) -> None:
        source = self.console.source
        try:
            plan = source.plan(self._action)
        except MemconsoleError as error:
            refusal = Refusal(error.code, error.what, error.why, error.remedy)
            plan = Plan(
                self._action.spec.id, actions.cli_form(self._action), self._action.spec.danger, refusals=(refusal,)
            )
        self.post_message(self.Planned(plan))

    def on_confirmation_planned(self, event: Planned) -> None:
        """Show the plan; it may be applied unless it is refused."""
        self._plan = event.plan
        lines = plan_lines(event.plan) or [Content("nothing would change")]
        self.query_one(Lines).say(lines)
        apply, ask = self.query_one("#apply", Button), self.query_one("#ask", Static)
        if event.plan.refusals:
            names = ", ".join(refusal.code for refusal in event.plan.refusals)
            ask.update(line([(f"✖ it cannot be applied: {names}", "bold $error")]))
            apply.tooltip = f"refused: {names}"
            return
        if event.plan.confirm is not None:
            ask.update(line([("type ", ""), (event.plan.confirm, "bold $error"), (" to confirm", "")]))
            name = self.query_one("#name", Input)
            name.display, name.disabled = True, False
            name.focus()
            return
        ask.update("")
        ask.display = False
        apply.disabled = False
        apply.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """The name must be exactly right."""
        self.query_one("#apply", Button).disabled = self._plan is None or event.value != self._plan.confirm

    def on_input_submitted(self) -> None:
        """Enter applies when the name is right."""
        if not self.query_one("#apply", Button).disabled:
            self.dismiss("apply")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Apply, go back to the form, or let it be."""
        if event.button.id == "apply":
            self.dismiss("apply")
        elif event.button.id == "options":
            self.action_options()
        else:
            self.dismiss(None)

    def action_options(self) -> None:
        """Go back to the form."""
        self.dismiss("options")


def given_of(action: Action) -> dict[str, str]:
    """An Action's arguments as a person writes them, for a form to begin with."""
    return {
        field.name: actions.write_value(field, value)
        for field in actions.fields(type(action))
        if (value := getattr(action, field.name)) is not None
    }


def missing_of(cls: type[Action], given: Mapping[str, str]) -> Sequence[str]:
    """The arguments an action still needs."""
    return [field.name for field in actions.fields(cls) if field.required and field.name not in given]
