"""What views, forms and commands want of the console they are shown in; the app is one, and no view imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from memconsole.actions import Action
from memconsole.command import CommandForm
from memconsole.macros import Macro
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.views.alerting import Alerts
from memconsole.views.remembering import Memory


class NumberedView(Protocol):
    """A view with a number: its name in commands and macros, and its title."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def title(self) -> str:
        """Its title."""


class Console(Protocol):
    """The console: what is shown, where one can go, and how actions begin.

    ``source`` and ``snapshot`` are what is shown, live or of the past; ``trouble`` says why nothing newer came;
    ``arrived_ns`` is when it came, by ``clock`` (ns since the epoch); one is asked for every ``interval`` seconds, and
    the last took ``took_s``. ``journal`` is what was done and opened, ``alerts`` what is new among the findings,
    ``memory`` what is kept for the next session.
    """

    source: Source
    snapshot: Snapshot | None
    arrived_ns: int
    interval: float
    took_s: float
    trouble: str
    paused: bool
    alerts: Alerts
    busy: list[str]
    journal: list[Action | tuple[str, str]]
    recording_from: int | None
    macros: tuple[Macro, ...]
    memory: Memory

    @property
    def forms(self) -> Sequence[CommandForm]:
        """The commands that the ``:`` line understands."""

    def run_command(self, words: Sequence[str]) -> None:
        """Run a command of the command line on what is shown, in a thread; what it says is shown.

        Raises:
            UsageError: there is no command line here.
        """

    def action_undo(self) -> None:
        """Plan what undoes the last action."""

    def action_said(self) -> None:
        """Show the command lines that were done."""

    def clock(self) -> int:
        """The time, ns since the epoch."""

    # --- where one is and can go ----------------------------------------------------------------------------------

    @property
    def numbered_views(self) -> Sequence[NumberedView]:
        """The views that have a number, in its order."""

    @property
    def view(self) -> object:
        """The view in front."""

    @property
    def themes(self) -> Sequence[str]:
        """The names of the themes, sorted."""

    def is_view(self, name: str) -> bool:
        """Whether a view or a kind of subject has this name."""

    def open_view(self, name: str, subject: str = "") -> None:
        """Open a view, or in it the detail of a subject (``region:web``); with a plain word, the view filtered by it.

        Raises:
            UsageError: there is no such view.
        """

    def open_named(self, name: str) -> None:
        """Open what a finding or an event is about, by its name alone."""

    def open_pfn(self, table_id: str, item: Any) -> None:
        """Open the PFN map of a region, a guest, or the region of a grant."""

    def open_goal(self, view: str, subject: str = "", page: int | None = None) -> None:
        """Go one step deeper: to a view of a subject, and there to a page of its map; Escape comes back."""

    def show_state(self) -> None:
        """Write the bars anew."""

    def open_reach(self, target: str) -> None:
        """Open what a target is and who reaches it: a guest, a PFN, or ADDRESS@ a device, a guest or a region."""

    @property
    def bookmark_names(self) -> Sequence[str]:
        """The names of the places that are remembered."""

    def add_bookmark(self, name: str) -> None:
        """Remember where one is, by this name or by one that says what is there."""

    def go_to_bookmark(self, name: str) -> None:
        """Go to a place that is remembered.

        Raises:
            NotFound: none has this name.
        """

    def travel_to(self, text: str) -> None:
        """Show what was recorded at a time.

        Raises:
            UsageError: it is no time.
        """

    def export_table(self, path: str, *, redact: bool) -> None:
        """Write the rows and columns that the table in front shows to a file, as its name ends.

        Raises:
            UsageError: there is no table here, or the name has no format.
            BadFile: the file is there, or cannot be written.
        """

    # --- acting ---------------------------------------------------------------------------------------------------

    def why_not(self, action_id: str, table_id: str, item: object) -> str:
        """Why an action cannot be begun on a row of a table, or an empty string."""

    def begin(self, action_id: str, given: Mapping[str, str], *, options: bool = False) -> None:
        """Ask for the arguments an action still needs (with ``options`` for all of them), then show its plan."""

    def begin_all(self, action_id: str, many: Sequence[Mapping[str, str]]) -> None:
        """Begin an action on many rows, each with the arguments it answers; what none answers is asked for once."""

    def begin_here(self, action_id: str) -> None:
        """Begin an action on whatever is chosen where the keys go."""

    def propose(self, action: Action) -> None:
        """Show the plan of an action, and apply it if it is confirmed."""

    def use_theme(self, name: str) -> None:
        """Use another theme.

        Raises:
            UsageError: there is no such theme.
        """

    def leave_console(self) -> None:
        """Leave, after a yes where leaving loses something."""

    def action_macro(self, name: str, given: Mapping[str, str] | None = None) -> None:
        """Run a macro, after its form and plan."""

    def action_record(self) -> None:
        """Record a macro, or end the recording."""

    def action_refresh(self) -> None:
        """Take a Snapshot now."""

    def action_pause(self) -> None:
        """Let the picture stand still, or move again."""

    def action_travel(self, by: int) -> None:
        """Walk through the recorded past, a Snapshot a step."""

    def action_present(self) -> None:
        """Return to the present."""

    pane: bool
    """Whether a wide terminal shows the details of a row beside the rows."""

    def action_mouse(self) -> None:
        """Leave the mouse to the terminal, or take it back."""

    def action_keys(self) -> None:
        """Show the keys that work here."""
