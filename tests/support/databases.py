"""LMDB and SQLite as programs of their own: filled where they are empty, then they wait; what they found is a file.

python -c PROGRAM KIND WHERE SIZE ROWS OUT      OUT: rows found, rows there now, seconds that took
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import lmdb, os, signal, sqlite3, sys, time
kind, where, size, rows, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
began = time.monotonic()
if kind == "lmdb":
    db = lmdb.open(where, map_size=size, writemap=True, sync=False)
    def count():
        with db.begin() as txn:
            return txn.stat()["entries"]
    def wrong():
        with db.begin() as txn:
            return sum(value != b"%08d" % int(key) * 12 for key, value in txn.cursor())
    def fill():
        with db.begin(write=True) as txn:
            for row in range(rows):
                txn.put(b"%010d" % row, b"%08d" % row * 12, append=True)
else:
    db = sqlite3.connect(where, isolation_level=None)
    for pragma in ("journal_mode=MEMORY", "cache_spill=OFF", f"mmap_size={size}"):
        db.execute("PRAGMA " + pragma).fetchall()
    db.execute("CREATE TABLE IF NOT EXISTS t (k INTEGER PRIMARY KEY, v TEXT)")
    def count():
        return db.execute("SELECT count(*) FROM t").fetchone()[0]
    def wrong():
        return sum(value != "%08d" % key * 12 for key, value in db.execute("SELECT k, v FROM t"))
    def fill():
        db.execute("BEGIN")
        db.executemany("INSERT INTO t VALUES (?, ?)", ((row, "%08d" % row * 12) for row in range(rows)))
        db.execute("COMMIT")
found = count()
if not found:
    fill()
took = time.monotonic() - began
end, ours = os.pipe()
if os.fork() == 0:  # it maps the file too, as long as its parent lives: as in a database that saves in a child
    os.close(ours)
    os.read(end, 1)
    os._exit(0)
with open(out + ".new", "w") as file:
    file.write(f"{found} {count() - wrong()} {took}")
os.rename(out + ".new", out)
signal.pause()
"""


def words(kind: str, where: Path, size: int, rows: int, out: Path) -> list[str]:
    """Its command line; ``where``: LMDB's directory, with a link ``data.mdb``, or SQLite's file."""
    return [sys.executable, "-c", PROGRAM, kind, str(where), str(size), str(rows), str(out)]


def told(out: Path) -> list[float]:
    """How many rows it found, how many right ones it had then, and after how many seconds."""
    return [float(word) for word in out.read_text().split()]


def seed(kind: str, size: int) -> bytes:
    """A fresh, small database, to be written into a region."""
    with tempfile.TemporaryDirectory() as directory:
        if kind == "lmdb":
            import lmdb

            lmdb.open(directory, map_size=size).close()
            return Path(directory, "data.mdb").read_bytes()
        made = sqlite3.connect(f"{directory}/fresh")
        made.execute("CREATE TABLE made (x)")
        made.commit()
        made.close()
        return Path(directory, "fresh").read_bytes()
