"""The snapshots of the past: a bounded store that is only appended to, and one cursor to walk it.

Grammar of the store (little-endian)::

    store  = file* lock             a directory; a file is named by the key of its first frame, 20 digits, ".history"
    file   = "MCHISTRY" version:u32 zero:u32 frame*
    frame  = key:u64 len:u32 payload_crc:u32 zero:u32 head_crc:u32 payload
    payload                         a piece of the file's one raw deflate stream, ended by a sync flush; it inflates
                                    to the first frame's Snapshot as JSON, or to what changed since the frame before

``key`` is the Snapshot's ``taken_ns``, or one more than the key before it where the clock went back. Heads carry their
own checksum (zlib's CRC-32), so walking them is a trustworthy index without reading the payloads. A file is written by
one process in one go; one that was begun is never appended to again, and what is torn at its end is not believed.
The oldest files are removed when the store exceeds its bounds.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memconsole.backend import leafdelta
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.model import Finding, Severity, Snapshot
from memconsole.source import nothing_at

MAGIC = b"MCHISTRY"
VERSION = 1
SUFFIX = ".history"
FRAMES_A_FILE = 300
MAX_BYTES = 100 << 20
MAX_AGE_NS = 7 * 24 * 3600 * 10**9

_START = struct.Struct("<8sII")
_HEAD = struct.Struct("<QIIII")
_CRC = struct.Struct("<I")
_LEVEL = 6


class Frame(NamedTuple):
    """One recorded Snapshot: when, and where its payload stands in its file."""

    key: int
    offset: int
    length: int
    crc: int


class Index(NamedTuple):
    """The frames of a file, where the whole ones end, its size, and what is wrong with the rest (or nothing)."""

    frames: tuple[Frame, ...]
    end: int
    size: int
    damage: str


def read_index(path: Path) -> Index:
    """The frames of a file by their heads; the payloads are not read.

    Raises:
        BadFile: it cannot be read, is no history, or is of a newer version.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_start(file.read(_START.size), path)
            frames: list[Frame] = []
            at, damage = _START.size, ""
            while at < size and not damage:
                head = os.pread(file.fileno(), _HEAD.size, at)
                frame = _read_head(head, at)
                if frame is None:
                    damage = "a frame's head is not whole"
                elif frame.offset + frame.length > size:
                    damage = "a frame is not whole"
                else:
                    frames.append(frame)
                    at = frame.offset + frame.length
            return Index(tuple(frames), at, size, damage)
    except OSError as error:
        raise BadFile(f"{path} cannot be read", error.strerror or str(error)) from None


def _check_start(raw: bytes, path: Path) -> None:
    if len(raw) < _START.size or raw[:8] != MAGIC:
        raise BadFile(f"{path} is no history", "it does not begin as one")
    version = _START.unpack(raw)[1]
    if version != VERSION:
        raise BadFile(
            f"{path} is of version {version}", f"this memconsole knows version {VERSION}", "use the newer one"
        )


def _read_head(head: bytes, at: int) -> Frame | None:
    if len(head) < _HEAD.size:
        return None
    key, length, crc, _, head_crc = _HEAD.unpack(head)
    return Frame(key, at + _HEAD.size, length, crc) if head_crc == zlib.crc32(head[:-4]) else None


