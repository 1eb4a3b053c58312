"""What is painted, freed of what a terminal would obey: the last door; behind it only the codes of the app are written.

Widgets show text of others by :func:`memconsole.escaping.escape`. What Textual's own widgets are given (the value of an
input, a choice) is not theirs to escape: there each such character is a dot of the same width.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter


class Harmless(LineFilter):
    """Lines in which nothing acts, behind other filters: one filter a line, since each makes a line anew."""

    def __init__(self, before: Sequence[LineFilter] = ()) -> None:
        super().__init__()
        self.before = tuple(before)

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The segments, their widths as they were."""
        for each in self.before:
            segments = each.apply(segments, background)
        if all(text.isprintable() for text, _, _ in segments):
            return segments
        return [Segment("".join(map(_harmless, text)), style, control) for text, style, control in segments]


def _harmless(char: str) -> str:
    return char if char.isprintable() else "·" * cell_len(char)
