"""The audit trail: every record of the ledger, kept on disk beyond the memory the ledger describes.

It is off the hot path (a thread writes it) and never an authority: nothing is restored from it, and what is missing is
taken from the ledger again by :meth:`AuditTrail.absorb`. A disk that is full is a finding, also where it is opened. One
SQLite table in WAL mode with synchronous=FULL; a row is keyed by the ledger's chain id and the record's seq, and
stamped with the boot id and the kexec count it was written under.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from memconsole import decoding, unforeseen
from memconsole.backend import database
from memconsole.backend.ledger.log import Record, RecordKind
from memconsole.errors import BadFile, KernelRefused, MemconsoleError
from memconsole.model import Finding, Severity

VERSION = 1
"""Raised when an older memconsole could not read or add a row. Not for a new column with a default, or a new table."""
WAITING_MAX = 10_000

_COLUMNS = "chain, seq, kind, at_ns, boot_id, kexec_count, payload"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    chain TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, at_ns INTEGER NOT NULL,
    boot_id TEXT NOT NULL, kexec_count INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (chain, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_time ON records (at_ns);
"""


class TrailEntry(NamedTuple):
    """A row of the trail; ``at_ns`` is what the record says of itself, else when it was written."""

    chain: str
    seq: int
    kind: str
    at_ns: int
    boot_id: str
    kexec_count: int
    payload: bytes


class _Timed(msgspec.Struct):
    at_ns: int | None = None


class AuditTrail:
    """The trail in a file; every method may be called from any thread, and :meth:`note` never waits for the disk.

    Raises:
        BadFile: the file is no audit trail, is corrupt, of a newer version, or cannot be written.
    """

    def __init__(self, path: Path, chain: str, boot_id: str, kexec_count: int = 0) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._stamp = (chain, boot_id, kexec_count)
        self._waiting: queue.Queue[Record | None] = queue.Queue()
        self._trouble = ""
        self._missed = 0
        self._writing = threading.Lock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with _named(path):
                self._opened()
        except KernelRefused as error:
            self._trouble = error.why
        self._thread = unforeseen.thread("memconsole-audit", self._write)
        self._thread.start()

    def note(self, record: Record) -> None:
        """Have a record written soon; one too many while the disk is slow is missed, and becomes a finding."""
        if self._waiting.qsize() >= WAITING_MAX:
            self._missed += 1
        else:
            self._waiting.put(record)

    def absorb(self, records: Iterable[Record]) -> int:
        """Write the records that are missing, and return how many were; those that no disk has room for are a finding.

        Raises:
            BadFile: they cannot be written.
        """
        missing = list(records)
        try:
            return self._insert_named(missing)
        except KernelRefused as error:
            self._miss(len(missing), error)
            return 0

    def flush(self) -> None:
        """Wait until what was noted is on disk, or became a finding."""
        self._waiting.join()

    def entries(self, *, since_ns: int = 0, limit: int = 1000) -> list[TrailEntry]:
        """The newest ``limit`` entries at or after a time, oldest first.

        Raises:
            BadFile: the file became unreadable. KernelRefused: there is no room to open it.
        """
        with _named(self._path):
            rows = (
                self._opened()
                .execute(
                    f"SELECT {_COLUMNS} FROM records WHERE at_ns >= ? ORDER BY at_ns DESC, seq DESC LIMIT ?",  # noqa: S608 - a constant
                    (since_ns, limit),
                )
                .fetchall()
            )
        return [TrailEntry(*row) for row in reversed(rows)]

    def findings(self) -> list[Finding]:
        """What could not be written, as a finding."""
        if not self._trouble and not self._missed:
            return []
        return [
            Finding(
                id="audit-behind",
                severity=Severity.WARNING,
                subject="audit trail",
                observed=f"up to {self._missed} records are missing from the audit trail",
                evidence=f"{self._path}: {self._trouble or 'the disk is too slow'}",
                remedy="free disk space and restart the control process: it takes them from the ledger again",
            )
        ]

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self._waiting.put(None)
        self._thread.join()
        if self._database is not None:
            self._database.close()

    def _opened(self) -> sqlite3.Connection:
        """The file, opened where there was no room to do it before."""
        if self._database is None:
            self._database = database.opened(self._path, self._prepare)
        return self._database

    def _prepare(self, found: sqlite3.Connection) -> None:
        found.execute("PRAGMA synchronous = FULL")
        version = database.number(found, "user_version")
        if version not in {0, VERSION}:
            raise BadFile(
                f"{self._path} is of version {version}",
                f"this memconsole knows version {VERSION}",
                "use the newer memconsole",
            )
        if version == 0:  # nothing is written to one that is there: its disk may be full
            found.executescript(_SCHEMA)
            found.execute(f"PRAGMA user_version = {VERSION}")

    def _write(self) -> None:
        ended = False
        while not ended:
            batch = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._waiting.get_nowait())
            records = [record for record in batch if record is not None]
            ended = len(records) < len(batch)
            written = unforeseen.attempt("the audit trail", "job", partial(self._insert_named, records))
            if isinstance(written, MemconsoleError):
                self._miss(len(records), written)
            for _ in batch:
                self._waiting.task_done()

    def _miss(self, count: int, error: MemconsoleError) -> None:
        self._trouble = error.why
        self._missed += count

    def _insert_named(self, records: list[Record]) -> int:
        with _named(self._path):
            return self._insert(records)

    def _insert(self, records: list[Record]) -> int:
        chain, boot_id, kexec_count = self._stamp
        rows = [
            TrailEntry(
                chain, record.seq, _kind(record.kind), time_of(record.payload), boot_id, kexec_count, record.payload
            )
            for record in records
        ]
        with self._writing:
            found = self._opened()
            before = found.total_changes
            with database.transaction(found):
                found.executemany(
                    f"INSERT OR IGNORE INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - a constant
                    rows,
                )
            return found.total_changes - before


def _kind(kind: int) -> str:
    return RecordKind(kind).name.lower() if kind in RecordKind.__members__.values() else str(kind)


def time_of(payload: bytes) -> int:
    """When a record says it was made, ns since the epoch; else now."""
    try:
        said = decoding.json(payload, _Timed, what="a record").at_ns
    except decoding.Undecodable:
        said = None
    return time.time_ns() if said is None else said


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if database.is_full(error):
            raise KernelRefused(str(path), errno.ENOSPC, remedy="free disk space") from None
        raise BadFile(
            f"the audit trail {path} cannot be used",
            str(error),
            "move it away: a new one is created from what the ledger still holds",
        ) from None
