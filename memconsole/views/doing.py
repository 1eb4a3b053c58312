"""The app's hand: Actions from form to plan to thread, macros run and recorded; nothing here waits for the Source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from textual import work
from textual.message import Message

from memconsole import actions, macros
from memconsole.actions import Action
from memconsole.errors import MemconsoleError
from memconsole.macros import Macro, StepResult
from memconsole.model import Outcome
from memconsole.source import Source
from memconsole.units import format_duration
from memconsole.views.following import Following
from memconsole.views.screens.acting import Answer, Confirmation, Form, given_of, missing_of
from memconsole.views.screens.dialogs import AskName
from memconsole.views.screens.running import MacroForm, MacroPlan

LONG = 15
EXISTING = {actions.Kind.REGION, actions.Kind.GUEST, actions.Kind.GRANT, actions.Kind.WINDOW}
NEED_A_ROW = {
    id
    for id, cls in actions.REGISTRY.items()
    if any(field.required and field.arg.kind in EXISTING for field in actions.fields(cls))
}
"""Actions on something that exists already."""


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


class MacroRan(Message):
    """A macro came to its end."""

    def __init__(self, macro: Macro, results: Sequence[StepResult]) -> None:
        super().__init__()
        self.macro = macro
        self.results = results


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
        known_macros: Sequence[Macro] = (),
        record_to: Path | None = None,
    ) -> None:
        super().__init__(source, interval=interval, clock=clock)
        self.macros = tuple(known_macros)
        self.journal: list[Action | tuple[str, str]] = []
        self.busy: list[str] = []
        self.record_to = record_to
        self.recording_from: int | None = None if record_to is None else 0

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
            self.propose(actions.build(action_id, given))

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
        self.busy.append(action.spec.title)
        self.show_state()
        self._perform(action)

    @work(thread=True, group="act")
    def _perform(self, action: Action) -> None:
        try:
            outcome = self.source.apply(action)
        except MemconsoleError as error:
            self.post_message(Failed(action.spec.title, error))
        else:
            self.post_message(Applied(action, outcome))

    def on_applied(self, event: Applied) -> None:
        """Say what was done, and look at once what has become of it."""
        self.busy.remove(event.action.spec.title)
        self.journal.append(event.action)
        outcome = event.outcome
        text = f"{outcome.text}\n{outcome.revoke.note}" if outcome.revoke and outcome.revoke.note else outcome.text
        title = f"✔ {event.action.spec.title} in {format_duration(outcome.took_ns)}"
        self.notify(text, title=title, markup=False)
        self.action_refresh()
        self.show_state()

    def on_failed(self, event: Failed) -> None:
        """Say what was not done, why, and what to do about it."""
        if event.title in self.busy:
            self.busy.remove(event.title)
        error = event.error
        text = "\n".join(part for part in (error.what, error.why, error.remedy and f"▸ {error.remedy}") if part)
        self.notify(text, title=f"✖ {event.title}: {error.code}", severity="error", timeout=LONG, markup=False)
        self.action_refresh()
        self.show_state()

    # --- macros -------------------------------------------------------------------------------------------------

    def action_macro(self, name: str, given: Mapping[str, str] | None = None) -> None:
        """Ask for a macro's parameters, show what it would do, and run it."""
        macro = next((macro for macro in self.macros if macro.name == name), None)
        if macro is None:
            known = ", ".join(macro.name for macro in self.macros) or "none"
            self.notify(f"macros: {known}", title=f"There is no macro {name}", severity="error", markup=False)
            return
        if macro.params and given is None:
            self.push_screen(MacroForm(macro), partial(self._plan_macro, macro))
        else:
            self._plan_macro(macro, given or {})

    def _plan_macro(self, macro: Macro, given: Mapping[str, str] | None) -> None:
        if given is None:
            return
        try:
            macros.settings_for(macro, given)
        except MemconsoleError as error:
            self.on_failed(Failed(f"Macro {macro.name}", error))
            return

        def decided(yes: bool | None) -> None:
            if yes:
                self.busy.append(f"Macro {macro.name}")
                self.show_state()
                self._run_macro(macro, given)

        self.push_screen(MacroPlan(macro, given), decided)

    @work(thread=True, group="act")
    def _run_macro(self, macro: Macro, given: Mapping[str, str]) -> None:
        def on_view(view: str, subject: str) -> None:
            self.call_from_thread(self.open_view, view, subject)

        self.post_message(MacroRan(macro, list(macros.run(macro, self.source, given, on_view))))

    def on_macro_ran(self, event: MacroRan) -> None:
        """Say which steps were done and which were not."""
        title = f"Macro {event.macro.name}"
        try:
            macros.verdict(event.macro, event.results)
        except MemconsoleError as error:
            self.on_failed(Failed(title, error))
            return
        self.busy.remove(title)
        self.notify(f"{len(event.results)} steps done", title=f"✔ {title}", markup=False)
        self.action_refresh()
        self.show_state()

    def action_record(self) -> None:
        """Begin to record a macro, or end it and save it."""
        if self.recording_from is None:
            self.recording_from = len(self.journal)
            self.notify("what you do and open is recorded; the same key ends it", title="● Recording", markup=False)
        elif self.record_to is not None:
            self.save_recording(self.record_to)
        elif len(self.journal) == self.recording_from:
            self.recording_from = None
            self.notify("nothing was done", title="Recording ended", markup=False)
        else:
            directory = macros.macro_paths()[0]
            self.push_screen(AskName("Save macro", f"its name; it is kept in {directory}"), self._save_as)
        self.show_state()

    def _save_as(self, name: str | None) -> None:
        if name is None:
            self.recording_from = None
            self.notify("the recording was thrown away", title="Recording ended", severity="warning", markup=False)
            self.show_state()
        else:
            self.save_recording(macros.macro_paths()[0] / f"{name}.toml")

    def save_recording(self, path: Path) -> None:
        """Write what was recorded to a macro file, and know it from now on."""
        done = self.journal[self.recording_from or 0 :]
        self.recording_from, self.record_to = None, None
        try:
            macro = macros.recorded(path.name.removesuffix(".toml"), done)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(macros.dumps(macro), encoding="utf-8")
        except OSError as error:
            self.notify(str(error), title="✖ The macro was not saved", severity="error", timeout=LONG, markup=False)
        else:
            self.macros = (*(each for each in self.macros if each.name != macro.name), macro)
            self.notify(str(path), title=f"✔ {len(done)} steps saved", markup=False)
        self.show_state()

    def open_view(self, name: str, subject: str = "") -> None:
        """Open a view."""
        raise NotImplementedError
