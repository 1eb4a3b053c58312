"""The audit trail: every record of the ledger, kept on disk beyond the memory the ledger describes.

It is off the hot path (a thread writes it) and never an authority: nothing is restored from it, and what is missing is
taken from the ledger again by :meth:`Audit.absorb`. One SQLite table in WAL mode with synchronous=FULL; a row is keyed
by the ledger's chain id and the record's seq, and stamped with the boot id and the kexec count it was written under.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from memconsole.backend.ledger import Kind, Record
from memconsole.errors import BadFile
from memconsole.model import Finding, Severity

VERSION = 1
WAITING_MAX = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    chain TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, at_ns INTEGER NOT NULL,
    boot_id TEXT NOT NULL, kexec_count INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (chain, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_time ON records (at_ns);
"""


class Entry(NamedTuple):
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


class Audit:
    """The trail in a file; every method may be called from any thread, and :meth:`note` never waits for the disk.

    Raises:
        BadFile: the file is no audit trail, is corrupt, of a newer version, or cannot be written.
    """

    def __init__(self, path: Path, chain: str, boot_id: str, kexec_count: int = 0) -> None:
        self._path = path
        self._stamp = (chain, boot_id, kexec_count)
        self._waiting: queue.Queue[Record | None] = queue.Queue()
        self._trouble = ""
        self._missed = 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with _named(path):
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
        self._thread.start()

    def note(self, record: Record) -> None:
        """Have a record written soon; one too many while the disk is slow is missed, and becomes a finding."""
        if self._waiting.qsize() >= WAITING_MAX:
            self._missed += 1
        else:
            self._waiting.put(record)

    def absorb(self, records: Iterable[Record]) -> int:
        """Write the records that are missing, and return how many were.

        Raises:
            BadFile: they cannot be written.
        """
        with _named(self._path):
            return self._insert(list(records))

    def flush(self) -> None:
        """Wait until what was noted is on disk, or became a finding."""
        self._waiting.join()

    def entries(self, *, since_ns: int = 0, limit: int = 1000) -> list[Entry]:
        """The newest ``limit`` entries at or after a time, oldest first.

        Raises:
            BadFile: the file became unreadable.
        """
        with _named(self._path):
            rows = self._database.execute(
                "SELECT * FROM records WHERE at_ns >= ? ORDER BY at_ns DESC, seq DESC LIMIT ?", (since_ns, limit)
            ).fetchall()
        return [Entry(*row) for row in reversed(rows)]

    def findings(self) -> list[Finding]:
        """What could not be written, as a finding."""
        if not self._trouble and not self._missed:
            return []
        return [
            Finding(
                id="audit-behind",
                severity=Severity.WARNING,
                subject="audit trail",
                what=f"{self._missed} records are not in the audit trail",
                evidence=f"{self._path}: {self._trouble or 'the disk is too slow'}",
                remedy="free disk space and restart the control process: it takes them from the ledger again",
            )
        ]

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self._waiting.put(None)
        self._thread.join()
        self._database.close()

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in {0, VERSION}:
            raise BadFile(
                f"{self._path} is of version {version}", f"this memconsole knows version {VERSION}", "use the newer one"
            )
        self._database.executescript(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {VERSION}")

    def _write(self) -> None:
        ended = False
        while not ended:
            batch = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._waiting.get_nowait())
            records = [record for record in batch if record is not None]
            ended = len(records) < len(batch)
            try:
                self._insert(records)
            except sqlite3.Error as error:
                self._trouble = str(error)
                self._missed += len(records)
            for _ in batch:
                self._waiting.task_done()

    def _insert(self, records: list[Record]) -> int:
        chain, boot_id, kexec_count = self._stamp
        rows = [
            Entry(chain, record.seq, _kind(record.kind), _time_of(record.payload), boot_id, kexec_count, record.payload)
            for record in records
        ]
        with self._writing:
            before = self._database.total_changes
            self._database.execute("BEGIN")
            try:
                self._database.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
                self._database.execute("COMMIT")
            except sqlite3.Error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            return self._database.total_changes - before


def _kind(kind: int) -> str:
    return Kind(kind).name.lower() if kind in Kind.__members__.values() else str(kind)


def _time_of(payload: bytes) -> int:
    try:
        said = msgspec.json.decode(payload, type=_Timed).at_ns
    except msgspec.DecodeError:
        said = None
    return time.time_ns() if said is None else said


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BadFile(
            f"the audit trail {path} cannot be used",
            str(error),
            "move it away: a new one is made, and what the ledger still holds is written again",
        ) from None
