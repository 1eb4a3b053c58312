"""The PFN map: where every page of a guest or a region is, from the whole down to one page."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.worker import get_current_worker

from memconsole import joined, recording, unforeseen
from memconsole.errors import MemconsoleError
from memconsole.extents import ExtentTable, Flag
from memconsole.field import Field, Table
from memconsole.model import Snapshot
from memconsole.source import PastSource, Source
from memconsole.units import PAGE, format_size, parse_time
from memconsole.views.bound import bound
from memconsole.views.screens import pfnmodes
from memconsole.views.screens.domainmap import DomainModel
from memconsole.views.screens.mapmodel import Goal, MapModel, Mode, size_words
from memconsole.views.screens.mapview import MapView
from memconsole.views.view import subject_of
from memconsole.views.widgets import pagefacts
from memconsole.views.widgets.facts import Fact, Lines
from memconsole.views.widgets.layers import PresenceLayer, RunsLayer
from memconsole.views.widgets.pagefacts import MapSpace
from memconsole.views.widgets.pagegrid import Block, Marks
from memconsole.views.widgets.table import VirtualTable


class Subject(NamedTuple):
    """A map that can be opened."""

    key: str
    size: int
    resident: int | None
    runs: int | None


def subjects(snapshot: Snapshot) -> list[Subject]:
    """The maps of a Snapshot: its guests, then its regions, then IOMMU domains whose page tables are shown."""
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
    found += [
        Subject(f"domain:{domain.group}", domain.mapped, domain.mapped, domain.extents)
        for domain in snapshot.domains
        if domain.mapped
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
        Field("key", "Map of", "a guest, by gpa; a region, by offset; a domain, by IOVA", lambda s: s.key, width=30),
        Field("size", "Size", "bytes it spans", lambda s: s.size, _shown_size, "bytes", 8, right=True),
        Field("resident", "Resident", "bytes with a frame", lambda s: s.resident, _shown_size, "bytes", 8, right=True),
        Field("runs", "Runs", "runs of frames, once scanned", lambda s: s.runs, _shown_number, width=10, right=True),
    ),
)


def map_words(view: str, snapshot: Snapshot | None, words: str) -> tuple[str, str]:
    """The subject and where to go there, of the words behind a map's name: ``pfn NAME [ADDRESS]``, ``host [ADDRESS]``.

    Raises:
        UsageError: a region and a guest have the name. NotFound: neither has.
    """
    if view == "host":
        return "", words
    name, _, rest = words.partition(" ")
    if not name or snapshot is None:
        return name, rest
    return joined.table_key(snapshot, name), rest


def map_of(table_id: str, item: Any) -> Goal | str:
    """The map of an entity of a table, or why it has none."""
    if table_id == "windows" and item.io:
        return f"{item.id} is a range of ports, which are no memory"
    if table_id == "windows":
        return Goal("host", "", item.start // PAGE)
    if table_id in {"devices", "domains"} and item.group is None:
        return f"{item.bdf} is in no IOMMU group: nothing confines its DMA"
    if table_id in {"devices", "domains"}:
        return Goal("pfn", f"domain:{item.group}")
    return Goal("pfn", f"region:{item.region}" if table_id == "grants" else subject_of(table_id, item))


FRAGMENTS = 1
"""The number of the mode that counts runs."""


class PfnModel:
    """The map of a guest or a region: its table, what changed, and whose its pages are."""

    def __init__(self, subject: str, snapshot: Snapshot, source: Source, before: ExtentTable | None) -> None:
        self.subject = subject
        self._source = source
        self.table = table = source.extents(subject)
        self.marks = None if before is None else Marks(before, table)
        self.stats = table.stats()
        self.space = MapSpace(snapshot, subject)
        self._snapshot = snapshot

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self.table.page_size

    @property
    def scanned_ns(self) -> int:
        """When its table was scanned."""
        return self.table.scanned_ns

    @property
    def modes(self) -> Sequence[Mode]:
        """By kind of page, runs, node, sharing, writes, what is preserved, what devices reach."""
        table, source = self.table, self._source
        alone = ("in one process alone", "shared by several processes")
        why = "the kernel tells it of a guest's own mappings, not of a region's file: see the map of its guest"
        dirty = ("written since soft-dirty was cleared", "not written since")
        never = "the kernel has no soft-dirty bits, or nothing was written since they were cleared"
        return (
            Mode("page size", partial(PresenceLayer, table), quick=True, marked=True),
            Mode("runs", partial(RunsLayer, table), quick=True),
            Mode("NUMA node", lambda: pfnmodes.by_node(table, self._snapshot)),
            Mode("sharing", lambda: pfnmodes.by_flag(table, "exclusive", Flag.EXCLUSIVE, alone, why)),
            Mode("soft-dirty", lambda: pfnmodes.by_flag(table, "soft-dirty", Flag.SOFT_DIRTY, dirty, never)),
            Mode("preserved", lambda: pfnmodes.by_preserved(table, source)),
            Mode("devices", lambda: pfnmodes.by_device(table, self._snapshot, source)),
        )

    def blocks(self) -> Sequence[Block]:
        """The parts of its space."""
        return self.space.blocks(self.table)

    def words(self, cell_bytes: int) -> Sequence[str]:
        """Size, cell, and pages by kind."""
        stats, size = self.stats, self.page_size
        return (
            f"{size_words(stats.pages, size)} in {format_size(cell_bytes)}",
            f"{size_words(stats.present, size)} {100 * stats.present // max(stats.pages, 1)}% resident",
            f"{size_words(stats.huge, size)} huge",
            f"{size_words(stats.swapped, size)} swap",
            f"{stats.runs:,} runs",
        )

    def frame_of(self, page: int) -> int | None:
        """The frame a page is in."""
        row = self.table.lookup(page)
        extent = None if row is None else self.table[row]
        return None if extent is None or not extent.flags & Flag.PRESENT else extent.pfn + page - extent.offset

    def facts(self, page: int) -> Sequence[Fact]:
        """The page's addresses, its frame, whose it is."""
        return pagefacts.describe(self.space, self.table, self.marks, page)

    def cell_facts(self, first: int, pages: int) -> Sequence[Fact]:
        """The cell's pages by kind."""
        return pagefacts.describe_cell(self.table, first, pages)

    def find(self, text: str) -> int:
        """The page of an address, ``hva ADDRESS`` or ``pfn NUMBER``.

        Raises:
            UsageError, NotFound: it is none, or not there.
        """
        return self.space.find(text, self.table)

    def goal(self, page: int) -> Goal | str:
        """Its frame on the host map."""
        pfn = self.frame_of(page)
        if pfn is None:
            return f"no frame is at {page * self.page_size:#x}: the page is not resident"
        return Goal("host", "host", pfn)

    def take(self, snapshot: Snapshot) -> bool:
        """Whose the pages are by now."""
        before, self._snapshot = self._snapshot, snapshot
        same = all(getattr(before, name) is getattr(snapshot, name) for name in ("regions", "guests", "grants"))
        if not same:
            self.space = MapSpace(snapshot, self.subject)
        return not same

    def against(self, which: str, now_ns: int) -> Marks:
        """What differs from the map of this subject in a file, or at a time of the past (``-5m``, ``@14:03:12``).

        Raises:
            UsageError: it is no time. BadFile: the file is none. NotFound: no map of this subject is recorded there.
        """
        if which.startswith(("@", "-")):
            live = self._source.live if isinstance(self._source, PastSource) else self._source
            moment = PastSource(live, live.at(parse_time(which, now_ns)))
            with moment.extents(self.subject) as before:
                return Marks(before, self.table)
        with contextlib.closing(recording.Recording(which)) as then, then.extents(self.subject) as before:
            return Marks(before, self.table)

    def close(self) -> None:
        """Nothing: its table is closed with the last who shows it."""


