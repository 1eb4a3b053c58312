"""The host map: the host's physical address space, whose every frame is, and who reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from memconsole import hostmap, labels
from memconsole.errors import NotFound
from memconsole.hostmap import HOLE, HostMap, Owner, Use
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.units import PAGE, format_address, format_size, parse_address
from memconsole.views.screens.mapmodel import Goal, MapModel, Mode
from memconsole.views.screens.mapview import MapView
from memconsole.views.screens.pfnmodes import node_frames, node_meanings
from memconsole.views.widgets.facts import Fact
from memconsole.views.widgets.layers import LabelLayer, Layer, Meaning
from memconsole.views.widgets.pagefacts import asked_frame
from memconsole.views.widgets.pagegrid import (
    ALL_LOOKS,
    FIRST_LETTER,
    FIRST_USE,
    LETTERS,
    NO,
    YES,
    Block,
)

SUBJECT = "host"
_USES = tuple(Use)
_LOOK_OF = {use: FIRST_USE + number for number, use in enumerate(_USES)}


_PARTS = {Use.REGION: FIRST_USE + len(_USES), Use.GUEST: FIRST_USE + len(_USES) + 1}
"""The looks of a cell of which a region, or a VM of others, has less than half."""


def use_meaning(use: Use) -> Meaning:
    """How frames of a use are drawn, and what the legend calls them."""
    look = ALL_LOOKS[_LOOK_OF[use]]
    loud = use in _PARTS or use is Use.GRANTED
    return Meaning(_LOOK_OF[use], look.title, loud=loud, part=_PARTS.get(use), brief=look.brief)


class HostModel:
    """The map of a host, and what the Snapshot says of its frames."""

    marks = None
    page_size = PAGE
    scanned_ns = 0

    def __init__(self, source: Source, snapshot: Snapshot) -> None:
        self._source = source
        self._snapshot = snapshot
        self.host: HostMap = hostmap.survey(snapshot, source)
        if not self.host.blocks:
            raise NotFound(
                "the host map is empty",
                "the kernel does not show the addresses of /proc/iomem to this user",
                "run as root (CAP_SYS_ADMIN) what surveys this host",
            )
        self._kinds = bytes(_USES.index(owner.use) + 1 for owner in self.host.owners)

    @property
    def modes(self) -> Sequence[Mode]:
        """By use, by guest, by NUMA node, by whether it is preserved."""
        return (
            Mode("use", self._by_use, quick=True),
            Mode("guest", self._by_guest, quick=True),
            Mode("NUMA node", self._by_node),
            Mode("preserved", self._by_preserved),
        )

    def _by_use(self) -> Layer:
        there = {owner.use for owner in self.host.owners}
        uses = [Use.BUS, *(use for use in _USES if use is not Use.BUS and use in there)]
        meanings = [Meaning(_LOOK_OF[Use.BUS], ""), *map(use_meaning, uses[1:])]
        return LabelLayer("use", self.host.table, meanings, [uses.index(owner.use) for owner in self.host.owners])

    def _by_guest(self) -> Layer:
        names = list(dict.fromkeys(owner.guest for owner in self.host.owners if owner.guest))
        lettered = names[: len(LETTERS) - 1]
        meanings = [Meaning(_LOOK_OF[Use.BUS], ""), Meaning(_LOOK_OF[Use.RAM], "of no guest")]
        meanings += [Meaning(FIRST_LETTER + number, name) for number, name in enumerate(lettered)]
        if len(names) > len(lettered):
            meanings.append(Meaning(YES, f"{len(names) - len(lettered):,} other guests"))
        number_of_name = {name: min(2 + number, len(meanings) - 1) for number, name in enumerate(names)}
        kinds = [number_of_name.get(owner.guest, 0 if owner.use is Use.BUS else 1) for owner in self.host.owners]
        return LabelLayer("guest", self.host.table, meanings, kinds)

    def _by_node(self) -> Layer:
        numbers, table = node_frames(self.host.nodes)
        meanings = [Meaning(_LOOK_OF[Use.BUS], ""), *node_meanings(numbers)]
        return LabelLayer("NUMA node", table, meanings, {1 + each: 1 + at for at, each in enumerate(numbers)})

    def _by_preserved(self) -> Layer:
        with self._source.extents(hostmap.PRESERVED) as kept:
            marked = labels.labelled(kept, 2)
        ram = {Use.RAM, Use.KERNEL, Use.REGION, Use.GUEST, Use.SCRATCH, Use.PRESERVED}
        ground = labels.painted(
            (row.offset, row.count, 1)
            for row in self.host.table
            if self.host.owners[labels.label_of(row)].use in ram
        )  # fmt: skip
        meanings = [
            Meaning(_LOOK_OF[Use.BUS], ""),
            Meaning(NO, "RAM that is not preserved"),
            Meaning(YES, "preserved over the next kexec", loud=True),
        ]
        return LabelLayer("preserved", labels.stacked([ground, marked]), meanings, [0, 1, 2])

    def blocks(self) -> Sequence[Block]:
        """RAM and MMIO; the space of a bus and long holes take no room."""
        return [Block(first, frames) for first, frames in self.host.blocks]

    def words(self, cell_bytes: int) -> Sequence[str]:
        """RAM, nodes, cell; what is missing."""
        memory = self._snapshot.memory
        spanned = sum(frames for _, frames in self.host.blocks) * PAGE
        words = [
            f"{format_size(spanned)} in {format_size(cell_bytes)}",
            f"{format_size(memory.total)} RAM {format_size(memory.free)} free",
            f"{len(memory.nodes)} node{'s' * (len(memory.nodes) != 1)}",
        ]
        if self.host.unseen:
            words.append(f"▲ {len(self.host.unseen)} not seen: {self.host.unseen[0].source}")
        return words

    def frame_of(self, page: int) -> int | None:
        """The frame itself, where it is RAM."""
        return (
            page if any(each.is_ram and each.start <= page * PAGE < each.end for each in self._snapshot.iomem) else None
        )

    def facts(self, page: int) -> Sequence[Fact]:
        """The frame: address, what the kernel calls it, node, whose, and who reaches it."""
        place = self.host.owner_at(page)
        owner, address = place.owner, page * PAGE
        within = [each.name for each in self._snapshot.iomem if each.start <= address < each.end]
        node = self.host.node_of(page)
        reached = _reached(self._snapshot, owner)
        return [
            Fact("PFN", f"{page:#x}", "calm"),
            Fact("Address", format_address(address)),
            Fact("iomem", " > ".join(within) or "nothing"),
            Fact("Node", "-" if node is None else str(node)),
            Fact("Whose", _whose(owner), "" if owner is HOLE else "good" if owner.subject else "dim"),
            Fact("Its page", "-" if place.page is None else format_address(place.page * PAGE)),
            Fact("Guest", owner.guest or "-"),
            Fact("Reached", reached),
        ]

    def cell_facts(self, first: int, pages: int) -> Sequence[Fact]:
        """The cell: its size, and what most of it is."""
        if pages <= 0:
            return [Fact("Cell", "-"), Fact("In it", "-")]
        most = self._most(first, pages)
        return [Fact("Cell", format_size(pages * PAGE)), Fact("In it", most)]

    def _most(self, first: int, pages: int) -> str:
        looks, counts = labels.count_looks(self.host.table, (first, pages, 1), self._kinds)
        word = "nothing" if not looks[0] else str(_USES[looks[0] - 1])
        return f"{100 * counts[0] // pages}% {word}"

    def find(self, text: str) -> int:
        """The frame of a physical address, of ``pfn NUMBER``, or of a region, guest, window or device by its name.

        Raises:
            UsageError, NotFound: it is none, or nothing is there.
        """
        pfn = asked_frame(text)
        if pfn is not None:
            return self._held(pfn, text)
        named = self._first_of(text.strip())
        return named if named is not None else self._held(parse_address(text) // PAGE, text)

    def _held(self, pfn: int, text: str) -> int:
        if not any(first <= pfn < first + frames for first, frames in self.host.blocks):
            raise NotFound(
                f"{text.strip()} is not on the host map",
                "no RAM and no device is there",
                "the left margin shows what is",
            )
        return pfn

    def _first_of(self, name: str) -> int | None:
        """The first frame of whatever has this name."""
        wanted = {
            label
            for label, owner in enumerate(self.host.owners)
            if name in {owner.name, owner.guest, owner.subject, owner.subject.partition(":")[2]}
        }
        return next((row.offset for row in self.host.table if labels.label_of(row) in wanted), None) if wanted else None

    def goal(self, page: int) -> Goal | str:
        """The map of the region or VM whose it is, at its page; a window; else everybody who reaches the frame."""
        place = self.host.owner_at(page)
        if place.owner is HOLE:
            return f"nothing is at {format_address(page * PAGE)}"
        if place.page is not None:
            return Goal("pfn", place.owner.subject, place.page)
        if place.owner.subject:
            return Goal("window", place.owner.subject)
        return Goal("reach", f"reach:{page:#x}")

    def take(self, snapshot: Snapshot) -> bool:
        """Who holds what by now."""
        self._snapshot = snapshot
        return False

    def close(self) -> None:
        """Close the map's table."""
        self.host.close()


