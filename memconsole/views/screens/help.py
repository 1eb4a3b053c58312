"""The help: keys that work here, signs and columns of what is shown, and what the words on the screen mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content

from memconsole import glossary
from memconsole.views.bound import bound
from memconsole.views.screens.dialogs import Dialog
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.fitting import fit

WIDTH = 70
"""Cells of the help's text where the terminal has 80 columns or more."""


class KeyHelp(NamedTuple):
    """One line of help: the keys, what they do, why not here (if so), and the id by which they are remapped."""

    keys: str
    text: str
    why: str
    id: str


class Sign(NamedTuple):
    """A glyph, a mark or a column's title, and what it says."""

    glyph: str
    text: str


class Helped(NamedTuple):
    """All that the help says: keys by place, signs, the columns of a table, and words that are on the screen."""

    keys: Sequence[tuple[str, Sequence[KeyHelp]]]
    signs: Sequence[Sign]
    columns: Sequence[Sign]
    words: Sequence[glossary.Term]


class Help(Dialog[None]):
    """What works here and what is shown here; then every word there is."""

    DEFAULT_CSS = "Help > Vertical { width: 76; height: 94%; }"
    BINDINGS: ClassVar[list[BindingType]] = [bound("help-close", "cancel", "Close", show=False)]

    def __init__(self, helped: Helped) -> None:
        super().__init__()
        self._helped = helped

    def compose(self) -> ComposeResult:
        """The lines."""
        with Vertical() as box:
            box.border_title = "Keys, signs and words of what is shown"
            box.border_subtitle = "Escape closes"
            with VerticalScroll():
                yield Lines()

    def on_mount(self) -> None:
        """Write the lines."""
        self._write()

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._write()

    def _write(self) -> None:
        width = max(min(WIDTH, self.app.size.width - 8), 30)
        self.query_one(Lines).show_lines([*help_lines(self._helped, width)])


def help_lines(helped: Helped, width: int) -> Iterator[Content]:
    """The help in lines of ``width`` cells, nothing of it cut."""
    for title, keys in helped.keys:
        yield Content.styled(title, "bold $primary")
        for key in keys:
            yield from _key_lines(key, width)
        yield Content("")
    yield Content.styled("the word at the right remaps a key in console.toml (memconsole keys)", "$text-muted")
    for title, signs in (("Signs on the screen", helped.signs), ("Columns", helped.columns)):
        if signs:
            yield Content("")
            yield Content.styled(title, "bold $primary")
            lead = max(len(sign.glyph) for sign in signs) + 2
            for sign in signs:
                yield from _told(f"  {sign.glyph:<{lead}}", sign.text, width)
    yield Content("")
    yield Content.styled("Filter (docs/filters.md)", "bold $primary")
    for example, text in FILTERS:
        yield from _told(f"  {example:<16}", text, width)
    for title, terms in (("Words on the screen", helped.words), ("All words", glossary.TERMS)):
        if terms:
            yield Content("")
            yield Content.styled(title, "bold $primary")
            for term in terms:
                yield line([(f"  {term.word}", "bold $accent")])
                yield from _told("      ", term.meaning, width)


FILTERS = (
    ("web", "in any shown column"),
    ("state:mapped", "in one field"),
    ("size>1G", "compared as it is measured"),
    ("!paused", "rows without it"),
    ("(a | b)", "either; several words: all of them"),
)


def _key_lines(key: KeyHelp, width: int) -> Iterator[Content]:
    room = max(width - 16 - 14, 14)
    first, *rest = textwrap.wrap(key.text, room) or [""]
    style = "$text-muted" if key.why else ""
    yield line([(f"  {key.keys:<13} ", "bold $accent"), (fit(first, room), style), (f" {key.id}", "$text-muted")])
    for part in rest:
        yield line([(" " * 16 + part, style)])
    if key.why:
        yield from _told(" " * 16 + "✖ ", key.why, width, "$warning")


def _told(lead: str, text: str, width: int, style: str = "") -> Iterator[Content]:
    """A text behind a lead, its further lines below its first one."""
    for row, part in enumerate(textwrap.wrap(text, max(width - len(lead), 14)) or [""]):
        yield line([(lead if not row else " " * len(lead), "bold $accent"), (part, style)])
