"""The store whose frames live in memfds: they survive a kexec where the kernel has live update (LUO).

A region is one or more segments, each a memfd under 1 TiB (the kernel's array of preserved folios has no room for
more), of a fixed size (F_SEAL_GROW). Truncating a segment takes its frames from everybody for good: so before a
segment is first given out, F_SEAL_SEAL keeps its holders from forbidding that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from memconsole.backend.kernel.memory import memory as read_memory
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import files
from memconsole.backend.stores.base import Carrier, Found, HeldRange
from memconsole.errors import KernelRefused, NotFound, Refused
from memconsole.model import Access, Finding, Grant, HugePool, Memory, Refusal, Region, Segment
from memconsole.units import MAX_SIZE, PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

NAME = "memfd"
PAGE_SIZES = (PAGE, 2 << 20, 1 << 30)
FAULTS = COUNTED = CARRIED = CUTS = True
EMPTIED_PROVES = DERIVED = VMS_ONLY = False
"""What the kernel holds of an emptied memfd (a pin) it holds without the file."""
PREFIX = "memconsole:"
"""A segment's name in /proc/PID/maps and fd: ``/memfd:memconsole:REGION:0``."""

_HUGE = {2 << 20: os.MFD_HUGETLB | os.MFD_HUGE_2MB, 1 << 30: os.MFD_HUGETLB | os.MFD_HUGE_1GB}


def reserve_refusals(
    size: int, page_size: int = PAGE, node: int | None = None, *, promised: int = 0, root: Root = "/"
) -> tuple[Refusal, ...]:
    """Why a region of this size cannot be reserved, all reasons; nothing is done.

    ``promised`` is what other regions may still take: bytes reserved and not yet resident. Sources:
    /proc/meminfo:MemAvailable, /sys/devices/system/node/nodeN/meminfo, /sys/kernel/mm/hugepages.
    """
    if page_size not in PAGE_SIZES:
        sizes = ", ".join(format_size(each) for each in PAGE_SIZES)
        what = f"a page size of {format_size(page_size)}"
        return (Refusal("BadPageSize", what, f"the memfd store has {sizes}", "choose one of these"),)
    memory = read_memory(root)
    found = []
    if size <= 0 or size > MAX_SIZE:
        found.append(
            Refusal("BadSize", f"cannot reserve {size} bytes", "a region has 1 byte or more", "write 64M or 2G")
        )
    elif size % page_size:
        rounded = format_size(size + page_size - size % page_size)
        why = f"it is not a multiple of the page size {format_size(page_size)}"
        found.append(Refusal("BadSize", f"cannot reserve {size} bytes", why, f"make it {rounded}"))
    if node is not None and all(each.number != node for each in memory.nodes):
        numbers = ", ".join(str(each.number) for each in memory.nodes) or "none"
        found.append(
            Refusal("NoNode", f"there is no NUMA node {node}", f"this host's nodes: {numbers}", "leave --node out")
        )
    if not found:
        found += _too_large(size, promised, memory, node) if page_size == PAGE else _no_pages(size, page_size, memory)
    return tuple(found)


def reserve_segments(
    name: str, size: int, page_size: int = PAGE, node: int | None = None, *, prefault: bool = False, promised: int = 0
) -> tuple[int, ...]:
    """The segments' fds of a new region, in order, all zeroes; all or nothing.

    Huge pages are set aside in their pool at once, so that no access can fail later. With ``node``, frames come from
    that NUMA node only. ``prefault`` puts every page in place now, in 2 MiB folios where the kernel has them.

    Raises:
        Refused: the first refusal of :func:`reserve_refusals`.
        KernelRefused: the kernel gave less than it has said.
    """
    for refusal in reserve_refusals(size, page_size, node, promised=promised):
        raise Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)
    fds: list[int] = []
    try:
        for index, start in enumerate(range(0, size, files.SEGMENT)):
            fds.append(_create(f"{PREFIX}{name}:{index}", page_size))
            _fill(fds[-1], min(files.SEGMENT, size - start), page_size, node, prefault=prefault)
    except OSError as error:
        _discard(fds)
        raise KernelRefused("memfd_create", error.errno or 0, what=f"region {name} cannot be reserved") from None
    except BaseException:
        _discard(fds)
        raise
    return tuple(fds)


