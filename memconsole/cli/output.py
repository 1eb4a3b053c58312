"""What the command line writes: text for people, JSON for programs; no other module writes to stdout."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from memconsole import timeline
from memconsole.errors import MemconsoleError
from memconsole.fields import Field
from memconsole.model import Condition, HandoffReport, Outcome, Plan, Severity
from memconsole.units import format_size


def text(line: str = "") -> None:
    """One line on stdout."""
    print(line)


def note(line: str) -> None:
    """One line on stderr: what is not the answer itself."""
    print(line, file=sys.stderr)


def json(value: Any) -> None:
    """A value as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def failure(error: MemconsoleError, *, as_json: bool) -> None:
    """An error: its sentence on stderr; with ``--json`` also its parts on stdout."""
    if as_json:
        parts = {"code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy}
        json({"error": parts})
    line = f"memconsole: {error.what}" + (f": {error.why}" if error.why else "")
    note(line)
    if error.remedy:
        note(f"  remedy: {error.remedy}")


def table(fields: Sequence[Field], rows: Iterable[Any]) -> None:
    """Rows in aligned columns under their titles."""
    cells = [[field.text(row) for field in fields] for row in rows]
    widths = [max([len(field.title), *(len(line[i]) for line in cells)]) for i, field in enumerate(fields)]

    def line(words: Sequence[str]) -> str:
        parts = [
            word.rjust(width) if field.right else word.ljust(width)
            for word, width, field in zip(words, widths, fields, strict=True)
        ]
        return "  ".join(parts).rstrip()

    text(line([field.title for field in fields]))
    for row in cells:
        text(line(row))


def table_csv(fields: Sequence[Field], rows: Iterable[Any]) -> None:
    """Rows as CSV under the fields' ids."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([field.id for field in fields])
    writer.writerows([field.text(row) for field in fields] for row in rows)


def plan(value: Plan) -> None:
    """A plan: the command it belongs to, its effects in order, and its refusals."""
    text(f"plan: {value.cli}  [{value.danger}]")
    for number, effect in enumerate(value.effects, 1):
        undo = f"  (undo: {effect.undo})" if effect.undo else ""
        text(f"  {number}. {effect.text}{undo}")
    for refusal in value.refusals:
        why = f": {refusal.why}" if refusal.why else ""
        text(f"  refused {refusal.code}: {refusal.what}{why}")
        if refusal.remedy:
            text(f"    remedy: {refusal.remedy}")
    conditions([each for each in value.conditions if not each.ok and each.severity is not Severity.ERROR])


def conditions(values: Iterable[Condition], *, every: bool = False) -> None:
    """Conditions of a handoff: those that do not hold with evidence and remedy; with ``every`` the others too."""
    for each in values:
        if each.ok and not every:
            continue
        word = "ok" if each.ok else "REFUSES" if each.severity is Severity.ERROR else "warns"
        text(f"  {word:<8} {each.id}: {'' if each.ok else 'wanted: '}{each.what}")
        if each.evidence:
            text(f"           {each.evidence}")
        if each.remedy and not each.ok:
            text(f"           remedy: {each.remedy}")


def handoff(report: HandoffReport) -> None:
    """A report: a line that says it all, the picture of its time, and its regions."""
    back = sum(guest.back for guest in report.guests)
    head = f"{report.kind} {report.state}: {report.from_kernel} to {report.to_kernel}"
    text(f"{head}, {back} of {len(report.guests)} guests back" + (f": {report.why}" if report.why else ""))
    for line in timeline.lines(report, shutil.get_terminal_size((120, 24)).columns - 2):
        text(f"  {line}")
    for region in report.regions:
        place = {True: "every page where it was", False: "PAGES MOVED", None: "not compared"}[region.same]
        contents = {True: ", contents the same", False: ", CONTENTS DIFFER", None: ""}[region.contents]
        text(f"  {region.name}: {format_size(region.size)} in {region.runs} runs, {place}{contents}")
    for device in report.devices:
        text(f"  {device.bdf} of {device.guest}: {timeline.device(device)}")
    for window in report.windows:
        text(f"  window {window.window} of {window.guest}: {'mapped again' if window.back else window.why}")
    for line in report.notes:
        text(f"  note: {line}")


def outcome(value: Outcome) -> None:
    """What an applied Action did, in one line."""
    text(value.text)
