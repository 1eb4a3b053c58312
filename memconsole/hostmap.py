"""The host's physical memory as a map: whose every frame is, from what the kernel says and the tables of frames.

Layers lie over each other, the later ones seen::

    /proc/iomem by depth    RAM, what firmware and kernel keep, MMIO; what no range has is a hole
    KHO's scratch           where the next kernel boots
    BARs                    the windows of PCI functions, granted or not
    preserved pages         KHO's tree (``frames:preserved``), where it can be read
    VMs of others           their RAM (``guest:NAME``)
    regions                 ours (``region:NAME``), by whoever has a grant of them

A store that keeps its own frames (an arena) is one layer more: a table by frame, and an :class:`Owner`.
Everything here is a function of a Snapshot and of tables, so that it is the same of this host and of a file.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from memconsole.errors import MemconsoleError
from memconsole.field import Field
from memconsole.joined import TableSource
from memconsole.model import Range, Snapshot, Unread, Value
from memconsole.units import PAGE, format_address, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

PRESERVED = "frames:preserved"
"""The key of the table of frames in KHO's tree."""


class Use(enum.StrEnum):
    """What a range of physical addresses is."""

    RAM = "ram"
    KERNEL = "kernel"
    FIRMWARE = "firmware"
    SCRATCH = "scratch"
    PRESERVED = "preserved"
    REGION = "region"
    GUEST = "guest"
    PERSISTENT = "persistent"
    WINDOW = "window"
    GRANTED = "granted"
    MMIO = "mmio"
    BUS = "bus"


class Owner(Value, frozen=True):
    """Whose frames are: ``subject`` is what a view opens (``region:web``), ``guest`` who has them granted."""

    use: Use
    name: str
    subject: str = ""
    guest: str = ""


HOLE = Owner(Use.BUS, "nothing")


class FrameRange(Value, frozen=True):
    """Physical addresses of one owner on one node, bytes; ``runs`` of pages of a region or guest are in it.

    ``size`` of them are the owner's: of a sum (:meth:`HostMap.totals`) less than lies between ``start`` and ``end``.
    """

    start: int
    end: int
    size: int
    use: str
    name: str
    guest: str = ""
    node: int | None = None
    runs: int = 1


FIELDS = (
    Field("start", "Start", "first physical address", lambda r: r.start, format_address, right=True),
    Field("end", "End", "address behind it", lambda r: r.end, format_address, right=True),
    Field("size", "Size", "bytes", lambda r: r.size, format_size, right=True),
    Field("use", "Use", "ram, kernel, firmware, region, guest, window...", lambda r: r.use),
    Field("name", "Whose", "what it is called by the kernel or by memconsole", lambda r: r.name),
    Field("guest", "Guest", "who has it granted", lambda r: r.guest or None, lambda value: value or "-"),
    Field("node", "Node", "NUMA node", lambda r: r.node, lambda value: "-" if value is None else str(value)),
    Field("runs", "Runs", "runs of pages in it", lambda r: r.runs, right=True),
)
"""The columns of a :class:`FrameRange`."""


class Place(NamedTuple):
    """A frame: whose it is, and the page of its owner that is in it (by offset or address), where it has pages."""

    owner: Owner
    page: int | None


_FIRMWARE = ("reserved", "acpi", "system rom", "video rom", "adapter rom", "unusable", "ram buffer", "option rom")
_PERSISTENT = ("persistent memory", "soft reserved", "dax", "namespace")


def use_of(item: Range) -> Use:
    """What a range of /proc/iomem is, by its name."""
    name = item.name.lower()
    if item.is_ram:
        return Use.RAM
    if name.startswith(("kernel ", "crash kernel")):
        return Use.KERNEL
    if name.startswith(_FIRMWARE):
        return Use.FIRMWARE
    if name.startswith(_PERSISTENT):
        return Use.PERSISTENT
    return Use.BUS if name.startswith("pci bus") else Use.MMIO


