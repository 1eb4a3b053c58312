"""Who can still reach a segment of a region: the kernel's answer, never the ledger's or a guest's.

    a VMA of its memfd            reaches it now
    an fd of its memfd            can map all of it any time
    an fd of a file on the mount  the same: what it maps is the memfd
    a process not shown to us     may do either: then the frames themselves are asked (/proc/kpagecount)

Whose they are the kernel does not show of an fd in flight in a socket's queue, of an io_uring's fixed buffer, of a page
in a pipe. Moving the contents away from all of them is what :mod:`memconsole.backend.revoke` does; where it cannot,
:func:`possible_keepers` says who may have such an fd.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memconsole.backend.exports.mapped import BlockedMapping, FuseAlias
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import memfds, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.observe.mappings import OURS, RegionMapping, region_mappings
from memconsole.errors import Denied, Gone, MemconsoleError, NotFound
from memconsole.model import Region, Segment


@dataclass(frozen=True)
class RegionReach:
    """``mapped``: VMAs of it; ``held``: (PID, fd) of its memfd; ``unseen``: why this may not be all."""

    mapped: tuple[RegionMapping, ...]
    held: tuple[tuple[int, int], ...]
    unseen: str = ""

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that reach it."""
        return tuple(sorted({over.pid for over in self.mapped} | {pid for pid, _ in self.held}))

    def __str__(self) -> str:
        words = []
        if self.mapped:
            words.append("mapped by " + ", ".join(str(pid) for pid in sorted({over.pid for over in self.mapped})))
        if self.held:
            words.append("its memfd is held by " + ", ".join(str(pid) for pid in sorted({pid for pid, _ in self.held})))
        return "; ".join([*words, self.unseen] if self.unseen else words) or "no process"


class Faces(Protocol):
    """Regions may be mapped through files of a mount."""

    @property
    def fuse_aliases(self) -> tuple[FuseAlias, ...]:
        """The files on the mount through which regions may be mapped."""


class RegionReaching(Faces, Protocol):
    """Who reaches a region, by kernel truth."""

    @property
    def exempt_processes(self) -> frozenset[int]:
        """The PIDs of memconsole itself, which hold regions and are no finding."""

    def region_reach(
        self, region: Region, segment: int | None = None, among: Collection[int] | None = None
    ) -> RegionReach:
        """Who reaches a region, or one segment of it; ``among``: only these PIDs are looked at."""

    def keepers(self, among: Collection[int] | None = None) -> tuple[int, ...]:
        """The PIDs that may keep a region's descriptor out of sight; ``among``: only these are looked at."""


def find(
    region: Region,
    fds: Sequence[int],
    segment: int | None = None,
    *,
    exempt: Collection[int],
    faces: Iterable[FuseAlias] = (),
    shields: Iterable[BlockedMapping] = (),
    among: Collection[int] | None = None,
    counted: bool = True,
    others: Iterable[Region] = (),
) -> RegionReach:
    """Who reaches a segment of a region (all of it if left out), apart from ``exempt`` processes (us and our custody).

    ``faces`` are other files that show the region, and ``shields`` mappings that lead nowhere. ``among``: only these
    processes are looked at, which on a host of thousands costs next to nothing, and says nothing of the others.
    ``counted``: the kernel counts who maps its frames. ``others``: regions that may be pieces of the same device, whose
    files reach this one.

    Raises:
        Denied, KernelRefused, BadFile: the processes of this host cannot be read.
    """
    faces = tuple(faces)
    census = census_of.take(closed=exempt, among=among)
    index = slice(0, None) if segment is None else slice(segment, segment + 1)
    start = sum(each.size for each in region.segments[: index.start])
    end = start + sum(each.size for each in region.segments[index])
    mapped = tuple(
        over
        for over in region_mappings(census, [region, *_neighbours(region, others)], faces, shields)
        if over.region == region.name and over.offset < end and start < over.offset + over.vma.size
    )
    objects = {(each.device, each.inode) for each in region.segments[index]}
    held = (
        *memfds.holders(census, objects, _places(fds[index])),
        *(_openers(census, shown) if (shown := [face for face in faces if face.region == region.name]) else ()),
    )
    unseen = ""
    if census.unseen and not mapped and not held:
        who = census.unseen
        unseen = _ask_frames(region.segments[index], fds[index], who) if counted else f"{who}, and nothing counts"
    return RegionReach(mapped, held, unseen)


