"""Views that are tables: regions, guests, grants, events; and those of several tables: MMIO, IOMMU, audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import BindingType

from memconsole import actions
from memconsole.bulk import ROW_KINDS, answered
from memconsole.field import Table
from memconsole.fields import TABLES
from memconsole.model import Part, Snapshot
from memconsole.views import tables
from memconsole.views.bound import bound
from memconsole.views.console import Console
from memconsole.views.view import View, entitle
from memconsole.views.widgets.pane import FROM as PANE_FROM
from memconsole.views.widgets.pane import Pane
from memconsole.views.widgets.table import VirtualTable


def action_bindings(table_id: str, *, on_subject: bool = False) -> list[BindingType]:
    """The keys of the actions that work on a table; with ``on_subject`` only those that need one of its rows."""
    found: list[BindingType] = []
    for id, cls in actions.REGISTRY.items():
        spec = cls.spec
        takes = any(field.arg.kind is ROW_KINDS.get(table_id) and field.required for field in actions.fields(cls))
        if spec.on == table_id and spec.key and (takes or not on_subject):
            word = spec.words[-1].capitalize()
            found.append(bound(id, f"act('{id}')", word, tooltip=spec.help))
    return found


class ActionTable(VirtualTable):
    """A table whose rows can be acted on; its subclasses bind the keys."""

    @property
    def console(self) -> Console:
        """The app, which plans and applies."""
        return cast("Console", self.app)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Grey out actions where nothing may be changed, and those that need a row where there is none."""
        if action == "act":
            return True if self.why_not(str(parameters[0])) == "" else None
        if action in {"pfn", "joined"}:
            return True if self.selected is not None else None
        return super().check_action(action, parameters)

    def why_not(self, action_id: str) -> str:
        """Why an action cannot be begun from here, or an empty string."""
        return self.console.why_not(action_id, self.table.id, self.selected)

    def action_act(self, action_id: str) -> None:
        """Begin an action on the marked rows, or on the one under the cursor."""
        many = [answered(action_id, self.table.id, item) for item in self.chosen]
        if self.rows.marked and not many:
            why = "the filter hides every marked row; Escape clears the marks"
            self.notify(why, title="Nothing marked is shown", severity="warning", markup=False)
        elif len(many) > 1 and all(many):
            self.console.begin_all(action_id, many)
        else:
            self.console.begin(action_id, many[0] if many else {})

    def action_pfn(self) -> None:
        """Open the PFN map of the row under the cursor."""
        if self.selected is not None:
            self.console.open_pfn(self.table.id, self.selected)

    def action_joined(self) -> None:
        """Open the memory of the guest under the cursor, joined with frames, windows and IOVAs."""
        if self.selected is not None:
            self.console.open_reach(self.selected.name)


PFN_KEY = bound("pfn", "pfn", "PFN map", tooltip="show where every page of it is")


PLACE_KEY = bound("pfn", "pfn", "Host map", tooltip="show its place in the host's physical memory")
IOVA_KEY = bound("pfn", "pfn", "IOVA map", tooltip="show where each IOVA leads, and where it should")

JOINED_KEY = bound(
    "joined", "joined", "Reach", tooltip="who and what reaches its memory: frames, windows, IOVAs side by side"
)


class RegionTable(ActionTable):
    """Regions, and what is done to them."""

    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("regions"), PFN_KEY]


class GuestTable(ActionTable):
    """Guests, and what is done to them."""

    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("guests"), PFN_KEY, JOINED_KEY]


class GrantTable(ActionTable):
    """Grants, and what is done to them."""

    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("grants"), PFN_KEY]


class WindowTable(ActionTable):
    """MMIO windows, and what is done to them."""

    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("windows"), PLACE_KEY]


class IovaTable(ActionTable):
    """IOMMU domains, or devices that are in one."""

    BINDINGS: ClassVar[list[BindingType]] = [IOVA_KEY]


CLASSES: dict[str, type[VirtualTable]] = {
    "regions": RegionTable,
    "guests": GuestTable,
    "grants": GrantTable,
    "windows": WindowTable,
    "devices": IovaTable,
    "domains": IovaTable,
}


def make_table(table: Table, **kwargs: Any) -> VirtualTable:
    """A widget for a table, with the keys of its actions."""
    return CLASSES.get(table.id, VirtualTable)(table, **kwargs)


