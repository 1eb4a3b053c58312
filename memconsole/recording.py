"""Snapshot files: write, read, compare; and a file as a Source.

Grammar of a file, by its first bytes:

``{``
    one JSON document, the Snapshot; what a Snapshot without tables is written as.
``PK``
    a ZIP whose entries are stored, never packed: ``snapshot.json``, the Snapshot, whose ``tables`` name
    one entry ``extents/KEY.bin`` each, an ExtentTable byte for byte. The ZIP's CRCs protect every entry.

The JSON begins with ``"format": "memconsole.snapshot"`` and ``"version"``; a reader refuses what is newer than itself.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec

from memconsole import actions
from memconsole.errors import BadFile, NotFound, Refused
from memconsole.fields import TABLES
from memconsole.model import (
    SNAPSHOT_FORMAT,
    SNAPSHOT_VERSION,
    Event,
    Outcome,
    Plan,
    Refusal,
    Snapshot,
    TableRef,
    Value,
)
from memconsole.source import nothing_at

if TYPE_CHECKING:
    import zipfile

    from memconsole.extents import ExtentTable

SNAPSHOT_ENTRY = "snapshot.json"
REASON = "a recorded snapshot"


class _Heading(msgspec.Struct):
    """What is read first: enough to say whose file this is, and of which version."""

    format: str | None = None
    version: int | None = None


class Change(Value, frozen=True):
    """One difference between two Snapshots: an entity added or removed, or a field of it that changed."""

    kind: Literal["added", "removed", "changed"]
    table: str
    key: str
    field: str = ""
    old: Any = None
    new: Any = None


def schema() -> dict[str, Any]:
    """The JSON Schema of a Snapshot (published as docs/snapshot.schema.json)."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(Snapshot)))
    return found


# --- writing ----------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str], snapshot: Snapshot, tables: Mapping[str, ExtentTable] | None = None
) -> Snapshot:
    """Write a Snapshot, and its tables if there are any, and return it as written: its ``tables`` name what is there.

    The file appears whole or not at all (written beside itself, synced, renamed); a link keeps pointing where it did,
    and what is no regular file (a pipe, /dev/stdout) is written to as it is.

    Raises:
        BadFile: the file cannot be written (no such directory, a full disk).
    """
    tables = tables or {}
    refs = tuple(TableRef(key, len(table), table.page_size) for key, table in sorted(tables.items()))
    snapshot = msgspec.structs.replace(snapshot, tables=refs)
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            with target.open("wb", buffering=0) as stream:
                _write_to(stream, snapshot, tables)
        else:
            _write_whole(target.resolve(), snapshot, tables)
    except OSError as error:
        raise BadFile(f"{target} cannot be written", error.strerror or str(error), "choose another file") from error
    return snapshot


def _write_whole(target: Path, snapshot: Snapshot, tables: Mapping[str, ExtentTable]) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with beside.open("xb") as file:
            _write_to(file, snapshot, tables)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _write_to(file: IO[bytes], snapshot: Snapshot, tables: Mapping[str, ExtentTable]) -> None:
    document = msgspec.json.format(msgspec.json.encode(snapshot), indent=1)
    if not tables:
        file.write(document + b"\n")
        return
    import zipfile

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(SNAPSHOT_ENTRY, document)
        for key, table in sorted(tables.items()):
            archive.writestr(_entry(key), table.to_bytes())


def _entry(key: str) -> str:
    return f"extents/{key}.bin"


# --- reading ----------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[Snapshot, dict[str, ExtentTable]]:
    """A Snapshot and its tables; the caller closes the tables.

    Raises:
        BadFile: not there, truncated, corrupt, of another program, or of a version this memconsole does not know.
    """
    from contextlib import ExitStack

    with ExitStack() as opened, _open(path) as file:
        snapshot, archive = _snapshot_of(file, str(path))
        if archive is None:
            return snapshot, {}
        tables = {}
        with archive:
            for ref in snapshot.tables:
                tables[ref.key] = _table(archive, ref, str(path))
                opened.callback(tables[ref.key].close)
        opened.pop_all()
        return snapshot, tables


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise BadFile(f"{path} cannot be read", error.strerror or str(error), "check the name") from error


def _snapshot_of(file: IO[bytes], name: str) -> tuple[Snapshot, zipfile.ZipFile | None]:
    start = file.read(2)
    file.seek(0)
    if start == b"PK":
        archive = _archive(file, name)
        document = _stored(archive, SNAPSHOT_ENTRY, name)
        snapshot = _decode(document, name)
        return snapshot, archive
    if not start:
        raise BadFile(f"{name} is empty", "a recorded snapshot begins with { or PK", "record it again")
    if start[:1] != b"{":
        raise BadFile(f"{name} is not a recorded snapshot", f"it begins with {start!r}", "choose another file")
    snapshot = _decode(file.read(), name)
    if snapshot.tables:
        raise BadFile(f"{name} lacks its tables", "it names tables and holds none", "record it again")
    return snapshot, None


def _decode(document: bytes, name: str) -> Snapshot:
    try:
        heading = msgspec.json.decode(document, type=_Heading)
    except msgspec.ValidationError as error:
        raise BadFile(f"{name} is not a recorded snapshot", str(error), "choose another file") from error
    except msgspec.DecodeError as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt"
        raise BadFile(f"{name} is {kind}", str(error), "record it again") from error
    if heading.format != SNAPSHOT_FORMAT:
        raise BadFile(f"{name} is not a recorded snapshot", "it is JSON of another program", "choose another file")
    if heading.version is None or heading.version > SNAPSHOT_VERSION:
        raise BadFile(
            f"{name} is of version {heading.version}",
            f"this memconsole knows versions up to {SNAPSHOT_VERSION}",
            "open it with a newer memconsole",
        )
    try:
        return msgspec.json.decode(document, type=Snapshot)
    except msgspec.ValidationError as error:
        raise BadFile(f"{name} is corrupt", str(error), "record it again") from error


