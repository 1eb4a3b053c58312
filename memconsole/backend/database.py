"""SQLite files: made for their owner alone, and looked at without being changed.

Nothing but SQLite may open a file that this process has open by it: closing any descriptor of it drops SQLite's locks,
which are POSIX locks (https://sqlite.org/howtocorrupt.html).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from memconsole import decoding
from memconsole.errors import BadFile

MAGIC = b"SQLite format 3\0"
_SPOILED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_WANTS_WRITING = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY})


def opened(path: Path, prepare: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    """A file to write to, made with mode 0600 where there is none; in WAL mode, every statement its own transaction.

    Where ``prepare`` fails, with any error, it is closed again.

    Raises:
        OSError, sqlite3.Error: it cannot be opened.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        prepare(database)
    except BaseException:
        database.close()
        raise
    return database


def looked_at(path: Path) -> sqlite3.Connection:
    """A file to read. In a directory that may not be written to, its log (``-wal``) is left out.

    Raises:
        sqlite3.Error: it cannot be opened.
        BadFile: it has no name in the file system, and is too large to be read whole.
    """
    if not path.resolve().exists():
        return _in_memory(decoding.contents(path))
    try:
        return _reading(path, "mode=ro")
    except sqlite3.OperationalError as error:
        if code(error) not in _WANTS_WRITING or not path.exists():
            raise
    return _reading(path, "mode=ro&immutable=1")


def _reading(path: Path, how: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{how}"
    database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA user_version").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _in_memory(content: bytes) -> sqlite3.Connection:
    """What came out of a pipe: SQLite opens files by their own names only, and keeps no log in memory."""
    database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
        database.deserialize(content[:18] + b"\1\1" + content[20:] if content[18:20] == b"\2\2" else content)
        database.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of what is written in the context, or, with an exception, nothing of it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def number(database: sqlite3.Connection, pragma: str) -> int:
    """A number that SQLite keeps of a file: ``user_version``, ``application_id``, ``page_count`` ..."""
    (found,) = database.execute(f"PRAGMA {pragma}").fetchone()
    return int(found)


def check_table(database: sqlite3.Connection, name: str, path: Path) -> None:
    """Nothing, where a name is that of a plain table: a file of others may have a view that never ends.

    Raises:
        BadFile: it has no such table.
    """
    query = "SELECT rootpage FROM sqlite_master WHERE type = 'table' AND name = ?"
    row = database.execute(query, (name,)).fetchone()
    if row is None or not row[0]:
        raise BadFile(f"{path} is a database of another program", f"it has no table {name}", "choose another file")


def code(error: sqlite3.Error) -> int:
    """SQLite's primary result code of an error (https://sqlite.org/rescode.html); 0: the error is Python's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk has no room, be it for the memory that SQLite shares beside a file: such an error passes."""
    return code(error) == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is damaged, or is no database at all: other errors pass."""
    return code(error) in _SPOILED
