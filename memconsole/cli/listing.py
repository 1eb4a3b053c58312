"""Commands that list: the tables of a Snapshot, findings, and PFN maps."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memconsole import exporting, hostmap, iovas, joined, rates, where
from memconsole.cli import output
from memconsole.cli.connect import source, source_or_file
from memconsole.errors import ExitCode
from memconsole.field import Field, in_order
from memconsole.fields import REACHED, SPANS, TABLES
from memconsole.model import Part, Snapshot, Unread
from memconsole.redaction import Redactor
from memconsole.source import PastSource, Source
from memconsole.units import format_address, last_answer, parse_time

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

PFN_CHUNK = 65536


def listing(options: argparse.Namespace) -> int:
    """One table of the Snapshot as text, CSV or JSON (the entities as the schema describes them).

    Findings are told one by one, unless their columns are chosen, and the exit code is 4 when any are listed.
    """
    table = TABLES[options.table]
    fields = table.pick(options.columns)
    chosen = where.parse(options.where, table.fields)
    sort = table.field(options.sort) if options.sort else None
    needed = (*fields, *chosen.fields, *([sort] if sort else []))
    parts = {field.part for field in needed if field.part is not None}
    with source(options) as found:
        snapshot = found.snapshot(parts)
        if options.over:
            time.sleep(options.over)
            snapshot = rates.rated(snapshot, found.snapshot(parts))
    rows = where.choose(chosen, fields, table.rows(snapshot))
    if options.redact:
        redactor = Redactor()
        snapshot, rows = redactor.snapshot(snapshot), redactor.value(rows)
    _write(options, fields, in_its_order(rows, sort, reverse=options.reverse))
    if options.format == "text":
        if options.table == "guests":
            _note_silent(snapshot)
            if Part.USAGE in parts and not options.over:
                output.note("CPU % and rates need two snapshots: --over SECONDS takes them so far apart")
        _note_gaps(snapshot.gaps)
    return ExitCode.FINDINGS if options.table == "findings" and rows else ExitCode.DONE


def in_its_order(rows: list[Any], field: Field | None, *, reverse: bool) -> list[Any]:
    """Rows by a field, the largest number and the latest time first; the other way round with ``reverse``."""
    if field is None:
        return rows[::-1] if reverse else rows
    return [rows[index] for index in in_order(field, rows, reverse=field.largest_first != reverse)]


def _write(options: argparse.Namespace, fields: Sequence[Field], rows: list[Any]) -> None:
    """Rows in a format: JSON has whole entities where no columns are chosen, findings are told one by one."""
    if options.format == "json" and not options.columns:
        output.json(rows)
    elif options.format != "text" or options.table != "findings" or options.columns:
        output.document(exporting.FORMATS[options.format](fields, rows))
    elif rows:
        output.findings(rows)
    else:
        output.text("no findings")


def _note_silent(snapshot: Snapshot) -> None:
    for guest in snapshot.guests:
        if guest.silent:
            output.note(f"silent: {guest.name}: {last_answer(guest.answered_ns, snapshot.taken_ns)}: {guest.silent}")


def _note_gaps(gaps: Iterable[Unread]) -> None:
    for gap in gaps:
        output.note(f"not seen: {gap.source}: {gap.why}" + (f" ({gap.remedy})" if gap.remedy else ""))


def reach(options: argparse.Namespace) -> int:
    """A guest's memory with its frames, windows and IOVAs; or a frame with everybody who reaches it."""
    with source_or_file(options) as found:
        answer = joined.resolve_target(found.snapshot(), found, options.target)
    if options.json:
        output.json(answer)
    elif isinstance(answer, joined.Joined):
        output.table(SPANS.pick("all"), answer.spans)
        if answer.more:
            output.note(f"more than {len(answer.spans):,} spans: the rest is not listed")
    else:
        for line in joined.frame_lines(answer):
            output.text(line)
        output.table(REACHED.pick("all"), answer.reached)
    _note_gaps(answer.unseen)
    return ExitCode.DONE


