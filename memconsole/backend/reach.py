"""Who can still reach a range of a region: the kernel's answer, never the ledger's or a guest's.

    a VMA over the range          reaches it now
    an fd of the region's memfd   can map it any time; it is fair only in a guest that has a grant on that region
    an fd of a file on the mount  the same: what it maps is the memfd
    a process not shown to us     may do either: then the frames themselves are asked (/proc/kpagecount)

What no file of the kernel shows is not found here: an fd in flight in a socket's queue, an io_uring's fixed buffer, a
page in a pipe. Moving the contents away from all of them is what :mod:`memconsole.backend.revoke` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from memconsole.backend import survey
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import memfds
from memconsole.backend.kernel.census import Census
from memconsole.backend.survey import Face, Over, Shield
from memconsole.errors import Denied, Gone, MemconsoleError, NotFound
from memconsole.model import Region


@dataclass(frozen=True)
class Reach:
    """``mapped``: VMAs over the range; ``held``: (PID, fd) of its memfd; ``unseen``: why this may not be all."""

    mapped: tuple[Over, ...]
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
        return "; ".join([*words, self.unseen] if self.unseen else words) or "nobody"


def find(
    region: Region,
    fds: Sequence[int],
    offset: int,
    length: int,
    *,
    exempt: Collection[int],
    may_hold: Collection[int] = (),
    faces: Iterable[Face] = (),
    shields: Iterable[Shield] = (),
) -> Reach:
    """Who reaches ``length`` bytes from ``offset`` of a region, apart from ``exempt`` processes (us and our custody).

    ``may_hold`` are processes with a right to the region's memfd (another grant on it); ``faces`` are other files that
    show the region, and ``shields`` mappings that lead nowhere.

    Raises:
        Denied, KernelRefused, BadFile: the processes of this host cannot be read.
    """
    faces = tuple(faces)
    census = census_of.take(closed=exempt)
    mapped = tuple(
        over
        for over in survey.mappings(census, [region], faces, shields)
        if over.offset < offset + length and offset < over.offset + over.vma.size
    )
    objects = {(segment.device, segment.inode) for segment in region.segments}
    holders = (
        *memfds.holders(census, objects),
        *_openers(census, [face for face in faces if face.region == region.name]),
    )
    held = tuple((pid, fd) for pid, fd in holders if pid not in may_hold)
    unseen = ""
    if census.hidden and not mapped and not held:
        unseen = _ask_frames(region, fds, offset, length, len(census.hidden))
    return Reach(mapped, held, unseen)


def _openers(census: Census, faces: Iterable[Face]) -> Iterator[tuple[int, int]]:
    """Who has a file on the mount open: by the inode, which no other file of any mount of ours has or had.

    The file is not asked: whoever serves it may not answer.
    """
    inodes = {face.inode: face.path for face in faces}
    for process in census.processes.values():
        for fd, link in process.fds.items():
            if any(path in link for path in inodes.values()):
                with contextlib.suppress(Gone, NotFound):
                    if memfds.inode(census, process.pid, fd) in inodes:
                        yield process.pid, fd


def _ask_frames(region: Region, fds: Sequence[int], offset: int, length: int, hidden: int) -> str:
    """Why it cannot be said that no hidden process maps the range; empty when its frames are mapped nowhere."""
    from memconsole.extents import ExtentTable

    who = f"{hidden} processes are not shown to this user"
    base = 0
    for fd, segment in zip(fds, region.segments, strict=True):
        start, end = max(offset - base, 0), min(offset + length - base, segment.size)
        base += segment.size
        if start >= end:
            continue
        try:
            with ExtentTable.scan_fd(fd, segment.size) as table:
                for row, count in zip(table, table.join_page_counts(), strict=True):
                    first = row.offset * table.page_size
                    if count.most and first < end and start < first + row.count * table.page_size:
                        return f"{who}, and one of them maps it"
        except Denied:
            return f"{who}, and its frames cannot be asked (/proc/kpagecount)"
        except MemconsoleError as error:
            return f"{who}, and its frames cannot be asked ({error})"
    return ""
