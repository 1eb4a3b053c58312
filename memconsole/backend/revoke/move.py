"""A segment's contents in fresh frames, under the region's name, while the old file is emptied for whoever has it.

    copied     a new memory file holds the contents                              custody     ledger
    held       ... and custody holds it, and a table of the old frames           old + new   old
    committed  the ledger means the new file, and the old frames as quarantined  old + new   new
    emptied    the old file is cut to no length: SIGBUS, for ever                old + new   new
    replaced   custody holds the new file under the region's name                new         new

Up to *committed* a process that dies leaves the region as it was, and :func:`finish` throws the copy away; from then on
it carries the rest through. At no moment are the contents in no file that custody holds.

The old frames are quarantined from *committed* on; those that :mod:`.pins` finds to be free are let go at the end.
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.kernel.memory import memory as read_memory
from memconsole.backend.revoke import pins
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.state import Change, Happened
from memconsole.backend.stores import memfd
from memconsole.errors import Denied, KernelRefused, MemconsoleError, NotFound
from memconsole.model import Grant, Quarantine, Region, RegionState, RevokeOutcome
from memconsole.units import PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

_UNKNOWN = "page flags are not shown"


class End(NamedTuple):
    """How strong the end of a move is, and why not stronger."""

    outcome: RevokeOutcome
    note: str = ""


def _fresh_name(region: str, segment: int) -> str:
    return f"fresh:{region}:{segment}"


def frames_name(id: str) -> str:
    """What the table of quarantined frames is called in custody."""
    return f"quarantine:{id}"


def why_not(desk: Desk, region: Region, segment: int) -> str:
    """Why a segment cannot be moved now; empty when it can."""
    if region.state in {RegionState.FROZEN, RegionState.PRESERVED}:
        return f"region {region.name} is {region.state}: its file cannot be emptied"
    if not desk.has(region.name):
        return f"the memory of region {region.name} is lost"
    held = desk.fds(region.name)[segment]
    if region.page_size != PAGE:
        pool = next((pool for pool in read_memory(desk.root).pools if pool.page_size == region.page_size), None)
        free = (pool.free - pool.reserved) * region.page_size if pool is not None else 0
        wanted = region.segments[segment].size
    else:
        free = read_memory(desk.root).available - desk.promised()
        wanted = memfd.resident([held])
    if wanted > free:
        return f"{format_size(wanted)} of fresh frames are wanted, {format_size(max(0, free))} can be had"
    return ""


def move(desk: Desk, grant: Grant, segment: int) -> End:
    """Move the segment that a grant lies in; whoever may write to it has been stopped, or does not reach it.

    Raises:
        KernelRefused, Gone, Refused: no memory or no custody for the copy; nothing has changed.
    """
    region = desk.state.regions[grant.region]
    old = desk.fds(region.name)[segment]
    size = region.segments[segment].size
    fresh = memfd.fresh(region.name, segment, size, region.page_size, region.node)
    try:
        with contextlib.ExitStack() as stack:
            frames = _copy_and_look(old, fresh, size, by_map=region.page_size != PAGE or _huge_by_advice(desk))
            if frames is not None:
                stack.enter_context(frames)
            pass_by("move", "copied")
            segments = list(region.segments)
            segments[segment] = memfd.segments([fresh])[0]
            moved = msgspec.structs.replace(region, segments=tuple(segments))
            kept = Quarantine(
                _quarantine_id(desk, grant.id),
                region.name,
                grant.guest,
                memfd.resident([old]),
                time.time_ns(),
                "not looked at yet",
            )
            desk.custody.put(_fresh_name(region.name, segment), fresh, msgspec.json.encode(moved))
            if frames is not None:
                desk.custody.put(frames_name(kept.id), frames.fd)
            pass_by("move", "held")
            text = f"the contents of {region.name} moved to fresh frames"
            quarantine = (kept,) if frames is not None else ()
            change = Change(regions=(moved,), quarantine=quarantine)
            desk.record(Happened(time.time_ns(), "moved", region.name, text, change=change))
            pass_by("move", "committed")
            try:
                _empty(old)
            except KernelRefused:
                back = Change(regions=(region,), without_quarantine=(kept.id,))
                desk.record(Happened(time.time_ns(), "moved", region.name, "... and back", change=back))
                raise
            pass_by("move", "emptied")
            desk.exchange(region.name, segment, fresh)
            desk.custody.put(custody_name(region.name, segment), fresh, msgspec.json.encode(moved))
            desk.custody.drop(_fresh_name(region.name, segment))
            pass_by("move", "replaced")
            if frames is None:
                return End(RevokeOutcome.CUT, f"whether a pin is left cannot be said: {_UNKNOWN}")
            if region.page_size != PAGE:
                _let_go(desk, kept.id)
                return End(RevokeOutcome.CUT, "whether a pin is left cannot be said of hugetlb pages")
            return settle(desk, kept, frames)
    except BaseException:
        with contextlib.suppress(MemconsoleError):
            if desk.state.regions[region.name].segments == region.segments:
                _forget_copy(desk, region.name, segment)
        raise
    finally:
        os.close(fresh)


def settle(desk: Desk, kept: Quarantine, frames: ExtentTable) -> End:
    """Look at the old frames of an emptied file: let those go that are free, keep those that are pinned."""
    from memconsole.extents import ExtentTable

    try:
        rows = pins.pinned(frames)
    except Denied:
        _let_go(desk, kept.id)
        return End(RevokeOutcome.CUT, f"whether a pin is left cannot be said: {_UNKNOWN}")
    if not rows:
        _let_go(desk, kept.id)
        return End(RevokeOutcome.PROVED)
    size = sum(row.count for row in rows) * frames.page_size
    why = f"{format_size(size)} in {len(rows)} runs of frames are pinned"
    if (size, why) != (kept.size, kept.why):
        with ExtentTable.from_rows(sorted(rows), page_size=frames.page_size) as left:
            desk.custody.put(frames_name(kept.id), left.fd)
        narrowed = msgspec.structs.replace(kept, size=size, why=why)
        text = f"{format_size(size)} of old frames of {kept.region} stay pinned"
        desk.record(Happened(time.time_ns(), "quarantined", kept.region, text, change=Change(quarantine=(narrowed,))))
    return End(RevokeOutcome.QUARANTINED, why)


def recheck(desk: Desk) -> None:
    """Let the quarantined frames go whose pins have dropped."""
    from memconsole.extents import ExtentTable

    for kept in list(desk.state.quarantine.values()):
        try:
            fd, _ = desk.custody.get(frames_name(kept.id))
        except NotFound:
            _let_go(desk, kept.id)
            continue
        try:
            with ExtentTable.from_fd(fd) as frames:
                settle(desk, kept, frames)
        finally:
            os.close(fd)


def finish(desk: Desk) -> None:
    """End the moves that an earlier control process began: each is thrown away, or carried through.

    Regions are not held yet: custody and ledger are all there is.

    Raises:
        KernelRefused, Gone: the old file cannot be emptied, or custody is gone.
    """
    for name in desk.custody.names():
        kind, _, rest = name.partition(":")
        if kind != "fresh":
            continue
        region_name, _, index = rest.rpartition(":")
        segment = int(index)
        region = desk.state.regions.get(region_name)
        fresh, payload = desk.custody.get(name)
        try:
            if region is None or region.segments[segment] != memfd.segments([fresh])[0]:
                desk.custody.drop(name)
                continue
            old, _ = desk.custody.get(custody_name(region_name, segment))
            try:
                if os.fstat(old).st_ino != os.fstat(fresh).st_ino:
                    _empty(old)
            finally:
                os.close(old)
            desk.custody.put(custody_name(region_name, segment), fresh, payload)
            desk.custody.drop(name)
        finally:
            os.close(fresh)
    for name in desk.custody.names():
        kind, _, id = name.partition(":")
        if kind == "quarantine" and id not in desk.state.quarantine:
            desk.custody.drop(name)


# --- inside -----------------------------------------------------------------------------------------------------


def _copy_and_look(old: int, fresh: int, size: int, *, by_map: bool) -> ExtentTable | None:
    """Copy the contents, and look meanwhile where they lie."""
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(_frames, old, size)
        try:
            _copy(old, fresh, size, by_map=by_map)
        except BaseException:
            frames = looking.result()
            if frames is not None:
                frames.close()
            raise
        return looking.result()


def _copy(old: int, fresh: int, size: int, *, by_map: bool) -> None:
    from memconsole import native

    copied = native.ffi.new("uint64_t *")
    # Writers of one file wait for each other: more than one only waste the time of the rest.
    threads = len(os.sched_getaffinity(0)) if by_map else 1
    native.call("the contents cannot be copied", native.lib.mc_copy, old, fresh, size, int(by_map), threads, copied)


def _huge_by_advice(desk: Desk) -> bool:
    """Whether shmem gets huge pages where they are advised, and only there: then a written page is a small one."""
    return read_memory(desk.root).shmem_thp == "advise"


def _frames(old: int, size: int) -> ExtentTable | None:
    """Where the old contents lie; None where the kernel does not show it."""
    from memconsole.extents import ExtentTable

    try:
        return ExtentTable.scan_fd(old, size)
    except Denied:
        return None


def _empty(old: int) -> None:
    try:
        os.ftruncate(old, 0)
    except OSError as error:
        raise KernelRefused("ftruncate", error.errno or 0, what="the old file cannot be emptied") from None


def _quarantine_id(desk: Desk, grant: str) -> str:
    """The grant's id, or one more where a control process died and the next one moved the contents again."""
    taken = [id for id in desk.state.quarantine if id.partition(".")[0] == grant]
    return f"{grant}.{len(taken) + 1}" if taken else grant


def _forget_copy(desk: Desk, region: str, segment: int) -> None:
    """Drop the copy, and tables of frames that are in no quarantine."""
    tables = [name for name in desk.custody.names() if name.startswith(frames_name(""))]
    orphans = [name for name in tables if name.partition(":")[2] not in desk.state.quarantine]
    for name in (_fresh_name(region, segment), *orphans):
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)


def _let_go(desk: Desk, id: str) -> None:
    with contextlib.suppress(NotFound):
        desk.custody.drop(frames_name(id))
    change = Change(without_quarantine=(id,))
    grant = id.partition(".")[0]
    desk.record(Happened(time.time_ns(), "unpinned", grant, f"no old frame of {grant} is pinned", change=change))
