"""Snapshot files: write and read; and a file as a Source.

Grammar of a file, by its first bytes:

``{``
    one JSON document, the Snapshot; what a Snapshot without tables is written as.
``PK``
    a ZIP whose entries are stored, never packed: ``snapshot.json``, the Snapshot, whose ``tables`` name
    one entry ``extents/KEY.bin`` each, an ExtentTable byte for byte. The ZIP's CRCs protect every entry.

The JSON begins with ``"format": "memconsole.snapshot"`` and ``"version"``; a reader refuses what is newer than itself.
"""

from __future__ import annotations

import inspect
import json
import os
import struct
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from memconsole import actions, decoding, wholefile
from memconsole.errors import BadFile, NotFound, Refused
from memconsole.model import (
    SNAPSHOT_FORMAT,
    SNAPSHOT_VERSION,
    Event,
    FrameState,
    Outcome,
    Part,
    Plan,
    Refusal,
    Snapshot,
    TableRef,
)
from memconsole.source import no_frame_at, no_map_at, nothing_at
from memconsole.upgrading import upgraded

if TYPE_CHECKING:
    import zipfile

    from memconsole.extents import ExtentTable

SNAPSHOT_ENTRY = "snapshot.json"
REASON = "a recorded snapshot"


class _Heading(msgspec.Struct):
    """What is read first: enough to say whose file this is, and of which version."""

    format: str | None = None
    version: int | None = None


def schema() -> dict[str, Any]:
    """The JSON Schema of a Snapshot (published as docs/snapshot.schema.json); the same whichever msgspec made it."""
    made = canonical(decoding.json(msgspec.json.encode(msgspec.json.schema(Snapshot)), what="it"))
    found: dict[str, Any] = _counted(made)
    return found


SIGNED = frozenset({"node"})
"""The numbers of a Snapshot that may be negative: a device of no NUMA node is of node -1."""


def _counted(schema: Any, name: str = "") -> Any:
    """A schema in which what counts or measures is not negative: every whole number but those of ``SIGNED``."""
    if isinstance(schema, list):
        return [_counted(each, name) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _counted(value, name) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {field: _counted(each, field) for field, each in schema["properties"].items()}
    if found.get("type") == "integer" and name not in SIGNED:
        found.setdefault("minimum", 0)
    return found


def canonical(schema: Any) -> Any:
    """A JSON Schema in one form: docstrings without their indentation, alternatives in order, ``null`` the last.

    How releases of msgspec and of Python write these two differs, and neither says anything of a Snapshot.
    """
    if isinstance(schema, list):
        return [canonical(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: canonical(value) for name, value in schema.items()}
    if isinstance(described := found.get("description"), str):
        found["description"] = inspect.cleandoc(described)
    if isinstance(choices := found.get("anyOf"), list):
        found["anyOf"] = sorted(choices, key=lambda each: (each == {"type": "null"}, json.dumps(each, sort_keys=True)))
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
    with wholefile.written(target, mode=None, lasting=True) as file:
        _write_to(file, snapshot, tables)


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


def read(path: str | os.PathLike[str], name: str = "") -> tuple[Snapshot, dict[str, ExtentTable]]:
    """A Snapshot and its tables, which the caller closes; errors call the file ``name``, or by its path.

    Raises:
        BadFile: not there, truncated, corrupt, of another program, or of a version this memconsole does not know.
    """
    from contextlib import ExitStack

    name = name or str(path)
    with ExitStack() as opened, decoding.sought(path) as where, _open(where) as file:
        snapshot, archive = _snapshot_of(file, name)
        if archive is None:
            return snapshot, {}
        tables = {}
        with archive:
            for ref in snapshot.tables:
                tables[ref.key] = _table(archive, ref, name)
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
    snapshot = _decode(file.read(decoding.DOCUMENT + 1), name)
    if snapshot.tables:
        raise BadFile(f"{name} lacks its tables", "its JSON names PFN maps and the file holds none", "record it again")
    return snapshot, None


def _decode(document: bytes, name: str) -> Snapshot:
    try:
        heading = decoding.json(document, _Heading, what=name)
    except decoding.Undecodable as error:
        if error.fault == "unfit":
            raise BadFile(f"{name} is not a recorded snapshot", error.why, "choose another file") from error
        kind = "truncated" if error.fault == "truncated" else "corrupt"
        raise BadFile(f"{name} is {kind}", error.why, "record it again") from error
    if heading.format != SNAPSHOT_FORMAT:
        raise BadFile(f"{name} is not a recorded snapshot", "it is JSON of another program", "choose another file")
    if heading.version is None or heading.version > SNAPSHOT_VERSION:
        raise BadFile(
            f"{name} is of version {heading.version}",
            f"this memconsole knows versions up to {SNAPSHOT_VERSION}",
            "open it with a newer memconsole",
        )
    try:
        if heading.version == SNAPSHOT_VERSION:
            return decoding.json(document, Snapshot, what=name)
        return decoding.convert(upgraded(decoding.json(document, what=name)), Snapshot, what=name)
    except decoding.Undecodable as error:
        raise BadFile(f"{name} is corrupt", error.why, "record it again") from error


# What zipfile raises, besides its own error, on bytes that are no archive: a version or a packing it does not know, an
# offset that no file has. That error is named where it is caught: the module is imported only where an archive is read.
_ZIP_FAULTS = (EOFError, OSError, ValueError, NotImplementedError, OverflowError, struct.error)


def _archive(file: IO[bytes], name: str) -> zipfile.ZipFile:
    import zipfile

    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, *_ZIP_FAULTS) as error:
        raise BadFile(f"{name} is truncated or corrupt", str(error), "record it again") from error
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
    except (zipfile.BadZipFile, *_ZIP_FAULTS) as error:
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
        raise BadFile(
            f"{name} is corrupt", f"{_entry(ref.key)} has {len(table)} rows, not {ref.rows}", "record it again"
        )
    return table


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

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:  # noqa: ARG002 - it has what was recorded
        """The recorded Snapshot."""
        return self._snapshot

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """A copy of a recorded table, which the caller closes.

        Raises:
            NotFound: the file holds no table of this key, or is of a later time.
        """
        if at_ns is not None and at_ns < self._snapshot.taken_ns:
            raise no_map_at(key, at_ns, self._snapshot.taken_ns)
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                known = ", ".join(sorted(self._tables)) or "none; record with --pfn"
                raise NotFound(
                    f"{self._name} holds no PFN map of {key}", "the map was not recorded with it", f"it holds: {known}"
                )
            copy = type(table).from_bytes(table.to_bytes())
            copy.scanned_ns = self._snapshot.taken_ns
            return copy

    def frame(self, pfn: int) -> FrameState:
        """Nothing: what the kernel says of frames is not recorded.

        Raises:
            NotFound: always.
        """
        raise no_frame_at(pfn)

    def plan(self, action: actions.Action, after: Sequence[actions.Action] = ()) -> Plan:  # noqa: ARG002
        """A plan that refuses, whatever it were to follow."""
        refusal = Refusal("ReadOnly", f"{self._name} cannot be changed", f"it is {REASON}", "act on a live host")
        return actions.refused_plan(action, refusal)

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