def _neighbours(region: Region, others: Iterable[Region]) -> list[Region]:
    """The other pieces of the device that a region is a piece of."""
    wholes = {each.whole for each in region.segments if each.whole}
    return [
        other for other in others if other.name != region.name and any(each.whole in wholes for each in other.segments)
    ]


def _places(fds: Sequence[int]) -> frozenset[str]:
    """The directories of files that have a name (those of an arena); a memfd has none."""
    links = (os.readlink(f"/proc/self/fd/{fd}") for fd in fds)  # noqa: PTH115 - on the path of every snapshot
    return frozenset(link.rpartition("/")[0] for link in links if link.count("/") > 1)


def possible_keepers(
    exempt: Collection[int], faces: Iterable[FuseAlias] = (), among: Collection[int] | None = None
) -> tuple[int, ...]:
    """The processes that may keep a region's descriptor where nobody who looks at processes sees it.

    In the queue of a socket (/proc/PID/fdinfo/FD:scm_fds) or registered with an io_uring (UserFiles) the kernel does
    not show of what an fd is; a thread may have a table of fds of its own.
    Of processes that are hidden from this user nothing is said. ``among``: only these are looked at.

    Raises:
        Denied, KernelRefused, BadFile: the processes of this host cannot be read.
    """
    census = census_of.take(closed=exempt, among=among)
    inodes = {face.inode for face in faces}
    return tuple(
        sorted(
            process.pid
            for process in census.processes.values()
            if process.pid not in exempt and (_passes_on(census, process) or _hides(census, process, inodes))
        )
    )


def _passes_on(census: Census, process: Process) -> bool:
    for fd, link in process.fds.items():
        if link.startswith(("socket:", "anon_inode:[io_uring]")):
            with contextlib.suppress(Gone, NotFound, Denied):
                rows = tree.read(census.root, f"{process.place}/fdinfo/{fd}").split(b"\n")
                counts = [row.split()[1] for row in rows if row.startswith((b"scm_fds:", b"UserFiles:"))]
                if any(count != b"0" for count in counts):
                    return True
    return False


def _hides(census: Census, process: Process, inodes: Collection[int]) -> bool:
    """Whether a thread of a process has a file of a region that the others do not have."""
    if process.kernel or process.threads < 2:
        return False
    shown = set(process.fds.values())
    with contextlib.suppress(Gone, NotFound, Denied):
        for tid in census_of.threads(census.root, process.pid):
            if tid == process.task:
                continue
            with contextlib.suppress(Gone):
                own = census_of.links(census.root, process.pid, tid)
                hidden = {fd: link for fd, link in own.items() if link not in shown}
                place = tree.of_process(process.pid, tid)
                if any(link == memfds.RETRIEVED or link.startswith(OURS) for link in hidden.values()) or any(
                    _files(census, place, hidden, inodes)
                ):
                    return True
    return False


def _openers(census: Census, faces: Iterable[FuseAlias]) -> Iterator[tuple[int, int]]:
    """Who has a file on the mount open, under whatever name: by the inode, which no other file of such a mount has."""
    inodes = {face.inode for face in faces}
    for process in census.processes.values():
        yield from ((process.pid, fd) for fd in _files(census, process.place, process.fds, inodes))


def _files(census: Census, place: str, fds: Mapping[int, str], inodes: Collection[int]) -> Iterator[int]:
    """Those of fds that are open on one of these inodes (fdinfo); a file is not asked: its server may not answer."""
    for fd, link in fds.items() if inodes else ():
        if link.startswith("/"):
            with contextlib.suppress(Gone, NotFound):
                if memfds.inode(census.root, place, fd) in inodes:
                    yield fd


def _ask_frames(segments: Sequence[Segment], fds: Sequence[int], who: str) -> str:
    """Why it cannot be said that no hidden process maps segments; empty when their frames are mapped nowhere."""
    from memconsole.extents import ExtentTable

    for fd, segment in zip(fds, segments, strict=True):
        try:
            with ExtentTable.scan_fd(fd, segment.size) as table:
                if any(count.most for count in table.join_page_counts()):
                    return f"{who}, and one of them maps it"
        except Denied:
            return f"{who}, and its frames cannot be asked (/proc/kpagecount)"
        except MemconsoleError as error:
            return f"{who}, and its frames cannot be asked ({error})"
    return ""