def _whose(owner: Owner) -> str:
    if owner is HOLE:
        return "a hole: no address of it is used"
    words = {Use.REGION: "region ", Use.GUEST: "VM ", Use.WINDOW: "window ", Use.GRANTED: "window "}
    return f"{words.get(owner.use, '')}{owner.name}"


def _reached(snapshot: Snapshot, owner: Owner) -> str:
    """Who reaches an owner's frames: processes, devices, the kernel."""
    kind, _, name = owner.subject.partition(":")
    if kind == "region":
        region = next((each for each in snapshot.regions if each.name == name), None)
        pids = region.seen.mappers if region is not None and region.seen is not None else ()
        devices = {grant.dma for grant in snapshot.grants if grant.region == name and grant.dma}
        found = [*(f"pid {pid}" for pid in pids), *sorted(devices)]
    elif kind == "guest":
        guest = next((each for each in snapshot.guests if each.name == name), None)
        found = [f"pid {guest.pid}"] if guest is not None and guest.pid is not None else []
    elif kind == "window":
        window = next((each for each in snapshot.windows if each.id == name), None)
        found = [f"pid {pid}" for pid in window.holders] if window is not None else []
        found += [window.driver] if window is not None and window.driver else []
    else:
        found = ["the kernel"] if owner.use in {Use.RAM, Use.KERNEL, Use.SCRATCH, Use.PRESERVED} else []
    return ", ".join(found) or "-"


class HostView(MapView):
    """Physical memory: whose every frame is."""

    PLACEHOLDER: ClassVar[str] = "0x100000000, 4G, pfn 0x1234, or a region, guest or window by its name"

    def about(self, subject: str) -> None:
        """There is one host."""
        del subject
        super().about(SUBJECT)

    @property
    def heading(self) -> str:
        """What the map is of."""
        return "physical memory"

    def read_model(self, source: Source, subject: str, snapshot: Snapshot, before: MapModel | None) -> MapModel:
        """Read the tables of frames."""
        del subject, before
        return HostModel(source, snapshot)
