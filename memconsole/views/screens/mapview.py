"""A map on the screen: title, cells, what the cursor is on, legend, and the question where to go.

``HeatMap`` draws, a *model* knows what to draw and what to say; it is made in a thread, when the view is opened and
when the operator asks for it again, not with the Snapshot's refresh. Maps of guests, of the host and of IOMMU domains
are models of their own in this one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input
from textual.worker import get_current_worker

from memconsole import unforeseen
from memconsole.errors import MemconsoleError
from memconsole.model import Snapshot
from memconsole.recording import REASON
from memconsole.source import PastSource, Source
from memconsole.units import format_age
from memconsole.views.bound import bound
from memconsole.views.screens.frameasking import FrameAsking
from memconsole.views.screens.mapmodel import MapModel
from memconsole.views.widgets.facts import STYLES, Fact, Lines
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.goto import GoTo
from memconsole.views.widgets.heatmap import HeatMap
from memconsole.views.widgets.layers import Layer
from memconsole.views.widgets.pagegrid import CellLook

PANEL = 38
"""Columns the panel needs to stand beside the map; with fewer it goes below."""
ENOUGH = 64
"""Cells a row must keep beside the panel."""
LABEL = 10
SETTLED_S = 0.1
"""How long after a terminal's size changed the panel is laid out once more."""
MINIMAP = ("right edge: the whole map,", "the part on the screen inverted")


