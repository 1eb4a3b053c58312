"""The one writer of a history: it keeps the bounds, sets aside what is damaged, and takes former files over.

A damaged file, and one of another version, is never written to and never removed: it is renamed, a finding names it,
and recording goes on in a new one. At most one of each is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from memconsole import paths
from memconsole.backend import database
from memconsole.backend.history import former, json_delta, maps
from memconsole.backend.history.store import APPLICATION, FILE, SCHEMA, VERSION, Chapter, check, encode
from memconsole.errors import BadFile, KernelRefused, Refused
from memconsole.model import Finding, Severity, Snapshot

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

log = logging.getLogger("memconsole.history")

FRAMES_A_CHAPTER = 300
MAX_BYTES = 100 << 20
MAX_AGE_NS = 7 * 24 * 3600 * 10**9
DAMAGED, OTHER = "damaged.sqlite", "other-version.sqlite"
"""What a file is called once it is set aside."""

_LOG_MAX = 1 << 20
_ROOM_A_FRAME = 64
_ERRNOS = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS, sqlite3.SQLITE_PERM: errno.EACCES}


class Recorder:
    """The one writer of a store.

    Raises:
        Refused: another process records there (``HistoryTaken``), or others may write there (``NotPrivate``).
        KernelRefused: the directory cannot be used.
    """

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES, max_age_ns: int = MAX_AGE_NS) -> None:
        self._directory = directory
        self._path = directory / FILE
        self._log_bytes = min(_LOG_MAX, max_bytes // 16)
        self._max_bytes = max_bytes
        self._max_age_ns = max_age_ns
        self._database: sqlite3.Connection | None = None
        self._inode = 0
        self._chapter: Chapter | None = None
        self._chapter_bytes = 0
        self._last = 0
        self._aside: dict[Path, str] = {}
        with self._named():
            paths.make_directory(directory, 0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                self._take_lock()
                self._aside.update({directory / name: "" for name in (DAMAGED, OTHER)})
                self._former = sorted(directory.glob(f"*{former.SUFFIX}"))
                self._begin()
            except BaseException:
                os.close(self._lock)
                raise

    def _begin(self) -> None:
        """Open the file; where a disk has no room for it, that is said of the first Snapshot that is to be recorded."""
        try:
            self._writable()
        except sqlite3.Error as error:
            self._close()
            if not database.is_full(error):
                raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = f"another process records in {self._directory}"
            raise Refused(
                taken,
                "a history has one writer",
                "stop the other process, or give this one another state directory",
                code="HistoryTaken",
            ) from None

    def findings(self) -> Sequence[Finding]:
        """The files that were set aside and are there yet."""
        return [_finding(path, why) for path, why in self._aside.items() if path.exists()]

    def record(self, snapshot: Snapshot) -> None:
        """Append a Snapshot (without its tables), and remove what exceeds the bounds.

        Raises:
            KernelRefused: it cannot be written; nothing of it is left.
        """
        value = encode(snapshot)
        with self._named():
            try:
                self._append(snapshot.taken_ns, value)
            except sqlite3.DatabaseError as error:
                if not database.is_damage(error):
                    raise
                self._set_aside(DAMAGED, str(error))
                self._append(snapshot.taken_ns, value)
            self._take_over()

    def record_map(self, key: str, table: ExtentTable) -> bool:
        """Record a PFN map, unless it is as it was. Whether there is room for one of its size.

        Raises:
            KernelRefused: it cannot be written; nothing of it is left.
        """
        with self._named():
            oldest = table.scanned_ns - self._max_age_ns
            return maps.record(self._writable(), key, table, max_bytes=self._max_bytes, oldest_ns=oldest)

    def close(self) -> None:
        """Close the file and let another process record."""
        self._close()
        os.close(self._lock)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _append(self, taken_ns: int, value: object) -> None:
        found = self._writable()
        key = max(taken_ns, self._last + 1)
        chapter = self._chapter
        if chapter is None or chapter.frames >= FRAMES_A_CHAPTER or self._chapter_bytes > self._max_bytes // 16:
            chapter, self._chapter_bytes = Chapter(key), 0
        text = msgspec.json.encode(json_delta.between(chapter.value, value) if chapter.frames else value)
        payload = chapter.packed(key, text)
        with database.transaction(found):
            self._make_room(found, key, chapter.start, len(payload))
            found.execute("INSERT INTO frames VALUES (?, ?, ?)", (key, chapter.start, payload))
        chapter.append(key, text)
        chapter.value = value
        self._chapter, self._last = chapter, key
        self._chapter_bytes += len(payload)

    def _make_room(self, found: sqlite3.Connection, now: int, present: int, more: int) -> None:
        """Remove the oldest chapters until the store is within its bounds with so many bytes more."""
        while oldest := found.execute("SELECT chapter FROM frames ORDER BY key LIMIT 1").fetchone():
            if oldest[0] == present:
                return
            query = "SELECT key FROM frames WHERE chapter <> ? ORDER BY key LIMIT 1"
            following = found.execute(query, oldest).fetchone()
            end = following[0] if following is not None else now
            (last,) = found.execute("SELECT max(key) FROM frames WHERE key < ?", (end,)).fetchone()
            if now - last <= self._max_age_ns and self._bytes(found) + more + _ROOM_A_FRAME <= self._max_bytes:
                return
            if self._former:
                self._former.pop(0).unlink(missing_ok=True)
            else:
                found.execute("DELETE FROM frames WHERE key < ?", (end,))

    def _bytes(self, found: sqlite3.Connection) -> int:
        """Bytes that the store takes on disk, with its log at its largest and what is yet to be taken over."""
        pages = database.number(found, "page_count") - database.number(found, "freelist_count")
        left = 0
        for path in self._former:
            with contextlib.suppress(FileNotFoundError):
                left += path.stat().st_size
        return (pages + 2) * database.number(found, "page_size") + 2 * self._log_bytes + left

    # --- the file ---------------------------------------------------------------------------------------------------

    def _writable(self) -> sqlite3.Connection:
        """The file, made anew where there is none any more, or where it cannot be used."""
        if self._database is not None and _inode(self._path) == self._inode:
            return self._database
        self._close()
        try:
            return self._open()
        except BadFile as error:
            self._set_aside(OTHER, str(error))
        except sqlite3.DatabaseError as error:
            if not database.is_damage(error):
                raise
            self._set_aside(DAMAGED, str(error))
        return self._open()

    def _open(self) -> sqlite3.Connection:
        if self._path.exists():  # nothing is written to a file before it is known to be one of this version
            with contextlib.closing(database.looked_at(self._path)) as seen:
                if database.number(seen, "schema_version"):
                    check(seen, self._path)
        found = database.opened(self._path, self._prepare)
        self._database, self._inode = found, _inode(self._path)
        return found

    def _prepare(self, found: sqlite3.Connection) -> None:
        found.execute("PRAGMA synchronous = NORMAL")
        found.execute(f"PRAGMA wal_autocheckpoint = {max(1, self._log_bytes // 4096)}")
        found.execute(f"PRAGMA journal_size_limit = {self._log_bytes}")
        if database.number(found, "schema_version") == 0:
            with database.transaction(found):
                found.execute(SCHEMA)
                found.execute(f"PRAGMA application_id = {APPLICATION}")
                found.execute(f"PRAGMA user_version = {VERSION}")
        found.execute(maps.SCHEMA)
        (last,) = found.execute("SELECT max(key) FROM frames").fetchone()
        self._last = max(self._last, last or 0)
        found.execute("SELECT key FROM frames ORDER BY key LIMIT 1").fetchone()

    def _set_aside(self, name: str, why: str) -> None:
        """Rename the file, in the place of one that was set aside before; its log goes along."""
        self._close()
        place = self._directory / name
        for suffix in ("-wal", "-shm"):
            Path(f"{place}{suffix}").unlink(missing_ok=True)
        self._path.replace(place)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{self._path}-wal").replace(f"{place}-wal")
        Path(f"{self._path}-shm").unlink(missing_ok=True)
        self._aside[place] = why

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = self._chapter = None

    # --- files of format 1 ------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Take one former file over into the store, the newest first, and remove it; one that is not read is kept."""
        if not self._former:
            return
        path = self._former[-1]
        chapter: Chapter | None = None
        rows = []
        try:
            for key, text in former.texts(path):
                chapter = chapter or Chapter(key)
                rows.append((key, chapter.start, chapter.packed(key, text)))
                chapter.append(key, text)
        except BadFile as error:
            log.warning("%s is taken over up to where it is damaged: %s", path, error)
            if not rows:
                self._aside[path] = str(error)
        found = self._writable()
        (first,) = found.execute("SELECT min(key) FROM frames").fetchone()
        if rows and rows[-1][0] < first:
            with database.transaction(found):
                found.executemany("INSERT INTO frames VALUES (?, ?, ?)", rows)
        if path not in self._aside:
            path.unlink(missing_ok=True)
        self._former.pop()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the file and of SQLite as what they mean."""
        what, remedy = f"the history in {self._directory}", "free disk space or choose another directory"
        try:
            yield
        except OSError as error:
            raise KernelRefused(what, error.errno or 0, remedy=remedy) from None
        except sqlite3.Error as error:
            self._close()
            raise KernelRefused(
                what, _ERRNOS.get(database.code(error), errno.EIO), remedy=remedy, what=f"{what}: {error}"
            ) from None


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return 0


def _finding(path: Path, why: str) -> Finding:
    return Finding(
        id="history-damaged",
        severity=Severity.WARNING,
        subject=path.name,
        observed=f"the snapshots in {path.name} of the history are not shown",
        evidence=f"{path}: {why}" if why else str(path),
        remedy=f"memconsole inspect {path} says what is left; the finding ends once the file is moved away",
    )
