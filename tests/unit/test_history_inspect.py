"""``inspect``: every file of ours is recognised and checked; every other is a BadFile."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import msgspec
import pytest
from support import synthetic

from memconsole import recording
from memconsole.backend.diagnose.inspect import describe
from memconsole.backend.history.writer import Recorder
from memconsole.backend.ledger.log import Ledger, Record, RecordKind
from memconsole.backend.ledger.trail import AuditTrail
from memconsole.errors import BadFile


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One file of each kind."""
    log = Ledger.create("boot-1", capacity=4096)
    log.append(RecordKind.INTENT, {"name": "web"})
    log.append(RecordKind.DONE, b"\xff")
    log.append(99, b"1")
    (tmp_path / "ledger").write_bytes(log.image())
    log.compact([(RecordKind.STATE, b"{}")])  # its superblock is the other one
    (tmp_path / "compacted").write_bytes(log.image())
    log.close()
    recorder = Recorder(tmp_path / "history")
    for n in range(3):
        recorder.record(msgspec.structs.replace(synthetic.snapshot(3, 2), taken_ns=10 + n))
    recorder.close()
    trail = AuditTrail(tmp_path / "audit.db", "chain-1", "boot", 0)
    trail.note(Record(1, RecordKind.EVENT, b'{"at_ns": 7}'))
    trail.close()
    recording.write(tmp_path / "snapshot.json", synthetic.snapshot(3, 2))
    return {
        "ledger": tmp_path / "ledger",
        "compacted": tmp_path / "compacted",
        "history": tmp_path / "history" / "snapshots.sqlite",
        "audit": tmp_path / "audit.db",
        "snapshot": tmp_path / "snapshot.json",
    }


def test_each_kind_is_recognised_and_whole(files: dict[str, Path]) -> None:
    found = {name: describe(path) for name, path in files.items()}
    assert {name: description.kind for name, description in found.items()} == {
        "ledger": "ledger",
        "compacted": "ledger",
        "history": "history",
        "audit": "audit",
        "snapshot": "snapshot",
    }
    assert all(description.findings == () for description in found.values())
    for description in found.values():
        assert msgspec.json.decode(msgspec.json.encode(description))["file"] == description.file
    assert found["ledger"].facts["records"] == [
        {"seq": 1, "kind": "intent", "payload": {"name": "web"}},
        {"seq": 2, "kind": "done", "payload": "ff"},
        {"seq": 3, "kind": 99, "payload": 1},
    ]
    assert found["compacted"].facts["records"] == [{"seq": 4, "kind": "state", "payload": {}}]
    assert found["history"].facts["snapshots"] == 3
    assert (found["history"].facts["first_ns"], found["history"].facts["last_ns"]) == (10, 12)
    assert found["audit"].facts == {"records": 1, "first_ns": 7, "last_ns": 7, "chains": ["chain-1"]}
    assert found["snapshot"].facts["regions"] == 3


def test_damage_is_a_finding_and_what_stands_before_it_is_shown(files: dict[str, Path]) -> None:
    path = files["ledger"]
    content = path.read_bytes()
    end = max(n for n, byte in enumerate(content) if byte)
    path.write_bytes(content[: end - 5] + bytes([content[end - 5] ^ 1]) + content[end - 4 :])
    found = describe(path)
    assert len(found.findings) == 1
    assert len(found.facts["records"]) == 2
    path.write_bytes(content[: end - 2])
    assert len(describe(path).findings) == 1


def test_a_frame_that_is_damaged_costs_the_rest_of_its_chapter(files: dict[str, Path]) -> None:
    with contextlib.closing(sqlite3.connect(files["history"])) as database:
        database.execute("UPDATE frames SET payload = substr(payload, 1, length(payload) - 1) WHERE key = 11")
        database.commit()
    found = describe(files["history"])
    assert found.facts["snapshots"] == 1
    (finding,) = found.findings
    assert "frame of 11" in finding.observed


def test_a_database_is_looked_at_where_nothing_can_be_written(files: dict[str, Path], tmp_path: Path) -> None:
    """On a medium that cannot be written to; and a view that never ends is not asked."""
    content = files["history"].read_bytes()
    copy = os.memfd_create("copy")
    os.write(copy, content)
    assert describe(Path(f"/proc/self/fd/{copy}")).facts["snapshots"] == 3
    os.close(copy)
    endless = "WITH RECURSIVE n (key) AS (SELECT 1 UNION ALL SELECT key + 1 FROM n) SELECT key, key AS chapter FROM n"
    for name, application in (("frames", 0x4D434853), ("records", 0)):
        path = tmp_path / f"{name}.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(f"CREATE VIEW {name} AS {endless}")
            database.execute(f"PRAGMA application_id = {application}")
            database.execute("PRAGMA user_version = 2")
        with pytest.raises(BadFile, match="no table"):
            describe(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF" * 2000, b"{}", b"MCLEDGER", b"MCHISTRY", b"SQLite format 3\0", b"PK"]
)
def test_what_is_none_of_ours_is_a_bad_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BadFile):
        describe(path)


def test_a_file_that_is_not_there_is_a_bad_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(BadFile, match="cannot be read"):
            describe(path)
