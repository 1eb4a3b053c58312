"""Processes of a test's own that may be stopped and killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def killable() -> Iterator[int]:
    """The PID of a process that waits, and is killed in the end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child.pid
        child.kill()