def fresh_segment(name: str, index: int, size: int, page_size: int = PAGE, node: int | None = None) -> int:
    """An empty segment to take the place of another of the same region; as large, and all zeroes.

    Raises:
        KernelRefused: the kernel has no memory for it, or no huge pages.
    """
    try:
        fd = _create(f"{PREFIX}{name}:{index}", page_size)
        try:
            _fill(fd, size, page_size, node, prefault=False)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise KernelRefused(
            "memfd_create", error.errno or 0, what=f"there is no fresh memory for region {name}"
        ) from None
    return fd


def fill_segments(fds: Sequence[int]) -> None:
    """Put every page of 4 KiB segments in place, in 2 MiB folios where the kernel has them, while others use them.

    Where that cannot be done (a sealed segment, too little memory), what is missing stays so.
    """
    from memconsole.backend.stores import placement

    for fd in fds:
        size = os.fstat(fd).st_size
        if files.resident_bytes([fd]) < size:
            with contextlib.suppress(OSError):
                placement.place(fd, size, huge=False, node=None, populate=True)


def segment_fd(fd: int, access: Access) -> int:
    """A new fd of a segment for handing out, which the caller closes: its own file description, read-only for ``ro``.

    The segment's seals become final, so that no holder can forbid us to truncate it.

    Raises:
        KernelRefused: the segment cannot be sealed or opened.
    """
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        flags = os.O_RDWR if access is Access.RW else os.O_RDONLY
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused("F_ADD_SEALS", error.errno or 0, what="a segment cannot be sealed") from None


def readable_fd(fd: int) -> int:
    """The segment itself, read-only; raises as :func:`segment_fd`."""
    return segment_fd(fd, Access.RO)


def free_segments(fds: Sequence[int]) -> None:
    """Free a region's frames, whoever still maps them (SIGBUS is what is left to them), and close its fds.

    The kernel zeroes frames before anybody else gets them.

    Raises:
        KernelRefused: a segment is preserved for a kexec and cannot be freed (EPERM); no fd is closed.
    """
    empty_segments(fds)
    for fd in fds:
        os.close(fd)


def empty_segments(fds: Sequence[int]) -> None:
    """The same, and the fds stay open."""
    for fd in fds:
        try:
            os.ftruncate(fd, 0)
        except OSError as error:
            raise KernelRefused(
                "ftruncate", error.errno or 0, what="a segment cannot be freed", remedy="close the session it is in"
            ) from None


def wipe_segments(fds: Sequence[int]) -> int | None:
    """Write zeros over all that segments about to be freed hold; how many bytes, or None where that cannot be: one is
    sealed, or of hugetlb pages, or cannot be freed.

    Raises:
        KernelRefused: it fails on the way.
    """
    from memconsole import native

    zeroed, total = native.ffi.new("uint64_t *"), 0
    for fd in fds:
        size = os.fstat(fd).st_size
        try:
            native.call("the contents cannot be wiped", native.lib.mc_wipe, fd, size, zeroed)
        except KernelRefused as error:
            if error.errno in {errno.EPERM, errno.EINVAL}:
                return None
            raise
        total += zeroed[0]
    return total


def frames(fd: int, size: int) -> ExtentTable:
    """Where the pages of a segment lie, which the caller closes; raises as :meth:`ExtentTable.scan_fd`."""
    from memconsole.extents import ExtentTable

    return ExtentTable.scan_fd(fd, size)


def segments(fds: Sequence[int]) -> tuple[Segment, ...]:
    """See :func:`.files.segments`."""
    return files.segments(fds)


