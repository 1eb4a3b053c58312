"""What the ledger means, as files on the mount of ``memconsole serve --mount``.

The filesystem lies at :func:`.mountpoint.staging`, its subtrees in the directory that was asked for (:mod:`.attach`):
the runtime directory, if none was.

    whole grant of a region     guests/GUEST/ram/REGION, of the user the guest's process runs as
    grant to a user             files/PATH, as ``reserve --path`` said
    every guest                 guests/GUEST/status, as of a second ago; pfnmap, while it has grants
    guest a handoff left        guests/GUEST/state/handoff, what its VMM saved
    window grant                guests/GUEST/mmio/BDF-barN, a link
    region of one segment       regions/REGION, for root
    RAM of an adopted guest that a handoff carried: guests/GUEST/ram/REGION as well, however its addresses lie

:meth:`GuestMount.sync` makes the tree what it should be, whatever it is: after each action, once a second, for a
control process that comes back, and for a server that had to be started anew.

The kernel shows who maps such a file by the file's own device and inode, not by the memfd's. Both end with the server,
mappings do not: so which file showed which memfd is written into custody (``mount``) before anybody but root can open
it, and kept until the memfd is no more what the region is.

A handoff carries that table. Of another boot only the guests' owners and the mountpoint count: numbers of memfds mean
nothing any more, and nobody maps what that server showed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from memconsole.backend.exports import mount_record
from memconsole.backend.exports.attach import attach
from memconsole.backend.exports.fuse import FuseEntry, FuseTree, MapPart
from memconsole.backend.exports.mapped import FuseAlias, file_of, is_whole, path_of
from memconsole.backend.exports.mount_parts import above, directory, link, memfd, memfds, stale_finding
from memconsole.backend.exports.mount_record import MountRecord, ShownFile
from memconsole.backend.exports.mountpoint import staging
from memconsole.backend.kernel import census
from memconsole.backend.kernel.tree import line
from memconsole.backend.peers.handle import Handle
from memconsole.backend.stores import adopted, files
from memconsole.errors import Gone, MemconsoleError, NotFound, Silent
from memconsole.model import Access, Finding, Grant, Guest, Region, Severity, Snapshot

if TYPE_CHECKING:
    from memconsole.backend.holdings import Holdings

SOCKET = "fuse"
"""The server's socket in the runtime directory."""
MAX_PARTS = 64
"""Grants of a guest that its ``pfnmap`` lists."""


class _Wanted(NamedTuple):
    """An entry as it should be; ``put`` makes it, of a user and with a mode. ``memfd``, ``region``: of a RAM file."""

    uid: int
    mode: int
    put: Callable[[int, int], object]
    memfd: tuple[int, int] | None = None
    region: str = ""
    gid: int = 0


