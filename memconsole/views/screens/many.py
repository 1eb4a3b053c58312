"""One action on many rows: one plan that lists each, one number to type, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Static
from textual.worker import get_current_worker

from memconsole import actions, bulk
from memconsole.actions import Action
from memconsole.bulk import BulkItem
from memconsole.model import Danger
from memconsole.views.screens.acting import hanging
from memconsole.views.screens.dialogs import Dialog, Typed
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines

TOLD = 20
"""After how many plans it is told how many there are."""


def item_lines(item: BulkItem) -> list[Content]:
    """An item in lines: its command, and its refusals with their remedies, its effects, or what kept it."""
    if item.error is not None:
        told = [(item.error.what, "$error"), (item.error.why, "$text-muted"), (item.error.remedy, "")]
        head = [("✖ ", "bold $error"), (actions.cli_form(item.action), "bold")]
    elif item.refused:
        told = [part for each in item.plan.refusals for part in _refused(each.code, each.what, each.why, each.remedy)]
        head = [("✖ ", "bold $error"), (actions.cli_form(item.action), "$text-muted"), (" refused", "$error")]
    elif item.outcome is not None:
        told = []
        head = [("✔ ", "bold $success"), (item.outcome.text, "")]
    else:
        told = [(effect.text, "$text-muted") for effect in item.plan.effects]
        head = [("▸ ", "bold $primary"), (actions.cli_form(item.action), "bold")]
    return [line(head), *(each for text, style in told for each in hanging("    ", text, style))]


def _refused(code: str, what: str, why: str, remedy: str) -> list[tuple[str, str]]:
    return [(f"{code}: {what}", "$error"), (why, "$text-muted"), (f"▸ {remedy}" if remedy else "", "")]


class ManyPlan(Dialog[list[BulkItem]]):
    """What an action would do to each of many, refused ones first; applied once their number is typed."""

    DEFAULT_CSS = """
    ManyPlan VerticalScroll { height: auto; max-height: 14; scrollbar-size-vertical: 1; margin: 1 0 0 0; }
    ManyPlan.-destroys > Vertical { border: round $error; border-title-color: $error; }
    """

    class SomePlanned(Message):
        """So many plans were made."""

        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = count

    class AllPlanned(Message):
        """Every plan was made."""

        def __init__(self, items: Sequence[BulkItem]) -> None:
            super().__init__()
            self.items = items

    def __init__(self, many: Sequence[Action]) -> None:
        super().__init__()
        self._many = many
        self._ready: list[BulkItem] = []

    def compose(self) -> ComposeResult:
        """The items, the number to type, the buttons."""
        spec = self._many[0].spec
        destroys = spec.danger is Danger.DESTROYS
        self.set_class(destroys, "-destroys")
        with Vertical() as box:
            box.border_title = f"{spec.title}: {len(self._many):,}" + (" · destroys" if destroys else "")
            yield Static(id="sum")
            with VerticalScroll():
                yield Lines()
            yield Typed("#apply")
            with Horizontal(classes="-buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(
                    "Apply", id="apply", variant="error" if destroys else "success", disabled=True, compact=True
                )

    def on_mount(self) -> None:
        """Ask for the plans."""
        self.query_one(VerticalScroll).focus()
        self._tell(0)
        self._ask()

    def _tell(self, count: int) -> None:
        self.query_one("#sum", Static).update(line([(f"planning… {count:,} of {len(self._many):,}", "$text-muted")]))

    @work(thread=True, group="plan", exclusive=True, description="plan")
    def _ask(self) -> None:
        worker = get_current_worker()
        items = []
        for item in bulk.plans(self.console.source, self._many):
            if worker.is_cancelled:
                return
            items.append(item)
            if len(items) % TOLD == 0:
                self.post_message(self.SomePlanned(len(items)))
        self.post_message(self.AllPlanned(items))

    def on_many_plan_some_planned(self, event: SomePlanned) -> None:
        """Say how far it is."""
        self._tell(event.count)

    def on_many_plan_all_planned(self, event: AllPlanned) -> None:
        """Show every plan; those that are not refused may be applied."""
        self._ready = [item for item in event.items if not item.refused]
        refused = [item for item in event.items if item.refused]
        counts = [(f"{len(self._ready):,} can be done", "")]
        if refused:
            counts += [(" · ", "$text-muted"), (f"refused, and left as it is: {len(refused):,}", "$error")]
        self.query_one("#sum", Static).update(line(counts))
        self.query_one(Lines).show_lines([each for item in (*refused, *self._ready) for each in item_lines(item)])
        if not self._ready:
            self.query_one(Typed).say(line([("✖ every one is refused", "bold $error")]))
            self.query_one("#cancel", Button).focus()
            return
        verb = self._many[0].spec.title.lower()
        self.query_one(Typed).want(str(len(self._ready)), after=f" to go on: {verb}")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Apply, or let it be."""
        self.dismiss(self._ready if event.button.id == "apply" else None)


class ManyDone(Dialog[bool]):
    """What became of each, those that failed first; True: the rest is to be tried again."""

    DEFAULT_CSS = "ManyDone VerticalScroll { height: auto; max-height: 18; scrollbar-size-vertical: 1; }"

    def __init__(self, items: Sequence[BulkItem]) -> None:
        super().__init__()
        self._items = items

    def compose(self) -> ComposeResult:
        """What became of each."""
        failed = [item for item in self._items if item.outcome is None]
        with Vertical() as box:
            box.border_title = f"{self._items[0].action.spec.title}: {len(failed):,} of {len(self._items):,} not done"
            with VerticalScroll():
                yield Lines()
            with Horizontal(classes="-buttons"):
                yield Button("Close", id="close", compact=True)
                yield Button(f"Plan the {len(failed):,} again", id="again", variant="primary", compact=True)

    def on_mount(self) -> None:
        """Write the lines."""
        ordered = sorted(self._items, key=lambda item: item.outcome is not None)
        self.query_one(Lines).show_lines([each for item in ordered for each in item_lines(item)])
        self.query_one("#again", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Again, or not."""
        self.dismiss(event.button.id == "again")
