"""How the memory of guests is mapped, by huge pages or by base pages: kernel truth that takes long to read.

    Snapshot with guests ─→ a thread of lowest priority reads their smaps ─→ this Snapshot, or a later one, has it

The kernel walks every page table entry for it, some 15 ns each: of much memory in base pages that is seconds. So nobody
waits for it longer than ``WAIT_S``, once for a new guest; until a look is over what it would say is unknown.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from memconsole import unforeseen
from memconsole.backend.kernel import census, procmaps, tree
from memconsole.backend.kernel.procmaps import MappedBytes
from memconsole.model import Finding, GuestKind, ProcessId, Severity
from memconsole.units import format_size

if TYPE_CHECKING:
    from memconsole.backend.kernel.tree import Root
    from memconsole.model import Guest, RamBlock, Snapshot

LOOK_S = 5.0
"""Seconds between the end of a look and the next one; ten times as long as it took, if that is more."""
WAIT_S = 0.1
HUGE = 2 << 20
WORTH = 64 << 20
"""Bytes in base pages up to which nothing is said: what the processor remembers of so few does not matter."""

_LEAST_URGENT = 19
_NO_HUGE = {"never", "deny"}


class PagingSurvey:
    """What one control process knows of it."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._changed = threading.Condition()
        self._known: dict[ProcessId, Mapping[int, MappedBytes] | None] = {}
        """By process; None where its kernel, or a process that is another user's, does not say."""
        self._due = 0.0
        self._busy = False

    def shown(self, taken: Snapshot) -> Snapshot:
        """A Snapshot with what the last look found, and the findings from it; another look begins if one is due."""
        having = (guest for guest in taken.guests if guest.seen is not None and guest.seen.ram)
        keys = {guest.process for guest in having if guest.process is not None}
        if not keys:
            return taken
        with self._changed:
            fresh = keys - self._known.keys()
            if not self._busy and (fresh or time.monotonic() > self._due):
                self._busy = True
                unforeseen.thread("memconsole-paging", partial(self._run, keys)).start()
            if fresh:
                self._changed.wait_for(lambda: keys <= self._known.keys(), WAIT_S)
            known = dict(self._known)
        guests = tuple(_filled(guest, known) for guest in taken.guests)
        seen = replace(taken, guests=guests)
        return replace(seen, findings=(*seen.findings, *base_pages(seen)))

    def _run(self, keys: Collection[ProcessId]) -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_URGENT)
        try:
            found = {key: self._read(key) for key in keys}
        except BaseException:
            found = {}
            raise
        finally:
            now = time.monotonic()
            with self._changed:
                self._known, self._busy = found, False
                self._due = now + max(LOOK_S, 10 * (now - began))
                self._changed.notify_all()

    def _read(self, key: ProcessId) -> Mapping[int, MappedBytes] | None:
        with contextlib.suppress(*tree.UNREADABLE):
            return procmaps.paged(self._root, key.pid, census.task(self._root, key.pid))
        return None


def _filled(guest: Guest, found: Mapping[ProcessId, Mapping[int, MappedBytes] | None]) -> Guest:
    known = found.get(guest.process) if guest.process is not None else None
    if guest.seen is None or not known:
        return guest
    blocks = []
    for block in guest.seen.ram:
        paged = known.get(block.start)
        if paged is not None:
            block = replace(block, mapped=paged.mapped, huge=paged.huge, eligible=paged.eligible)  # noqa: PLW2901
        blocks.append(block)
    return replace(guest, seen=replace(guest.seen, ram=tuple(blocks)))


def misplaced(start: int, offset: int) -> bool:
    """Whether a mapping of a file stands where the kernel can map it by base pages only, whatever its frames are."""
    return (start - offset) % HUGE != 0


def base_pages(snapshot: Snapshot) -> Iterator[Finding]:
    """The guests whose memory could be mapped by huge pages and is not, once that was looked at."""
    lazy = {(grant.guest, grant.region) for grant in snapshot.grants if grant.lazy}  # by base pages, and meant so
    huge = {region.name: region.seen.huge for region in snapshot.regions if region.seen is not None}
    for guest in snapshot.guests:
        for block in guest.seen.ram if guest.seen is not None else ():
            small = (block.mapped or 0) - (block.huge or 0)
            if small <= WORTH or (guest.name, block.region) in lazy:
                continue
            found = _base_page_reason(guest, block, snapshot.memory.shmem_thp, huge.get(block.region or ""))
            if found is not None:
                severity, why, remedy = found
                yield Finding(
                    "guest-base-pages",
                    severity,
                    guest.name,
                    f"{format_size(small)} of the memory of guest {guest.name} are mapped by base pages, and could be"
                    f" by huge pages: {why}",
                    f"/proc/{guest.pid}/smaps at {block.start:#x}",
                    remedy,
                )
                break


def _base_page_reason(
    guest: Guest, block: RamBlock, policy: str, frames: int | None
) -> tuple[Severity, str, str] | None:
    """Why a block is mapped by base pages, and what to do; None where its frames are such, or that is not known."""
    if block.backing != "anonymous" and block.offset is not None and misplaced(block.start, block.offset):
        return Severity.WARNING, "its address is no multiple of 2 MiB", _replaced(guest)
    if block.eligible is False and policy in _NO_HUGE and not (frames or 0) >= HUGE:
        remedy = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, and start it on a new region"
        return Severity.INFO, f"shmem_enabled is {policy}", remedy
    if block.eligible is False:
        remedy = "find what forbids its process huge pages (prctl PR_SET_THP_DISABLE, madvise), and start it again"
        return Severity.WARNING, "the kernel gives its process no huge pages (THPeligible is 0)", remedy
    if (frames or 0) >= (block.mapped or 0) // 2:
        return Severity.WARNING, f"{format_size(frames or 0)} of its region's frames are huge", _is_due(guest)
    return None


def _replaced(guest: Guest) -> str:
    if guest.kind in {GuestKind.QEMU, GuestKind.CANARY}:
        return f"{_is_due(guest)}: memconsole maps it where huge pages can be"
    if guest.kind is GuestKind.PROCESS:
        return "have it map the file at a multiple of 2 MiB (QEMU: align=2M in its memory backend), and start it again"
    return "set align=2M in its memory backend (memory-backend-file or -memfd), and start it again"


def _is_due(guest: Guest) -> str:
    if guest.kind in {GuestKind.QEMU, GuestKind.CANARY}:
        return "memconsole handoff rehearse starts it again on the same memory"
    return "start it again"
