"""The PFN map: where every page of a guest or a region is, from the whole down to one page.

``HeatMap`` draws, ``pagefacts`` knows what to say of the page under the cursor, and this view brings the table: it is
scanned in a thread, when the view is opened and when the operator asks for it again, not with the Snapshot's refresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input
from textual.worker import get_current_worker

from memconsole.errors import MemconsoleError
from memconsole.extents import ExtentTable, Stats
from memconsole.fields import Field, Table
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.units import format_size
from memconsole.views.view import View
from memconsole.views.widgets.facts import STYLES, Fact, Lines
from memconsole.views.widgets.heatmap import HeatMap
from memconsole.views.widgets.pagefacts import Space, describe, describe_cell
from memconsole.views.widgets.pagegrid import LOOKS, RUNS, Look, Marks
from memconsole.views.widgets.table import VirtualTable, fit

PANEL = 38
"""Columns the panel needs to stand beside the map; with fewer it goes below."""
ENOUGH = 64
"""Cells a row must keep beside the panel."""
LABEL = 10


class Subject(NamedTuple):
    """A map that can be opened."""

    key: str
    size: int
    resident: int | None
    runs: int | None


def subjects(snapshot: Snapshot) -> list[Subject]:
    """The maps of a Snapshot: its guests, then its regions."""
    found = [
        Subject(
            f"guest:{guest.name}",
            guest.memory or sum(block.size for block in (guest.seen.ram if guest.seen else ())),
            sum(block.resident for block in guest.seen.ram) if guest.seen else None,
            None,
        )
        for guest in snapshot.guests
    ]
    found += [
        Subject(
            f"region:{region.name}",
            region.size,
            region.seen.resident if region.seen else None,
            region.seen.runs if region.seen else None,
        )
        for region in snapshot.regions
    ]
    return found


def _shown_size(value: Any) -> str:
    return "-" if value is None else format_size(value)


def _shown_number(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


SUBJECTS = Table(
    "maps",
    "PFN maps",
    subjects,
    lambda subject: str(subject.key),
    (
        Field("key", "Map of", "a guest, by gpa; a region, by offset", lambda s: s.key, width=30),
        Field("size", "Size", "bytes it spans", lambda s: s.size, _shown_size, "bytes", 8, right=True),
        Field("resident", "Resident", "bytes with a frame", lambda s: s.resident, _shown_size, "bytes", 8, right=True),
        Field("runs", "Runs", "runs of frames, once scanned", lambda s: s.runs, _shown_number, width=10, right=True),
    ),
)


class GoTo(Input):
    """Asks for a page; Escape thinks better of it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back", show=False)]

    class Left(Message):
        """The operator does not want to go anywhere."""

    def action_leave(self) -> None:
        """Say so."""
        self.post_message(self.Left())


