"""A segment's contents in fresh frames, under the region's name, while the old file is emptied for whoever has it.

    copied     a new memory file holds the contents                              custody     ledger
    held       ... and custody holds it, and a table of the old frames           old + new   old
    committed  the ledger means the new file, and the old frames as quarantined  old + new   new
    emptied    the old file is cut to no length: SIGBUS, for ever                old + new   new
    replaced   custody holds the new file under the region's name                new         new

Up to *committed* a process that dies leaves the region as it was, and :func:`finish_moves` throws the copy away; from
then on it carries the rest through. At no moment are the contents in no file that custody holds.

A move to another store is the same, and one moment longer: before *committed* the copy says in the store it comes to
what it is (*named*), so that a kernel that ends then leaves the region in one store at least, whole.

The old frames are quarantined from *committed* on; those that :mod:`.pins` finds to be free are let go at the end.
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from memconsole.backend import needs, steplog
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.kernel.memory import memory as read_memory
from memconsole.backend.ledger.state import EventRecord, Recorded, StateChange
from memconsole.backend.revoke import pins
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.stores import base, files
from memconsole.backend.stores.base import Store
from memconsole.errors import BadFile, Denied, GuestError, KernelRefused, MemconsoleError, NotFound
from memconsole.model import Grant, Quarantine, Region, RevokeOutcome
from memconsole.units import PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

_UNKNOWN = "page flags are not shown"


class MoveLeftovers(needs.Stored, needs.InCustody, Protocol):
    """What custody holds and the ledger means, which is all that a move leaves behind."""


class PinJudging(needs.InCustody, needs.HostTree, Protocol):
    """What says whether old frames are pinned."""


class QuarantineRechecking(MoveLeftovers, PinJudging, Protocol):
    """What looks at quarantined frames again."""


class SegmentMoving(needs.RegionFrames, needs.OwnRegionFds, Protocol):
    """What moves the contents of a segment."""


class MoveResult(NamedTuple):
    """How strong the end of a move is, and why not stronger."""

    outcome: RevokeOutcome
    note: str = ""


class Moved(NamedTuple):
    """How a move ended, and the digest that its contents had before and after, of one between stores."""

    end: MoveResult
    digest: str = ""


def _fresh_name(region: str, segment: int) -> str:
    return f"fresh:{region}:{segment}"


def frames_name(id: str) -> str:
    """What the table of quarantined frames is called in custody."""
    return f"quarantine:{id}"


def why_not(desk: needs.RegionFds, region: Region, segment: int) -> str:
    """Why a segment cannot be moved now; empty when it can."""
    if not desk.holds_region(region.name):
        return f"the memory of region {region.name} is lost"
    held = desk.fds(region.name)[segment]
    store = desk.store_of(region.name)
    return store.why_no_copy(held, region, segment, promised=desk.promised_bytes(), root=desk.root)


class _Course(NamedTuple):
    """Where the contents go: the region as it is and will be, both stores, and what quarantined frames are called."""

    region: Region
    moved: Region
    source: Store
    target: Store
    id: str
    guest: str = ""

    @property
    def crosses(self) -> bool:
        """Whether it is another store that they go to."""
        return self.moved.store != self.region.store


class _Copy(NamedTuple):
    """A move under way: the segment's old file and the fresh one, the region as it will be, and the old frames.

    ``frames`` is None where the kernel does not show them: then nothing is quarantined.
    """

    course: _Course
    segment: int
    old: int
    fresh: int
    moved: Region
    kept: Quarantine
    frames: ExtentTable | None

    @property
    def region(self) -> Region:
        """The region as it was."""
        return self.course.region


def move_segment(desk: SegmentMoving, grant: Grant, segment: int) -> Recorded[MoveResult]:
    """Move the segment that a grant lies in; whoever may write to it has been stopped, or does not reach it.

    Raises:
        KernelRefused, Gone, Refused: no memory or no custody for the copy; nothing has changed.
    """
    region = desk.state.regions[grant.region]
    store = desk.store_of(region.name)
    return (yield from _move(desk, _Course(region, region, store, store, grant.id, grant.guest), segment)).end


def move_region(desk: SegmentMoving, region: Region, target: Store, page_size: int) -> Recorded[Moved]:
    """Move a region of one segment to another store; nobody reaches it. Its contents are digested before and after.

    Raises:
        KernelRefused, Gone, Refused: no memory or no custody for the copy, or somebody wrote to it meanwhile; nothing
            has changed.
    """
    moved = msgspec.structs.replace(region, store=target.NAME, page_size=page_size, node=None)
    id = f"move-{region.name.replace('.', '-')}"
    return (yield from _move(desk, _Course(region, moved, desk.store_of(region.name), target, id), 0))


def _move(desk: SegmentMoving, course: _Course, segment: int) -> Recorded[Moved]:
    region, moved = course.region, course.moved
    old = desk.fds(region.name)[segment]
    size = region.segments[segment].size
    fresh = course.target.fresh_segment(region.name, segment, size, moved.page_size, moved.node)
    try:
        with contextlib.ExitStack() as stack:
            readable, digest = old, ""
            if course.crosses:
                readable = course.source.readable_fd(old)
                stack.callback(os.close, readable)
                digest = _digest(readable)
            frames = _copy_and_scan(desk, course, segment, readable, fresh)
            if frames is not None:
                stack.enter_context(frames)
            if course.crosses:
                _compare(region, digest, fresh)
            pass_by("move", "copied")
            copy = _Copy(course, segment, old, fresh, *_planned(desk, course, segment, old, fresh), frames)
            _hold(desk, copy)
            pass_by("move", "held")
            if course.crosses:
                course.target.describe([fresh], copy.moved, desk.state.grants_of(region=region.name))
                course.target.settle(region.name, segment, fresh, old)
                pass_by("move", "named")
            yield from _commit(copy)
            pass_by("move", "emptied")
            _replace(desk, copy)
            pass_by("move", "replaced")
            return Moved((yield from _ended(desk, copy)), digest)
    except BaseException:
        with steplog.suppressed("the copy is forgotten", MemconsoleError):
            if desk.state.regions[region.name].segments == region.segments:
                if course.crosses:
                    course.target.settle(region.name, segment, old, fresh)
                _forget_copy(desk, region.name, segment)
                course.target.drop_fresh(region.name, segment)
        raise
    finally:
        os.close(fresh)


def _digest(fd: int) -> str:
    from memconsole.extents import digest_fd

    return digest_fd(fd)


def _compare(region: Region, digest: str, fresh: int) -> None:
    """Refuse a copy that is not what was to be copied."""
    if _digest(fresh) != digest:
        what = f"the contents of region {region.name} changed while they were copied"
        remedy = "memconsole audit names the processes that have it without a grant: have them stop, and try again"
        raise GuestError(what, "a process writes to it that is not seen", remedy, code="ContentsChanged")


def _planned(desk: needs.LedgerState, course: _Course, segment: int, old: int, fresh: int) -> tuple[Region, Quarantine]:
    """The region with the fresh file, and the quarantine of the old frames."""
    segments = list(course.region.segments)
    segments[segment] = files.segments([fresh])[0]
    moved = msgspec.structs.replace(course.moved, segments=tuple(segments))
    id, size = _quarantine_id(desk, course.id), files.resident_bytes([old])
    return moved, Quarantine(id, course.region.name, course.guest, size, time.time_ns(), "not looked at yet")


def _hold(desk: needs.InCustody, copy: _Copy) -> None:
    """Custody gets the fresh file, and the table of the old frames."""
    name, segment = copy.region.name, copy.segment
    payloads.put(desk.custody, _fresh_name(name, segment), copy.fresh, copy.moved, like=custody_name(name, segment))
    if copy.frames is not None:
        desk.custody.put(frames_name(copy.kept.id), copy.frames.fd)


def _commit(copy: _Copy) -> Recorded[None]:
    """The ledger means the fresh file; the old one is emptied, or the ledger means it again."""
    name, segment, source = copy.region.name, copy.segment, copy.course.source
    where = f"the {copy.moved.store} store" if copy.course.crosses else "fresh frames"
    quarantine = (copy.kept,) if copy.frames is not None else ()
    change = StateChange(regions=(copy.moved,), quarantine=quarantine)
    yield _happened("moved", name, f"the contents of {name} moved to {where}", change)
    pass_by("move", "committed")
    try:
        source.settle(name, segment, copy.fresh, copy.old)
        source.empty_segments([copy.old])
    except KernelRefused:
        source.settle(name, segment, copy.old, copy.fresh)
        back = StateChange(regions=(copy.region,), without_quarantine=(copy.kept.id,))
        yield _happened("moved", name, "... and back", back)
        raise


def _replace(desk: needs.OwnRegionFds, copy: _Copy) -> None:
    """The fresh file goes under the region's name, here and in custody."""
    name, segment = copy.region.name, copy.segment
    desk.replace_segment(name, segment, copy.fresh)
    payloads.put(desk.custody, custody_name(name, segment), copy.fresh, copy.moved)
    copy.course.source.drop_fresh(name, segment)
    desk.custody.drop(_fresh_name(name, segment))


