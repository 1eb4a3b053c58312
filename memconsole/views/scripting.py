"""The app's macros: kept as their files are, run whole or a step at a time, recorded; nothing waits for the Source."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from textual import work
from textual.message import Message

from memconsole import macro_run, macros, unforeseen
from memconsole.errors import MemconsoleError
from memconsole.macro_run import Decision, Face, Ran, StepResult
from memconsole.macros import Macro
from memconsole.model import Plan
from memconsole.source import Source
from memconsole.views.doing import LONG, Doing, Failed
from memconsole.views.screens.dialogs import AskName
from memconsole.views.screens.running import MacroEnd, MacroForm, MacroPlan, MacroStepAsked, Way

LOOK_S = 2.0
"""How often it is looked whether the files of macros changed."""

Command = Callable[[Sequence[str]], Ran]


class MacroRan(Message):
    """A macro came to its end, or as far as it came."""

    def __init__(self, macro: Macro, results: Sequence[StepResult], given: Mapping[str, str]) -> None:
        super().__init__()
        self.macro = macro
        self.results = results
        self.given = given


class Scripting(Doing):
    """An App that runs and records macros.

    ``known_macros`` are offered as they are; without them those of the macro directories are, as their files become.
    ``command`` runs the words of a command for a macro's step.
    """

    def __init__(
        self,
        source: Source,
        *,
        interval: float = 1.0,
        clock: Callable[[], int] = time.time_ns,
        known_macros: Sequence[Macro] | None = (),
        record_to: Path | None = None,
        command: Command | None = None,
    ) -> None:
        super().__init__(source, interval=interval, clock=clock)
        self.macros = tuple(known_macros or ())
        self.record_to = record_to
        self.recording_from: int | None = None if record_to is None else 0
        self._command = command
        self._watches = known_macros is None
        self._stamp: object = None
        self._complaints: set[str] = set()

    # --- files ----------------------------------------------------------------------------------------------------

    def watch_macros(self) -> None:
        """Know the macros of the macro directories, now and whenever a file of them changes."""
        if self._watches:
            self.reload_macros()
            self.set_interval(LOOK_S, self.reload_macros)

    def reload_macros(self) -> None:
        """Read the macro directories again if a file in them is new, gone or another."""
        stamp = macros.stamp() if self._watches else self._stamp
        if stamp == self._stamp:
            return
        first, self._stamp = self._stamp is None, stamp
        found, broken = macros.discover()
        before, self.macros = {macro.name: macro for macro in self.macros}, found
        self.macros_changed()
        changed = [macro.name for macro in found if before.get(macro.name) != macro]
        if changed and not first:
            self.notify(", ".join(changed), title="Macros were read again", markup=False)
        complaints = {f"{path}: {error}" for path, error in broken}
        for complaint in sorted(complaints - self._complaints):
            self.notify(complaint, title="✖ A macro cannot be used", severity="error", timeout=LONG, markup=False)
        self._complaints = complaints

    def macros_changed(self) -> None:
        """Other macros are known: their keys are others."""
        raise NotImplementedError

    # --- running --------------------------------------------------------------------------------------------------

    def action_macro(self, name: str, given: Mapping[str, str] | None = None) -> None:
        """Ask for a macro's parameters, show what it would do, and run it."""
        self.reload_macros()
        macro = next((macro for macro in self.macros if macro.name == name), None)
        if macro is None:
            known = ", ".join(macro.name for macro in self.macros) or "none"
            self.notify(f"macros: {known}", title=f"There is no macro {name}", severity="error", markup=False)
            return
        if macro.params and given is None:
            self.push_screen(MacroForm(macro), partial(self._plan_macro, macro))
        else:
            self._plan_macro(macro, given or {})

    def _plan_macro(self, macro: Macro, given: Mapping[str, str] | None, steps: Collection[int] = ()) -> None:
        if given is None:
            return
        try:
            macro_run.settings_for(macro, given, steps)
        except MemconsoleError as error:
            self.on_failed(Failed(f"Macro {macro.name}", error))
            return

        def decided(way: Way | None) -> None:
            if way is not None:
                self.busy.append(f"Macro {macro.name}")
                self.show_state()
                self._run_macro(macro, given, steps, way)

        self.push_screen(MacroPlan(macro, given, steps), decided)

    @work(thread=True, group="act", description="run a macro")
    def _run_macro(self, macro: Macro, given: Mapping[str, str], steps: Collection[int], way: Way) -> None:
        title = f"Macro {macro.name}"
        decide = partial(self._decide, title) if way == "step" else None
        face = Face(partial(self.call_from_thread, self.open_view), self._command, decide)
        ran = unforeseen.attempt(title, "console", lambda: list(macro_run.run(macro, self.source, given, face, steps)))
        self.post_message(Failed(title, ran) if isinstance(ran, MemconsoleError) else MacroRan(macro, ran, given))

    def _decide(self, title: str, number: int, text: str, plan: Plan | None) -> Decision:
        """Ask, in the macro's thread, what is to be done with a step; when the console ends, it stops."""
        answered = threading.Event()
        answers: list[Decision | None] = []

        def answer(decision: Decision | None) -> None:
            answers.append(decision)
            answered.set()

        asked: Any = MacroStepAsked(f"{title}, step {number}", text, plan)
        self.call_from_thread(self.push_screen, asked, answer)
        while not answered.wait(1.0):
            if not self.is_running:
                return "stop"
        return answers[0] or "stop"

    def on_macro_ran(self, event: MacroRan) -> None:
        """Say which steps were done and which were not, and offer the rest again."""
        title = f"Macro {event.macro.name}"
        self.busy.remove(title)
        self.action_refresh()
        self.show_state()
        rest = macro_run.rest_of(event.macro, event.results, event.given)
        if rest is None:
            self._tell_end(title, event.results)
            return
        try:
            macro_run.verdict(event.macro, event.results)
        except MemconsoleError as error:
            self.on_failed(Failed(title, error))

        def decided(again: bool | None) -> None:
            if again:
                self._plan_macro(event.macro, rest.given, rest.steps)

        self.push_screen(MacroEnd(title, event.results, rest.cli(event.macro.name)), decided)

    def _tell_end(self, title: str, results: Sequence[StepResult]) -> None:
        self.notify(f"{len(results)} steps done", title=f"✔ {title}", markup=False)
        if any(result.ran is not None and result.ran.text for result in results):
            self.push_screen(MacroEnd(title, results, ""))

    # --- recording ------------------------------------------------------------------------------------------------

    def action_record(self) -> None:
        """Begin to record a macro, or end it and save it."""
        if self.recording_from is None:
            self.recording_from = len(self.journal)
            self.notify("actions and views are recorded; the same key ends it", title="● Recording", markup=False)
        elif self.record_to is not None:
            self.save_recording(self.record_to)
        elif len(self.journal) == self.recording_from:
            self.recording_from = None
            self.notify("nothing was done", title="Recording ended", markup=False)
        else:
            directory = macros.macro_paths()[0]
            self.push_screen(AskName("Save macro", f"its name; the file is saved in {directory}"), self._save_as)
        self.show_state()

    def _save_as(self, name: str | None) -> None:
        if name is None:
            self.recording_from = None
            self.notify("the recording was discarded", title="Recording ended", severity="warning", markup=False)
            self.show_state()
        else:
            self.save_recording(macros.macro_paths()[0] / f"{name}.toml")

    def save_recording(self, path: Path) -> None:
        """Write what was recorded to a macro file, and know it from now on."""
        done = self.journal[self.recording_from or 0 :]
        self.recording_from, self.record_to = None, None
        self.save_macro(macros.recorded(path.name.removesuffix(".toml"), done), path)

    def save_macro(self, macro: Macro, path: Path) -> None:
        """Write a macro to a file, and know it from now on."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(macros.dumps(macro), encoding="utf-8")
        except OSError as error:
            self.notify(str(error), title="✖ The macro was not saved", severity="error", timeout=LONG, markup=False)
        else:
            self.macros = (*(each for each in self.macros if each.name != macro.name), macro)
            self.notify(str(path), title=f"✔ {len(macro.steps)} steps saved", markup=False)
        self.show_state()
