"""What of memory this kernel will hand over at its next jump, by the kernel itself, beside what anybody meant.

    sessions    fd links ``anon_inode:[luo_session] NAME`` in /proc/PID/fd: there is no other list of them
    frames      KHO's tree of preserved pages, in physical memory (:mod:`.radix`)

A session's files are written down by the kernel at the jump alone, so what is in which session is nobody's to read
before; a region's frames, though, are in the tree from PRESERVE on.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

from memconsole.backend.kernel import census
from memconsole.backend.kernel.census import Census
from memconsole.backend.kernel.handover.values import Run
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Gone
from memconsole.model import LiveSession

_LINK = "anon_inode:[luo_session] "


def sessions(seen: Census, root: Root = "/", others: Iterable[int] = ()) -> tuple[LiveSession, ...]:
    """Every session somebody has open, by name; ``others`` are processes whose files the census left out.

    Raises:
        Denied, KernelRefused: the files of one of ``others`` are not shown.
    """
    holders: dict[str, set[int]] = {}
    for pid, link in _links(seen, root, others):
        if link.startswith(_LINK):
            holders.setdefault(link.removeprefix(_LINK), set()).add(pid)
    return tuple(LiveSession(name, tuple(sorted(pids))) for name, pids in sorted(holders.items()))


def overlap(runs: tuple[Run, ...], frames: Iterable[tuple[int, int]]) -> int:
    """How many of these frames (first pfn and count, each) are in runs that are in order of pfn."""
    found = 0
    for pfn, count in frames:
        row = max(0, bisect.bisect_right(runs, pfn, key=lambda run: run.pfn) - 1)
        while row < len(runs) and runs[row].pfn < pfn + count:
            first, last = max(pfn, runs[row].pfn), min(pfn + count, runs[row].pfn + runs[row].count)
            found += max(0, last - first)
            row += 1
    return found


def _links(seen: Census, root: Root, others: Iterable[int]) -> Iterator[tuple[int, str]]:
    for process in seen.processes.values():
        yield from ((process.pid, link) for link in process.fds.values())
    for pid in others:
        try:
            yield from ((pid, link) for link in census.links(root, pid).values())
        except Gone:
            continue
