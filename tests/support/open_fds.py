"""What this process has open, and that nothing more is open behind something: what stays is told by name."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.waiting import LONG_S, until


def opened() -> Counter[str]:
    """How many fds of this process lead to each file or kind of thing: "socket", "anon_inode:[eventfd]", a path."""
    found: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what another thread closed meanwhile
            target = str(fd.readlink())
            found[target.partition(":[")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    return found


@contextlib.contextmanager
def nothing_stays_open(within: float = LONG_S) -> Iterator[None]:
    """Nothing is open behind it that was not open before; what earlier tests left may be closed meanwhile."""
    gc.collect()
    before = opened()
    yield
    try:
        until(lambda: opened() <= before, within=within)
    except AssertionError:
        raise AssertionError(f"these stay open: {dict(opened() - before)}") from None
