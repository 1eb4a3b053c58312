"""Commands about snapshots as files: take one, compare two, and what one looks like."""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from pathlib import Path
from typing import Any

from memconsole import document
from memconsole.cli import output
from memconsole.cli.connect import source, source_or_file
from memconsole.errors import BadFile, ExitCode, MemconsoleError, UsageError
from memconsole.model import Part, Snapshot
from memconsole.source import Source
from memconsole.units import parse_time

SIZE = re.compile(r"(\d{2,3})x(\d{2,3})")


def snapshot(options: argparse.Namespace) -> int:
    """A Snapshot as JSON, or one view of it as SVG or text, to stdout or a file."""
    with source_or_file(options) as given:
        found = _redacted(given) if options.redact else given
        if options.format == "json" and not options.view:
            write_json(found, options)
        else:
            write_view(found, options)
    return ExitCode.DONE


def _redacted(given: Source) -> Source:
    from memconsole.redaction import RedactedSource

    return RedactedSource(given)


def wanted(options: argparse.Namespace) -> tuple[Part, ...]:
    """The parts of a Snapshot that its options ask for: placement is a part of what is used."""
    placement = (Part.PLACEMENT,) if options.placement else ()
    return (Part.USAGE, *placement) if options.usage or options.placement else ()


def write_json(found: Source, options: argparse.Namespace) -> None:
    """A Source's Snapshot as JSON, with its tables where ``--pfn`` asks for them."""
    if options.pfn and not options.output:
        raise UsageError(
            "--pfn needs a file", "PFN maps are binary and cannot go to stdout with the JSON", "add -o FILE"
        )
    taken = found.snapshot(wanted(options))
    if not options.output:
        output.json(taken)
        return
    with contextlib.ExitStack() as stack:
        tables = {}
        if options.pfn:
            keys = [f"region:{region.name}" for region in taken.regions] + [
                f"guest:{guest.name}" for guest in taken.guests
            ]
            keys += [f"domain:{domain.group}" for domain in taken.domains if domain.mapped]
            for key in keys:
                try:
                    tables[key] = stack.enter_context(contextlib.closing(found.extents(key)))
                except MemconsoleError as error:
                    output.note(f"memconsole: no PFN map of {key}: {error}")
        from memconsole import recording

        recording.write(options.output, taken, tables)


def write_view(found: Source, options: argparse.Namespace) -> None:
    """One view of a Source: as it looks (SVG, text), or what it says (plain text, JSON, HTML, Markdown)."""
    if options.format in document.FORMATS:
        from memconsole import pages

        title, blocks = pages.of(found, options.view or "overview", options.subject)
        put(options.output, document.FORMATS[options.format](title, blocks))
        return
    from memconsole.views.headless import render

    match = SIZE.fullmatch(options.size)
    if match is None:
        raise UsageError(f"{options.size!r} is not a size in cells", "a size is columns x rows", "write 132x50")
    size = (int(match[1]), int(match[2]))
    picture = render(found, options.view or "overview", options.format, size=size, subject=options.subject or None)
    put(options.output, picture)


def put(path: str | None, text: str) -> None:
    """Write a document to a file, or to stdout where none is given.

    Raises:
        BadFile: the file cannot be written.
    """
    if not path:
        output.document(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{path} cannot be written", str(error), "give another path") from None


def _side(options: argparse.Namespace, name: str) -> Snapshot:
    if name == "live" or name.startswith("@"):
        with source(options) as found:
            return found.snapshot() if name == "live" else found.at(parse_time(name[1:], time.time_ns()))
    from memconsole import recording

    taken, tables = recording.read(name)
    for table in tables.values():
        table.close()
    return taken


def diff(options: argparse.Namespace) -> int:
    """Entities that were added or removed, and fields that changed, from A to B."""
    from memconsole import differ

    changes = differ.changes(_side(options, options.a), _side(options, options.b))
    if options.json:
        output.json(changes)
        return ExitCode.DONE
    for change in changes:
        if change.kind == "changed":
            output.text(f"~ {change.table} {change.key} {change.field}: {_brief(change.old)} -> {_brief(change.new)}")
        else:
            output.text(f"{'+' if change.kind == 'added' else '-'} {change.table} {change.key}")
    return ExitCode.DONE


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def schema(_options: argparse.Namespace) -> int:
    """The JSON Schema of a Snapshot, as published in docs/snapshot.schema.json."""
    from memconsole import recording

    output.json(recording.schema())
    return ExitCode.DONE
