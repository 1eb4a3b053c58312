"""PFN maps of synthetic hosts: deterministic, and as a Snapshot lays its regions and guests out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memconsole.errors import NotFound
from memconsole.model import Snapshot

if TYPE_CHECKING:
    from memconsole.extents import Extent

PAGE = 4096
HUGE_PAGES = 512
MIB = 1 << 20
TIB = 1 << 40

PRESENT, SWAP, FILE, EXCLUSIVE, HUGE = 1, 2, 4, 8, 64  # memconsole.extents.Flag, which needs the native core


def extents_of(size: int) -> int:
    """How many extents the map of a region of this size has."""
    return 1_000_000 if size == TIB else max(1, size // (2 * MIB)) * 2


def region_rows(name: str, size: int, *, shift: int = 0) -> Iterator[Extent]:
    """The PFN map of a region: 2 MiB chunks, three of five huge, the others cut into 4 KiB runs, swap and holes.

    They begin at page ``shift``; of a region of 1 TiB they are 1,000,000. No extent's frames continue another's.
    """
    from memconsole.extents import Extent

    rng = random.Random(zlib.crc32(name.encode()))
    chunks = size // (HUGE_PAGES * PAGE)
    wanted = extents_of(size)
    done = 0
    for chunk in range(chunks):
        offset = shift + chunk * HUGE_PAGES
        if chunk % 5 in {0, 2, 3} and chunk < chunks - 1:
            done += 1
            pfn = (1 << 20) + (rng.getrandbits(16) << 10)
            yield Extent(offset, pfn, HUGE_PAGES, PRESENT | FILE | EXCLUSIVE | HUGE)
            continue
        pieces = min(HUGE_PAGES, max(1, wanted * (chunk + 1) // chunks - done))
        length = HUGE_PAGES // pieces
        done += pieces
        for piece in range(pieces):
            count = length if piece < pieces - 1 else HUGE_PAGES - length * (pieces - 1)
            dice = rng.getrandbits(24)
            there = max(1, count // 2) if dice & 0x30 == 0 else count  # the rest is absent, and has no row
            if dice & 15 == 1:
                yield Extent(offset, (dice >> 4) << 15, there, SWAP)
            else:
                yield Extent(offset, (1 << 27) + (dice << 10), there, PRESENT | FILE)
            offset += count


def _ram_of(shown: Snapshot, key: str) -> list[tuple[str, int, int]]:
    """The parts (region, bytes, first page) the PFN map of ``region:NAME`` or ``guest:NAME`` is made of."""
    kind, _, name = key.partition(":")
    for region in shown.regions if kind == "region" else ():
        if region.name == name:
            return [(name, region.size, 0)]
    for guest in shown.guests if kind == "guest" else ():
        if guest.name == name and guest.seen is not None:
            return [(str(block.region), block.size, (block.gpa or 0) // PAGE) for block in guest.seen.ram]
    raise NotFound(f"there is no {key}", "", "see memconsole regions and memconsole guests")


def rows_of(shown: Snapshot, key: str) -> Iterator[Extent]:
    """The extents of ``region:NAME`` by offset, or of ``guest:NAME`` by gpa, as the Snapshot lays them out.

    Raises:
        NotFound: the Snapshot has no such region or guest.
    """
    for name, size, shift in _ram_of(shown, key):
        yield from region_rows(name, size, shift=shift)


def pages_of(shown: Snapshot, key: str) -> int:
    """How many pages that map covers."""
    return sum(size for _, size, _ in _ram_of(shown, key)) // PAGE