class _Painter:
    """Owners by label, and the layers that were painted, the lowest first."""

    def __init__(self) -> None:
        self.owners: list[Owner] = [HOLE]
        self.layers: list[ExtentTable] = []

    def label(self, owner: Owner) -> int:
        self.owners.append(owner)
        return len(self.owners) - 1

    def paint(self, parts: Iterable[tuple[int, int, Owner]]) -> None:
        """Ranges of bytes (start, end, owner) as one layer."""
        from memconsole import labels

        ranges = [(start // PAGE, -(-end // PAGE) - start // PAGE, self.label(owner)) for start, end, owner in parts]
        if ranges:
            self.layers.append(labels.painted(ranges))

    def lay(self, table: ExtentTable, owner: Owner) -> None:
        """The frames of a table of pages."""
        from memconsole import labels

        with table.by_frame() as frames:
            if frames.pages:
                self.layers.append(labels.labelled(frames, self.label(owner)))


class HostMap:
    """The map: ``table`` is by frame, its rows labelled with the number of their owner; close it."""

    def __init__(
        self,
        snapshot: Snapshot,
        table: ExtentTable,
        owners: Sequence[Owner],
        blocks: Sequence[tuple[int, int]],
        unseen: Sequence[Unread] = (),
    ) -> None:
        """``blocks``: runs of frames (first, frames) outside of which there is nothing; ``unseen``: what is missing."""
        self.table = table
        self.blocks = tuple(blocks)
        self.unseen = tuple(unseen)
        self.owners = tuple(owners)
        self.nodes = tuple(
            sorted(
                (each.start // PAGE, each.end // PAGE, node.number)
                for node in snapshot.memory.nodes
                for each in node.ranges
            )
        )

    def close(self) -> None:
        """Give the table back."""
        self.table.close()

    def owner_at(self, pfn: int) -> Place:
        """Whose a frame is; a hole's is :data:`HOLE`."""
        from memconsole import labels

        row = self.table.lookup(pfn)
        if row is None:
            return Place(HOLE, None)
        extent = self.table[row]
        owner = self.owners[labels.label_of(extent)]
        has_pages = owner.use in {Use.REGION, Use.GUEST}
        return Place(owner, extent.pfn + pfn - extent.offset if has_pages else None)

    def node_of(self, pfn: int) -> int | None:
        """The NUMA node of a frame, where it is in a memory block."""
        return next((number for first, end, number in self.nodes if first <= pfn < end), None)

    def ranges(self, span: tuple[int, int] | None = None) -> Iterator[FrameRange]:
        """The map as ranges, in order; of an owner on a node one range as long as nothing is between.

        ``span`` in bytes, its end exclusive.
        """
        from memconsole import labels

        first, last = (0, 1 << 62) if span is None else (span[0] // PAGE, -(-span[1] // PAGE))
        start, stop, runs = 0, 0, 0
        held: tuple[int, int | None] | None = None
        for row in self.table:
            label = labels.label_of(row)
            for begin, end, node in self._by_node(max(row.offset, first), min(row.offset + row.count, last)):
                if held == (label, node) and stop == begin:
                    stop, runs = end, runs + 1
                    continue
                if held is not None:
                    yield self._range(start, stop, held, runs)
                start, stop, runs, held = begin, end, 1, (label, node)
        if held is not None:
            yield self._range(start, stop, held, runs)

    def totals(self) -> list[FrameRange]:
        """The map as sums: of an owner on a node one row, in order of where it begins."""
        found: dict[tuple[str, str, int | None], FrameRange] = {}
        for each in self.ranges():
            key = each.use, each.name, each.node
            before = found.get(key)
            found[key] = (
                each
                if before is None
                else replace(before, end=each.end, size=before.size + each.size, runs=before.runs + each.runs)
            )
        return list(found.values())

    def _range(self, first: int, end: int, held: tuple[int, int | None], runs: int) -> FrameRange:
        owner = self.owners[held[0]]
        size = (end - first) * PAGE
        return FrameRange(first * PAGE, end * PAGE, size, str(owner.use), owner.name, owner.guest, held[1], runs)

    def _by_node(self, begin: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """A run of frames (first, end) cut where it goes on to another node."""
        if begin >= end:
            return
        at = begin
        for first, stop, number in self.nodes:
            if stop <= at or first >= end:
                continue
            if at < first:
                yield at, first, None
                at = first
            yield at, min(stop, end), number
            at = min(stop, end)
        if at < end:
            yield at, end, None


def survey(snapshot: Snapshot, tables: TableSource | None = None) -> HostMap:
    """The map of a Snapshot's host; without ``tables`` of what stands in the Snapshot alone.

    What a table would have said and could not be had is named in ``unseen``.
    """
    from memconsole import labels

    painter, unseen = _Painter(), list[Unread]()
    for depth in range(max((each.depth for each in snapshot.iomem), default=-1) + 1):
        painter.paint(
            (each.start, each.end, Owner(use_of(each), each.name)) for each in snapshot.iomem if each.depth == depth
        )
    painter.paint((each.start, each.end, Owner(Use.SCRATCH, "KHO scratch")) for each in snapshot.survival.scratch)
    painter.paint(_windows(snapshot))
    ground, painter.layers = labels.stacked(painter.layers), []
    blocks = _blocks(ground, painter.owners)
    if tables is not None and snapshot.survival.sessions:
        unseen += _lay(painter, tables, PRESERVED, Owner(Use.PRESERVED, "preserved by KHO"))
    if tables is not None:
        for key, owner in _with_frames(snapshot):
            unseen += _lay(painter, tables, key, owner)
    return HostMap(snapshot, labels.stacked([ground, *painter.layers]), painter.owners, blocks, unseen)


def _blocks(ground: ExtentTable, owners: Sequence[Owner]) -> list[tuple[int, int]]:
    """Where there is anything but the space of a bus: runs of frames (first, frames); small holes are within them."""
    from memconsole import labels

    bus = {label for label, owner in enumerate(owners) if owner.use is Use.BUS}
    return labels.blocks(ground, bus)


def _lay(painter: _Painter, tables: TableSource, key: str, owner: Owner) -> list[Unread]:
    try:
        with contextlib.closing(tables.extents(key)) as table:
            painter.lay(table, owner)
    except MemconsoleError as error:
        return [Unread(key, error.why or error.what, error.remedy)]
    return []


def _windows(snapshot: Snapshot) -> Iterator[tuple[int, int, Owner]]:
    for window in snapshot.windows:
        if window.io or not window.size or not window.start:
            continue
        use = Use.GRANTED if window.guest is not None else Use.WINDOW
        name = f"{window.id} {window.driver or ''}".rstrip()
        yield window.start, window.start + window.size, Owner(use, name, f"window:{window.id}", window.guest or "")


def _with_frames(snapshot: Snapshot) -> Iterator[tuple[str, Owner]]:
    """The owners that have a table of frames (VMs of others, regions), each with the table's key."""
    holders: dict[str, dict[str, None]] = {}
    for grant in snapshot.grants:
        holders.setdefault(grant.region, {})[grant.guest] = None
    for guest in snapshot.guests:
        if guest.kind == "foreign":
            yield f"guest:{guest.name}", Owner(Use.GUEST, guest.name, f"guest:{guest.name}", guest.name)
    for region in snapshot.regions:
        if region.seen is not None:
            key, guests = f"region:{region.name}", ", ".join(holders.get(region.name, ()))
            yield key, Owner(Use.REGION, region.name, key, guests)
