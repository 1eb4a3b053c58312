"""PFN maps of the past, beside the Snapshots in their store: each as it was scanned for a viewer, where it differed.

Grammar, a table of the store (:mod:`.store`)::

    maps    = key scanned seen digest payload   ``key`` is the map's (``region:NAME``), ``scanned`` when it was scanned,
                                                ns since the epoch, ``seen`` when a scan last found it the same
    payload = zlib(table)                       an ExtentTable byte for byte; ``digest`` is BLAKE2b of it

A store of before has no such table, and an older memconsole passes it over.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from typing import TYPE_CHECKING

from memconsole import decoding
from memconsole.backend import database
from memconsole.errors import BadFile
from memconsole.source import no_map_at

if TYPE_CHECKING:
    from pathlib import Path

    from memconsole.extents import ExtentTable

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS maps (key TEXT NOT NULL, scanned INTEGER NOT NULL, seen INTEGER NOT NULL,"
    " digest BLOB NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (key, scanned))"
)
SHARE = 4
"""All maps together have one part in so many of a store's bytes; one alone half of that."""
LARGEST = 1 << 30
"""Bytes that a map may inflate to: some 40 million extents."""
_LEVEL = 1


def record(found: sqlite3.Connection, key: str, table: ExtentTable, *, max_bytes: int, oldest_ns: int) -> bool:
    """Record a map, unless it is as it was; the oldest ones go for it. Whether there is room for one of its size.

    Raises:
        sqlite3.Error: it cannot be written; nothing of it is left.
    """
    content, scanned = table.to_bytes(), table.scanned_ns
    digest = _digest(content)
    query = "SELECT scanned, digest FROM maps WHERE key = ? ORDER BY scanned DESC LIMIT 1"
    last = found.execute(query, (key,)).fetchone()
    if last is not None and last[1] == digest:
        with database.transaction(found):
            found.execute("UPDATE maps SET seen = ? WHERE key = ? AND scanned = ?", (scanned, key, last[0]))
        return True
    payload = zlib.compress(content, _LEVEL)
    share = max_bytes // SHARE
    if len(payload) > share // 2:
        return False
    with database.transaction(found):
        found.execute("DELETE FROM maps WHERE seen < ?", (oldest_ns,))
        while _bytes(found) + len(payload) > share:
            found.execute("DELETE FROM maps WHERE rowid = (SELECT rowid FROM maps ORDER BY seen LIMIT 1)")
        row = (key, scanned, scanned, digest, payload)
        found.execute("INSERT OR REPLACE INTO maps VALUES (?, ?, ?, ?, ?)", row)
    return True


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _bytes(found: sqlite3.Connection) -> int:
    (total,) = found.execute("SELECT coalesce(sum(length(payload)), 0) FROM maps").fetchone()
    return int(total)


def are_in(found: sqlite3.Connection) -> bool:
    """Whether a store has a table of maps."""
    query = "SELECT rootpage FROM sqlite_master WHERE type = 'table' AND name = 'maps'"
    row = found.execute(query).fetchone()
    return row is not None and bool(row[0])


def at(found: sqlite3.Connection | None, key: str, at_ns: int, path: Path) -> ExtentTable:
    """The map of a key as it was last scanned until a time; its ``scanned_ns`` is when.

    Raises:
        NotFound: none was recorded until then. BadFile: it is damaged.
    """
    if found is None or not are_in(found):
        raise no_map_at(key, at_ns)
    query = (
        "SELECT CAST(scanned AS INTEGER), CAST(seen AS INTEGER), digest,"
        " CASE WHEN length(payload) <= ? THEN CAST(payload AS BLOB) ELSE x'' END FROM maps"
        " WHERE key = ? AND scanned <= ? ORDER BY scanned DESC LIMIT 1"
    )
    row = found.execute(query, (LARGEST, key, at_ns)).fetchone()
    if row is None:
        (first,) = found.execute("SELECT min(scanned) FROM maps WHERE key = ?", (key,)).fetchone()
        raise no_map_at(key, at_ns, first)
    scanned, seen, digest, payload = row
    table = _table(payload, digest, f"the PFN map of {key} of {scanned} in {path}")
    table.scanned_ns = seen if seen <= at_ns else scanned
    return table


def _table(payload: bytes, digest: bytes, what: str) -> ExtentTable:
    from memconsole.extents import ExtentTable

    remedy = "memconsole inspect FILE says what is left"
    content = decoding.inflated(payload, limit=LARGEST, what=what)
    if _digest(content) != digest:
        raise BadFile(f"{what} is damaged", "its checksum does not match", remedy)
    try:
        return ExtentTable.from_bytes(content)
    except BadFile as error:
        raise BadFile(f"{what} is damaged", str(error), remedy) from error


def damage(found: sqlite3.Connection, path: Path) -> tuple[int, list[str]]:
    """How many maps a store has, and what is wrong with those that cannot be read."""
    if not are_in(found):
        return 0, []
    rows = found.execute("SELECT key, scanned FROM maps ORDER BY scanned").fetchall()
    wrong = []
    for key, scanned in rows:
        try:
            at(found, str(key), int(scanned), path).close()
        except BadFile as error:
            wrong.append(str(error))
    return len(rows), wrong