class PfnMap(View):
    """The heat map of one guest or region with what the cursor is on; without a subject, the list of what there is."""

    DEFAULT_CSS = """
    PfnMap { layout: vertical; }
    PfnMap > #pfn-title { height: 1; width: 1fr; padding: 0 1; }
    PfnMap > #pfn-body { height: 1fr; layout: vertical; }
    PfnMap #pfn-panel { height: auto; }
    PfnMap #pfn-facts { padding: 0 1; }
    PfnMap #pfn-legend { padding: 0 1; }
    PfnMap.-beside > #pfn-body { layout: horizontal; }
    PfnMap.-beside #pfn-panel { width: 1fr; height: 1fr; }
    PfnMap.-beside #pfn-legend { margin-top: 1; }
    PfnMap GoTo { display: none; border: none; height: 1; padding: 0 1; }
    PfnMap.-asking GoTo { display: block; }
    PfnMap > VirtualTable { display: none; }
    PfnMap.-picking > VirtualTable { display: block; }
    PfnMap.-picking > #pfn-body { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("g", "ask", "Go to", id="pfn.go", tooltip="an address, hva ADDRESS, or pfn NUMBER"),
        Binding("r", "rescan", "Scan again", id="pfn.rescan", tooltip="read the map again and mark what moved"),
        Binding("s", "pick", "Other map", id="pfn.pick"),
    ]

    class Scanned(Message):
        """A scan ended: with a table and what changed since the one before, or with an error."""

        def __init__(
            self,
            subject: str,
            table: ExtentTable | None,
            stats: Stats | None,
            marks: Marks | None,
            error: MemconsoleError | None,
        ) -> None:
            super().__init__()
            self.subject = subject
            self.table = table
            self.stats = stats
            self.marks = marks
            self.error = error

    class Opened(Message):
        """A map is on the screen, or the reason why it is not."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table: ExtentTable | None = None
        self.marks: Marks | None = None
        self.error: MemconsoleError | None = None
        self.scanning = False
        self._stats: Stats | None = None
        self._snapshot: Snapshot | None = None
        self._space: Space | None = None
        self._shown = ""
        self._scanned_from: Source | None = None
        self._legend_for: tuple[bool, bool, str] | None = None

    def compose(self) -> ComposeResult:
        """Title, map and panel, the question where to go, and the list of maps."""
        yield Lines(id="pfn-title")
        with Horizontal(id="pfn-body"):
            yield HeatMap(self._say_all)
            with Vertical(id="pfn-panel"):
                yield Lines(id="pfn-facts")
                yield Lines(id="pfn-legend")
        yield GoTo(placeholder="0x1000000, 64M, hva 0x7f0000000000, pfn 0x1234", select_on_focus=True)
        yield VirtualTable(SUBJECTS, empty="no guests and no regions: nothing has pages here")

    # --- what is shown ----------------------------------------------------------------------------------------------

    @property
    def map(self) -> HeatMap:
        """The heat map."""
        return self.query_one(HeatMap)

    @property
    def first_focus(self) -> Widget | None:
        """The map, or the list of maps."""
        return self.map if self._shown else self.query_one(VirtualTable)

    @property
    def current_table(self) -> VirtualTable | None:
        """The list of maps, while it is shown."""
        return None if self._shown else self.query_one(VirtualTable)

    def about(self, subject: str) -> None:
        """Open the map of ``region:NAME`` or ``guest:NAME``; the list of maps for none."""
        super().about(subject)
        if subject != self._shown:
            self._shown = subject
            self._begin()

    def _begin(self) -> None:
        """Forget the map and scan, if there is a subject."""
        self.table = self.marks = self.error = self._space = self._stats = None
        self.map.clear()
        self.set_class(not self._shown, "-picking")
        if self._shown:
            self._scan()
        self._say_all()

    def show(self, snapshot: Snapshot) -> None:
        """Take what a new Snapshot says of whose the pages are; the map itself stays as it was scanned.

        The map of another source (the past, the present) is another map.
        """
        before, self._snapshot = self._snapshot, snapshot
        if self._shown and self._scanned_from is not self.console.source:
            self._begin()
        if not self._shown:
            self.set_class(True, "-picking")
            self.query_one(VirtualTable).load(subjects(snapshot))
            self._say_title()
        elif before is None or any(
            getattr(before, name) is not getattr(snapshot, name) for name in ("regions", "guests", "grants")
        ):
            self._draw()

    def _draw(self) -> None:
        """Put table and Snapshot together."""
        if self.table is not None and self._snapshot is not None:
            self._space = Space(self._snapshot, self._shown)
            self.map.show(self.table, self._space.blocks(self.table), self.marks)

    def on_mount(self) -> None:
        """Nothing is asked yet."""
        self.set_class(not self._shown, "-picking")

    def on_resize(self, event: events.Resize) -> None:
        """Put the panel beside the map where there is room for both."""
        width = event.size.width
        beside = HeatMap.cells_for(width - PANEL) >= min(ENOUGH, HeatMap.cells_for(width))
        self.set_class(beside, "-beside")
        self.map.styles.width = HeatMap.width_for(width - PANEL) if beside else "1fr"
        self.call_after_refresh(self._say_all)

    # --- scanning ---------------------------------------------------------------------------------------------------

    def action_rescan(self) -> None:
        """Read the map again and mark what moved."""
        if self._shown and not self.scanning:
            self._scan()
            self._say_title()

    def _scan(self) -> None:
        self.scanning = True
        self._scanned_from = self.console.source
        self._scan_in_thread(self._scanned_from, self._shown, self.table)

    @work(thread=True, exclusive=True, group="pfn-scan", exit_on_error=False)
    def _scan_in_thread(self, source: Source, subject: str, before: ExtentTable | None) -> None:
        worker = get_current_worker()
        try:
            table = source.extents(subject)
            table.lookup_pfn(0)  # sorts the frames here, so that no key has to wait for it
            marks = None if before is None else Marks(before, table)
            scanned = self.Scanned(subject, table, table.stats(), marks, None)
        except MemconsoleError as error:
            scanned = self.Scanned(subject, None, None, None, error)
        if not worker.is_cancelled:
            self.post_message(scanned)

    def on_pfn_map_scanned(self, message: Scanned) -> None:
        """Show what a scan found; after an error, what was there before, and the error."""
        message.stop()
        if message.subject != self._shown:
            return
        self.scanning, self.error = False, message.error
        if message.table is not None:
            self.table, self.marks, self._stats = message.table, message.marks, message.stats
            self._draw()
        self._say_all()
        self.post_message(self.Opened())

    # --- words ------------------------------------------------------------------------------------------------------

    def _say_all(self) -> None:
        self._say_title()
        self._say_facts()
        self._say_legend()

    def _say_title(self) -> None:
        self.query_one("#pfn-title", Lines).say([self._title()])

    def _title(self) -> Content:
        if not self._shown:
            return Content.styled("Enter opens a map, / filters", "$text-muted")
        parts: list[str | tuple[str, str]] = [(self._shown, "bold $primary")]
        if self.marks is not None:
            marks = self.marks
            parts.append((f"  moved {marks.moved:,} came {marks.came:,} gone {marks.gone:,}", "$warning"))
        if self._stats is not None and self.table is not None:
            stats, size = self._stats, self.table.page_size
            words = [
                f"{format_size(stats.pages * size)} in {format_size(self.map.cell_pages * size)}",
                f"{format_size(stats.present * size)} {100 * stats.present // max(stats.pages, 1)}% resident",
                f"{format_size(stats.huge * size)} huge",
                f"{format_size(stats.swapped * size)} swap",
                f"{stats.runs:,} runs",
            ]
            parts.append("  " + "  ".join(words))
        if self.scanning:
            parts.append(("  scanning…", "$accent"))
        if self.error is not None:
            parts.append((f"  {self.error}", "bold $error"))
        return Content.assemble(*parts)

    def _say_facts(self) -> None:
        facts: Sequence[Fact] = ()
        if self.table is not None and self._space is not None:
            facts = describe(self._space, self.table, self.marks, self.map.cursor)
            facts = [*facts, *describe_cell(self.table, *self.map.cell)]
        widget = self.query_one("#pfn-facts", Lines)
        width = max(20, (widget.size.width or self.size.width))
        columns = 1 if self.has_class("-beside") else 2
        height, cell = -(-len(facts) // columns), width // columns
        widget.say([self._fact_line(facts[row::height], cell) for row in range(height)])

    @staticmethod
    def _fact_line(facts: Sequence[Fact], cell: int) -> Content:
        parts = []
        for fact in facts:
            parts.append((fit(fact.title, LABEL), "$secondary"))
            parts.append((fit(fact.text, cell - LABEL - 1) + " ", STYLES[fact.tone]))
        return Content.assemble(*parts)

    def _say_legend(self) -> None:
        key = (self.map.by_runs, self.has_class("-beside"), self.app.theme)
        if key == self._legend_for:
            return
        self._legend_for = key
        looks = (LOOKS[1], *RUNS) if self.map.by_runs else LOOKS[1:]
        if self.has_class("-beside"):
            lines = [Content.assemble(self._sample(look), (f" {look.title}", "$text-muted")) for look in looks]
            lines += [Content("")] * (len(RUNS) + 1 - len(lines))  # as high as the other legend: no new layout
        elif self.map.by_runs:
            lines = [Content.assemble(*map(self._sample, RUNS), ("  a digit D: 2^D runs or more", "$text-muted"))]
        else:
            parts: list[tuple[str, str]] = []
            for look in looks:
                parts += [self._sample(look), (f" {look.brief}  " if look.brief else "", "$text-muted")]
            lines = [Content.assemble(*parts)]
        self.query_one("#pfn-legend", Lines).say(lines)

    def _sample(self, look: Look) -> tuple[str, str]:
        return look.glyph, self.map.get_component_styles(f"heatmap--{look.id}").color.hex

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The keys of a map do nothing in the list of maps."""
        if action in {"ask", "rescan", "pick"} and not self._shown:
            return False
        return super().check_action(action, parameters)

    # --- where to go ------------------------------------------------------------------------------------------------

    def action_ask(self) -> None:
        """Ask for a page."""
        if self.table is not None:
            self.add_class("-asking")
            self.query_one(GoTo).focus()

    def _asked(self) -> None:
        self.remove_class("-asking")
        self.map.focus()

    def on_go_to_left(self, message: GoTo.Left) -> None:
        """Back to the map."""
        message.stop()
        self._asked()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        """Go there, or say why not."""
        message.stop()
        if self.table is None or self._space is None:
            self._asked()
            return
        try:
            page = self._space.find(message.value, self.table)
        except MemconsoleError as error:
            self.notify(str(error), severity="error")
            return
        self._asked()
        self.map.go(page)

    def action_pick(self) -> None:
        """Show the list of maps."""
        self.console.open_view("pfn")

    def on_virtual_table_opened(self, message: VirtualTable.Opened) -> None:
        """Open the map that was chosen."""
        message.stop()
        self.console.open_view("pfn", message.item.key)
