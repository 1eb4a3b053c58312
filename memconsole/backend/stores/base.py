"""What a store is: where a region's frames come from, how they are given out, taken back, shown, and found again.

Verbs, revoke, handoff and adoption know stores by this alone. A store's segments are files (:mod:`.files`): custody
holds their descriptors, the mount shows them, and to cut one to no length takes its frames from everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import adopted
from memconsole.errors import NotFound, Refused
from memconsole.model import Access, Finding, Grant, Refusal, Region, Segment
from memconsole.units import PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable


class Found(NamedTuple):
    """A region that a store knows by itself, and its segments' fds, which the caller closes."""

    region: Region
    fds: tuple[int, ...]


class Carrier(NamedTuple):
    """Where a store can leave what a handoff carries besides regions: ``free`` bytes of it, in units of ``unit``.

    ``name``: what its owner calls it; ``start``: its physical address, None where that is not shown.
    """

    place: str
    name: str
    free: int
    unit: int
    start: int | None


def unit_refusals(
    store: str, size: int, page_size: int, node: int | None, why: str, *, unit: int, most: int = 0
) -> list[Refusal]:
    """What a store cannot give whose memory is ranges; ``why`` says of what units, bytes, and how many, a region is."""
    found = []
    if page_size != PAGE or node is not None:
        fixed = "its ranges are where they are, and are mapped by 2 MiB pages"
        what = f"the {store} store takes no page size and no NUMA node"
        found.append(Refusal("BadPageSize", what, fixed, "leave --page-size and --node out"))
    if size <= 0 or size % unit or (most and size > most):
        rounded = format_size(max(1, -(-size // unit)) * unit)
        found.append(Refusal("BadSize", f"cannot reserve {size} bytes", why, f"make it {rounded}"))
    return found


class HeldRange(NamedTuple):
    """The range of an arena that a control process uses: bytes from a physical address."""

    name: str
    start: int
    size: int


class Unfound:
    """What a store says of handoffs whose regions memconsole-resume does not find: it takes no part in them."""

    def place(self, fd: int) -> str:
        """Nowhere."""
        del fd
        return ""

    def carriers(self) -> tuple[Carrier, ...]:
        """None."""
        return ()

    def leave(self, place: str, files: Mapping[int, int]) -> None:
        """Raises NotFound: it has no such place."""
        del files
        raise NotFound(f"{place} is no place to leave anything at", "this store has none", "memconsole arena check")

    def take_back(self) -> None:
        """Nothing: nothing was left."""

    def hold_still(self, *, on: bool) -> None:
        """Nothing: what it says of itself is in the memory."""
        del on


class Store(Protocol):
    """One store; a store that has nothing to do for a method does nothing."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a store may be a module
        """What ``--store`` calls it."""

    @property
    def FAULTS(self) -> bool:  # noqa: N802
        """Whether page faults of its memory can be served, and its mappings barred, by userfaultfd."""

    @property
    def EMPTIED_PROVES(self) -> bool:  # noqa: N802
        """Whether a file that could be emptied is the proof that nobody pins its frames."""

    @property
    def COUNTED(self) -> bool:  # noqa: N802
        """Whether the kernel counts who maps its frames (/proc/kpagecount)."""

    @property
    def CARRIED(self) -> bool:  # noqa: N802
        """Whether live update carries its regions; of the others :meth:`place` says whether a handoff finds them."""

    @property
    def CUTS(self) -> bool:  # noqa: N802
        """Whether a region can be taken from who holds its file; else the file reaches other regions, too."""

    @property
    def DERIVED(self) -> bool:  # noqa: N802
        """Whether no page table says where its pages lie: an offset in its file is a physical address."""

    @property
    def VMS_ONLY(self) -> bool:  # noqa: N802
        """Whether only VMs of this service are given it, for its file reaches memory that is no store's."""

    def reserve_refusals(
        self, size: int, page_size: int, node: int | None, *, promised: int, root: Root
    ) -> tuple[Refusal, ...]:
        """Why a region of this size cannot be reserved, all reasons; nothing is done."""

    def reserve_segments(
        self, name: str, size: int, page_size: int, node: int | None, *, prefault: bool, promised: int
    ) -> tuple[int, ...]:
        """The segments' fds of a new region, in order, all zeroes; all or nothing."""

    def describe(self, fds: Sequence[int], region: Region, grants: Sequence[Grant] = ()) -> None:
        """Have the memory itself say what it is, where it can."""

    def discard(self, name: str) -> None:
        """Forget a region whose segments were emptied, or that is none yet."""

    def fresh_segment(self, name: str, index: int, size: int, page_size: int, node: int | None) -> int:
        """An empty segment to take the place of another of the same region; as large, and all zeroes."""

    def why_no_copy(self, fd: int, region: Region, segment: int, *, promised: int, root: Root) -> str:
        """Why there is no room for a copy of a segment; empty where there is."""

    def settle(self, name: str, index: int, kept: int, gone: int) -> None:
        """Have a region's name stand for the one of two files, whichever it stood for.

        One of them may be another store's: then the name stands for the other one, or for none here.
        """

    def drop_fresh(self, name: str, index: int) -> None:
        """Forget the file that a region's name does not stand for, once it was emptied or is not needed."""

    def fill_segments(self, fds: Sequence[int]) -> None:
        """Put every page in place, as far as that can be done."""

    def segments(self, fds: Sequence[int]) -> tuple[Segment, ...]:
        """What the segments behind fds are, as their mappings show them."""

    def grant_refusals(self, grant: Grant) -> tuple[Refusal, ...]:
        """What of a grant this memory cannot do."""

    def segment_fd(self, fd: int, access: Access) -> int:
        """A new fd of a segment for handing out, which the caller closes: read-only for ``ro``."""

    def readable_fd(self, fd: int) -> int:
        """A new fd from which all of a segment can be read (read(2), holes by SEEK_DATA), which the caller closes.

        Raises:
            KernelRefused, Refused: it cannot be opened, or there is no room for a copy.
        """

    def empty_segments(self, fds: Sequence[int]) -> None:
        """Take the frames of segments from everybody, for good; the fds stay open.

        Raises:
            KernelRefused: one cannot be emptied; what was emptied stays so.
        """

    def wipe_segments(self, fds: Sequence[int]) -> int | None:
        """Write zeros over all that segments hold; how many bytes, or None where that cannot be."""

    def frames(self, fd: int, size: int) -> ExtentTable:
        """Where the pages of a segment lie, which the caller closes."""

    def promised_bytes(self, region: Region, resident: int) -> int:
        """Bytes of this host's free memory that a region may still take."""

    def may_know(self) -> bool:
        """Whether it may know regions by itself, which :meth:`found` then says."""

    def found(self, held: Collection[str]) -> tuple[list[Found], list[Finding]]:
        """The regions that this store knows by itself and that are not ``held`` by name; and what is wrong with it."""

    def place(self, fd: int) -> str:
        """Where memconsole-resume finds a segment by itself, as a boot plan calls it; empty where it does not."""

    def held_ranges(self) -> tuple[HeldRange, ...]:
        """The arenas that are this control process's to use, as far as their places are shown."""

    def carriers(self) -> tuple[Carrier, ...]:
        """Where it could leave what a handoff carries besides regions."""

    def leave(self, place: str, files: Mapping[int, int]) -> None:
        """Leave files, by their tokens, for memconsole-resume of the next kernel.

        Raises:
            KernelRefused: there is no room. NotFound: there is no such place.
        """

    def take_back(self) -> None:
        """Have what was left mean nothing any more; raises KernelRefused, where that cannot be."""

    def hold_still(self, *, on: bool) -> None:
        """Have all that regions say of themselves be in the memory, and nothing be written there until it is off.

        Raises:
            KernelRefused: it cannot be.
        """

    def close(self) -> None:
        """Let go of what this process holds of it; regions are another matter."""


Stores = Mapping[str, Store]
_MEMFD = "memfd"


def named(stores: Stores, name: str) -> Store:
    """The store of this name; RAM that was adopted is a memfd, or a file of a tmpfs, which does what a memfd does.

    Raises:
        Refused: there is none (``NoSuchStore``).
    """
    store = stores.get(_MEMFD if name == adopted.NAME else name)
    if store is None:
        raise Refused(
            f"there is no store {name}", f"stores: {', '.join(stores)}", "leave --store out", code="NoSuchStore"
        )
    return store
