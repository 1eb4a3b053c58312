"""The store whose regions are pieces of a device that is memory (:mod:`.ranges`), without a file system.

A region is one run of units of 2 MiB, and has a device file of its own, ``/dev/memconsole/ARENA/REGION``: the same
device at an offset, under an inode by which the kernel shows who has it. Who has such a file can map all of the range:

* so only VMs that memconsole started share a range, else one process has one grant of it (:mod:`..verbs.grants`);
* so no file can be cut from its holder: a revoke asks, and then kills. To unbind the driver takes every mapping away,
  and is never a rung: it does not wait for who has pinned a page, and the kernel crashes when that one lets go.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import files, memfd, ranges
from memconsole.backend.stores.base import Found, HeldRange, Unfound, unit_refusals
from memconsole.backend.stores.described import UNIT, Description, Piece, place_for
from memconsole.backend.stores.ranges import Devices, Opened, Range
from memconsole.errors import KernelRefused, MemconsoleError, NotFound, Refused
from memconsole.model import Access, Finding, Grant, Refusal, Region, Segment, Severity
from memconsole.units import PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable


class _Place(NamedTuple):
    arena: Opened
    piece: Piece


class PieceStore(Unfound):
    """The ranges of one kind that one control process uses; it has the lock of each, so that nobody else does.

    ``lasting``: whether what is reserved outlives this process, which a region of a range does. ``nodes``: where device
    files are made, by ``node``.
    """

    FAULTS = COUNTED = CARRIED = EMPTIED_PROVES = False
    CUTS = VMS_ONLY = False
    """See :mod:`.base`: a descriptor of one region reaches all of its range."""
    MADE_BY, CHECKED_BY = "memconsole arena create NAME --devdax", "memconsole arena check"
    """Which command makes an arena of it, and which says what is wrong with one."""
    DERIVED = NAMED = False
    """Whether somebody named each of its ranges, who is told why one is not used."""

    def __init__(
        self,
        name: str,
        devices: Devices,
        *,
        lasting: bool,
        root: Root = "/",
        nodes: Path = Path(ranges.NODES),
        node: Callable[[Range, Path], None] = ranges.make_node,
    ) -> None:
        self.NAME = name
        self._devices = devices
        self._lasting = lasting
        self._root = root
        self._nodes = nodes
        self._node = node
        self._open: dict[str, Opened] = {}
        self._troubles: dict[str, MemconsoleError] = {}
        self._went: dict[str, Piece] = {}

    # --- which there are ----------------------------------------------------------------------------------------

    def arenas(self) -> tuple[Opened, ...]:
        """The ranges that say that they are arenas, and are this control process's to use."""
        if not self._lasting:
            return ()
        self._troubles.clear()
        for device in self._devices(self._root):
            if device.name in self._open:
                continue
            if device.trouble:
                if self.NAMED:
                    what = f"{device.where} is not used"
                    self._troubles[device.name] = Refused(what, device.trouble, device.remedy, code="NoRange")
                continue
            try:
                found = ranges.opened(device, self._root)
            except MemconsoleError as error:
                self._troubles[device.name] = error
                continue
            if found is None:
                continue
            if any(each.said.name == found.said.name for each in self._open.values()):
                found.close()
                why = f"there is another arena {found.said.name}"
                remedy = "nothing in it is lost; it is used once the other one is gone"
                self._troubles[device.name] = Refused(f"{device.where} is not used", why, remedy, code="NameTaken")
                continue
            self._open[device.name] = found
        return tuple(self._open.values())

    def held_ranges(self) -> tuple[HeldRange, ...]:
        """See :class:`.base.Store`."""
        return tuple(
            HeldRange(each.said.name, each.device.start, each.device.size)
            for each in self.arenas()
            if each.device.start is not None
        )

    def create(self, name: str, device: Range) -> Opened:
        """Have an empty range be an arena; raises as :func:`ranges.create`."""
        made = self._open[device.name] = ranges.create(device, name, self._root)
        return made

    def larger(self) -> dict[str, Range]:
        """The ranges that became larger than the arenas in them, by the arenas' names."""
        found: dict[str, Range] = {}
        for device in self._devices(self._root) if self._lasting else ():
            if device.name not in self._open and not device.trouble:
                with contextlib.suppress(MemconsoleError):  # what cannot be read says so as a trouble of it
                    said = ranges.smaller(device)
                    if said is not None and said.description is not None:
                        found[said.description.name] = device
        return found

    def grow(self, device: Range) -> Opened:
        """Have an arena have all of its range, which became larger; raises as :func:`ranges.grow`."""
        made = self._open[device.name] = ranges.grow(device, self._root)
        return made

    def remove(self, arena: Opened) -> None:
        """Write zeros over all of a range, and let go of it.

        Raises:
            KernelRefused: it cannot be mapped.
        """
        ranges.wipe(arena)
        del self._open[arena.device.name]
        arena.close()
        with contextlib.suppress(OSError):
            (self._nodes / arena.said.name).rmdir()

    def close(self) -> None:
        """Let go of every range; the regions in them stay."""
        for each in self._open.values():
            each.close()
        self._open.clear()

    # --- reserving ----------------------------------------------------------------------------------------------

    def reserve_refusals(
        self, size: int, page_size: int, node: int | None, *, promised: int, root: Root
    ) -> tuple[Refusal, ...]:
        """Why a region of this size cannot be reserved, all reasons; nothing is done."""
        del promised, root
        why = "a region of a range is made of units of 2M"
        found = unit_refusals(self.NAME, size, page_size, node, why, unit=UNIT)
        usable = self.arenas()
        if not usable:
            found.append(self._no_arena())
        elif not found and (most := max(each.free[1] for each in usable)) < size:
            why = ", ".join(
                f"arena {each.said.name} has {format_size(each.free[0])} free, {format_size(each.free[1])} in one run"
                for each in usable
            )
            remedy = (
                f"make it {format_size(most)}, or make an arena of another range"
                if most
                else "make an arena of another range"
            )
            found.append(Refusal("NoMemory", f"cannot reserve {format_size(size)}", why, remedy))
        return tuple(found)

    def _no_arena(self) -> Refusal:
        what = f"the {self.NAME} store has no memory"
        if not self._lasting:
            why = "a region of a range outlives this process, which keeps nothing"
            return Refusal("NoService", what, why, "memconsole serve, then the same command")
        why = "; ".join(f"{name}: {error.why or error.what}" for name, error in self._troubles.items())
        remedy = self.CHECKED_BY if why else self.MADE_BY
        return Refusal("NoArena", what, why or "no range is an arena of it", remedy)

    def reserve_segments(
        self, name: str, size: int, page_size: int, node: int | None, *, prefault: bool, promised: int
    ) -> tuple[int, ...]:
        """The fd of a new region, all zeroes; the range says what it is once :meth:`describe` was called.

        Raises:
            Refused: the first refusal. BadFile: the range has no room to say more. KernelRefused: it cannot be mapped.
        """
        del prefault  # every page has its frame from the beginning
        for refusal in self.reserve_refusals(size, page_size, node, promised=promised, root=self._root):
            raise Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)
        self.discard(name)  # what was never finished
        arena = max(self.arenas(), key=lambda each: each.free[1])
        start = place_for(arena.said, size, arena.device.size)
        if start is None:
            raise KernelRefused("reserve", errno.ENOSPC, what=f"arena {arena.said.name} has no such run")
        _change(arena, name, Piece(name=name, start=start, size=size))
        try:
            arena.zero(start, size)
            return (self._opened(arena, name),)
        except BaseException:
            self.discard(name)
            raise

    def _opened(self, arena: Opened, name: str) -> int:
        path = self._nodes / arena.said.name / name
        self._node(arena.device, path)
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KernelRefused("open", error.errno or 0, what=f"{path} cannot be opened") from None

    def fresh_segment(self, name: str, index: int, size: int, page_size: int, node: int | None) -> int:
        """Never: see :meth:`why_no_copy`.

        Raises:
            Refused: always.
        """
        del index, size, page_size, node
        raise Refused(
            f"region {name} cannot be moved",
            _NO_COPY,
            "reserve a region of another store for what has to move",
            code="NoCopy",
        )

    def describe(self, fds: Sequence[int], region: Region, grants: Sequence[Grant] = ()) -> None:
        """Have the range say what a region is and whose; nothing, where it says that already.

        Raises:
            BadFile: the range has no room to say more.
        """
        del fds
        place = self._place(region.name)
        if place is None:
            return
        said = msgspec.structs.replace(place.piece, region=files.meant(region), grants=tuple(grants))
        if said != place.piece:
            _change(place.arena, region.name, said)

    def promised_bytes(self, region: Region, resident: int) -> int:
        """None of the host's: a region has all its frames from the beginning."""
        del region, resident
        return 0

    # --- giving out ---------------------------------------------------------------------------------------------

    def segments(self, fds: Sequence[int]) -> tuple[Segment, ...]:
        """What segments are: pieces of a device; one that no range of this process describes has no size."""
        found = []
        for fd in fds:
            status, place = os.fstat(fd), self._place(_name(fd))
            size, start = (place.piece.size, place.piece.start + place.arena.device.base) if place else (0, 0)
            found.append(Segment(status.st_ino, status.st_dev, size, start, status.st_rdev))
        return tuple(found)

    def grant_refusals(self, grant: Grant) -> tuple[Refusal, ...]:
        """No faults are served on a device, and DMA is mapped by file, which the kernel takes for memfds alone."""
        found = []
        if grant.lazy:
            why = "the kernel has no userfaultfd for a device that is memory"
            found.append(Refusal("NotLazy", f"region {grant.region} cannot be mapped lazily", why, "leave --lazy out"))
        if grant.dma is not None:
            why = "memconsole maps memory for devices by its file, which the kernel takes of memfds alone"
            remedy = "reserve a region with --store memfd for it"
            found.append(Refusal("NoDma", f"no device can reach region {grant.region}", why, remedy))
        return tuple(found)

    def segment_fd(self, fd: int, access: Access) -> int:
        """A new fd for handing out, which the caller closes.

        Raises:
            NotFound: no range of this process describes it: where it begins is not known. KernelRefused: it cannot be
                opened.
        """
        self._known(fd, "is not handed out")
        return files.opened_again(fd, access, "a device")

    def readable_fd(self, fd: int) -> int:
        """A copy in ordinary memory: a device is not read from, and its descriptor reaches more than the region.

        Raises:
            NotFound: no range of this process describes it. Refused: there is no memory for a copy (``NoMemory``).
            KernelRefused: it cannot be mapped or written.
        """
        place = self._known(fd, "cannot be read")
        for refusal in memfd.reserve_refusals(place.piece.size, root=self._root):
            raise Refused(refusal.what, f"it is read from a copy, and {refusal.why}", refusal.remedy, code=refusal.code)
        return place.arena.copied(place.piece.name, place.piece.start, place.piece.size)

    def fill_segments(self, fds: Sequence[int]) -> None:
        """Nothing: every page has its frame from the beginning."""

    # --- taking back --------------------------------------------------------------------------------------------

    def why_no_copy(self, fd: int, region: Region, segment: int, *, promised: int, root: Root) -> str:
        """Why contents never come to another place here: who had the old one could reach the new one, too."""
        del fd, region, segment, promised, root
        return _NO_COPY

    def settle(self, name: str, index: int, kept: int, gone: int) -> None:
        """Have the range say nothing of a region that went to another store; and again what it said, if it comes back.

        Raises:
            BadFile: never, for less takes less room, and what was said before had it.
        """
        del index
        place = self._place(name)
        if place is None:
            return
        if _is_of(place, gone) and place.piece.region is not None:
            self._went[name] = place.piece
            _change(place.arena, name, msgspec.structs.replace(place.piece, region=None, grants=()))
        elif _is_of(place, kept) and (said := self._went.pop(name, None)) is not None:
            _change(place.arena, name, said)

    def drop_fresh(self, name: str, index: int) -> None:
        """Give the place up of a region that went to another store."""
        del index
        self._went.pop(name, None)
        self.arenas()
        place = self._place(name)
        if place is not None and place.piece.region is None:
            self.discard(name)

    def empty_segments(self, fds: Sequence[int]) -> None:
        """Write zeros over the places of regions that went to another store: no file can be cut.

        Nothing of a region that is released: nobody maps it any more, and it was wiped.

        Raises:
            KernelRefused: the range cannot be mapped.
        """
        self.arenas()
        for fd in fds:
            place = self._place(_name(fd))
            if place is not None and _is_of(place, fd) and place.piece.region is None:
                place.arena.zero(place.piece.start, place.piece.size)

    def wipe_segments(self, fds: Sequence[int]) -> int | None:
        """Write zeros over all of a region; how many bytes.

        Raises:
            NotFound: no range of this process describes it. KernelRefused: it cannot be mapped.
        """
        places = [self._known(fd, "cannot be zeroed") for fd in fds]
        for place in places:
            place.arena.zero(place.piece.start, place.piece.size)
        return sum(place.piece.size for place in places)

    def discard(self, name: str) -> None:
        """Have no range say anything of a region; its device file goes.

        Raises:
            BadFile: never, for less takes less room.
        """
        place = self._place(name)
        if place is not None:
            _change(place.arena, name, None)
            (self._nodes / place.arena.said.name / name).unlink(missing_ok=True)

    # --- looking ------------------------------------------------------------------------------------------------

    def frames(self, fd: int, size: int) -> ExtentTable:
        """Where the pages of a region lie: by the physical start of its device, which the kernel says.

        Raises:
            NotFound: no range of this process describes it, or its physical address is not shown.
        """
        from memconsole.extents import Extent, ExtentTable, Flag

        place = self._known(fd, "has no frames that are shown")
        if place.arena.device.start is None:
            what = "the place of the region is not shown"
            raise NotFound(what, "its device has no physical address", "run as root")
        first = (place.arena.device.start + place.piece.start) // PAGE
        huge = Flag.HUGE if not first * PAGE % UNIT else Flag(0)
        flags = int(Flag.PRESENT | Flag.FILE | (Flag.DERIVED if self.DERIVED else huge))
        return ExtentTable.from_rows([Extent(0, first, size // PAGE, flags)], first=0, pages=size // PAGE)

    def may_know(self) -> bool:
        """Whether there is a range that may be an arena."""
        return self._lasting and bool(self._devices(self._root))

    def found(self, held: Collection[str]) -> tuple[list[Found], list[Finding]]:
        """What is in the ranges; what was never finished, which nobody was told of, is forgotten."""
        if not self._lasting:
            return [], []
        regions, told = [], []
        for arena in self.arenas():
            for piece in arena.said.pieces:
                if piece.name in held:
                    continue
                if piece.region is None:
                    self.discard(piece.name)
                    continue
                try:
                    fd = self._opened(arena, piece.name)
                except KernelRefused as why:
                    told.append(_finding("arena-unread", piece.name, why))
                    continue
                regions.append(Found(msgspec.structs.replace(piece.region, segments=self.segments([fd])), (fd,)))
        for name, error in self._troubles.items():
            told.append(_finding("arena-unused", name, error))
        return regions, told

    def _places(self) -> Iterator[_Place]:
        for arena in tuple(self._open.values()):
            for piece in arena.said.pieces:
                yield _Place(arena, piece)

    def _known(self, fd: int, cannot: str) -> _Place:
        """Where the region behind a file lies; raises NotFound where no range of this process describes it."""
        place = self._place(name := _name(fd))
        if place is None:
            what = f"region {name} {cannot}"
            raise NotFound(what, "no range that this service uses describes it", self.CHECKED_BY)
        return place

    def _place(self, name: str) -> _Place | None:
        return next((each for each in self._places() if each.piece.name == name), None)


_NO_COPY = "who has a descriptor of a device can map all of it, the new place too, and it cannot be taken away"


def _name(fd: int) -> str:
    """The region that a device file is of, by what it is called."""
    return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)").rpartition("/")[2]  # noqa: PTH115


def _is_of(place: _Place, fd: int) -> bool:
    """Whether a file is the device file of a region's place: of another store's it may have the same name."""
    return _name(fd) == place.piece.name and os.fstat(fd).st_rdev == place.arena.device.number


def _change(arena: Opened, name: str, piece: Piece | None) -> None:
    others: tuple[Piece, ...] = tuple(each for each in arena.said.pieces if each.name != name)
    said: Description = msgspec.structs.replace(arena.said, pieces=(*others, piece) if piece is not None else others)
    arena.change(said)


def _finding(id: str, subject: str, error: MemconsoleError) -> Finding:
    remedy = error.remedy or "it is left as it is; memconsole arena check says more"
    return Finding(id, Severity.WARNING, subject, error.what, error.why, remedy)
