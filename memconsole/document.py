"""Pages of text, tables and pictures as values, and as what people and programs read: HTML, Markdown, plain text, JSON.

A page is a sequence of blocks. HTML is one file that loads nothing from anywhere; in Markdown, pictures stand as SVG
among the text. Plain text is for who hears it: one fact a line, a row of a table as its name and its facts, no
columns, no frames, and each picture as the sentence that says what is in it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from memconsole import escaping
from memconsole.escaping import escape
from memconsole.field import Field


class Heading(msgspec.Struct, frozen=True):
    """The heading of a part; ``level`` 1 is the page's own."""

    text: str
    level: int = 2


class Paragraph(msgspec.Struct, frozen=True):
    """Lines that belong together."""

    lines: tuple[str, ...]


class Rows(msgspec.Struct, frozen=True):
    """Rows of a table: entities and the fields that are shown of them; ``name`` says what one row is."""

    name: str
    fields: tuple[Field, ...]
    rows: tuple[Any, ...]


class Picture(msgspec.Struct, frozen=True):
    """An SVG picture, and the sentence that says what is in it."""

    svg: str
    text: str


Block = Heading | Paragraph | Rows | Picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2rem; border-bottom: 1px solid #bbb; }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; display: block; overflow-x: auto; }
th, td { border: 1px solid #bbb; padding: .2rem .5rem; text-align: left; vertical-align: top; }
th { background: #eee; } td.n { text-align: right; } svg { max-width: 100%; height: auto; }
"""


def as_html(title: str, blocks: Iterable[Block]) -> str:
    """One HTML page that needs nothing else."""
    body = "\n".join(part for block in blocks for part in _html(block))
    head = f'<meta charset="utf-8"><title>{_h(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _h(text: str) -> str:
    return html.escape(escape(text))


def _html(block: Block) -> Iterator[str]:
    match block:
        case Heading():
            yield f"<h{block.level}>{_h(block.text)}</h{block.level}>"
        case Paragraph():
            yield f"<p>{'<br>'.join(map(_h, block.lines))}</p>"
        case Picture():
            text = _h(block.text)
            yield f'<figure role="img" aria-label="{text}">{block.svg}<figcaption>{text}</figcaption></figure>'
        case Rows():
            head = "".join(f'<th scope="col">{_h(field.title)}</th>' for field in block.fields)
            yield f"<table><thead><tr>{head}</tr></thead><tbody>"
            for row in block.rows:
                cells = (f"<td{' class=n' if each.right else ''}>{_h(each.text(row))}</td>" for each in block.fields)
                yield f"<tr>{''.join(cells)}</tr>"
            yield "</tbody></table>"


def as_markdown(title: str, blocks: Iterable[Block]) -> str:
    """One Markdown page; what looks like markup in it is text."""
    del title  # the first heading says it
    return "\n\n".join(part for block in blocks for part in _markdown(block)) + "\n"


def _m(text: str) -> str:
    found = escape(text)
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~" else char for char in found)


def _markdown(block: Block) -> Iterator[str]:
    match block:
        case Heading():
            yield f"{'#' * block.level} {_m(block.text)}"
        case Paragraph():
            yield "  \n".join(map(_m, block.lines))
        case Picture():
            yield f"{block.svg}\n\n{_m(block.text)}"
        case Rows():
            lines = [f"| {' | '.join(_m(field.title) for field in block.fields)} |"]
            lines.append(f"|{'|'.join('---:' if field.right else '---' for field in block.fields)}|")
            lines += [f"| {' | '.join(_m(field.text(row)) for field in block.fields)} |" for row in block.rows]
            yield "\n".join(lines)


def as_plain(title: str, blocks: Iterable[Block]) -> str:
    """Text to be heard: a fact a line."""
    del title  # the first heading says it
    return "\n".join(escape(line) for block in blocks for line in _plain(block)).strip("\n") + "\n"


def _plain(block: Block) -> Iterator[str]:
    match block:
        case Heading():
            yield from ("", f"{block.text}.")
        case Paragraph():
            yield from block.lines
        case Picture():
            yield block.text
        case Rows():
            first, *others = block.fields
            for row in block.rows:
                yield f"{block.name} {first.text(row)}."
                told = ((field.title, field.text(row)) for field in others)
                yield from (f"  {title}: {text}." for title, text in told if text != "-")
            if not block.rows:
                yield f"No {block.name.lower()}."


def as_json(title: str, blocks: Iterable[Block]) -> str:
    """An object: the title, and every block by its kind; rows as objects, a member a field, as they are measured."""
    found = {"title": title, "blocks": [_object(block) for block in blocks]}
    return indented(found)


def indented(value: Any) -> str:
    """A value as an indented JSON document, in which nothing acts."""
    return escaping.json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()) + "\n"


def _object(block: Block) -> Mapping[str, Any]:
    match block:
        case Heading():
            return {"heading": block.text, "level": block.level}
        case Paragraph():
            return {"text": block.lines}
        case Picture():
            return {"picture": block.text}
        case Rows():
            rows: Sequence[Any] = [{field.id: field.get(row) for field in block.fields} for row in block.rows]
            return {"table": block.name, "rows": rows}


FORMATS: Mapping[str, Callable[[str, Iterable[Block]], str]] = {
    "html": as_html,
    "markdown": as_markdown,
    "plain": as_plain,
    "json": as_json,
}
SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".txt": "plain", ".json": "json"}
