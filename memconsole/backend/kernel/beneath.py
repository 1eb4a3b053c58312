"""Opening what lies beneath a directory that another user writes to: no link is followed, no mount is crossed.

openat2(2) with RESOLVE_NO_XDEV, RESOLVE_NO_SYMLINKS and RESOLVE_BENEATH, which Python has no word for: the kernel
refuses on the way, so that nothing can be put in the place of what was looked at, and no file system that answers when
its owner likes (FUSE) is asked anything.
"""

from __future__ import annotations

import ctypes
import os
import struct

_OPENAT2 = 437
"""On every architecture."""
_HOW = struct.Struct("=QQQ")
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08
"""RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH (linux/openat2.h)."""


def opened(directory: int, path: str, flags: int) -> int:
    """A descriptor of ``path`` beneath an open directory.

    Raises:
        OSError: ELOOP for a link, EXDEV for a mount, otherwise as open(2); ENOSYS before Linux 5.6.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    how = ctypes.create_string_buffer(_HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE))
    fd = libc.syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_int(directory),
        ctypes.c_char_p(os.fsencode(path)),
        how,
        ctypes.c_size_t(_HOW.size),
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)
