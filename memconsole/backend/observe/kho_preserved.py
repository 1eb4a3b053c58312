"""Kernel truth beside the ledger: how much of each region is in the tree of pages that KHO hands over.

    sessions are open ─→ a thread of lowest priority walks the tree and the regions' frames ─→ the next Snapshot has it

Nobody waits for it. A kernel that was itself booted through KHO does not show where its tree is: it is looked for once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from memconsole import unforeseen
from memconsole.backend import needs
from memconsole.errors import MemconsoleError
from memconsole.extents import ExtentTable
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.model import Snapshot

LOOK_S = 1.0
"""Seconds between two looks, while sessions are open."""
_LEAST_URGENT = 19


@dataclass(frozen=True)
class PreservedBytes:
    """The last look: bytes in the tree, in how many runs, and of each region; why there was none, if so."""

    bytes: int | None = None
    runs: int = 0
    regions: dict[str, int] = field(default_factory=dict)
    why: str = ""


class KhoPreserved:
    """What one control process knows of the tree."""

    def __init__(self, desk: needs.Borrowed) -> None:
        self._desk = desk
        self._lock = threading.Lock()
        self._looked = 0.0
        self._busy = False
        self._last = PreservedBytes()

    def shown(self, taken: Snapshot) -> Snapshot:
        """A Snapshot with what the last look found, if sessions are open; another look begins if it is due."""
        survival = taken.survival
        if survival.sessions or (survival.incoming and not self._looked):
            self._look()
        if not survival.sessions:
            self._last = PreservedBytes()
            return taken
        found = self._last
        regions = tuple(
            replace(region, seen=replace(region.seen, preserved=found.regions[region.name]))
            if region.seen is not None and region.name in found.regions
            else region
            for region in taken.regions
        )
        told = replace(survival, preserved=found.bytes, runs=found.runs, unread=found.why)
        return replace(taken, survival=told, regions=regions)

    def _look(self) -> None:
        with self._lock:
            if not self._busy and time.monotonic() > self._looked + LOOK_S:
                self._busy = True
                unforeseen.thread("memconsole-truth", self._run).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_URGENT)
        found = unforeseen.attempt("the look at the tree of preserved pages", "job", self._read)
        if isinstance(found, MemconsoleError):
            found = PreservedBytes(why=str(found))
        with self._lock:
            self._last, self._busy, self._looked = found, False, time.monotonic()

    def _read(self) -> PreservedBytes:
        from memconsole.backend.kernel import handover
        from memconsole.backend.kernel.handover import outgoing

        tree = handover.live("out").preserved
        if tree is None:
            return PreservedBytes(why="KHO's tree of preserved pages cannot be read")
        regions = {}
        for region in tuple(self._desk.state.regions.values()):
            with contextlib.suppress(MemconsoleError), self._desk.borrowed_fds(region.name) as fds:
                pages = 0
                for fd, segment in zip(fds, region.segments, strict=True):
                    with ExtentTable.scan_fd(fd, segment.size) as table:
                        pages += outgoing.overlap(tree.runs, ((row.pfn, row.count) for row in table))
                regions[region.name] = pages * PAGE
        return PreservedBytes(tree.pages * PAGE, len(tree.runs), regions)
