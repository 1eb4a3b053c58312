r"""The store whose memory has no struct pages: a range that ``memmap=nn$ss`` keeps from the kernel, by /dev/mem.

/proc/cmdline                           memmap=32M$1280M: of it the units of 2 MiB that lie inside
/proc/iomem                             50000000-51ffffff : Reserved, with nothing in it
/sys/firmware/memmap/N/{start,end,type} System RAM, where the kernel shows it (CONFIG_FIRMWARE_MEMMAP)

Nothing can pin such memory, and no page table is shown to have it: an offset in /dev/mem is a physical address, which
is all that says where a page lies (``DERIVED``). Whoever opens /dev/mem has all of the host's memory; so a range is not
even read unless somebody named it by where it begins (memory may also be kept from the kernel because it is broken),
and only VMs of this service are given a region. What such a range says of itself is in :mod:`.described`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from memconsole import model
from memconsole.backend.kernel import cmdline, iomem, tree
from memconsole.backend.kernel.cmdline import MemmapRange
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import ranges
from memconsole.backend.stores.described import UNIT
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.stores.ranges import Range
from memconsole.errors import MemconsoleError, NotFound
from memconsole.model import Refusal
from memconsole.units import format_address, format_size

NAME = "raw"
DEVICE = "/dev/mem"
SMALLEST = 2 * UNIT
"""What says what is in it, and one region."""
_NUMBER = os.makedev(1, 1)
_RESERVED, _RAM = "Reserved", "System RAM"
UNNAMED = f"this service was started without --raw: it does not open {DEVICE}, which is all of this host's memory"
"""Why it has no range."""
_BOOT = "boot with memmap=SIZE$START of ordinary memory (GRUB wants the $ as \\\\\\$)"
_REFUSED = "the service needs CAP_SYS_RAWIO; CONFIG_STRICT_DEVMEM allows what is not the kernel's, a lockdown nothing"


def reserved(root: Root = "/") -> tuple[Range, ...]:
    """The ranges that this kernel's command line keeps from it, by address, each with why it may not be used.

    Raises:
        Denied, KernelRefused: the command line cannot be read.
    """
    try:
        line = cmdline.read(root)
    except NotFound:  # a recorded host need not have it
        return ()
    words = {(each.start, each.size): each for each in cmdline.memmaps(line) if each.mark == "$"}
    return tuple(_range(words[key], list(words.values()), root) for key in sorted(words))


def named(root: Root, wanted: Iterable[int]) -> tuple[Range, ...]:
    """The ranges that begin where somebody said; one that the command line does not know has that for its trouble."""
    try:
        known = {each.name: each for each in reserved(root)}
        why = "no memmap=SIZE$START of this kernel's command line begins there"
    except tree.UNREADABLE as error:
        known, why = {}, str(error)
    names = dict.fromkeys(map(format_address, wanted))
    path = str(tree.below(root, DEVICE))
    return tuple(
        known.get(name) or Range(name, path, _NUMBER, 0, int(name, 16), None, -1, why, _BOOT) for name in names
    )


def _range(word: MemmapRange, words: Sequence[MemmapRange], root: Root) -> Range:
    base = -(-word.start // UNIT) * UNIT
    size = max(0, (word.start + word.size) // UNIT * UNIT - base)
    path = tree.below(root, DEVICE)
    why, remedy = next(_troubles(word, words, size, root), ("", _REFUSED))
    return Range(format_address(word.start), str(path), _NUMBER, size, base, base, -1, why, remedy)


def _troubles(word: MemmapRange, words: Sequence[MemmapRange], size: int, root: Root) -> Iterator[tuple[str, str]]:
    """Why a range may not be used, and what to do."""
    start, end = word.start, word.start + word.size
    if size < SMALLEST:
        yield f"it has {format_size(size)} in units of 2M; {format_size(SMALLEST)} are needed", _BOOT
    for other in words:
        if other is not word and other.start < end and start < other.start + other.size:
            yield f"memmap={other.said} names a part of it, too", "name each byte once"
    if level := tree.lockdown(root):
        yield f"the kernel is locked down ({level}): it opens {DEVICE} for no process", tree.UNLOCKED
    if not tree.exists(root, DEVICE):
        yield f"there is no {DEVICE}", "boot a kernel with CONFIG_DEVMEM=y"
    try:
        yield from ((why, _BOOT) for why in _not_ours(iomem.iomem(root), start, end))
    except MemconsoleError as error:
        yield f"it is not shown whose it is: {error}", error.remedy
    try:
        yield from ((why, _BOOT) for why in _no_memory(iomem.firmware(root), start, end))
    except NotFound:  # not every kernel shows what the firmware said
        return
    except MemconsoleError as error:
        yield f"what the firmware says of it cannot be read: {error}", error.remedy


def _not_ours(found: Sequence[model.Range], start: int, end: int) -> Iterator[str]:
    """What of /proc/iomem says that a range is the kernel's, a device's, or nobody knows whose."""
    within = [each for each in found if each.start < end and start < each.end]
    for each in within:
        if each.is_ram:
            yield f"/proc/iomem has {_RAM} there, from {format_address(each.start)} on: the kernel uses it"
        elif each.depth or each.name != _RESERVED:
            yield f"/proc/iomem has {each.name} there, from {format_address(each.start)} on"
    if not any(each.start <= start and end <= each.end for each in within):
        yield "/proc/iomem does not say that it is reserved, all of it"


def _no_memory(found: Sequence[model.Range], start: int, end: int) -> Iterator[str]:
    """What the firmware says that speaks against memory being there."""
    at = start
    for each in found:
        if each.name == _RAM and each.start <= at < each.end:
            at = each.end
        elif each.name != _RAM and each.start < end and start < each.end:
            yield f"the firmware says that {each.name} is there, from {format_address(each.start)} on"
    if at < end:
        yield f"the firmware does not say that there is memory at {format_address(at)}"


class RawStore(PieceStore):
    """The ranges of /dev/mem that somebody named (``wanted``: where they begin); without any it has nothing."""

    NAME = NAME
    DERIVED = NAMED = VMS_ONLY = True
    MADE_BY, CHECKED_BY = "memconsole arena create NAME --raw", "memconsole arena check --raw START"

    def __init__(
        self,
        wanted: Sequence[int],
        *,
        lasting: bool,
        root: Root = "/",
        nodes: Path = Path(ranges.NODES),
        node: Callable[[Range, Path], None] = ranges.make_node,
    ) -> None:
        super().__init__(NAME, partial(named, wanted=wanted), lasting=lasting, root=root, nodes=nodes, node=node)
        self._wanted = wanted

    def ranges(self) -> tuple[Range, ...]:
        """The ranges that were named, those that cannot be used, too."""
        return named(self._root, self._wanted)

    def _no_arena(self) -> Refusal:
        if self._wanted or not self._lasting:
            return super()._no_arena()
        remedy = "boot with memmap=SIZE$START; memconsole serve --raw START; memconsole arena create NAME --raw"
        return Refusal("NotNamed", f"the {NAME} store has no memory", UNNAMED, remedy)