class MapView(FrameAsking):
    """The base of the maps."""

    DEFAULT_CSS = """
    MapView { layout: vertical; }
    MapView > #pfn-title { height: 1; width: 1fr; padding: 0 1; }
    MapView > #pfn-body { height: 1fr; layout: vertical; }
    MapView #pfn-panel { height: auto; }
    MapView #pfn-facts { padding: 0 1; }
    MapView #pfn-legend { padding: 0 1; }
    MapView.-beside > #pfn-body { layout: horizontal; }
    MapView.-beside #pfn-panel { width: 1fr; height: 1fr; }
    MapView.-beside #pfn-legend { margin-top: 1; }
    MapView GoTo { display: none; height: 1; padding: 0 1; color: $foreground; background: $panel; }
    MapView GoTo, MapView GoTo:focus { border: none; }
    MapView.-asking GoTo { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("map.open", "open", "Go there", tooltip="open what the cursor is on"),
        bound("pfn.go", "ask", "Go to", tooltip="type an address to go to"),
        bound("map.colour", "mode(1)", "Colour by", tooltip="show it by something else"),
        bound("map.former-colour", "mode(-1)", "Colour by the one before", show=False),
        bound("pfn.rescan", "rescan", "Scan again", tooltip="read it again and mark what moved"),
    ]
    PLACEHOLDER: ClassVar[str] = "an address"

    class Read(Message):
        """A map was read, or why not."""

        def __init__(
            self, subject: str, model: MapModel | None, layer: Layer | None, error: MemconsoleError | None
        ) -> None:
            super().__init__()
            self.subject = subject
            self.model = model
            self.layer = layer
            self.error = error

    class Coloured(Message):
        """A mode's layer was made, or why not."""

        def __init__(self, model: MapModel, number: int, layer: Layer | None, error: MemconsoleError | None) -> None:
            super().__init__()
            self.model = model
            self.number = number
            self.layer = layer
            self.error = error

    class MapOpened(Message):
        """A map is on the screen, or the reason why it is not."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model: MapModel | None = None
        self.error: MemconsoleError | None = None
        self.scanning = False
        self.mode = 0
        self._layers: dict[int, Layer] = {}
        self._refused: set[int] = set()
        self._aim: str | int | None = None
        self._snapshot: Snapshot | None = None
        self._shown = ""
        self._read_from: Source | None = None
        self._read_ns = 0
        self._legend_for: tuple[object, ...] | None = None
        self._legend_height = 0

    def compose(self) -> ComposeResult:
        """Title, map and panel, and the question where to go."""
        yield Lines(id="pfn-title")
        with Horizontal(id="pfn-body"):
            yield HeatMap(self._say_all)
            with Vertical(id="pfn-panel"):
                yield Lines(id="pfn-facts")
                yield Lines(id="pfn-legend")
        yield GoTo(self.PLACEHOLDER)

    # --- what the maps differ in ------------------------------------------------------------------------------------

    def read_model(self, source: Source, subject: str, snapshot: Snapshot, before: MapModel | None) -> MapModel:
        """Read a map, in a thread; ``before`` is the one on the screen.

        Raises:
            MemconsoleError: it cannot be read.
        """
        raise NotImplementedError

    # --- what is shown ----------------------------------------------------------------------------------------------

    @property
    def map(self) -> HeatMap:
        """The map itself."""
        return self.query_one(HeatMap)

    @property
    def first_focus(self) -> Widget | None:
        """The map."""
        return self.map

    @property
    def colours(self) -> Layer | None:
        """What it is coloured by."""
        return self._layers.get(self.mode)

    @property
    def status(self) -> str:
        """What it is coloured by, and how old the scan is."""
        if self.model is None:
            return ""
        return " · ".join(filter(None, [f"by {self.model.modes[self.mode].title}", self._age]))

    @property
    def _age(self) -> str:
        """How long ago it was scanned; of the past and of files, how long before what is shown, where that is known."""
        scanned, source = self.model.scanned_ns if self.model is not None else 0, self._read_from
        if source is not None and not isinstance(source, PastSource) and source.read_only != REASON:
            return f"scanned {format_age(max(self.console.clock() - (scanned or self._read_ns), 0))} ago"
        if not scanned or self._snapshot is None:
            return ""
        return f"scanned {format_age(max(self._snapshot.taken_ns - scanned, 0))} before"

    def about(self, subject: str) -> None:
        """Open the map of another subject; nothing is read before there is a Snapshot."""
        super().about(subject)
        if subject != self._shown:
            self._shown = subject
            self._begin()

    def aim(self, target: str | int | None) -> None:
        """Put the cursor on a page, or where a text says, as soon as the map is there."""
        self._aim = None if target == "" else target
        if self.model is not None and not self.scanning:
            self._go_to_aim()

    @property
    def page(self) -> int | None:
        """The page under the cursor."""
        return None if self.model is None else self.map.cursor

    @property
    def spot(self) -> str:
        """Its address."""
        return "" if self.model is None else f"{self.map.cursor * self.model.page_size:#x}"

    def _go_to_aim(self) -> None:
        target, self._aim = self._aim, None
        if target is None or self.model is None:
            return
        try:
            self.map.go_to_page(target if isinstance(target, int) else self.model.find(target))
        except MemconsoleError as error:
            self.notify(str(error), severity="error", markup=False)

    def _begin(self) -> None:
        """Forget the map, and read it when there is a subject and a Snapshot."""
        self._forget()
        self.forget_frames()
        if self._shown and self.console.snapshot is not None:
            self._read(self.console.snapshot)
        self._say_all()

    def _forget(self) -> None:
        self.map.clear()
        if self.model is not None:
            self.model.close()
        self.model = self.error = None
        self._layers, self.mode, self._legend_for = {}, 0, None
        self._refused.clear()

    def show(self, snapshot: Snapshot) -> None:
        """Take what a new Snapshot says; the map itself stays as it was read.

        The map of another source (the past, the present) is another map.
        """
        before, self._snapshot = self._snapshot, snapshot
        if self._shown and self._read_from is not self.console.source:
            self._begin()
        elif self.model is not None and before is not snapshot and self.model.take(snapshot):
            self._draw()

    def _draw(self) -> None:
        layer = self.colours
        if self.model is not None and layer is not None:
            marks = self.model.marks if self.model.modes[self.mode].marked else None
            self.map.show(layer, self.model.blocks(), self.model.page_size, marks)
            self.show_bookmarks()

    def on_resize(self, event: events.Resize) -> None:
        """Put the panel beside the map where there is room for both."""
        width = event.size.width
        beside = HeatMap.cells_for(width - PANEL) >= min(ENOUGH, HeatMap.cells_for(width))
        self.set_class(beside, "-beside")
        self.map.styles.width = HeatMap.width_for(width - PANEL) if beside else "1fr"
        self._legend_height = 0
        self.call_after_refresh(self._say_all)
        self.set_timer(SETTLED_S, self._lay_out_panel)  # lines that changed amid a layout keep the height they had

    def _lay_out_panel(self) -> None:
        for lines in self.query("#pfn-panel > Lines"):
            lines.refresh(layout=True)

    # --- reading ----------------------------------------------------------------------------------------------------

    def action_rescan(self) -> None:
        """Read the map again and mark what moved."""
        if self._shown and not self.scanning and self.console.snapshot is not None:
            self._read(self.console.snapshot)
            self._say_title()

    def _read(self, snapshot: Snapshot) -> None:
        self.scanning = True
        self._read_from = self.console.source
        self._read_ns = self.console.clock()
        self._read_in_thread(self._read_from, self._shown, snapshot, self.model, self.mode)

    @work(thread=True, exclusive=True, group="pfn-scan", exit_on_error=False, description="read")
    def _read_in_thread(
        self, source: Source, subject: str, snapshot: Snapshot, before: MapModel | None, mode: int
    ) -> None:
        worker = get_current_worker()

        def read() -> MapView.Read:
            model = self.read_model(source, subject, snapshot, before)
            return self.Read(subject, model, model.modes[mode].make(), None)

        found = unforeseen.attempt("the scan", "console", read)
        if isinstance(found, MemconsoleError):
            found = self.Read(subject, None, None, found)
        if not worker.is_cancelled:
            self.post_message(found)
        elif found.model is not None:
            found.model.close()

    def on_map_view_read(self, message: Read) -> None:
        """Show what was read; after an error, what was there before, and the error."""
        message.stop()
        if message.subject != self._shown:
            if message.model is not None:
                message.model.close()
            return
        self.scanning, self.error = False, message.error
        if message.model is not None and message.layer is not None:
            before, self.model = self.model, message.model
            self._layers = {self.mode: message.layer}
            self._refused.clear()
            if self._snapshot is not None:
                self.model.take(self._snapshot)
            self._draw()
            if before is not None:
                before.close()
            self._go_to_aim()
        self._say_all()
        self.post_message(self.MapOpened())

    # --- colours ----------------------------------------------------------------------------------------------------

    def action_mode(self, by: int) -> None:
        """Colour the map by the next thing, or the one before."""
        if self.model is None:
            return
        number = (self.mode + by) % len(self.model.modes)
        while number in self._refused:
            number = (number + by) % len(self.model.modes)
        self.colour_by(number)

    def colour_by(self, number: int) -> None:
        """Colour the map by one of its modes; what that needs is read in a thread, once."""
        if self.model is None:
            return
        mode = self.model.modes[number]
        if number not in self._layers and mode.quick:
            self._layers[number] = mode.make()
        if number in self._layers:
            self._show_mode(number)
        else:
            self._make_in_thread(self.model, number)

    def _show_mode(self, number: int) -> None:
        self.mode = number
        self._draw()
        self._say_all()
        self.console.show_state()

    @work(thread=True, exclusive=True, group="map-mode", exit_on_error=False, description="colour")
    def _make_in_thread(self, model: MapModel, number: int) -> None:
        worker = get_current_worker()
        made = unforeseen.attempt("the colours of a map", "console", model.modes[number].make)
        if worker.is_cancelled:
            return
        if isinstance(made, MemconsoleError):
            self.post_message(self.Coloured(model, number, None, made))
        else:
            self.post_message(self.Coloured(model, number, made, None))

    def on_map_view_coloured(self, message: Coloured) -> None:
        """Show a mode that was asked for; one that cannot be is passed over, and why is said."""
        message.stop()
        if message.model is not self.model:
            return
        if message.layer is not None:
            self._layers[message.number] = message.layer
            self._show_mode(message.number)
        elif message.error is not None:
            title = f"no colours by {message.model.modes[message.number].title}"
            self.notify(str(message.error), title=title, severity="warning", markup=False)
            self._refused.add(message.number)

    # --- words ------------------------------------------------------------------------------------------------------

    def _say_all(self) -> None:
        self._say_title()
        self.say_facts()
        self._say_legend()

    def _say_title(self) -> None:
        self.query_one("#pfn-title", Lines).show_lines([self._title()])

    def _title(self) -> Content:
        parts: list[str | tuple[str, str]] = [(self.heading, "bold $primary")]
        if self.model is not None:
            if self.model.marks is not None:
                marks = self.model.marks
                parts.append((f"  moved {marks.moved:,} came {marks.came:,} gone {marks.gone:,}", "$warning"))
            parts.append("  " + "  ".join(self.model.words(self.map.cell_pages * self.model.page_size)))
        if self.scanning:
            parts.append(("  scanning…", "$accent"))
        if self.error is not None:
            parts.append((f"  {self.error}", "bold $error"))
        return Content.assemble(*parts)

    @property
    def heading(self) -> str:
        """What the map is of."""
        return self._shown

    def say_facts(self) -> None:
        """What there is to say of the page under the cursor, and of its cell."""
        facts: Sequence[Fact] = ()
        if self.model is not None:
            pfn = self.model.frame_of(self.map.cursor)
            facts = [*self.model.facts(self.map.cursor), *self.frame_facts(pfn), *self.model.cell_facts(*self.map.cell)]
        widget = self.query_one("#pfn-facts", Lines)
        width = max(20, (widget.size.width or self.size.width))
        columns = 1 if self.has_class("-beside") else 2
        height, cell = -(-len(facts) // columns), width // columns
        widget.show_lines([self._fact_line(facts[row::height], cell) for row in range(height)])

    @staticmethod
    def _fact_line(facts: Sequence[Fact], cell: int) -> Content:
        parts = []
        for fact in facts:
            parts.append((fit(fact.title, LABEL), "$secondary"))
            parts.append((fit(fact.text, cell - LABEL - 1) + " ", STYLES[fact.tone]))
        return Content.assemble(*parts)

    @property
    def legend(self) -> Sequence[tuple[str, str]]:
        """What the cells of the map say in the mode it is in."""
        layer = self.colours
        if layer is None:
            return ()
        edge = "the whole map from top to bottom, of each piece the most telling sign; inverted: what is shown"
        return [
            *((look.glyph, f"in the map: {look.title}") for look in layer.legend if look.title),
            ("right edge", edge),
            ("'", "on this line a bookmark, its cell underlined"),
        ]

    def _say_legend(self) -> None:
        layer = self.colours
        key = (layer, self.has_class("-beside"), self.app.theme, self.size)
        if layer is None or key == self._legend_for:
            return
        self._legend_for = key
        looks = [look for look in layer.legend if look.title]
        if self.has_class("-beside"):
            lines = [Content.assemble(self._sample(look), (f" {look.title}", "$text-muted")) for look in looks]
            lines += [Content(""), *(Content.styled(line, "$text-muted") for line in MINIMAP)]
            room = max(2, self.size.height - self._facts_height - 3)
            if len(lines) > room:
                lines[room - 1 :] = [Content.styled(f"and {len(lines) - room + 1} more", "$text-muted")]
        else:
            lines = [self._legend_line(looks, max(20, self.size.width - 2))]
        self._legend_height = max(self._legend_height, len(lines))  # as high as any before it: no new layout
        lines += [Content("")] * (self._legend_height - len(lines))
        self.query_one("#pfn-legend", Lines).show_lines(lines)

    @property
    def _facts_height(self) -> int:
        return self.query_one("#pfn-facts", Lines).render().plain.count("\n") + 1

    def _legend_line(self, looks: Sequence[CellLook], width: int) -> Content:
        """The legend in a line; what has no room is left out, and a sign says so."""
        parts: list[tuple[str, str]] = []
        used = 0
        for look in looks:
            word = f" {look.brief}  " if look.brief else ""
            used += 1 + len(word)
            if used > width:
                parts.append(("…", "$text-muted"))
                break
            parts += [self._sample(look), (word, "$text-muted")]
        return Content.assemble(*parts)

    def _sample(self, look: CellLook) -> tuple[str, str]:
        return look.glyph, self.map.get_component_styles(f"heatmap--{look.tone}").color.hex

    # --- where to go ------------------------------------------------------------------------------------------------

    def action_open(self) -> None:
        """Open what the cursor is on."""
        if self.model is None:
            return
        goal = self.model.goal(self.map.cursor)
        if isinstance(goal, str):
            self.notify(goal, markup=False)
        else:
            self.console.open_goal(goal.view, goal.subject, goal.page)

    def action_ask(self) -> None:
        """Ask for a page."""
        if self.model is not None:
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
        if self.model is None:
            self._asked()
            return
        try:
            page = self.model.find(message.value)
        except MemconsoleError as error:
            self.notify(str(error), severity="error", markup=False)
            return
        self._asked()
        self.map.go_to_page(page)
