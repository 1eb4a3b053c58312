"""One entity with everything that belongs to it; live, and still there to be read when the entity is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget

from memconsole.bulk import answered
from memconsole.device_fields import DEVICES, device_rows
from memconsole.field import Table
from memconsole.fields import TABLES
from memconsole.model import Part, Snapshot
from memconsole.views import glance, tables
from memconsole.views.bound import bound
from memconsole.views.screens.listing import (
    IOVA_KEY,
    JOINED_KEY,
    PFN_KEY,
    PLACE_KEY,
    action_bindings,
    make_table,
)
from memconsole.views.screens.reach import Reach
from memconsole.views.view import View, entitle
from memconsole.views.widgets.facts import Lines, facts_of, laid_out
from memconsole.views.widgets.table import VirtualTable

Parts = Callable[[Snapshot, Any], Sequence[Any]]
MOST_ROWS = 10


@dataclass(frozen=True)
class Section:
    """A table of what belongs to an entity."""

    table: Table
    parts: Parts
    columns: str | None = None
    title: str = ""


def _about(table_id: str) -> Parts:
    """Findings or events about an entity, by its name."""

    def parts(snapshot: Snapshot, item: Any) -> Sequence[Any]:
        names = {str(getattr(item, name)) for name in ("name", "id", "bdf") if hasattr(item, name)}
        return [each for each in TABLES[table_id].rows(snapshot) if each.subject in names]

    return parts


FINDINGS = Section(TABLES["findings"], _about("findings"), "severity,id,observed,remedy")
EVENTS = Section(TABLES["events"], _about("events"), "at,kind,text,peer")


class Detail(View):
    """The base of details: facts above, then a table for each kind of part that there is."""

    DEFAULT_CSS = """
    Detail > VerticalScroll { padding: 0 1; }
    Detail Lines { margin: 0 0 1 0; }
    Detail VirtualTable { border-top: solid $border; border-title-color: $secondary; height: auto; }
    Detail VirtualTable:focus { border-top: solid $primary; border-title-color: $primary; }
    """
    TABLE: ClassVar[Table]
    SECTIONS: ClassVar[Sequence[Section]] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.item: Any | None = None
        self._gone = False
        self._laid_for = 0

    def compose(self) -> ComposeResult:
        """Facts and sections."""
        with VerticalScroll():
            yield Lines()
            for section in self.SECTIONS:
                yield make_table(section.table, columns=section.columns)

    def about(self, subject: str) -> None:
        """Be about another entity: nothing of the one before counts as a change."""
        if subject != self.subject:
            self.item = None
            for widget in self.query(VirtualTable):
                widget.forget()
        super().about(subject)

    def show(self, snapshot: Snapshot) -> None:
        """Show the entity as it is in this Snapshot, or say that it is gone."""
        key = self.subject.partition(":")[2]
        item = next((each for each in self.TABLE.rows(snapshot) if self.TABLE.key(each) == key), None)
        self._gone = item is None
        before, self.item = self.item, item or self.item
        self._laid_for = self.room
        lines = self.query_one(Lines)
        if self.item is None:
            lines.show_lines([Content.styled(f"there is no {self.subject} in this snapshot", "$warning")])
        else:
            facts = facts_of(self.TABLE.fields, self.item, before if before is not self.item else None)
            width = max(self.room - 2, 20)
            lines.show_lines(self._head() + laid_out(facts, width) + self._tail(width))
        for widget, section in zip(self.query(VirtualTable), self.SECTIONS, strict=True):
            rows = section.parts(snapshot, self.item) if self.item is not None else ()
            widget.load(rows)
            widget.display = bool(rows)
            widget.styles.height = min(len(rows), MOST_ROWS) + 2
            entitle(widget, f" {section.title or section.table.title} {len(rows):,} ")

    def _head(self) -> list[Content]:
        if not self._gone:
            return []
        return [Content.styled(f"✖ {self.subject} is gone; this is what it was", "bold $error")]

    def _tail(self, width: int) -> list[Content]:
        """What stands below the facts."""
        del width
        return []

    def on_resize(self) -> None:
        """Lay the facts out anew, if there is other room for them; a view that comes in front is resized, too."""
        if self.console.snapshot is not None and self.subject and self.room != self._laid_for:
            self.show(self.console.snapshot)

    @property
    def status(self) -> str:
        """What it is."""
        return "gone" if self._gone else ""

    @property
    def first_focus(self) -> Widget | None:
        """The first table that has rows, or the page itself."""
        shown = (widget for widget in self.query(VirtualTable) if widget.display)
        return next(shown, self.query_one(VerticalScroll))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Grey out what cannot be done to this entity."""
        if action == "act":
            return True if self.why_not(str(parameters[0])) == "" else None
        if action in {"pfn", "subject", "joined"}:
            return True if self.item is not None and not self._gone else None
        return super().check_action(action, parameters)

    def why_not(self, action_id: str) -> str:
        """Why an action cannot be begun from here, or an empty string."""
        return self.console.why_not(action_id, self.TABLE.id, None if self._gone else self.item)

    def action_act(self, action_id: str) -> None:
        """Begin an action on this entity."""
        self.console.begin(action_id, answered(action_id, self.TABLE.id, self.item))

    def action_pfn(self) -> None:
        """Open this entity's PFN map."""
        if self.item is not None:
            self.console.open_pfn(self.TABLE.id, self.item)

    def action_joined(self) -> None:
        """Open this guest's memory joined with frames, windows and IOVAs."""
        if self.item is not None:
            self.console.open_reach(self.item.name)


