"""The snapshots of the past: a bounded SQLite file in WAL mode that one process writes and several read.

Grammar of the store::

    store    = "snapshots.sqlite" lock      a directory of mode 0700, with the log (-wal) and index (-shm) of SQLite
    frames   = key chapter payload          a table: ``key`` is the Snapshot's ``taken_ns``, or one more than the key
                                            before it where the clock went back; ``chapter`` is the key of the frame
                                            that begins its chapter
    payload  = zlib(text, dictionary)       the dictionary ends with what was inflated before it in the chapter, and the
                                            two keys as u64, so that zlib's own checksums tell a frame in a wrong place
    maps                                    PFN maps, a table of their own (:mod:`.maps`)
    text                                    a chapter's first: the Snapshot as JSON; else what changed since the frame
                                            before (:mod:`.json_delta`)

A chapter is written in one go: one that another process began is never appended to. A commit is on disk when SQLite has
checkpointed it; a process that is killed loses nothing, a host that loses power the last moments. The oldest chapters
are removed when the store exceeds its bounds.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from memconsole import decoding
from memconsole.backend import database
from memconsole.backend.history import json_delta, maps
from memconsole.errors import BadFile
from memconsole.model import Snapshot
from memconsole.source import nothing_at
from memconsole.upgrading import upgraded

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

FILE = "snapshots.sqlite"
APPLICATION = 0x4D434853
"""What SQLite's ``application_id`` says of such a file: ``MCHS``."""
VERSION = 2
"""Raised when an older memconsole could not read or add a frame; not for a column with a default, or another table.

What a frame holds is a Snapshot, with a version and a rule of its own.
"""
LARGEST_FRAME = 64 << 20
"""Bytes that a frame may inflate to: a Snapshot of tens of thousands of regions."""

SCHEMA = "CREATE TABLE frames (key INTEGER PRIMARY KEY, chapter INTEGER NOT NULL, payload BLOB NOT NULL)"
_PLACE = struct.Struct("<qq")
_WINDOW = (1 << 15) - 512
"""Bytes of what went before that a dictionary has: deflate looks back 32 KiB, a little of it always ahead."""
_LEVEL = 6


