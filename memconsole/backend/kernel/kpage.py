"""What the kernel says of one page frame.

/proc/kpageflags    u64 a frame, a bit a property (include/uapi/linux/kernel-page-flags.h, fs/proc/page.c)
/proc/kpagecount    u64 a frame: how often it is mapped
"""

from __future__ import annotations

import os
import struct

from memconsole.backend.kernel import tree
from memconsole.errors import NotFound
from memconsole.model import FrameState

NAMES = {
    0: "locked", 1: "error", 2: "referenced", 3: "uptodate", 4: "dirty", 5: "lru", 6: "active", 7: "slab",
    8: "writeback", 9: "reclaim", 10: "buddy", 11: "mmap", 12: "anonymous", 13: "swapcache", 14: "swapbacked",
    15: "compound-head", 16: "compound-tail", 17: "huge", 18: "unevictable", 19: "hwpoison", 20: "nopage", 21: "ksm",
    22: "thp", 23: "offline", 24: "zero-page", 25: "idle", 26: "pgtable", 32: "reserved", 33: "mlocked",
    34: "mapped-to-disk", 35: "private", 36: "private-2", 37: "owner-private", 38: "arch", 39: "uncached",
    40: "softdirty", 41: "arch-2",
}  # fmt: skip
"""The bits by number, as page-types calls them."""
_WORD = struct.Struct("<Q")


def frame(root: tree.Root, pfn: int) -> FrameState:
    """A frame's flags, and how often it is mapped.

    Raises:
        NotFound: there is no such frame, or the kernel has no such files. Denied: not root. KernelRefused.
    """
    flags = _word(root, "/proc/kpageflags", pfn)
    named = tuple(NAMES.get(bit, f"bit-{bit}") for bit in range(64) if flags >> bit & 1)
    return FrameState(pfn, named, _word(root, "/proc/kpagecount", pfn))


def _word(root: tree.Root, path: str, pfn: int) -> int:
    try:
        fd = os.open(tree.below(root, path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, _WORD.size, pfn * _WORD.size)
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(path, error) from error
    if len(raw) < _WORD.size:
        raise NotFound(
            f"there is no frame {pfn:#x}", f"{path} ends before it", "memconsole hostmap lists what there is"
        )
    return int(_WORD.unpack(raw)[0])
