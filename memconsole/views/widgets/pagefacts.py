"""What there is to say of one page of a PFN map: its addresses, its frame, whose it is; no terminal.

A *space* is what a map's offsets count in: a region's map is by offset into the region, a guest's by guest physical
address, or by its process's own addresses where no gpa is known. The blocks of a map are its space's parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memconsole.errors import NotFound, UsageError
from memconsole.extents import ExtentTable, Flag
from memconsole.model import Grant, Guest, Region, Snapshot
from memconsole.units import format_size, parse_address
from memconsole.views.widgets.facts import Fact
from memconsole.views.widgets.pagegrid import Block, Marks, count, kind_of

MARKS = {"moved": "moved, was in {:#x}", "came": "came with this scan", "gone": "gone, was in {:#x}"}


class Home(NamedTuple):
    """One way a page is reached: the address in a process, and the part of a region it is."""

    pid: int | None
    hva: int | None
    region: str | None
    offset: int | None


class MapSpace:
    """A map's space, out of a Snapshot: the part of it that says where each page is and whose."""

    def __init__(self, snapshot: Snapshot, subject: str) -> None:
        kind, _, name = subject.partition(":")
        self.subject = subject
        self.region: Region | None = None
        self.guest: Guest | None = None
        if kind == "region":
            self.region = next((region for region in snapshot.regions if region.name == name), None)
        else:
            self.guest = next((guest for guest in snapshot.guests if guest.name == name), None)
        self.grants: list[Grant] = [
            grant for grant in snapshot.grants if (grant.region if kind == "region" else grant.guest) == name
        ]
        self.ram = self.guest.seen.ram if self.guest is not None and self.guest.seen is not None else ()

    @property
    def unit(self) -> str:
        """What an address of this space is called: Offset, GPA or HVA."""
        if self.guest is None:
            return "Offset"
        return "GPA" if any(block.gpa is not None for block in self.ram) or not self.ram else "HVA"

    def blocks(self, table: ExtentTable) -> list[Block]:
        """The parts of the space the table speaks of; where the Snapshot does not know, all that the table covers."""
        size = table.page_size
        if self.region is not None:
            return [Block(0, max(self.region.size // size, table.end), self.region.name)]
        parts = [
            Block(
                (block.start if block.gpa is None else block.gpa) // size, block.size // size, block.region or "other"
            )
            for block in self.ram
        ]
        if not parts:
            parts = [
                Block(grant.gpa // size, grant.length // size, grant.region)
                for grant in self.grants
                if grant.gpa is not None
            ]
        known = [part for part in parts if part.page < table.end and part.end > table.first]
        return known or [Block(table.first, table.end - table.first)]

    def homes(self, address: int) -> Iterator[Home]:
        """The ways the page at an address of this space is reached."""
        if self.region is not None:
            for grant in self.grants:
                for mapping in grant.seen:
                    if mapping.offset <= address < mapping.offset + mapping.end - mapping.start:
                        hva = mapping.start + address - mapping.offset
                        yield Home(mapping.pid, hva, self.region.name, address)
            return
        for block in self.ram:
            start = block.start if block.gpa is None else block.gpa
            if start <= address < start + block.size:
                held = self._held(address)
                pid = None if self.guest is None else self.guest.pid
                yield Home(pid, block.start + address - start, block.region, None if held is None else held[1])

    def _held(self, gpa: int) -> tuple[Grant, int] | None:
        """The guest's grant that a gpa lies in, and the offset into its region."""
        for grant in self.grants:
            if grant.gpa is not None and grant.gpa <= gpa < grant.gpa + grant.length:
                return grant, grant.offset + gpa - grant.gpa
        return None

    def grants_at(self, address: int) -> list[Grant]:
        """The grants that reach the page at an address."""
        if self.region is not None:
            return [grant for grant in self.grants if grant.offset <= address < grant.offset + grant.length]
        held = self._held(address)
        return [] if held is None else [held[0]]

    def address_of(self, hva: int) -> int:
        """The address in this space of what a process reaches at ``hva``.

        Raises:
            NotFound: nothing of this map is mapped there.
        """
        for block in self.ram:
            if block.start <= hva < block.start + block.size:
                return (block.start if block.gpa is None else block.gpa) + hva - block.start
        for grant in self.grants if self.region is not None else ():
            for mapping in grant.seen:
                if mapping.start <= hva < mapping.end:
                    return mapping.offset + hva - mapping.start
        raise NotFound(
            f"nothing of {self.subject} is mapped at {hva:#x}",
            "the address is outside its RAM",
            "see the guest's RAM for what is",
        )

    def find(self, text: str, table: ExtentTable) -> int:
        """The page a person asks for: ``ADDRESS`` of this space, ``hva ADDRESS``, or ``pfn NUMBER``.

        Raises:
            UsageError: it is none of these.
            NotFound: no page is there.
        """
        pfn = asked_frame(text)
        if pfn is not None:
            page = table.lookup_pfn(pfn)
            if page is None:
                raise NotFound(
                    f"no page of {self.subject} is in frame {pfn:#x}",
                    "no row of the map has this frame",
                    "r scans again",
                )
            return page
        word, _, rest = text.strip().lower().partition(" ")
        address = self.address_of(parse_address(rest)) if word == "hva" else parse_address(text)
        page = address // table.page_size
        if not any(block.page <= page < block.end for block in self.blocks(table)):
            raise NotFound(
                f"{address:#x} is not in {self.subject}",
                "the map does not reach there",
                "the left margin shows which addresses are",
            )
        return page


def asked_frame(text: str) -> int | None:
    """The frame that ``pfn NUMBER`` asks for, decimal or hexadecimal; None where something else is asked for.

    Raises:
        UsageError: the number is neither.
    """
    word, _, rest = text.strip().partition(" ")
    if word.lower() != "pfn":
        return None
    try:
        return int(rest.strip(), 0)
    except ValueError:
        raise UsageError(
            f"{rest!r} is not a frame number", "it is neither hexadecimal nor decimal", "write pfn 0x1234 or pfn 4660"
        ) from None


def describe(space: MapSpace, table: ExtentTable, marks: Marks | None, page: int) -> list[Fact]:
    """What there is to say of one page, always in the same order and number of facts."""
    address = page * table.page_size
    row = table.lookup(page)
    extent = None if row is None else table[row]
    homes = list(space.homes(address))
    home = homes[0] if homes else None
    grants = space.grants_at(address)
    mark = None if marks is None else marks.at(page)
    present = extent is not None and bool(extent.flags & Flag.PRESENT)
    if extent is None:
        run = "in none"
    else:
        frames = f" in {extent.pfn:#x}-{extent.pfn + extent.count - 1:#x}" if present else ""
        run = f"{extent.count:,} from {extent.offset * table.page_size:#x}{frames}"
    more = f" +{len(homes) - 1}" if len(homes) > 1 else ""
    return [
        Fact(space.unit, f"{address:#x}"),
        Fact("HVA", f"{home.hva:#x} of {home.pid}{more}" if home is not None and home.hva is not None else "-"),
        Fact("PFN", f"{extent.pfn + page - extent.offset:#x}" if extent is not None and present else "-", "calm"),
        Fact("Page", ", ".join([kind_of(extent).value, *flag_words(extent.flags if extent is not None else 0)])),
        Fact("Run", run),
        Fact("Region", _part_of(space, home)),
        Fact("Grant", ", ".join(f"{grant.id} {grant.access} to {grant.guest}" for grant in grants) or "-"),
        Fact("Last scan", "-" if mark is None else MARKS[mark[0]].format(mark[1]), "" if mark is None else "warn"),
    ]


def _part_of(space: MapSpace, home: Home | None) -> str:
    if space.region is not None:
        return space.region.name
    if home is None or home.region is None:
        return "-"
    return home.region if home.offset is None else f"{home.region}+{home.offset:#x}"


def flag_words(flags: int) -> list[str]:
    """The flags that say more than the kind of page does."""
    words = {
        Flag.FILE: "file",
        Flag.EXCLUSIVE: "exclusive",
        Flag.SOFT_DIRTY: "soft-dirty",
        Flag.UFFD_WP: "uffd-wp",
        Flag.DERIVED: "derived, not seen",
    }
    return [word for flag, word in words.items() if flags & flag]


def describe_cell(table: ExtentTable, first: int, pages: int) -> list[Fact]:
    """What a cell holds: its size, and its pages by kind."""
    if pages <= 0:
        return [Fact("Cell", "-"), Fact("In it", "-")]
    counts = count(table, first, pages)
    parts = [
        f"{100 * number // pages}% {word}"
        for number, word in ((counts.present, "present"), (counts.huge, "huge"), (counts.swapped, "swapped"))
        if number or word == "present"
    ]
    size = format_size(pages * table.page_size)
    return [Fact("Cell", f"{size}, {counts.runs:,} run{'s' * (counts.runs != 1)}"), Fact("In it", ", ".join(parts))]