def _archive(file: IO[bytes], name: str) -> zipfile.ZipFile:
    import zipfile

    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise BadFile(f"{name} is truncated", str(error), "record it again") from error
    if SNAPSHOT_ENTRY not in archive.namelist():
        raise BadFile(f"{name} is not a recorded snapshot", f"it holds no {SNAPSHOT_ENTRY}", "choose another file")
    return archive


def _stored(archive: zipfile.ZipFile, entry: str, name: str) -> bytes:
    import zipfile

    try:
        info = archive.getinfo(entry)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise BadFile(f"{name} is not a recorded snapshot", f"{entry} is packed", "choose another file")
        return archive.read(info)
    except KeyError as error:
        raise BadFile(f"{name} lacks {entry}", "the Snapshot names it", "record it again") from error
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise BadFile(f"{name} is corrupt", f"{entry}: {error}", "record it again") from error


def _table(archive: zipfile.ZipFile, ref: TableRef, name: str) -> ExtentTable:
    from memconsole.extents import ExtentTable

    content = _stored(archive, _entry(ref.key), name)
    try:
        table = ExtentTable.from_bytes(content)
    except BadFile as error:
        raise BadFile(f"{name} is corrupt", f"{_entry(ref.key)}: {error}", "record it again") from error
    if len(table) != ref.rows or table.page_size != ref.page_size:
        table.close()
        raise BadFile(f"{name} is corrupt", f"{_entry(ref.key)} has {len(table)} rows, not {ref.rows}", "")
    return table


# --- comparing --------------------------------------------------------------------------------------------------

_KEYS: Mapping[str, Callable[[Any], str]] = {
    **{table.id: table.key for table in TABLES.values() if table.id != "events"},
    "iommus": lambda item: str(item.name),
    "dax": lambda item: str(item.name),
    "gaps": lambda item: str(item.source),
}
_SINGLES = ("host", "memory", "survival")


def diff(a: Snapshot, b: Snapshot) -> tuple[Change, ...]:
    """What changed from ``a`` to ``b``, by table, entity and field; a field inside another is ``seen.rss``."""
    changes: list[Change] = []
    for single in _SINGLES:
        changes += _fields(single, single, getattr(a, single), getattr(b, single))
    for table, key in _KEYS.items():
        old = {key(item): item for item in getattr(a, table)}
        new = {key(item): item for item in getattr(b, table)}
        changes += [Change("removed", table, name) for name in old if name not in new]
        changes += [Change("added", table, name) for name in new if name not in old]
        for name, item in new.items():
            if name in old and old[name] != item:
                changes += _fields(table, name, old[name], item)
    return tuple(changes)


def _fields(table: str, key: str, old: Any, new: Any) -> list[Change]:
    before, after = _flat(old), _flat(new)
    names = list(dict.fromkeys([*before, *after]))
    return [
        Change("changed", table, key, name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(item: msgspec.Struct, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in msgspec.structs.fields(item):
        value = getattr(item, info.name)
        if isinstance(value, msgspec.Struct):
            found.update(_flat(value, f"{prefix}{info.name}."))
        else:
            found[prefix + info.name] = msgspec.to_builtins(value)
    return found


# --- a file as a Source -----------------------------------------------------------------------------------------


class Recording:
    """A recorded snapshot as a Source: everything can be looked at, nothing done."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file whole.

        Raises:
            BadFile: see :func:`read`.
        """
        self._name = Path(path).name
        self._snapshot, self._tables = read(path)
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """The file's name."""
        return self._name

    @property
    def read_only(self) -> str:
        """Why no Action can be applied here."""
        return REASON

    def snapshot(self) -> Snapshot:
        """The recorded Snapshot."""
        return self._snapshot

    def extents(self, key: str) -> ExtentTable:
        """A copy of a recorded table, which the caller closes.

        Raises:
            NotFound: the file holds no table of this key.
        """
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                known = ", ".join(sorted(self._tables)) or "none; record with --pfn"
                raise NotFound(f"{self._name} holds no PFN map of {key}", "", f"it holds: {known}")
            return type(table).from_bytes(table.to_bytes())

    def plan(self, action: actions.Action) -> Plan:
        """A plan that refuses."""
        refusal = Refusal("ReadOnly", f"{self._name} cannot be changed", f"it is {REASON}", "act on a live host")
        spec = action.spec
        return Plan(spec.id, actions.cli_form(action), spec.danger, refusals=(refusal,))

    def apply(self, action: actions.Action) -> Outcome:
        """Always refused.

        Raises:
            Refused: nothing can be done in the past.
        """
        refusal = self.plan(action).refusals[0]
        raise Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)

    def events(self, after: int) -> Sequence[Event]:
        """The recorded events above ``after``."""
        return [event for event in self._snapshot.events if event.seq > after]

    def history(self, after: int = 0) -> Sequence[int]:
        """The time of the one Snapshot."""
        return [self._snapshot.taken_ns] if self._snapshot.taken_ns > after else []

    def at(self, time_ns: int) -> Snapshot:
        """The Snapshot, if it was taken until then.

        Raises:
            NotFound: it was taken later.
        """
        if time_ns < self._snapshot.taken_ns:
            raise nothing_at([self._snapshot.taken_ns])
        return self._snapshot

    def close(self) -> None:
        """Close the tables."""
        with self._lock:
            for table in self._tables.values():
                table.close()
            self._tables = {}