def host_map(options: argparse.Namespace) -> int:
    """Whose the host's physical memory is: a row an owner and node, or every range of addresses."""
    with source_or_file(options) as found, contextlib.closing(hostmap.survey(found.snapshot(), found)) as shown:
        whole = options.ranges or options.range is not None
        rows = list(shown.ranges(options.range) if whole else shown.totals())
    if options.json:
        output.json({"rows": rows, "unseen": shown.unseen})
    elif options.csv:
        output.document(exporting.as_csv(hostmap.FIELDS, rows))
    else:
        output.table(hostmap.FIELDS, rows)
    if not options.json:
        _note_gaps(shown.unseen)
    return ExitCode.DONE


def iova_map(options: argparse.Namespace) -> int:
    """An IOMMU domain by IOVA; exit code 4 where something leads elsewhere than granted, or nowhere."""
    with source_or_file(options) as found:
        snapshot = found.snapshot()
        group = iovas.group_of(snapshot, options.target)
        with contextlib.closing(iovas.survey(snapshot, found, group)) as shown:
            rows = list(shown.ranges())
    if options.json:
        output.json(
            {"group": shown.domain.group, "devices": shown.domain.devices, "rows": rows, "unseen": shown.unseen}
        )
    elif options.csv:
        output.document(exporting.as_csv(iovas.FIELDS, rows))
    else:
        output.table(iovas.FIELDS, rows)
        _note_gaps(shown.unseen)
    wrong = any(row.verdict in {"elsewhere", "missing"} for row in rows)
    return ExitCode.FINDINGS if wrong else ExitCode.DONE


EXTENT_FIELDS = (
    Field("offset", "Address", "gpa of a guest, offset of a region", lambda e: e["offset"], format_address, right=True),
    Field("pfn", "PFN", "page frame number", lambda e: e["pfn"], lambda value: f"{value:#x}", right=True),
    Field("count", "Pages", "pages in the run", lambda e: e["count"], right=True),
    Field("flags", "Flags", "present, swap, file, huge...", lambda e: e["flags"], lambda value: "|".join(value) or "-"),
)


def pfn(options: argparse.Namespace) -> int:
    """The extents of a region (by offset) or guest (by gpa, hva where none is known)."""
    with source(options) as live:
        found: Source = (
            live if options.at is None else PastSource(live, live.at(parse_time(options.at, time.time_ns())))
        )
        key = joined.table_key(found.snapshot(), options.target)
        with contextlib.closing(found.extents(key)) as table:
            rows = list(_extents(table, options.range))
            about = {"key": key, "page_size": table.page_size, "scanned_ns": table.scanned_ns}
    if options.json:
        output.json({**about, "extents": rows})
    elif options.csv:
        output.document(exporting.as_csv(EXTENT_FIELDS, rows))
    else:
        output.table(EXTENT_FIELDS, rows)
    return ExitCode.DONE


def _extents(table: ExtentTable, span: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """Rows as plain values, addresses in bytes, clipped to ``span`` (bytes, end exclusive)."""
    from memconsole.extents import Flag

    page = table.page_size
    first, last = (0, 1 << 63) if span is None else (span[0] // page, -(-span[1] // page))
    for begin in range(0, len(table), PFN_CHUNK):
        for extent in table.rows(begin, min(begin + PFN_CHUNK, len(table))):
            start = max(extent.offset, first)
            end = min(extent.offset + extent.count, last)
            if start >= end:
                continue
            moved = start - extent.offset if extent.flags & Flag.PRESENT else 0
            yield {
                "offset": start * page,
                "pfn": extent.pfn + moved,
                "count": end - start,
                "flags": _flag_names(extent.flags),
            }


@functools.cache
def _flag_names(bits: int) -> tuple[str, ...]:
    from memconsole.extents import Flag

    return tuple(flag.name.lower() for flag in Flag if bits & flag and flag.name)
