"""The host's physical memory in a line: by what it is used for, and by where it lies; from a Snapshot alone.

Which frames are whose only the tables of frames say; a line of cells has room for amounts and for the kernel's own map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memconsole.hostmap import Use, use_of
from memconsole.model import Range, Snapshot
from memconsole.units import format_size


class Share(NamedTuple):
    """A part of memory: what it is, bytes, the character that stands for it, and its tone (see ``looks``)."""

    name: str
    size: int
    mark: str
    tone: str

    @property
    def legend(self) -> str:
        """What the character means, and how much of it there is."""
        return f"{self.mark} {self.name} {format_size(self.size)}"


def by_use(snapshot: Snapshot, resident: int) -> list[Share]:
    """What the host's memory is used for; the shares that are not empty, together all of it.

    ``resident``: bytes of regions that are in memory in the host's own pages, and so in no pool.
    """
    memory = snapshot.memory
    pools = sum(pool.total * pool.page_size for pool in memory.pools)
    used = max(memory.total - memory.available, 0)
    pools = min(pools, used)
    regions = min(resident, used - pools)
    free = min(memory.free, memory.available)
    found = [
        Share("regions", regions, "█", "calm"),
        Share("hugetlb pools", pools, "▓", "calm"),
        Share("other", used - pools - regions, "▒", "warn"),
        Share("reclaimable", memory.available - free, "░", "good"),
        Share("free", free, "·", "dim"),
    ]
    return [share for share in found if share.size > 0]


def cells(shares: Sequence[Share], width: int) -> list[int]:
    """How many of ``width`` cells each share gets: in proportion, at least one, together all of them."""
    total = sum(share.size for share in shares)
    if not shares or not total:
        return [0] * len(shares)
    found = [max(share.size * width // total, 1) for share in shares]
    largest = max(range(len(shares)), key=lambda at: shares[at].size)
    found[largest] = max(found[largest] + width - sum(found), 1)
    return found


_KINDS = (
    ("holes", "·", "dim"),
    ("RAM", "█", "good"),
    ("firmware", "░", "dim"),
    ("devices", "=", "calm"),
    ("kernel", "▓", "warn"),
    ("KHO scratch", "▒", "bad"),
)
"""What a range may be, what is seen of it, and its tone; of several in a cell the last one is seen."""


_RAM, _FIRMWARE, _DEVICES, _KERNEL, _SCRATCH = range(1, len(_KINDS))


_OF_USE = {Use.RAM: _RAM, Use.KERNEL: _KERNEL, Use.FIRMWARE: _FIRMWARE}
"""What is seen of each use; every other one is of devices."""


def _kind(item: Range) -> int:
    return _OF_USE.get(use_of(item), _DEVICES)


def by_place(snapshot: Snapshot, width: int) -> tuple[str, list[Share]]:
    """A character for each of ``width`` equal parts of the addresses up to the end of RAM, and what they mean.

    Empty where the kernel does not show addresses.
    """
    top = max((item.end for item in snapshot.iomem if item.is_ram), default=0)
    ranges = [(_kind(item), item) for item in snapshot.iomem if item.depth == 0 or _kind(item) == _KERNEL]
    ranges += [(_SCRATCH, item) for item in snapshot.survival.scratch]
    sizes = [0] * len(_KINDS)
    seen = [0] * width
    for kind, item in ranges if width > 0 else ():
        end = min(item.end, top)
        if item.start >= end:
            continue
        sizes[kind] += end - item.start
        for cell in range(item.start * width // top, min(-(-end * width // top), width)):
            seen[cell] = max(seen[cell], kind)
    if not ranges or not top or width <= 0:
        return "", []
    sizes[0] = top - sum(
        min(item.end, top) - item.start for item in snapshot.iomem if not item.depth and item.start < top
    )
    shares = [
        Share(name, sizes[kind], mark, tone)
        for kind, (name, mark, tone) in enumerate(_KINDS)
        if sizes[kind] and kind in seen
    ]
    return "".join(_KINDS[kind][1] for kind in seen), shares
