"""What the command line writes: text for people, JSON for programs; no other module writes to stdout."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from memconsole.errors import MemconsoleError
from memconsole.fields import Field
from memconsole.model import Outcome, Plan


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


def outcome(value: Outcome) -> None:
    """What an applied Action did, in one line."""
    text(value.text)
