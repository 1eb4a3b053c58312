"""Facts about one entity, as many columns of ``title value`` as there is room for; long values wrap in full width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from textual.content import Content
from textual.widget import Widget

from memconsole.fields import Field
from memconsole.views.looks import look
from memconsole.views.widgets.table import fit, printable

LABEL = 11
CELL = 38


class Fact(NamedTuple):
    """What a thing is called, its text, and its tone (see ``looks``); ``changed`` since the last refresh."""

    title: str
    text: str
    tone: str = ""
    changed: bool = False


STYLES = {"good": "$success", "warn": "$warning", "bad": "$error", "dim": "$text-muted", "calm": "$primary", "": ""}


def facts_of(fields: Sequence[Field], item: Any, before: Any | None) -> list[Fact]:
    """Every field of an entity; what differs from ``before`` is marked."""
    facts = []
    for field in fields:
        value = field.get(item)
        glyph, tone = look(field.id, value)
        text = field.show(value)
        changed = before is not None and field.get(before) != value
        facts.append(Fact(field.title, f"{glyph} {text}" if glyph else text, tone, changed))
    return facts


def laid_out(facts: Sequence[Fact], width: int) -> list[Content]:
    """The facts in lines of ``width`` cells."""
    columns = max(1, width // CELL)
    cell = width // columns
    long = [fact for fact in facts if len(fact.text) > cell - LABEL - 3]
    short = [fact for fact in facts if fact not in long]
    height = -(-len(short) // columns)
    lines = []
    for row in range(height):
        parts: list[tuple[str, str]] = []
        for column in range(columns):
            index = column * height + row
            if index < len(short):
                parts += _parts(short[index], fit(short[index].text, cell - LABEL - 3))
        lines.append(Content.assemble(*parts))
    for fact in long:
        wrapped = textwrap.wrap(printable(fact.text), max(width - LABEL - 2, 10)) or [""]
        lines.append(Content.assemble(*_parts(fact, wrapped[0])))
        lines += [Content.styled(" " * (LABEL + 1) + text, STYLES[fact.tone]) for text in wrapped[1:]]
    return lines


def _parts(fact: Fact, text: str) -> list[tuple[str, str]]:
    style = "bold $accent" if fact.changed else STYLES[fact.tone]
    return [(fit(fact.title, LABEL), "$secondary"), ("•" if fact.changed else " ", "bold $accent"), (text + " ", style)]


class Lines(Widget):
    """Lines of text as high as they are; painted again only when they change."""

    DEFAULT_CSS = "Lines { height: auto; width: 1fr; }"
    ALLOW_SELECT = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._content = Content("")

    def say(self, lines: Sequence[Content]) -> None:
        """Show these lines."""
        content = Content("\n").join(lines)
        if not content.is_same(self._content):
            layout = content.plain.count("\n") != self._content.plain.count("\n")
            self._content = content
            self.refresh(layout=layout)

    def render(self) -> Content:
        """The lines."""
        return self._content