def _ended(desk: PinJudging, copy: _Copy) -> Recorded[MoveResult]:
    """How strong the end is, and what the ledger says of the old frames."""
    if copy.course.source.EMPTIED_PROVES:
        return MoveResult(RevokeOutcome.PROVED)
    if copy.frames is None:
        return MoveResult(RevokeOutcome.CUT, f"pins cannot be ruled out: {_UNKNOWN}")
    if copy.region.page_size != PAGE:
        yield _free_quarantine(desk, copy.kept.id)
        return MoveResult(RevokeOutcome.CUT, "pins of hugetlb pages cannot be ruled out")
    return (yield from reconcile(desk, copy.kept, copy.frames))


def reconcile(desk: PinJudging, kept: Quarantine, frames: ExtentTable) -> Recorded[MoveResult]:
    """Look at the old frames of an emptied file: let those go that are free, keep those that are pinned."""
    from memconsole.extents import ExtentTable

    try:
        rows = pins.pinned(frames, desk.root)
    except Denied:
        yield _free_quarantine(desk, kept.id)
        return MoveResult(RevokeOutcome.CUT, f"pins cannot be ruled out: {_UNKNOWN}")
    if not rows:
        yield _free_quarantine(desk, kept.id)
        return MoveResult(RevokeOutcome.PROVED)
    size = sum(row.count for row in rows) * frames.page_size
    why = f"{format_size(size)} in {len(rows)} runs of frames are pinned"
    if (size, why) != (kept.size, kept.why):
        with ExtentTable.from_rows(sorted(rows), page_size=frames.page_size) as left:
            desk.custody.put(frames_name(kept.id), left.fd)
        narrowed = msgspec.structs.replace(kept, size=size, why=why)
        text = f"{format_size(size)} of old frames of {kept.region} stay pinned"
        yield _happened("quarantined", kept.region, text, StateChange(quarantine=(narrowed,)))
    return MoveResult(RevokeOutcome.QUARANTINED, why)


