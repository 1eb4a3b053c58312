"""Commands that list: the tables of a Snapshot, findings, and PFN maps."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from memconsole import joined, recording
from memconsole.cli import output
from memconsole.cli.connect import source
from memconsole.errors import ExitCode, NotFound, UsageError
from memconsole.fields import FINDINGS, REACHED, SPANS, TABLES, Field
from memconsole.model import Snapshot
from memconsole.units import format_address

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable
    from memconsole.source import Source

PFN_CHUNK = 65536


def listing(options: argparse.Namespace) -> int:
    """One table of the Snapshot as text, CSV or JSON (the entities as the schema describes them)."""
    table = TABLES[options.table]
    fields = table.pick(options.fields)
    with source(options) as found:
        snapshot = found.snapshot()
    rows = table.rows(snapshot)
    if options.json:
        output.json(_chosen(fields, rows) if options.fields else rows)
    elif options.csv:
        output.table_csv(fields, rows)
    else:
        output.table(fields, rows)
        _note_gaps(snapshot)
    return ExitCode.DONE


def _chosen(fields: tuple[Field, ...], rows: Iterable[Any]) -> list[dict[str, Any]]:
    return [{field.id: field.get(row) for field in fields} for row in rows]


def _note_gaps(snapshot: Snapshot) -> None:
    for gap in snapshot.gaps:
        output.note(f"not seen: {gap.source}: {gap.why}" + (f" ({gap.remedy})" if gap.remedy else ""))


def audit(options: argparse.Namespace) -> int:
    """Every finding with evidence and remedy; exit code 4 when there are any."""
    with source(options) as found:
        snapshot = found.snapshot()
    if options.json:
        output.json(snapshot.findings)
    elif snapshot.findings:
        output.table(FINDINGS.pick("all"), snapshot.findings)
    else:
        output.text("no findings")
    _note_gaps(snapshot)
    return ExitCode.FINDINGS if snapshot.findings else ExitCode.DONE


def pfn_key(snapshot: Snapshot, target: str) -> str:
    """The table key a name means: one with its kind (``region:NAME``) as it is, a bare name where it is unambiguous.

    Raises:
        NotFound: no region or guest has the name.
        UsageError: both have it.
    """
    if target.startswith(("region:", "guest:", "domain:")):
        return target
    keys = [f"region:{region.name}" for region in snapshot.regions if region.name == target]
    keys += [f"guest:{guest.name}" for guest in snapshot.guests if guest.name == target]
    if not keys:
        raise NotFound(f"no region or guest is called {target!r}", "", "see memconsole regions, memconsole guests")
    if len(keys) > 1:
        raise UsageError(f"{target!r} is a region and a guest", "", f"write {' or '.join(keys)}")
    return keys[0]


def reach(options: argparse.Namespace) -> int:
    """A guest's memory with its frames, windows and IOVAs; or a frame with everybody who reaches it."""
    with contextlib.ExitStack() as stack:
        found: Source
        if options.origin:
            found = stack.enter_context(contextlib.closing(recording.Recording(options.origin)))
        else:
            found = stack.enter_context(source(options))
        answer = joined.ask(found.snapshot(), found, options.target)
    if options.json:
        output.json(answer)
    elif isinstance(answer, joined.Joined):
        output.table(SPANS.pick("all"), answer.spans)
        if answer.more:
            output.note(f"more than {len(answer.spans):,} spans: the rest is not listed")
    else:
        for line in joined.about(answer):
            output.text(line)
        output.table(REACHED.pick("all"), answer.reached)
    for gap in answer.unseen:
        output.note(f"not seen: {gap.source}: {gap.why}" + (f" ({gap.remedy})" if gap.remedy else ""))
    return ExitCode.DONE


EXTENT_FIELDS = (
    Field("offset", "Address", "gpa of a guest, offset of a region", lambda e: e["offset"], format_address, right=True),
    Field("pfn", "PFN", "page frame number", lambda e: e["pfn"], lambda value: f"{value:#x}", right=True),
    Field("count", "Pages", "pages in the run", lambda e: e["count"], right=True),
    Field("flags", "Flags", "present, swap, file, huge...", lambda e: e["flags"], lambda value: "|".join(value) or "-"),
)


def pfn(options: argparse.Namespace) -> int:
    """The extents of a region (by offset) or guest (by gpa, hva where none is known)."""
    with source(options) as found:
        key = pfn_key(found.snapshot(), options.target)
        with contextlib.closing(found.extents(key)) as table:
            rows = list(_extents(table, options.range))
            page_size = table.page_size
    if options.json:
        output.json({"key": key, "page_size": page_size, "extents": rows})
    elif options.csv:
        output.table_csv(EXTENT_FIELDS, rows)
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
