"""The app's hand for many rows at once: one form, one plan, one number to type; what fails is offered again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from textual import work
from textual.message import Message

from memconsole import action_input, actions, bulk
from memconsole.actions import Action
from memconsole.bulk import BulkItem
from memconsole.views.screens.acting import Form, given_of, missing_of
from memconsole.views.screens.many import ManyDone, ManyPlan
from memconsole.views.scripting import Scripting


class OneApplied(Message):
    """One of many was done, or kept from it."""

    def __init__(self, item: BulkItem) -> None:
        super().__init__()
        self.item = item


class AllApplied(Message):
    """The last of many was done."""

    def __init__(self, items: Sequence[BulkItem], busy: str) -> None:
        super().__init__()
        self.items = items
        self.busy = busy


class Manifold(Scripting):
    """An App that acts on many rows at once."""

    def begin_all(self, action_id: str, many: Sequence[Mapping[str, str]]) -> None:
        """Begin an action on many rows, each with the arguments it answers; what none answers is asked for once."""
        cls = actions.REGISTRY[action_id]
        if len(many) == 1 or self.why_not(action_id, "", None):
            self.begin(action_id, many[0])
            return
        if not missing_of(cls, many[0]):
            self.propose_all([action_input.build(action_id, given) for given in many])
            return

        def filled(action: Action | None) -> None:
            if action is not None:
                common = {name: text for name, text in given_of(action).items() if name not in many[0]}
                self.propose_all([action_input.build(action_id, {**common, **given}) for given in many])

        self.push_screen(Form(cls, many[0], many=len(many)), filled)

    def propose_all(self, many: Sequence[Action]) -> None:
        """Show one plan of many actions, and apply those that can be once it is confirmed."""

        def decided(items: list[BulkItem] | None) -> None:
            if items:
                busy = f"{items[0].action.spec.title} of {len(items):,}"
                self.busy.append(busy)
                self.show_state()
                self.begin_doing()
                self._perform_all(items, busy)

        self.push_screen(ManyPlan(many), decided)

    @work(thread=True, group="act", description="perform all")
    def _perform_all(self, items: Sequence[BulkItem], busy: str) -> None:
        done = bulk.applied(self.source, items, lambda item: self.post_message(OneApplied(item)))
        self.post_message(AllApplied(done, busy))

    def on_one_applied(self, event: OneApplied) -> None:
        """Write down what was done."""
        if event.item.outcome is not None:
            self.note_done(event.item.action, event.item.outcome)

    def on_all_applied(self, event: AllApplied) -> None:
        """Say what was done; offer the rest again."""
        self.busy.remove(event.busy)
        rest = bulk.rest(event.items)
        done = len(event.items) - len(rest)
        title = event.items[0].action.spec.title
        if not rest:
            self.notify(f"all {done:,} done", title=f"✔ {title}", markup=False)
        else:

            def again(yes: bool | None) -> None:
                if yes:
                    self.propose_all(rest)

            self.push_screen(ManyDone(event.items), again)
        self.action_refresh()
        self.show_state()