class GuestMount:
    """The mount of one control process; ``mountpoint`` None: wherever it is, and none once its server ended.

    Raises:
        Refused, MemconsoleError: it cannot be mounted (:meth:`FuseTree.start`).
    """

    def __init__(self, holdings: Holdings, mountpoint: Path | None) -> None:
        self._holdings = holdings
        self._mountpoint = mountpoint
        self._lock = threading.RLock()
        self._boot_id = line(holdings.root, "/proc/sys/kernel/random/boot_id")
        known, self._rest = mount_record.stored(holdings.custody, self._boot_id)
        self._before = known.mountpoint if known.boot_id != self._boot_id else ""
        self._shown_at = str(mountpoint) if mountpoint is not None else known.mountpoint
        self._owners = dict(known.owners)
        self._shown = list(known.shown) if known.boot_id == self._boot_id else []
        self._tree: FuseTree | None = None
        self._server: Handle | None = None
        self._statuses: dict[str, bytes] = {}
        self._maps: dict[str, list[tuple[object, ...]]] = {}
        self._device = 0
        self._passes = False
        self._without: tuple[Finding, ...] = ()
        self._trouble: tuple[Finding, ...] = ()
        self._wrong: list[Finding] = []
        self._open()

    @property
    def pid(self) -> int | None:
        """The server's PID, while it runs: it holds what is shown."""
        server = self._server
        return server.pid if server is not None and server.alive() else None

    @property
    def fuse_aliases(self) -> tuple[FuseAlias, ...]:
        """The files through which regions may be mapped, those of servers that ended among them."""
        now = memfds(self._holdings.state)
        return tuple(
            FuseAlias(shown.region, shown.device, shown.inode, 0, shown.path)
            for shown in tuple(self._shown)
            if now.get(shown.region) == shown.memfd
        )

    def findings(self) -> tuple[Finding, ...]:
        """Why the mount is not as it should be."""
        if self._tree is None and self._before:
            what = f"the mount at {self._before} is not back after the handoff"
            remedy = f"memconsole serve --mount {self._before}"
            return (*self._trouble, Finding("mount-not-back", Severity.WARNING, "mount", what, "custody", remedy))
        return self._trouble

    def sync(self, owners: Mapping[str, int] | None = None) -> None:
        """Make the tree what the ledger means; what prevents it is a finding. One thread at a time may act then.

        ``owners``: the users of guests' processes, as far as they are known.
        """
        with self._lock:
            try:
                if self._tree is None:
                    self._open()
                try:
                    self._sync(owners or {})
                except Gone:
                    self._open()
                    self._sync(owners or {})
            except MemconsoleError as error:
                self._trouble = (stale_finding("mount", error),)

    @contextlib.contextmanager
    def _isolated(self, path: str) -> Iterator[None]:
        """What is wrong with one entry is found out by itself, and keeps none of the others from being as it should.

        Raises:
            Gone, Silent: the server does not answer, whatever it is asked.
        """
        try:
            yield
        except (Gone, Silent):
            raise
        except MemconsoleError as error:
            self._wrong.append(stale_finding(path, error))

    def ping(self) -> None:
        """Ask the server whether it is there; where there is none, there is nothing to ask.

        Raises:
            Gone: it ended. Silent: it does not answer.
        """
        tree = self._tree
        if tree is not None:
            tree.status()

    def show_status(self, snapshot: Snapshot) -> None:
        """Have every guest's ``status`` say what a Snapshot does."""
        grants = {grant.id: grant for grant in snapshot.grants}
        windows = {window.id: window for window in snapshot.windows}
        with self._lock:
            for guest in snapshot.guests:
                if guest.name not in self._holdings.state.guests or self._tree is None:
                    continue
                text = msgspec.json.format(
                    msgspec.json.encode({
                        "guest": guest,
                        "grants": [grants[id] for id in guest.grants if id in grants],
                        "windows": [windows[id] for id in guest.windows if id in windows],
                    })
                )  # fmt: skip
                if self._statuses.get(guest.name) != text:
                    uid = guest.seen.uid if guest.seen is not None else 0
                    with contextlib.suppress(MemconsoleError):  # the next sync says what is wrong
                        self._tree.set_status(guest.name, text + b"\n", uid)
                        self._statuses[guest.name] = text

    def block_access(self, grant: Grant) -> None:
        """Nobody opens a grant's file any more, until :meth:`sync` finds that the ledger still means it."""
        with self._lock, contextlib.suppress(NotFound, Gone):
            if self._tree is not None:
                self._tree.revoke(path_of(grant, self._holdings.state))

    def why_open(self, grant: Grant) -> str:
        """Why somebody may still be able to map a grant's file, whom no process shows; empty if nobody is."""
        now = memfds(self._holdings.state).get(grant.region)
        with self._lock:
            listed: dict[int, FuseEntry] = {}
            if self._tree is not None:
                with contextlib.suppress(Gone):
                    listed = {entry.inode: entry for entry in self._tree.list()}
            for shown in self._shown:
                if shown.memfd != now or shown.path.startswith("regions/") or shown.closed:
                    continue
                entry = listed.get(shown.inode) if shown.device == self._device else None
                if entry is None:
                    return f"an earlier {shown.path} of the mount may still be open"
                if entry.open:
                    return f"{shown.path} of the mount is still open ({entry.open} descriptions)"
        return ""

    def close(self) -> None:
        """Let go of the server, which goes on."""
        with self._lock:
            self._disconnect()

    # --- inside -------------------------------------------------------------------------------------------------

    def _disconnect(self) -> None:
        if self._tree is not None:
            self._tree.close()
            self._tree = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _open(self) -> None:
        self._disconnect()
        self._statuses, self._maps, self._device = {}, {}, 0
        if self._mountpoint is not None:
            tree = FuseTree.start(self._holdings.runtime_dir, staging(self._holdings.runtime_dir))
        else:
            try:
                tree = FuseTree(self._holdings.runtime_dir / SOCKET)
            except Gone:
                return
        try:
            status = tree.status()
            self._server = Handle(tree.pid)
        except BaseException:
            tree.close()
            raise
        self._tree, self._device, self._passes = tree, status.device, not status.passthrough
        capability = status.capability()
        what = f"the mount shows no memory: {capability.why}"
        finding = Finding("mount-without-ram", Severity.WARNING, "mount", what, "/dev/fuse", capability.remedy)
        self._without = () if self._passes else (finding,)

    def _sync(self, owners: Mapping[str, int]) -> None:
        tree = self._tree
        if tree is None:
            return
        self._wrong = []
        listed = {entry.path: entry for entry in tree.list()}
        wanted = dict(self._wanted(tree, owners, listed))
        for path in sorted(listed, reverse=True):  # what is in a directory before the directory
            if path not in wanted and not _is_kept(path, wanted):
                with self._isolated(path):
                    self._remove(tree, listed.pop(path))
        fresh = []
        for path, want in wanted.items():
            with self._isolated(path):
                entry = listed.get(path)
                if entry is not None and (entry.revoked or (want.memfd and not self._shows(entry, want.memfd))):
                    self._remove(tree, entry)
                    entry = None
                if entry is None and want.memfd is not None:
                    fresh.append(path)
                elif entry is None or (entry.uid, entry.gid, entry.mode & 0o777) != (want.uid, want.gid, want.mode):
                    want.put(want.uid, want.mode)
        self._put_ram(tree, {path: wanted[path] for path in fresh})
        self._map_pages(tree, owners, listed)
        self._forget(wanted)
        if self._mountpoint is not None:
            attach(tree.mountpoint, self._device, self._mountpoint)
        self._trouble = (*self._without, *self._wrong)

    def _wanted(
        self, tree: FuseTree, owners: Mapping[str, int], listed: Mapping[str, FuseEntry]
    ) -> Iterator[tuple[str, _Wanted]]:
        """Every entry but ``status``, ``pfnmap`` and ``state/*``, directories before what is in them."""
        state = self._holdings.state
        saved = {name for name in self._holdings.custody.names() if name.startswith("state:")}
        yield "guests", _Wanted(0, 0o755, directory(tree, "guests"))
        yield "regions", _Wanted(0, 0o700, directory(tree, "regions"))
        for path in above(state):
            yield path, _Wanted(0, 0o755, directory(tree, path))
        for guest in state.guests.values():
            top = f"guests/{guest.name}"
            uid = self._owner(guest, owners, listed.get(top))
            for path in (top, *(f"{top}/{name}" for name in ("ram", "state", "mmio"))):
                yield path, _Wanted(uid, 0o550, directory(tree, path))
            if f"state:{guest.name}" in saved:
                yield f"{top}/state/handoff", _Wanted(uid, 0o440, partial(self._put_state, tree, guest.name))
            for grant in state.grants_of(guest=guest.name):
                region = state.regions.get(grant.region)
                if region is not None and self._can_be_shown(region) and self._is_file(grant, region):
                    yield path_of(grant, state), self._wanted_grant(tree, grant, region, uid)
        for window in state.windows.values():
            bdf, _, bar = window.window.rpartition(":")
            yield (
                f"guests/{window.guest}/mmio/{bdf}-bar{bar}",
                _Wanted(0, 0o777, link(tree, window.guest, bdf, int(bar))),
            )
        for region in state.regions.values():
            if self._can_be_shown(region):
                put = partial(self._put_region, tree, region.name)
                yield f"regions/{region.name}", _Wanted(0, 0o600, put, memfd(region), region.name)

    def _wanted_grant(self, tree: FuseTree, grant: Grant, region: Region, uid: int) -> _Wanted:
        """The file of a grant: of its guest's user, or as its region says whose file it is."""
        gid, mode, file = 0, 0o600 if grant.access is Access.RW else 0o400, file_of(grant, self._holdings.state)
        if file is not None:
            uid, gid, mode = file.user, file.group, file.mode
        return _Wanted(uid, mode, partial(self._put_grant, tree, grant, gid), memfd(region), region.name, gid)

    def ram_path(self, guest: str, region: str) -> Path:
        """Where the file of a guest's region is, or would be.

        Raises:
            NotFound: nothing is mounted.
        """
        return self._top() / "guests" / guest / "ram" / region

    def file_path(self, path: str) -> Path:
        """Where a user's file is, or would be.

        Raises:
            NotFound: nothing is mounted.
        """
        return self._top() / "files" / path

    def _top(self) -> Path:
        if self._tree is None:
            raise NotFound("there is no mount", "the service was started without --mount", "memconsole serve --mount")
        return Path(self._shown_at or self._tree.mountpoint)

    def _is_file(self, grant: Grant, region: Region) -> bool:
        return region.store == adopted.NAME or is_whole(grant, region)

    def _is_needed(self, region: Region) -> bool:
        """Whether adopted RAM is shown: libvirt is to start its guest on it, or has."""
        was = any(each.region == region.name and each.memfd == memfd(region) for each in self._shown)
        notes = {f"carried:{grant.guest}" for grant in self._holdings.state.grants_of(region=region.name)}
        return was or bool(notes & set(self._holdings.custody.names()))

    def _can_be_shown(self, region: Region) -> bool:
        """Whether a region is one whole file (not ``region-truncated``); adopted RAM only where it is needed."""
        able = self._passes and len(region.segments) == 1 and (region.store != adopted.NAME or self._is_needed(region))
        if not able or not self._holdings.holds_region(region.name):
            return False
        return os.fstat(self._holdings.fds(region.name)[0]).st_size == region.segments[0].size

    def _put_grant(self, tree: FuseTree, grant: Grant, gid: int, uid: int, mode: int) -> None:
        fd = self._holdings.store_of(grant.region).segment_fd(self._holdings.fds(grant.region)[0], grant.access)
        try:
            tree.add_file(path_of(grant, self._holdings.state), fd, uid=uid, gid=gid, mode=mode)
        finally:
            os.close(fd)

    def _put_state(self, tree: FuseTree, guest: str, uid: int, _mode: int) -> None:
        fd, _ = self._holdings.custody.get(f"state:{guest}")
        try:
            tree.set_state(guest, "handoff", fd, uid)
        finally:
            os.close(fd)

    def _put_region(self, tree: FuseTree, region: str, _uid: int, _mode: int) -> None:
        fd = self._holdings.store_of(region).segment_fd(self._holdings.fds(region)[0], Access.RW)
        try:
            tree.add_region(region, fd)
        finally:
            os.close(fd)

    def _owner(self, guest: Guest, owners: Mapping[str, int], entry: FuseEntry | None) -> int:
        """Who the guest's process is; of one that ended, who it was."""
        if guest.name in owners:
            return owners[guest.name]
        with contextlib.suppress(MemconsoleError):
            if guest.pid is not None:
                process = census.process(self._holdings.root, guest.pid)
                if process.id == guest.process:
                    return census.uid(self._holdings.root, guest.pid)
        waits = guest.service.user if guest.service is not None else 0  # of one that was never started
        return self._owners.get(guest.name) or (entry.uid if entry is not None else 0) or waits

    def _shows(self, entry: FuseEntry, of: tuple[int, int]) -> bool:
        return any(
            each.device == self._device and each.inode == entry.inode and each.memfd == of for each in self._shown
        )

    def _put_ram(self, tree: FuseTree, fresh: Mapping[str, _Wanted]) -> None:
        """New RAM files: root's alone until custody knows them."""
        if not fresh:
            return
        for path, want in fresh.items():
            with self._isolated(path):
                want.put(0, 0)
        made = []
        for entry in tree.list():
            if entry.path in fresh and (of := fresh[entry.path].memfd) is not None:
                self._shown.append(ShownFile(entry.path, fresh[entry.path].region, of, self._device, entry.inode))
                made.append(entry.path)
        self._store()
        for path in made:
            with self._isolated(path):
                fresh[path].put(fresh[path].uid, fresh[path].mode)

    def _map_pages(self, tree: FuseTree, owners: Mapping[str, int], listed: Mapping[str, FuseEntry]) -> None:
        state = self._holdings.state
        for guest in state.guests.values():
            with self._isolated(f"guests/{guest.name}/pfnmap"):
                self._map_guest(tree, guest, owners, listed)
        for name in (*self._maps, *self._statuses):
            if name not in state.guests:
                self._maps.pop(name, None)
                self._statuses.pop(name, None)

    def _map_guest(
        self, tree: FuseTree, guest: Guest, owners: Mapping[str, int], listed: Mapping[str, FuseEntry]
    ) -> None:
        state = self._holdings.state
        parts, key = [], []
        for grant in state.grants_of(guest=guest.name)[:MAX_PARTS]:
            if grant.region in state.regions and self._holdings.holds_region(grant.region):
                index, offset = divmod(grant.offset, files.SEGMENT)
                if state.regions[grant.region].segments[index].whole:  # the mount looks at files that are one region
                    continue
                fd = self._holdings.fds(grant.region)[index]
                parts.append(MapPart(fd, offset, grant.length, grant.gpa))
                status = os.fstat(fd)
                key.append((status.st_dev, status.st_ino, offset, grant.length, grant.gpa))
        path = f"guests/{guest.name}/pfnmap"
        uid = self._owner(guest, owners, listed.get(f"guests/{guest.name}"))
        if parts and self._maps.get(guest.name) != [(uid,), *key]:
            tree.set_pfnmap(guest.name, parts, uid)
            self._maps[guest.name] = [(uid,), *key]
        elif not parts and (path in listed or guest.name in self._maps):
            with contextlib.suppress(NotFound):
                tree.remove(path)
            self._maps.pop(guest.name, None)

    def _remove(self, tree: FuseTree, entry: FuseEntry) -> None:
        with contextlib.suppress(NotFound):
            left = tree.remove(entry.path, recursive=True)
            for at, shown in enumerate(self._shown):
                if shown.device == self._device and shown.inode == entry.inode:
                    self._shown[at] = replace(shown, closed=not left.open)

    def _forget(self, wanted: Mapping[str, _Wanted]) -> None:
        """Files of memfds that no region is made of any more: those were emptied. Owners are those of now."""
        now = memfds(self._holdings.state)
        kept = [shown for shown in self._shown if now.get(shown.region) == shown.memfd]
        owners = {guest: wanted[f"guests/{guest}"].uid for guest in self._holdings.state.guests}
        if kept != self._shown or owners != self._owners:
            self._shown, self._owners = kept, owners
            self._store()

    def _store(self) -> None:
        record = MountRecord(self._boot_id, self._shown_at, self._owners, tuple(self._shown))
        mount_record.store(self._holdings.custody, record, self._rest)


def _is_kept(path: str, wanted: Mapping[str, _Wanted]) -> bool:
    """Whether an entry stays that is made elsewhere: of a guest that is still there."""
    words = path.split("/")
    if words[0] != "guests" or len(words) < 3 or "/".join(words[:2]) not in wanted:
        return False
    return words[2:] in (["status"], ["pfnmap"])