class RegionDetail(Detail):
    """A region: its grants, who maps it, its segments."""

    TABLE = TABLES["regions"]
    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("regions", on_subject=True), PFN_KEY]
    SECTIONS = (
        Section(TABLES["grants"], lambda snapshot, region: [g for g in snapshot.grants if g.region == region.name]),
        Section(
            tables.MAPPINGS,
            lambda snapshot, region: [m for g in snapshot.grants if g.region == region.name for m in g.seen],
        ),
        Section(tables.SEGMENTS, lambda _, region: region.segments),
        FINDINGS,
        EVENTS,
    )


class GuestDetail(Detail):
    """A guest: its RAM joined with the regions behind it, its grants, windows and vCPUs."""

    TABLE = TABLES["guests"]
    PARTS = frozenset({Part.USAGE, Part.PLACEMENT})
    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("guests", on_subject=True), PFN_KEY, JOINED_KEY]
    SECTIONS = (
        Section(tables.RAM, lambda _, guest: guest.seen.ram if guest.seen else ()),
        Section(TABLES["grants"], lambda snapshot, guest: [g for g in snapshot.grants if g.guest == guest.name]),
        Section(TABLES["windows"], lambda snapshot, guest: [w for w in snapshot.windows if w.guest == guest.name]),
        Section(TABLES["devices"], tables.passed_through),
        Section(tables.VCPUS, lambda _, guest: tables.vcpus(guest)),
        Section(tables.CELLS, tables.cells),
        Section(tables.MODULES, lambda _, guest: guest.managed.modules if guest.managed else ()),
        Section(tables.DISKS, lambda _, guest: guest.managed.disks if guest.managed else ()),
        FINDINGS,
        EVENTS,
    )

    def _tail(self, width: int) -> list[Content]:
        """Its trends, where they are known."""
        rows = glance.guest_trends(self.item) if self.item is not None and not self._gone else []
        return [Content(""), *glance.trend_lines(rows, width)] if rows else []


class GrantDetail(Detail):
    """A grant: the mappings the kernel shows."""

    TABLE = TABLES["grants"]
    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("grants", on_subject=True), PFN_KEY]
    SECTIONS = (Section(tables.MAPPINGS, lambda _, grant: grant.seen), FINDINGS, EVENTS)


class QuarantineDetail(Detail):
    """Frames a revoke left behind because they are pinned: the region whose contents are elsewhere by now."""

    TABLE = TABLES["quarantine"]
    SECTIONS = (
        Section(TABLES["regions"], lambda snapshot, kept: [r for r in snapshot.regions if r.name == kept.region]),
        FINDINGS,
        EVENTS,
    )


class WindowDetail(Detail):
    """An MMIO window and its device."""

    TABLE = TABLES["windows"]
    BINDINGS: ClassVar[list[BindingType]] = [*action_bindings("windows", on_subject=True), PLACE_KEY]
    SECTIONS = (
        Section(DEVICES, lambda snapshot, window: [d for d in device_rows(snapshot) if d.bdf == window.bdf]),
        FINDINGS,
        EVENTS,
    )


class DeviceDetail(Detail):
    """A PCI function: its windows and its IOMMU group."""

    TABLE = DEVICES
    BINDINGS: ClassVar[list[BindingType]] = [IOVA_KEY]
    SECTIONS = (
        Section(TABLES["windows"], lambda snapshot, device: [w for w in snapshot.windows if w.bdf == device.bdf]),
        Section(TABLES["domains"], lambda snapshot, device: [d for d in snapshot.domains if d.group == device.group]),
        FINDINGS,
    )


class DomainDetail(Detail):
    """An IOMMU domain: the devices attached to it, what they were granted, and what it must not use."""

    TABLE = TABLES["domains"]
    BINDINGS: ClassVar[list[BindingType]] = [IOVA_KEY]
    SECTIONS = (
        Section(TABLES["grants"], lambda snapshot, domain: [g for g in snapshot.grants if g.dma in domain.devices]),
        Section(DEVICES, lambda snapshot, domain: [d for d in device_rows(snapshot) if d.bdf in domain.devices]),
        Section(tables.RESERVED, lambda _, domain: [(domain.group, item) for item in domain.reserved]),
    )


class Note(Detail):
    """Something that was noticed: all of its words, and the way to what it is about."""

    BINDINGS: ClassVar[list[BindingType]] = [bound("open-subject", "subject", "Open subject")]

    def action_subject(self) -> None:
        """Open what it is about."""
        if self.item is not None:
            self.console.open_named(self.item.subject)


class FindingDetail(Note):
    """A finding."""

    TABLE = TABLES["findings"]
    SECTIONS = (Section(TABLES["events"], lambda snapshot, f: [e for e in snapshot.events if e.subject == f.subject]),)


class EventDetail(Note):
    """An event."""

    TABLE = TABLES["events"]


DETAILS: dict[str, type[View]] = {
    "region": RegionDetail,
    "guest": GuestDetail,
    "grant": GrantDetail,
    "quarantine": QuarantineDetail,
    "window": WindowDetail,
    "device": DeviceDetail,
    "domain": DomainDetail,
    "finding": FindingDetail,
    "event": EventDetail,
    "reach": Reach,
}
"""The detail of each kind of subject."""