def recheck_quarantine(desk: QuarantineRechecking) -> Recorded[None]:
    """Let the quarantined frames go whose pins have dropped."""
    from memconsole.extents import ExtentTable

    for kept in list(desk.state.quarantine.values()):
        try:
            fd, _ = desk.custody.get(frames_name(kept.id))
        except NotFound:
            yield _free_quarantine(desk, kept.id)
            continue
        try:
            with ExtentTable.from_fd(fd) as frames:
                yield from reconcile(desk, kept, frames)
        finally:
            os.close(fd)


def finish_moves(desk: MoveLeftovers) -> None:
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
        if not index.isdecimal():
            continue
        segment = int(index)
        region = desk.state.regions.get(region_name)
        fresh, payload = desk.custody.get(name)
        try:
            if region is None or region.segments[segment : segment + 1] != files.segments([fresh]):
                if region is not None:
                    _throw_away(desk, region, segment, fresh)
                desk.custody.drop(name)
                continue
            old, said = desk.custody.get(custody_name(region_name, segment))
            try:
                if not os.path.sameopenfile(old, fresh):
                    source = _source(desk, region, said)
                    source.settle(region_name, segment, fresh, old)
                    source.empty_segments([old])
            finally:
                os.close(old)
            desk.custody.put(custody_name(region_name, segment), fresh, payload)
            _drop_fresh(desk, region_name, segment)
            desk.custody.drop(name)
        finally:
            os.close(fresh)
    for name in desk.custody.names():
        kind, _, id = name.partition(":")
        if kind == "quarantine" and id not in desk.state.quarantine:
            desk.custody.drop(name)