class PfnMap(MapView):
    """The map of one guest or region with what the cursor is on; without a subject, the list of what there is."""

    DEFAULT_CSS = """
    PfnMap > VirtualTable { display: none; }
    PfnMap.-picking > VirtualTable { display: block; }
    PfnMap.-picking > #pfn-body { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("pfn.pick", "pick", "Other map"),
        bound("pfn.fragments", "runs", "Fragments", tooltip="show how many runs of frames a cell is in"),
    ]

    class Compared(Message):
        """A map was compared with a recorded one."""

        def __init__(self, model: PfnModel, marks: Marks | None, error: MemconsoleError | None) -> None:
            super().__init__()
            self.model = model
            self.marks = marks
            self.error = error

    PLACEHOLDER = "0x1000000, 64M, hva 0x7f0000000000, pfn 0x1234"

    _against = ""

    def compose(self) -> ComposeResult:
        """The map, and the list of maps."""
        yield from super().compose()
        yield VirtualTable(SUBJECTS, empty="there are no guests and no regions to map")

    def on_mount(self) -> None:
        """Nothing is asked yet."""
        self.set_class(not self._shown, "-picking")

    def read_model(self, source: Source, subject: str, snapshot: Snapshot, before: MapModel | None) -> MapModel:
        """Scan; of an IOMMU domain, by IOVA."""
        kind, _, name = subject.partition(":")
        if kind == "domain":
            return DomainModel(source, snapshot, name)
        former = before.table if isinstance(before, PfnModel) and before.subject == subject else None
        return PfnModel(subject, snapshot, source, former)

    @property
    def table(self) -> ExtentTable | None:
        """The table on the screen."""
        return self.model.table if isinstance(self.model, PfnModel) else None

    @property
    def first_focus(self) -> Widget | None:
        """The map, or the list of maps."""
        return self.map if self._shown else self.query_one(VirtualTable)

    @property
    def current_table(self) -> VirtualTable | None:
        """The list of maps, while it is shown."""
        return None if self._shown else self.query_one(VirtualTable)

    def _begin(self) -> None:
        self.set_class(not self._shown, "-picking")
        super()._begin()

    def show(self, snapshot: Snapshot) -> None:
        """Keep the list of maps, or what is said of the map, up to date."""
        super().show(snapshot)
        if not self._shown:
            self.set_class(True, "-picking")
            self.query_one(VirtualTable).load(subjects(snapshot))
            self._say_title()

    def _say_title(self) -> None:
        if self._shown:
            super()._say_title()
        else:
            words = Content.styled("Enter opens a map, / filters", "$text-muted")
            self.query_one("#pfn-title", Lines).show_lines([words])

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The keys of a map do nothing in the list of maps."""
        if action in {"ask", "rescan", "pick", "open", "mode", "runs"} and not self._shown:
            return False
        return super().check_action(action, parameters)

    def action_runs(self) -> None:
        """Show how many runs a cell has, or again what it is made of."""
        self.colour_by(0 if self.mode == FRAGMENTS else FRAGMENTS)

    def aim(self, target: str | int | None) -> None:
        """Go to a page, or (``against FILE``, ``against @-5m``) mark what differs from what was recorded."""
        word, _, which = str(target).partition(" ")
        if word == "against" and which:
            self._against = which.strip()
            if self.model is not None and not self.scanning:
                self._compare()
        else:
            super().aim(target)

    def on_map_view_map_opened(self) -> None:
        """What was asked for before the map was there."""
        self._compare()

    def _compare(self) -> None:
        which, self._against = self._against, ""
        if which and isinstance(self.model, PfnModel):
            self._compare_in_thread(self.model, which)

    @work(thread=True, exclusive=True, group="pfn-compare", exit_on_error=False, description="compare")
    def _compare_in_thread(self, model: PfnModel, which: str) -> None:
        worker = get_current_worker()
        found = unforeseen.attempt("the comparison", "console", partial(model.against, which, self.console.clock()))
        if not worker.is_cancelled:
            failed = found if isinstance(found, MemconsoleError) else None
            self.post_message(self.Compared(model, None if failed else cast("Marks", found), failed))

    def on_pfn_map_compared(self, message: Compared) -> None:
        """Show what differs, or say why it is not known."""
        message.stop()
        if message.error is not None:
            self.notify(str(message.error), severity="error", markup=False)
        elif message.model is self.model and message.marks is not None:
            message.model.marks = message.marks
            self._show_mode(0)

    def action_pick(self) -> None:
        """Show the list of maps."""
        self.console.open_view("pfn")

    def on_virtual_table_row_opened(self, message: VirtualTable.RowOpened) -> None:
        """Open the map that was chosen."""
        message.stop()
        self.console.open_view("pfn", message.item.key)
