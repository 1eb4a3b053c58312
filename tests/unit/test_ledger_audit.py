"""The audit trail: a copy of the ledger's records that is never in the way and never an authority."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memconsole.backend import database
from memconsole.backend.ledger import trail
from memconsole.backend.ledger.log import Record, RecordKind
from memconsole.backend.ledger.trail import AuditTrail
from memconsole.errors import BadFile


@pytest.fixture
def written(tmp_path: Path) -> Iterator[AuditTrail]:
    made = AuditTrail(tmp_path / "audit.db", "chain-1", "boot-2", 3)
    yield made
    made.close()


def test_what_is_noted_is_found_with_its_stamp(written: AuditTrail) -> None:
    written.note(Record(1, RecordKind.INTENT, b'{"at_ns": 5, "peer": "root"}'))
    written.note(Record(2, RecordKind.DONE, b"\xff not json"))
    written.flush()
    first, second = written.entries()
    assert first == ("chain-1", 1, "intent", 5, "boot-2", 3, b'{"at_ns": 5, "peer": "root"}')
    assert second.kind == "done"
    assert second.at_ns > 10**18
    assert written.entries(since_ns=6) == [second]
    assert written.entries(limit=1) == [second]
    assert written.findings() == []


def test_what_is_missing_is_taken_from_the_ledger_once(written: AuditTrail) -> None:
    records = [Record(n, RecordKind.EVENT, b'{"at_ns": %d}' % n) for n in range(1, 6)]
    written.note(records[2])
    written.flush()
    assert written.absorb(records) == 4
    assert written.absorb(records) == 0
    assert [entry.seq for entry in written.entries()] == [1, 2, 3, 4, 5]


def test_it_is_kept_over_restarts_and_chains(tmp_path: Path) -> None:
    for chain in ("chain-1", "chain-2"):
        made = AuditTrail(tmp_path / "state" / "audit.db", chain, "boot", 0)
        made.note(Record(1, RecordKind.EVENT, b"{}"))
        made.close()
    made = AuditTrail(tmp_path / "state" / "audit.db", "chain-2", "boot", 0)
    assert sorted(entry.chain for entry in made.entries()) == ["chain-1", "chain-2"]
    made.close()
    assert (tmp_path / "state" / "audit.db").stat().st_mode & 0o777 == 0o600


def test_noting_does_not_wait_for_the_disk_and_what_is_missed_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trail, "WAITING_MAX", 5)
    made = AuditTrail(tmp_path / "audit.db", "chain-1", "boot", 0)
    blocker = sqlite3.connect(tmp_path / "audit.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # the writer waits for this lock; noting goes on
    records = [Record(n, RecordKind.EVENT, b"{}") for n in range(1, 30)]
    for record in records:
        made.note(record)
    blocker.execute("ROLLBACK")
    blocker.close()
    made.flush()
    (finding,) = made.findings()
    assert finding.id == "audit-behind"
    written = len(made.entries())
    assert finding.observed.startswith(f"up to {29 - written} records")
    assert made.absorb(records) == 29 - written
    made.close()


def test_a_write_that_fails_is_a_finding_and_the_next_one_goes_on(written: AuditTrail, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "audit.db", isolation_level=None)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    written.note(Record(1, RecordKind.EVENT, b"{}"))
    written.flush()
    assert "disk full" in written.findings()[0].evidence
    with pytest.raises(BadFile, match="disk full"):
        written.absorb([Record(1, RecordKind.EVENT, b"{}")])
    other.execute("DROP TRIGGER full")
    other.close()
    assert written.absorb([Record(1, RecordKind.EVENT, b"{}")]) == 1


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE])
def test_a_disk_that_is_full_as_it_begins_is_a_finding_and_what_comes_later_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> sqlite3.Connection:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(database, "opened", full)
        made = AuditTrail(tmp_path / "audit.db", "chain-1", "boot", 0)
        assert made.absorb([Record(1, RecordKind.EVENT, b"{}")]) == 0
        made.note(Record(2, RecordKind.EVENT, b"{}"))
        made.flush()
        (finding,) = made.findings()
        assert (finding.id, finding.observed.split(" are")[0]) == ("audit-behind", "up to 2 records")
        assert "No space left" in finding.evidence
    made.note(Record(3, RecordKind.EVENT, b"{}"))
    made.close()
    again = AuditTrail(tmp_path / "audit.db", "chain-1", "boot", 0)
    assert again.absorb([Record(n, RecordKind.EVENT, b"{}") for n in (1, 2, 3)]) == 2
    assert (len(again.entries()), again.findings()) == (3, [])
    again.close()


def test_threads_may_note_and_read_at_once(written: AuditTrail) -> None:
    def note(base: int) -> None:
        for n in range(200):
            written.note(Record(base + n, RecordKind.EVENT, b"{}"))
            if n % 50 == 0:
                written.entries()

    threads = [threading.Thread(target=note, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written.flush()
    assert len(written.entries()) == 800


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_trail_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "audit.db"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"audit\.db"):
        AuditTrail(path, "chain-1", "boot", 0)
    assert path.read_bytes() == content


def test_a_newer_trail_is_refused_by_version(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "audit.db")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(BadFile, match="version 9"):
        AuditTrail(tmp_path / "audit.db", "chain-1", "boot", 0)
