r"""Physical address maps: /proc/iomem, /proc/ioports, and the firmware's own (/sys/firmware/memmap).

iomem   = { { "  " } START "-" END " : " NAME "\n" }       hexadecimal, END inclusive, two blanks a level
memmap  = N/{start,end,type}                                hexadecimal, end inclusive
"""

from __future__ import annotations

import re

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied
from memconsole.model import Range, Unread

_ROW = re.compile(r"( *)([0-9a-f]{1,16})-([0-9a-f]{1,16}) : (.*)", re.DOTALL)
_MEMMAP = "/sys/firmware/memmap"


def iomem(root: Root = "/") -> tuple[Range, ...]:
    """The kernel's map of physical addresses, in order, each range before those inside it (``depth``).

    Raises:
        Denied: every address reads as zero, which is what the kernel shows without CAP_SYS_ADMIN.
        NotFound, KernelRefused, BadFile: it cannot be read.
    """
    return _resources(root, "/proc/iomem")


def ioports(root: Root = "/") -> tuple[Range, ...]:
    """The kernel's map of x86 ports, as :func:`iomem`.

    Raises:
        Denied, NotFound, KernelRefused, BadFile: as :func:`iomem`.
    """
    return _resources(root, "/proc/ioports")


def firmware(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Range, ...]:
    """The memory map as the firmware gave it, by address; before the kernel took its own parts out.

    A part that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        NotFound: this kernel or firmware has none (Arm with a device tree).
        Denied, KernelRefused: it cannot be listed. BadFile, or these: without ``gaps``, a part of it cannot be read.
    """

    def entry(name: str) -> Range:
        base = f"{_MEMMAP}/{name}"
        start, end = tree.number(root, f"{base}/start", 16), tree.number(root, f"{base}/end", 16)
        return Range(start, end + 1, tree.line(root, f"{base}/type"))

    return tuple(sorted(tree.each(root, _MEMMAP, entry, gaps), key=lambda item: (item.start, item.end)))


def parse(source: str, raw: bytes) -> tuple[Range, ...]:
    """The ranges of a resource file; ``end`` exclusive.

    Raises:
        BadFile: a line is no range.
    """
    ranges = []
    for row in tree.text(raw).split("\n"):
        if not row:
            continue
        match = _ROW.fullmatch(row)
        if match is None:
            raise tree.malformed(source, row)
        blanks, start, end, name = match.groups()
        ranges.append(Range(int(start, 16), int(end, 16) + 1, name, len(blanks) // 2))
    return tuple(ranges)


def _resources(root: Root, source: str) -> tuple[Range, ...]:
    ranges = parse(source, tree.read(root, source))
    if ranges and all(item.start == 0 and item.end == 1 for item in ranges):
        raise Denied(
            f"{source} hides its addresses",
            "the kernel shows zeros without CAP_SYS_ADMIN",
            "run as root (CAP_SYS_ADMIN)",
        )
    return ranges
