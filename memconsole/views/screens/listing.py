"""Views that are tables: regions, guests, grants, events; and those of several tables: MMIO, IOMMU, audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from memconsole import actions
from memconsole.fields import TABLES, Table
from memconsole.model import Snapshot
from memconsole.views import tables
from memconsole.views.view import View, entitle
from memconsole.views.widgets.table import VirtualTable

if TYPE_CHECKING:
    from memconsole.views.app import ConsoleApp

SUBJECT_KINDS = {
    "regions": actions.Kind.REGION,
    "guests": actions.Kind.GUEST,
    "grants": actions.Kind.GRANT,
    "windows": actions.Kind.WINDOW,
}
"""What an argument of a row of each table is called."""


def action_bindings(table_id: str, *, on_subject: bool = False) -> list[BindingType]:
    """The keys of the actions that work on a table; with ``on_subject`` only those that need one of its rows."""
    found: list[BindingType] = []
    for id, cls in actions.REGISTRY.items():
        spec = cls.spec
        takes = any(field.arg.kind is SUBJECT_KINDS.get(table_id) and field.required for field in actions.fields(cls))
        if spec.on == table_id and spec.key and (takes or not on_subject):
            word = spec.words[-1].capitalize()
            found.append(Binding(spec.key, f"act('{id}')", word, id=id, tooltip=spec.help))
    return found


def prefill(action_id: str, table_id: str, item: Any) -> dict[str, str]:
    """The arguments of an action that a row answers: its own name, or the process of a guest that is not ours."""
    kind = SUBJECT_KINDS.get(table_id)
    if item is None:
        return {}
    if action_id == "guest-attach":
        foreign = item.kind == "foreign" and item.pid is not None
        return {"name": item.name, "pid": str(item.pid)} if foreign else {}
    fields = actions.fields(actions.REGISTRY[action_id])
    named = next((field.name for field in fields if field.required and field.arg.kind is kind), None)
    return {} if named is None else {named: TABLES[table_id].key(item)}


class ActionTable(VirtualTable):
    """A table whose rows can be acted on; its subclasses bind the keys."""

    @property
    def console(self) -> ConsoleApp:
        """The app, which plans and applies."""
        return cast("ConsoleApp", self.app)

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
        """Begin an action on the row under the cursor."""
        self.console.begin(action_id, prefill(action_id, self.table.id, self.selected))

    def action_pfn(self) -> None:
        """Open the PFN map of the row under the cursor."""
        if self.selected is not None:
            self.console.open_pfn(self.table.id, self.selected)

    def action_joined(self) -> None:
        """Open the memory of the guest under the cursor, joined with frames, windows and IOVAs."""
        if self.selected is not None:
            self.console.open_reach(self.selected.name)


PFN_KEY = Binding("f", "pfn", "PFN map", id="pfn", tooltip="where every page of it is")


JOINED_KEY = Binding("w", "joined", "Joined", id="joined", tooltip="its memory with frames, windows and IOVAs")


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

    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("windows")]


CLASSES: dict[str, type[VirtualTable]] = {
    "regions": RegionTable,
    "guests": GuestTable,
    "grants": GrantTable,
    "windows": WindowTable,
}


def make_table(table: Table, **kwargs: Any) -> VirtualTable:
    """A widget for a table, with the keys of its actions."""
    return CLASSES.get(table.id, VirtualTable)(table, **kwargs)


class Listing(View):
    """One table or several, one above the other; the one with the focus gets most of the room."""

    DEFAULT_CSS = """
    Listing.-several VirtualTable { height: 1fr; min-height: 3; border-top: solid $border; }
    Listing.-several VirtualTable { border-title-color: $secondary; }
    Listing.-several VirtualTable:focus { height: 2fr; border-top: solid $primary; border-title-color: $primary; }
    """
    TABLES: ClassVar[Sequence[tuple[Table, str]]] = ()
    """The tables, each with what to say when it is empty."""
    COLUMNS: ClassVar[str | None] = None
    """The columns of the first table, the most important ones first; None for the usual ones."""
    STAY_ON_TOP: ClassVar[bool] = False
    """Whether a cursor on the first row stays there when rows come in before it."""

    def compose(self) -> ComposeResult:
        """The tables in their order."""
        self.set_class(len(self.TABLES) > 1, "-several")
        for index, (table, empty) in enumerate(self.TABLES):
            columns = None if index else self.COLUMNS
            yield make_table(table, empty=empty, columns=columns, stay_on_top=self.STAY_ON_TOP)

    def show(self, snapshot: Snapshot) -> None:
        """Show the tables' rows."""
        for widget in self.query(VirtualTable):
            rows = widget.table.rows(snapshot)
            widget.load(rows)
            if len(self.TABLES) > 1:
                entitle(widget, f" {widget.table.title} {len(rows):,} ")

    def about(self, subject: str) -> None:
        """Filter by this subject's name."""
        super().about(subject)
        if subject:
            table = self.query(VirtualTable).first()
            table.set_filter(subject.partition(":")[2] or subject)


class Regions(Listing):
    """Regions."""

    TABLES = ((TABLES["regions"], "no regions yet; n reserves one"),)


class Guests(Listing):
    """Guests."""

    TABLES = ((TABLES["guests"], "no guests yet; n starts one, a takes a running process as one"),)


class Grants(Listing):
    """Grants, and what revoked ones left behind."""

    TABLES = (
        (TABLES["grants"], "no grants yet; m on a region grants it to a guest"),
        (TABLES["quarantine"], "✔ no pin keeps revoked frames"),
    )


class Events(Listing):
    """Events, the newest first."""

    TABLES = ((TABLES["events"], "nothing has happened yet"),)
    COLUMNS = "seq,at,text,subject,kind,peer"
    STAY_ON_TOP = True

    def on_mount(self) -> None:
        """The newest first."""
        table = self.query(VirtualTable).first()
        table.set_sort(table.rows.fields[0], reverse=True)


class Mmio(Listing):
    """MMIO windows, the devices they belong to, and who has which physical addresses."""

    TABLES = (
        (TABLES["windows"], "no PCI device has a window here"),
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
        (TABLES["findings"], "✔ what should be is what is"),
        (tables.GAPS, "✔ everything could be read"),
    )
