"""LMDB and SQLite on regions of ``memconsole serve --mount``: guests like any, through its restart, until a revoke."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import controls
from support.guests import Obedient
from support.mounted import Place, places, unexpected
from support.mounts import NOBODY

from memconsole import actions as do
from memconsole.cli import main
from memconsole.model import GrantState, RevokeOutcome, Rung

SIZE = 16 << 20

START = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
where, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
"""
LMDB = (
    """import lmdb"""
    + START
    + """
env = lmdb.open(where, map_size=size, writemap=True)
for turn, line in enumerate(sys.stdin):
    if line == "work\\n":
        for batch in range(10):
            with env.begin(write=True) as txn:
                for row in range(100):
                    txn.put(b"%d-%d-%d-%d" % (os.getpid(), turn, batch, row), b"v" * 200)
        txn = env.begin(write=True)
        txn.put(b"undone", b"x")
        txn.abort()
    with env.begin() as txn:
        assert txn.get(b"undone") is None
        print(sum(len(value) == 200 for _, value in txn.cursor()), flush=True)
"""
)
SQLITE = (
    """import sqlite3"""
    + START
    + """
db = sqlite3.connect(where, isolation_level=None)
for pragma in ("journal_mode=MEMORY", "cache_spill=OFF", "cache_size=0", f"mmap_size={size}"):
    db.execute(f"PRAGMA {pragma}").fetchall()
db.execute("CREATE TABLE IF NOT EXISTS t (k INTEGER PRIMARY KEY, v TEXT)")
for line in sys.stdin:
    if line == "work\\n":
        db.execute("BEGIN")
        db.executemany("INSERT INTO t (v) VALUES (?)", [("x" * 200,)] * 1000)
        db.execute("COMMIT")
        db.execute("BEGIN")
        db.execute("DELETE FROM t")
        db.execute("ROLLBACK")
    elif line.startswith("fill "):  # up to so many pages, with more than there is room for
        db.execute("PRAGMA max_page_count=" + line.split()[1]).fetchall()
        db.execute("BEGIN")
        try:
            db.executemany("INSERT INTO t (v) VALUES (?)", [("x" * 200,)] * (2 * size // 200))
            db.execute("COMMIT")
            print("done", flush=True)
        except sqlite3.OperationalError as error:
            print(error.sqlite_errorname, error, flush=True)
        if db.in_transaction:
            db.execute("ROLLBACK")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    print(db.execute("SELECT count(*) FROM t WHERE length(v) = 200").fetchone()[0], flush=True)
"""
)


class Database(Obedient):
    """A database in a process of a user's; ``do`` has it work, or only count its rows."""

    def __init__(self, code: str, where: Path) -> None:
        super().__init__([sys.executable, "-c", code, str(where), str(SIZE)])
        assert self.line() == "ready"


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


def fresh(kind: str, directory: Path) -> bytes:
    """A new, small database."""
    if kind == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        lmdb.open(str(directory), map_size=SIZE).close()
        return (directory / "data.mdb").read_bytes()
    import sqlite3

    made = sqlite3.connect(directory / "fresh")
    made.execute("CREATE TABLE made (x)")
    made.commit()
    made.close()
    return (directory / "fresh").read_bytes()


def join(place: Place, kind: str, guest: str) -> Database:
    """A database becomes a guest with the region, and opens its file there."""
    path = place.path(guest, "db")
    home = place.service.directory / guest
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    (home / "data.mdb").symlink_to(path)
    database = Database(LMDB if kind == "lmdb" else SQLITE, home if kind == "lmdb" else path)
    place.at_end(database.end)
    place.client.apply(do.GuestAttach(guest, database.pid))
    place.client.apply(do.Map("db", guest))
    assert path.stat().st_uid == NOBODY
    database.tell("open")
    return database


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_a_database_works_is_shown_goes_on_and_is_revoked(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    place.client.apply(do.Reserve("db", SIZE))
    with place.owners("db").open("r+b") as file:
        file.write(fresh(kind, tmp_path))
    database = join(place, kind, "web")
    assert database.do("work") == "1000"
    shown = place.shown()
    grant = shown.grants[0]
    assert (grant.state, [seen.pid for seen in grant.seen]) == (GrantState.MAPPED, [database.pid])
    assert controls.guest(shown, "web").seen is not None
    assert controls.region(shown, "db").seen.mappers == (database.pid,)  # type: ignore[union-attr]
    assert not unexpected(shown)
    capfd.readouterr()
    assert main(["--socket", str(place.service.path), "guests", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert "web" in {guest["name"] for guest in (listed if isinstance(listed, list) else listed["guests"])}
    place.stop()
    assert database.do("work") == "2000", "nobody serves it"
    place.start()
    if kind == "lmdb":  # SQLite asks for its file's size in each transaction
        place.kill_server()
    assert database.do("work") == "3000", "nor shows it"
    shown = place.shown()
    assert [seen.pid for seen in shown.grants[0].seen] == [database.pid]
    report = place.revoke()
    assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED)
    assert database.do("count") == ""
    assert database.finish() == -signal.SIGBUS
    place.client.apply(do.GuestStop("web"))
    other = join(place, kind, "next")
    assert other.do("count") == "3000", "the contents stayed"
    assert other.do("work") == "4000"
    assert other.finish() == 0


def test_a_full_sqlite_says_that_it_is_full_where_it_knows_its_size(place: Place, tmp_path: Path) -> None:
    """As docs/service.md says it; what was committed before is whole either way."""
    place.client.apply(do.Reserve("db", SIZE))
    with place.owners("db").open("r+b") as file:
        file.write(fresh("sqlite", tmp_path))
    database = join(place, "sqlite", "web")
    assert database.do("work") == "1000"
    assert database.do(f"fill {SIZE // 4096}") == "SQLITE_FULL database or disk is full"
    assert database.line() == "1000"
    assert database.do("work") == "2000"
    said = database.do("fill 1000000")
    assert said.startswith("SQLITE_IOERR")
    assert said.endswith("disk I/O error")
    assert database.line() == "2000"
