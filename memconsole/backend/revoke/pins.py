"""Frames that belong to nobody and are not free: what a pin holds after the file they were of was emptied.

Emptying a memory file takes its frames out of the page cache. What nothing else holds goes back to the kernel's
allocator at once; what a pipe, an io_uring, a socket or a device holds stays as it is, with the old bytes, and the
kernel gives it to nobody. /proc/kpageflags tells the two apart::

    free, or somebody's slab, page table...       no SWAPBACKED
    somebody's anonymous or mapped memory         ANON or MMAP
    a page of another memory file                 DIRTY: whoever gets a page of one writes to it
    a frame of ours that is pinned                SWAPBACKED, and none of these: it was clean from the day it was cut

A frame may also wait in a CPU's batch of pages on their way to the LRU lists; these batches are emptied before a frame
is called pinned. Frames of the hugetlb pool look alike whether pinned or free: of them nothing can be said.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from errno import EACCES, EPERM

from memconsole.backend.kernel import tree
from memconsole.errors import Denied, KernelRefused
from memconsole.extents import Extent, ExtentTable, Flag

KPF_DIRTY, KPF_SLAB, KPF_BUDDY, KPF_MMAP, KPF_ANON = 1 << 4, 1 << 7, 1 << 10, 1 << 11, 1 << 12
KPF_SWAPCACHE, KPF_SWAPBACKED, KPF_NOPAGE = 1 << 13, 1 << 14, 1 << 20
_SOMEBODYS = KPF_DIRTY | KPF_SLAB | KPF_BUDDY | KPF_MMAP | KPF_ANON | KPF_SWAPCACHE | KPF_NOPAGE
_KPAGEFLAGS = "/proc/kpageflags"
_PART = 65536
_MPOL_MF_MOVE = 2
_SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239}


def pinned(frames: ExtentTable, root: tree.Root = "/") -> list[Extent]:
    """Those of ``frames`` (of a file that was emptied) that are nobody's and not free, as rows of one table.

    Raises:
        Denied: the kernel does not show page flags to this user (CAP_SYS_ADMIN).
        KernelRefused: they cannot be read.
    """
    # A table may have a row a page: its flags stay numbers until one of them looks suspicious.
    flags = frames.page_flags(root=tree.below(root, "/proc"))
    likely = (frames[index] for index, word in enumerate(flags) if word & KPF_SWAPBACKED)
    suspects = [row for row in likely if row.flags & Flag.PRESENT]
    found = list(_kept(suspects, root))
    if found:
        _settle_batches()
        found = list(_kept(found, root))
    return found


def _open(root: tree.Root) -> int:
    try:
        return os.open(tree.below(root, _KPAGEFLAGS), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {EPERM, EACCES}:
            raise Denied(_KPAGEFLAGS, "the kernel shows it to CAP_SYS_ADMIN only", "run as root") from None
        raise KernelRefused(_KPAGEFLAGS, error.errno or 0, what="page flags cannot be read") from None


def _kept(rows: Iterable[Extent], root: tree.Root) -> Iterator[Extent]:
    fd = _open(root)
    try:
        for row in rows:
            for first in range(0, row.count, _PART):
                yield from _runs(fd, row, first, min(_PART, row.count - first))
    finally:
        os.close(fd)


def _runs(fd: int, row: Extent, first: int, count: int) -> Iterator[Extent]:
    flags = struct.unpack(f"<{count}Q", os.pread(fd, count * 8, (row.pfn + first) * 8))
    begin = None
    for index, word in enumerate((*flags, 0)):
        held = bool(word & KPF_SWAPBACKED) and not word & _SOMEBODYS
        if held and begin is None:
            begin = index
        elif not held and begin is not None:
            yield Extent(row.offset + first + begin, row.pfn + first + begin, index - begin, Flag.PRESENT)
            begin = None


def _settle_batches() -> None:
    """Have every CPU put its batch of pages on the LRU lists: asking for a page to be migrated begins with that."""
    number = _SYS_MOVE_PAGES.get(os.uname().machine)
    if number is None:
        return
    page = ctypes.create_string_buffer(1)
    address, node, status = ctypes.c_void_p(ctypes.addressof(page)), ctypes.c_int(0), ctypes.c_int(0)
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError):
        libc.syscall(
            ctypes.c_long(number),
            ctypes.c_int(0),
            ctypes.c_ulong(1),
            ctypes.byref(address),
            ctypes.byref(node),
            ctypes.byref(status),
            ctypes.c_int(_MPOL_MF_MOVE),
        )
