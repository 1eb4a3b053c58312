"""Facts about one entity, as many columns of ``title value`` as there is room for; long values wrap in full width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from textual.content import Content
from textual.geometry import Region
from textual.widget import Widget

from memconsole.escaping import escape
from memconsole.field import Field
from memconsole.views.looks import value_look
from memconsole.views.widgets.fitting import fit

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
        glyph, tone = value_look(field.id, value)
        text = field.show(value)
        changed = field.news and before is not None and field.get(before) != value
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
        wrapped = textwrap.wrap(escape(fact.text), max(width - LABEL - 2, 10)) or [""]
        lines.append(Content.assemble(*_parts(fact, wrapped[0])))
        lines += [Content.styled(" " * (LABEL + 1) + text, STYLES[fact.tone]) for text in wrapped[1:]]
    return lines


def _parts(fact: Fact, text: str) -> list[tuple[str, str]]:
    style = "bold $accent" if fact.changed else STYLES[fact.tone]
    return [(fit(fact.title, LABEL), "$secondary"), ("•" if fact.changed else " ", "bold $accent"), (text + " ", style)]


class Lines(Widget):
    """Lines of text as high as they are; where none of them wraps, those alone are painted again that changed."""

    DEFAULT_CSS = "Lines { height: auto; width: 1fr; }"
    ALLOW_SELECT = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._content = Content("")
        self._lines: tuple[Content, ...] = ()

    def show_lines(self, lines: Sequence[Content]) -> None:
        """Show these lines."""
        before, self._lines = self._lines, tuple(lines)
        changed = [row for row, (was, now) in enumerate(zip(before, lines, strict=False)) if not now.is_same(was)]
        if not changed and len(before) == len(lines):
            return
        self._content = Content("\n").join(lines)
        if len(before) == len(lines) and self._is_a_row_each(before) and self._is_a_row_each(lines):
            self.refresh(*(Region(0, row, self.size.width, 1) for row in changed))
        else:
            self.refresh(layout=len(before) != len(lines))

    def _is_a_row_each(self, lines: Sequence[Content]) -> bool:
        return self.styles.text_wrap == "nowrap" and not any("\n" in each.plain for each in lines)

    def render(self) -> Content:
        """The lines."""
        return self._content
