"""The console: one screen of bars and views over a Source; navigation, prompts and keys.

``Following`` brings Snapshots, ``Doing`` applies Actions, this class shows: a trail of places (view and subject) whose
last one is in front.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.command import Provider
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver
from textual.screen import Screen
from textual.theme import Theme
from textual.widget import Widget

from memconsole import keys
from memconsole.command import CommandLine
from memconsole.commandlog import CommandLog
from memconsole.errors import MemconsoleError, UsageError
from memconsole.fields import TABLES
from memconsole.macros import Macro
from memconsole.model import Event
from memconsole.source import Source
from memconsole.views import terminal, themes
from memconsole.views.bookmarking import Bookmarking
from memconsole.views.bound import bound
from memconsole.views.commands import Commands
from memconsole.views.completing import complete
from memconsole.views.doing import LONG
from memconsole.views.headline import crumbs, headline, trouble_lines
from memconsole.views.helping import helped
from memconsole.views.painting import Views
from memconsole.views.places import Place, place_of
from memconsole.views.private import unbind, use_mouse
from memconsole.views.remembering import Memory
from memconsole.views.screens.detail import DETAILS
from memconsole.views.screens.dialogs import Confirm
from memconsole.views.screens.help import Help
from memconsole.views.screens.overview import Overview
from memconsole.views.screens.pfnmap import map_of, map_words
from memconsole.views.scripting import Command
from memconsole.views.settings import ConsoleSettings
from memconsole.views.tabbed import VIEWS, Named
from memconsole.views.view import View, subject_of
from memconsole.views.widgets.assist import Assist
from memconsole.views.widgets.bars import Header, Keys, Tabs, Title
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.prompt import Prompt
from memconsole.views.widgets.table import VirtualTable
from memconsole.views.widgets.timebar import TimeBar

BEGIN_S = 0.05


class ConsoleApp(Bookmarking):
    """The operator's console over any Source.

    ``known_macros`` are offered and bound to their keys, without them those of the macro directories; ``settings``
    remap keys and choose colours; ``clock`` gives nanoseconds since the epoch; ``on_quit_warning`` says what leaving
    would lose; ``command`` runs the commands of macros. ``memory`` is what former sessions left, ``said`` the command
    lines that they did; ``command_line`` runs what is typed behind ``:``.
    """

    TITLE = "memconsole"
    ENABLE_COMMAND_PALETTE = True
    AUTO_FOCUS = None
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {Commands}
    CSS = """
    Views { height: 1fr; }
    #trouble { display: none; padding: 0 1; color: $error; text-style: bold; }
    Toast { padding: 0 1; max-width: 72; }
    CommandPalette { background: transparent; }
    CommandPalette .option-list--option-highlighted { background: $block-cursor-background; }
    CommandPalette:ansi .option-list--option-highlighted {
        background: ansi_default; color: ansi_default; text-style: bold reverse;
    }
    CommandPalette .command-palette--help-text { color: $text-muted; text-style: none; }
    """
    VIEWS: ClassVar[tuple[Named, ...]] = VIEWS
    ALIASES: ClassVar[Mapping[str, str]] = {
        "windows": "mmio",
        "devices": "mmio",
        "iomem": "mmio",
        "domains": "iommu",
        "findings": "audit",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        *(bound(f"view-{view.name}", f"go({number})", view.title, show=False) for number, view in enumerate(VIEWS, 1)),
        bound("back", "leave", "Back", show=False),
        bound("next-table", "focus_next", "Next table", show=False),
        bound("former-table", "focus_previous", "Previous table", show=False),
        bound("pause", "pause", "Freeze", tooltip="let the picture stand still, or go on; recording goes on"),
        bound("undo", "undo", "Undo", show=False, tooltip="plan what undoes the last action"),
        bound("refresh", "refresh", "Refresh now", show=False),
        bound("record", "record", "Record a macro", show=False),
        bound("command", "command", "Command"),
        bound("palette", "command_palette", "Palette", show=False),
        bound("help", "keys", "Help"),
        bound("mouse", "mouse", "Mouse", show=False, tooltip="leave the mouse to the terminal, or take it back"),
        bound("quit", "quit", "Quit"),
    ]

    def __init__(
        self,
        source: Source,
        *,
        interval: float = 1.0,
        clock: Callable[[], int] = time.time_ns,
        known_macros: Sequence[Macro] | None = (),
        record_to: Path | None = None,
        command: Command | None = None,
        settings: ConsoleSettings | None = None,
        on_quit_warning: Callable[[], str] | None = None,
        memory: Memory | None = None,
        command_line: CommandLine | None = None,
        said: CommandLog | None = None,
    ) -> None:
        self.memory = memory or Memory()
        self.command_line = command_line
        self.said = said or CommandLog()
        super().__init__(
            source, interval=interval, clock=clock, known_macros=known_macros, record_to=record_to, command=command
        )
        self.settings = settings or ConsoleSettings()
        self.on_quit_warning = on_quit_warning
        self.trail: list[Place] = [Place("overview")]
        self.parts = Overview.PARTS
        self._focus_at: dict[str, Widget] = {}
        self._macro_keys: list[str] = []
        self._held_keys = keys.keymap(self.settings.keymap, self.settings.keys, self.settings.place)
        self._view_keys = [keys.split(self._held_keys.keys[f"view-{view.name}"])[0] for view in self.VIEWS]
        self.pane = self.settings.pane
        self.mouse = self.settings.mouse
        self._begun = False
        self.begin_at: Place | None = None
        """Where it opens; the first view without."""
        self._was_away = False
        for theme in themes.OWN:
            self.register_theme(theme)
        few = self.no_color or self.console.color_system not in {"256", "truecolor"}
        self.theme = (themes.SIXTEEN if few else themes.DARK).name

    def get_theme(self, theme_name: str) -> Theme | None:
        """A theme by its name, so that its text can be read."""
        theme = super().get_theme(theme_name)
        return None if theme is None else themes.readable(theme)

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
        yield TimeBar()
        yield Lines(id="trouble")
        with Views(initial="overview"):
            yield self.VIEWS[0].cls(id=self.VIEWS[0].name)
        yield Assist()
        yield Prompt(partial(complete, self), self.memory)
        yield Keys()

    def on_mount(self) -> None:
        """Begin to follow the source."""
        if self.settings.theme in self.available_themes:
            self.theme = self.settings.theme
        elif self.settings.theme:
            self.notify(f"there is no theme {self.settings.theme}", severity="warning", markup=False)
        if self.memory.trouble:
            self.notify(self.memory.trouble, title="Nothing is remembered", severity="warning", markup=False)
        self._bind_keys()
        self.watch_macros()
        self.follow()

    def on_ready(self) -> None:
        """The first view is there: show what has arrived by now, and build the others behind it."""
        self._begun = True
        self.set_interval(1.0, self.show_state)
        self.set_interval(1.0, self.tidy)
        self._to_front()
        others = [*((view.name, view.cls) for view in self.VIEWS[1:]), *DETAILS.items()]
        self.set_timer(BEGIN_S, partial(self._build, others))  # once the first frame is out

    async def _build(self, rest: Sequence[tuple[str, type[View]]]) -> None:
        """Build one more view; keys are done once there are all."""
        views = self.screen_stack[0].query_one(Views)
        if not views.is_attached:
            return  # the console ends before it was all there
        if rest:
            (name, cls), *later = rest
            await views.add(cls(id=name))
            self.call_later(self._build, later)
            return
        self.enduring = True
        await self.opened()
        if self.begin_at is not None:
            self._begin_there(self.begin_at)

    def _begin_there(self, place: Place) -> None:
        """Open where one wants to be, which wants a Snapshot."""
        if self.snapshot is None and not self.trouble:
            self.set_timer(BEGIN_S, partial(self._begin_there, place))
            return
        try:
            self.open_view(place.view, place.subject.partition(":")[2] if place.view in DETAILS else place.subject)
        except MemconsoleError as error:
            self.notify(str(error), severity="warning", markup=False)

    def macros_changed(self) -> None:
        """Bind the keys of the macros that are known now, and no others."""
        for key in self._macro_keys:
            unbind(self, key)
        self._macro_keys = []
        taken = keys.taken(self._held_keys.keys)
        for macro in self.macros:
            for key in keys.split(macro.key):
                if key in taken:
                    text = f"{macro.key} is {taken[key].help}; run it from the palette, or give it another key"
                    self.notify(text, title=f"Macro {macro.name} has no key", severity="warning", markup=False)
                else:
                    self.bind(key, f"macro({macro.name!r})", description=macro.title or macro.name, show=False)
                    self._macro_keys.append(key)

    def _bind_keys(self) -> None:
        for complaint in self._held_keys.complaints:
            self.notify(complaint, title="Keys", severity="warning", timeout=LONG, markup=False)
        self.macros_changed()
        self.set_keymap({id: text for id, text in self._held_keys.keys.items() if text != keys.OF_BINDING[id].keys})

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
        if self.trail[-1].view in {"audit", "finding"} and not self.away:
            self.alerts.looked()
        base = self.screen_stack[0]
        base.query_one(Header).show_parts(*headline(self))
        trouble = base.query_one("#trouble", Lines)
        trouble.display = bool(self.trouble)
        trouble.show_lines(trouble_lines(self, self.size.width - 2))
        tabs = [
            (key, view.title, self._count(view.counts)) for key, view in zip(self._view_keys, self.VIEWS, strict=True)
        ]
        names, here = [view.name for view in self.VIEWS], self.trail[0].view
        base.query_one(Tabs).show(tabs, names.index(here) if here in names else -1)
        self.want(self.view.parts)
        self.show_history(base.query_one(TimeBar))
        base.query_one(Title).show_parts(
            crumbs(self.trail, {view.name: view.title for view in self.VIEWS}),
            [(f"{self.view.status} ", "$text-muted")],
        )

    def _count(self, name: str) -> int | None:
        return len(getattr(self.snapshot, name)) if name and self.snapshot is not None else None

    # --- going places ---------------------------------------------------------------------------------------------

    @property
    def numbered_views(self) -> Sequence[Named]:
        """The views that have a number, in its order."""
        return self.VIEWS

    @property
    def themes(self) -> Sequence[str]:
        """The names of the themes, sorted."""
        return sorted(self.available_themes)

    def use_theme(self, name: str) -> None:
        """Use another theme.

        Raises:
            UsageError: there is no such theme.
        """
        if name not in self.available_themes:
            raise UsageError(f"there is no theme {name!r}", "none has this name", f"themes: {', '.join(self.themes)}")
        self.theme = name

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
            UsageError: there is no such view, or the name of a map is that of a region and of a guest.
            NotFound: there is no map of this name.
        """
        if not self.is_view(name):
            known = ", ".join(view.name for view in self.VIEWS)
            raise UsageError(f"there is no view {name!r}", "none has this name", f"views: {known}")
        name = self.ALIASES.get(name, name)
        kind = subject.partition(":")[0]
        if name in {"pfn", "host"}:
            known, rest = map_words(name, self.snapshot, subject)
            self._go([Place(name, known)])
            self.view.aim(rest)
        elif name in DETAILS:
            self._go([*self._root_of(name), Place(name, f"{name}:{subject}")])
        elif kind in DETAILS:
            self._go([Place(name), Place(kind, subject)])
        else:
            self._go([Place(name, subject)])
        self.journal.append((name, subject))

    def open_goal(self, view: str, subject: str = "", page: int | None = None) -> None:
        """Go one step deeper: to a view of a subject, and there to a page of its map; Escape comes back."""
        self.drill(Place(view, subject))
        self.view.aim(page)

    def _root_of(self, kind: str) -> list[Place]:
        name = "guests" if kind == "reach" else f"{kind}s"
        return [Place(self.ALIASES.get(name, name))]

    def drill(self, place: Place) -> None:
        """Go one step deeper; Escape comes back."""
        self._go([*self.trail, place])

    def open_named(self, name: str) -> None:
        """Open what a finding or an event is about, by its name alone."""
        place = place_of(self.snapshot, name)
        if place is not None:
            self.drill(place)
        elif self.snapshot is not None:
            self.notify("this snapshot has no region, guest, grant or device of this name", title=name, markup=False)

    def open_event(self, event: Event) -> None:
        """Open what an event is about; the event itself where that is gone, or in front already."""
        place = place_of(self.snapshot, event.subject)
        if place is not None and place not in self.trail:
            self.drill(place)
        elif place is None and event.kind.startswith("handoff"):
            self.open_view("handoff")
        else:
            self.drill(Place("event", f"event:{TABLES['events'].key(event)}"))

    def open_pfn(self, table_id: str, item: Any) -> None:
        """Open the map of an entity: its pages, its IOVA (of a device, its group's), or its place on the host map."""
        goal = map_of(table_id, item)
        if isinstance(goal, str):
            self.notify(goal, markup=False)
        else:
            self.open_goal(*goal)

    def open_reach(self, target: str) -> None:
        """Open what a target is and who reaches it: a guest, a PFN, or ADDRESS@ a device, a guest or a region."""
        self.drill(Place("reach", f"reach:{target}"))

    def action_go(self, number: int) -> None:
        """Open a view by its number."""
        self.open_view(self.VIEWS[number - 1].name)

    def action_leave(self) -> None:
        """Clear the marks, or the filter, or go back one step, or return to the present."""
        table = self.view.current_table
        if table is not None and table.rows.marked:
            table.clear_marks()
        elif table is not None and table.rows.filter_text:
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
        self.before_frame(self.show_state)

    def on_virtual_table_row_opened(self, event: VirtualTable.RowOpened) -> None:
        """Open the detail of a row."""
        table_id, item = event.table.table.id, event.item
        if table_id == "events":
            self.open_event(item)
        elif table_id.removesuffix("s") in DETAILS:
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
        self.do_due()
        active = self.screen_stack[0].query_one(Keys).grey.get(event.key)
        if active is None or self.screen is not self.screen_stack[0]:
            return
        why = self._reason(active.node, active.binding.id or "")
        self.notify(why or "it has nothing to work on here", title=active.binding.description, markup=False)

    @staticmethod
    def _reason(node: Any, binding_id: str) -> str:
        return str(node.why_not(binding_id)) if hasattr(node, "why_not") and binding_id != "pfn" else ""

    def action_keys(self) -> None:
        """Show the keys that work here, and what the signs and words on the screen mean."""
        base = self.screen_stack[0]
        self.push_screen(Help(helped(base, self.view, self._reason)))

    def action_mouse(self) -> None:
        """Leave the mouse to the terminal, which marks and copies text with it, or take it back."""
        self.mouse = not self.mouse
        use_mouse(self, on=self.mouse)
        words = "a click goes to tabs, keys, rows and pages" if self.mouse else "the terminal has the mouse"
        self.notify(words, title=f"Mouse {'on' if self.mouse else 'off'}", timeout=3, markup=False)

    def get_system_commands(self, screen: Screen[Any]) -> list[SystemCommand]:
        """None: the palette has the console's own."""
        del screen
        return []

    def leave_console(self) -> None:
        """Leave, after a yes where leaving loses something."""
        self.call_later(self.action_quit)

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