class Replay:
    """The Snapshots of one file, one after the other; ``position`` is that of the present one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = -1
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._value: Any = None

    def advance(self, frames: Sequence[Frame]) -> Any:
        """The Snapshot of the last of the file's first ``frames``, at or behind the present one, as JSON values.

        Raises:
            BadFile: a payload on the way is damaged; no other call may follow.
        """
        with self.path.open("rb") as file:
            for frame in frames[self.position + 1 :]:
                self.position += 1
                payload = os.pread(file.fileno(), frame.length, frame.offset)
                if len(payload) != frame.length or zlib.crc32(payload) != frame.crc:
                    raise BadFile(f"{self.path} is damaged", f"the checksum of frame {self.position} does not match")
                try:
                    value = msgspec.json.decode(self._inflater.decompress(payload))
                    self._value = leafdelta.apply(self._value, value) if self.position else value
                except (zlib.error, msgspec.DecodeError, TypeError, KeyError, IndexError, ValueError) as error:
                    raise BadFile(f"{self.path} is damaged", f"frame {self.position}: {error}") from None
        return self._value


class History:
    """The store in a directory, to look at; see :class:`Recorder` for writing.

    ``refresh`` takes in what was recorded since.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._cursor = Cursor(self)
        self.damaged: dict[Path, str] = {}
        self._indexes: dict[Path, Index] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the heads of the files that are new or grew, and forget those that are gone."""
        indexes: dict[Path, Index] = {}
        self.damaged = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            known = self._indexes.get(path)
            try:
                index = known if known is not None and path.stat().st_size == known.size else read_index(path)
            except FileNotFoundError:  # removed by the recorder in between
                continue
            except BadFile as error:
                self.damaged[path] = str(error)
                continue
            if index.damage:
                self.damaged[path] = index.damage
            if index.frames:
                indexes[path] = index
        self._indexes = indexes

    def times(self) -> list[int]:
        """The time of every Snapshot recorded, ns since the epoch, oldest first."""
        return [frame.key for index in self._indexes.values() for frame in index.frames]

    def nbytes(self) -> int:
        """Bytes the store takes."""
        return sum(index.size for index in self._indexes.values())

    def at(self, time_ns: int) -> Snapshot:
        """The Snapshot that was current at ``time_ns``: the last one taken until then.

        Raises:
            NotFound: none was recorded until then.
            BadFile: its file is damaged before it.
        """
        found = self._cursor.seek(time_ns)
        if found is None:
            raise nothing_at(self.times())
        return found

    def files(self) -> list[tuple[Path, Index]]:
        """The files with at least one whole frame, oldest first."""
        return list(self._indexes.items())


class Cursor:
    """A place in a history, live or not: it sees what is recorded while it stands there.

    ``key`` is the time of the Snapshot it stands on, or None before the first :meth:`seek`.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._replay: Replay | None = None
        self.key: int | None = None

    def seek(self, time_ns: int) -> Snapshot | None:
        """Go to the last Snapshot taken until ``time_ns``; None, and no move, if there is none."""
        files = self._history.files()
        at = bisect.bisect_right([index.frames[0].key for _, index in files], time_ns) - 1
        if at < 0:
            return None
        path, index = files[at]
        return self._stand(path, index, bisect.bisect_right([frame.key for frame in index.frames], time_ns) - 1)

    def previous(self) -> Snapshot | None:
        """Go to the Snapshot before; None, and no move, at the first."""
        return self.seek(self.key - 1) if self.key is not None else None

    def next(self) -> Snapshot | None:
        """Go to the Snapshot behind, also one recorded since; None, and no move, at the last."""
        if self.key is None:
            return None
        self._history.refresh()
        for path, index in self._history.files():
            if index.frames[-1].key > self.key:
                keys = [frame.key for frame in index.frames]
                return self._stand(path, index, bisect.bisect_right(keys, self.key))
        return None

    def _stand(self, path: Path, index: Index, position: int) -> Snapshot:
        replay, self._replay = self._replay, None
        if replay is None or replay.path != path or replay.position > position:
            replay = Replay(path)
        try:
            snapshot = msgspec.convert(replay.advance(index.frames[: position + 1]), type=Snapshot)
        except msgspec.ValidationError as error:
            raise BadFile(f"{path} holds no snapshot of this version", str(error), "use the older memconsole") from None
        except FileNotFoundError:
            raise NotFound(f"{path.name} was removed", "it was older than the store may keep") from None
        self._replay, self.key = replay, index.frames[position].key
        return snapshot


