"""Guest memory as files: the client of memconsole-fuse, which mounts the tree and serves it without this process.

    MOUNT/guests/GUEST/ram/REGION      a memfd, passed through: mmap it, or give it to a VMM as mem-path
    MOUNT/guests/GUEST/state/NAME      device and vCPU state
    MOUNT/guests/GUEST/mmio/BDF-barN   link to the device's resource file
    MOUNT/guests/GUEST/status          JSON
    MOUNT/guests/GUEST/pfnmap          text, a line an extent (native/fuse_pages.c), true when it is opened
    MOUNT/regions/REGION               the owner's view, root only
    MOUNT/files/PATH                   a memfd that is a user's file

The server outlives this process; a control process that comes back connects, lists the tree and goes on. When the
server ends, what was mapped stays mapped, and a new server mounts anew over what the dead one left, with an empty tree.
Whoever looks for those who hold a region must leave ``FuseStatus.pid`` out: it holds what a ``pfnmap`` lists.

A RAM file has the size of its memfd, and that size stays. A database wants its file to be there in its own format, and
its lock beside it: copy a fresh, small database into the RAM file, and link to it from a directory of the database's
own. LMDB: ``data.mdb`` linked, ``map_size`` the file's size. SQLite: ``journal_mode=MEMORY`` (or ``OFF``),
``cache_spill=OFF`` so that a rollback never wants to truncate, ``mmap_size`` the file's size.

The protocol stands at the top of ``native/fuse_control.h``.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from memconsole.backend.peers.daemon import DaemonClient, Refusal, refused, started
from memconsole.errors import (
    Denied,
    Gone,
    KernelRefused,
    MemconsoleError,
    NotFound,
    Refused,
    Silent,
    UsageError,
    WireError,
)
from memconsole.model import Capability
from memconsole.units import exact_size

ANSWERS = 10.0
"""Seconds the server has for a request, the turn for its connection included."""
_UNAVAILABLE = "start guests with an agent: the fd export needs no mount"


class EntryKind(enum.IntEnum):
    """What an entry of the tree is."""

    DIR = 1
    LINK = 2
    RAM = 3
    TEXT = 4
    MAP = 5


class FuseEntry(NamedTuple):
    """An entry of the tree; ``size`` in bytes (a RAM file's, a text's, a link's target's).

    ``open`` counts open file descriptions, wherever their descriptors are; a mapping is none. A mapping of a RAM file
    shows ``inode`` and the mount's device (``FuseStatus.device``) in /proc/PID/maps, not the memfd's; one that was made
    under an earlier server keeps its inode, which is never used again, and the device of a mount that is gone.
    """

    path: str
    kind: EntryKind
    inode: int
    size: int
    mode: int
    uid: int
    gid: int
    open: int
    revoked: bool


class OpenAfterRevoke(NamedTuple):
    """What is left after a revoke: file descriptions opened before, and whether reading and writing them gives EIO.

    Those that are ``open`` can still be mapped, spliced and sent, until the memfd is truncated.
    """

    open: int
    cut: bool


class MapPart(NamedTuple):
    """A range of a memfd a ``pfnmap`` lists, in bytes; ``gpa`` where the guest sees its start, if it does."""

    fd: int
    offset: int
    length: int
    gpa: int | None


class FuseStatus(NamedTuple):
    """What the server says of itself; ``passthrough`` is 0, or the errno that tells why the kernel shows no RAM."""

    pid: int
    passthrough: int
    entries: int
    handles: int
    requests: int
    ram_bytes: int
    connection: int
    minor: int
    mountpoint: Path

    @property
    def device(self) -> int:
        """The mount's st_dev."""
        return os.makedev(0, self.connection)

    def capability(self) -> Capability:
        """Whether RAM can be shown as files here, and if not, why."""
        if not self.passthrough:
            return Capability("fuse-passthrough", "FUSE passthrough", "yes", f"mounted at {self.mountpoint}")
        return Capability("fuse-passthrough", "FUSE passthrough", "no", _why_not(self.passthrough), _UNAVAILABLE)


