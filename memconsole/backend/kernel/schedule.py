"""Processor time of threads, as the scheduler counts it.

Grammar of ``/proc/PID/task/TID/schedstat`` (CONFIG_SCHED_INFO), one line:

``RAN WAITED SLICES``
    ns on a processor, ns runnable without one, how often it was given one; decimal.
"""

from __future__ import annotations

import contextlib
import re

from memconsole.backend.kernel import tree

_LINE = re.compile(rb"(\d{1,20}) (\d{1,20}) \d{1,20}\n")


def threads(root: tree.Root, pid: int) -> dict[int, tuple[int, int]]:
    """How long each thread of a process ran and how long it waited for a processor, in ns, by thread id.

    Empty where the process ended, or the kernel does not count (/proc/PID/task/TID/schedstat).
    """
    found = {}
    with contextlib.suppress(*tree.UNREADABLE):
        for name in tree.names(root, f"/proc/{pid}/task"):
            with contextlib.suppress(*tree.UNREADABLE):
                line = tree.read(root, f"/proc/{pid}/task/{name}/schedstat", limit=128)
                if match := _LINE.fullmatch(line):
                    found[int(name)] = int(match[1]), int(match[2])
    return found
