"""This thread without root's way past the modes of files."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of each set
PAST_MODES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH

_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Modes of files count for this thread, whoever it is."""
    head = (ctypes.c_uint32 * 2)(VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    _called(_LIBC.capget(head, sets))
    before = sets[0]
    sets[0] = before & ~PAST_MODES
    _called(_LIBC.capset(head, sets))
    try:
        yield
    finally:
        sets[0] = before
        _called(_LIBC.capset(head, sets))


def _called(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
