"""Custody in the service manager's fd store (systemd, ``FileDescriptorStoreMax=``).

The store takes fds under names and gives all of them back when the service starts again; it has no payloads, and
drops an fd that is the same open file as one it holds. So files and names are stored apart::

    mc.f.ID      a file put into custody, stored once however many names it has
    mc.e.ID      a memfd: "MCENTRY1" crc:u32 file:u64 serial:u64 name_len:u8 name payload      (little-endian)

``crc`` is zlib's CRC-32 of what follows it. The magic's last digit is raised by any change: an entry of another one is
kept, and so is every file then, for it may be the one that it names. The file is stored first, then the entry, then
what the entry replaces is removed: of two entries of one name the one with the higher serial counts. Every change ends
with a barrier, so that it is in the store when the call returns. Sources: sd_notify(3), sd_listen_fds(3), fcntl(2)
F_DUPFD_QUERY.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from memconsole.backend.custody.holder import ANSWERS, boot_loaded, check, nothing_held
from memconsole.backend.peers import notify
from memconsole.backend.peers.turns import Turn
from memconsole.errors import BadFile, Gone, KernelRefused, MemconsoleError, Refused, Silent

_FILE, ENTRY = "mc.f.", "mc.e."
_MAGIC = b"MCENTRY1"
_ANY_MAGIC = b"MCENTRY"
_HEAD = struct.Struct("<8sI")
_BODY = struct.Struct("<QQB")
_F_DUPFD_QUERY = 1027
_BARRIER_SECONDS = 5.0


def inherited(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """The fds the service manager passed to this process, with their names; asked for once, then forgotten.

    Both stored fds and activated sockets come this way; the names tell them apart.
    """
    count = int(environ.pop("LISTEN_FDS", "0")) if environ.pop("LISTEN_PID", "") == str(os.getpid()) else 0
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    found = []
    for n in range(count):
        os.set_inheritable(3 + n, False)
        found.append((names[n] if n < len(names) else "", 3 + n))
    return found


@dataclass(frozen=True)
class _StoreEntry:
    id: int
    fd: int
    file: int
    serial: int
    name: str
    payload: bytes


def _same_file(a: int, b: int) -> bool:
    """Whether two fds are the same open file, as the service manager will judge."""
    try:
        return bool(fcntl.fcntl(a, _F_DUPFD_QUERY, b))
    except OSError as error:
        raise KernelRefused(
            "fcntl F_DUPFD_QUERY", error.errno or 0, remedy="on kernels before 6.10 use the keeper instead"
        ) from None


def _is_newer(fd: int) -> bool:
    """Whether a stored entry is one that another version wrote."""
    magic = os.pread(fd, len(_MAGIC), 0)
    return magic.startswith(_ANY_MAGIC) and len(magic) == len(_MAGIC) and magic != _MAGIC


def _read_entry(id: int, fd: int) -> _StoreEntry:
    raw = os.pread(fd, 1 << 16, 0)
    body = raw[_HEAD.size :]
    if len(body) < _BODY.size or _HEAD.unpack_from(raw) != (_MAGIC, zlib.crc32(body)):
        raise BadFile(f"entry {ENTRY}{id} of the fd store cannot be read")
    file, serial, length = _BODY.unpack_from(body)
    rest = body[_BODY.size :]
    return _StoreEntry(id, fd, file, serial, os.fsdecode(rest[:length]), rest[length:])


class SystemdCustody:
    """Fds held by the service manager; ``stored`` are those it gave back (:func:`inherited`), which this takes over.

    ``lost`` names what cannot be given back: an entry whose file the manager dropped, or one that cannot be read.

    Raises:
        Refused: the service has no fd store (``CustodyMissing``).
    """

    label = "systemd's fd store"
    survives = True
    resumes = False

    def __init__(self, stored: list[tuple[str, int]], environ: MutableMapping[str, str] = os.environ) -> None:
        self._room = int(environ.get("FDSTORE", "0"))
        self._address = notify.address(environ)
        if not self._room or not self._address:
            raise Refused(
                "the service manager offers no fd store",
                "FDSTORE or NOTIFY_SOCKET is not set",
                "set FileDescriptorStoreMax= in the unit (systemd 254 or newer), or use the keeper",
                code="CustodyMissing",
            )
        self._lost: list[str] = []
        self._turn = Turn(self.label)
        self._files: dict[int, int] = {}
        self._entries: dict[str, _StoreEntry] = {}
        self._newer: list[tuple[str, int]] = []
        self._last = 0
        with self._turn.taken("what it holds", ANSWERS):
            self._adopt([(name, fd) for name, fd in stored if name.startswith((_FILE, ENTRY))])

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """See :class:`~.custody.Custody`."""
        raw = check(name, payload)
        with self._turn.taken(f"put {name}", ANSWERS):
            old = self._entries.get(name)
            file = next((id for id, held in self._files.items() if _same_file(held, fd)), None)
            needed = 1 + (file is None)
            if len(self._files) + len(self._entries) + needed > self._room:
                raise Refused(
                    f"the fd store cannot hold {name!r}",
                    f"FileDescriptorStoreMax={self._room} is reached",
                    "raise FileDescriptorStoreMax= in the unit",
                    code="CustodyFull",
                )
            if file is None:
                file = self._next()
                copy = os.dup(fd)
                try:
                    self._store(f"{_FILE}{file}", copy)
                except MemconsoleError:
                    os.close(copy)
                    raise
                self._files[file] = copy
            self._entries[name] = self._store_entry(file, name, raw, payload)
            if old is not None:
                self._remove(old)
            self._barrier()

    def get(self, name: str) -> tuple[int, bytes]:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken(f"get {name}", ANSWERS):
            entry = self._entries.get(name)
            if entry is None:
                raise nothing_held(name)
            return os.dup(self._files[entry.file]), entry.payload

    def drop(self, name: str) -> None:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken(f"drop {name}", ANSWERS):
            if name not in self._entries:
                raise nothing_held(name)
            self._remove(self._entries.pop(name))
            self._barrier()

    def names(self) -> list[str]:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken("its names", ANSWERS):
            return sorted(self._entries)

    def jump(self) -> None:
        """See :class:`~.custody.Custody`; the service manager holds until the end, whoever makes the jump."""
        boot_loaded()

    def check(self) -> None:
        """See :class:`~.custody.Custody`; it is asked at every change, and does not go without this process."""

    @property
    def lost(self) -> tuple[str, ...]:
        """See :class:`~.custody.Custody`; names of the store itself (``mc.e.ID``) where an entry cannot be read."""
        return tuple(self._lost)

    def unguarded(self) -> list[str]:
        """See :class:`~.custody.Custody`; the service manager is PID 1."""
        return []

    def bind(self, pid: int) -> None:
        """See :class:`~.custody.Custody`; the service manager outlives this process."""

    def troubles(self) -> list[str]:
        """See :class:`~.custody.Custody`."""
        return [
            f"the service manager holds {name}, which another version stored, and keeps it" for name, _ in self._newer
        ]

    def close(self) -> None:
        """Close this process's copies; the service manager keeps its own."""
        with self._turn.taken("its end", ANSWERS):
            newer = (fd for _, fd in self._newer)
            for fd in [*self._files.values(), *(entry.fd for entry in self._entries.values()), *newer]:
                os.close(fd)
            self._files, self._entries = {}, {}

    def _next(self) -> int:
        self._last += 1
        return self._last

    def _adopt(self, stored: list[tuple[str, int]]) -> None:
        """Put files and entries together again, and remove from the store what no entry needs."""
        entries = self._sorted_out(stored)
        for entry in sorted(entries, key=lambda entry: entry.serial):
            self._last = max(self._last, entry.serial)
            old = self._entries.pop(entry.name, None)
            if old is not None:
                self._forget(f"{ENTRY}{old.id}", old.fd)
            self._entries[entry.name] = entry
        for entry in list(self._entries.values()):
            if entry.file not in self._files:
                self._lost.append(entry.name)
                self._forget(f"{ENTRY}{entry.id}", self._entries.pop(entry.name).fd)
        used = {entry.file for entry in self._entries.values()}
        for id in self._files.keys() - used if not self._newer else ():
            self._forget(f"{_FILE}{id}", self._files.pop(id))
        if stored:
            self._barrier()

    def _sorted_out(self, stored: list[tuple[str, int]]) -> list[_StoreEntry]:
        """The entries that can be read; files and entries of other versions are held, what is broken is removed."""
        entries: list[_StoreEntry] = []
        for name, fd in stored:
            id = int(name[len(_FILE) :])
            self._last = max(self._last, id)
            if name.startswith(ENTRY) and _is_newer(fd):
                self._newer.append((name, fd))
                continue
            if name.startswith(_FILE):
                self._files[id] = fd
                continue
            try:
                entries.append(_read_entry(id, fd))
            except BadFile:
                self._lost.append(name)
                self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
                os.close(fd)
        return entries

    def _store_entry(self, file: int, name: str, raw: bytes, payload: bytes) -> _StoreEntry:
        id = self._next()
        body = _BODY.pack(file, id, len(raw)) + raw + payload
        fd = os.memfd_create("memconsole-entry", os.MFD_CLOEXEC)
        try:
            os.write(fd, _HEAD.pack(_MAGIC, zlib.crc32(body)) + body)
            self._store(f"{ENTRY}{id}", fd)
        except (OSError, MemconsoleError):
            os.close(fd)
            raise
        return _StoreEntry(id, fd, file, id, name, payload)

    def _remove(self, entry: _StoreEntry) -> None:
        self._forget(f"{ENTRY}{entry.id}", entry.fd)
        if not any(other.file == entry.file for other in self._entries.values()):
            self._forget(f"{_FILE}{entry.file}", self._files.pop(entry.file))

    def _forget(self, name: str, fd: int) -> None:
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        os.close(fd)

    def _store(self, name: str, fd: int) -> None:
        self._notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", [fd])

    def _notify(self, text: str, fds: list[int] | None = None) -> None:
        try:
            notify.send(self._address, text, fds or ())
        except OSError as error:
            raise Gone(
                "the service manager does not answer", str(error), "check NOTIFY_SOCKET", code="CustodyGone"
            ) from None

    def _barrier(self) -> None:
        """Wait until the service manager has taken all that was sent: it closes its copy of a pipe's end."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._notify("BARRIER=1", [writing])
            finally:
                os.close(writing)
            poll = select.poll()
            poll.register(reading, 0)
            if not poll.poll(_BARRIER_SECONDS * 1000):
                raise Silent(
                    "the service manager does not answer",
                    f"no answer to a barrier within {_BARRIER_SECONDS:g} s",
                    "look at the manager's log",
                    code="CustodySilent",
                )
        finally:
            os.close(reading)
