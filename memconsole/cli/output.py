"""What the command line writes: text for people, JSON for programs; no other module writes to stdout."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from memconsole import exporting, timeline
from memconsole.document import indented
from memconsole.errors import MemconsoleError
from memconsole.escaping import escape
from memconsole.field import Field
from memconsole.model import Condition, Finding, HandoffReport, Outcome, Plan, Severity
from memconsole.units import format_size

_kept: ContextVar[io.StringIO | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[io.StringIO]:
    """Keep what this thread's commands write, instead of writing it."""
    text = io.StringIO()
    before = _kept.set(text)
    try:
        yield text
    finally:
        _kept.reset(before)


def text(line: str = "") -> None:
    """One line on stdout."""
    document(escape(line) + "\n")


def note(line: str) -> None:
    """One line on stderr: what is not the answer itself."""
    print(escape(line), file=_kept.get() or sys.stderr)


def json(value: Any) -> None:
    """A value as indented JSON."""
    document(indented(value))


def failure(error: MemconsoleError, *, as_json: bool) -> None:
    """An error: its sentence on stderr; with ``--json`` also its parts on stdout."""
    if as_json:
        parts = {"code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy}
        json({"error": parts})
    line = f"memconsole: {error.what}" + (f": {error.why}" if error.why else "")
    note(line)
    if error.remedy:
        note(f"  remedy: {error.remedy}")


def document(text: str) -> None:
    """A whole document, as it is: it was escaped where it was made."""
    (_kept.get() or sys.stdout).write(text)


def table(fields: Sequence[Field], rows: Iterable[Any]) -> None:
    """Rows in aligned columns under their titles."""
    document(exporting.text(fields, rows))


def plan(value: Plan) -> None:
    """A plan: the command it belongs to, its effects in order, and its refusals."""
    text(f"plan: {value.cli}  [{value.danger}]")
    for number, effect in enumerate(value.effects, 1):
        undo = f"  (undo: {effect.undo})" if effect.undo else ""
        text(f"  {number}. {effect.text}{undo}")
    if value.note:
        text(f"  note: {value.note}")
    for refusal in value.refusals:
        why = f": {refusal.why}" if refusal.why else ""
        text(f"  refused {refusal.code}: {refusal.what}{why}")
        if refusal.remedy:
            text(f"    remedy: {refusal.remedy}")
    conditions([each for each in value.conditions if not each.ok and each.severity is not Severity.ERROR])


def conditions(values: Iterable[Condition], *, every: bool = False) -> None:
    """Conditions of a handoff: those that do not hold with risk and remedy; with ``every`` the others too."""
    for each in values:
        if each.ok and not every:
            continue
        if each.ok:
            seen = f" ({each.observed})" if each.observed else ""
            text(f"  ok    {each.id}: {each.requirement}{seen}")
            continue
        text(f"  {'FAIL' if each.severity is Severity.ERROR else 'warn'}  {each.id}: {each.observed}")
        text(f"        risk: {each.risk}")
        text(f"        remedy: {each.remedy}")


def findings(values: Iterable[Finding]) -> None:
    """Findings: what was observed, where, what it leads to, and what to do about it."""
    for each in values:
        text(f"{each.severity}  {each.id} {each.subject}: {each.observed}")
        for name, said in (("risk", each.risk), ("seen in", each.evidence), ("remedy", each.remedy)):
            if said:
                text(f"         {name}: {said}")


def handoff(report: HandoffReport) -> None:
    """A report: a line that says it all, the picture of its time, and its regions."""
    text(timeline.headline(report) + (f": {report.why}" if report.why else ""))
    for line in timeline.lines(report, shutil.get_terminal_size((120, 24)).columns - 2):
        text(f"  {line}")
    for guest in report.guests:
        if guest.lane:
            text(f"  {guest.name}: {guest.lane}")
        if said := timeline.clock(guest):
            text(f"  {guest.name}: its clock: {said}")
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
