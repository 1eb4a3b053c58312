"""The first view: is this host ready, what do its guests do, what is wrong, where does its memory go, and how goes it.

Parts stand by priority from top to bottom, two or three side by side where the terminal is wide; the tables get the
lines that are left, guests first. Tab goes from part to part, and Enter to the view that has more of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message

from memconsole.fields import TABLES
from memconsole.model import Part, Snapshot
from memconsole.units import format_duration
from memconsole.views import glance, tables
from memconsole.views.bound import bound
from memconsole.views.screens.listing import make_table
from memconsole.views.view import View, entitle
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.table import VirtualTable

if TYPE_CHECKING:
    from textual.content import Content
    from textual.widget import Widget

PAIRED = 110
"""Columns from which on parts stand side by side."""
TABLE_FRAME = 2
"""Lines of a table that are no rows: its title and its header."""
LEAST_GUESTS, LEAST_FINDINGS = 3, 2
MOST_FINDINGS = 8


class Panel(Lines):
    """Lines in a frame with a title."""

    DEFAULT_CSS = """
    Panel { border: round $border; border-title-color: $primary; border-title-style: bold; padding: 0 1; height: auto; }
    Panel { border-subtitle-color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    """


class GlancePanel(Panel, can_focus=True):
    """A part of the Overview; Enter, or a click, leads to the view that has more of it."""

    DEFAULT_CSS = """
    GlancePanel { border: none; border-top: solid $border; }
    GlancePanel:focus { border-top: solid $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [bound("open", "open", "Open")]

    class Opened(Message):
        """The operator wants to see more of it."""

        def __init__(self, leads_to: str) -> None:
            super().__init__()
            self.leads_to = leads_to

    def __init__(self, title: str, leads_to: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.border_title = title
        self.leads_to = leads_to

    def action_open(self) -> None:
        """Go to the view that has more of it."""
        self.post_message(self.Opened(self.leads_to))

    def on_click(self) -> None:
        """A click goes there too."""
        self.action_open()


class VerdictPanel(GlancePanel):
    """Whether this host is ready to hand off; Enter goes to the conditions."""


class Overview(View):
    """The host at a glance."""

    DEFAULT_CSS = """
    Overview > VerticalScroll { scrollbar-size-vertical: 1; }
    Overview Horizontal { height: auto; }
    Overview.-stacked Horizontal { layout: vertical; }
    Overview Horizontal > Panel { width: 1fr; height: auto; }
    Overview #verdict { width: 3fr; }
    Overview #last { width: 2fr; }
    Overview.-stacked Horizontal > Panel { width: 100%; }
    Overview VirtualTable {
        border-top: solid $border; border-title-color: $primary; border-title-style: bold; min-height: 3;
    }
    Overview VirtualTable:focus { border-top: solid $primary; }
    Overview #events { height: 1fr; min-height: 6; }
    """

    PARTS = frozenset({Part.USAGE})
    _shown: tuple[Snapshot, int, int] | None = None
    """What the parts were last filled with: a Snapshot, a width, and a height."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._held = glance.Held()

    def compose(self) -> ComposeResult:
        """The parts by priority."""
        with VerticalScroll(can_focus=False):
            with Horizontal():
                yield VerdictPanel("Ready to hand off?", "handoff", id="verdict")
                yield GlancePanel("Last rehearsal", "handoff", id="last")
            yield make_table(
                tables.GLANCE,
                columns="name,state,cpu,pages,stall,blackout,cpu_trend,rss,page_faults,memory,vcpus,gap,kind,pid",
                empty="no guests yet; n starts one, a attaches a running process",
                id="guests-now",
            )
            yield VirtualTable(
                TABLES["findings"],
                columns="severity,subject,observed,id,remedy",
                empty="✔ no findings",
                id="findings-now",
            )
            with Horizontal():
                yield GlancePanel("Physical memory", "host", id="memory")
                yield GlancePanel("Trends", "guests", id="trends")
            with Horizontal():
                yield GlancePanel("Memory by kind", "regions", id="meters")
                yield GlancePanel("Regions and guests", "regions", id="held")
                yield GlancePanel("Live update", "handoff", id="survival")
            yield VirtualTable(
                TABLES["events"],
                columns="at,subject,text,peer",
                empty="nothing has happened yet",
                stay_on_top=True,
                id="events-now",
            )
            yield VirtualTable(tables.GAPS, empty="✔ everything could be read", id="gaps-now")

    def on_mount(self) -> None:
        """The newest events first."""
        self.query_one("#events-now", VirtualTable).set_sort(TABLES["events"].fields[0], reverse=True)

    def show(self, snapshot: Snapshot) -> None:
        """Fill the parts, and give the tables what room is left."""
        shown = (snapshot, self.room, self.app.size.height)
        if self._shown is not None and self._shown[0] is snapshot and self._shown[1:] == shown[1:]:
            return
        self._shown = shown
        self.set_class(self.room < PAIRED, "-stacked")
        above = self._say(snapshot)
        self._fill("guests", tables.glance_rows(snapshot), "Guests")
        self._fill("findings", TABLES["findings"].rows(snapshot), "Findings")
        self._fill("events", snapshot.events, "Events")
        self._fill("gaps", snapshot.gaps, "What could not be read")
        self._share(snapshot, self.app.size.height - 4 - above)

    def _say(self, snapshot: Snapshot) -> int:
        """Fill the panels; the lines that those of them take that are in sight whatever the tables need."""
        stacked = self.room < PAIRED
        wide = self.room - 3  # the scrollbar, and a cell at either side
        widths = (wide * 3 // 5 - 2, wide * 2 // 5 - 3, wide // 2 - 2, wide // 3 - 3)
        of_verdict, of_last, half, third = (wide,) * 4 if stacked else widths
        verdict = glance.verdict_lines(snapshot, of_verdict)
        last = glance.rehearsal_lines(snapshot, of_last)
        use = glance.use_lines(snapshot, half, self._held.resident(snapshot))
        place = glance.place_lines(snapshot, half)
        busy = glance.processor_lines(snapshot, half)
        trends = glance.trend_lines(glance.host_trends(snapshot), half)
        meters = glance.memory_lines(snapshot.memory, third)
        self.query_one("#last").display = not stacked
        self._panel("verdict", [*verdict, *last] if stacked else verdict)
        self._panel("last", last)
        self._panel("memory", use if stacked else [*use, *place, *busy])
        self._panel("trends", trends)
        self._panel("meters", [*place, *busy, *meters] if stacked else meters)
        self._panel("held", self._held.lines(snapshot))
        self._panel("survival", glance.survival_lines(snapshot.survival))
        entitle(self.query_one("#trends"), ", ".join(filter(None, ["Trends", glance.trend_span(snapshot)])))
        thp = f"Memory by kind, shmem huge pages: {snapshot.memory.shmem_thp}" if snapshot.memory.shmem_thp else ""
        entitle(self.query_one("#meters"), thp or "Memory by kind")
        if stacked:
            return len(verdict) + len(last) + len(use) + len(trends) + 3
        return max(len(verdict), len(last)) + max(len(use) + len(place) + len(busy), len(trends)) + 2

    def _panel(self, id: str, lines: list[Content]) -> None:
        self.query_one(f"#{id}", Panel).show_lines(lines)

    def _fill(self, name: str, rows: Any, title: str) -> None:
        table = self.query_one(f"#{name}-now", VirtualTable)
        table.load(rows)
        entitle(table, f"{title} {len(rows):,}" if rows else title)

    def _share(self, snapshot: Snapshot, room: int) -> None:
        """Give guests and findings what they need of so many lines, guests first, and each of them its least."""
        room -= 2 * TABLE_FRAME
        findings = min(max(len(snapshot.findings), 1), MOST_FINDINGS)
        guests = min(max(len(snapshot.guests), 1), max(room - findings, LEAST_GUESTS, room * 3 // 5))
        findings = min(findings, max(room - guests, LEAST_FINDINGS))
        gaps = min(len(snapshot.gaps), MOST_FINDINGS)
        for name, rows in (("guests", guests), ("findings", findings), ("gaps", gaps)):
            table = self.query_one(f"#{name}-now", VirtualTable)
            table.styles.height = rows + TABLE_FRAME
        self.query_one("#gaps-now").display = bool(snapshot.gaps)

    def on_glance_panel_opened(self, event: GlancePanel.Opened) -> None:
        """Go to the view that has more of a part."""
        self.console.open_view(event.leads_to)

    def on_resize(self) -> None:
        """Draw the parts anew."""
        if self.console.snapshot is not None:
            self.show(self.console.snapshot)

    @property
    def status(self) -> str:
        """How long the host has been up."""
        snapshot = self.console.snapshot
        return "" if snapshot is None else f"up {format_duration(int(snapshot.host.uptime_s * 1e9))}"

    @property
    def first_focus(self) -> Widget | None:
        """The guests."""
        return self.query_one("#guests-now", VirtualTable)
