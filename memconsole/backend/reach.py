"""Who can still reach a segment of a region: the kernel's answer, never the ledger's or a guest's.

    a VMA of its memfd            reaches it now
    an fd of its memfd            can map all of it any time
    an fd of a file on the mount  the same: what it maps is the memfd
    a process not shown to us     may do either: then the frames themselves are asked (/proc/kpagecount)

Whose they are the kernel does not show of an fd in flight in a socket's queue, of an io_uring's fixed buffer, of a page
in a pipe. Moving the contents away from all of them is what :mod:`memconsole.backend.revoke` does; where it cannot,
:func:`keepers` says who may have such an fd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from memconsole.backend import survey
from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import memfds, procmaps, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.survey import Face, Over, Shield
from memconsole.errors import Denied, Gone, MemconsoleError, NotFound
from memconsole.model import Region, Segment


@dataclass(frozen=True)
class Reach:
    """``mapped``: VMAs of it; ``held``: (PID, fd) of its memfd; ``unseen``: why this may not be all."""

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
    segment: int | None = None,
    *,
    exempt: Collection[int],
    faces: Iterable[Face] = (),
    shields: Iterable[Shield] = (),
) -> Reach:
    """Who reaches a segment of a region (all of it if left out), apart from ``exempt`` processes (us and our custody).

    ``faces`` are other files that show the region, and ``shields`` mappings that lead nowhere.

    Raises:
        Denied, KernelRefused, BadFile: the processes of this host cannot be read.
    """
    faces = tuple(faces)
    census = census_of.take(closed=exempt)
    index = slice(0, None) if segment is None else slice(segment, segment + 1)
    start = sum(each.size for each in region.segments[: index.start])
    end = start + sum(each.size for each in region.segments[index])
    mapped = tuple(over for over in survey.mappings(census, [region], faces, shields) if start <= over.offset < end)
    objects = {(each.device, each.inode) for each in region.segments[index]}
    held = (
        *memfds.holders(census, objects),
        *(_openers(census, shown) if (shown := [face for face in faces if face.region == region.name]) else ()),
    )
    unseen = ""
    if census.hidden and not mapped and not held:
        unseen = _ask_frames(region.segments[index], fds[index], len(census.hidden))
    return Reach(mapped, held, unseen)


def keepers(exempt: Collection[int], faces: Iterable[Face] = ()) -> tuple[int, ...]:
    """The processes that may keep a region's descriptor, or a mapping, where nobody who looks at processes sees it.

    In the queue of a socket (/proc/PID/fdinfo/FD:scm_fds) or registered with an io_uring (UserFiles) the kernel does
    not show of what an fd is; a thread may have a table of fds of its own, or have outlived its process's first one.
    Of processes that are hidden from this user nothing is said.

    Raises:
        Denied, KernelRefused, BadFile: the processes of this host cannot be read.
    """
    census = census_of.take(closed=exempt)
    ours = (survey.OURS, *{face.path for face in faces})
    return tuple(
        sorted(
            process.pid
            for process in census.processes.values()
            if process.pid not in exempt and (_passes_on(census, process) or _hides(census, process, ours))
        )
    )


def _passes_on(census: Census, process: Process) -> bool:
    for fd, link in process.fds.items():
        if link.startswith(("socket:", "anon_inode:[io_uring]")):
            with contextlib.suppress(Gone, NotFound, Denied):
                rows = tree.read(census.root, f"/proc/{process.pid}/fdinfo/{fd}").split(b"\n")
                counts = [row.split()[1] for row in rows if row.startswith((b"scm_fds:", b"UserFiles:"))]
                if any(count != b"0" for count in counts):
                    return True
    return False


def _hides(census: Census, process: Process, ours: Collection[str]) -> bool:
    if process.kernel or process.threads < 2:
        return False
    shown = set(process.fds.values())
    with contextlib.suppress(Gone, NotFound, Denied):
        for name in tree.names(census.root, f"/proc/{process.pid}/task"):
            if int(name) == process.pid:
                continue
            hidden = set(census_of.links(census.root, int(name)).values()) - shown
            if memfds.RETRIEVED in hidden or any(part in link for link in hidden for part in ours):
                return True
            if process.state == "Z":
                mapped = procmaps.vmas(census.root, int(name))
                if any(vma.path.startswith(survey.OURS) for vma in mapped):
                    return True
    return False


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


def _ask_frames(segments: Sequence[Segment], fds: Sequence[int], hidden: int) -> str:
    """Why it cannot be said that no hidden process maps segments; empty when their frames are mapped nowhere."""
    from memconsole.extents import ExtentTable

    who = f"{hidden} processes are not shown to this user"
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
