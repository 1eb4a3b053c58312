"""Waits for a state. A limit is there to end a test that is broken, and no machine that is only busy reaches it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

LONG_S = 300.0
"""Seconds for what will happen: a machine with a load of so many dozen does it in this time, too."""
LOOK_S = 0.02


def accepts(path: Path) -> bool:
    """Whether somebody listens on a stream socket; its path is there a moment before."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def until(condition: Callable[[], object], what: str = "what was waited for", within: float = LONG_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(LOOK_S)