class Chapter:
    """A place in a chapter: the Snapshot there as JSON values, and what the next frame is packed with."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.key = start
        self.frames = 0
        self.value: Any = None
        self._before = b""

    def packed(self, key: int, text: bytes) -> bytes:
        """The payload of the next frame."""
        packer = zlib.compressobj(_LEVEL, zdict=self._dictionary(key))
        return packer.compress(text) + packer.flush()

    def text(self, key: int, payload: bytes, what: str) -> bytes:
        """What the next frame holds.

        Raises:
            Undecodable: its payload is damaged, or it is not the next one.
        """
        return decoding.inflated(payload, dictionary=self._dictionary(key), limit=LARGEST_FRAME, what=what)

    def append(self, key: int, text: bytes) -> None:
        """Go on behind a frame; its Snapshot is not looked at."""
        self.key = key
        self.frames += 1
        self._before = (self._before + text)[-_WINDOW:]

    def read(self, key: int, payload: bytes, what: str) -> None:
        """Go on to the next frame, and its Snapshot.

        Raises:
            BadFile: it is damaged; no other call may follow.
        """
        text = self.text(key, payload, what)
        value = decoding.json(text, what=what)
        if self.frames:
            with decoding.named(what, ""):
                value = json_delta.apply(self.value, value)
        if not isinstance(value, dict):
            raise BadFile(f"{what} is damaged", "it is no snapshot", "memconsole inspect FILE says what is left")
        self.value = value
        self.append(key, text)

    def _dictionary(self, key: int) -> bytes:
        return self._before + _PLACE.pack(self.start, key)


def check(found: sqlite3.Connection, path: Path) -> None:
    """Nothing, for a history of this version.

    Raises:
        BadFile: it is none, or of a newer version.
        sqlite3.Error: it cannot be read.
    """
    if database.number(found, "application_id") != APPLICATION:
        raise BadFile(f"{path} is no history", "it is a database of another program", "choose another file")
    version = database.number(found, "user_version")
    if version != VERSION:
        raise BadFile(
            f"{path} is of version {version}", f"this memconsole knows version {VERSION}", "use the newer memconsole"
        )
    database.check_table(found, "frames", path)


def frames(found: sqlite3.Connection, first: int, last: int, chapter: int) -> list[tuple[int, bytes]]:
    """The key and payload of a chapter's frames, by key; one that is too large is empty.

    All at once: while rows are left to be fetched, the writer's log can only grow.
    """
    query = (
        "SELECT key, CASE WHEN length(payload) <= ? THEN payload ELSE x'' END FROM frames"
        " WHERE key BETWEEN ? AND ? AND chapter = ? ORDER BY key"
    )
    return found.execute(query, (LARGEST_FRAME, first, last, chapter)).fetchall()


class History:
    """The store in a directory, to look at, from one thread at a time; see ``recorder`` for writing."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._database: sqlite3.Connection | None = None
        self._inode = 0
        self._chapter: Chapter | None = None

    def times(self, after: int = 0) -> list[int]:
        """The time of every Snapshot recorded, ns since the epoch, oldest first; only those above ``after``.

        Raises:
            BadFile: the file is damaged, or of another version.
        """
        with self._looking() as found:
            if found is None:
                return []
            return [key for (key,) in found.execute("SELECT key FROM frames WHERE key > ? ORDER BY key", (after,))]

    def at(self, time_ns: int) -> Snapshot:
        """The Snapshot that was current at ``time_ns``: the last one taken until then.

        Raises:
            NotFound: none was recorded until then.
            BadFile: the file is damaged before it, or of another version.
        """
        with self._looking() as found:
            query = "SELECT key, chapter FROM frames WHERE key <= ? ORDER BY key DESC LIMIT 1"
            row = found.execute(query, (time_ns,)).fetchone() if found is not None else None
            if found is None or row is None:
                raise nothing_at(self.times()[:1])
            value = self._read(found, *row)
        return decoding.convert(
            upgraded(value), Snapshot, what=f"the snapshot in {self.path}", remedy="use the memconsole that wrote it"
        )

    def map_at(self, key: str, at_ns: int) -> ExtentTable:
        """The PFN map of a key as it was last scanned until a time, which the caller closes.

        Raises:
            NotFound: none was recorded until then. BadFile: it is damaged.
        """
        with self._looking() as found:
            return maps.at(found, key, at_ns, self.path)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
        self._database = self._chapter = None

    def _read(self, found: sqlite3.Connection, key: int, start: int) -> Any:
        """The Snapshot of a frame as JSON values; from where the last one was read, if that is on the way."""
        chapter, self._chapter = self._chapter, None
        if chapter is None or chapter.start != start or chapter.key > key:
            chapter = Chapter(start)
        first = chapter.key + 1 if chapter.frames else start
        for frame, payload in frames(found, first, key, start):
            chapter.read(frame, payload, f"the frame of {frame} in {self.path}")
        if not chapter.frames or chapter.key != key:
            raise BadFile(
                f"{self.path} is damaged",
                f"frames of the chapter that begins at {start} are missing",
                "memconsole inspect FILE says what is left",
            )
        self._chapter = chapter
        return chapter.value

    @contextlib.contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection | None]:
        """The file, opened again where another one took its place; None where there is none."""
        try:
            yield self._opened()
        except sqlite3.Error as error:
            self.close()
            raise BadFile(
                f"the history {self.path} cannot be read", str(error), "memconsole inspect FILE says what is left"
            ) from None

    def _opened(self) -> sqlite3.Connection | None:
        try:
            inode = self.path.stat().st_ino
        except OSError:
            self.close()
            return None
        if self._database is None or inode != self._inode:
            self.close()
            found = database.looked_at(self.path)
            try:
                check(found, self.path)
            except BaseException:
                found.close()
                raise
            self._database, self._inode = found, inode
        return self._database


def encode(snapshot: Snapshot) -> Any:
    """A Snapshot as JSON values, without its tables."""
    return decoding.json(msgspec.json.encode(msgspec.structs.replace(snapshot, tables=())), what="the snapshot")
