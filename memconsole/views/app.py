"""The console: one screen of bars and views over a Source; navigation, prompts and keys.

``Following`` brings Snapshots, ``Doing`` applies Actions, this class shows: a trail of places (view and subject) whose
last one is in front.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from textual import events
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from memconsole import macros
from memconsole.errors import MemconsoleError, UsageError
from memconsole.fields import TABLES
from memconsole.macros import Macro
from memconsole.source import Source
from memconsole.views import settings as settings_module
from memconsole.views import terminal
from memconsole.views.commands import Commands, LineSuggester, run_line
from memconsole.views.headline import headline
from memconsole.views.looks import THEME
from memconsole.views.painting import Views
from memconsole.views.screens import listing
from memconsole.views.screens.detail import DETAILS
from memconsole.views.screens.dialogs import Columns, Confirm, Help, KeyHelp, Pick
from memconsole.views.screens.handoff import Handoff
from memconsole.views.screens.overview import Overview
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.settings import Settings
from memconsole.views.traveling import Traveling
from memconsole.views.view import View, subject_of
from memconsole.views.widgets.bars import Header, Keys, Part, Tabs, Title, rank
from memconsole.views.widgets.prompt import Prompt
from memconsole.views.widgets.table import VirtualTable, fit

NARROW = 100


class Named(NamedTuple):
    """A view with a number: its name in commands and macros, its title, its class, what it counts."""

    name: str
    title: str
    cls: type[View]
    counts: str = ""


class Place(NamedTuple):
    """Where one is: a numbered view, or the kind of a subject, and the subject."""

    view: str
    subject: str = ""


class ConsoleApp(Traveling):
    """The operator's console over any Source.

    ``known_macros`` are offered and bound to their keys; ``settings`` remap keys and choose colours; ``clock`` gives
    nanoseconds since the epoch; ``on_quit_warning`` says what leaving would lose.
    """

    TITLE = "memconsole"
    ENABLE_COMMAND_PALETTE = True
    AUTO_FOCUS = None
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {Commands}
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (NARROW, "-wide")]  # noqa: RUF012 - the base has it so
    CSS = """
    Views { height: 1fr; }
    Toast { padding: 0 1; max-width: 72; }
    """
    VIEWS: ClassVar[tuple[Named, ...]] = (
        Named("overview", "Overview", Overview),
        Named("regions", "Regions", listing.Regions, "regions"),
        Named("guests", "Guests", listing.Guests, "guests"),
        Named("grants", "Grants", listing.Grants, "grants"),
        Named("pfn", "PFN", PfnMap),
        Named("mmio", "MMIO", listing.Mmio, "windows"),
        Named("iommu", "IOMMU", listing.Iommu, "domains"),
        Named("events", "Events", listing.Events),
        Named("audit", "Audit", listing.Audit, "findings"),
        Named("handoff", "Handoff", Handoff),
    )
    ALIASES: ClassVar[Mapping[str, str]] = {
        "windows": "mmio",
        "devices": "mmio",
        "iomem": "mmio",
        "domains": "iommu",
        "findings": "audit",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number % 10), f"go({number})", f"{view.title}", show=False, id=f"view-{view.name}")
            for number, view in enumerate(VIEWS, 1)
        ),
        Binding("escape,backspace", "leave", "Back", show=False, id="back"),
        Binding("tab", "focus_next", "Next table", show=False, id="next-table"),
        Binding("shift+tab", "focus_previous", "Former table", show=False, id="former-table"),
        Binding("space", "pause", "Pause", id="pause", tooltip="stop or go on refreshing"),
        Binding("r", "refresh", "Refresh now", show=False, id="refresh"),
        Binding("Q", "record", "Record a macro", show=False, id="record"),
        Binding("colon", "command", "Command", id="command"),
        Binding("ctrl+p", "command_palette", "Palette", show=False, id="palette"),
        Binding("question_mark", "keys", "Help", id="help"),
        Binding("q,ctrl+q", "quit", "Quit", id="quit"),
    ]

    def __init__(
        self,
        source: Source,
        *,
        interval: float = 1.0,
        clock: Callable[[], int] = time.time_ns,
        known_macros: Sequence[Macro] = (),
        record_to: Path | None = None,
        settings: Settings | None = None,
        on_quit_warning: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(source, interval=interval, clock=clock, known_macros=known_macros, record_to=record_to)
        self.settings = settings or Settings()
        self.on_quit_warning = on_quit_warning
        self.trail: list[Place] = [Place("overview")]
        self._focus_at: dict[str, Widget] = {}
        self._begun = False
        self._was_away = False
        self.register_theme(THEME)
        few = self.no_color or self.console.color_system not in {"256", "truecolor"}
        self.theme = "ansi-dark" if few else THEME.name

    def get_driver_class(self) -> type[Driver]:
        """The one that outlives its terminal, where Textual would take the one it is made from."""
        cls = super().get_driver_class()
        return terminal.Terminal if cls is LinuxDriver else cls

    # --- what is on the screen -----------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Bars above, the views, the prompt and the keys below."""
        yield Header()
        yield Tabs()
        yield Title()
        with Views(initial="overview"):
            for view in self.VIEWS:
                yield view.cls(id=view.name)
            for kind, detail in DETAILS.items():
                yield detail(id=kind)
        yield Prompt(LineSuggester(self))
        yield Keys()

    def on_mount(self) -> None:
        """Begin to follow the source."""
        if self.settings.theme in self.available_themes:
            self.theme = self.settings.theme
        elif self.settings.theme:
            self.notify(f"there is no theme {self.settings.theme}", severity="warning", markup=False)
        self._bind_keys()
        self.follow()

    def on_ready(self) -> None:
        """Every view is there: show what has arrived by now."""
        self._begun = True
        self.set_interval(1.0, self.show_state)
        self._to_front()

    def _bind_keys(self) -> None:
        taken = {key: active.binding.description for key, active in self.active_bindings.items()}
        for macro in self.macros:
            if macro.key in taken:
                text = f"{macro.key} is {taken[macro.key]}; run it from the palette, or give it another key"
                self.notify(text, title=f"Macro {macro.name} has no key", severity="warning", markup=False)
            elif macro.key:
                self.bind(macro.key, f"macro({macro.name!r})", description=macro.title or macro.name, show=False)
        self.set_keymap(dict(self.settings.keys))

    @property
    def _is_up(self) -> bool:
        """Whether every view is there: not while the console starts, nor while it ends."""
        return self._begun and self.is_running

    def show_snapshot(self) -> None:
        """Show the Snapshot in the view in front."""
        if self._is_up and self.snapshot is not None:
            self._show_in(self.view)
            self.refresh_bindings()
        self.show_state()

    def _show_in(self, view: View) -> None:
        """Show the Snapshot in a view; in the past, marked by what changed since the one before it."""
        if self.snapshot is None:
            return
        if self.away or self._was_away:
            view.show(self.neighbour or self.snapshot)
            self._was_away = self.away
        view.show(self.snapshot)

    def show_state(self) -> None:
        """The bars: host and source, views with counts, the trail, the table."""
        if not self._is_up:
            return
        base = self.screen_stack[0]
        base.query_one(Header).say(*headline(self))
        counts = [(view.title, self._count(view.counts)) for view in self.VIEWS]
        names = [view.name for view in self.VIEWS]
        here = self.trail[0].view
        base.query_one(Tabs).show(counts, names.index(here) if here in names else -1)
        base.query_one(Title).say(self._crumbs(), [(f"{self.view.status} ", "$text-muted")])

    def _count(self, name: str) -> int | None:
        return len(getattr(self.snapshot, name)) if name and self.snapshot is not None else None

    def _crumbs(self) -> list[Part]:
        parts: list[Part] = [(" ", "")]
        titles = {view.name: view.title for view in self.VIEWS}
        for index, place in enumerate(self.trail):
            last = index == len(self.trail) - 1
            text = titles.get(place.view, "")
            if place.subject:
                text = f"{text} {place.subject.replace(':', ' ', 1)}".lstrip()
            parts += [(" ▸ ", "$text-muted")] if index else []
            parts.append((text, "bold $primary" if last else "$text-muted"))
        return parts

    # --- going places ---------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The view in front."""
        return self.screen_stack[0].query_one(f"#{self.trail[-1].view}", View)

    def is_view(self, name: str) -> bool:
        """Whether a view or a kind of subject has this name."""
        return name in self.ALIASES or name in DETAILS or any(view.name == name for view in self.VIEWS)

    def open_view(self, name: str, subject: str = "") -> None:
        """Open a view, or in it the detail of a subject (``region:web``); with a plain word, the view filtered by it.

        Raises:
            UsageError: there is no such view.
        """
        if not self.is_view(name):
            known = ", ".join(view.name for view in self.VIEWS)
            raise UsageError(f"there is no view {name!r}", "", f"views: {known}")
        name = self.ALIASES.get(name, name)
        kind = subject.partition(":")[0]
        if name in DETAILS:
            self._go([*self._root_of(name), Place(name, f"{name}:{subject}")])
        elif kind in DETAILS and name != "pfn":
            self._go([Place(name), Place(kind, subject)])
        else:
            self._go([Place(name, subject)])
        self.journal.append((name, subject))

    def _root_of(self, kind: str) -> list[Place]:
        name = "guests" if kind == "reach" else f"{kind}s"
        return [Place(self.ALIASES.get(name, name))]

    def drill(self, place: Place) -> None:
        """Go one step deeper; Escape comes back."""
        self._go([*self.trail, place])

    def open_named(self, name: str) -> None:
        """Open what a finding or an event is about, by its name alone."""
        if self.snapshot is None:
            return
        for table_id in ("regions", "guests", "grants", "windows", "devices"):
            table = TABLES[table_id]
            if any(table.key(item) == name for item in table.rows(self.snapshot)):
                self.drill(Place(table_id.removesuffix("s"), f"{table_id.removesuffix('s')}:{name}"))
                return
        self.notify("it is no region, guest, grant or device of this snapshot", title=name, markup=False)

    def open_pfn(self, table_id: str, item: Any) -> None:
        """Open the PFN map of a region, a guest, or the region of a grant."""
        subject = f"region:{item.region}" if table_id == "grants" else subject_of(table_id, item)
        self.drill(Place("pfn", subject))

    def open_reach(self, target: str) -> None:
        """Open what a target is and who reaches it: a guest, a PFN, or ADDRESS@ a device, a guest or a region."""
        self.drill(Place("reach", f"reach:{target}"))

    def action_go(self, number: int) -> None:
        """Open a view by its number."""
        self.open_view(self.VIEWS[number - 1].name)

    def action_leave(self) -> None:
        """Clear the filter, or go back one step, or return to the present."""
        table = self.view.current_table
        if table is not None and table.rows.filter_text:
            table.set_filter("")
        elif len(self.trail) > 1:
            self._go(self.trail[:-1], back=True)
        else:
            self.action_present()

    def _go(self, trail: list[Place], *, back: bool = False) -> None:
        focused = self.screen_stack[0].focused
        if focused is not None:
            self._focus_at[self.trail[-1].view] = focused
        self.trail = trail
        self._to_front(focus=self._focus_at.get(trail[-1].view) if back else None)

    def _to_front(self, focus: Widget | None = None) -> None:
        place = self.trail[-1]
        view = self.view
        self.screen_stack[0].query_one(Views).current = place.view
        view.about(place.subject)
        self._show_in(view)
        target = focus or view.first_focus
        if target is not None and self.screen is self.screen_stack[0]:
            self.screen.set_focus(target, scroll_visible=False)
        self.show_state()

    def on_virtual_table_opened(self, event: VirtualTable.Opened) -> None:
        """Open the detail of a row."""
        table_id, item = event.table.table.id, event.item
        if table_id.removesuffix("s") in DETAILS:
            self.drill(Place(table_id.removesuffix("s"), subject_of(table_id, item)))
        elif table_id == "spans" and item.pfn is not None:
            self.open_reach(f"{item.pfn:#x}")
        elif table_id == "ram" and item.region:
            self.drill(Place("region", f"region:{item.region}"))
        elif table_id == "mappings" and self.snapshot is not None:
            guest = next((guest for guest in self.snapshot.guests if guest.pid == item.pid), None)
            if guest is not None:
                self.drill(Place("guest", f"guest:{guest.name}"))

    # --- prompts and dialogs --------------------------------------------------------------------------------------

    def on_virtual_table_changed(self) -> None:
        """What the title says of the table may differ."""
        self.show_state()

    def on_virtual_table_wanted(self, event: VirtualTable.Wanted) -> None:
        """Ask for a filter, a column to sort by, or the columns to show."""
        table = event.table
        if event.what == "filter":
            self.query_one(Prompt).ask(table, table.rows.filter_text)
            return
        rows = table.rows
        if event.what == "columns":

            def show(names: list[str] | None) -> None:
                if names:
                    table.set_columns(names)

            self.push_screen(Columns(table.table.fields, rows.fields), show)
            return

        def order(id: str | None) -> None:
            if id is not None:
                field = next((field for field in table.table.fields if field.id == id), None)
                table.set_sort(field, reverse=field is rows.sort_field and not rows.reverse)

        options = [(field.id, f"{field.title:<14} {fit(field.help, 40)}") for field in rows.fields]
        current = rows.sort_field.id if rows.sort_field else ""
        self.push_screen(Pick("Sort by", [*options, ("none", "as the snapshot has them")], current), order)

    def action_command(self) -> None:
        """Ask for a command."""
        self.query_one(Prompt).ask(None)

    def on_input_changed(self, event: Input.Changed) -> None:
        """A filter works while it is typed."""
        if isinstance(event.input, Prompt) and event.input.table is not None and event.input.display:
            event.input.table.set_filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, or do what the command says; one that says nothing stays to be corrected."""
        prompt = event.input
        if not isinstance(prompt, Prompt):
            return
        prompt.leave()
        if prompt.table is None:
            try:
                run_line(self, event.value)
            except MemconsoleError as error:
                self.notify(str(error), title="✖ Command", severity="error", markup=False)
                prompt.ask(None, event.value)

    def begin_here(self, action_id: str) -> None:
        """Begin an action on whatever is chosen where the keys go."""
        node: Any = self.screen_stack[0].focused
        while node is not None and not hasattr(node, "action_act"):
            node = node.parent
        if node is None:
            self.begin(action_id, {})
        else:
            node.action_act(action_id)

    def on_key(self, event: events.Key) -> None:
        """Say why a grey key does nothing."""
        active = self.screen_stack[0].query_one(Keys).grey.get(event.key)
        if active is None or self.screen is not self.screen_stack[0]:
            return
        why = self._reason(active.node, active.binding.id or "")
        self.notify(why or "there is nothing it could work on", title=active.binding.description, markup=False)

    @staticmethod
    def _reason(node: Any, binding_id: str) -> str:
        return str(node.why_not(binding_id)) if hasattr(node, "why_not") and binding_id != "pfn" else ""

    def action_keys(self) -> None:
        """Show the keys that work here."""
        groups: dict[str, dict[str, tuple[list[str], str, str]]] = {}
        for active in self.screen_stack[0].active_bindings.values():
            binding = active.binding
            ours = binding.id or binding.action.startswith("macro(")
            if not (ours and binding.description):
                continue
            where = "Everywhere" if active.node in {self, self.screen_stack[0]} else type(active.node).__name__
            where = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", where)
            text = binding.tooltip or binding.description
            why = "" if active.enabled else self._reason(active.node, binding.id or "") or "no row is chosen"
            group = groups.setdefault(where, {})
            keys = group.setdefault(binding.id or text, ([], text, why))[0]
            keys.append(self.get_key_display(binding))
        lines = [
            (
                where,
                [
                    KeyHelp(" ".join(keys), text, why, id)
                    for id, (keys, text, why) in sorted(group.items(), key=lambda pair: rank(pair[0]))
                ],
            )
            for where, group in groups.items()
        ]
        self.push_screen(Help(lines))

    def get_system_commands(self, screen: Screen[Any]) -> list[SystemCommand]:
        """None: the palette has the console's own."""
        del screen
        return []

    async def action_quit(self) -> None:
        """Leave, after a yes where leaving loses something."""
        warning = self.on_quit_warning() if self.on_quit_warning is not None else ""
        if self.record_to is not None and self.recording_from is not None:
            self.save_recording(self.record_to)
        if not warning:
            self.exit()
            return

        def decided(yes: bool | None) -> None:
            if yes:
                self.exit()

        self.push_screen(Confirm("Leave the console?", warning.splitlines(), "Leave"), decided)


def run(
    source: Source,
    *,
    macros: Sequence[Macro] | None = None,
    interval: float = 1.0,
    record_to: Path | None = None,
    on_quit_warning: Callable[[], str] | None = None,
) -> int:
    """Open the console on a Source until the operator leaves; returns the exit code.

    ``macros`` None stands for those in the macro directories; ``record_to`` records everything into a macro file.

    Raises:
        BadFile: ``console.toml`` cannot be used.
    """
    app = ConsoleApp(
        source,
        interval=interval,
        known_macros=_discovered() if macros is None else macros,
        record_to=record_to,
        settings=settings_module.load(),
        on_quit_warning=on_quit_warning,
    )
    asyncio.run(terminal.run(app))
    return app.return_code or 0


def _discovered() -> Sequence[Macro]:
    return macros.discover()[0]
