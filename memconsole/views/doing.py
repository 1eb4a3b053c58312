"""The app's hand: Actions from form to plan to thread; nothing here waits for the Source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from textual import work
from textual.message import Message

from memconsole import action_input, actions, unforeseen
from memconsole.actions import Action
from memconsole.arguments import ArgumentKind
from memconsole.errors import MemconsoleError
from memconsole.model import Outcome, Snapshot
from memconsole.source import Source
from memconsole.units import format_duration
from memconsole.views.following import Following
from memconsole.views.screens.acting import Answer, Confirmation, Form, given_of, missing_of

LONG = 15
EXISTING = {
    ArgumentKind.REGION,
    ArgumentKind.GUEST,
    ArgumentKind.GRANT,
    ArgumentKind.WINDOW,
}
NEED_A_ROW = {
    id
    for id, cls in actions.REGISTRY.items()
    if any(field.required and field.arg.kind in EXISTING for field in actions.fields(cls))
}
"""Actions on something that exists already."""


class Done(NamedTuple):
    """An Action that was done, and the Snapshot that was shown when it began."""

    action: Action
    outcome: Outcome
    before: Snapshot | None


class Applied(Message):
    """An Action was done."""

    def __init__(self, action: Action, outcome: Outcome) -> None:
        super().__init__()
        self.action = action
        self.outcome = outcome


class Failed(Message):
    """An Action was not done, or a macro stopped; what had begun was undone."""

    def __init__(self, title: str, error: MemconsoleError) -> None:
        super().__init__()
        self.title = title
        self.error = error


class Doing(Following):
    """An App that acts.

    ``journal`` lists what was done and opened, in order: Actions and ``(view, subject)``; a recording is a part of it.
    """

    def __init__(
        self,
        source: Source,
        *,
        interval: float = 1.0,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        super().__init__(source, interval=interval, clock=clock)
        self.journal: list[Action | tuple[str, str]] = []
        self.busy: list[str] = []
        self.last_done: list[Done] = []
        """What was done last: one Action, or one on many rows."""
        self._before: Snapshot | None = None

    # --- actions ------------------------------------------------------------------------------------------------

    def why_not(self, action_id: str, table_id: str, item: object) -> str:
        """Why an action cannot be begun on a row of a table, or an empty string."""
        if self.source.read_only:
            return f"read-only: {self.source.read_only}"
        needs_row = action_id in NEED_A_ROW and actions.REGISTRY[action_id].spec.on == table_id
        return "no row is chosen" if needs_row and item is None else ""

    def begin(self, action_id: str, given: Mapping[str, str], *, options: bool = False) -> None:
        """Ask for the arguments an action still needs (with ``options`` for all of them), then show its plan."""
        why = self.why_not(action_id, "", None)
        if why:
            self.notify(why, title="Nothing can be changed here", severity="warning", markup=False)
            return
        cls = actions.REGISTRY[action_id]
        if options or missing_of(cls, given):
            self.push_screen(Form(cls, given), self._propose_if_any)
        else:
            self.propose(action_input.build(action_id, given))

    def _propose_if_any(self, action: Action | None) -> None:
        if action is not None:
            self.propose(action)

    def propose(self, action: Action) -> None:
        """Show an Action's plan and let the operator decide."""
        why = self.why_not(action.spec.id, "", None)
        if why:
            self.notify(why, title="Nothing can be changed here", severity="warning", markup=False)
            return

        def decided(answer: Answer | None) -> None:
            if answer == "apply":
                self.perform(action)
            elif answer == "options":
                self.begin(action.spec.id, given_of(action), options=True)

        self.push_screen(Confirmation(action), decided)

    def perform(self, action: Action) -> None:
        """Apply an Action in a thread."""
        self.begin_doing()
        self.busy.append(action.spec.title)
        self.show_state()
        self._perform(action)

    def begin_doing(self) -> None:
        """Know what there was before what is done next, which is what was done last from then on."""
        self._before, self.last_done = self.snapshot, []

    @work(thread=True, group="act", description="perform")
    def _perform(self, action: Action) -> None:
        outcome = unforeseen.attempt(action.spec.title, "console", partial(self.source.apply, action))
        if isinstance(outcome, MemconsoleError):
            self.post_message(Failed(action.spec.title, outcome))
        else:
            self.post_message(Applied(action, outcome))

    def on_applied(self, event: Applied) -> None:
        """Say what was done, and look at once what has become of it."""
        self.busy.remove(event.action.spec.title)
        outcome = event.outcome
        self.note_done(event.action, outcome)
        text = f"{outcome.text}\n{outcome.revoke.note}" if outcome.revoke and outcome.revoke.note else outcome.text
        title = f"✔ {event.action.spec.title} in {format_duration(outcome.took_ns)}"
        self.notify(text, title=title, markup=False)
        self.action_refresh()
        self.show_state()

    def note_done(self, action: Action, outcome: Outcome) -> None:
        """Write down what was done."""
        self.journal.append(action)
        self.last_done.append(Done(action, outcome, self._before))

    def on_failed(self, event: Failed) -> None:
        """Say what was not done, why, and what to do about it."""
        if event.title in self.busy:
            self.busy.remove(event.title)
        error = event.error
        text = "\n".join(part for part in (error.what, error.why, error.remedy and f"▸ {error.remedy}") if part)
        self.notify(text, title=f"✖ {event.title}: {error.code}", severity="error", timeout=LONG, markup=False)
        self.action_refresh()
        self.show_state()

    def open_view(self, name: str, subject: str = "") -> None:
        """Open a view."""
        raise NotImplementedError
