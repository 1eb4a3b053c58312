"""Commands that only a control process can answer: what changes as it changes, and what a region holds."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import starmap
from pathlib import Path

import msgspec

from memconsole import differ
from memconsole.backend.wire.inline import Segment
from memconsole.cli import connect, output
from memconsole.errors import ExitCode, KernelRefused, MemconsoleError, Refused, UsageError
from memconsole.field import Table
from memconsole.fields import TABLES
from memconsole.model import Event, Snapshot
from memconsole.units import format_size, format_time

_CHANGING = "guests that map it may have written to it meanwhile; pause them first for a copy of one moment"


def watch(options: argparse.Namespace) -> int:
    """What changes on this host as it changes, a line each, until it is interrupted: entities, fields and events."""
    tables = _tables(options.tables)
    before: Snapshot | None = None
    with contextlib.closing(connect.client(options)) as client:
        for now in client.watch(options.every):
            if before is not None:
                _tell(before, now, tables, as_json=options.json)
            before = now
    return ExitCode.DONE


def _tables(names: str) -> tuple[Table, ...]:
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(TABLES)
    unknown = [name for name in wanted if name not in TABLES]
    if unknown:
        known = ", ".join(TABLES)
        raise UsageError(f"there is no table {unknown[0]!r}", f"the tables are {known}", "name one of those")
    return tuple(TABLES[name] for name in wanted)


def _tell(before: Snapshot, now: Snapshot, tables: Sequence[Table], *, as_json: bool) -> None:
    shown = {table.id for table in tables}
    seen = before.events[-1].seq if before.events else 0
    events = [event for event in now.events if event.seq > seen] if "events" in shown else []
    changes = [change for table in tables if table.id != "events" for change in _changes(table, before, now)]
    if not (events or changes):
        return
    if as_json:
        line = {"taken_ns": now.taken_ns, "changes": changes, "events": events}
        output.text(msgspec.json.encode(line).decode())
        return
    for told in (*map(_happened, events), *map(_changed, changes)):
        output.text(f"{format_time(now.taken_ns)}  {told}")


def _changes(table: Table, before: Snapshot, now: Snapshot) -> Iterator[differ.FieldChange]:
    """What is worth a mark in the console: no counter that always runs on."""
    was, new = ({table.key(item): item for item in table.rows(each)} for each in (before, now))
    yield from (differ.FieldChange("removed", table.id, key) for key in was.keys() - new.keys())
    yield from (differ.FieldChange("added", table.id, key) for key in new.keys() - was.keys())
    for key in was.keys() & new.keys():
        old, item = table.plain(was[key]), table.plain(new[key])
        for field in table.fields if old != item else ():
            if field.news and field.text(old) != field.text(item):
                yield differ.FieldChange("changed", table.id, key, field.id, field.text(old), field.text(item))


def _happened(event: Event) -> str:
    return f"! {event.subject}: {event.text}" + (f" ({event.peer})" if event.peer else "")


def _changed(change: differ.FieldChange) -> str:
    if change.kind == "changed":
        return f"~ {change.table} {change.key} {change.field}: {change.old} -> {change.new}"
    return f"{'+' if change.kind == 'added' else '-'} {change.table} {change.key}"


def copy(options: argparse.Namespace) -> int:
    """A region's contents as a new file, with holes where the region has none; for operators."""
    began = time.monotonic()
    with contextlib.closing(connect.client(options)) as client:
        grants = [grant for grant in client.snapshot().grants if grant.region == options.region]
        with client.segments(options.region) as segments:
            size, copied = _copied(options.region, segments, Path(options.file))
    guests = sorted({grant.guest for grant in grants})
    if options.json:
        output.json({"region": options.region, "file": options.file, "size": size, "copied": copied, "guests": guests})
    else:
        took = time.monotonic() - began
        what = f"region {options.region} is copied to {options.file}: {format_size(size)}, {format_size(copied)} of it"
        output.text(f"{what} not empty, in {took:.1f} s")
    if guests:
        output.note(f"guests with grants of it: {', '.join(guests)}: {_CHANGING}")
    return ExitCode.DONE


def _copied(region: str, segments: Sequence[Segment], path: Path) -> tuple[int, int]:
    """A new file with what these segments hold; its bytes, and how many of them are no hole.

    Raises:
        Refused: there is a file of this name. KernelRefused: it cannot be written. Gone: the region was truncated.
    """
    what = f"region {region} cannot be copied to {path}"
    try:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Refused(what, "there is a file of this name", "name another file, or remove that one") from None
    except OSError as error:
        raise KernelRefused(str(path), error.errno or 0, what=what) from None
    try:
        sizes = [segment.size for segment in segments]
        os.ftruncate(out, sum(sizes))
        bases = itertools.accumulate(sizes, initial=0)
        copied = sum(starmap(partial(_copy_segment, out), zip(segments, bases, strict=False)))
        os.fsync(out)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise KernelRefused(str(path), error.errno or 0, what=what) from None
    except MemconsoleError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(out)
    return sum(sizes), copied


def _copy_segment(out: int, segment: Segment, base: int) -> int:
    copied = 0
    for at, found in segment.data():
        left, to = memoryview(found), base + at
        copied += len(left)
        while left:
            done = os.pwrite(out, left, to)
            left, to = left[done:], to + done
    return copied
