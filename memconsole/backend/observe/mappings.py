"""Which process maps which region: the VMAs of a census over the memory of regions, and those no grant accounts for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from memconsole.backend.exports.mapped import BlockedMapping, FuseAlias, path_of_file, user_files
from memconsole.backend.kernel.census import Census
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.ledger.state import State
from memconsole.model import Grant, Guest, GuestKind, ProcessId, Region

OURS = "/memfd:memconsole:"
"""How the memfd store names its segments."""
Object = tuple[int, int]
"""A file by (st_dev, st_ino), as its mappings show it."""
_SOCKET = re.compile(r"socket:\[(\d{1,20})\]")


class _Part(NamedTuple):
    """Bytes ``start`` to ``end`` of a file are those of a region from ``base`` on."""

    region: str
    base: int
    start: int = 0
    end: int = 1 << 63
    through: str = ""


class RegionMapping(NamedTuple):
    """A VMA over a region, ``offset`` (of its start) in bytes; ``through``: the file of the mount it is of, if any."""

    region: str
    pid: int
    vma: Vma
    offset: int
    through: str = ""

    def overlaps(self, grant: Grant) -> bool:
        """Whether it reaches into a grant's range."""
        return (
            self.region == grant.region
            and self.offset < grant.offset + grant.length
            and grant.offset < self.offset + self.vma.size
        )


def region_mappings(
    census: Census, regions: Iterable[Region], faces: Iterable[FuseAlias] = (), shields: Iterable[BlockedMapping] = ()
) -> list[RegionMapping]:
    """Every VMA of every process through which it reaches a region, by its segments or by other faces of it.

    The files of regions that are pieces of one device reach them all: what counts is where in it a VMA lies.
    """
    of: dict[Object, list[_Part]] = {}
    pieces: dict[int, list[_Part]] = defaultdict(list)
    known = set()
    for region in regions:
        base = 0
        known.add(region.name)
        for segment in region.segments:
            if segment.whole:
                parts = pieces[segment.whole]
                parts.append(_Part(region.name, base, segment.start, segment.start + segment.size))
            else:
                parts = [_Part(region.name, base)]
            of[segment.device, segment.inode] = parts
            base += segment.size
    for face in faces:
        if face.region in known:
            of[face.device, face.inode] = [_Part(face.region, face.base, through=face.path)]
    blind = set(shields)
    found = []
    if of:
        for pid, vma in census.mappings(of.keys()):
            if BlockedMapping(census.processes[pid].id, vma.start, vma.end) in blind:
                continue
            found += [
                RegionMapping(part.region, pid, vma, part.base + vma.offset - part.start, part.through)
                for part in of[vma.device, vma.inode]
                if vma.offset < part.end and part.start < vma.offset + vma.size
            ]
    return found


def stray_mappings(
    state: State, overs: Iterable[RegionMapping], census: Census, backends: Mapping[ProcessId, str] | None = None
) -> list[RegionMapping]:
    """The mappings no grant accounts for; what an action under way is about to grant counts as granted.

    A grant is for all processes of its guest: its own, its helpers, those of :func:`backends`, and what those forked.
    One to a user is for all that came through its file, whose permissions say who may.
    """
    aims = [intent.aims for intent in state.unfinished.values()]
    owners = {**(backends or {}), **_owners(state)}
    granted: dict[tuple[str, str], list[Grant]] = defaultdict(list)
    for grant in (*state.grants.values(), *(grant for change in aims for grant in change.grants)):
        granted[grant.guest, grant.region].append(grant)
    files = {(region, path_of_file(file)) for region, file in user_files(state).items()}
    return [
        over
        for over in overs
        if (over.region, over.through) not in files
        and not any(
            over.overlaps(grant)
            for guest in _guest_ancestors(census, over.pid, owners)
            for grant in granted[guest, over.region]
        )
    ]


def backends(
    state: State, astray: Iterable[RegionMapping], census: Census, peers: Callable[[], Mapping[int, int]]
) -> dict[ProcessId, str]:
    """The processes that a QEMU has handed its memory to: its vhost-user backends, and whose each is.

    Such a process maps what the guest was granted, and one of its unix sockets is connected to one of QEMU's.
    ``astray``: mappings without a grant. ``peers``: the inode of every unix socket's peer by its own.
    """
    found: dict[ProcessId, str] = {}
    asked: Mapping[int, int] | None = None
    for over in astray:
        for guest in _qemus(state, over, census):
            asked = peers() if asked is None else asked
            theirs = {asked.get(inode) for inode in _sockets(census, guest.pid)}
            if not theirs.isdisjoint(_sockets(census, over.pid)):
                found[census.processes[over.pid].id] = guest.name
    return found


def _qemus(state: State, over: RegionMapping, census: Census) -> Iterator[Guest]:
    """The guests that are a QEMU, run, and were granted what a mapping reaches into."""
    for name in sorted({grant.guest for grant in state.grants.values() if over.overlaps(grant)}):
        guest = state.guests.get(name)
        if guest is not None and guest.kind in {GuestKind.QEMU, GuestKind.FOREIGN} and guest.pid is not None:
            process = census.processes.get(guest.pid)
            if process is not None and process.id == guest.process:
                yield guest


def _sockets(census: Census, pid: int | None) -> set[int]:
    """The inodes of the sockets that a process holds."""
    process = census.processes.get(pid or 0)
    links = process.fds.values() if process is not None else ()
    return {int(match[1]) for link in links if (match := _SOCKET.fullmatch(link))}


def _owners(state: State) -> dict[ProcessId, str]:
    """The guest of every process that is one or works for one, by PID and start time."""
    owners: dict[ProcessId, str] = {}
    for guest in state.guests.values():
        owners.update((each.process, guest.name) for each in guest.helpers)
        if guest.process is not None:
            owners[guest.process] = guest.name
    return owners


def _guest_ancestors(census: Census, pid: int, owners: Mapping[ProcessId, str]) -> Iterator[str]:
    """The guests that a process is of, or descends from."""
    passed: set[int] = set()
    while (process := census.processes.get(pid)) is not None and pid not in passed:
        passed.add(pid)
        guest = owners.get(process.id)
        if guest is not None:
            yield guest
        pid = process.parent