def _source(desk: needs.Stored, region: Region, said: bytes) -> Store:
    """The store that a region comes from, by what custody says of the file that it still has under its name."""
    with contextlib.suppress(BadFile):
        return base.named(desk.stores, payloads.read(region.name, said, Region).store)
    return base.named(desk.stores, region.store)


def _throw_away(desk: MoveLeftovers, region: Region, segment: int, fresh: int) -> None:
    """A copy that the ledger never meant: the region's name stands for the old file, whatever was done last."""
    with contextlib.suppress(NotFound):
        old, _ = desk.custody.get(custody_name(region.name, segment))
        try:
            for store in desk.stores.values():  # the ledger does not know which one it was to go to
                store.settle(region.name, segment, old, fresh)
        finally:
            os.close(old)
        _drop_fresh(desk, region.name, segment)


def _drop_fresh(desk: needs.Stored, region: str, segment: int) -> None:
    """Forget the file that does not count, in whichever store it is."""
    for store in desk.stores.values():
        store.drop_fresh(region, segment)


# --- inside -----------------------------------------------------------------------------------------------------


def _copy_and_scan(desk: SegmentMoving, course: _Course, segment: int, readable: int, fresh: int) -> ExtentTable | None:
    """Copy the contents, and look meanwhile where they lie, where that can be looked at again afterwards."""
    region, store = course.region, course.source
    by_map = region.page_size != PAGE or _huge_by_advice(desk)
    if store.EMPTIED_PROVES or not store.COUNTED:
        _copy(readable, fresh, region.segments[segment].size, by_map=by_map)
        return None
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(_frames, desk, region.name, segment)
        try:
            _copy(readable, fresh, region.segments[segment].size, by_map=by_map)
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


def _huge_by_advice(desk: needs.HostTree) -> bool:
    """Whether shmem gets huge pages where they are advised, and only there: then a written page is a small one."""
    return read_memory(desk.root).shmem_thp == "advise"


def _frames(desk: needs.RegionFrames, region: str, segment: int) -> ExtentTable | None:
    """Where the old contents lie; None where the kernel does not show it."""
    try:
        return desk.segment_frames(region, segment)
    except Denied:
        return None


def _quarantine_id(desk: needs.LedgerState, grant: str) -> str:
    """The grant's id, or one more where a control process died and the next one moved the contents again."""
    taken = [id for id in desk.state.quarantine if id.partition(".")[0] == grant]
    return f"{grant}.{len(taken) + 1}" if taken else grant


def _forget_copy(desk: MoveLeftovers, region: str, segment: int) -> None:
    """Drop the copy, and tables of frames that are in no quarantine."""
    tables = [name for name in desk.custody.names() if name.startswith(frames_name(""))]
    orphans = [name for name in tables if name.partition(":")[2] not in desk.state.quarantine]
    for name in (_fresh_name(region, segment), *orphans):
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)


def _free_quarantine(desk: needs.InCustody, id: str) -> EventRecord:
    """Drop the table of quarantined frames; what the ledger is to say of it."""
    with contextlib.suppress(NotFound):
        desk.custody.drop(frames_name(id))
    change = StateChange(without_quarantine=(id,))
    grant = id.partition(".")[0]
    return _happened("unpinned", grant, f"no old frame of {grant} is pinned", change)


def _happened(kind: str, subject: str, text: str, change: StateChange) -> EventRecord:
    return EventRecord(time.time_ns(), kind, subject, text, change=change)