class Listing(View):
    """One table or several, one above the other; the one with the focus gets most of the room."""

    DEFAULT_CSS = """
    Listing.-pane > Pane { display: block; }
    Listing.-several VirtualTable { height: 1fr; min-height: 3; border-top: solid $border; }
    Listing.-several VirtualTable { border-title-color: $secondary; }
    Listing.-several VirtualTable:focus { height: 2fr; border-top: solid $primary; border-title-color: $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("pane", "pane", "Details", show=False, tooltip="show or hide the details of the row in front"),
    ]
    TABLES: ClassVar[Sequence[tuple[Table, str]]] = ()
    """The tables, each with what to say when it is empty."""
    COLUMNS: ClassVar[str | None] = None
    """The columns of the first table, the most important ones first; None for the usual ones."""
    NEWEST_FIRST: ClassVar[bool] = False
    """Whether the rows of the first table are sorted by its first field, the largest first."""
    STAY_ON_TOP: ClassVar[bool] = False
    """Whether a cursor on the first row stays there when rows come in before it."""

    def compose(self) -> ComposeResult:
        """The tables in their order."""
        self.set_class(len(self.TABLES) > 1, "-several")
        for index, (table, empty) in enumerate(self.TABLES):
            columns = None if index else self.COLUMNS
            made = make_table(table, empty=empty, columns=columns, stay_on_top=self.STAY_ON_TOP)
            if self.NEWEST_FIRST and not index:
                made.rows.sort(table.fields[0], reverse=True)
            yield made
        yield Pane()

    def on_mount(self) -> None:
        """Lay the tables out as they were."""
        for widget in self.query(VirtualTable):
            layout = self.console.memory.layouts.get(widget.table.id)
            if layout is not None:
                widget.lay_out_as(layout)

    def on_virtual_table_arranged(self, event: VirtualTable.Arranged) -> None:
        """Remember how a table is laid out."""
        event.stop()
        self.console.memory.arrange(event.table.table.id, event.table.layout_now)

    def on_resize(self) -> None:
        """Show the pane where there is room for it."""
        self.tell_pane()

    def on_virtual_table_chosen(self) -> None:
        """The pane follows the cursor."""
        self.tell_pane()

    def on_choosing_changed(self) -> None:
        """The pane follows the table that is in use, and what becomes of its row."""
        self.tell_pane()

    def tell_pane(self) -> None:
        """Show in the pane, where there is one, what is known of the row under the cursor."""
        shown = self.console.pane and self.room >= PANE_FROM
        self.set_class(shown, "-pane")
        table = self.current_table
        if shown and table is not None:
            self.query_one(Pane).tell(table.table, table.selected)

    def action_pane(self) -> None:
        """Show or hide the pane."""
        self.console.pane = not self.console.pane
        self.tell_pane()
        if self.console.pane and self.room < PANE_FROM:
            words = f"it needs {PANE_FROM} columns, there are {self.room}; Enter shows the same"
            self.notify(words, title="No room for the details of a row", timeout=3, markup=False)

    @property
    def parts(self) -> frozenset[Part]:
        """What its columns need."""
        fields = [field for widget in self.query(VirtualTable) for field in widget.rows.needed]
        return frozenset(field.part for field in fields if field.part is not None)

    def show(self, snapshot: Snapshot) -> None:
        """Show the tables' rows."""
        for widget in self.query(VirtualTable):
            rows = widget.table.rows(snapshot)
            widget.load(rows)
            if len(self.TABLES) > 1:
                entitle(widget, f" {widget.table.title} {len(rows):,} ")

    def about(self, subject: str) -> None:
        """Filter by a filter, or by the name of a subject (``guest:web`` where the table has no field of that name).

        Raises:
            UsageError: it is no filter.
        """
        super().about(subject)
        if subject:
            table = self.query(VirtualTable).first()
            kind, _, name = subject.partition(":")
            is_field = any(kind in {field.id, field.title.lower()} for field in table.table.fields)
            table.set_filter(f'"{name}"' if f"{kind}s" in TABLES and not is_field else subject)


class Regions(Listing):
    """Regions."""

    TABLES = ((TABLES["regions"], "no regions yet; n reserves one"),)


class Guests(Listing):
    """Guests."""

    TABLES = ((TABLES["guests"], "no guests yet; n starts one, a attaches a running process"),)
    COLUMNS = (
        "name,kind,state,pid,cpu,memory,rss,cpu_trend,vcpus,beats,wrong,gap,huge,grants,"
        "threads,affinity,nodes,read,written,uptime"
    )
    PARTS = frozenset({Part.USAGE})


class Grants(Listing):
    """Grants, and what revoked ones left behind."""

    TABLES = (
        (TABLES["grants"], "no grants yet; m on a region grants it to a guest"),
        (TABLES["quarantine"], "✔ no revoked frames are pinned"),
    )


class Events(Listing):
    """Events, the newest first."""

    TABLES = ((TABLES["events"], "nothing has happened yet"),)
    COLUMNS = "seq,at,text,subject,kind,peer"
    NEWEST_FIRST = True
    STAY_ON_TOP = True


class Mmio(Listing):
    """MMIO windows, the devices they belong to, and who has which physical addresses."""

    TABLES = (
        (TABLES["windows"], "this host has no MMIO windows"),
        (TABLES["devices"], "no PCI devices"),
        (tables.IOMEM, "the kernel does not show /proc/iomem's addresses; 1 says why"),
    )


class Iommu(Listing):
    """IOMMU groups and their domains, the units that translate, and reserved IOVA."""

    TABLES = (
        (TABLES["domains"], "no IOMMU groups: without an IOMMU no device's DMA is confined"),
        (tables.IOMMUS, "no IOMMU"),
        (tables.RESERVED, "no reserved ranges"),
    )


class Audit(Listing):
    """Where what should be and what is differ, and what could not be read."""

    TABLES = (
        (TABLES["findings"], "✔ no findings"),
        (tables.GAPS, "✔ everything could be read"),
    )
