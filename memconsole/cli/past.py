"""Commands about what was recorded: list it, show a time of it, and say what a file of ours is."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from memconsole import exporting, macros, paths
from memconsole.cli import output
from memconsole.cli.connect import source
from memconsole.commandlog import FIELDS, CommandLog, macro_of
from memconsole.errors import BadFile, ExitCode
from memconsole.field import Field
from memconsole.redaction import RedactedSource
from memconsole.source import PastSource, Source
from memconsole.units import format_duration, format_time, parse_time


def _apart(ns: int | None) -> str:
    return "-" if ns is None else format_duration(ns)


TIMES = (
    Field("taken_ns", "Taken", "when the snapshot was taken", lambda row: row["taken_ns"], format_time, width=28),
    Field("apart_ns", "After", "time since the previous one", lambda row: row["apart_ns"], _apart),
)


def history_list(options: argparse.Namespace) -> int:
    """The times at which Snapshots were recorded, oldest first, and how far apart they are."""
    with source(options) as found:
        times = list(found.history(parse_time(options.since, time.time_ns()) - 1 if options.since else 0))
    rows: list[dict[str, Any]] = [
        {"taken_ns": taken, "apart_ns": taken - before if before is not None else None}
        for before, taken in zip([None, *times], times, strict=False)
    ]
    if options.json:
        output.json(rows)
    else:
        output.table(TIMES, rows)
    return ExitCode.DONE


def history_commands(options: argparse.Namespace) -> int:
    """The command lines that console sessions did, the oldest first; or a macro of the actions in them."""
    log = CommandLog(paths.own_state_dir())
    if log.trouble:
        raise BadFile("the command lines cannot be read", log.trouble, "remove the file; the console writes it anew")
    since = parse_time(options.since, time.time_ns()) if options.since else 0
    rows = [each for each in log.lines if each.at_ns >= since and options.session in ("", each.session)]
    if options.macro:
        macro = macro_of(Path(options.macro).stem, rows)
        exporting.write(options.macro, macros.dumps(macro))
        output.note(f"{len(macro.steps)} steps written to {options.macro}")
        return ExitCode.DONE
    output.document(exporting.FORMATS[options.format](FIELDS, rows))
    return ExitCode.DONE


def history_show(options: argparse.Namespace) -> int:
    """The Snapshot that was current at a time, as JSON or as one view of it, to stdout or a file."""
    from memconsole.cli.files import write_json, write_view

    at = parse_time(options.time, time.time_ns())
    with source(options) as found:
        then: Source = PastSource(found, found.at(at))
        moment = RedactedSource(then) if options.redact else then
        if options.format == "json" and not options.view:
            write_json(moment, options)
        else:
            write_view(moment, options)
    return ExitCode.DONE


def inspect(options: argparse.Namespace) -> int:
    """What a file of ours, or this kernel's handover, is, holds, and whether it is whole; exit code 4 if it is not."""
    from memconsole.backend.diagnose.inspect import describe, describe_kernel

    found = describe(Path(options.file)) if options.file else describe_kernel()
    if options.json:
        output.json(found)
    else:
        output.text(f"{found.file}: {found.kind}, version {found.version}")
        for name, value in found.facts.items():
            _fact(name, value)
        if found.findings:
            output.findings(found.findings)
    return ExitCode.FINDINGS if found.findings else ExitCode.DONE


def _fact(name: str, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        output.text(f"  {name}:")
        for item in value:
            output.text("    " + "  ".join(f"{key}={part}" for key, part in item.items()))
    else:
        shown = f"{value} ({format_time(value)})" if name.endswith("_ns") and value is not None else value
        output.text(f"  {name}: {shown}")
