"""The way of an Action: a form for its arguments, then its plan, then a yes (and a typed name where it destroys)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, Literal

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widgets import Button, Input, Label, Select, Static

from memconsole import action_input, actions, bulk
from memconsole.actions import Action
from memconsole.arguments import ActionField, ArgumentKind, read_value, write_value
from memconsole.errors import MemconsoleError
from memconsole.model import Danger, Plan
from memconsole.views.bound import bound
from memconsole.views.completing import names_of
from memconsole.views.screens.dialogs import Dialog, Result, Typed
from memconsole.views.widgets.bars import line, plain
from memconsole.views.widgets.facts import Lines

Answer = Literal["apply", "options"]
WIDTH = 70
"""Cells of a dialog's text."""


class FieldForm(Dialog[Result], Generic[Result]):
    """Fields to fill in, each checked and completed as it is typed, and the command that does the same.

    Ctrl+s, Enter and the button go on; Up, Down and Tab go from one to the next. What is made of the texts, and of what
    other forms there are, is :meth:`built`.
    """

    DEFAULT_CSS = """
    FieldForm VerticalScroll { height: auto; max-height: 16; scrollbar-size-vertical: 1; }
    FieldForm .-row { height: auto; }
    FieldForm .-row Label { width: 13; color: $secondary; }
    FieldForm .-row Input, FieldForm .-row Select { width: 26; }
    FieldForm .-row Select { height: 1; }
    FieldForm .-row Select SelectCurrent { background: $panel; }
    FieldForm .-row .-help { width: 1fr; margin: 0 0 0 1; color: $text-muted; }
    FieldForm .-row.-bad .-help { color: $error; }
    FieldForm .-cli { margin: 1 0 0 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("form-submit", "submit", "Apply"),
        bound("form-next", "app.focus_next", show=False),
        bound("form-previous", "app.focus_previous", show=False),
    ]

    def __init__(self, title: str, fields: Sequence[ActionField], given: Mapping[str, str]) -> None:
        super().__init__()
        self._title = title
        self._fields = fields
        self._given = given
        self._ids = [field.name if field.name.isidentifier() else str(number) for number, field in enumerate(fields)]

    def built(self, texts: Mapping[str, str]) -> tuple[Result, str]:
        """What the texts make, and the command that does the same.

        Raises:
            MemconsoleError: they make nothing.
        """
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        """A row for each field: its name, its value, what it is."""
        with Vertical() as box:
            box.border_title = plain(self._title).markup
            box.border_subtitle = "Tab: next   Enter: plan it"
            with VerticalScroll(can_focus=False):
                for id, field in zip(self._ids, self._fields, strict=True):
                    with Horizontal(classes="-row", id=f"row-{id}"):
                        mark = "*" if field.required else ""
                        yield Label(plain(field.name.replace("_", " ") + mark))
                        yield self._editor(f"arg-{id}", field)
                        yield Static(plain(field.arg.help), classes="-help")
            yield Static(classes="-cli", id="cli")
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button("Plan", id="plan", variant="primary", compact=True)

    def _editor(self, id: str, field: ActionField) -> Input | Select[str]:
        shown = self._given.get(field.name, "")
        if not shown and not field.required and field.default is not None:
            shown = write_value(field, field.default)
        choices = ("no", "yes") if field.arg.kind is ArgumentKind.FLAG else field.arg.choices
        if choices and shown in choices:
            return Select([(choice, choice) for choice in choices], value=shown, allow_blank=False, id=id, compact=True)
        names = [*choices, *names_of(field.arg.kind, self.console.snapshot)]
        return Input(shown, id=id, compact=True, suggester=SuggestFromList(names) if names else None)

    def on_mount(self) -> None:
        """Begin at the first field that has no value."""
        empty = next((each for each in self.query(Input) if not each.value), None)
        (empty or self.query_one("#plan", Button)).focus()
        self._check()

    def _texts(self) -> dict[str, str]:
        """What was written, without what was left out."""
        texts = {}
        for id, field in zip(self._ids, self._fields, strict=True):
            editor = self.query_one(f"#arg-{id}")
            text = str(editor.value).strip() if isinstance(editor, Input | Select) else ""
            if text:
                texts[field.name] = text
        return texts

    def _check(self) -> Result | None:
        """What the texts make as they stand; wrong ones say why in their row."""
        texts = self._texts()
        for id, field in zip(self._ids, self._fields, strict=True):
            row = self.query_one(f"#row-{id}")
            why = ""
            if field.name in texts:
                try:
                    read_value(field, texts[field.name])
                except MemconsoleError as error:
                    why = error.remedy or error.what
            row.set_class(bool(why), "-bad")
            row.query_one(".-help", Static).update(plain(f"✖ {why}" if why else field.arg.help))
        cli = self.query_one("#cli", Static)
        try:
            made, command = self.built(texts)
        except MemconsoleError as error:
            cli.update(line([("✖ ", "$error"), (error.what, "$text-muted")]))
            return None
        cli.update(line([("$ ", "$success"), (command, "$text-muted")]))
        return made

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
        """Go on to the plan, or to the first field that is missing or wrong."""
        made = self._check()
        if made is not None:
            self.dismiss(made)
            return
        texts = self._texts()
        bad = [id for id in self._ids if self.query_one(f"#row-{id}").has_class("-bad")]
        fields = zip(self._ids, self._fields, strict=True)
        missing = [id for id, field in fields if field.required and field.name not in texts]
        for id in (*bad, *missing):
            self.query_one(f"#arg-{id}").focus()
            return


class Form(FieldForm[Action]):
    """The arguments of an action; with ``many``, for so many rows: what is ``given`` is of the first, and not asked."""

    def __init__(self, cls: type[Action], given: Mapping[str, str], *, many: int = 0) -> None:
        asked = tuple(field for field in actions.fields(cls) if not (many and field.name in given))
        super().__init__(cls.spec.title + (f": {many:,} rows" if many else ""), asked, given)
        self._cls = cls
        self._of_row = given if many else {}

    def built(self, texts: Mapping[str, str]) -> tuple[Action, str]:
        """The Action, on the first row where there are many."""
        action = action_input.build(self._cls.spec.id, {**texts, **self._of_row})
        return action, actions.cli_form(action)


def plan_lines(plan: Plan) -> list[Content]:
    """A plan in lines: its effects in order with their undo, or the refusals with their remedies."""
    lines: list[Content] = []
    for refusal in plan.refusals:
        lines += hanging("✖ ", f"{refusal.code}: {refusal.what}", "bold $error")
        lines += hanging("  ", refusal.why, "$text-muted")
        lines += hanging("  ▸ ", refusal.remedy, "")
    for number, effect in enumerate(plan.effects, 1):
        lines += hanging(f"{number:>2} ", effect.text, "$text-disabled" if plan.refusals else "")
        lines += hanging("   undo: ", effect.undo, "$text-muted")
    return lines


def hanging(lead: str, text: str, style: str) -> list[Content]:
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
    Confirmation.-destroys > Vertical { border: round $error; border-title-color: $error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [bound("plan-options", "options", "Options")]

    class Planned(Message):
        """The source has made its plan."""

        def __init__(self, plan: Plan) -> None:
            super().__init__()
            self.plan = plan

    def __init__(self, action: Action) -> None:
        super().__init__()
        self._action = action
        self._plan: Plan | None = None

    def compose(self) -> ComposeResult:
        """The command, the plan, the name to type, the buttons."""
        spec = self._action.spec
        destroys = spec.danger is Danger.DESTROYS
        self.set_class(destroys, "-destroys")
        with Vertical() as box:
            box.border_title = f"{spec.title} · destroys" if destroys else spec.title
            yield Static(line([("$ ", "$success"), (actions.cli_form(self._action), "$text-muted")]), classes="-cli")
            with VerticalScroll():
                yield Lines()
            yield Typed("#apply", ahead=destroys)
            with Horizontal(classes="-buttons"):
                yield Button("Options", id="options", compact=True)
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(
                    "Apply", id="apply", variant="error" if destroys else "success", disabled=True, compact=True
                )

    def on_mount(self) -> None:
        """Ask for the plan."""
        self.query_one(Lines).show_lines([Content.styled("planning…", "$text-muted")])
        if self._action.spec.danger is not Danger.DESTROYS:
            # Keys go where Enter does nothing yet: the plan is to be seen before it is answered.
            self.query_one(VerticalScroll).focus()
        self._ask()

    @work(thread=True, group="plan", exclusive=True, description="plan")
    def _ask(self) -> None:
        self.post_message(self.Planned(bulk.plan_one(self.console.source, self._action)))

    def on_confirmation_planned(self, event: Planned) -> None:
        """Show the plan; it may be applied unless it is refused."""
        self._plan = event.plan
        lines = plan_lines(event.plan) or [Content("nothing would change")]
        self.query_one(Lines).show_lines(lines)
        typed = self.query_one(Typed)
        if event.plan.refusals:
            names = ", ".join(refusal.code for refusal in event.plan.refusals)
            typed.say(line([(f"✖ refused: {names}", "bold $error")]))
            self.query_one("#apply", Button).tooltip = plain(f"refused: {names}")
            self.query_one("#cancel", Button).focus()
        elif event.plan.confirm is not None:
            typed.want(event.plan.confirm)
        else:
            typed.spare()

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
        field.name: write_value(field, value)
        for field in actions.fields(type(action))
        if (value := getattr(action, field.name)) is not None
    }


def missing_of(cls: type[Action], given: Mapping[str, str]) -> Sequence[str]:
    """The arguments an action still needs."""
    return [field.name for field in actions.fields(cls) if field.required and field.name not in given]