class FuseTree(DaemonClient):
    """The tree of the server on the socket at ``path``, over one connection; every method from any thread.

    Raises:
        Gone: no server is there (``FuseGone``).
        Silent: one is there and does not answer (``FuseSilent``).
        Denied: the server runs as another user, and this process not as root.
        Refused: the server has too many connections (``FuseBusy``).
    """

    def __init__(self, path: Path, *, timeout: float = ANSWERS) -> None:
        self.mountpoint = Path()
        super().__init__(path, timeout)

    @classmethod
    def start(cls, runtime_dir: Path, mountpoint: Path) -> FuseTree:
        """The server of a runtime directory: the one that runs, else a new one, which outlives this process.

        Raises:
            Refused: it serves another mountpoint (``OtherMount``), or another server serves this one (``MountTaken``).
            MemconsoleError: it could not be started.
        """
        path = runtime_dir.absolute() / "fuse"
        return started(
            lambda: _serving(cls(path), mountpoint),
            "memconsole-fuse",
            path,
            mountpoint.absolute(),
            what=f"nothing can be mounted at {mountpoint}",
            remedy=_UNAVAILABLE,
            taken="MountTaken",
        )

    # --- what guests see --------------------------------------------------------------------------------------------

    def add_ram(
        self,
        guest: str,
        region: str,
        fd: int,
        *,
        uid: int = 0,
        gid: int = 0,
        mode: int = 0o600,
        offset: int = 0,
        length: int | None = None,
    ) -> Path:
        """The grant of a region's memfd as ``ram/REGION``; a mode without ``w`` keeps root from writing too.

        Raises:
            Refused: the grant is not the whole memfd (``NotWhole``), the kernel has no passthrough
                (``NoPassthrough``), something else is there (``PathTaken``).
        """
        size = os.fstat(fd).st_size
        if offset or (length is not None and length != size):
            raise Refused(
                f"a part of region {region} cannot be a file",
                f"the kernel shows a memfd as a whole: {exact_size(size)}, not {exact_size(length or 0)} from {offset}",
                "reserve a region for this guest, or map it with the fd export",
                code="NotWhole",
            )
        return self._put(EntryKind.RAM, f"guests/{guest}/ram/{region}", uid=uid, gid=gid, mode=mode, fds=[fd])

    def add_file(self, path: str, fd: int, *, uid: int = 0, gid: int = 0, mode: int = 0o600) -> Path:
        """A whole memfd as a file at a path, whose directory is there; raises as :meth:`add_ram`."""
        return self._put(EntryKind.RAM, path, uid=uid, gid=gid, mode=mode, fds=[fd])

    def add_region(self, region: str, fd: int) -> Path:
        """The owner's view of a region of one segment, for root; raises as :meth:`add_ram`."""
        self.directory("regions", mode=0o700)
        return self._put(EntryKind.RAM, f"regions/{region}", mode=0o600, fds=[fd])

    def set_status(self, guest: str, status: bytes, uid: int = 0, gid: int = 0) -> Path:
        """What ``status`` shows from now on; who has it open reads on what he opened."""
        return self._text(f"guests/{guest}/status", status, uid, gid)

    def set_state(self, guest: str, name: str, fd: int, uid: int = 0, gid: int = 0) -> Path:
        """A file of device or vCPU state, from a memfd that nobody changes any more."""
        path = f"guests/{guest}/state/{name}"
        return self._put(EntryKind.TEXT, path, uid=uid, gid=gid, mode=0o440, fds=[fd])

    def set_pfnmap(self, guest: str, parts: Sequence[MapPart], uid: int = 0, gid: int = 0) -> Path:
        """What ``pfnmap`` lists from now on, scanned whenever it is opened: at most 64 ranges, in this order.

        Raises:
            UsageError: no ranges, or too many.
        """
        if not 0 < len(parts) <= _MAX_PARTS:
            raise UsageError(f"{len(parts)} ranges for a pfnmap", f"1 to {_MAX_PARTS} fit")
        rows = [(part.offset, part.length, _NO_GPA if part.gpa is None else part.gpa) for part in parts]
        payload = b"".join(_PART.pack(*row) for row in rows)
        with contextlib.ExitStack() as stack:
            # its own read-only descriptions: a mapping of one is no writer that would forbid F_SEAL_WRITE
            fds = [os.open(f"/proc/self/fd/{part.fd}", os.O_RDONLY | os.O_CLOEXEC) for part in parts]
            for fd in fds:
                stack.callback(os.close, fd)
            path = f"guests/{guest}/pfnmap"
            return self._put(EntryKind.MAP, path, uid=uid, gid=gid, mode=0o440, payload=payload, fds=fds)

    def link_window(self, guest: str, bdf: str, bar: int, target: Path) -> Path:
        """A link to the resource file of a device's BAR: what is no RAM cannot be passed through."""
        return self.link(f"guests/{guest}/mmio/{bdf}-bar{bar}", target)

    # --- the tree ---------------------------------------------------------------------------------------------------

    def directory(self, path: str, uid: int = 0, gid: int = 0, mode: int = 0o755) -> Path:
        """A directory, made or changed; the one above it must be there."""
        return self._put(EntryKind.DIR, path, uid=uid, gid=gid, mode=mode)

    def link(self, path: str, target: Path) -> Path:
        """A symbolic link, made or changed."""
        return self._put(EntryKind.LINK, path, mode=0o777, payload=os.fsencode(target))

    def revoke(self, path: str) -> OpenAfterRevoke:
        """Nobody opens a file any more, root included; the entry stays, so that :meth:`list` shows who has it open.

        Raises:
            NotFound: there is no such file.
        """
        return _revoked(self._request(_FuseOp.REVOKE, path)[1])

    def remove(self, path: str, *, recursive: bool = False) -> OpenAfterRevoke:
        """Revoke and take away a file, or a directory; of several files, what is left of all together.

        Raises:
            NotFound: there is no such entry.
            Refused: a directory with entries, and not ``recursive`` (``NotEmpty``).
        """
        return _revoked(self._request(_FuseOp.REMOVE, path, flags=int(recursive))[1])

    def list(self) -> list[FuseEntry]:
        """Every entry, sorted by path."""
        entries, last, more = [], 0, True
        while more:
            more, page = self._request(_FuseOp.LIST, payload=struct.pack("<Q", last))
            for last, entry in _entries(page):  # noqa: B007 - the last one seen is where the next page begins
                entries.append(entry)
        return sorted(entries)

    def status(self) -> FuseStatus:
        """What the server says of itself."""
        return _status(self._request(_FuseOp.STAT)[1])

    # --- the wire ---------------------------------------------------------------------------------------------------

    def _text(self, path: str, text: bytes, uid: int, gid: int) -> Path:
        fd = os.memfd_create("memconsole-text", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(text)
            return self._put(EntryKind.TEXT, path, uid=uid, gid=gid, mode=0o440, fds=[fd])
        finally:
            os.close(fd)

    def _put(
        self,
        kind: EntryKind,
        path: str,
        *,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        payload: bytes = b"",
        fds: Sequence[int] = (),
    ) -> Path:
        self._request(_FuseOp.PUT, path, kind=kind, mode=mode, uid=uid, gid=gid, payload=payload, fds=fds)
        return self.mountpoint / path

    def _greeted(self, connection: socket.socket) -> int:
        status = _status(_receive(connection, _FuseOp.GREETING, "")[1])
        if self.pid in {0, status.pid}:
            self.mountpoint = status.mountpoint
        return status.pid

    def _nobody(self, why: str) -> Gone:
        remedy = "memconsole serve --mount starts one"
        return Gone(f"nothing serves a mount at {self.path}", why, remedy, code="FuseGone")

    def _ended(self, why: str) -> Gone:
        what = f"the server of the mount, with pid {self.pid}, ended"
        why = why or "its connection closed"
        return Gone(what, why, "memconsole serve --mount mounts again; what is mapped stays mapped", code="FuseGone")

    def _silent(self, pid: int, why: str) -> Silent:
        remedy = f"see what holds it up: if a signal has stopped it, kill -CONT {pid}; what is mapped stays mapped"
        return Silent(f"the server of the mount, with pid {pid}, does not answer", why, remedy, code="FuseSilent")

    def _replaced(self, pid: int) -> Gone:
        return self._ended(f"another one, pid {pid}, serves the mount, with a tree of its own")

    def _request(
        self,
        op: int,
        path: str = "",
        *,
        kind: int = 0,
        flags: int = 0,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        payload: bytes = b"",
        fds: Sequence[int] = (),
    ) -> tuple[bool, bytes]:
        raw = os.fsencode(path)
        if len(raw) > _MAX_PATH or len(payload) > _MAX_PAYLOAD:
            raise UsageError(f"{path!r} cannot be put on the mount", "its path or its target is too long")
        head = _REQUEST.pack(_VERSION, op, kind, flags, len(raw), len(payload), mode, uid, gid, 0)
        doing = f"{_FuseOp.NAMES[op]} {path}".rstrip()
        return self._ask(doing, head + raw + payload, fds, lambda connection: _receive(connection, op, path))


_VERSION = 1
"""Raised when ``VERSION`` of ``native/fuse_control.h`` is, by the rule there."""
_MAX_PATH = 1023
_MAX_PAYLOAD = 4096
_MAX_PARTS = 64
_NO_PASSTHROUGH, _KERNEL = 11, 12
_NO_GPA = (1 << 64) - 1
_REQUEST = struct.Struct("<BBBBHHIIII")
_REPLY = struct.Struct("<BBBBHH")
_STATUS = struct.Struct("<IIIIQQII")
_ENTRY = struct.Struct("<QQIIIIHBBI")
_REVOKED = struct.Struct("<II")
_PART = struct.Struct("<QQQ")


_REFUSALS = {
    4: Refusal(
        UsageError,
        "{name} cannot be an entry of the mount",
        "it is not a path, or not of this kind",
        "report it: memconsole asked for it",
    ),
    7: Refusal(NotFound, "the mount has no {name}", "it or its directory is missing", "ls the mount"),
    8: Refusal(
        Refused,
        "the mount has another entry at this path",
        "a revoked entry keeps its path too",
        "remove that entry first",
        "PathTaken",
    ),
    9: Refusal(
        Refused, "the directory on the mount cannot be removed", "it has entries", "remove them first", "NotEmpty"
    ),
    10: Refusal(Refused, "the mount is full", "its table of entries has no room", "remove entries", "MountFull"),
    13: Refusal(
        Refused,
        "the mount is in use",
        "files on it are open or mapped",
        "close the files first: fuser -m names the processes that have them",
        "MountBusy",
    ),
    14: Refusal(Denied, "the mount's server denied this process", "it is not of the server's user", "run as root"),
    15: Refusal(
        Refused,
        "the mount's server takes no more connections",
        "all its connections are in use",
        "close others",
        "FuseBusy",
    ),
}


class _FuseOp:
    GREETING, PUT, REVOKE, REMOVE, LIST, STAT, QUIT = range(7)
    NAMES = ("greeting", "put", "revoke", "remove", "list", "status", "quit")


def _serving(tree: FuseTree, mountpoint: Path) -> FuseTree:
    """The tree, if it is mounted there.

    Raises:
        Refused: it is mounted elsewhere (``OtherMount``).
    """
    if tree.mountpoint == mountpoint.parent.resolve() / mountpoint.name:
        return tree
    tree.close()
    raise Refused(
        f"memory is mounted at {tree.mountpoint} already",
        "there is one mount at a time",
        "unmount it, or use it there",
        code="OtherMount",
    )


def _why_not(errno: int) -> str:
    """Why the kernel shows no RAM as files, by what it said to the offer, or to the first memfd."""
    import errno as numbers

    if errno == numbers.EOPNOTSUPP:
        return "this kernel has no FUSE passthrough (CONFIG_FUSE_PASSTHROUGH, Linux 6.9)"
    if errno == numbers.EPERM:
        return "passing memory through needs CAP_SYS_ADMIN"
    return f"the kernel refused the first memfd: {os.strerror(errno)}"


def _refusal(code: int, errno: int, path: str) -> MemconsoleError:
    """The error for a code that is not OK (``enum code`` in fuse_control.h)."""
    if code == _NO_PASSTHROUGH:
        return Refused(f"{path!r} cannot be a file", _why_not(errno), _UNAVAILABLE, code="NoPassthrough")
    if code == _KERNEL:
        return KernelRefused("memconsole-fuse", errno, what=f"{path!r} could not be done on the mount")
    return refused("the mount's server", _REFUSALS, code, path)


def _receive(connection: socket.socket, op: int, path: str) -> tuple[bool, bytes]:
    """Whether there is more, and the payload of the reply to a request about ``path``.

    Raises:
        OSError: there is none.
        WireError: it is not a reply to this request.
    """
    raw = connection.recv(_REPLY.size + _MAX_PAYLOAD)
    if not raw:
        raise ConnectionResetError("it closed the connection")
    version, answered, code, more, length, errno = _REPLY.unpack_from(raw.ljust(_REPLY.size, b"\0"))
    if version != _VERSION:
        raise WireError(
            f"the mount's server speaks version {version} of its protocol",
            f"this memconsole speaks version {_VERSION}",
            "use the memconsole that started it, or unmount",
        )
    if len(raw) != _REPLY.size + length or answered != op:
        raise WireError("the reply of the mount's server makes no sense", raw[:8].hex())
    if code:
        raise _refusal(code, errno, path)
    return bool(more), raw[_REPLY.size :]


def _status(payload: bytes) -> FuseStatus:
    if len(payload) < _STATUS.size:
        raise WireError("the status of the mount's server makes no sense", f"it has {len(payload)} bytes")
    mountpoint = payload[_STATUS.size :].partition(b"\0")[0]
    return FuseStatus._make((*_STATUS.unpack_from(payload), Path(os.fsdecode(mountpoint))))


def _revoked(payload: bytes) -> OpenAfterRevoke:
    if len(payload) < _REVOKED.size:
        raise WireError("what the mount's server revoked makes no sense", f"it has {len(payload)} bytes")
    count, cut = _REVOKED.unpack_from(payload)
    return OpenAfterRevoke(count, bool(cut))


def _entries(page: bytes) -> Iterator[tuple[int, FuseEntry]]:
    """The ids and entries of one reply to LIST."""
    at = 0
    while at < len(page):
        id, size, mode, uid, gid, open, length, kind, revoked, _ = _ENTRY.unpack_from(page, at)
        at += _ENTRY.size
        path = os.fsdecode(page[at : at + length])
        at += length
        yield id, FuseEntry(path, EntryKind(kind), id, size, mode, uid, gid, open, bool(revoked))
