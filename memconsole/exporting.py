"""Rows of a table as a document: CSV and JSON for programs, text and SVG for people; the same for both faces."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape as escape_markup
from pathlib import Path
from typing import Any

from memconsole import document
from memconsole.errors import BadFile, UsageError
from memconsole.escaping import escape
from memconsole.field import Field

Rows = Iterable[Any]
CELL = (7.8, 18)
"""Width and height of a character in a picture, in its units."""


def text(fields: Sequence[Field], rows: Rows) -> str:
    """Aligned columns under their titles."""
    cells = [[escape(field.text(row)) for field in fields] for row in rows]
    widths = [max([len(field.title), *(len(line[i]) for line in cells)]) for i, field in enumerate(fields)]

    def line(words: Sequence[str]) -> str:
        parts = [
            word.rjust(width) if field.right else word.ljust(width)
            for word, width, field in zip(words, widths, fields, strict=True)
        ]
        return "  ".join(parts).rstrip() + "\n"

    return line([field.title for field in fields]) + "".join(map(line, cells))


def as_csv(fields: Sequence[Field], rows: Rows) -> str:
    """CSV under the fields' ids."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.id for field in fields])
    writer.writerows([escape(field.text(row)) for field in fields] for row in rows)
    return out.getvalue()


def as_json(fields: Sequence[Field], rows: Rows) -> str:
    """An array of objects, a member a field; numbers as they are measured."""
    return document.indented([{field.id: field.get(row) for field in fields} for row in rows])


def svg(fields: Sequence[Field], rows: Rows) -> str:
    """A picture of the text, its titles bold; it needs no font of its own and no program to show it."""
    head, *lines = text(fields, rows).splitlines()
    width = round(max(len(line) for line in (head, *lines)) * CELL[0] + 2 * CELL[1])
    height = (len(lines) + 3) * CELL[1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<g font-family="monospace" font-size="13" fill="#1a1a1a" xml:space="preserve">',
        *(_line(number, line) for number, line in enumerate((head, *lines)) if line),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _line(number: int, line: str) -> str:
    weight = "normal" if number else "bold"
    place = f'x="{CELL[1]}" y="{(number + 2) * CELL[1]}" textLength="{round(len(line) * CELL[0])}"'
    return f'<text {place} font-weight="{weight}">{escape_markup(line)}</text>'


def plain(fields: Sequence[Field], rows: Rows) -> str:
    """Text to be heard: each row as its name and its facts, a fact a line."""
    return document.as_plain("", [document.Rows(fields[0].title, tuple(fields), tuple(rows))])


FORMATS: Mapping[str, Callable[[Sequence[Field], Rows], str]] = {
    "text": text,
    "csv": as_csv,
    "json": as_json,
    "svg": svg,
    "plain": plain,
}
SUFFIXES = {".txt": "text", ".csv": "csv", ".json": "json", ".svg": "svg"}


def format_of(path: str) -> str:
    """The format that a file's name asks for.

    Raises:
        UsageError: it asks for none.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(
            f"{path} has no format", "a file is written as its name ends", f"give it one of these endings: {known}"
        )
    return SUFFIXES[suffix]


def write(path: str, document: str) -> None:
    """Write a document to a file that is not there yet.

    Raises:
        BadFile: it is there, or cannot be written.
    """
    try:
        with Path(path).expanduser().open("x", encoding="utf-8") as file:
            file.write(document)
    except FileExistsError:
        raise BadFile(f"{path} exists already", "an export does not overwrite a file", "give another name") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be written", str(error), "give another path") from None
