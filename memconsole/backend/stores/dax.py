"""The store whose regions are files of an arena (:mod:`.arena`): they survive a kexec by themselves, kho or not.

A region is one segment in one aligned run of the range. Truncating its file takes its frames from everybody; the kernel
waits there for who pins one, so that a truncate which returned is the proof that nobody does. A file has no seals: one
that was cut is made immutable, so that who has it open cannot have it grow into frames again.

Never unlinked before it was cut: an unlinked file that is pinned hangs whoever closes it last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from memconsole import paths
from memconsole.backend.kernel import pmem
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import ext4, files
from memconsole.backend.stores.arena import FRESH, Arena, RegionRecord
from memconsole.backend.stores.arena_cargo import CARGO, Carrying, let_go_on
from memconsole.backend.stores.base import Found, unit_refusals
from memconsole.errors import BadFile, KernelRefused, MemconsoleError, NotFound, Refused
from memconsole.model import Access, Finding, Grant, Refusal, Region, RegionState, Segment, Severity
from memconsole.units import PAGE, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

CUT_S = 5.0
"""Seconds that a file may take to be cut; who pins a page longer is ended by a harder rung of a revoke."""
_NOREPLACE, _EXCHANGE, _AT_CWD = 1, 2, -100
_AGAIN = 100


class DaxStore(Carrying):
    """The arenas of one control process; it has the lock of each arena that it uses, so that nobody else does.

    ``lasting``: whether what is reserved outlives this process, which a region of an arena does.
    """

    NAME = "dax"
    FAULTS = COUNTED = CARRIED = False
    EMPTIED_PROVES = CUTS = True
    DERIVED = VMS_ONLY = False

    def __init__(self, runtime: Path, *, lasting: bool, root: Root = "/") -> None:
        self._runtime = runtime
        self._lasting = lasting
        self._root = root
        self._locks: dict[int, int] = {}

    # --- which there are ----------------------------------------------------------------------------------------

    def arenas(self) -> tuple[Arena, ...]:
        """The arenas that are mounted and are this control process's to use."""
        return tuple(each for each in arenas.mounted(self._root) if not each.trouble and self._claimed(each))

    def _claimed(self, arena: Arena) -> bool:
        if arena.device in self._locks:
            return True
        if not self._lasting:
            return False
        fd = os.open(arena.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._locks[arena.device] = fd
        return True

    def let_go(self, arena: Arena) -> None:
        """Have an arena be nobody's."""
        fd = self._locks.pop(arena.device, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Let go of every arena; the regions in them stay."""
        for fd in self._locks.values():
            os.close(fd)
        self._locks.clear()

    # --- reserving ----------------------------------------------------------------------------------------------

    def reserve_refusals(
        self, size: int, page_size: int, node: int | None, *, promised: int, root: Root
    ) -> tuple[Refusal, ...]:
        """Why a region of this size cannot be reserved, all reasons; nothing is done."""
        del promised, root
        why = f"a region of an arena is made of clusters of 2M, {format_size(files.SEGMENT)} at most"
        found = unit_refusals(self.NAME, size, page_size, node, why, unit=ext4.CLUSTER, most=files.SEGMENT)
        usable = self.arenas()
        if not usable:
            found.append(self._no_arena())
        elif not found and (most := max(ext4.largest(each.free) for each in usable)) < size:
            why = ", ".join(f"arena {each.name} has {format_size(each.free)} free" for each in usable)
            remedy = f"make it {format_size(most)}, or make an arena of a larger range"
            found.append(Refusal("NoMemory", f"cannot reserve {format_size(size)}", why, remedy))
        return tuple(found)

    def _no_arena(self) -> Refusal:
        what = "the dax store has no memory"
        if not self._lasting:
            why = "a region of an arena outlives this process, which keeps nothing"
            return Refusal("NoService", what, why, "memconsole serve, then the same command")
        unusable = [each for each in arenas.mounted(self._root) if each.device not in self._locks]
        if not unusable:
            return Refusal("NoArena", what, "no arena is mounted", "memconsole arena create NAME, or arena scan")
        why = "; ".join(f"arena {each.name}: {each.trouble or 'another control process uses it'}" for each in unusable)
        return Refusal("NoArena", what, why, "memconsole arena check")

    def reserve_segments(
        self, name: str, size: int, page_size: int, node: int | None, *, prefault: bool, promised: int
    ) -> tuple[int, ...]:
        """The fd of a new region, every page in place; the file says what it is once :meth:`describe` was called.

        Raises:
            Refused: the first refusal. KernelRefused: there is no room in one run, or the arena cannot be used.
        """
        del prefault  # every page has its frame from the beginning
        for refusal in self.reserve_refusals(size, page_size, node, promised=promised, root=self._root):
            raise Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)
        return (self._in_an_arena(name, size),)

    def fresh_segment(self, name: str, index: int, size: int, page_size: int, node: int | None) -> int:
        """An empty file beside a region's own; raises as :meth:`reserve_segments`."""
        del page_size, node
        self.drop_fresh(name, index)  # that of a move that was cut short
        return self._in_an_arena(FRESH + name, size)

    def _in_an_arena(self, entry: str, size: int) -> int:
        usable = sorted((each for each in self.arenas() if each.free >= size), key=lambda each: -each.free)
        why: KernelRefused | None = None
        for each in usable:
            try:
                return create_file(each, entry, size)
            except KernelRefused as error:
                why = error
        raise why or KernelRefused("fallocate", errno.ENOSPC, what=f"no arena has {format_size(size)} free")

    def describe(self, fds: Sequence[int], region: Region, grants: Sequence[Grant] = ()) -> None:
        """Write down in the arena what a region is and whose; nothing, where that stands there.

        Raises:
            KernelRefused: it cannot be written.
        """
        before = _record(fds[0])
        record = RegionRecord(
            region=files.meant(region), generation=before.generation if before is not None else 1, grants=tuple(grants)
        )
        if record != before:
            arenas.write_record(fds[0], record)

    def promised_bytes(self, region: Region, resident: int) -> int:
        """None of the host's: a region has all its clusters from the beginning."""
        del region, resident
        return 0

    # --- giving out ---------------------------------------------------------------------------------------------

    def grant_refusals(self, grant: Grant) -> tuple[Refusal, ...]:
        """No faults are served on an arena, and no device reaches it: the kernel refuses both (userfaultfd, pins)."""
        found = []
        if grant.lazy:
            why = "the kernel has no userfaultfd for files of a dax file system"
            found.append(Refusal("NotLazy", f"region {grant.region} cannot be mapped lazily", why, "leave --lazy out"))
        if grant.dma is not None:
            why = "the kernel lets no device pin a file of a dax file system"
            remedy = "reserve a region with --store memfd for it"
            found.append(Refusal("NoDma", f"no device can reach region {grant.region}", why, remedy))
        return tuple(found)

    def segments(self, fds: Sequence[int]) -> tuple[Segment, ...]:
        """See :func:`.files.segments`."""
        return files.segments(fds)

    def segment_fd(self, fd: int, access: Access) -> int:
        """A new fd for handing out, which the caller closes.

        Raises:
            KernelRefused: it cannot be opened.
        """
        return files.opened_again(fd, access, "a file of an arena")

    def readable_fd(self, fd: int) -> int:
        """The segment itself, read-only; raises as :meth:`segment_fd`."""
        return self.segment_fd(fd, Access.RO)

    def fill_segments(self, fds: Sequence[int]) -> None:
        """Give clusters back to where a guest punched holes, as far as there is room."""
        for fd in fds:
            with contextlib.suppress(OSError):
                ext4.allocate(fd, os.fstat(fd).st_size)

    # --- taking back --------------------------------------------------------------------------------------------

    def why_no_copy(self, fd: int, region: Region, segment: int, *, promised: int, root: Root) -> str:
        """Why there is no room for a copy; empty where there is."""
        del fd, promised, root
        wanted = region.segments[segment].size
        most = max((each.free for each in self.arenas()), default=0)
        return "" if wanted <= most else f"{format_size(wanted)} of an arena are needed, {format_size(most)} are free"

    def settle(self, name: str, index: int, kept: int, gone: int) -> None:
        """Have the name stand for the file that is kept; the other one keeps :data:`FRESH`, until it is discarded.

        Both names change at once (RENAME_EXCHANGE), and are on the arena when this returns. Where one of the files is
        another store's, the other one takes the name, which nobody may have, or gives it up.

        Raises:
            KernelRefused: they cannot be exchanged, or somebody else has the name.
        """
        del index
        for place in self._places():
            if _is_file(place / (FRESH + name), kept):
                record = _record(gone)
                if record is not None:  # said before it counts: a file without a record was never finished
                    next_one = msgspec.structs.replace(record, generation=record.generation + 1)
                    arenas.write_record(kept, next_one)
                both = _is_file(place / name, gone)
                _rename(place, FRESH + name, name, _EXCHANGE if both else _NOREPLACE)
            elif _is_file(place / name, gone):
                _rename(place, name, FRESH + name, _NOREPLACE)

    def drop_fresh(self, name: str, index: int) -> None:
        """Take the file that does not count out of the arena, cut before; raises as :meth:`discard`."""
        del index
        for place in self._places():
            _discard(place / (FRESH + name))

    def empty_segments(self, fds: Sequence[int]) -> None:
        """Cut files for good; that it returned proves that nobody pins a page of them.

        Raises:
            KernelRefused: somebody pins one for longer than :data:`CUT_S` seconds; that one is as it was.
        """
        for fd in fds:
            cut(fd)

    def wipe_segments(self, fds: Sequence[int]) -> int | None:
        """Write zeros over all that was written to; how many bytes."""
        from memconsole.backend.stores import memfd

        return memfd.wipe_segments(fds)

    def discard(self, name: str) -> None:
        """Take the files of a region out of the arena, each cut before.

        Raises:
            KernelRefused: one cannot be cut.
        """
        for place in self._places():
            for entry in (name, FRESH + name):
                _discard(place / entry)

    def _places(self) -> list[Path]:
        return [each.path for each in self.arenas()]

    # --- looking ------------------------------------------------------------------------------------------------

    def frames(self, fd: int, size: int) -> ExtentTable:
        """Where the pages of a region lie, by what the file system says (FIEMAP): nothing is touched for it.

        Raises:
            KernelRefused: it does not say. NotFound: the range's physical address is not shown.
        """
        from memconsole.extents import Extent, ExtentTable, Flag

        device = os.fstat(fd).st_dev
        start = next((each.start for each in arenas.mounted(self._root) if each.device == device), None)
        if start is None:
            raise NotFound("the place of the arena is not shown", "its device has no physical address", "run as root")
        rows = []
        for run in ext4.runs(fd, size):
            at = start + run.physical
            huge = Flag.HUGE if not (at | run.logical | run.length) % ext4.CLUSTER else Flag(0)
            flags = int(Flag.PRESENT | Flag.FILE | huge)
            rows.append(Extent(run.logical // PAGE, at // PAGE, run.length // PAGE, flags))
        return ExtentTable.from_rows(rows, first=0, pages=size // PAGE)

    def may_know(self) -> bool:
        """Whether there is a range that may be an arena."""
        return self._lasting and bool(pmem.devices(self._root, []))

    def found(self, held: Collection[str]) -> tuple[list[Found], list[Finding]]:
        """Mount what is not, and read what is in it; what is half there is thrown away, which nobody was told of.

        Of a control process that keeps nothing this is nothing: a region is not its to take.
        """
        if not self._lasting:
            return [], []
        told = arenas.mount_all(self._runtime, self._root)
        regions: dict[str, Found] = {}
        usable = self.arenas()
        for each in arenas.mounted(self._root):
            if each not in usable:
                told.append(_unusable(each))
        for each in usable:
            let_go_on(each.path)  # a control process that held it still for a jump may have died then
            for region, fd, finding in _read_arena(each, held):
                if finding is not None:
                    told.append(finding)
                elif region.name in regions:
                    os.close(fd)
                else:
                    regions[region.name] = Found(region, (fd,))
        return list(regions.values()), told


def create_file(arena: Arena, entry: str, size: int) -> int:
    """A new file of an arena in one aligned run of its range, all zeroes.

    Raises:
        KernelRefused: there is none, or the arena has no such run.
    """
    path = arena.path / entry
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelRefused("open", error.errno or 0, what=f"arena {arena.name} takes no file {entry}") from None
    try:
        ext4.allocate(fd, size)
        _refuse_pieces(arena, fd, size)
        ext4.fill(fd, size)
        paths.sync_directory(arena.path)
    except BaseException as error:
        os.ftruncate(fd, 0)  # nobody has it open
        path.unlink()
        os.close(fd)
        if isinstance(error, OSError):
            raise KernelRefused("fallocate", error.errno or 0, what=f"arena {arena.name} has no room") from None
        raise
    return fd


def _refuse_pieces(arena: Arena, fd: int, size: int) -> None:
    runs = ext4.runs(fd, size)
    if len(runs) != 1 or runs[0].physical % ext4.CLUSTER or runs[0].length < size:
        what = f"arena {arena.name} has {format_size(size)} free, and not in one run ({len(runs)} runs)"
        raise KernelRefused(
            "fallocate", errno.ENOSPC, what=what, remedy="make it smaller, or make an arena of a larger range"
        )


def cut(fd: int, within: float = CUT_S) -> None:
    """Cut a file for good: no length, and immutable.

    Raises:
        KernelRefused: somebody pins a page of it for longer than ``within`` seconds.
    """
    for _ in range(_AGAIN):
        if os.fstat(fd).st_size:
            ext4.set_immutable(fd, on=False)
            ext4.truncate(fd, within)
        ext4.set_immutable(fd, on=True)
        if not os.fstat(fd).st_size:  # who has it open may have had it grow, in between
            return
    raise KernelRefused("ftruncate", errno.EAGAIN, what="a file of an arena grows whenever it is cut")


def _discard(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except PermissionError:  # immutable: it was cut
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        cut(fd)
        ext4.set_immutable(fd, on=False)  # an immutable file cannot be unlinked
        path.unlink()
        cut(fd)
        paths.sync_directory(path.parent)
    except OSError as error:
        raise KernelRefused("unlink", error.errno or 0, what=f"{path} cannot be taken away") from None
    finally:
        os.close(fd)


def _rename(place: Path, one: str, other: str, how: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_CWD, os.fsencode(place / one), _AT_CWD, os.fsencode(place / other), how):
        number = ctypes.get_errno()
        raise KernelRefused("renameat2", number, what=f"{one} cannot become {other} in the arena {place}")
    paths.sync_directory(place)


def _is_file(path: Path, fd: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        found, meant = path.stat(), os.fstat(fd)
        return (found.st_dev, found.st_ino) == (meant.st_dev, meant.st_ino)
    return False


def _record(fd: int) -> RegionRecord | None:
    """What a file says that it is; None where it says nothing that can be read."""
    with contextlib.suppress(MemconsoleError):
        return arenas.read_record(fd, RegionRecord)
    return None


# --- what is in an arena ----------------------------------------------------------------------------------------


def read_arena(arena: Arena) -> Iterator[tuple[str, RegionRecord | None, str]]:
    """Every file of an arena: its name, what it says that it is, and what is wrong with it (empty: nothing).

    Raises:
        OSError: the arena cannot be listed.
    """
    for path in sorted(arena.path.iterdir()):
        name, found = path.name, path.lstat()
        if not stat.S_ISREG(found.st_mode) or name.startswith(CARGO):
            continue
        try:
            record = arenas.read_record(path, RegionRecord)
        except (BadFile, MemconsoleError) as error:
            yield name, None, f"{error.what}: {error.why}"
            continue
        why = ""
        if record is not None and not name.startswith(FRESH):
            if record.region.name != name:
                why = f"it says that it is region {record.region.name}"
            elif found.st_size and found.st_size != record.region.size:
                why = f"it has {found.st_size} bytes, and says {record.region.size}"
        yield name, record, why


def _read_arena(arena: Arena, held: Collection[str]) -> Iterator[tuple[Region, int, Finding | None]]:
    for name, record, why in read_arena(arena):
        if name.removeprefix(FRESH) in held:  # whoever holds it knows which of its files counts
            continue
        path = arena.path / name
        nothing = Region(name, DaxStore.NAME, 0, PAGE, RegionState.RESERVED)
        if why:
            remedy = "it is left as it is; memconsole arena check says more"
            finding = Finding("arena-file", Severity.ERROR, name, f"a file of arena {arena.name}: {why}", "", remedy)
            yield nothing, -1, finding
        elif record is None or name.startswith(FRESH) or not path.stat().st_size:
            try:
                _discard(path)
            except MemconsoleError as error:
                finding = Finding("arena-file", Severity.WARNING, name, error.what, error.why, "see dmesg")
                yield nothing, -1, finding
        else:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            region = msgspec.structs.replace(record.region, segments=files.segments([fd]))
            yield region, fd, None


def _unusable(arena: Arena) -> Finding:
    why = arena.trouble or "another control process uses it"
    what = f"the arena {arena.name} on {arena.source} is not used: {why}"
    remedy = "it is left as it is; memconsole arena check says more"
    return Finding("arena-unused", Severity.WARNING, arena.name, what, str(arena.path), remedy)
