"""Waits for a state. A limit is there to end a test that is broken, and no machine that is only busy reaches it."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG_S = 300.0
"""Seconds for what will happen: a machine with a load of so many dozen does it in this time, too."""
LOOK_S = 0.02


def until(condition: Callable[[], object], what: str = "what was waited for", within: float = LONG_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(LOOK_S)