def why_no_copy(fd: int, region: Region, segment: int, *, promised: int = 0, root: Root = "/") -> str:
    """Why there is no room for a copy of a segment; empty where there is."""
    if region.page_size != PAGE:
        pool = next((pool for pool in read_memory(root).pools if pool.page_size == region.page_size), None)
        free = (pool.free - pool.reserved) * region.page_size if pool is not None else 0
        wanted = region.segments[segment].size
    else:
        free = read_memory(root).available - promised
        wanted = files.resident_bytes([fd])
    if wanted > free:
        return f"{format_size(wanted)} of fresh frames are needed, {format_size(max(0, free))} available"
    return ""


def promised_bytes(region: Region, resident: int) -> int:
    """Bytes of this host's free memory that a region may still take: hugetlb pages are set aside already."""
    return max(0, region.size - resident) if region.page_size == PAGE else 0


def grant_refusals(grant: Grant) -> tuple[Refusal, ...]:
    """What of a grant this memory cannot do: nothing."""
    del grant
    return ()


def describe(fds: Sequence[int], region: Region, grants: Sequence[Grant] = ()) -> None:
    """Nothing: what a memfd is stands in custody."""


def discard(name: str) -> None:
    """Nothing: a memfd goes with its last descriptor."""


def settle(name: str, index: int, kept: int, gone: int) -> None:
    """Nothing: a memfd has no name that another could take."""


def drop_fresh(name: str, index: int) -> None:
    """Nothing: it goes with its last descriptor."""


def may_know() -> bool:
    """A memfd is known by its descriptor alone."""
    return False


def found(held: Collection[str]) -> tuple[list[Found], list[Finding]]:
    """Nothing: a memfd is known by its descriptor alone."""
    del held
    return [], []


def place(fd: int) -> str:
    """Nowhere: live update carries it."""
    del fd
    return ""


def held_ranges() -> tuple[HeldRange, ...]:
    """None."""
    return ()


def carriers() -> tuple[Carrier, ...]:
    """Nowhere."""
    return ()


def leave(place: str, files: Mapping[int, int]) -> None:
    """Raises NotFound: there is no such place."""
    del files
    raise NotFound(f"{place} is no place to leave anything at", "a memfd has no other name than its descriptor")


def take_back() -> None:
    """Nothing: nothing was left."""


def hold_still(*, on: bool) -> None:
    """Nothing."""
    del on


def close() -> None:
    """Nothing."""


def _too_large(size: int, promised: int, memory: Memory, node: int | None) -> list[Refusal]:
    left = memory.available - promised
    for each in memory.nodes:
        if each.number == node:
            # What the page cache would give back may lie on this node, or may not.
            left = min(left, each.total, each.free + max(0, memory.available - memory.free))
    if size <= left:
        return []
    why = f"{format_size(max(0, left))} available"
    if promised:
        why += f"; {format_size(promised)} more are reserved for other regions"
    return [Refusal("NoMemory", f"cannot reserve {format_size(size)}", why, "make it smaller, or free memory")]


def _no_pages(size: int, page_size: int, memory: Memory) -> list[Refusal]:
    pool = next((pool for pool in memory.pools if pool.page_size == page_size), HugePool(page_size, 0, 0))
    wanted, free = size // page_size, pool.free - pool.reserved
    if wanted <= free:
        return []
    file = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB/nr_hugepages"
    remedy = f"echo {pool.total + wanted - free} > {file}"
    what = f"cannot reserve {wanted} pages of {format_size(page_size)}"
    return [Refusal("NoHugePages", what, f"{free} available in the hugetlb pool", remedy)]


def _create(name: str, page_size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _HUGE.get(page_size, 0))
    os.fchmod(fd, 0o600)
    return fd


def _fill(fd: int, size: int, page_size: int, node: int | None, *, prefault: bool) -> None:
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    if page_size == PAGE and node is None and not prefault:
        return
    from memconsole.backend.stores import placement

    placement.place(fd, size, huge=page_size != PAGE, node=node, populate=prefault)


def _discard(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