class _File:
    """A file that is being written."""

    def __init__(self, directory: Path, key: int) -> None:
        self.path = directory / f"{key:020d}{SUFFIX}"
        self.size = self.frames = 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._value: Any = None
        try:
            self._write(_START.pack(MAGIC, VERSION, 0))
        except OSError:
            self.close()
            self.path.unlink()
            raise

    def append(self, key: int, value: Any) -> None:
        """Write a frame, or, with an OSError, nothing of it; the stream cannot be taken up again after an error."""
        content = msgspec.json.encode(leafdelta.between(self._value, value) if self.frames else value)
        payload = self._deflater.compress(content) + self._deflater.flush(zlib.Z_SYNC_FLUSH)
        head = _HEAD.pack(key, len(payload), zlib.crc32(payload), 0, 0)[:-4]
        self._write(head + _CRC.pack(zlib.crc32(head)) + payload)
        self._value = value
        self.frames += 1

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(data)


class Recorder:
    """The one writer of a store; opening it cuts what a killed one left torn, and ``findings`` says so.

    Raises:
        Refused: another process records there (``HistoryTaken``).
        KernelRefused: the directory cannot be used.
    """

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES, max_age_ns: int = MAX_AGE_NS) -> None:
        self._max_bytes = max_bytes
        self._max_age_ns = max_age_ns
        self._file: _File | None = None
        self._last = 0
        with _named(f"the history in {directory}"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            taken = f"another process records in {directory}"
            raise Refused(taken, "a store has one writer", code="HistoryTaken") from None
        self.history = History(directory)
        self.findings = [_finding(path, why) for path, why in self.history.damaged.items()]
        self._ended: dict[Path, tuple[int, int]] = {}
        for path, index in self.history.files():
            if index.damage:
                os.truncate(path, index.end)
            self._last = index.frames[-1].key
            self._ended[path] = (index.end, self._last)
        for path in self.history.damaged.keys() - self._ended.keys():
            if path.stat().st_size < _START.size or _is_ours(path):  # begun by a writer that was killed at once
                path.unlink()

    def record(self, snapshot: Snapshot) -> None:
        """Append a Snapshot (without its tables), and remove what exceeds the bounds.

        Raises:
            KernelRefused: it cannot be written; nothing of it is left.
        """
        value = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(snapshot, tables=())))
        key = max(snapshot.taken_ns, self._last + 1)
        with _named(f"the history in {self.history.directory}"):
            file = self._file or _File(self.history.directory, key)
            self._file = file
            try:
                file.append(key, value)
            except OSError:
                self._end_file()
                raise
            self._last = key
            if file.frames >= FRAMES_A_FILE or file.size > self._max_bytes // 16:
                self._end_file()
            self._prune()

    def close(self) -> None:
        """End the present file and let another process record."""
        self._end_file()
        os.close(self._lock)

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
            if file.frames:
                self._ended[file.path] = (file.size, self._last)
            else:
                file.path.unlink()

    def _prune(self) -> None:
        """Remove the oldest files that were ended until the store is within its bounds."""
        total = sum(size for size, _ in self._ended.values()) + (self._file.size if self._file else 0)
        for path, (size, last) in list(self._ended.items()):
            if total <= self._max_bytes and self._last - last <= self._max_age_ns:
                break
            path.unlink(missing_ok=True)
            del self._ended[path]
            total -= size


def _finding(path: Path, why: str) -> Finding:
    return Finding(
        id="history-damaged",
        severity=Severity.WARNING,
        subject=path.name,
        what=f"what was recorded in this file is not believed to its end: {why}",
        evidence=str(path),
        remedy="nothing need be done: a recorder that was killed leaves this; memconsole inspect says what is left",
    )


def _is_ours(path: Path) -> bool:
    try:
        read_index(path)
    except BadFile:
        return False
    return True


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelRefused(what, error.errno or 0, remedy="free disk space or choose another directory") from None
